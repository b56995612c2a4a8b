"""What is loaded into a pipeline, read from the states of its components."""

from typing import Any

from torch import nn

from ..errors import ErasureNotFoundError
from ..schema import COMPONENTS
from . import attachment
from .attachment import ErasureModules, Loaded


def components(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline on which an erasure may act, by name."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def states(pipe: Any) -> dict[str, ErasureModules]:
    """What is attached to each component that has anything attached."""
    found = {name: attachment.state_of(module) for name, module in components(pipe).items()}
    return {name: state for name, state in found.items() if state is not None}


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
