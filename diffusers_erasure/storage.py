"""An erasure's files in a folder: read without leaving it, written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from .errors import ErasureConfigError, ErasureError, ErasureFileError, ErasureInputError, ErasureNotFoundError
from .schema import CARD_FILE, CONFIG_FILE, MAX_CONFIG_BYTES, TENSOR_FILES, ErasureConfig


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


def read_folder(folder: Path, subfolder: str | None = None) -> dict[str, bytes]:
    """Read an erasure's files from a local folder; only the schema's names, and nothing outside the folder.

    Raises:
        ErasureNotFoundError: there is no configuration.
        ErasureFileError: a file is missing, lies outside the folder, or is larger than stated.
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
    files = {CONFIG_FILE: read_inside(place, CONFIG_FILE, MAX_CONFIG_BYTES)}
    for name, record in ErasureConfig.from_json(files[CONFIG_FILE]).files.items():
        files[name] = read_inside(place, name, record.size)
    missing = ErasureConfig.from_json(files[CONFIG_FILE]).tensor_files - set(files)
    if missing:
        raise ErasureConfigError(f"`files` does not name {sorted(missing)}, where tensors lie.")
    return files


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


def write_folder(folder: Path, files: Mapping[str, bytes], *, without: Collection[str] = ()) -> list[Path]:
    """Write files so that the folder holds all of them or none: a temporary folder beside it, then a rename.

    What else lies there stays, but for the tensors of an earlier erasure and the files named in `without`.
    """
    folder = folder.expanduser().resolve()  # behind a link, so that the link stays
    if folder.exists() and not folder.is_dir():
        raise ErasureInputError(f"{folder} is a file; name a folder.")
    if folder.exists() and folder.samefile(Path.cwd()):
        raise ErasureInputError("The current folder cannot be replaced as a whole; name a new folder in it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh, old = work / "new", work / "old"
        fresh.mkdir()
        for name, data in files.items():
            with open(fresh / name, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        for name, data in files.items():
            if (fresh / name).read_bytes() != data:
                raise ErasureFileError(f"{fresh / name} does not read back as it was written; nothing was saved.")
        if folder.exists():
            os.rename(folder, old)
            foreign = [e.name for e in old.iterdir() if e.name not in {*TENSOR_FILES, CONFIG_FILE, *files, *without}]
            try:
                for name in foreign:  # what is not ours stays
                    os.rename(old / name, fresh / name)
                os.rename(fresh, folder)
            except BaseException:
                for name in foreign:
                    if not os.path.lexists(old / name):
                        os.rename(fresh / name, old / name)
                os.rename(old, folder)
                raise
        else:
            os.rename(fresh, folder)
    except OSError as error:
        raise ErasureError(f"Saving to {folder} failed, nothing was changed there: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [folder / name for name in files]
