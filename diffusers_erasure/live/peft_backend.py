"""`backend="peft"`: an erasure as an ordinary LoRA adapter of the pipeline, and what keeps it from being switched off.

One [`PeftAdapters`] a component stands among the component's layers, so that strengths, `erasures_disabled` and
unloading reach the adapters as they reach hooks, and so that the guard asks it before each forward pass.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .. import compat
from ..artifact import Erasure
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..layers import LiveLayer, Watched, layer_kind
from ..layers.sites import find_module
from ..logging import get_logger
from ..low_rank import DOWN, UP, Factors, pad_rank
from ..schema import LayerSpec
from ..stock_lora import stock_factors
from . import attachment
from .adapter_contents import AdapterContents
from .fusing import refuse_while_disabled
from .loaded import states
from .state import Loaded, state_of


logger = get_logger(__name__)

PeftGuard = Literal["reactivate", "error"]
ROUNDING = 1e-6  # of a scale, which peft multiplies by alpha and divides by the rank
PLACE = "peft adapters"  # among the component's live layers; no layer kind has such a name


@dataclass
class _Adapter:
    """One erasure's adapter on one component."""

    contents: AdapterContents
    policy: PeftGuard
    warned: set[str] = field(default_factory=set)


class PeftAdapters(LiveLayer):
    """The adapters by which erasures act on one component, by name."""

    def __init__(self, component: nn.Module) -> None:
        super().__init__()
        self.components = (component,)  # a tuple, because a module assigned to a module would become its child
        self.adapters: dict[str, _Adapter] = {}
        self.strengths: dict[str, float] = {}
        self.broken: dict[str, str] = {}  # what was found of their tensors, in words
        self.disabled: dict[str, list[str]] = {}  # what was active where all was disabled and an erasure came on again
        compat.call_after_hotswaps(look_again)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        compat.call_after_hotswaps(look_again)

    def layers(self, name: str) -> dict[str, Any]:
        """peft's layers that hold an adapter now, by path."""
        return compat.layers_with_adapter(self.components[0], name)

    def add(self, name: str, factors: Mapping[str, Factors], policy: PeftGuard) -> None:
        """Take an adapter over that peft has put into the component.

        Args:
            name (`str`): its name, and the erasure's.
            factors (`dict`): A and B of each site.
            policy (`"reactivate"` or `"error"`): what the guard does.
        """
        plain = {site.removeprefix("text_model."): pair for site, pair in factors.items()}
        paths = {path: plain[path.removeprefix("text_model.")] for path in self.layers(name)}
        self.adapters[name] = _Adapter(AdapterContents(paths), policy)

    def detach(self, name: str) -> None:
        if self.adapters.pop(name, None) is not None:
            self.strengths.pop(name, None)
            self.broken.pop(name, None)
            layers, before = self.layers(name), compat.adapter_states(self.components[0])
            compat.delete_adapter(self.components[0], name)
            compat.restore_adapter_states(self._without(name, layers, before))

    def _without(
        self, name: str, layers: Mapping[str, Any], before: Mapping[Any, tuple[list[str], bool]]
    ) -> dict[Any, tuple[list[str], bool]]:
        """What is to be active in layers that had an adapter; by itself peft makes any other one active that it finds.

        What a user had disabled is disabled again, unless the other layers tell that it was enabled since.
        """
        here = {path: (layer, [each for each in before[layer][0] if each != name]) for path, layer in layers.items()}
        elsewhere = [off for layer, (_, off) in before.items() if layer not in layers.values()]
        found = {}
        for path, (layer, active) in here.items():
            if active or path not in self.disabled:
                found[layer] = active, before[layer][1]
            else:
                found[layer] = [each for each in self.disabled.pop(path) if each in layer.lora_A], all(elsewhere)
        return found

    def fold(self, strengths: Mapping[str, float]) -> None:
        self.strengths = {name: strengths.get(name, 0.0) for name in self.adapters}
        for name in self.strengths:
            self._switch_on(name, self.layers(name))

    def _switch_on(self, name: str, layers: Mapping[str, Any]) -> None:
        for path, layer in layers.items():
            if layer.disable_adapters:
                self.disabled[path] = [each for each in layer.active_adapters if each not in self.adapters]
            compat.switch_adapter_on(layer, name, self.strengths[name], list(self.adapters), rescale=True)

    def is_empty(self) -> bool:
        return not self.adapters

    def watched(self) -> Iterator[Watched]:
        for name in self.adapters:
            for path, layer in self.layers(name).items():
                yield Watched(path, compat.base_layer(layer), frozenset({name}))

    def strength(self, name: str) -> float | None:
        """The weight that `set_adapters` gave an adapter, the least of its layers.

        `None` where none counts: the erasure is at strength 0, or a lower weight is 0 or not one for all, which the guard undoes.
        """
        own = self.strengths.get(name)
        scales = [compat.adapter_scale(layer, name) for layer in self.layers(name).values()] if own else []
        if not own or not scales or (min(scales) < own * (1 - ROUNDING) and not _are_one(scales)):
            return None
        return min(scales)

    def inactive_reason(self) -> str | None:
        for name, adapter in self.adapters.items():
            if not self.strengths[name]:
                continue
            layers = self.layers(name)
            if not adapter.contents.factors.keys() <= layers.keys():
                return (
                    f"The LoRA adapter {name!r} of an erasure is gone from {type(self.components[0]).__name__}, with "
                    f"`unload_lora_weights()` or `delete_adapters`. Call `pipe.unload_erasure({name!r})` and load it again; "
                    'the default backend ("hook") stays on whatever is done with LoRAs.'
                )
            # Traced into a larger graph this reads no contents, only what `look_again` found when they were swapped.
            if not torch.compiler.is_compiling() and not adapter.contents.looked_at_lately(layers, name):
                self.look_at_contents(name)
                layers = self.layers(name)
            reason = self.broken.get(name) or self._switched_off(name, layers)
            if reason is not None:
                return reason
        return None

    def look_at_contents(self, name: str) -> None:
        """Compare the tensors of an adapter with the erasure's, and restore them where that is the policy.

        Where they are merged into the weights, what unmerging is going to subtract is restored whatever the policy.
        """
        adapter, layers = self.adapters[name], self.layers(name)
        merged = any(compat.is_merged(layer, name) for layer in layers.values())
        if merged and name in self.broken:
            return  # found before, and what was merged is not known to be the erasure
        self.broken.pop(name, None)
        changed = adapter.contents.changed(layers, name)
        if not changed:
            return
        component = self.components[0]
        away = compat.is_group_offloaded(component) or any(each.is_meta for each in component.parameters())
        if adapter.policy == "error" or away:  # what offloading keeps elsewhere cannot be written here
            self.broken[name] = (
                f"The LoRA adapter {name!r} of an erasure holds other tensors than the erasure ({changed[0]!r} and "
                f"{len(changed) - 1} more of {len(layers)} modules): another LoRA was swapped into it or into one of a like "
                "name (peft's hotswap zeroes those), it was loaded anew, or trained. Call "
                + ("`pipe.unfuse_lora()`, then " if merged else "")
                + f"`pipe.unload_erasure({name!r})` and load it again."
            )
            if merged and not away:
                adapter.contents.restore(layers, name, self.strengths[name])
            return
        adapter.contents.restore(layers, name, self.strengths[name])
        self._warn(
            name,
            "restored",
            "The LoRA adapter %r of an erasure held other tensors than the erasure; they are restored, now and whenever "
            "that happens. Another LoRA was swapped into it or into one of a like name, it was loaded anew, or trained.",
        )

    def _switched_off(self, name: str, layers: Mapping[str, Any]) -> str | None:
        """Why an adapter with the right tensors would act less than its strength says; it is switched on where it may be."""
        strength, policy = self.strengths[name], self.adapters[name].policy
        off = {path: layer for path, layer in layers.items() if not compat.adapter_acts(layer, name)}
        if not torch.compiler.is_compiling() and not off:
            scales = {each: compat.adapter_scale(layer, name) for each, layer in layers.items()}
            least = strength * (1 - ROUNDING)
            # One positive weight for all is what `set_adapters` gives by name; for some layers it is nobody's word.
            if policy == "reactivate" and min(scales.values()) < least and _are_one(scales.values()):
                self._warn(
                    name,
                    f"at {min(scales.values()):.3g}",
                    "The LoRA adapter %r of an erasure acts at the weight that `set_adapters` gave it, below the strength at "
                    "which it was loaded; `list_erasures` tells it, and `set_erasures` sets it.",
                )
            else:
                off = {each: layers[each] for each, scale in scales.items() if scale < least}
        if off and policy == "error":
            return (
                f"The LoRA adapter {name!r} of an erasure was switched off, or weakened, by another call (`set_adapters`, "
                '`disable_lora`, loading another LoRA, `cross_attention_kwargs={"scale": …}`). '
                f"Name it too: `pipe.set_adapters([..., {name!r}])`; set its strength with `pipe.set_erasures`; or unload "
                f"the erasure: `pipe.unload_erasure({name!r})`."
            )
        if off:
            self._warn(
                name,
                "on",
                "The LoRA adapter %r of an erasure was switched off by another call; it is switched on again, now and "
                "whenever that happens. `unload_erasure` takes it off.",
            )
        merged = any(compat.is_merged(layer, name) for layer in off.values())
        if not merged:
            self._switch_on(name, off)
        if merged or not all(compat.adapter_acts(layer, name) for layer in off.values()):
            return (
                f"`fuse_lora` has merged other LoRAs where the adapter {name!r} of an erasure acts, or merged it at another "
                "scale, and peft leaves out what is not merged there. Call `pipe.unfuse_lora()`, or fuse all of them."
            )
        return None

    def _warn(self, name: str, once: str, message: str) -> None:
        if once not in self.adapters[name].warned:
            self.adapters[name].warned.add(once)
            logger.warning(message, name)

    def scaled_away(self, kwargs: Mapping[str, Any]) -> str | None:
        for argument in ("cross_attention_kwargs", "joint_attention_kwargs"):
            scale = (kwargs.get(argument) or {}).get("scale", 1.0)
            if scale != 1.0:
                return (
                    f'`{argument}={{"scale": {scale}}}` scales every LoRA adapter, also those of the erasures '
                    f"{list(self.adapters)}. Scale your LoRAs with `pipe.set_adapters`, or load the erasure with the "
                    'default `backend="hook"`.'
                )
        return None

    def fixed_reason(self) -> str | None:
        merged = [
            name
            for name in self.adapters
            if any(compat.is_merged(layer, name) for layer in self.layers(name).values())
        ]
        if not merged:
            return None
        return (
            f"`fuse_lora` has merged the adapters {merged} of erasures into the weights. Call `pipe.unfuse_lora()` first; "
            "nothing was changed."
        )


