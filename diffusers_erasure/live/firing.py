"""The firing check: a pass in which a module computed, but not with the erasure that sits in it, is no pass.

Hooks act where a module is called. A processor with weights of its own, or a tuner that computes with the weight instead of
calling the module, leaves them out. So each watched module marks that it was called, and the module around it (its owner: an
attention for its projections) sees at its end whether all of them did. What was not called at all, as a cache or a skipped layer
put something in its place, did not compute, and does not count.

Nothing here touches a tensor. In a graph that torch traces all of it is Python that is gone after tracing, but for a note of
what was missed, which the component's own hook reads: an error cannot leave a graph.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureInactiveError
from ..layers import Watched
from ..layers.sites import find_module, path_to


if TYPE_CHECKING:
    from .attachment import ErasureModules

COMPUTED = ""  # among the names of sites: something else in the owner was called
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


class Mark:
    """Forward pre-hook of a watched module: notes that it was called.

    A graph knows it by its place among the owner's sites and not by its name, so that one graph serves all blocks that are alike.
    """

    def __init__(self, owner: "Owner", site: str, hooks: tuple[int, ...], place: int = -1) -> None:
        self.owner, self.site, self.hooks, self.place = owner, site, hooks, place

    @compat.untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        owner = self.owner
        if not torch.compiler.is_compiling():
            called = owner.calls.get(threading.get_ident())
            if called is not None:
                called.add(self.site)
        elif owner.traced:
            owner.seen = (*owner.seen, self.place)
        else:
            owner.apart = True


class Owner:
    """The module around some watched modules: an attention, a feed-forward, a block, or the component itself.

    Attributes:
        calls: what was called so far in the call that is under way, by thread.
        wrapped: its `forward` was replaced, as caches do, so that its being called does not say that it computes.
        traced, seen: the same as `calls` in a graph; the values are known while it is traced, and constant in between.
        apart: it is itself what is compiled, so that its hooks run outside the graph and do not see into it.
        missed: places among the sites that were not called, found in a graph; `count` is that of the sites.
    """

    def __init__(self, check: "FiringCheck", module: nn.Module) -> None:
        self.check: FiringCheck | None = check
        self.module = module
        self.sites: tuple[str, ...] = ()
        self.count = 0
        self.calls: dict[int, set[str]] = {}
        self.wrapped = self.traced = self.apart = False
        self.seen: tuple[int, ...] = ()
        self.missed: tuple[int, ...] = ()
        self.witnesses: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self.handles = [
            module.register_forward_pre_hook(self.enter, prepend=True),
            module.register_forward_hook(self.leave),
        ]

    @compat.untraced
    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the owner's forward pass."""
        if torch.compiler.is_compiling():
            self.traced, self.seen = True, ()
        else:
            self.calls[threading.get_ident()] = set()

    @compat.untraced
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it."""
        if torch.compiler.is_compiling():
            left_out = tuple(place for place in range(self.count) if place not in self.seen)
            self.traced, self.seen = False, ()
            if left_out and not self.wrapped:
                self.missed = left_out
            return
        called = self.calls.pop(threading.get_ident(), None)
        if called is None or self.apart or (self.wrapped and COMPUTED not in called):
            return
        missing = tuple(site for site in self.sites if site not in called)
        reason = self.check.why_inactive(self, missing) if missing and self.check is not None else None
        if reason is not None:
            raise ErasureInactiveError(reason)

    def look(self) -> None:
        """Before a pass: see whether `forward` was replaced; then what is called inside says whether it computes."""
        self.wrapped = "forward" in vars(self.module)
        inside = {id(module): module for module in _inside(self.module)} if self.wrapped else {}
        for key in [key for key in self.witnesses if key not in inside]:
            self.witnesses.pop(key).remove()
        for key, module in inside.items():
            if key not in self.witnesses:
                self.witnesses[key] = module.register_forward_pre_hook(Mark(self, COMPUTED, ()))

    def __getstate__(self) -> dict[str, Any]:
        """Without handles on modules that are gone, as a LoRA's are that was unloaded: torch cannot copy these."""
        alive = {key: handle for key, handle in self.witnesses.items() if handle.hooks_dict_ref() is not None}
        return {**vars(self), "witnesses": alive}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        """A copy of a block alone gets an owner that watches nothing, or all of the component would be copied with it."""
        copied = Owner.__new__(Owner)
        memo[id(self)] = copied
        whole = self.check is not None and id(self.check.component) in memo
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo) if whole else {**_STALE, "calls": {}})
        return copied

    def close(self) -> None:
        """Take all hooks off."""
        for handle in (*self.handles, *self.witnesses.values()):
            handle.remove()


