"""From what is given to what a method works with: the one place where presets fill in what was left out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..families import FAMILIES
from .ranges import rules_of


@dataclass(frozen=True)
class Facts:
    """What a preset's value may depend on.

    Attributes:
        concepts: how many are erased.
        squares: mean square of what their text rows, as a UNet's cross-attention reads them, differ by from those of many words.
        family: of the base model.
    """

    concepts: int
    squares: float = 750.0
    family: str = "stable-diffusion"

    @property
    def flows(self) -> bool:
        """Whether the base model predicts velocities."""
        return FAMILIES[self.family].prediction == "flow"


USUAL = Facts(concepts=1)  # one concept, on Stable Diffusion 1.x


@dataclass(frozen=True)
class ByFacts:
    """A preset's value that depends on the concepts and the base model: in words, and worked out."""

    text: str
    of: Callable[[Facts], Any]


Settings = TypeVar("Settings")


def resolve(config: Any, into: type[Settings], facts: Facts | None = None) -> Settings:
    """The settings that a method works with: those of a config, with a value for each that was left out (`None`).

    Args:
        config: a dataclass of settings, each checked, whose `stated()` gives what stands for those that are left out.
        into: the dataclass of the same settings without `None`.
        facts ([`Facts`], *optional*): where a preset depends on them.
    """
    stated, values = config.stated(), {}
    for name, rule in rules_of(type(config)).items():
        given = getattr(config, name)
        value = stated.get(name) if given is None else given
        if isinstance(value, ByFacts):
            value = None if facts is None else value.of(facts)
        if value is None:
            raise TypeError(f"{type(config).__module__}.{type(config).__qualname__}: nothing stands for `{name}`.")
        values[name] = rule.plain(value)
    return into(**values)
