"""What is on one component, as of one change: a plan never changes, so that a request may keep the one it began with."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..layers import LiveLayer
from ..layers.locks import Lock


if TYPE_CHECKING:
    from .attachment import Loaded

Strength = float | tuple[float, ...]  # one for all pictures of a batch, or one for each
MOST = 16  # sets of erasures, of a plan, for which what they do is held ready


class Plan:
    """The erasures on a component and their strengths.

    Args:
        items (`dict`): the erasures by name, in the order of loading.
        layers (iterable of [`LiveLayer`]): by what they act.
        former ([`Plan`], *optional*): the one before; where the same is to be done, what was made for it is taken over.

    Attributes:
        names: of the erasures.
        strengths: by name.
    """

    def __init__(
        self, items: Mapping[str, "Loaded"], layers: Iterable[LiveLayer], former: "Plan | None" = None
    ) -> None:
        self.items = dict(items)
        self.names = tuple(items)
        self.strengths = {name: item.strength for name, item in items.items()}
        self.parts = [(layer, layer.parts()) for layer in layers]
        self.ready: dict[tuple[str, ...], dict[int, Any]] = {}
        self.lock = Lock()
        if former is not None and self.names == former.names and _same(self.parts, former.parts):
            self.parts, self.ready, self.lock = former.parts, former.ready, former.lock

    @property
    def whole(self) -> dict[int, Any]:
        """What all of the erasures do, by the number of the place."""
        return self.of(self.names)

    def of(self, names: Sequence[str]) -> dict[int, Any]:
        """What some of the erasures do, by the number of the place; made once, for each set of them."""
        names = tuple(names)
        found = self.ready.get(names)
        if found is None:
            with self.lock.held():
                found = self.ready.get(names)
                if found is None:
                    found = {}
                    for layer, parts in self.parts if names else ():
                        found.update(layer.build(parts, names))
                    for other in [each for each in self.ready if each != self.names][: 2 - MOST]:
                        del self.ready[other]
                    self.ready[names] = found
        return found

    def forget(self) -> None:
        """The component has moved: what is not its child is to be made anew."""
        with self.lock.held():
            for names in [each for each in self.ready if each != self.names]:
                del self.ready[names]

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes along what are the component's children, and makes the rest anew."""
        return {**vars(self), "ready": {key: value for key, value in self.ready.items() if key == self.names}}


def _same(one: Any, other: Any) -> bool:
    """Whether two collections hold the very same things."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other


@dataclass(frozen=True)
class View:
    """What holds on a component here and now: for a request that would be made in this place.

    Attributes:
        plan: what is loaded.
        strengths: by name.
        disabled: whether all of them are off.
        training: whether weights may be trained through them.
    """

    plan: Plan
    strengths: Mapping[str, Strength]
    disabled: bool = False
    training: bool = False

    @property
    def acting(self) -> tuple[str, ...]:
        """The erasures that act, for one picture at least."""
        return tuple(name for name in self.plan.names if is_on(self.strengths[name]))


def is_on(strength: Strength) -> bool:
    """Whether a strength is other than 0, for one picture at least."""
    return any(strength) if isinstance(strength, tuple) else strength > 0
