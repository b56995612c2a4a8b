"""Strengths for a graph that has no pass of its own: they are asked for when it runs, as an operator that it calls.

What holds where a graph is called depends on context variables, which a graph cannot be guarded by. So nothing is known of it
when the graph is made.
"""

import weakref
from typing import TYPE_CHECKING

import torch

from .. import compat
from ..errors import ErasureInactiveError


if TYPE_CHECKING:
    from .modifiers import Conditions

_known: "weakref.WeakValueDictionary[int, Conditions]" = weakref.WeakValueDictionary()


def make_known(number: int, conditions: "Conditions") -> None:
    """Let graphs ask for the strengths of a component by a number."""
    _known[number] = conditions


NAME = "diffusers_erasure::strengths"
# Tagged, as the CUDA graphs that torch.compile makes would keep what it gave once.
torch.library.define(
    NAME,
    "(Tensor defaults, int number, SymInt rows, bool whole, str reason, bool trains) -> Tensor",
    tags=compat.not_in_cuda_graphs(),
)


def _asked(defaults: torch.Tensor, number: int, rows: int, whole: bool, reason: str, trains: bool) -> torch.Tensor:
    conditions = _known.get(number)
    if conditions is None or conditions.asked is None:
        raise ErasureInactiveError(
            "A compiled graph asks for the strengths of a component that is no more. Compile again."
        )
    found = conditions.asked(rows, defaults.device, whole, reason, trains)
    return found.expand(rows, -1).clone()


def _alike(defaults: torch.Tensor, number: int, rows: int, whole: bool, reason: str, trains: bool) -> torch.Tensor:
    return defaults.new_empty((rows, defaults.shape[0]), dtype=torch.float32)


torch.library.impl(NAME, "default", _asked)
torch.library.register_fake(NAME, _alike)


def strengths(defaults: torch.Tensor, number: int, rows: int, whole: bool, reason: str, trains: bool) -> torch.Tensor:
    """The strengths of all erasures that are loaded, as they hold where the graph is called: float32 [rows, loaded].

    Args:
        defaults (`torch.Tensor`): [loaded].
        number (`int`): of the component, see [`make_known`].
        rows (`int`): of the pass.
        whole (`bool`): a pass of the component, or else of a part that is called by itself.
        reason (`str`): why an erasure would not act in the pass; empty where there is none.
        trains (`bool`): the pass would train weights.

    Raises:
        ErasureError: what a pass raises where it begins.
    """
    return torch.ops.diffusers_erasure.strengths(defaults, number, rows, whole, reason, trains)
