"""The firing check: a pass in which a module computed, but not with the erasure that sits in it, is no pass.

Hooks act where a module is called. A processor with weights of its own, or a tuner that computes with the weight instead of
calling the module, leaves them out. So each watched module marks that it was called, and the module around it (its owner: an
attention for its projections) sees at its end whether all of them did. What was not called at all, as a cache or a skipped layer
put something in its place, did not compute, and does not count.

Nothing here touches a tensor. In a graph that torch traces all of it is Python that is gone after tracing, but for a note of
what was missed, which the component's own hook reads: an error cannot leave a graph.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import compat
from ..errors import ErasureInactiveError
from ..layers import Watched
from ..layers.locks import Lock
from ..layers.sites import path_to


if TYPE_CHECKING:
    from .state import ErasureModules

COMPUTED = ""  # among the names of sites: something else in the owner was called
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
Step = tuple[nn.Module, str, nn.Module]  # a parent, a name, and its child of that name


class Mark:
    """Forward pre-hook of a watched module: notes that it was called.

    A graph knows it by its place among the owner's sites and not by its name, so that one graph serves all blocks that are alike.
    """

    def __init__(self, owner: "Owner", site: str, hooks: tuple[int, ...] = (), place: int = -1) -> None:
        self.owner, self.site, self.hooks, self.place = owner, site, hooks, place
        self.apart = False  # called in a graph of which the owner's own hooks see nothing

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
            self.apart = True


class Owner:
    """The module around some watched modules: an attention, a feed-forward, a block, or the component itself.

    Attributes:
        calls: what was called so far in the call that is under way, by thread.
        wrapped: its `forward` was replaced, as caches do, so that its being called does not say that it computes.
        traced, seen: the same as `calls` in a graph; the values are known while it is traced, and constant in between.
        missed: places among the `count` sites that were not called, found in a graph.
    """

    def __init__(self, check: "FiringCheck", module: nn.Module) -> None:
        self.check: FiringCheck | None = check
        self.module: nn.Module | None = module
        self.marks: list[Mark] = []
        self.count = 0
        self.calls: dict[int, set[str]] = {}
        self.wrapped = self.traced = False
        self.seen: tuple[int, ...] = ()
        self.missed: tuple[int, ...] = ()
        self.witnesses: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self.handles = [
            module.register_forward_pre_hook(self.enter, prepend=True),
            # Not `always_call`, whose hooks torch knows by number: each block would get a graph of its own.
            module.register_forward_hook(self.leave),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches nothing: of a block alone it must not bring the whole component, and a component is watched anew."""
        empty: dict[str, Any] = {"check": None, "module": None, "marks": [], "count": 0, "calls": {}, "witnesses": {}}
        return {**empty, "wrapped": False, "traced": False, "seen": (), "missed": (), "handles": []}

    def watch(self, module: nn.Module, site: str, hooks: tuple[int, ...]) -> None:
        """Expect a module to be called."""
        mark = Mark(self, site, hooks, self.count)
        self.marks.append(mark)
        self.count += 1
        self.handles.append(module.register_forward_pre_hook(mark))

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
        if called is None or (self.wrapped and COMPUTED not in called):
            return
        missing = tuple(mark.site for mark in self.marks if mark.site not in called and not mark.apart)
        reason = self.check.why_inactive(self, missing) if missing and self.check is not None else None
        if reason is not None:
            raise ErasureInactiveError(reason)

    def look(self, lock: Lock) -> None:
        """Before a pass: see whether `forward` was replaced; then what is called inside says whether it computes."""
        assert self.module is not None
        self.wrapped = "forward" in vars(self.module)
        inside = {id(module): module for module in _inside(self.module)} if self.wrapped else {}
        if inside.keys() != self.witnesses.keys():
            with lock.held():
                for key in [key for key in self.witnesses if key not in inside]:
                    self.witnesses.pop(key).remove()
                for key, module in inside.items():
                    if key not in self.witnesses:
                        self.witnesses[key] = module.register_forward_pre_hook(Mark(self, COMPUTED))
        others = set(self.calls) - {threading.get_ident()}
        if others:  # of a thread that has ended, a pass that broke off
            for ended in others - {thread.ident for thread in threading.enumerate()}:
                self.calls.pop(ended, None)
                others.discard(ended)
        if not others:  # no other thread is in between
            for mark in self.marks:
                mark.apart = False

    def close(self) -> None:
        """Take all hooks off."""
        for handle in (*self.handles, *self.witnesses.values()):
            handle.remove()


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
        self.lock = Lock()
        self.component: nn.Module | None = None
        self.watched: dict[str, Watched] = {}
        self.copied = False  # then the hooks came along, but see nothing: all is to be watched anew
        self.owners: dict[int, Owner] = {}
        self.steps: list[Step] = []
        self.tuners: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        kept = {"state": self.state, "component": self.component, "watched": self.watched}
        return {**kept, "copied": True, "owners": {}, "steps": [], "tuners": [], "lock": Lock()}

    def watch(self, component: nn.Module, watched: Iterable[Watched]) -> None:
        """Watch these modules from now on, and no others."""
        by_site: dict[str, Watched] = {}
        for each in watched:
            known = by_site.get(each.site)
            names = each.names if known is None else each.names | known.names
            hooks = each.hooks if known is None else (*known.hooks, *each.hooks)
            by_site[each.site] = Watched(each.site, each.module, names, hooks)
        component = compat.unwrap_compiled(component)
        around = compat.family(component)
        drop_copied(around, {id(each.module) for each in by_site.values()})
        owners = {each.site: _owner(each.module, around, component) for each in by_site.values()}
        if self.component is component and self._sees(by_site, owners):
            self.watched = by_site  # of other erasures
            return
        self.close()
        self.component, self.watched = component, by_site
        for each in self.watched.values():
            owner = owners[each.site]
            if id(owner) not in self.owners:
                self.owners[id(owner)] = Owner(self, owner)
            self.owners[id(owner)].watch(each.module, each.site, each.hooks)
        steps: dict[tuple[int, str], Step] = {}
        for each in self.watched.values():
            for step in path_to(self.component, each.site, each.module):
                steps[id(step[0]), step[1]] = step
        self.steps = list(steps.values())
        self.tuners = [parent for parent, _, _ in self.steps if compat.is_tuner(parent)]

    def _sees(self, by_site: Mapping[str, Watched], owners: Mapping[str, nn.Module]) -> bool:
        """Whether these modules and no others are watched now, in these owners, and are reached as they were."""
        if self.copied or self._changed():
            return False
        marks = {mark.site: (owner.module, mark.hooks) for owner in self.owners.values() for mark in owner.marks}
        same = all(each.module is self.watched[site].module for site, each in by_site.items() if site in self.watched)
        return same and marks == {site: (owners[site], each.hooks) for site, each in by_site.items()}

    def _changed(self) -> bool:
        """Whether anything on the way to what is watched was replaced."""
        return any(compat.child(parent, name) is not child for parent, name, child in self.steps)

    def close(self) -> None:
        """Watch nothing."""
        for owner in self.owners.values():
            owner.close()
        self.watched, self.owners, self.steps, self.tuners, self.copied = {}, {}, [], [], False

    def before(self) -> str | None:
        """Why what is watched would not act in the coming pass, or `None`; within a larger graph nothing is looked at."""
        if torch.compiler.is_compiling():
            return None
        if self.copied or self._changed():
            with self.lock.held():  # the first passes of a copy may be in several threads
                reason = self._moved() if self.copied or self._changed() else None
            if reason is not None:
                return reason
        for owner in list(self.owners.values()):
            owner.look(self.lock)
        return self._dropped() if self.tuners else None

    def after(self) -> str | None:
        """Why something watched did not act in the pass that is over, as far as a graph noted it, or `None`."""
        reason = None
        for owner in self.owners.values():
            if owner.missed:
                missing, owner.missed = owner.missed, ()
                reason = reason or self.why_inactive(owner, [owner.marks[place].site for place in missing])
        return reason

    def why_inactive(self, owner: Owner, missing: Iterable[str]) -> str | None:
        """Why sites were not called though their owner computed; `None` where nothing was to act there."""
        for site in missing:
            names = self._acting(site)
            if names:
                assert self.component is not None and owner.module is not None
                cause = _cause(self.component, owner.module, site, self.watched[site].module)
                return self._said(names, site, cause)
        return None

    def _acting(self, site: str) -> list[str]:
        """The erasures that are to act at a site now."""
        return sorted(self.watched[site].names.intersection(self.state.acting()))

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
        present = compat.family(self.component)
        gone = [each for each in self.watched.values() if each.module not in present]
        for each in gone:
            names = self._acting(each.site)
            if names:
                return _MOVED.format(names=names, site=each.site, kind=type(self.component).__name__)
        if not gone:  # otherwise they are looked for again in the next pass, at other strengths perhaps
            self.watch(self.component, self.watched.values())
        return None


