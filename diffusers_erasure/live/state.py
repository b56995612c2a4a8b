"""What is attached to one component, and what it knows of passes: a child module `erasure_modules` with layers and guard."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import compat
from ..artifact import Erasure
from ..errors import ErasureInactiveError, ErasureInputError, ErasureTrainingError
from ..families import denoiser_family
from ..layers import LiveLayer
from ..layers.buffers import PartKey, live_buffer, set_buffer
from ..layers.modifiers import Conditions, rows_of
from ..layers.passing import Pass
from ..originals import Kept
from . import requests, turnstile
from .firing import FiringCheck
from .marks import Marks
from .plans import Plan, Strength, View
from .training_rule import tensors_in, trains
from .wrapping import wrap_pipelines


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
        self.conditions.asked = self.asked
        family = denoiser_family(component)
        self.conditions.joined = family is not None and family.joined
        self.timed: set[PartKey] = set()  # what is attached and asks for the timestep
        self.loaded: dict[str, Loaded] = {}
        self.plan = Plan({}, ())
        self.tensors = StrengthTensors()
        self.firing = FiringCheck(self)
        self.guards: list[torch.utils.hooks.RemovableHandle] = []
        self.fused: dict[str, Kept] = {}
        self.merged: list[str] = []  # names of the erasures that are fused, and so have no layers here
        self.marks = Marks(self.acting_here)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.conditions.beside, self.conditions.asked = self.beside, self.asked
        self._hold(self.plan.whole)
        self._hold_defaults(self.conditions.defaults.device)
        compat.watch_hooks()  # of a pickle, in a process that has loaded no erasure
        wrap_pipelines()

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

    @property
    def turnstile(self) -> turnstile.Turnstile:
        """Of the component."""
        return turnstile.of(self.component)

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

    def acting_here(self) -> tuple[str, ...]:
        """The erasures that would act in a pass that began here and now."""
        return requests.view(self.component, self, strict=False).acting

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
        for request in requests.under_way(self.component) if weights_changed else ():
            request.plans[id(self.component)] = plan
        device = next((parameter.device for parameter in self.component.parameters()), torch.device("cpu"))
        self._hold_defaults(torch.device("cpu") if device.type == "meta" else device)
        self._changed()

    def _hold_defaults(self, device: torch.device) -> None:
        """The strengths that are set, as a live tensor for captured graphs."""
        defaults = torch.tensor(list(self.plan.strengths.values()), dtype=torch.float32)
        live_buffer(self.conditions, "defaults", defaults, device, torch.float32)

    def _hold(self, whole: Mapping[int, Any]) -> None:
        """Make what all that is loaded does the component's own, and what graphs read."""
        self.edits = nn.ModuleDict(
            {str(number): edit for number, edit in whole.items() if isinstance(edit, nn.Module)}
        )
        for layer in self.live():
            for place in layer.places():
                place.whole = whole.get(place.number)

    def keeps_older(self) -> bool:
        """Whether any request that is under way has begun with something else than is there now."""
        return any(
            each.plan_of(self.component, self.plan) is not self.plan for each in requests.under_way(self.component)
        )

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
        strengths = requests.view(self.component, self, strict=False).strengths
        for layer in self.live():
            layer.fold({name: value for name, value in strengths.items() if not isinstance(value, tuple)})

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[View, Pass]:
        """A pass of the component with these arguments."""
        view = self.view()
        now = self._pass(view, *rows_of(args, kwargs))
        self.conditions.read(now, args, kwargs)
        now.first = compat.next_node_number()
        return view, now

    def end(self, output: Any) -> None:
        """The pass is over that the calling thread has begun."""
        here = self.conditions.here
        now, here.now = here.now, None
        given = [each for each in tensors_in(output) if each.requires_grad] if torch.is_grad_enabled() else []
        if now is not None and given:
            now.nodes = range(now.first, compat.next_node_number())
            self.conditions.returning.add(now)
            for each in given:  # by these it lives as long as what autograd holds
                compat.on_way_back(each, lambda gradient: here.turn(now))

    def beside(self) -> Pass:
        """The pass for a module that is called outside of one; on the way back, where blocks are recomputed, that which was.

        Raises:
            ErasureTrainingError: it is not known which one it was.
        """
        if compat.graph_task() == -1:
            return self._pass(self.view(), 1, self.conditions.defaults.device)
        here, number = self.conditions.here, compat.node_number()
        for known in (here.ways if here.task == compat.graph_task() else (), list(self.conditions.returning)):
            found = [each for each in known if number in each.nodes]
            if len(found) == 1:
                return found[0]
            if found:
                break
        raise ErasureTrainingError(_RECOMPUTED.format(kind=type(self.component).__name__))

    def asked(self, rows: int, device: torch.device, whole: bool, reason: str, trains: bool) -> torch.Tensor:
        """The strengths for a graph that has no pass, see [`graphs.strengths`]."""
        if not whole:
            found = self.beside()
            if len(found.whole) > 1 and not found.uniform:
                raise ErasureInputError(
                    "A compiled part of a component is called outside of a pass, with strengths by picture. Give one for all."
                )
            older, strengths = found.older, found.whole[:1]
        else:
            view = self.view()
            found = self._pass(view, rows, device)
            self.check(view, reason, trains)
            older, strengths = found.older, found.whole
        if older is not None:
            raise ErasureInactiveError(
                "A compiled graph acts by what is loaded now, and the request began before that was changed. Request again."
            )
        if compat.is_capturing() and not compat.not_in_cuda_graphs():
            raise ErasureInactiveError(
                "A CUDA graph of a larger graph would keep the strengths of its first run. Compile the component by itself, "
                "another `mode`, or install torch 2.8."
            )
        return strengths.to(device)

    def check(self, view: View, reason: str | None, trains: bool) -> None:
        """Refuse a pass in which an erasure would not act, or in which weights would be trained through or around one.

        Raises:
            ErasureInactiveError, ErasureTrainingError: it is so.
        """
        if view.disabled:
            return
        if reason:
            raise ErasureInactiveError(reason)
        if trains and not view.training:
            raise ErasureTrainingError(_TRAINING.format(kind=type(self.component).__name__, names=list(self.loaded)))

    def _pass(self, view: View, rows: int, device: torch.device) -> Pass:
        plan, names = view.plan, view.acting
        older = None if plan is self.plan else plan.whole
        values = tuple(view.strengths[name] for name in names)
        every = tuple(view.strengths[name] for name in plan.names)
        if compat.is_capturing():
            if older is None and plan.strengths == view.strengths:
                # A graph that is captured sees what `set_erasures` writes later.
                held = self.conditions.defaults.to(device)[None]
            else:
                held = captured(every, rows, device)
            edits = {} if view.disabled else plan.whole
            return Pass(plan.names if edits else (), edits, held, None, held.expand(rows, -1), older)
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