def look_again(model: nn.Module) -> None:
    """Compare the tensors of all adapters of erasures on a model: peft has written into some adapter there."""
    state = state_of(model)
    live = state.layers[PLACE] if state is not None and PLACE in state.layers else None
    if isinstance(live, PeftAdapters):
        for name in live.adapters:
            live.look_at_contents(name)


def present_strength(pipe: Any, item: Loaded) -> float:
    """The strength at which an erasure acts: that of the erasure, or the weight that `set_adapters` gave its adapter."""
    if item.backend != "peft":
        return item.strength
    places = [state.layers[PLACE] for state in states(pipe).values() if PLACE in state.layers]
    found = [each.strength(item.name) for each in places if isinstance(each, PeftAdapters)]
    return min((each for each in found if each is not None), default=item.strength)


def _are_one(scales: Collection[float]) -> bool:
    return 0 < max(scales) * (1 - ROUNDING) <= min(scales)


def check(pipe: Any, erasure: Erasure, name: str, components: Mapping[str, nn.Module]) -> None:
    """Refuse what cannot be an adapter of the pipeline.

    Raises:
        ErasureInputError: not all of the erasure is a LoRA, or has one that is the same edit, or peft has an adapter of that
            name.
        ErasureCompatibilityError: the pipeline loads no LoRAs, or not on these components, or transformers refuses adapters
            beside the installed peft.
    """
    found = _loras(erasure)
    modified = any(layer.is_modified for layer in erasure.config.layers)
    if found is None or modified:
        kinds = sorted({layer.kind for layer in erasure.config.layers} - {"lora"})
        what = (
            "a schedule or a gate"
            if found is not None
            else f"layers of the kinds {kinds}, without a LoRA that equals them"
        )
        raise ErasureInputError(
            f'`backend="peft"` takes erasures that are LoRAs, or carry one that is the same edit; this one has {what}. Use the '
            'default `backend="hook"`.'
        )
    refuse_while_disabled(pipe)
    loadable = compat.lora_components(pipe)
    strange = sorted(found.keys() - set(loadable))
    if strange:
        raise ErasureCompatibilityError(f'{type(pipe).__name__} loads no LoRAs on {strange}; use `backend="hook"`.')
    refused = compat.refused_adapter_versions()
    if refused and any(component.startswith("text_encoder") for component in found):
        raise ErasureCompatibilityError(
            f"{refused}, so transformers refuses adapters on its text encoders, yours and this one. Install another pair of "
            'versions, or use the default `backend="hook"`, which needs no peft.'
        )
    for component in components.values():
        if compat.layers_with_adapter(component, name):
            raise ErasureInputError(f"A LoRA adapter {name!r} is loaded already; give another `adapter_name`.")
        if compat.is_compiled(component):
            raise ErasureCompatibilityError('`backend="peft"` cannot be loaded into a compiled model; load it before.')
    for layer in erasure.config.layers:
        layer_kind(layer.kind).check(components[layer.component], layer, erasure.layer_tensors(layer))
    kind = layer_kind("lora")
    for each, factors in found.items():
        tensors = {site + half: pair[i] for site, pair in factors.items() for i, half in enumerate((DOWN, UP))}
        spec = LayerSpec(kind.name, each, tuple(factors), kind.file, kind.prefix(each, tuple(factors)))
        kind.check(components[each], spec, tensors)
        small = [site for site in factors if _is_float8(find_module(components[each], site))]
        if small:
            raise ErasureCompatibilityError(
                f"The weights of {small[:3]} are stored as float8, and so would the adapter's be, in which peft does not compute. "
                'Load the erasure before `enable_layerwise_casting`, or use the default `backend="hook"`.'
            )