def _owner(module: nn.Module, around: Mapping[nn.Module, nn.Module], component: nn.Module) -> nn.Module:
    """The innermost module around another that is called, and no wrapper of peft or of `torch.compile`."""
    owner = around.get(module, component)
    while owner is not component and (
        isinstance(owner, CONTAINERS) or compat.is_tuner(owner) or compat.unwrap_compiled(owner) is not owner
    ):
        owner = around.get(owner, component)
    return owner


def drop_copied(modules: Iterable[nn.Module], own: set[int]) -> None:
    """Take off what came along when modules with hooks were copied into a component: it follows no strength there.

    Of the component's `own` modules, which were copied with it, only the hooks of the check, which are put on anew.
    """
    for module in modules:
        for key, hook in compat.forward_hooks(module):
            mark = hook if isinstance(hook, Mark) else None
            owner = mark.owner if mark else getattr(hook, "__self__", None)
            if isinstance(owner, Owner) and owner.check is None:
                stray = mark.hooks if mark is not None and id(module) not in own else ()
                compat.drop_forward_hooks(module, (key, *stray))


_ELSEWHERE = (
    "another module took its place. Call `pipe.unload_erasure()` and load them again; to copy what is erased, copy the whole "
    "component or pipeline."
)
_MOVED = (
    "The erasures {names} would not act on {site!r} of {kind}: another module took its place since they were loaded (a copy of "
    "a block, a quantised or swapped layer). Call `pipe.unload_erasure()` and load them again; to copy what is erased, copy "
    "the whole component or pipeline."
)


