"""Sites: the modules of a base model at which layers act, and the hooks there, one a module for all erasures."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError
from ..schema import LayerSpec
from .base import HookLayer, Watched
from .buffers import PartKey, Tensors, placement
from .modifiers import Conditions, Modifier


def find_module(component: nn.Module, site: str) -> nn.Module:
    """Return the base module named `site`, below any peft wrapper.

    CLIP's text encoder lost its level `text_model` in transformers 5; files name it, so both forms are found.

    Raises:
        ErasureCompatibilityError: the component has no such module.
    """
    component = compat.unwrap_compiled(component)
    for name in _names(site):
        try:
            return compat.base_layer(component.get_submodule(name))
        except AttributeError:
            continue
    raise ErasureCompatibilityError(
        f"{type(component).__name__} has no module {site!r}: the erasure was made for another architecture."
    )


def find_site(component: nn.Module, site: str) -> nn.Linear | nn.Conv2d:
    """Return the base module named `site`, a matrix or a plain convolution. See [`find_module`].

    Raises:
        ErasureCompatibilityError: the component has no such `Linear` or `Conv2d`.
    """
    module = find_module(component, site)
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
        return module
    raise ErasureCompatibilityError(
        f"{site!r} is a {type(module).__name__}; this layer acts on Linear and on Conv2d with one group."
    )


def path_to(component: nn.Module, site: str, module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The way from a component to its module: (parent, name, child) step by step, through what peft has wrapped around it.

    Empty where it leads elsewhere: a site that is no module by its name, or one whose module was replaced.
    """
    component = compat.unwrap_compiled(component)
    for name in _names(site):
        steps: list[tuple[nn.Module, str, nn.Module]] = []
        here: nn.Module | None = component
        for part in name.split("."):
            child = None if here is None else compat.child(here, part)
            if here is not None and child is not None:
                steps.append((here, part, child))
            here = None if child is None else compat.unwrap_compiled(child)
        while here is not None and here is not module:
            child = compat.child(here, "base_layer")
            if child is not None:
                steps.append((here, "base_layer", child))
            here = child
        if here is module:
            return steps
    return []


def attention_of(component: nn.Module, site: str) -> nn.Module:
    """Return the module around a site: an attention for its projections, the component where there is none."""
    component = compat.unwrap_compiled(component)
    for name in _names(site.rpartition(".")[0]):
        try:
            return component.get_submodule(name)
        except AttributeError:
            continue
    return component


def _names(site: str) -> tuple[str, ...]:
    return site, site.removeprefix("text_model."), f"text_model.{site}"


class SiteEdit(nn.Module):
    """What all erasures of one kind do at one site. A module, so that it follows the model's device and dtype.

    Args:
        conditions ([`Conditions`]): of the component, for the timestep and the gates.
    """

    parts: dict[PartKey, Any]  # of each layer of an erasure what `SiteLayer.part` gave

    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        self.source = (conditions,)  # a tuple, because a module assigned to a module would become its child
        self.parts = {}

    @abstractmethod
    def rebuild(self, device: torch.device, dtype: torch.dtype) -> None:
        """Take over the parts; the strengths are 0 until `fold`."""

    @abstractmethod
    def fold(self, strengths: Mapping[str, float]) -> None:
        """Write each erasure's strength into the live buffers, in place."""


class SiteLayer(HookLayer):
    """A live layer that puts one hook on each site, for all erasures that act there."""

    def __init__(self, conditions: Conditions) -> None:
        super().__init__(conditions)
        self.sites: dict[str, int] = {}  # name of a site -> its number in `edits`: names there must have no dots
        self.edits = nn.ModuleDict()
        self.handles: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self.hooked: dict[str, tuple[nn.Module, ...]] = {}  # component and module; tuples, or they would be children
        self.count = 0

    @abstractmethod
    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, SiteEdit, torch.utils.hooks.RemovableHandle]:
        """Put the hook on a site's module; return the module, what acts there, and the hook's handle."""

    @abstractmethod
    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> Any:
        """What a layer does at the site of that index, as an entry of [`SiteEdit.parts`]."""

    def attach(
        self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors, modifier: Modifier | None
    ) -> None:
        for index, site in enumerate(spec.sites):
            part = self.part(spec, tensors, index, modifier)
            if site not in self.sites:
                module, edit, self.handles[site] = self.hook(component, site)
                self.sites[site] = self.count
                self.edits[str(self.count)] = edit
                self.hooked[site] = (component, module)
                self.count += 1
            edit = self.edit(site)
            edit.parts[key] = part
            edit.rebuild(*self.placement(*self.hooked[site]))

    def altered(self, component: nn.Module, spec: LayerSpec) -> Iterable[nn.Module]:
        return [self.hooked[site][1] for site in spec.sites]

    def detach(self, name: str) -> None:
        for site in list(self.sites):
            edit = self.edit(site)
            kept = {key: part for key, part in edit.parts.items() if key[0] != name}
            if len(kept) == len(edit.parts):
                continue
            edit.parts = kept
            if kept:
                edit.rebuild(*self.placement(*self.hooked[site]))
            else:
                self.handles.pop(site).remove()
                del self.hooked[site], self.edits[str(self.sites.pop(site))]

    def fold(self, strengths: Mapping[str, float]) -> None:
        for site in self.sites:
            self.edit(site).fold(strengths)

    def is_empty(self) -> bool:
        return not self.sites

    def watched(self) -> Iterator[Watched]:
        for site, (component, module) in self.hooked.items():
            if module is not compat.unwrap_compiled(component):  # a named input: then the pass itself is the call
                names = frozenset(name for name, _ in self.edit(site).parts)
                yield Watched(site, module, names, (self.handles[site].id,))

    def placement(self, component: nn.Module, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the live tensors at a module."""
        return placement(component, module)

    def edit(self, site: str) -> Any:
        """What acts at a site."""
        return self.edits[str(self.sites[site])]
