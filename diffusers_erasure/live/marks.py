"""Marks in the state dict of a component whose weights are not all that it computes.

A LoRA's state dict has keys that a module without the LoRA does not know, so that loading it there fails. An erasure has
no weights in the component; while it acts, each module that it alters says so by one more key. A module that has the same
erasure itself passes that key over.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


KEY = "erasure_{}_is_not_in_these_weights_see_export_erased"


class Ledger:
    """Which erasures act on a component beside its weights.

    Args:
        on (callable, *optional*): gives the names of those that act here and now.
    """

    def __init__(self, on: Callable[[], Iterable[str]] = tuple) -> None:
        self.on = on
        self.contents: dict[str, str] = {}  # of the erasures with hooks or adapters here, the content's hash

    @property
    def acting(self) -> list[str]:
        """Those with hooks or adapters that are on."""
        return [name for name in self.on() if name in self.contents]


class Mark:
    """State dict hook of one module. A class and no closure, so that models stay picklable."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.names: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a block alone says nothing: it has no erasure, and no state that would take the mark off."""
        return {"ledger": Ledger(), "names": self.names}

    def keys(self, prefix: str, *, acting: bool) -> list[str]:
        """The keys of the erasures that alter this module: all, or those that are on."""
        contents = self.ledger.contents
        names = sorted(self.names.intersection(self.ledger.acting) if acting else self.names)
        return [prefix + KEY.format(contents[name][:8]) for name in names if name in contents]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for key in self.keys(prefix, acting=True):
            weight = next(module.parameters(), None)
            device = torch.device("cpu") if weight is None or weight.is_meta else weight.device
            state_dict[key] = torch.zeros(1, device=device)


class PassOver:
    """Hook before a module loads a state dict: the keys of the erasures that it has itself are no strangers."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for key in self.mark.keys(prefix, acting=False):
            state_dict.pop(key, None)


class Marks:
    """All marks on one component.

    Args:
        on (callable): gives the names of the erasures that act here and now.
    """

    def __init__(self, on: Callable[[], Iterable[str]]) -> None:
        self.ledger = Ledger(on)
        self.placed: dict[nn.Module, tuple[Mark, tuple[torch.utils.hooks.RemovableHandle, ...]]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for mark, _ in self.placed.values():
            mark.ledger = self.ledger

    def add(self, name: str, content: str, modules: Iterable[nn.Module] = ()) -> None:
        """An erasure has hooks or adapters on the component from now on, by which it alters these modules."""
        self.ledger.contents[name] = content
        for module in modules:
            if module not in self.placed:
                mark = Mark(self.ledger)
                written = module.register_state_dict_post_hook(mark)
                read = module.register_load_state_dict_pre_hook(PassOver(mark))
                self.placed[module] = mark, (written, read)
            self.placed[module][0].names.add(name)

    def drop(self, name: str) -> None:
        """An erasure has neither hooks nor adapters on the component any more."""
        self.ledger.contents.pop(name, None)
        for module, (mark, handles) in list(self.placed.items()):
            mark.names.discard(name)
            if not mark.names:
                for handle in handles:
                    handle.remove()
                del self.placed[module]