def _cause(component: nn.Module, owner: nn.Module, site: str, module: nn.Module) -> str:
    """Why a module was not called in its owner, and what to do."""
    way = path_to(component, site, module)
    if not way:
        return _ELSEWHERE
    processor: Callable[..., Any] | None = getattr(owner, "processor", None)
    name = type(processor).__name__
    tuner = next((parent for parent, _, _ in way if compat.is_tuner(parent)), None)
    if tuner is not None and not compat.is_lora(tuner) and (processor is None or name.startswith(STOCK)):
        return (
            f"peft's {type(tuner).__module__.split('.')[-2]} adapter there ({type(tuner).__name__}) computes with the "
            "weight and not with what the module gives. Put the edit into the weight, which it reads: "
            '`pipe.unload_erasure()`, then load with `backend="merge"` before that adapter; or unload the adapter.'
        )
    if processor is not None:
        return (
            f"the attention processor {name} does not call it (it has weights of its own, or fused ones). "
            "Set another processor (`set_default_attn_processor()`), or make the erasure as a map of the text rows, which acts "
            'before the attention whatever computes there (methods that have it: `layer="text_map"`).'
        )
    return (
        f"the {type(owner).__name__} around it computed without calling it. Undo what replaced its `forward`, or put the edit "
        'into the weights (`backend="merge"`).'
    )


# Attention processors that call an attention's projections.
STOCK = ("AttnProcessor", "AttnAddedKV", "SlicedAttn", "XFormersAttn", "IPAdapter", "PAG", "JointAttn", "FluxAttn")
