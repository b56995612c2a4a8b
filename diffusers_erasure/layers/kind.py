"""What a layer kind is to an artefact: everything that the rest of the library asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ErasureCompatibilityError, ErasureInputError
from ..low_rank import Factors
from ..schema import TENSOR_FILE, LayerSpec
from .base import HookLayer
from .buffers import Tensors
from .changes import WeightChange
from .layer import Layer


@dataclass(frozen=True)
class Summand:
    """One layer of several that are to be added up.

    Attributes:
        source: where it comes from, for messages.
        spec: what the config says of it.
        tensors: its tensors, without the prefix.
        error: relative error of the tensors, as far as it was stated.
    """

    source: str
    spec: LayerSpec
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    error: float = 0.0


class LayerKind(ABC):
    """A layer kind, the artefact side: no state, no pipeline. Its other side, `live`, acts while images are made.

    A new kind is a subclass in a file of its own, with its live side, and a call of [`register_layer_kind`]. `name`, `live`
    and the first three methods are needed; what the others answer by default is a refusal, or what most kinds need.
    """

    name: ClassVar[str]
    live: ClassVar[type[HookLayer]]
    file: ClassVar[str] = TENSOR_FILE  # where its tensors lie
    packed: ClassVar[bool] = False  # whether its tensors may be bit masks

    @abstractmethod
    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        """Check names and shapes of the layer's tensors (keys without the prefix) without a pipeline.

        Raises:
            ErasureFileError: a tensor is missing, unexpected, or of a shape that cannot be right.
        """

    @abstractmethod
    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        """Return the tensors of the layer whose strength 1 is this one's strength `factor`."""

    @abstractmethod
    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        """Check that the layer fits a live component, without touching it.

        Raises:
            ErasureCompatibilityError: a site is missing, is of another type, or has another shape.
        """

    def prefix(self, component: str, sites: Sequence[str]) -> str:
        """What the names of a layer's tensors start with; where several layers would have the same, a number follows."""
        return f"{self.name}."

    def why_no_schedule(self, spec: LayerSpec) -> str | None:
        """Why a layer can have no schedule, `None` where it can."""
        return _only_the_denoiser(spec)

    def why_no_gate(self, spec: LayerSpec) -> str | None:
        """Why a layer can have no gate, `None` where it can."""
        return _only_the_denoiser(spec)

    def weight_changes(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Sequence[WeightChange]:
        """Which weights of a live component the layer changes when it is fused, and how. It has passed `check`.

        Raises:
            ErasureCompatibilityError: it is no change of weights.
        """
        raise ErasureCompatibilityError(
            f"A layer {self.name!r} is no change of weights, so it cannot be fused. Leave the erasure unfused."
        )

    def reads(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Collection[Any] | None:
        """The modules, and the named inputs of a component, whose input the layer reads or changes.

        Where another erasure that is fused changes what is read there (see [`WeightChange`]), the two would meet otherwise
        than by their hooks, which is refused. `None`: it may be anywhere.
        """
        return None

    def summed(
        self, members: Sequence[Summand], rank: int | None, max_error: float | None
    ) -> list[tuple[Layer, float]]:
        """Add up layers of this kind, so that the result does what all of them do.

        Args:
            members (sequence of [`Summand`]): on whatever components and sites.
            rank (`int`, *optional*), max_error (`float`, *optional*): truncate.

        Returns:
            `list`: the layers, each with the relative error of its tensors.

        Raises:
            ErasureInputError: layers of this kind cannot be added.
        """
        raise ErasureInputError(f"{members[0].source} has a layer of kind {self.name!r}, which cannot be added.")

    def lora(self, spec: LayerSpec, tensors: Tensors) -> dict[str, Factors] | None:
        """The layer as a plain LoRA, `down` and `up` for each site, or `None` where it is none."""
        return None


def _only_the_denoiser(spec: LayerSpec) -> str | None:
    if spec.component in ("unet", "transformer"):
        return None
    return f"it acts on {spec.component!r}, and only the denoiser knows the timestep and the prompt of each row"
