"""safetensors in and out: the same tensors give the same bytes, and nothing odd gets in."""

import hashlib
import json
import struct
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError

from .errors import ErasureFileError


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TENSORS = 65_536


def dump(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialise tensors to safetensors with a canonical header.

    Args:
        tensors: names and tensors, any device; float16, bfloat16 or float32.

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
    """Read tensors from a safetensors file's content and check that they are plain, finite numbers.

    Args:
        data (`bytes`): the file's content.
        name (`str`): the file's name, for messages.

    Raises:
        ErasureFileError: the header lies, or a tensor has another dtype, no elements, or a value that is not finite.
    """
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        raise ErasureFileError(f"{name} is not a valid safetensors file: {str(error)[:200]}") from error
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise ErasureFileError(f"{name} holds {len(tensors)} tensors; expected 1 to {MAX_TENSORS}.")
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ErasureFileError(f"{name}: {key[:200]!r} is {tensor.dtype}; expected float16, bfloat16 or float32.")
        if tensor.numel() == 0 or tensor.ndim > 4:
            raise ErasureFileError(f"{name}: {key[:200]!r} has the shape {tuple(tensor.shape)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise ErasureFileError(f"{name}: {key[:200]!r} has values that are not finite.")
    return tensors


def sha256(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def content_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values, whatever the file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().to(torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
