"""Attaching an erasure to the components of a pipeline, completely or not at all, and detaching it without a trace."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from .. import compat
from ..artifact import Erasure
from ..layers import HookLayer, LiveLayer, layer_kind
from ..layers.buffers import PartKey
from ..layers.modifiers import Conditions, Modifier
from ..layers.probe_gate import gate_of
from ..schema import LayerSpec
from . import requests, saving, turnstile
from .state import CHILD, ErasureModules, Guard, GuardAfter, Loaded, state_of, states
from .wrapping import wrap_pipelines


@contextmanager
def changing_alone(
    components: Iterable[nn.Module], block: requests.Block | None = None, *, weights: bool = False
) -> Iterator[None]:
    """Within the block no pass of other threads is under way on these components. They may get their first erasure there.

    Args:
        components (iterable of `nn.Module`): the components.
        block ([`Block`], *optional*): of which all passes may go through; by default only those of the calling thread may.
        weights (`bool`, *optional*): weights are changed, which is for no request that is under way.
    """
    bare = [compat.unwrap_compiled(component) for component in components]
    with turnstile.held(map(turnstile.of, bare), requests.frames(), block, weights=weights):
        yield


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
    names = sorted({layer.component for _, layer in layers} | set(guarded))
    with changing_alone(components[name] for name in names):
        try:
            for name in names:
                ensure_state(components[name]).add(item)
            attach_layers(components, item)
            changed = [ensure_state(components[name]) for name in names]
            for state, plan in [(state, state.planned()) for state in changed]:
                state.replan(plan)
        except BaseException:
            detach([components[name] for name in names], item.name)
            raise
        reset_compiled(components[name] for name in names)


def attach_layers(
    components: Mapping[str, nn.Module], item: Loaded, beside: Mapping[str, nn.Module] | None = None
) -> None:
    """Attach the layers of an erasure on those of `components` that it acts on; they act once `replan` has been called.

    `beside` are all components of the pipeline, by default the same ones: a gate may listen to a text encoder.
    """
    encoder = (components if beside is None else beside).get("text_encoder")
    for index, layer in enumerate(item.erasure.config.layers):
        if layer.component not in components:
            continue
        state = ensure_state(components[layer.component])
        if layer.kind not in state.layers:
            compat.add_child(state.layers, layer.kind, layer_kind(layer.kind).live(state.conditions))
        live = state.layers[layer.kind]
        assert isinstance(live, HookLayer)
        key, modifier = (item.name, index), None
        if live.by_timestep or layer.is_modified:
            state.timed.add(key)
            state.conditions.watch(components[layer.component])
        if layer.is_modified:
            modifier = modifier_of(state.conditions, key, layer, item.erasure, encoder)
        live.attach(components[layer.component], key, layer, item.erasure.layer_tensors(layer), modifier)
        state.marks.add(item.name, item.content_hash, live.altered(components[layer.component], layer))
    for name in {layer.component for layer in item.erasure.config.layers if layer.component in components}:
        watch(components[name])


def watch(component: nn.Module) -> None:
    """See from now on that what acts on a component is called."""
    state = state_of(component)
    assert state is not None
    state.firing.watch(component, [each for layer in state.live() for each in layer.watched()])


def modifier_of(
    conditions: Conditions, key: PartKey, layer: LayerSpec, erasure: Erasure, encoder: nn.Module | None
) -> Modifier:
    """The schedule and gate of a layer; its gate joins the conditions."""
    tensors, schedule, gate = erasure.modifier_tensors(layer), layer.schedule, layer.gate
    live = None
    if gate is not None:
        live = gate_of(gate, tensors[gate.name])
        conditions.add_gate(key, live)
        if encoder is not None:
            live.listen(encoder)
    if schedule is None:
        return Modifier(key, gate=live)
    return Modifier(key, tensors[schedule.name].float(), schedule.span, live)


def detach_layers(component: nn.Module, name: str) -> None:
    """Detach the layers of one erasure from a component, on which it stays listed."""
    state = state_of(component)
    assert state is not None
    for layer in state.live():
        layer.detach(name)
    state.marks.drop(name)
    state.timed = {key for key in state.timed if key[0] != name}
    watch(component)


def detach(components: Iterable[nn.Module], name: str) -> None:
    """Detach one erasure from its components; a component without erasures is left as it was before the first.

    Requests that began with it end with it: until then its hooks stay.
    """
    components = list(components)
    with changing_alone(components):
        for component in components:
            state = state_of(component)
            if state is not None and name in state.loaded:
                detach_layers(component, name)
                state.drop(name)
                state.replan()
                tidy(component)
        reset_compiled(components)


def tidy(component: nn.Module) -> None:
    """Remove the hooks of what is loaded no more, unless a request that began with it is under way."""
    state = state_of(component)
    if state is None or state.keeps_older():
        return
    for layer in state.live():
        layer.tidy()
    state.conditions.keep_gates(state.loaded)
    if not state.timed:
        state.conditions.unwatch()
    for kind in [kind for kind, layer in state.layers.items() if isinstance(layer, LiveLayer) and layer.is_empty()]:
        compat.remove_child(state.layers, kind)
    if state.loaded:
        return
    for handle in state.guards:
        handle.remove()
    state.firing.close()
    saving.unguard(compat.unwrap_compiled(component))
    compat.remove_child(compat.unwrap_compiled(component), CHILD)


def end_request(request: requests.Request) -> None:
    """A call of a pipeline is over: what was held for it alone goes."""
    requests.over(request)
    for component in request.modules:
        state = state_of(component)
        if state is None:
            continue
        state.conditions.here.end()
        state.turnstile.leave()  # of a pass that broke off
        if request.plan_of(component, state.plan) is not state.plan and not state.keeps_older():
            with changing_alone([component]):
                tidy(component)


def guard_requests() -> None:
    """Make every call of a pipeline a request, of all classes of pipelines; done twice it does nothing."""
    wrap_pipelines(("__call__",), requests.wrapped(states, end_request))


def ensure_state(component: nn.Module) -> ErasureModules:
    """The state of a component, made where it has none."""
    state = state_of(component)
    if state is None:
        component = compat.unwrap_compiled(component)
        compat.watch_hooks()
        guard_requests()
        state = ErasureModules(component)
        state.guards = [
            component.register_forward_pre_hook(Guard(state), prepend=True, with_kwargs=True),
            component.register_forward_hook(GuardAfter(state), always_call=True),
        ]
        compat.add_child(component, CHILD, state)
        saving.guard(component, state.marks.ledger)
    return state


def reset_compiled(components: Iterable[nn.Module]) -> None:
    """Forget compiled graphs where any of the components is compiled."""
    if any(compat.is_compiled(component) for component in components):
        compat.reset_compiled()
