"""The cache on disk of what is slow to compute and depends only on a base model, or on a text encoder and a list.

An entry is a safetensors file, named by what it holds and a SHA-256 over everything that it was computed from. It
appears whole or not at all, so that two processes may write it at the same time, and it holds a SHA-256 of its values,
so that one that a disk or a lost power supply has damaged is noticed. A folder that cannot be used costs time, no result.
"""

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import tensors as tensor_io
from .errors import ErasureFileError
from .logging import get_logger
from .storage import write_file


logger = get_logger(__name__)

VARIABLE = "DIFFUSERS_ERASURE_CACHE"
FORMAT = "1"  # of the entries; another one makes all old entries unused
KINDS = {
    "rows": "text rows of a list, from one text encoder",
    "pooled": "pooled vectors of a list, from one text encoder",
    "null": "rows of the empty prompt, from one text encoder",
    "gram": "sums over all rows of a list, from one text encoder",
    "contexts": "text rows of a list in contexts, from one text encoder",
    "weights": "sums over the weights of one base model",
    "directions": "directions of the weights of one base model",
}
HASH = "sha256"  # the tensor that holds the hash of the others, a byte in each of its numbers
# Only names that `fetch` makes: somebody's own files may lie in the same folder.
NAME = re.compile(rf"({'|'.join(KINDS)})-[0-9a-f]{{64}}\.safetensors")
_told: set[Path] = set()  # folders of which it was said in this process that they cannot be used
LEFT = re.compile(rf"\.({'|'.join(KINDS)})-[0-9a-f]*\..*\.tmp")


@dataclass(frozen=True)
class Entry:
    """One file of the cache: what it holds, where it lies, and its size in bytes."""

    kind: str
    path: Path
    size: int


def cache_dir() -> Path | None:
    """The folder of the cache: `$DIFFUSERS_ERASURE_CACHE`, else in huggingface_hub's assets; `None` where it is `off`."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen.strip().lower() == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "diffusers_erasure"


def _split(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """float64 as two float32 halves, which the file format's readers all know; 48 bits are kept, and no second half of zeros.

    They are contiguous, as they will be when they are read: sums over another layout may round in another order.
    """
    value = value.contiguous()
    high = value.float()
    low = (value - high.double()).float()
    return {"high": high, "low": low} if low.count_nonzero() else {"high": high}


def fetch(
    kind: str, key: Callable[[], Sequence[str | None]], make: Callable[[], Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return `make()`, computed once for a key. The values are the same to the last bit, cached or not.

    Args:
        kind (`str`): one of `KINDS`.
        key: returns everything that the values depend on; with a `None` in it nothing is cached. Not called where the
            cache is off.
        make: returns tensors by name, any shape, float64.

    Returns:
        `dict`: float64 tensors, of which 48 bits are kept, in the order of their names. Where the entry cannot be
            written, for example because the disk is full, they are made each time, with one warning in a process.
    """
    folder = cache_dir()
    parts = [] if folder is None else list(key())
    if folder is None or None in parts:
        return _joined({f"{name}.{half}": v for name, x in make().items() for half, v in _split(x).items()})
    digest = tensor_io.sha256("\0".join([FORMAT, kind, *map(str, parts)]).encode())
    path = folder / f"{kind}-{digest}.safetensors"
    stored = _read(path)
    if stored is None:
        stored = {f"{name}.{half}": v for name, x in make().items() for half, v in _split(x).items()}
        _write(path, tensor_io.dump({**stored, HASH: _hash(stored)}))
    return _joined(stored)


def _hash(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(tensor_io.content_hash(stored))), dtype=torch.float32)


def _joined(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = sorted(name.removesuffix(".high") for name in stored if name.endswith(".high"))
    low = {name: stored.get(f"{name}.low") for name in names}
    high = {name: stored[f"{name}.high"].double() for name in names}
    return {name: high[name] if (half := low[name]) is None else high[name] + half.double() for name in names}


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        stored = tensor_io.parse(path.read_bytes(), path.name)
        if not torch.equal(stored.pop(HASH, torch.zeros(0)), _hash(stored)):
            raise ErasureFileError(f"{path.name} holds other values than were written.")
        return stored
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        _tell(path, "read", error)
        return None
    except (OSError, ErasureFileError) as error:
        logger.warning("The cached %s cannot be used and is made again: %s", path, error)
        return None


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # `clear` in another process took the temporary file
            write_file(path, data)
    except OSError as error:
        _tell(path, f"written ({len(data)} bytes)", error)


def _tell(path: Path, what: str, error: OSError) -> None:
    """Warn that the folder cannot be used, once in a process: each entry would say the same."""
    if path.parent in _told:
        return
    _told.add(path.parent)
    logger.warning(
        "The cache entry %s cannot be %s: %s. It goes on without, and takes longer. Make room with `diffusers-erasure cache "
        "clear`, name another folder in $%s, or set it to `off`.",
        path,
        what,
        error,
        VARIABLE,
    )


def entries() -> list[Entry]:
    """The entries of the cache, by name; of other files in the folder none."""
    folder = cache_dir()
    if folder is None or not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        name = NAME.fullmatch(path.name)
        if name and path.is_file():
            with contextlib.suppress(FileNotFoundError):  # another process cleared it
                found.append(Entry(name[1], path, path.stat().st_size))
    return found


def clear(kind: str | None = None) -> list[Entry]:
    """Delete the entries of one kind, or all, and what interrupted writers left; return the entries that are gone."""
    gone = [entry for entry in entries() if kind in (None, entry.kind)]
    folder = cache_dir()
    left = [] if folder is None or not folder.is_dir() else list(folder.iterdir())
    left = [path for path in left if (name := LEFT.fullmatch(path.name)) and kind in (None, name[1])]
    for path in (*(entry.path for entry in gone), *left):
        path.unlink(missing_ok=True)
    return gone
