"""What is attached to one component, and what it knows of passes: a child module `erasure_modules` with layers and guard."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import compat
from ..artifact import Erasure
from ..errors import ErasureInactiveError, ErasureInputError, ErasureTrainingError
from ..layers import LiveLayer
from ..layers.buffers import PartKey, live_buffer, set_buffer
from ..layers.modifiers import Conditions
from ..layers.passing import Pass
from ..originals import Kept
from . import requests
from .firing import FiringCheck
from .marks import Marks
from .plans import Plan, Strength, View
from .training_rule import trains
from .turnstile import Turnstile


CHILD = "erasure_modules"


@dataclass
class Loaded:
    """One erasure on a pipeline. The states of all the components on which it acts share this object."""

    name: str
    erasure: Erasure
    strength: float
    base_match: dict[str, str]
    content_hash: str
    backend: str = "hook"  # or "peft", "processor"; which are fused each component says (`ErasureModules.merged`)
    prompts: Any = None  # a `PromptRecord`, where it has layers on text encoders
    one_prompt: Any = None  # a `OnePrompt`, where it acts only on rows whose halves are of one prompt


class ErasureModules(nn.Module):
    """All erasures on one component, as its child `erasure_modules`: there `.to()`, deepcopy and pickle find it."""

    def __init__(self, component: nn.Module) -> None:
        super().__init__()
        self.source = (component,)  # a tuple, because a module assigned to a module would become its child
        self.layers = nn.ModuleDict()
        self.edits = nn.ModuleDict()  # of all that is loaded; what is made for a part of it moves with nothing
        self.conditions = Conditions(self.beside)
        self.timed: set[PartKey] = set()  # what is attached and asks for the timestep
        self.loaded: dict[str, Loaded] = {}
        self.plan = Plan({}, ())
        self.turnstile = Turnstile()
        self.requests = Requests()
        self.tensors = StrengthTensors()
        self.firing = FiringCheck(self)
        self.guards: list[torch.utils.hooks.RemovableHandle] = []
        self.fused: dict[str, Kept] = {}
        self.merged: list[str] = []  # names of the erasures that are fused, and so have no layers here
        self.marks = Marks(self.acting)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.conditions.beside = self.beside
        self._hold(self.plan.whole)
        self._hold_defaults(self.conditions.defaults.device)
        compat.watch_hooks()  # of a pickle, in a process that has loaded no erasure

    @property
    def component(self) -> nn.Module:
        """The component."""
        (component,) = self.source
        return component

    def add(self, item: Loaded) -> None:
        """List an erasure; who goes through what is listed meanwhile, in another thread, has it as it was."""
        self.loaded = {**self.loaded, item.name: item}

    def drop(self, name: str) -> None:
        """List it no more."""
        self.loaded = {key: item for key, item in self.loaded.items() if key != name}

    def live(self) -> Iterator[LiveLayer]:
        """By what erasures act here."""
        for layer in self.layers.values():
            assert isinstance(layer, LiveLayer)
            yield layer

    def view(self) -> View:
        """What holds for a request that would be made here and now."""
        return requests.view(self.component, self)

    def acting(self) -> tuple[str, ...]:
        """The erasures that act in the pass that is under way, or would in one that began here and now."""
        now = self.conditions.here.now
        return self.view().acting if now is None else now.names

    def planned(self) -> Plan:
        """The plan of what is loaded and attached now, with what its erasures do. Here memory may run out."""
        plan = Plan(self.loaded, self.live(), self.plan)
        plan.of(plan.names)
        return plan

    def replan(self, plan: Plan | None = None, *, weights_changed: bool = False) -> None:
        """Take over what is loaded and attached now, or was when `plan` was made, for requests that begin from here on.

        With `weights_changed`, as erasures were fused into them or taken out, those under way have to go on with it too.
        """
        plan = self.planned() if plan is None else plan
        if plan.whole is not self.plan.ready.get(self.plan.names):
            self._hold(plan.whole)
        self.plan = plan
        for request in self.requests.all() if weights_changed else ():
            request.plans[id(self.component)] = plan
        device = next((parameter.device for parameter in self.component.parameters()), torch.device("cpu"))
        self._hold_defaults(torch.device("cpu") if device.type == "meta" else device)
        self._changed()

    def _hold_defaults(self, device: torch.device) -> None:
        """The strengths that are set, as a live tensor: for captured graphs, and for those within larger ones."""
        defaults = torch.tensor(list(self.plan.strengths.values()), dtype=torch.float32)
        live_buffer(self.conditions, "defaults", defaults, device, torch.float32)
        self.conditions.traced.whole = self.conditions.defaults[None]

    def _hold(self, whole: Mapping[int, Any]) -> None:
        """Make what all that is loaded does the component's own, and what graphs read."""
        self.edits = nn.ModuleDict(
            {str(number): edit for number, edit in whole.items() if isinstance(edit, nn.Module)}
        )
        for layer in self.live():
            for place in layer.places():
                place.whole = whole.get(place.number)

    def set_strengths(self) -> None:
        """Take over the strengths of what is loaded; the live tensor of them is written in place, for CUDA graphs."""
        self.plan = Plan(self.loaded, self.live(), self.plan)
        set_buffer(self.conditions.defaults, torch.tensor(list(self.plan.strengths.values()), dtype=torch.float32))
        self._changed()

    def _changed(self) -> None:
        requests.changed(self.component, self)
        self.fold()

    def fold(self) -> None:
        """Let what acts by the component itself, and so for all threads alike, take over what holds here and now."""
        strengths = self.view().strengths
        for layer in self.live():
            layer.fold({name: value for name, value in strengths.items() if not isinstance(value, tuple)})

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[View, Pass]:
        """A pass of the component with these arguments."""
        view = self.view()
        first = next(
            (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each.ndim), None
        )
        rows, device = (1, torch.device("cpu")) if first is None else (len(first), first.device)
        now = self._pass(view, rows, device)
        self.conditions.read(now, args, kwargs)
        if torch.is_grad_enabled() and view.training:
            self.conditions.trained = self.conditions.here.back = now
        return view, now

    def beside(self) -> Pass:
        """The pass for a module that is called outside of one; on the way back, where blocks are recomputed, that which was."""
        if compat.in_backward() and self.conditions.trained is not None:
            return self.conditions.trained
        return self._pass(self.view(), 1, self.conditions.defaults.device)

    def _pass(self, view: View, rows: int, device: torch.device) -> Pass:
        plan, names = view.plan, view.acting
        older = None if plan is self.plan else plan.whole
        values = tuple(view.strengths[name] for name in names)
        if compat.is_capturing() and older is None and plan.strengths == view.strengths:
            # A graph that is captured sees what `set_erasures` writes later.
            live = self.conditions.defaults.to(device)[None]
            return Pass(plan.names, plan.whole, live, None, live.expand(rows, -1))
        every = tuple(view.strengths[name] for name in plan.names)
        whole = self.tensors.of(every, rows, device)
        numbers = tuple(value for value in values if not isinstance(value, tuple))
        if len(numbers) == len(values):
            strengths, known = self.tensors.of(values, 1, device), numbers
        else:
            strengths, known = self.tensors.of(values, rows, device), None
        by_row = None if known is not None else tuple(zip(*_columns(values, rows), strict=True))
        kept = self.conditions.here.kept_of(plan) if requests.within_request(self.component) else None
        return Pass(names, plan.of(names), strengths, known, whole, older, kept, by_row)

    def _apply(self, fn: Any, recurse: bool = True) -> "ErasureModules":
        super()._apply(fn, recurse)
        self._hold_defaults(self.conditions.defaults.device)  # a cast has rounded them
        self.plan.forget()
        return self