_STALE: dict[str, Any] = {
    "check": None,
    "module": None,
    "sites": (),
    "count": 0,
    "wrapped": False,
    "traced": False,
    "apart": False,
    "seen": (),
    "missed": (),
}


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """What a module calls itself: its children, through lists of them, and those of its processor."""
    for name, child in module.named_children():
        if isinstance(child, CONTAINERS) or name == "processor":
            yield from _inside(child)
        else:
            yield child


class FiringCheck:
    """What is watched on one component."""

    def __init__(self, state: "ErasureModules") -> None:
        self.state = state
        self.component: nn.Module | None = None
        self.watched: dict[str, Watched] = {}
        self.owners: dict[int, Owner] = {}
        self.marks: list[torch.utils.hooks.RemovableHandle] = []
        self.steps: list[tuple[nn.Module, str, nn.Module]] = []
        self.tuners: list[nn.Module] = []

    def watch(self, component: nn.Module, watched: Iterable[Watched]) -> None:
        """Watch these modules from now on, and no others."""
        self.close()
        self.component = compat.unwrap_compiled(component)
        for each in watched:
            known = self.watched.get(each.site)
            names = each.names if known is None else each.names | known.names
            hooks = each.hooks if known is None else (*known.hooks, *each.hooks)
            self.watched[each.site] = Watched(each.site, each.module, names, hooks)
        drop_copied(self.component, self)
        for each in self.watched.values():
            around = _owner(path_to(self.component, each.site, each.module), self.component)
            if id(around) not in self.owners:
                self.owners[id(around)] = Owner(self, around)
            owner = self.owners[id(around)]
            mark = Mark(owner, each.site, each.hooks, owner.count)
            owner.sites, owner.count = (*owner.sites, each.site), owner.count + 1
            self.marks.append(each.module.register_forward_pre_hook(mark))
        self._walk()

    def close(self) -> None:
        """Watch nothing."""
        for handle in self.marks:
            handle.remove()
        for owner in self.owners.values():
            owner.close()
        self.watched, self.owners, self.marks, self.steps, self.tuners = {}, {}, [], [], []

    def before(self) -> str | None:
        """Why what is watched would not act in the coming pass, or `None`."""
        for parent, name, child in self.steps:
            if compat.child(parent, name) is not child:
                reason = self._moved()
                if reason is not None:
                    return reason
                break
        for owner in self.owners.values():
            owner.look()
        return self._dropped() if self.tuners else None

    def after(self) -> str | None:
        """Why something watched did not act in the pass that is over, as far as a graph noted it, or `None`."""
        reason = None
        for owner in self.owners.values():
            if owner.missed:
                missing, owner.missed = owner.missed, ()
                reason = reason or self.why_inactive(owner, [owner.sites[place] for place in missing])
        return reason

    def why_inactive(self, owner: Owner, missing: Iterable[str]) -> str | None:
        """Why sites were not called though their owner computed; `None` where nothing was to act there."""
        for site in missing:
            names = self._acting(site)
            if names:
                assert self.component is not None
                cause = _cause(self.component, owner.module, site, self.watched[site].module)
                return self._said(names, site, cause)
        return None

    def _acting(self, site: str) -> list[str]:
        """The erasures that are to act at a site now."""
        if self.state.disabled:
            return []
        return [
            n for n in sorted(self.watched[site].names) if n in self.state.loaded and self.state.loaded[n].strength
        ]

    def _walk(self) -> None:
        assert self.component is not None
        steps = {}
        for each in self.watched.values():
            for parent, name, child in path_to(self.component, each.site, each.module):
                steps[id(parent), name] = (parent, name, child)
        self.steps = list(steps.values())
        self.tuners = [parent for parent, _, _ in self.steps if compat.is_tuner(parent)]

    def _dropped(self) -> str | None:
        """Why what peft has wrapped around a watched module would take its edit away, or `None`."""
        assert self.component is not None
        if not any(map(compat.drops_base_output, self.tuners)):
            return None
        for each in self.watched.values():
            ways = path_to(self.component, each.site, each.module)
            tuner = next((parent for parent, _, _ in ways if compat.is_tuner(parent)), None)
            names = self._acting(each.site)
            if tuner is not None and compat.drops_base_output(tuner) and names:
                return self._said(names, each.site, _cause(self.component, self.component, each.site, each.module))
        return None

    def _said(self, names: list[str], site: str, cause: str) -> str:
        return f"The erasures {names} do not act on {site!r} of {type(self.component).__name__}: {cause}"

    def _moved(self) -> str | None:
        """Something on the way to the watched modules changed: why they are not reached, or `None` where they are."""
        assert self.component is not None
        for each in self.watched.values():
            try:
                found: nn.Module | None = find_module(self.component, each.site)
            except ErasureCompatibilityError:
                found = None
            names = self._acting(each.site)
            if found is not each.module and names:
                return _MOVED.format(names=names, site=each.site, kind=type(self.component).__name__)
        self._walk()
        return None