def _is_float8(module: nn.Module) -> bool:
    weight = compat.own_parameter(module, "weight")
    return weight is not None and weight.dtype.is_floating_point and weight.dtype.itemsize == 1


def load(pipe: Any, item: Loaded, components: Mapping[str, nn.Module], guarded: str, policy: PeftGuard) -> None:
    """Load an erasure as an adapter; others stay active or inactive as they were.

    Args:
        pipe: the pipeline, checked with [`check`].
        item ([`Loaded`]): the erasure.
        components (`dict`): the pipeline's components by name.
        guarded (`str`): the denoiser, which gets the guard even where no layer acts on it.
        policy (`"reactivate"` or `"error"`): what the guard does.
    """
    parts = _loras(item.erasure)
    assert parts is not None
    names = parts.keys()
    before = {name: compat.adapter_states(component) for name, component in components.items()}
    try:
        try:
            pipe.load_lora_weights(_state_dict(parts), adapter_name=item.name)
        except Exception as error:
            raise ErasureCompatibilityError(
                f"diffusers could not load the erasure as a LoRA adapter; nothing was kept. It said: {error} "
                'Use the default `backend="hook"`.'
            ) from error
        for name in components:
            compat.restore_adapter_states(before[name])
        for name in names:
            wanted, found = len(parts[name]), len(compat.layers_with_adapter(components[name], item.name))
            if found != wanted:
                raise ErasureCompatibilityError(
                    f"diffusers loaded the LoRA on {found} of {wanted} modules of {name!r}; nothing was kept. Use the "
                    'default `backend="hook"`.'
                )
        for name in sorted({*names, guarded}):
            state = attachment.ensure_state(components[name])
            state.add(item)
            if name in names:
                live = state.layers[PLACE] if PLACE in state.layers else PeftAdapters(components[name])
                assert isinstance(live, PeftAdapters)
                if PLACE not in state.layers:
                    compat.add_child(state.layers, PLACE, live)
                live.add(item.name, parts[name], policy)
                state.marks.add(item.name, item.content_hash)  # peft's own keys are marks enough
                attachment.watch(components[name])
            state.replan()
    except BaseException:
        attachment.detach(components.values(), item.name)
        for name, component in components.items():
            compat.delete_adapter(component, item.name)
            compat.restore_adapter_states(before[name])
        raise