def states(pipe: Any) -> dict[str, ErasureModules]:
    """What is attached to each component of a pipeline that has anything attached."""
    found = {name: state_of(module) for name, module in requests.components(pipe).items()}
    return {name: state for name, state in found.items() if state is not None}


class StrengthTensors:
    """Strengths as tensors, one object for the same strengths: by it is known again what was computed with them."""

    MOST = 64

    def __init__(self) -> None:
        self.known: dict[Any, torch.Tensor] = {}

    def __reduce__(self) -> tuple[type["StrengthTensors"], tuple[()]]:
        return StrengthTensors, ()

    def of(self, strengths: Sequence[Strength], rows: int, device: torch.device) -> torch.Tensor:
        """Strengths as float32 [rows, erasures].

        Raises:
            ErasureInputError: they are given by picture, and the rows are those of other pictures.
        """
        key = tuple(strengths), rows, device
        found = self.known.get(key)
        if found is None:
            columns = _columns(strengths, rows)
            with torch.inference_mode(False):
                found = (
                    torch.tensor(columns, dtype=torch.float32).reshape(len(columns), rows).T.contiguous().to(device)
                )
            for old in list(self.known)[: -self.MOST]:
                self.known.pop(old, None)
            self.known[key] = found
        return found


def _columns(strengths: Sequence[Strength], rows: int) -> list[list[float]]:
    """Of each erasure its strengths by row."""
    return [_by_row(value, rows) if isinstance(value, tuple) else [value] * rows for value in strengths]


