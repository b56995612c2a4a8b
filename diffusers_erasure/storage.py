"""An erasure's files in a folder: read without leaving it; and every file and folder here is written whole or not at all."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ErasureConfigError, ErasureError, ErasureFileError, ErasureInputError, ErasureNotFoundError
from .schema import CARD_FILE, CONFIG_FILE, MAX_CONFIG_BYTES, TENSOR_FILES, ErasureConfig, FileRecord
from .tensors import sha256


@dataclass(frozen=True)
class Contents:
    """What an erasure's files hold, each read, parsed and hashed once.

    Attributes:
        config: the configuration.
        tensors: the tensor files' bytes by name: those that the configuration names, of its sizes and SHA-256.
    """

    config: ErasureConfig
    tensors: Mapping[str, bytes]

    @classmethod
    def read(cls, config: bytes, read: Callable[[str, FileRecord], bytes]) -> "Contents":
        """Read an erasure's files.

        Args:
            config (`bytes`): the configuration.
            read: gives a tensor file, after `check_file`.

        Raises:
            ErasureConfigError: the configuration is not valid, or does not name the files in which its tensors lie.
            ErasureFileError: a file is missing, or not the one that the configuration names.
        """
        parsed = ErasureConfig.from_json(config)
        needed = parsed.tensor_files
        if set(parsed.files) != needed:
            raise ErasureConfigError(f"`files` names {sorted(parsed.files)}, but the tensors lie in {sorted(needed)}.")
        return cls(parsed, {name: read(name, parsed.files[name]) for name in sorted(needed)})


def check_file(name: str, data: bytes, record: FileRecord) -> bytes:
    """Return a file's content, where it is the one that the configuration names.

    Raises:
        ErasureFileError: it has another size or SHA-256.
    """
    if len(data) != record.size or sha256(data) != record.sha256:
        raise ErasureFileError(
            f"{name} is not the file that {CONFIG_FILE} names: {len(data)} bytes instead of {record.size}, or another "
            "SHA-256. It was cut short or changed; download or save it again."
        )
    return data


def local_folder(place: str | os.PathLike[str]) -> Path | None:
    """The folder that a path names: itself, or the one in which an erasure's file lies.

    Returns:
        `Path`: the folder, or `None` where there is none and the name may be that of a repository.

    Raises:
        ErasureNotFoundError: it is a path for certain, and leads to no folder and no file of an erasure.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.name in (CONFIG_FILE, CARD_FILE, *TENSOR_FILES):
        return path.parent
    if path.is_file():
        raise ErasureNotFoundError(
            f"{path} is a file, and an erasure is a folder. If it is a plain LoRA, load it as one with "
            '`load_erasure(..., method="lora")`.'
        )
    if str(place).startswith((".", "/", "~")) or path.suffix in (".json", ".safetensors"):
        raise ErasureNotFoundError(f"There is no folder and no file {str(place)!r}.")
    return None


def read_folder(folder: Path, subfolder: str | None = None) -> Contents:
    """Read an erasure's files from a local folder; only the schema's names, and nothing outside the folder.

    Raises:
        ErasureNotFoundError: there is no configuration.
        ErasureConfigError: it is not valid.
        ErasureFileError: a file is missing, lies outside the folder, or is not the one that the configuration names.
    """
    root = folder.resolve()
    place = (root / subfolder).resolve() if subfolder else root
    if not place.is_relative_to(root):
        raise ErasureInputError(f"`subfolder` must lie inside {folder}, not at {subfolder!r}.")
    if not (place / CONFIG_FILE).is_file():
        hint = (
            ' It holds a plain LoRA; load it as one with `load_erasure(..., method="lora")`.'
            if any(place.glob("*.safetensors"))
            else ""
        )
        raise ErasureNotFoundError(f"{place} holds no erasure: there is no {CONFIG_FILE}.{hint}")
    return Contents.read(
        read_inside(place, CONFIG_FILE, MAX_CONFIG_BYTES),
        lambda name, record: check_file(name, read_inside(place, name, record.size), record),
    )


