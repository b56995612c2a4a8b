"""What would be saved without its erasures is not saved: they act beside the weights, and only weights are written."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import ErasureInactiveError
from .marks import Ledger


METHODS = ("save_pretrained", "push_to_hub")


def refuse(kind: str, names: Sequence[str]) -> None:
    """Refuse to write the weights of something on which erasures act that are not in them.

    Raises:
        ErasureInactiveError: there are such erasures.
    """
    if names:
        raise ErasureInactiveError(
            f"The erasures {list(names)} act beside the weights of this {kind}, so what would be saved is the base model, on "
            "which they are off; nothing of it was written. To save the erased model use `pipe.export_erased(folder)`, or call "
            "`pipe.fuse_erasures()` first; `pipe.save_erasure(folder)` saves an erasure by itself. To save the base model "
            "as such do it within `with pipe.erasures_disabled():`."
        )


class GuardedSave:
    """Stands before one of a component's methods that save it. A class and no closure, so that models stay picklable.

    Args:
        component (`nn.Module`): what would be saved.
        method (`str`): the method's name.
        ledger ([`Ledger`]): which erasures act on the component beside its weights.
    """

    def __init__(self, component: nn.Module, method: str, ledger: Ledger) -> None:
        self.component, self.method, self.ledger = component, method, ledger
        self.found = vars(component).get(method)  # somebody else's, in the place of the class's own

    @property
    def below(self) -> Callable[..., Any]:
        """The method as it was found."""
        method: Any = getattr(type(self.component), self.method)
        return method.__get__(self.component) if self.found is None else self.found

    @property
    def __signature__(self) -> inspect.Signature:  # diffusers looks which arguments a component's method takes
        return inspect.signature(self.below)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse(type(self.component).__name__, self.ledger.acting)
        return self.below(*args, **kwargs)


def guard(component: nn.Module, ledger: Ledger) -> None:
    """Put the guards before the methods that a component has."""
    for method in METHODS:
        if callable(getattr(type(component), method, None)):
            vars(component)[method] = GuardedSave(component, method, ledger)


def unguard(component: nn.Module) -> None:
    """Take the guards away; what somebody has put over them stays."""
    for method in METHODS:
        present = vars(component).get(method)
        if isinstance(present, GuardedSave):
            del vars(component)[method]
            if present.found is not None:
                vars(component)[method] = present.found
