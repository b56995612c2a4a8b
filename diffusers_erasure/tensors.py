"""safetensors in and out: the same tensors give the same bytes, and nothing odd gets in."""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from .errors import ErasureFileError, ErasureInputError


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PACKED = torch.uint8  # bit masks
MAX_TENSORS = 65_536
MAX_HEADER_BYTES = 8 * 2**20


def dtype_of(value: Any) -> torch.dtype:
    """The dtype to save in, from itself or its name, with `torch.` before it or without.

    Raises:
        ErasureInputError: it is none in which floating-point tensors are saved.
    """
    known = {str(dtype): dtype for dtype in DTYPES}
    name = value if isinstance(value, str) else str(value)
    name = name if name.startswith("torch.") else f"torch.{name}"
    if name not in known:
        raise ErasureInputError(f"Tensors can be saved as float32, float16 or bfloat16, not as {value}.")
    return known[name]


def dump(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialise tensors to safetensors with a canonical header.

    Args:
        tensors: names and tensors, any device; float16, bfloat16, float32 or uint8.

    Returns:
        `bytes`: the file's content. safetensors itself writes the header's metadata in a random order, so the header
        is written again with sorted keys.
    """
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    data = safetensors.torch.save(plain, metadata={"format": "pt"})
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # safetensors aligns the data to 8 bytes
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def parse(data: bytes, name: str) -> dict[str, torch.Tensor]:
    """Read tensors from a safetensors file's content and check that they are plain numbers; see `check_finite` too.

    Args:
        data (`bytes`): the file's content.
        name (`str`): the file's name, for messages.

    Raises:
        ErasureFileError: the header lies, or a tensor has another dtype, or no elements.
    """
    check_header(data, name)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # whatever the readers raise at what somebody else wrote
        raise ErasureFileError(f"{name} is not a valid safetensors file: {str(error)[:200]}") from error
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise ErasureFileError(f"{name} holds {len(tensors)} tensors; expected 1 to {MAX_TENSORS}.")
    for key, tensor in tensors.items():
        if tensor.dtype not in (*DTYPES, PACKED):
            raise ErasureFileError(
                f"{name}: {key[:200]!r} is {tensor.dtype}; expected float16, bfloat16 or float32 (uint8 for masks)."
            )
        if tensor.numel() == 0 or tensor.ndim > 4:
            raise ErasureFileError(f"{name}: {key[:200]!r} has the shape {tuple(tensor.shape)}.")
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Check the values of a file's tensors.

    Args:
        tensors: the tensors by name.
        name (`str`): the file's name, for messages.

    Raises:
        ErasureFileError: one is not finite.
    """
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ErasureFileError(f"{name}: {key[:200]!r} has values that are not finite.")


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names, dtypes, shapes and values."""
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value, right[name].cpu()) for name, value in left.items()
    )


def check_header(data: bytes, name: str) -> None:
    """Bound what the header of a safetensors file can cost before anything parses it.

    Args:
        data (`bytes`): the file's content, or at least its first `8 + MAX_HEADER_BYTES` bytes.
        name (`str`): the file's name, for messages.

    Raises:
        ErasureFileError: the file is too short, or its header is too long or may name too many tensors.
    """
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ErasureFileError(
            f"{name} is not a valid safetensors file: a header of {size} bytes; at most {MAX_HEADER_BYTES} are read."
        )
    if data.count(b"{", 8, 8 + size) > MAX_TENSORS + 2:  # every tensor's entry has one
        raise ErasureFileError(f"{name} holds too many tensors; expected 1 to {MAX_TENSORS}.")


def sha256(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def content_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values, whatever the file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().to(torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
