"""The weights of a model in its safetensors files: which there are, single tensors, and single values of them."""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ErasureFileError
from .places import Place


FIRST = 131_072  # bytes that are read of a file at first: a header is mostly shorter
LARGEST_HEADER = 100_000_000
KEPT = 256 << 20  # bytes of tensors that are kept: a door is asked for more than once
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    stop: int

    def fits(self, first: int) -> bool:
        """Whether its bytes lie behind the header and are as many as shape and dtype take; of a packed one that is not known."""
        size = None if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize
        return first <= self.start <= self.stop and size in (None, self.stop - self.start)


class Weights:
    """Tensors by name, read where they are asked for.

    Args:
        place ([`Place`]): the folder of the files.

    Raises:
        ErasureFileError: a file is not what it should be.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.entries: dict[str, Entry] = {}
        self.kept: dict[str, torch.Tensor] = {}
        self.sampled: tuple[list[tuple[str, list[int]]], list[torch.Tensor | None]] = [], []
        for name in place.names():
            self.entries.update(_entries(place, name))

    def read(self, name: str) -> torch.Tensor | None:
        """A tensor in its own dtype; `None` where there is none, or it is packed."""
        entry = self.entries.get(name)
        if entry is None or entry.dtype is None:
            return None
        if name not in self.kept:
            data = self.place.part((entry.file, entry.start, entry.stop))
            if len(data) != entry.stop - entry.start:
                raise ErasureFileError(f"{entry.file} ends before {name!r} does: download it again.")
            value = torch.frombuffer(bytearray(data), dtype=entry.dtype).reshape(entry.shape)
            if sum(each.nbytes for each in self.kept.values()) + value.nbytes > KEPT:
                self.kept.clear()
            self.kept[name] = value
        return self.kept[name]

    def sample(self, wanted: Sequence[tuple[str, Sequence[int]]]) -> list[torch.Tensor | None]:
        """Values of tensors at places of the flattened ones, in their own dtype; `None` for one that is not there or packed."""
        asked = [(name, list(positions)) for name, positions in wanted]
        if asked != self.sampled[0]:  # each fit wants the same ones
            self.sampled = asked, self._sample(asked)
        return self.sampled[1]

    def _sample(self, wanted: Sequence[tuple[str, Sequence[int]]]) -> list[torch.Tensor | None]:
        ranges = []
        for name, positions in wanted:
            entry = self.entries.get(name)
            if entry is not None and entry.dtype is not None:
                size = entry.dtype.itemsize
                ranges += [(entry.file, entry.start + p * size, entry.start + (p + 1) * size) for p in positions]
        data = iter(self.place.parts(ranges))
        found: list[torch.Tensor | None] = []
        for name, positions in wanted:
            entry = self.entries.get(name)
            if entry is None or entry.dtype is None:
                found.append(None)
                continue
            joined = bytearray(b"".join(next(data) for _ in positions))
            if len(joined) != len(positions) * entry.dtype.itemsize:
                raise ErasureFileError(f"{entry.file} ends before {name!r} does: download it again.")
            found.append(torch.frombuffer(joined, dtype=entry.dtype))
        return found


def _entries(place: Place, name: str) -> dict[str, Entry]:
    head = place.part((name, 0, FIRST))
    (size,) = struct.unpack("<Q", head[:8]) if len(head) >= 8 else (LARGEST_HEADER + 1,)
    if size > LARGEST_HEADER:
        raise ErasureFileError(f"{name} is no safetensors file.")
    if len(head) < 8 + size:
        head += place.part((name, len(head), 8 + size))
    try:
        header: dict[str, Any] = json.loads(head[8 : 8 + size])
        found = {
            key: Entry(
                name,
                DTYPES.get(each["dtype"]),
                tuple(each["shape"]),
                8 + size + each["data_offsets"][0],
                8 + size + each["data_offsets"][1],
            )
            for key, each in header.items()
            if key != "__metadata__"
        }
        wrong = [key for key, each in found.items() if not each.fits(8 + size)]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ErasureFileError(f"{name} is no safetensors file: {error}") from error
    if wrong:
        raise ErasureFileError(
            f"{name} is damaged: its header gives {wrong[0]!r} other bytes than its shape and dtype take."
        )
    return found