def read_inside(folder: Path, name: str, limit: int) -> bytes:
    """Read a file of a folder (resolved), also where it is a link within it or into the Hub's cache.

    Raises:
        ErasureFileError: it is missing, no plain file, larger than `limit`, or a link that leads out.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        if not real.is_file() or not (real.is_relative_to(folder) or real.parent == _blobs(folder)):
            raise ErasureFileError(f"{path} is no plain file, or a link that leads out of its folder.")
        size = real.stat().st_size
        if size > limit:
            raise ErasureFileError(f"{path} has {size} bytes; at most {limit} were expected.")
        with open(real, "rb") as handle:
            return handle.read(limit + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ErasureFileError(f"{path} is missing or cannot be read: {error}") from error


def in_hub_cache(folder: Path) -> bool:
    """Whether a folder belongs to the Hub's cache, which is not ours to write to."""
    return _blobs(folder) is not None


def _blobs(folder: Path) -> Path | None:
    """Where the Hub's cache keeps the content of a snapshot's files: `models--x--y/snapshots/<commit>` links there."""
    for place in (folder, *folder.parents):
        repo = place.parent.parent
        if place.parent.name == "snapshots" and repo.name.startswith("models--"):
            return repo / "blobs"
    return None


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a hidden file beside it, flushed to the disk, then a rename.

    What was there stays until then, and where this fails or is interrupted. The new file has the permissions of any.

    Args:
        path (`Path`): the file; its folder exists.
        data (`bytes`): the content.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that is new or empty, whole or not at all: a hidden one beside it, flushed to the disk, then a rename.

    Raises:
        OSError: it cannot be written, or is not empty by then.
    """
    with _work_beside(folder) as work:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        _flush(fresh)
        os.replace(fresh, folder)


@contextlib.contextmanager
def _work_beside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside another one, on the same disk. It is deleted at the end, with all that is left in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", dir=folder.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def write_folder(folder: Path, files: Mapping[str, bytes], *, without: Collection[str] = ()) -> list[Path]:
    """Write files so that the folder holds all of them or none: a temporary folder beside it, then a rename.

    What else lies there stays, but for the tensors of an earlier erasure and the files named in `without`.
    """
    folder = folder.expanduser().resolve()  # behind a link, so that the link stays
    if folder.exists() and not folder.is_dir():
        raise ErasureInputError(f"{folder} is a file; name a folder.")
    if folder.exists() and folder.samefile(Path.cwd()):
        raise ErasureInputError("The current folder cannot be replaced as a whole; name a new folder in it.")
    try:
        with _work_beside(folder) as work:
            fresh, old = work / "new", work / "old"
            fresh.mkdir()
            for name, data in files.items():
                (fresh / name).write_bytes(data)
            _flush(fresh)
            for name, data in files.items():
                if (fresh / name).read_bytes() != data:
                    raise ErasureFileError(f"{fresh / name} does not read back as it was written; nothing was saved.")
            if folder.exists():
                _replace(folder, fresh, old, {*TENSOR_FILES, CONFIG_FILE, *files, *without})
            else:
                os.rename(fresh, folder)
    except OSError as error:
        raise ErasureError(f"Saving to {folder} failed, nothing was changed there: {error}") from error
    return [folder / name for name in files]


def _replace(folder: Path, fresh: Path, old: Path, ours: Collection[str]) -> None:
    """Put `fresh` in the place of `folder`, which becomes `old`, but for what is not ours: that stays."""
    os.rename(folder, old)
    foreign = [entry.name for entry in old.iterdir() if entry.name not in ours]
    try:
        for name in foreign:
            os.rename(old / name, fresh / name)
        os.rename(fresh, folder)
    except BaseException:
        for name in foreign:
            if not os.path.lexists(old / name):
                os.rename(fresh / name, old / name)
        os.rename(old, folder)
        raise
