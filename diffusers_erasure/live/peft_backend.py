"""`backend="peft"`: an erasure as an ordinary LoRA adapter of the pipeline, and what keeps it from being switched off.

One [`PeftAdapters`] a component stands among the component's layers, so that strengths, `erasures_disabled` and
unloading reach the adapters as they reach hooks, and so that the guard asks it before each forward pass.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from .. import compat
from ..artifact import Erasure
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..layers import LiveLayer, layer_kind
from ..logging import get_logger
from ..low_rank import DOWN, UP, Factors, pad_rank
from ..schema import LayerSpec
from . import attachment
from .attachment import Loaded


logger = get_logger(__name__)

PeftGuard = Literal["reactivate", "error"]
PLACE = "peft adapters"  # among the component's live layers; no layer kind has such a name


class PeftAdapters(LiveLayer):
    """The adapters by which erasures act on one component, by name: how many layers each has, and its policy."""

    def __init__(self, component: nn.Module) -> None:
        super().__init__()
        self.components = (component,)  # a tuple, because a module assigned to a module would become its child
        self.adapters: dict[str, tuple[int, PeftGuard]] = {}
        self.strengths: dict[str, float] = {}
        self.warned: set[str] = set()

    def add(self, name: str, policy: PeftGuard) -> None:
        """Take an adapter over that peft has put into the component."""
        self.adapters[name] = (len(compat.layers_with_adapter(self.components[0], name)), policy)

    def detach(self, name: str) -> None:
        if self.adapters.pop(name, None) is not None:
            self.strengths.pop(name, None)
            compat.delete_adapter(self.components[0], name)

    def fold(self, strengths: Mapping[str, float]) -> None:
        self.strengths = {name: strengths[name] for name in self.adapters}
        for name, strength in self.strengths.items():
            for layer in compat.layers_with_adapter(self.components[0], name):
                compat.switch_adapter_on(layer, name, strength, list(self.adapters), rescale=True)

    def is_empty(self) -> bool:
        return not self.adapters

    def inactive_reason(self) -> str | None:
        for name, (count, policy) in self.adapters.items():
            layers = compat.layers_with_adapter(self.components[0], name)
            if len(layers) < count:
                return (
                    f"The LoRA adapter {name!r} of an erasure is gone from {type(self.components[0]).__name__}, with "
                    f"`unload_lora_weights()` or `delete_adapters`. Call `pipe.unload_erasure({name!r})` and load it again; "
                    'the default backend ("hook") stays on whatever is done with LoRAs.'
                )
            strength = self.strengths[name]
            off = [layer for layer in layers if strength and not compat.adapter_acts(layer, name)]
            if off and policy == "error":
                return (
                    f"The LoRA adapter {name!r} of an erasure was switched off by another call (`set_adapters`, "
                    f"`disable_lora`, loading another LoRA). Name it too: `pipe.set_adapters([..., {name!r}])`; or unload "
                    f"the erasure: `pipe.unload_erasure({name!r})`."
                )
            if off and name not in self.warned:
                logger.warning(
                    "The LoRA adapter %r of an erasure was switched off by another call; it is switched on again, now and "
                    "whenever that happens. `unload_erasure` takes it off.",
                    name,
                )
                self.warned.add(name)
            for layer in off:
                compat.switch_adapter_on(layer, name, strength, list(self.adapters))
            if not all(compat.adapter_acts(layer, name) for layer in off):
                return (
                    f"`fuse_lora` has merged other LoRAs where the adapter {name!r} of an erasure acts, and peft leaves out "
                    "what is not merged there. Call `pipe.unfuse_lora()`, or fuse all of them."
                )
        return None

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
        layers = {name: compat.layers_with_adapter(self.components[0], name) for name in self.adapters}
        merged = [name for name, found in layers.items() if any(compat.is_merged(layer, name) for layer in found)]
        if not merged:
            return None
        return (
            f"`fuse_lora` has merged the adapters {merged} of erasures into the weights. Call `pipe.unfuse_lora()` first; "
            "nothing was changed."
        )


def check(pipe: Any, erasure: Erasure, name: str, components: Mapping[str, nn.Module]) -> None:
    """Refuse what cannot be an adapter of the pipeline.

    Raises:
        ErasureInputError: not all of the erasure is a LoRA, or peft has an adapter of that name.
        ErasureCompatibilityError: the pipeline loads no LoRAs, or not on these components, or transformers refuses adapters
            beside the installed peft.
    """
    others = sorted({layer.kind for layer, factors in _loras(erasure) if factors is None})
    if others or any(layer.is_modified for layer in erasure.config.layers):
        what = f"layers of the kinds {others}" if others else "a schedule or a gate"
        raise ErasureInputError(
            f'`backend="peft"` takes erasures that are LoRAs and nothing else; this one has {what}. Use the default '
            '`backend="hook"`.'
        )
    loadable = compat.lora_components(pipe)
    strange = sorted({layer.component for layer in erasure.config.layers} - set(loadable))
    if strange:
        raise ErasureCompatibilityError(f'{type(pipe).__name__} loads no LoRAs on {strange}; use `backend="hook"`.')
    refused = compat.refused_adapter_versions()
    if refused and any(layer.component.startswith("text_encoder") for layer in erasure.config.layers):
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


def load(pipe: Any, item: Loaded, components: Mapping[str, nn.Module], guarded: str, policy: PeftGuard) -> None:
    """Load an erasure as an adapter; others stay active or inactive as they were.

    Args:
        pipe: the pipeline, checked with [`check`].
        item ([`Loaded`]): the erasure.
        components (`dict`): the pipeline's components by name.
        guarded (`str`): the denoiser, which gets the guard even where no layer acts on it.
        policy (`"reactivate"` or `"error"`): what the guard does.
    """
    names = {layer.component for layer in item.erasure.config.layers}
    before = {name: compat.adapter_states(component) for name, component in components.items()}
    try:
        pipe.load_lora_weights(_state_dict(item.erasure), adapter_name=item.name)
        for name in components:
            compat.restore_adapter_states(before[name])
        for name in names:
            wanted = sum(len(layer.sites) for layer in item.erasure.config.layers if layer.component == name)
            found = len(compat.layers_with_adapter(components[name], item.name))
            if found != wanted:
                raise ErasureCompatibilityError(
                    f"diffusers loaded the LoRA on {found} of {wanted} modules of {name!r}; nothing was kept. Use the "
                    'default `backend="hook"`.'
                )
        for name in sorted({*names, guarded}):
            state = attachment.ensure_state(components[name])
            state.loaded[item.name] = item
            if name in names:
                live = state.layers[PLACE] if PLACE in state.layers else PeftAdapters(components[name])
                assert isinstance(live, PeftAdapters)
                state.layers[PLACE] = live
                live.add(item.name, policy)
            state.fold()
    except BaseException:
        attachment.detach(components.values(), item.name)
        for name, component in components.items():
            compat.delete_adapter(component, item.name)
            compat.restore_adapter_states(before[name])
        raise


def _loras(erasure: Erasure) -> list[tuple[LayerSpec, dict[str, Factors] | None]]:
    """Each layer with its factors, where it is a LoRA."""
    layers = erasure.config.layers
    return [(layer, layer_kind(layer.kind).lora(layer, erasure.layer_tensors(layer))) for layer in layers]


def _state_dict(erasure: Erasure) -> dict[str, torch.Tensor]:
    """The factors under stock names, with one rank for all modules: alpha is the rank then, and the scale 1."""
    parts = [(layer, factors) for layer, factors in _loras(erasure) if factors is not None]
    rank = max(len(down) for _, factors in parts for down, _ in factors.values())
    result = {}
    for layer, factors in parts:
        for site, (down, up) in factors.items():
            name = site if layer.component == "unet" else f"text_model.{site.removeprefix('text_model.')}"
            key = f"{layer.component}.{site if layer.component == 'transformer' else name}"
            result[key + DOWN], result[key + UP] = pad_rank(down, rank, 0), pad_rank(up, rank, 1)
    return result