def captured(strengths: Sequence[Strength], rows: int, device: torch.device) -> torch.Tensor:
    """The same while a CUDA graph is captured: without a copy from the host, and held by that graph alone."""
    columns = _columns(strengths, rows)
    single = [[torch.full((), value, device=device) for value in column] for column in columns]
    return (
        torch.stack([torch.stack(column) for column in single], 1) if single else torch.zeros(rows, 0, device=device)
    )


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


class Guard:
    """Forward pre-hook of a component: a pass begins. It refuses those that would train through an erasure, or around it."""

    def __init__(self, state: ErasureModules) -> None:
        self.state = state

    @compat.untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        if torch.compiler.is_compiling():  # within a larger graph
            reason = self._reason(kwargs)
            state.conditions.trace(args, kwargs, reason, torch.is_grad_enabled() and trains(module, args, kwargs))
            return
        state.turnstile.enter(requests.frames())
        if (
            state_of(module) is not state
        ):  # what the pass waited for took the last erasure off, and the hook that ends a pass
            state.turnstile.leave()
            return
        try:
            view, now = state.begin(args, kwargs)
        except BaseException:
            state.turnstile.leave()
            raise
        state.conditions.here.now = now
        if not view.disabled:
            reason = state.firing.before() or self._reason(kwargs)
            training = torch.is_grad_enabled() and not view.training and not reason and trains(module, args, kwargs)
            state.check(view, reason, training)

    def _reason(self, kwargs: dict[str, Any]) -> str | None:
        """Why an erasure would not act in a pass."""
        for layer in self.state.live():
            reason = layer.inactive_reason() or layer.scaled_away(kwargs)
            if reason is not None:
                return reason
        return None


class GuardAfter:
    """Forward hook of a component, called after errors too: the pass is over. It refuses one in which something did not act."""

    def __init__(self, state: ErasureModules) -> None:
        self.state = state

    @compat.untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reason = self.state.firing.after()
        if torch.compiler.is_compiling():
            self.state.conditions.end_trace()
        else:
            reason = reason or self._missed(self.state.conditions.here.now, output)
            self.state.end(output)
            self.state.turnstile.leave()
        if reason is not None:
            raise ErasureInactiveError(reason)

    def _missed(self, now: Pass | None, output: Any) -> str | None:
        """Why something on the component itself did not act: torch lists hooks before a pass waits for a change."""
        if now is None or output is None or now.older is not None:
            return None
        for layer in self.state.live():
            for number in layer.entrances():
                if number in now.edits and number not in now.reached:
                    return (
                        f"Erasures were loaded on {type(self.state.component).__name__} in another thread while this pass began, and it "
                        "would have run without some of them. Run it again. Calls of a pipeline do not meet this."
                    )
        return None


_TRAINING = (
    "A forward pass of {kind} with gradients, and with trainable parameters or text rows, while the erasures {names} are on. A LoRA that is "
    "trained against a live erasure learns to undo it. To train on the clean base model use "
    "`with pipe.erasures_disabled():`; to only run the model use `torch.no_grad()` or `requires_grad_(False)`; to train "
    "through the erasure on purpose use `with diffusers_erasure.training_through_erasures(pipe):`."
)

_RECOMPUTED = (
    "A part of {kind} is recomputed on the way back (gradient checkpointing), and it is not known of which forward pass it is: "
    "its erasures might act otherwise than in that pass. Let gradients come through the pass's output, go forward in one thread "
    "before a common way back, or call `disable_gradient_checkpointing()`."
)


def state_of(component: Any) -> ErasureModules | None:
    """Return what is attached to a component, `None` where nothing is."""
    if not isinstance(component, nn.Module):
        return None
    state = compat.child(compat.unwrap_compiled(component), CHILD)
    return state if isinstance(state, ErasureModules) else None
