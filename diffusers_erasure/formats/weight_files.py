"""Files of weights that others wrote: safetensors, or pickles of tensors alone, which are read as nothing else."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ErasureFileError
from ..schema import MAX_FILE_BYTES
from ..tensors import parse


def read_bytes(path: Path, limit: int) -> bytes:
    """A file of at most so many bytes.

    Raises:
        ErasureFileError: it is larger, or cannot be read.
    """
    try:
        if path.stat().st_size > limit:
            raise ErasureFileError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read.")
        return path.read_bytes()
    except OSError as error:
        raise ErasureFileError(f"{path} cannot be read: {error}") from error


def flat(found: Mapping[Any, Any]) -> dict[Any, Any]:
    """A dictionary of dictionaries as one, with a dot between their names."""
    result: dict[Any, Any] = {}
    for name, value in found.items():
        inner = {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
        result.update(inner)
    return result


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights alone, `.safetensors` or one that `torch.save` wrote; of dictionaries within it with a dot.

    Raises:
        ErasureFileError: it holds something else, is too large, or has values that are not finite.
    """
    if path.suffix == ".safetensors":
        return parse(read_bytes(path, MAX_FILE_BYTES), path.name)
    data = read_bytes(path, MAX_FILE_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_FILE_BYTES:
            raise ErasureFileError(f"{path} unpacks to {unpacked} bytes; at most {MAX_FILE_BYTES} are read.")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except ErasureFileError:
        raise
    except Exception as error:  # whatever the readers raise at what somebody else wrote
        raise ErasureFileError(f"{path} is no file of weights alone: {str(error)[:200]}") from error
    found = flat(found) if isinstance(found, dict) else found
    plain = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not plain or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ErasureFileError(f"{path} holds something else than tensors by name.")
    size = sum(value.numel() * value.element_size() for value in found.values())  # before anything is computed
    odd = [name for name, value in found.items() if not value.dtype.is_floating_point or value.layout != torch.strided]
    if size > MAX_FILE_BYTES or odd:
        raise ErasureFileError(
            f"{path} holds {size} bytes of tensors, of them no numbers: {[n[:80] for n in odd[:3]]}."
        )
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        raise ErasureFileError(f"{path} has values that are not finite.")
    return {name: value.float() if value.dtype == torch.float64 else value for name, value in found.items()}
