"""ActErase as attention processors, for those who set processors. `load_erasure` uses hooks, which stay on."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from .. import compat
from ..errors import ErasureInactiveError, ErasureInputError
from ..layers.activation import ATTENTIONS, ActivationKind, ActivationLayer, ActivationPatch
from ..layers.base import Watched
from ..layers.modifiers import Conditions
from ..layers.passing import Pass
from ..layers.sites import Place, attention_of, find_site
from . import attachment
from .state import ErasureModules, Loaded, state_of


if TYPE_CHECKING:
    from ..artifact import Erasure

BACKEND = "processor"
PLACE = "attention processors"  # among the UNet's live layers; no layer kind has such a name
ALREADY = (
    "Such a processor patches already, and one upon another is not what the erasures do together. Call "
    "`ActEraseAttnProcessor.remove(unet)` first, or load the erasures with `pipe.load_erasure`."
)


class ActEraseAttnProcessor(nn.Module):
    """An attention processor whose output is patched before its projection, as ActErase does (arXiv 2601.00267).

    It has no attention of its own: it calls the processor that it found, be it diffusers' default, a sliced or a fused one or an
    IP-Adapter's, with an attention whose `to_out[0]` patches what it reads. To whoever asks it is that processor: it has its
    class, its attributes and its parameters, under the same names in a state dict. So `set_ip_adapter_scale` works as before.

    It does what the hooks of `pipe.load_erasure` do on `….attn1.to_out.0` and `….attn2.to_out.0`, bit for bit. Prefer those.
    Whatever sets other processors afterwards takes these away: attention slicing, loading or unloading an IP-Adapter,
    `fuse_qkv_projections` (until it is undone), `set_default_attn_processor`. A pass then raises [`ErasureInactiveError`]. Do that
    first. The erasure is listed, set, disabled and unloaded as others are (`backend="processor"`). One more difference: a LoRA of
    the user's on `to_out.0` reads the patched values here and the unpatched ones there.

    Args:
        place (`Place`, *optional*): says what a pass does to the attention's output; without it, nothing.
        found (*optional*): the processor that attends; without it diffusers' default. So diffusers makes a processor anew
            (`type(processor)()`).

    Examples:

    ```py
    >>> processors = ActEraseAttnProcessor.for_unet(pipe.unet, erasure)
    >>> pipe.unet.set_attn_processor(processors)
    >>> ActEraseAttnProcessor.remove(pipe.unet)
    ```
    """

    # A module, so that what is below it moves with the UNet.

    def __init__(self, place: Place | None = None, found: Any = None) -> None:
        super().__init__()
        if isinstance(found, ActEraseAttnProcessor):
            raise ErasureInputError(ALREADY)
        found = AttnProcessor2_0() if found is None else found
        self.place = place
        if isinstance(found, nn.Module):
            whole = [*found.parameters(recurse=False), *found.buffers(recurse=False)]  # which `.to` may exchange
            for name, child in {"below": found}.items() if whole else found.named_children():
                self.add_module(name, child)
        # diffusers drops arguments that are not in the signature of this attribute; a call itself goes to the class.
        vars(self)["__call__"] = found.__call__
        self.found = (found,)  # a tuple, because a module assigned to a module would become its child

    @classmethod
    def for_unet(
        cls, unet: nn.Module, erasure: "Erasure", strength: float = 1.0, adapter_name: str | None = None
    ) -> dict[str, Any]:
        """Make the processors of a UNet from an erasure, for `unet.set_attn_processor`.

        From now on the erasure counts as loaded: a pass raises until the processors are set, and `pipe.unload_erasure` or
        [`remove`] puts those that were there back.

        Args:
            unet ([`UNet2DConditionModel`]): the UNet; it keeps its processors until you set the new ones, and within these.
            erasure ([`Erasure`]): one whose layers act on attention outputs only, without schedule and gate (method `acterase`
                with `sites="attn"`, `"attn1"` or `"attn2"`).
            strength (`float`, *optional*, defaults to 1.0): finite and at least 0.
            adapter_name (`str`, *optional*): the name under which it is listed; by default that of its method.

        Returns:
            `dict`: a processor for each of `unet.attn_processors`; where the erasure does not act, the present one.

        Raises:
            ErasureInputError: it is no such UNet, the erasure has other layers, the strength is negative, the name is taken or no name, or such
                processors are set already.
            ErasureCompatibilityError: it was made for another architecture.
        """
        from ..artifact import Erasure

        if not isinstance(erasure, Erasure):
            raise ErasureInputError(f"`erasure` must be an Erasure, not a {type(erasure).__name__}: read it first.")
        if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise ErasureInputError(f"`strength` must be a finite number of at least 0, not {strength!r}.")
        layers = erasure.config.layers
        if not isinstance(compat.unwrap_compiled(unet), UNet2DConditionModel):
            raise ErasureInputError(
                f"Attention processors are made for a `UNet2DConditionModel`, not for a {type(unet).__name__}: load the erasure with "
                "`pipe.load_erasure`, whose hooks act on all denoisers, joint attentions included, and stay on."
            )
        if any(
            layer.kind != ActivationKind.name or layer.is_modified or not all(map(_is_attention, layer.sites))
            for layer in layers
        ):
            raise ErasureInputError(
                "A processor acts on attention outputs; this erasure has layers of another kind or on other modules, a schedule or "
                "a gate. Load it with `pipe.load_erasure`."
            )
        name = erasure.config.method.name.replace(".", "_") if adapter_name is None else adapter_name
        for layer in layers:
            ActivationKind().check(unet, layer, erasure.layer_tensors(layer))
        bare: Any = compat.unwrap_compiled(unet)
        earlier = _patches_of(bare)
        if earlier is not None and not earlier.are_set():  # made and never set
            cls.remove(bare)
        if any(type(each) is cls for each in bare.attn_processors.values()):
            raise ErasureInputError(ALREADY)
        state = state_of(bare)
        if not isinstance(name, str) or not name or "." in name or (state is not None and name in state.loaded):
            raise ErasureInputError(
                f"`adapter_name` must be a name without '.' that no loaded erasure has, not {name!r}."
            )
        if state is not None:
            _check_beside(state, erasure)
        item = Loaded(name, erasure, float(strength), {}, erasure.content_hash, BACKEND)
        with attachment.changing_alone([bare]):
            try:
                processors = cls._attach(bare, item)
            except BaseException:
                attachment.detach([bare], name)
                raise
            attachment.reset_compiled([bare])
        return processors

    @classmethod
    def _attach(cls, bare: Any, item: Loaded) -> dict[str, Any]:
        state = attachment.ensure_state(bare)
        state.add(item)
        live = ProcessorPatches(state.conditions, bare, item.name)
        compat.add_child(state.layers, PLACE, live)
        for index, layer in enumerate(item.erasure.config.layers):
            live.attach(bare, (item.name, index), layer, item.erasure.layer_tensors(layer), None)
        processors = dict(bare.attn_processors)
        for each, found in processors.items():
            site = each.removesuffix("processor") + "to_out.0"
            if site in live.sites:
                processors[each] = cls(live.sites[site].place, found)
        state.marks.add(item.name, item.content_hash, [each.module for each in live.sites.values()])
        state.timed.add((item.name, 0))
        state.conditions.watch(bare)
        attachment.watch(bare)
        state.replan()
        return processors

    @classmethod
    def remove(cls, unet: nn.Module) -> None:
        """Put the processors that were found back, the very objects, and unload the erasure from the UNet.

        Processors that were set over these since then stay. A request that began with the erasure ends with it, and only then
        the processors that it needs go.

        Args:
            unet ([`UNet2DConditionModel`]): the UNet.
        """
        live, bare = _patches_of(unet), compat.unwrap_compiled(unet)
        if live is not None:
            attachment.detach([unet], live.name)
        if _patches_of(unet) is None:
            _put_back(bare)

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend, as [`Attention`] calls its processor, with what the found one takes.

        Raises:
            ErasureInactiveError: the found processor did not call the attention's `to_out[0]`.
        """
        (found,) = self.found
        edit, now = (None, None) if self.place is None else self.place.at_work()
        if edit is None or now is None:
            return found(attn, *args, **kwargs)
        projection = PatchedProjection(attn.to_out[0], edit, now)
        output = found(PatchedAttention(attn, projection), *args, **kwargs)
        if not projection.called:
            raise ErasureInactiveError(
                f"The attention processor {type(found).__name__} does not call the attention's `to_out[0]`, whose input an erasure "
                "patches, so it would not act. Set another processor, and `ActEraseAttnProcessor` over it."
            )
        return output

    # diffusers asks a processor for its class (`set_ip_adapter_scale` does) and attributes, and sets those which it has.

    @property  # type: ignore[misc]  # `object` has one that can be written
    def __class__(self) -> type:
        found = vars(self).get("found")
        return type(self) if found is None else type(found[0])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "found" not in vars(self):
                raise
            return getattr(self.found[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        (found,) = vars(self).get("found", (None,))
        if name in vars(self) or not hasattr(found, name):
            super().__setattr__(name, value)
            return
        setattr(found, name, value)
        if isinstance(value, nn.Module):
            super().__setattr__(name, value)  # the found one's children are children of this one

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.found[0]!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), vars(self)


def check_beside(unet: Any, erasure: "Erasure") -> None:
    """Refuse an erasure whose hooks would patch what the processors of a UNet patch already.

    Raises:
        ErasureInputError: it would.
    """
    live = _patches_of(unet) if isinstance(unet, nn.Module) else None
    sites = {site for layer in erasure.config.layers if layer.kind == ActivationKind.name for site in layer.sites}
    if live is not None and sites & live.sites.keys():
        raise ErasureInputError(ALREADY)


def _check_beside(state: ErasureModules, erasure: "Erasure") -> None:
    """The same the other way round; and the erasure itself is not loaded twice."""
    sites = {site for layer in erasure.config.layers for site in layer.sites}
    for item in state.loaded.values():
        if item.content_hash == erasure.content_hash:
            raise ErasureInputError(
                f"This erasure is loaded already, as {item.name!r}. Call `pipe.unload_erasure({item.name!r})` first."
            )
        layers = (layer for layer in item.erasure.config.layers if layer.kind == ActivationKind.name)
        if any(sites & set(layer.sites) for layer in layers):
            raise ErasureInputError(ALREADY)


class ProcessorPatches(ActivationLayer):
    """The patches of one UNet's processors among its live layers: so they are listed, set, checked and unloaded.

    Args:
        conditions ([`Conditions`]): the passes of the UNet.
        unet (`nn.Module`): the UNet.
        name (`str`): of the erasure.
    """

    def __init__(self, conditions: Conditions, unet: nn.Module, name: str) -> None:
        super().__init__(conditions)
        self.unet = (unet,)  # a tuple, because a module assigned to a module would become its child
        self.name = name

    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        """A processor has the place, and no hook: the handle is of none."""
        return find_site(component, site), Place(self.conditions), torch.utils.hooks.RemovableHandle(OrderedDict())

    def tidy(self) -> None:
        if not any(each.parts for each in self.sites.values()):
            _put_back(self.unet[0])
        super().tidy()

    def are_set(self) -> bool:
        """Whether any of the processors is on the UNet."""
        return any(self._is_there(site) for site in self.sites)

    def watched(self) -> Iterator[Watched]:
        for site, each in self.sites.items():
            if each.parts:
                yield Watched(site, each.module, frozenset({self.name}))

    def inactive_reason(self) -> str | None:
        if not torch.compiler.is_compiling() and self.name not in self.conditions.now.names:
            return None
        for site in self.sites:
            if not self._is_there(site):
                present = type(self._attention(site).processor).__name__
                return (
                    f"The erasure {self.name!r} was made as attention processors, and that of {site.removesuffix('.to_out.0')!r} is "
                    f"{present}: they were not set, or attention slicing, an IP-Adapter, fused projections or another call set "
                    "others over them. Call `ActEraseAttnProcessor.remove(unet)`, do that first, and then make and set them; or "
                    "load the erasure with `pipe.load_erasure`, whose hooks stay on."
                )
        return None

    def _attention(self, site: str) -> Any:
        (unet,) = self.unet
        return attention_of(unet, site.removesuffix(".0"))

    def _is_there(self, site: str) -> bool:
        processor = self._attention(site).processor
        return type(processor) is ActEraseAttnProcessor and processor.place is self.sites[site].place


def _patches_of(unet: nn.Module) -> ProcessorPatches | None:
    state = state_of(unet)
    live = None if state is None or PLACE not in state.layers else state.layers[PLACE]
    return live if isinstance(live, ProcessorPatches) else None


def _put_back(unet: Any) -> None:
    """Set the processors that were found again, where ours are."""
    present = unet.attn_processors
    back = {key: _below(each) for key, each in present.items()}
    if any(back[key] is not each for key, each in present.items()):
        unet.set_attn_processor(back)


def _below(processor: Any) -> Any:
    return processor.found[0] if type(processor) is ActEraseAttnProcessor else processor


class PatchedAttention:
    """An attention as a processor sees it, in one call: all is the attention's own, but for `to_out[0]`.

    The attention itself stays as it is, so that calls in other threads see nothing of this one.
    """

    def __init__(self, attention: Any, projection: "PatchedProjection") -> None:
        object.__setattr__(self, "attention", attention)
        object.__setattr__(self, "to_out", [projection, *attention.to_out[1:]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.attention, name, value)


class PatchedProjection:
    """A projection that reads patched hidden states, and notes that it was called."""

    def __init__(self, module: nn.Module, patch: ActivationPatch, now: Pass) -> None:
        self.module, self.patch, self.now, self.called = module, patch, now, False

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.called = True
        return self.module(self.patch(hidden_states, self.now), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _is_attention(site: str) -> bool:
    return f".{site}".endswith(ATTENTIONS)
