"""What a layer kind is on a live component. One instance serves all erasures of its kind there."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .. import compat
from ..schema import LayerSpec
from .buffers import PartKey, Tensors
from .modifiers import Conditions, Modifier


@dataclass(frozen=True)
class Watched:
    """A module within a component that has to be called for a layer to act.

    Attributes:
        site: its name within the component.
        module: the module.
        names: the erasures that act there.
        hooks: the numbers of the hooks by which they do.
    """

    site: str
    module: nn.Module
    names: frozenset[str]
    hooks: tuple[int, ...] = ()


class LiveLayer(nn.Module):
    """By what erasures act on a live component (denoiser or text encoder).

    An instance is a child of the component's `erasure_modules`; its tensors are non-persistent buffers, so that they follow
    the component's device and dtype and appear in no state dict, no optimizer and no saved model.
    """

    by_timestep: ClassVar[bool] = False  # whether it always asks for the timestep, and not only for a schedule

    @abstractmethod
    def detach(self, name: str) -> None:
        """Detach all layers of the erasure `name`; unknown names are ignored. Passes that know them still have them."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether no erasure is attached any more."""

    def tidy(self) -> None:
        """Remove the hooks by which nothing that is attached acts: no pass needs them any more."""

    def fold(self, strengths: Mapping[str, float]) -> None:
        """Take over the strengths, where they lie in the component itself and so hold for all threads."""

    def parts(self) -> Any:
        """What all erasures have to do here, as of now: it stays as it is, whatever is attached or detached later."""
        return ()

    def build(self, parts: Any, names: Sequence[str]) -> Mapping[int, Any]:
        """What the named erasures do, by the number of the place.

        Args:
            parts: as [`parts`] gave them.
            names (sequence of `str`): the erasures; their order is that of the columns of a pass's strengths.
        """
        return {}

    def places(self) -> Iterable[Any]:
        """Where something is done: each has a `number`, and a `whole` for what all erasures do."""
        return ()

    def entrances(self) -> Iterable[int]:
        """The numbers of the places on the component itself: torch lists its hooks before a pass waits for a change."""
        return ()

    def watched(self) -> Iterator[Watched]:
        """The modules that have to be called for the layer to act: where their surroundings compute without them, the pass fails."""
        yield from ()

    def inactive_reason(self) -> str | None:
        """Why the layer would not act in the coming forward pass, or `None` where it will."""
        return None

    def scaled_away(self, kwargs: Mapping[str, Any]) -> str | None:
        """Why these arguments of the component's forward pass would weaken the layer, or `None`."""
        return None

    def fixed_reason(self) -> str | None:
        """Why strengths cannot be changed now, nor erasures unloaded, or `None` where they can."""
        return None


class HookLayer(LiveLayer):
    """A live layer that attaches itself by hooks: the live side of a layer kind.

    Args:
        conditions ([`Conditions`]): the passes of the component.
    """

    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        self.source = (conditions,)  # a tuple, because a module assigned to a module would become its child

    @property
    def conditions(self) -> Conditions:
        """The passes of the component."""
        (conditions,) = self.source
        return conditions

    @abstractmethod
    def attach(
        self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors, modifier: Modifier | None
    ) -> None:
        """Attach one layer of one erasure, with its schedule and gate; it acts in the passes for which it is built."""

    def altered(self, component: nn.Module, spec: LayerSpec) -> Iterable[nn.Module]:
        """The modules that do otherwise than their weights say, because of an attached layer: their state dicts tell of it.

        By default the component as a whole.
        """
        return [compat.unwrap_compiled(component)]
