"""Changes of weights: what a layer is once it is fused, in float64."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ..low_rank import Factors


class WeightChange(ABC):
    """What a layer, once it is fused, does to the parameters of one module.

    Changes of different classes on one module add up in whatever order they come, as their hooks do; those
    `on_input` come after the others, as their hooks come before the module.

    Args:
        site (`str`): the module's name within its component.
        module (`nn.Module`): the module.
    """

    parameters: ClassVar[tuple[str, ...]] = ("weight",)  # those that it changes
    on_input: ClassVar[bool] = False  # whether it changes what the module reads, and not what the module makes of it

    def __init__(self, site: str, module: nn.Module) -> None:
        self.site, self.module = site, module

    @property
    def places(self) -> set[Any]:
        """Where it acts, in the words of [`LayerKind.reads`]: at the module, and at the input of the component before it."""
        return {self.module}

    @classmethod
    @abstractmethod
    def applied(
        cls, parameters: Mapping[str, torch.Tensor], changes: Sequence[tuple[float, Self]]
    ) -> dict[str, torch.Tensor]:
        """The module's parameters with all changes of this class at their strengths.

        Args:
            parameters (mapping): those of the module that any change names, float64, on one device.
            changes (sequence): strengths and changes.

        Returns:
            `dict`: those that this class changes.
        """

    def factors(self) -> Factors | None:
        """The change at strength 1 as a LoRA on the module, as it is now: `A` [r, in] and `B` [out, r], float64.

        `None` where it is none.
        """
        return None

    def values(self, name: str, positions: list[int]) -> torch.Tensor | None:
        """What the change at strength 1 added to a parameter, at positions of the flattened one, float64.

        The module may hold the fused parameter. `None` where it cannot be told: then an erasure is not recognised by it
        in weights that contain it already.
        """
        return None


def double(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on another's device."""
    return tensor.to(like.device, torch.float64)