def _by_row(pictures: tuple[float, ...], rows: int) -> list[float]:
    """Strengths by picture as strengths by row: a denoiser's batch holds the pictures once, or again for guidance."""
    if rows % len(pictures) == 0:
        return list(pictures) * (rows // len(pictures))
    group = len(pictures) // rows  # prompts, from each of which several pictures are made
    if rows * group == len(pictures):
        groups = [set(pictures[start : start + group]) for start in range(0, len(pictures), group)]
        if all(len(each) == 1 for each in groups):
            return [each.pop() for each in groups]
        raise ErasureInputError(
            f"Strengths are given for each of {len(pictures)} pictures, {group} of which are made from one prompt, and an erasure "
            "acts on the text encoder, which encodes the prompt once for all of them. Give these the same strength."
        )
    raise ErasureInputError(
        f"Strengths are given for {len(pictures)} pictures, but the batch has {rows} rows. Give one strength for each picture of "
        "the batch (prompts times `num_images_per_prompt`), or one number for all."
    )


class Requests:
    """The requests that began with what is on a component, as long as they last. A copy has none."""

    def __init__(self) -> None:
        self.present: dict[int, requests.Request] = {}

    def __reduce__(self) -> tuple[type["Requests"], tuple[()]]:
        return Requests, ()

    def add(self, request: requests.Request) -> None:
        """One begins."""
        self.present[id(request)] = request

    def end(self, request: requests.Request) -> None:
        """One is over."""
        self.present.pop(id(request), None)

    def all(self) -> list[requests.Request]:
        """Those that are under way."""
        return list(self.present.values())

    def keep_older(self, component: nn.Module, plan: Plan) -> bool:
        """Whether any has begun with something else than is there now."""
        return any(each.plan_of(component, plan) is not plan for each in self.all())


class Guard:
    """Forward pre-hook of a component: a pass begins. It refuses those that would train through an erasure, or around it."""

    def __init__(self, state: ErasureModules) -> None:
        self.state = state

    @compat.untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        if torch.compiler.is_compiling():  # within a larger graph
            off, training = state.conditions.trace(args, kwargs)
        else:
            state.turnstile.enter(requests.frames())
            try:
                view, now = state.begin(args, kwargs)
            except BaseException:
                state.turnstile.leave()
                raise
            state.conditions.here.now = now
            off, training = view.disabled, view.training
        if off:
            return
        reason = state.firing.before()
        if reason is not None:
            raise ErasureInactiveError(reason)
        for layer in state.live():
            reason = layer.inactive_reason() or layer.scaled_away(kwargs)
            if reason is not None:
                raise ErasureInactiveError(reason)
        if torch.is_grad_enabled() and not training:
            if trains(module, args, kwargs):
                raise ErasureTrainingError(_TRAINING.format(kind=type(module).__name__, names=list(state.loaded)))


class GuardAfter:
    """Forward hook of a component, called after errors too: the pass is over. It refuses one in which something did not act."""

    def __init__(self, state: ErasureModules) -> None:
        self.state = state

    @compat.untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reason = self.state.firing.after()
        if not torch.compiler.is_compiling():
            self.state.conditions.here.now = None
            self.state.turnstile.leave()
        if reason is not None:
            raise ErasureInactiveError(reason)


_TRAINING = (
    "A forward pass of {kind} with gradients, and with trainable parameters or text rows, while the erasures {names} are on. A LoRA that is "
    "trained against a live erasure learns to undo it. To train on the clean base model use "
    "`with pipe.erasures_disabled():`; to only run the model use `torch.no_grad()` or `requires_grad_(False)`; to train "
    "through the erasure on purpose use `with diffusers_erasure.training_through_erasures(pipe):`."
)


def state_of(component: Any) -> ErasureModules | None:
    """Return what is attached to a component, `None` where nothing is."""
    if not isinstance(component, nn.Module):
        return None
    state = compat.child(compat.unwrap_compiled(component), CHILD)
    return state if isinstance(state, ErasureModules) else None
