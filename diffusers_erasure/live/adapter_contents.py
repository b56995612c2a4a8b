"""What the tensors of an erasure's LoRA adapter must be, and whether they still are: other calls write into them.

peft's hotswap writes through `.data`, which no version counter notes, and zeroes every adapter whose name contains the
one that is swapped. So contents are compared, which a GPU must be waited for; see [`AdapterContents.looked_at_lately`].
"""

import time
from collections.abc import Mapping
from typing import Any

import torch

from .. import compat
from ..low_rank import Factors


EVERY = 1.0  # seconds for which contents on a GPU go unseen where nothing else says that they were written; or, where more,
TIMES = 40.0  # the time that looking at them took


class AdapterContents:
    """The factors that one adapter holds in the layers of a component, and what was seen of its tensors last.

    Args:
        factors (`dict`): A and B by the path of their module, as the erasure has them; peft may pad them with zeros.
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self.factors = dict(factors)
        self.record: list[Any] = []
        self.at = float("-inf")
        self.took = 0.0  # seconds, the last look

    def looked_at_lately(self, layers: Mapping[str, Any], name: str) -> bool:
        """Whether nothing says that contents changed since this was asked last, without reading them.

        On a CPU they are read each time. Elsewhere where a tensor is another one, was moved, or was written into by an
        operation that torch counts, and otherwise once in a while; never while a CUDA graph is captured, which reading ends.
        """
        if compat.is_capturing():
            return True
        tensors = [tensor for layer in layers.values() for tensor in compat.adapter_tensors(layer, name)]
        record = [(id(each), each.data_ptr(), each.dtype, compat.version_of(each)) for each in tensors]
        now = time.monotonic()
        same = record == self.record and 0 <= now - self.at < max(EVERY, TIMES * self.took)
        if same and not any(map(_is_near, tensors)):
            return True
        self.record, self.at = record, now
        return False

    def changed(self, layers: Mapping[str, Any], name: str) -> list[str]:
        """Paths of the modules where the adapter is not what the erasure says; those that it should not be at too."""
        start = time.monotonic()
        found = [
            path
            for path, layer in layers.items()
            if path not in self.factors or not _is_as_made(layer, name, self.factors[path])
        ]
        self.took = time.monotonic() - start
        return found

    def restore(self, layers: Mapping[str, Any], name: str, strength: float) -> None:
        """Write the factors into all layers, and take the adapter away from other modules.

        Where it is merged it keeps its scale, at which it is going to be unmerged.
        """
        for path, layer in layers.items():
            if path in self.factors:
                scale = compat.adapter_scale(layer, name) if compat.is_merged(layer, name) else strength
                compat.write_adapter(layer, name, self.factors[path], scale)
            else:
                layer.delete_adapter(name)


def _is_near(tensor: torch.Tensor) -> bool:
    """Whether a tensor is read without waiting for a device."""
    return tensor.device.type == "cpu"


def _is_as_made(layer: Any, name: str, factors: Factors) -> bool:
    if not compat.is_plain_lora(layer, name):
        return False
    return all(
        _holds(live, made, dim)
        for live, made, dim in zip(compat.adapter_tensors(layer, name), factors, (0, 1), strict=True)
    )


def _holds(live: torch.Tensor, made: torch.Tensor, dim: int) -> bool:
    """Whether a tensor is a factor but for rounding to its dtype, and zeros beyond its rank along `dim`."""
    if live.device.type == "meta":  # kept where it cannot be read
        return True
    live, made = live.detach().cpu(), made.detach()
    if live.shape == made.shape and live.dtype == made.dtype and torch.equal(live, made):
        return True
    rank, value = made.shape[dim], live.float()
    others = [size for place, size in enumerate(made.shape) if place != dim]
    if value.shape[dim] < rank or [size for place, size in enumerate(value.shape) if place != dim] != others:
        return False
    head, rest = value.narrow(dim, 0, rank), value.narrow(dim, rank, value.shape[dim] - rank)
    # It may have been rounded to a half before it was stored wider, by `pipe.to(torch.float16)` and back.
    halves = [each for each in (torch.float16, torch.bfloat16) if torch.equal(value.to(each).float(), value)]
    infos = [torch.finfo(each) for each in (live.dtype, *halves)]
    relative, absolute = max(info.eps for info in infos), max(info.tiny * info.eps for info in infos)
    close = (head - made.float()).abs() <= relative * made.float().abs() + absolute
    return bool(close.all()) and not bool(rest.any())
