"""ActErase as attention processors, for those who set processors. `load_erasure` uses hooks, which stay on."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from .. import compat
from ..errors import ErasureInactiveError, ErasureInputError
from ..layers.activation import ATTENTIONS, ActivationKind, ActivationPatch, Part
from ..layers.base import LiveLayer, Watched
from ..layers.buffers import placement
from ..layers.sites import attention_of, find_site
from . import attachment


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
        patch (`ActivationPatch`, *optional*): what is done to the attention's output; without it, nothing.
        found (*optional*): the processor that attends; without it diffusers' default. So diffusers makes a processor anew
            (`type(processor)()`).

    Examples:

    ```py
    >>> processors = ActEraseAttnProcessor.for_unet(pipe.unet, erasure)
    >>> pipe.unet.set_attn_processor(processors)
    >>> ActEraseAttnProcessor.remove(pipe.unet)
    ```
    """

    # A module, so that the patch and what is below it move with the UNet.

    def __init__(self, patch: ActivationPatch | None = None, found: Any = None) -> None:
        super().__init__()
        if isinstance(found, ActEraseAttnProcessor):
            raise ErasureInputError(ALREADY)
        found = AttnProcessor2_0() if found is None else found
        self.add_module("patch", patch)
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
            ErasureInputError: the erasure has other layers, the strength is negative, the name is taken or no name, or such
                processors are set already.
            ErasureCompatibilityError: it was made for another architecture.
        """
        from ..artifact import Erasure

        if not isinstance(erasure, Erasure):
            raise ErasureInputError(f"`erasure` must be an Erasure, not a {type(erasure).__name__}: read it first.")
        if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise ErasureInputError(f"`strength` must be a finite number of at least 0, not {strength!r}.")
        layers = erasure.config.layers
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
        state = attachment.state_of(bare)
        if not isinstance(name, str) or not name or "." in name or (state is not None and name in state.loaded):
            raise ErasureInputError(
                f"`adapter_name` must be a name without '.' that no loaded erasure has, not {name!r}."
            )
        if state is not None:
            _check_beside(state, erasure)
        item = attachment.Loaded(name, erasure, float(strength), {}, erasure.content_hash, BACKEND)
        try:
            processors = cls._attach(bare, item)
        except BaseException:
            attachment.detach([bare], name)
            raise
        attachment.reset_compiled([bare])
        return processors

    @classmethod
    def _attach(cls, bare: Any, item: attachment.Loaded) -> dict[str, Any]:
        state = attachment.ensure_state(bare)
        state.loaded[item.name] = item
        state.layers[PLACE] = live = ProcessorPatches(bare, item.name)
        for index, layer in enumerate(item.erasure.config.layers):
            tensors = item.erasure.layer_tensors(layer)
            for place, site in enumerate(layer.sites):
                module = find_site(bare, site)
                assert isinstance(module, nn.Linear)
                patch = live.patches.setdefault(site, ActivationPatch(module.in_features, state.conditions))
                patch.parts[item.name, index] = Part.of(tensors, site, None, place)
                patch.rebuild(*placement(bare, module))
        processors = dict(bare.attn_processors)
        for each, found in processors.items():
            site = each.removesuffix("processor") + "to_out.0"
            if site in live.patches:
                processors[each] = cls(live.patches[site], found)
        state.marks.add(item.name, item.content_hash, [find_site(bare, site) for site in live.patches])
        state.timed.add((item.name, 0))
        state.conditions.watch(bare)
        attachment.watch(bare)
        state.fold()
        return processors

    @classmethod
    def remove(cls, unet: nn.Module) -> None:
        """Put the processors that were found back, the very objects, and unload the erasure from the UNet.

        Processors that were set over these since then stay.

        Args:
            unet ([`UNet2DConditionModel`]): the UNet.
        """
        live, bare = _patches_of(unet), compat.unwrap_compiled(unet)
        if live is not None:
            attachment.detach([unet], live.name)
        _put_back(bare)

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend, as [`Attention`] calls its processor, with what the found one takes.

        Raises:
            ErasureInactiveError: the found processor did not call the attention's `to_out[0]`.
        """
        (found,) = self.found
        if self.patch is None or not self.patch.parts:  # unloaded, while something else kept the processor
            return found(attn, *args, **kwargs)
        projection = PatchedProjection(attn.to_out[0], self.patch)
        output = found(PatchedAttention(attn, projection), *args, **kwargs)
        if not projection.called and self.patch.on:
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
    if live is not None and sites & live.patches.keys():
        raise ErasureInputError(ALREADY)


def _check_beside(state: attachment.ErasureModules, erasure: "Erasure") -> None:
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


class ProcessorPatches(LiveLayer):
    """The patches of one UNet's processors among its live layers: so they are listed, folded, checked and unloaded.

    Args:
        unet (`nn.Module`): the UNet.
        name (`str`): of the erasure.
    """

    def __init__(self, unet: nn.Module, name: str) -> None:
        super().__init__()
        self.source = (unet,)  # a tuple, because a module assigned to a module would become its child
        self.name = name
        self.patches: dict[str, ActivationPatch] = {}  # a plain dictionary: they are children of the processors

    def detach(self, name: str) -> None:
        if name != self.name:
            return
        _put_back(self.source[0])
        for patch in self.patches.values():
            patch.parts = {}
        self.patches = {}

    def fold(self, strengths: Mapping[str, float]) -> None:
        for patch in self.patches.values():
            patch.fold({self.name: strengths[self.name]})
            patch.on = strengths[self.name] > 0

    def is_empty(self) -> bool:
        return not self.patches

    def are_set(self) -> bool:
        """Whether any of the processors is on the UNet."""
        return any(self._is_there(site) for site in self.patches)

    def watched(self) -> Iterator[Watched]:
        (unet,) = self.source
        for site in self.patches:
            yield Watched(site, find_site(unet, site), frozenset({self.name}))

    def inactive_reason(self) -> str | None:
        (unet,) = self.source
        state = attachment.state_of(unet)
        if state is None or not state.loaded[self.name].strength:
            return None
        for site in self.patches:
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
        (unet,) = self.source
        return attention_of(unet, site.removesuffix(".0"))

    def _is_there(self, site: str) -> bool:
        processor = self._attention(site).processor
        return type(processor) is ActEraseAttnProcessor and processor.patch is self.patches[site]


def _patches_of(unet: nn.Module) -> ProcessorPatches | None:
    state = attachment.state_of(unet)
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

    def __init__(self, module: nn.Module, patch: nn.Module) -> None:
        self.module, self.patch, self.called = module, patch, False

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.called = True
        return self.module(self.patch(hidden_states), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _is_attention(site: str) -> bool:
    return f".{site}".endswith(ATTENTIONS)
