"""What is attached to one component: a child module `erasure_modules` that holds the layers and the guard."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import compat
from ..artifact import Erasure
from ..errors import ErasureInactiveError, ErasureTrainingError
from ..layers import HookLayer, LiveLayer, layer_kind
from ..layers.buffers import PartKey
from ..layers.gate import Gate
from ..layers.modifiers import Conditions, Modifier
from ..originals import Kept
from ..schema import LayerSpec
from . import saving
from .firing import FiringCheck
from .marks import Marks
from .training_rule import trains


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

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.conditions = Conditions()
        self.timed: set[PartKey] = set()  # what is attached and asks for the timestep
        self.loaded: dict[str, Loaded] = {}
        self.disabled = 0
        self.training_allowed = 0
        self.firing = FiringCheck(self)
        self.guards: list[torch.utils.hooks.RemovableHandle] = []
        self.fused: dict[str, Kept] = {}
        self.merged: list[str] = []  # names of the erasures that are fused, and so have no layers here
        self.marks = Marks()
        self.copies: list[ErasureModules] = []  # of denoisers built within the present blocks, which end for them too

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        compat.watch_hooks()  # of a pickle, in a process that has loaded no erasure

    def live(self) -> Iterator[LiveLayer]:
        """By what erasures act here."""
        for layer in self.layers.values():
            assert isinstance(layer, LiveLayer)
            yield layer

    def fold(self) -> None:
        """Write all strengths into the live buffers."""
        strengths = {name: 0.0 if self.disabled else item.strength for name, item in self.loaded.items()}
        for layer in self.live():
            layer.fold(strengths)
        self.marks.fold(strengths)


class Guard:
    """Forward pre-hook of a component: refuses passes that would train through an erasure, or around it."""

    def __init__(self, state: ErasureModules) -> None:
        self.state = state

    @compat.untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        if state.disabled:
            return
        reason = state.firing.before()
        if reason is not None:
            raise ErasureInactiveError(reason)
        for layer in state.live():
            reason = layer.inactive_reason() or layer.scaled_away(kwargs)
            if reason is not None:
                raise ErasureInactiveError(reason)
        if torch.is_grad_enabled() and not state.training_allowed:
            if trains(module, args, kwargs):
                raise ErasureTrainingError(_TRAINING.format(kind=type(module).__name__, names=list(state.loaded)))


class GuardAfter:
    """Forward hook of a component: refuses a pass in which something did not act."""

    def __init__(self, state: ErasureModules) -> None:
        self.state = state

    @compat.untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reason = self.state.firing.after()
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


def attach(components: Mapping[str, nn.Module], guarded: Iterable[str], item: Loaded) -> None:
    """Attach an erasure to its components, completely or not at all.

    Args:
        components (`dict`): every component on which the erasure acts or that is guarded, by name.
        guarded (iterable of `str`): components that get the guard even where no layer acts on them.
        item ([`Loaded`]): the erasure.
    """
    layers = list(enumerate(item.erasure.config.layers))
    tensors = [item.erasure.layer_tensors(layer) for _, layer in layers]
    for index, layer in layers:
        layer_kind(layer.kind).check(components[layer.component], layer, tensors[index])
    names = {layer.component for _, layer in layers} | set(guarded)
    beside = next((state for state in map(state_of, components.values()) if state is not None), None)
    try:
        for name in sorted(names):
            state = ensure_state(components[name], beside)
            state.loaded[item.name] = item
        attach_layers(components, item)
        for name in sorted(names):
            ensure_state(components[name]).fold()
    except BaseException:
        detach([components[name] for name in names], item.name)
        raise
    reset_compiled(components[name] for name in names)


def attach_layers(
    components: Mapping[str, nn.Module], item: Loaded, beside: Mapping[str, nn.Module] | None = None
) -> None:
    """Attach the layers of an erasure on those of `components` that it acts on, at strength 0 until `fold`.

    `beside` are all components of the pipeline, by default the same ones: a gate may listen to a text encoder.
    """
    encoder = (components if beside is None else beside).get("text_encoder")
    for index, layer in enumerate(item.erasure.config.layers):
        if layer.component not in components:
            continue
        state = ensure_state(components[layer.component])
        if layer.kind not in state.layers:
            state.layers[layer.kind] = layer_kind(layer.kind).live(state.conditions)
        live = state.layers[layer.kind]
        assert isinstance(live, HookLayer)
        key, modifier = (item.name, index), None
        if live.by_timestep or layer.is_modified:
            state.timed.add(key)
            state.conditions.watch(components[layer.component])
        if layer.is_modified:
            modifier = _modifier(state.conditions, key, layer, item.erasure, encoder)
        live.attach(components[layer.component], key, layer, item.erasure.layer_tensors(layer), modifier)
        state.marks.add(item.name, item.content_hash, live.altered(components[layer.component], layer))
    for name in {layer.component for layer in item.erasure.config.layers if layer.component in components}:
        watch(components[name])


def watch(component: nn.Module) -> None:
    """See from now on that what acts on a component is called."""
    state = state_of(component)
    assert state is not None
    state.firing.watch(component, [each for layer in state.live() for each in layer.watched()])


def _modifier(
    conditions: Conditions, key: PartKey, layer: LayerSpec, erasure: Erasure, encoder: nn.Module | None
) -> Modifier:
    """The schedule and gate of a layer; its gate joins the conditions."""
    tensors, schedule, gate = erasure.modifier_tensors(layer), layer.schedule, layer.gate
    if gate is not None:
        live = Gate(gate, tensors[gate.name])
        conditions.add_gate(key, live)
        if encoder is not None:
            live.listen(encoder)
    if schedule is None:
        return Modifier(key, gated=gate is not None)
    return Modifier(key, tensors[schedule.name].float(), schedule.span, gate is not None)


def detach_layers(component: nn.Module, name: str) -> None:
    """Detach the layers of one erasure from a component, on which it stays listed."""
    state = state_of(component)
    assert state is not None
    for layer in state.live():
        layer.detach(name)
    state.conditions.drop_gates(name)
    state.marks.drop(name)
    for kind in [kind for kind, layer in state.layers.items() if isinstance(layer, LiveLayer) and layer.is_empty()]:
        del state.layers[kind]
    state.timed = {key for key in state.timed if key[0] != name}
    if not state.timed:
        state.conditions.unwatch()
    watch(component)


def detach(components: Iterable[nn.Module], name: str) -> None:
    """Detach one erasure from its components; a component without erasures is left as it was before the first."""
    components = list(components)
    for component in components:
        state = state_of(component)
        if state is None or name not in state.loaded:
            continue
        detach_layers(component, name)
        del state.loaded[name]
        if state.loaded:
            state.fold()
            continue
        for handle in state.guards:
            handle.remove()
        saving.unguard(compat.unwrap_compiled(component))
        compat.remove_child(compat.unwrap_compiled(component), CHILD)
    reset_compiled(components)


def ensure_state(component: nn.Module, beside: ErasureModules | None = None) -> ErasureModules:
    """The state of a component, made where it has none: disabled as that of the other components is."""
    state = state_of(component)
    if state is None:
        component = compat.unwrap_compiled(component)
        compat.watch_hooks()
        state = ErasureModules()
        if beside is not None:
            state.disabled, state.training_allowed = beside.disabled, beside.training_allowed
        state.guards = [
            component.register_forward_pre_hook(Guard(state), prepend=True, with_kwargs=True),
            component.register_forward_hook(GuardAfter(state)),
        ]
        component.add_module(CHILD, state)
        saving.guard(component, state.marks.ledger)
    return state


def reset_compiled(components: Iterable[nn.Module]) -> None:
    """Forget compiled graphs where any of the components is compiled."""
    if any(compat.is_compiled(component) for component in components):
        compat.reset_compiled()


@contextmanager
def counted(states: Callable[[], Iterable[ErasureModules]], attribute: str) -> Iterator[None]:
    """Raise a counter (`disabled` or `training_allowed`) of states within a block, also past exceptions.

    At its end the states are asked for again: some may have come within the block, with the counter of the others.
    """
    held = list(states())
    ahead = _with_copies(held)
    try:
        while ahead:  # one by one, so that a failure here ends all of them, and only those that it has reached
            setattr(ahead[0], attribute, getattr(ahead[0], attribute) + 1)
            ahead.pop(0).fold()
        yield
    finally:
        over = [state for state in _with_copies([*held, *states()]) if state not in ahead]
        for state in over:
            setattr(state, attribute, max(0, getattr(state, attribute) - 1))
        for state in over:
            if not state.disabled and not state.training_allowed:
                state.copies.clear()
            state.fold()


def _with_copies(states: Iterable[ErasureModules]) -> list[ErasureModules]:
    """States, and those of the denoisers that were built from theirs within the blocks that they are in."""
    found: dict[ErasureModules, None] = {}
    for state in states:
        found.update(dict.fromkeys([state, *_with_copies(state.copies)]))
    return list(found)
