"""What is loaded into a pipeline, read from the states of its components."""

from typing import Any

from ..errors import ErasureNotFoundError
from .requests import components
from .state import Loaded, states


__all__ = ["components", "known", "loaded", "states"]


def loaded(pipe: Any) -> dict[str, Loaded]:
    """The loaded erasures by name, in the order of loading."""
    items: dict[str, Loaded] = {}
    for state in states(pipe).values():
        items.update({name: item for name, item in state.loaded.items() if name not in items})
    return items


def known(pipe: Any, name: str) -> Loaded:
    """Return a loaded erasure.

    Raises:
        ErasureNotFoundError: none is loaded under that name.
    """
    items = loaded(pipe)
    if name not in items:
        raise ErasureNotFoundError(f"No erasure {name!r} is loaded; loaded are {list(items)}.")
    return items[name]
