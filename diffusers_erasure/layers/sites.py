"""Sites: the modules of a base model at which layers act, and the hooks there, one a module for all erasures."""

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError
from ..schema import LayerSpec
from .base import HookLayer, Watched
from .buffers import PartKey, Tensors, placement
from .modifiers import Conditions, Factors, Modifier
from .passing import Pass


def find_module(component: nn.Module, site: str) -> nn.Module:
    """Return the base module named `site`, below any peft wrapper.

    CLIP's text encoder lost its level `text_model` in transformers 5; files name it, so both forms are found.

    Raises:
        ErasureCompatibilityError: the component has no such module.
    """
    component = compat.unwrap_compiled(component)
    for name in _names(site):
        module = _submodule(component, name)
        if module is not None:
            return compat.base_layer(module)
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
        module = _submodule(component, name)
        if module is not None:
            return module
    return component


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """What `get_submodule` finds, or `None`: children first, as it takes long to ask a model for attributes."""
    for name in path.split(".") if path else ():
        found = compat.child(module, name)
        found = getattr(module, name, None) if found is None else found  # what a wrapper forwards to
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def _names(site: str) -> tuple[str, ...]:
    return site, site.removeprefix("text_model."), f"text_model.{site}"


class SiteEdit(nn.Module):
    """What some erasures of one kind do at one site: made for them once, and never changed.

    A module, so that it follows the model's device and dtype. What it is called with is its [`Place`]'s.

    Args:
        module (`nn.Module`): the one at which it acts.
        parts (`dict`): of each layer of an erasure what `SiteLayer.part` gave; it has a `modifier` and an `index`.
        columns (`dict`): by name of an erasure its column among a pass's strengths.
        device (`torch.device`), dtype (`torch.dtype`): of its tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[PartKey, Any],
        columns: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        modifiers = [(part.modifier, part.index, columns[name]) for (name, _), part in parts.items()]
        self.factors = Factors(modifiers, device)


class Place:
    """A hook at one site, for all erasures of a kind there: the pass says which of them act. Picklable, as a closure is not.

    Args:
        conditions ([`Conditions`]): the passes of the component.

    Attributes:
        number: by it a pass knows what is done here.
        whole: what all erasures do that are loaded; graphs read it, as it is the same place for them in every pass.
    """

    def __init__(self, conditions: Conditions) -> None:
        self.conditions = conditions
        self.number = next_number()
        self.whole: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a part of a component does nothing; the state of a whole one gives its places back what they have."""
        return {**vars(self), "whole": None}

    def at_work(self) -> tuple[Any, Pass]:
        """What is done here in this pass (`None`: nothing), and the pass."""
        now = self.conditions.now
        if torch.compiler.is_compiling():
            return (self.whole if now.older is None else now.older.get(self.number)), now
        return now.edits.get(self.number), now


_numbers = itertools.count()


def next_number() -> int:
    """A number that nothing else in this process has."""
    return next(_numbers)


@dataclass
class Site:
    """One site, with all that erasures of a kind have to do there.

    Attributes:
        component, module: what is hooked.
        place: the hook.
        handle: of the hook.
        parts: of each layer of an erasure what it does.
    """

    component: nn.Module
    module: nn.Module
    place: Place
    handle: torch.utils.hooks.RemovableHandle
    parts: dict[PartKey, Any]


class SiteLayer(HookLayer):
    """A live layer that puts one hook on each site, for all erasures that act there."""

    edit: ClassVar[type[SiteEdit]]

    def __init__(self, conditions: Conditions) -> None:
        super().__init__(conditions)
        self.sites: dict[str, Site] = {}

    @abstractmethod
    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        """Put the hook on a site's module; return the module, the hook, and its handle."""

    @abstractmethod
    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> Any:
        """What a layer does at the site of that index, with `modifier` and `index` among its attributes."""

    def attach(
        self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors, modifier: Modifier | None
    ) -> None:
        for index, site in enumerate(spec.sites):
            part = self.part(spec, tensors, index, modifier)
            if site not in self.sites:
                self.sites[site] = Site(component, *self.hook(component, site), {})
            self.sites[site].parts[key] = part

    def altered(self, component: nn.Module, spec: LayerSpec) -> Iterable[nn.Module]:
        return [self.sites[site].module for site in spec.sites]

    def detach(self, name: str) -> None:
        for each in self.sites.values():
            each.parts = {key: part for key, part in each.parts.items() if key[0] != name}

    def tidy(self) -> None:
        for site in [site for site, each in self.sites.items() if not each.parts]:
            self.sites.pop(site).handle.remove()

    def parts(self) -> Mapping[str, tuple[Site, Mapping[PartKey, Any]]]:
        return {site: (each, dict(each.parts)) for site, each in self.sites.items() if each.parts}

    def build(self, parts: Any, names: Sequence[str]) -> dict[int, Any]:
        columns = {name: column for column, name in enumerate(names)}
        found = {}
        for each, own in parts.values():
            acting = {key: part for key, part in own.items() if key[0] in columns}
            if acting:
                device, dtype = self.placement(each.component, each.module)
                found[each.place.number] = self.edit(each.module, acting, columns, device, dtype)
        return found

    def places(self) -> Iterable[Any]:
        return [each.place for each in self.sites.values()]

    def is_empty(self) -> bool:
        return not self.sites

    def watched(self) -> Iterator[Watched]:
        for site, each in self.sites.items():
            if each.parts and each.module is not compat.unwrap_compiled(
                each.component
            ):  # a named input: then the pass is the call
                names = frozenset(name for name, _ in each.parts)
                yield Watched(site, each.module, names, (each.handle.id,))

    def placement(self, component: nn.Module, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the live tensors at a module."""
        return placement(component, module)
