"""What every layer kind does. One instance serves all erasures of its kind on one component."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..schema import TENSOR_FILE, LayerSpec


if TYPE_CHECKING:
    from .modifiers import Conditions, Modifier

# An erasure's name and the index of the layer within it.
PartKey = tuple[str, int]
Tensors = Mapping[str, torch.Tensor]


class Layer(nn.Module):
    """Base class of the layer kinds.

    The class methods work on an erasure alone; the others on a live component (denoiser or text encoder). An instance
    is a child of the component's `erasure_modules`; its tensors are non-persistent buffers, so that they follow the
    component's device and dtype and appear in no state dict, no optimizer and no saved model.
    """

    kind: ClassVar[str]
    file: ClassVar[str] = TENSOR_FILE
    by_timestep: ClassVar[bool] = False  # whether it always asks for the timestep, and not only for a schedule
    packed: ClassVar[bool] = False  # whether its tensors may be bit masks

    def __init__(self) -> None:
        super().__init__()
        self.modifiers: dict[PartKey, Modifier] = {}  # put there before `attach`
        self._conditions: tuple[Conditions, ...] = ()  # a tuple, because it is the child of the component's state

    @property
    def conditions(self) -> "Conditions":
        """What the denoiser is called with, for layers that act by it."""
        (conditions,) = self._conditions
        return conditions

    def bind(self, conditions: "Conditions") -> None:
        """Give the layer its component's conditions, before anything is attached."""
        self._conditions = (conditions,)

    def modifier_of(self, key: PartKey) -> "Modifier | None":
        """The schedule and gate of one layer of an erasure."""
        return self.modifiers.get(key)

    @classmethod
    def prefix(cls, component: str, sites: tuple[str, ...]) -> str:
        """What the names of the layer's tensors start with."""
        return f"{cls.kind}."

    @classmethod
    @abstractmethod
    def validate(cls, spec: LayerSpec, tensors: Tensors) -> None:
        """Check names and shapes of the layer's tensors (keys without the prefix) without a pipeline.

        Raises:
            ErasureFileError: a tensor is missing, unexpected, or of a shape that cannot be right.
        """

    @classmethod
    @abstractmethod
    def rescaled(cls, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        """Return the tensors of the layer whose strength 1 is this one's strength `factor`."""

    @classmethod
    @abstractmethod
    def check(cls, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        """Check that the layer fits a live component, without touching it.

        Raises:
            ErasureCompatibilityError: a site is missing, is of another type, or has another shape.
        """

    @abstractmethod
    def attach(self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors) -> None:
        """Attach one layer of one erasure, at strength 0 until `fold` is called."""

    @abstractmethod
    def detach(self, name: str) -> None:
        """Detach all layers of the erasure `name`; unknown names are ignored."""

    @abstractmethod
    def fold(self, strengths: Mapping[str, float]) -> None:
        """Write each erasure's strength into the live buffers, in place."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether no erasure is attached any more."""

    def inactive_reason(self) -> str | None:
        """Why the layer would not act in the coming forward pass, or `None` where it will."""
        return None

    def scaled_away(self, kwargs: Mapping[str, Any]) -> str | None:
        """Why these arguments of the component's forward pass would weaken the layer, or `None`."""
        return None


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
        weight = next(module.parameters())
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    dtype = weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = getattr(component, "dtype", torch.float32)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = torch.float32
    return device, dtype
