"""Live tensors of the layers: non-persistent buffers, beside the weights on whose modules they act."""

from collections.abc import Mapping

import torch
from torch import nn


# An erasure's name and the index of the layer within it.
PartKey = tuple[str, int]
Tensors = Mapping[str, torch.Tensor]


def live_buffer(module: nn.Module, name: str, value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Register `value` as a non-persistent buffer, as an ordinary tensor even inside `torch.inference_mode()`."""
    with torch.inference_mode(False):
        module.register_buffer(name, value.detach().to(device=device, dtype=dtype, copy=True), persistent=False)


def set_buffer(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Write into a live buffer in place, so that compiled graphs and CUDA graphs see it."""
    with torch.no_grad():
        buffer.copy_(value)


def placement(component: nn.Module, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for the factors that act beside `module`: those of its weight where that is a plain one.

    Offloaded (meta) weights give the CPU and quantised ones the component's dtype; hooks move what is elsewhere.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        weight = next(module.parameters(), None)
    if weight is None:  # others may hold it elsewhere, as LyCORIS does with `full`
        weight = next(component.parameters())
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = getattr(component, "dtype", torch.float32)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = torch.float32
    return device, dtype