def _loras(erasure: Erasure) -> dict[str, dict[str, Factors]] | None:
    """A and B by component and site: of the layers, or where some are no LoRA of the one that the erasure carries for them.

    `None` where there is none, or one that is another edit.
    """
    stock = erasure.config.stock
    if stock is not None and stock.is_exact and erasure.lora_for_others():
        return stock_factors(erasure)
    found: dict[str, dict[str, Factors]] = {}
    for layer in erasure.config.layers:
        factors = layer_kind(layer.kind).lora(layer, erasure.layer_tensors(layer))
        if factors is None:
            return None
        found.setdefault(layer.component, {}).update(factors)
    return found


def _state_dict(parts: Mapping[str, Mapping[str, Factors]]) -> dict[str, torch.Tensor]:
    """The factors under stock names, with one rank for all modules: alpha is the rank then, and the scale 1."""
    rank = max(len(down) for factors in parts.values() for down, _ in factors.values())
    result = {}
    for component, factors in parts.items():
        for site, (down, up) in factors.items():
            name = site if component in ("unet", "transformer") else f"text_model.{site.removeprefix('text_model.')}"
            key = f"{component}.{name}"
            result[key + DOWN], result[key + UP] = pad_rank(down, rank, 0), pad_rank(up, rank, 1)
    return result