def _owner(steps: list[tuple[nn.Module, str, nn.Module]], component: nn.Module) -> nn.Module:
    """The innermost module on the way to a site that is called, and no peft wrapper."""
    parents = [parent for parent, _, _ in steps if not isinstance(parent, CONTAINERS) and not compat.is_tuner(parent)]
    return parents[-1] if parents else component


def drop_copied(component: nn.Module, check: FiringCheck) -> None:
    """Take off what came along when modules with hooks were copied into a component: it follows no strength there."""
    for module in component.modules():
        for key, hook in compat.forward_hooks(module):
            mark = hook if isinstance(hook, Mark) else None
            owner = mark.owner if mark else getattr(hook, "__self__", None)
            if isinstance(owner, Owner) and owner.check is not check:
                compat.drop_forward_hooks(module, (key, *(mark.hooks if mark else ())))


_MOVED = (
    "The erasures {names} would not act on {site!r} of {kind}: another module took its place since they were loaded (a copy of "
    "a block, a quantised or swapped layer). Call `pipe.unload_erasure()` and load them again; to copy what is erased, copy "
    "the whole component or pipeline."
)


def _cause(component: nn.Module, owner: nn.Module, site: str, module: nn.Module) -> str:
    """Why a module was not called in its owner, and what to do."""
    for parent, _, _ in path_to(component, site, module):
        if compat.is_tuner(parent) and not compat.is_lora(parent):  # a LoRA calls what it wraps
            return (
                f"peft's {type(parent).__module__.split('.')[-2]} adapter there ({type(parent).__name__}) computes with the "
                "weight and not with what the module gives. Put the edit into the weight, which it reads: "
                '`pipe.unload_erasure()`, then load with `backend="merge"` before that adapter; or unload the adapter.'
            )
    processor: Callable[..., Any] | None = getattr(owner, "processor", None)
    if processor is not None:
        return (
            f"the attention processor {type(processor).__name__} does not call it (it has weights of its own, or fused ones). "
            "Set another processor (`set_default_attn_processor()`), or make the erasure as a map of the text rows, which acts "
            'before the attention whatever computes there (methods that have it: `layer="text_map"`).'
        )
    return (
        f"the {type(owner).__name__} around it computed without calling it. Undo what replaced its `forward`, or put the edit "
        'into the weights (`backend="merge"`).'
    )
