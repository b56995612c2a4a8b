"""The original weights that are kept while erasures are fused into a component."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from . import compat


@dataclass
class Kept:
    """One weight or bias into which erasures are fused.

    Attributes:
        site: its module's name within the component.
        module: its module.
        original: the weight as it was, on the CPU.
        dtype: the dtype of the fused weight.
        digest: SHA-256 of the fused weight: what must be found there to be replaced by the original.
        name: of the parameter in its module.
    """

    site: str
    module: nn.Module
    original: torch.Tensor
    dtype: torch.dtype
    digest: str
    name: str = "weight"

    @property
    def bytes(self) -> int:
        """Memory of the original."""
        return self.original.numel() * self.original.element_size()


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 over a tensor's bits."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def originals(component: nn.Module) -> dict[tuple[nn.Module, str], torch.Tensor]:
    """The parameters of a component as they were before erasures were fused into them, by module and name."""
    kept = getattr(compat.child(component, "erasure_modules"), "fused", {})
    return {(each.module, each.name): each.original for each in kept.values()}
