"""What a setting may be, as part of its field's annotation: one check for all methods, and the same in words for people."""

import dataclasses
import typing
from collections.abc import Callable
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, Protocol

from ..errors import ErasureInputError


class Range(Protocol):
    """What a setting may be."""

    @property
    def text(self) -> str:
        """In words, for people."""
        ...

    @property
    def expected(self) -> str:
        """In words, for the message where it is something else."""
        ...

    def holds(self, value: Any) -> bool:
        """Whether a value is one."""
        ...


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number of at least `least`."""

    least: int

    @property
    def text(self) -> str:
        return f"a whole number, at least {self.least}"

    @property
    def expected(self) -> str:
        return f"a whole number of at least {self.least}"

    def holds(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.least


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number: of at least `least`, or above `above`; below `below`, or at most `most`."""

    least: float = 0.0
    above: float | None = None
    below: float | None = None
    most: float | None = None

    @property
    def text(self) -> str:
        return f"a number{', at' if self.above is None else ''} {self._bounds.removeprefix('of at ')}"

    @property
    def expected(self) -> str:
        return f"a finite number {self._bounds}"

    @property
    def _bounds(self) -> str:
        bounds = [f"of at least {self.least:g}" if self.above is None else f"above {self.above:g}"]
        bounds += [] if self.below is None else [f"below {self.below:g}"]
        bounds += [] if self.most is None else [f"at most {self.most:g}"]
        return " and ".join(bounds)

    def holds(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
            return False
        low = value >= self.least if self.above is None else value > self.above
        return low and (self.below is None or value < self.below) and (self.most is None or value <= self.most)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few values; of a `Literal`."""

    values: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"one of {', '.join(self.values)}"

    @property
    def expected(self) -> str:
        return f"one of {list(self.values)}"

    def holds(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.values


@dataclasses.dataclass(frozen=True)
class Switch:
    """On or off; of a `bool`."""

    text = "true or false"
    expected = "True or False"

    def holds(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclasses.dataclass(frozen=True, init=False)
class Of:
    """A value of some types, described in words.

    Attributes:
        plain: brings one into the form in which the method takes it, and refuses what is none after all.
    """

    text: str
    types: tuple[type, ...]
    plain: Callable[[Any], Any]

    def __init__(self, text: str, *types: type, plain: Callable[[Any], Any] = lambda value: value) -> None:
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "types", types)
        object.__setattr__(self, "plain", plain)

    @property
    def expected(self) -> str:
        return self.text

    def holds(self, value: Any) -> bool:
        return isinstance(value, self.types)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A setting's range, and whether it may be left to the method (`None`)."""

    range: Range
    optional: bool

    def plain(self, value: Any) -> Any:
        """A value in the form in which the method takes it."""
        return self.range.plain(value) if isinstance(self.range, Of) else value


def rules_of(kind: type[Any]) -> dict[str, Rule]:
    """What each setting of a dataclass may be, by name, from the annotations of its fields.

    Raises:
        TypeError: an annotation does not tell.
    """
    key: Any = kind  # a class can be hashed, whatever the type checker makes of `type[Any]`
    return _rules(key)


@cache
def _rules(kind: Any) -> dict[str, Rule]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        item.name: _rule(hints[item.name], f"{kind.__qualname__}.{item.name}") for item in dataclasses.fields(kind)
    }


def _rule(hint: Any, where: str) -> Rule:
    annotated = typing.get_origin(hint) is Annotated
    own = [each for each in hint.__metadata__ if hasattr(each, "holds")] if annotated else []
    plain = hint.__origin__ if annotated else hint
    parts = [plain] if typing.get_origin(plain) is Literal else typing.get_args(plain) or [plain]
    left = [part for part in parts if part is not NoneType]
    optional = len(left) < len(parts)
    if own:
        return Rule(own[0], optional)
    if left == [bool]:
        return Rule(Switch(), optional)
    if len(left) == 1 and typing.get_origin(left[0]) is Literal:
        return Rule(Choice(typing.get_args(left[0])), optional)
    raise TypeError(f"{where} has no range; annotate it.")


def check_settings(config: Any) -> None:
    """See that each setting of a dataclass is what its annotation says.

    Raises:
        ErasureInputError: one is not.
    """
    for name, rule in rules_of(type(config)).items():
        value = getattr(config, name)
        if value is None and rule.optional:
            continue
        if not rule.range.holds(value):
            raise ErasureInputError(f"`{name}` must be {rule.range.expected}, not {value!r}.")
        rule.plain(value)
