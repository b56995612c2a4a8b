"""ActErase as attention processors, for those who set processors. `load_erasure` uses hooks, which stay on."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureInactiveError, ErasureInputError
from ..families import denoiser_family
from ..layers.activation import ATTENTIONS, JOINT_ATTENTIONS, ActivationKind, ActivationLayer, ActivationPatch
from ..layers.base import Watched
from ..layers.modifiers import Conditions
from ..layers.passing import Pass
from ..layers.sites import Place, attention_of, find_site
from ..logging import get_logger
from ..schema import LayerSpec
from . import attachment, twins
from .state import Loaded, state_of


if TYPE_CHECKING:
    from ..artifact import Erasure

logger = get_logger(__name__)

BACKEND = "processor"
PLACE = "attention processors"  # among a model's live layers; no layer kind has such a name
IMAGE, TEXT = "to_out.0", "to_add_out"  # an attention's output projections, of the image and of the text
JOINT = ("flux", "stable-diffusion-3")  # families of transformers with attentions that are known here
ALREADY = (
    "Hooks and processors would patch the same attentions, one upon another, and that is not what the erasures do together. Give "
    "all of them one form: call `ActEraseAttnProcessor.remove(model)` and load them with `pipe.load_erasure`, or unload those "
    "that are loaded by hooks."
)


class ActEraseAttnProcessor(nn.Module):
    """An attention processor whose output is patched before its projection, as ActErase does (arXiv 2601.00267).

    It has no attention of its own: it calls the processor that it found, be it diffusers' default, a sliced or a fused one or an
    IP-Adapter's, with an attention whose `to_out[0]`, and in joint attentions the text's `to_add_out`, patch what they read. To
    whoever asks it is that processor: it has its class, its attributes and its parameters, under the same names in a state dict.
    So `set_ip_adapter_scale` works as before.

    It does what the hooks of `pipe.load_erasure` do at these projections (`….attn1.to_out.0` and `….attn2.to_out.0` of UNets,
    `….attn.to_out.0`, `….attn.to_add_out` and `….attn2.to_out.0` of FLUX.1 and Stable Diffusion 3), bit for bit. Prefer those.
    Whatever sets other processors afterwards takes these away: attention slicing, loading or unloading an IP-Adapter,
    `fuse_qkv_projections` (until it is undone; FLUX.1's sets none), `set_default_attn_processor`. A pass then raises
    [`ErasureInactiveError`]. Do that first. The erasure is listed, set, disabled and unloaded as others are
    (`backend="processor"`). One more difference: a LoRA of the user's on the projection reads the patched values here and the
    unpatched ones there.

    Args:
        place (`Place`, *optional*): says what a pass does to the attention's output; without it, nothing.
        found (*optional*): the processor that attends; without it diffusers' default. So diffusers makes a processor anew
            (`type(processor)()`).
        text_place (`Place`, *optional*): the same as `place` for the text's output of a joint attention.

    Examples:

    ```py
    >>> processors = ActEraseAttnProcessor.for_unet(pipe.unet, erasure)
    >>> pipe.unet.set_attn_processor(processors)
    >>> ActEraseAttnProcessor.remove(pipe.unet)
    ```
    """

    # A module, so that what is below it moves with the model.

    def __init__(self, place: Place | None = None, found: Any = None, text_place: Place | None = None) -> None:
        super().__init__()
        if isinstance(found, ActEraseAttnProcessor):
            raise ErasureInputError(
                "Such a processor patches already, and one upon another is not what the erasures do together. Make the processors "
                "of the second erasure with `for_unet` or `for_transformer`, which join them."
            )
        found = AttnProcessor2_0() if found is None else found
        self.place, self.text_place = place, text_place
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
        [`remove`] puts those that were there back. Several erasures are made one after another, each under a name of its own;
        the processors that the last call returns are those of all of them, and do what their hooks do together. One that was made
        and never set is dropped where it is made anew.

        Args:
            unet ([`UNet2DConditionModel`]): the UNet; it keeps its processors until you set the new ones, and within these.
            erasure ([`Erasure`]): one whose layers act on attention outputs only, and without a gate (method `acterase` with
                `sites="attn"`, `"attn1"` or `"attn2"`).
            strength (`float`, *optional*, defaults to 1.0): finite and at least 0.
            adapter_name (`str`, *optional*): the name under which it is listed; by default that of its method.

        Returns:
            `dict`: a processor for each of `unet.attn_processors`; where no erasure acts, the present one.

        Raises:
            ErasureInputError: it is no such UNet, the erasure has other layers or a gate, the strength is negative, the name is
                taken or no name, or the erasure is loaded, or another one acts by hooks on the same attentions.
            ErasureCompatibilityError: it was made for another architecture.
        """
        return cls._made("unet", unet, erasure, strength, adapter_name)

    @classmethod
    def for_transformer(
        cls, transformer: nn.Module, erasure: "Erasure", strength: float = 1.0, adapter_name: str | None = None
    ) -> dict[str, Any]:
        """Make the processors of FLUX.1's or Stable Diffusion 3's transformer, for `transformer.set_attn_processor`.

        As [`for_unet`]. FLUX.1's single blocks have one Linear for attention and feed-forward (`proj_out`), which the block calls
        and no processor: an erasure that acts there is refused.

        Args:
            transformer ([`FluxTransformer2DModel`] or [`SD3Transformer2DModel`]): the transformer; it keeps its processors until you
                set the new ones, and within these.
            erasure ([`Erasure`]): one whose layers act on attention outputs only, and without a gate (method `acterase` with
                `sites="attn"`, and for FLUX.1 `blocks="double"`).
            strength (`float`, *optional*, defaults to 1.0): finite and at least 0.
            adapter_name (`str`, *optional*): the name under which it is listed; by default that of its method.

        Returns:
            `dict`: a processor for each of `transformer.attn_processors`; where no erasure acts, the present one.

        Raises:
            ErasureInputError, ErasureCompatibilityError: as [`for_unet`].

        Examples:

        ```py
        >>> erasure = erase(pipe, "cat", method="acterase", sites="attn", blocks="double")
        >>> processors = ActEraseAttnProcessor.for_transformer(pipe.transformer, erasure)
        >>> pipe.transformer.set_attn_processor(processors)
        ```
        """
        return cls._made("transformer", transformer, erasure, strength, adapter_name)

    @classmethod
    def _made(
        cls, component: str, model: nn.Module, erasure: "Erasure", strength: float, adapter_name: str | None
    ) -> dict[str, Any]:
        from ..artifact import Erasure

        if not isinstance(erasure, Erasure):
            raise ErasureInputError(f"`erasure` must be an Erasure, not a {type(erasure).__name__}: read it first.")
        if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise ErasureInputError(f"`strength` must be a finite number of at least 0, not {strength!r}.")
        bare: Any = compat.unwrap_compiled(model)
        _check_model(component, bare)
        for layer in erasure.config.layers:
            _check_layer(component, bare, layer)
            ActivationKind().check(bare, layer, erasure.layer_tensors(layer))
        name = erasure.config.method.name.replace(".", "_") if adapter_name is None else adapter_name
        loaded, content = _loaded(bare), erasure.content_hash
        made_anew = [
            each
            for each, item in loaded.items()
            if item.backend == BACKEND and (each == name or item.content_hash == content) and not _is_set(bare, each)
        ]
        holder = SimpleNamespace(**{component: bare})  # what is asked of a pipeline here is what is on this model
        if all(loaded[each].content_hash != content for each in made_anew):
            twins.refuse_copy(holder, content)
        if not isinstance(name, str) or not name or "." in name or name in loaded.keys() - set(made_anew):
            raise ErasureInputError(
                f"`adapter_name` must be a name without '.' that no loaded erasure has, not {name!r}."
            )
        hooked = (item.erasure for item in loaded.values() if item.backend != BACKEND)
        if any(_patched(erasure) & _patched(other) for other in hooked):
            raise ErasureInputError(ALREADY)
        for each in made_anew:
            attachment.detach([bare], each)
        twins.refuse_same_edit(holder, erasure)
        item = Loaded(name, erasure, float(strength), {}, content, BACKEND)
        for level, message in twins.shared_targets(holder, item):
            logger.log(level, "%s", message)
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
        live = _patches_of(bare)
        if live is None:
            live = ProcessorPatches(state.conditions, bare)
            compat.add_child(state.layers, PLACE, live)
        for index, layer in enumerate(item.erasure.config.layers):
            key, modifier = (item.name, index), None
            if layer.is_modified:
                modifier = attachment.modifier_of(state.conditions, key, layer, item.erasure, None)
            live.attach(bare, key, layer, item.erasure.layer_tensors(layer), modifier)
            state.timed.add(key)
        processors = dict(bare.attn_processors)
        for each, found in processors.items():
            places = live.places_at(each.removesuffix("processor"))
            if any(places):
                processors[each] = found if _has(found, places) else cls(places[0], _below(found), places[1])
        altered = [live.sites[site].module for layer in item.erasure.config.layers for site in layer.sites]
        state.marks.add(item.name, item.content_hash, altered)
        state.conditions.watch(bare)
        attachment.watch(bare)
        state.replan()
        return processors

    @classmethod
    def remove(cls, unet: nn.Module) -> None:
        """Put the processors that were found back, the very objects, and unload the erasures that these processors are.

        Processors that were set over these since then stay. A request that began with an erasure ends with it, and only then
        the processors that it needs go.

        Args:
            unet ([`UNet2DConditionModel`], [`FluxTransformer2DModel`] or [`SD3Transformer2DModel`]): the model.
        """
        bare = compat.unwrap_compiled(unet)
        for name in [name for name, item in _loaded(bare).items() if item.backend == BACKEND]:
            attachment.detach([bare], name)
        if _patches_of(bare) is None:
            _put_back(bare)

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Attend, as an attention calls its processor, with what the found one takes.

        Raises:
            ErasureInactiveError: the found processor did not call a projection whose input is patched.
        """
        (found,) = self.found
        image, text = _projection(attn, IMAGE, self.place), _projection(attn, TEXT, self.text_place)
        if image is None and text is None:
            return found(attn, *args, **kwargs)
        output = found(PatchedAttention(attn, image, text), *args, **kwargs)
        for name, projection in (("to_out[0]", image), (TEXT, text)):
            if projection is not None and not projection.called:
                raise ErasureInactiveError(
                    f"The attention processor {type(found).__name__} does not call the attention's `{name}`, whose input an erasure "
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


def check_beside(models: Iterable[nn.Module], erasure: "Erasure") -> None:
    """Refuse an erasure whose hooks would patch what the processors of a pipeline's models patch already.

    Raises:
        ErasureInputError: it would.
    """
    for live in map(_patches_of, models):
        if live is not None and _patched(erasure) & live.sites.keys():
            raise ErasureInputError(ALREADY)


def _patched(erasure: "Erasure") -> set[str]:
    """The sites whose input an erasure patches."""
    return {site for layer in erasure.config.layers if layer.kind == ActivationKind.name for site in layer.sites}


def _check_model(component: str, bare: nn.Module) -> None:
    """Whether processors are made for a model, and by the method that was called."""
    family = denoiser_family(bare)
    is_unet, is_joint = isinstance(bare, UNet2DConditionModel), family is not None and family.name in JOINT
    if is_unet if component == "unet" else is_joint:
        return
    if is_unet or is_joint:
        own = "for_unet" if is_unet else "for_transformer"
        raise ErasureInputError(f"Make the processors of a {type(bare).__name__} with `ActEraseAttnProcessor.{own}`.")
    raise ErasureInputError(
        "Attention processors are made for a `UNet2DConditionModel` and for the transformers of FLUX.1 and Stable Diffusion 3, not "
        f"for a {type(bare).__name__}: load the erasure with `pipe.load_erasure`, whose hooks act on all denoisers, and stay on."
    )


def _check_layer(component: str, bare: nn.Module, layer: LayerSpec) -> None:
    """Whether processors can do what a layer does."""
    if layer.component in ("unet", "transformer") and layer.component != component:
        raise ErasureCompatibilityError(
            f"The erasure acts on a {layer.component}, and this is a {type(bare).__name__}: it was made for another architecture."
        )
    if layer.kind != ActivationKind.name:
        raise ErasureInputError(
            f"A processor patches what an attention's output projections read; this erasure has a layer of the kind {layer.kind!r} "
            f"on {layer.component!r}. Load it with `pipe.load_erasure`."
        )
    if layer.gate is not None:
        raise ErasureInputError(
            "The erasure has a gate, which reads text that processors are not given. Load it with `pipe.load_erasure`."
        )
    endings = ATTENTIONS if component == "unet" else JOINT_ATTENTIONS
    odd = [site for site in layer.sites if not f".{site}".endswith(endings)]
    if odd:
        raise ErasureInputError(
            f"A processor patches what an attention's output projections read, and {odd[0]!r} is none: no processor calls it. Load "
            'the erasure with `pipe.load_erasure`, whose hooks act there too; or make one of attentions alone (`sites="attn"`, and '
            'for FLUX.1 `blocks="double"`).'
        )


def _loaded(bare: nn.Module) -> Mapping[str, Loaded]:
    state = state_of(bare)
    return {} if state is None else state.loaded


def _is_set(bare: nn.Module, name: str) -> bool:
    live = _patches_of(bare)
    return live is not None and live.is_set(name)


class ProcessorPatches(ActivationLayer):
    """The patches of one model's processors among its live layers: so they are listed, set, checked and unloaded.

    Args:
        conditions ([`Conditions`]): the passes of the model.
        model (`nn.Module`): the UNet or transformer.
    """

    def __init__(self, conditions: Conditions, model: nn.Module) -> None:
        super().__init__(conditions)
        self.model = (model,)  # a tuple, because a module assigned to a module would become its child

    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        """A processor has the place, and no hook: the handle is of none."""
        return find_site(component, site), Place(self.conditions), torch.utils.hooks.RemovableHandle(OrderedDict())

    def tidy(self) -> None:
        super().tidy()
        (model,) = self.model
        _put_back(model, self)

    def places_at(self, attention: str) -> tuple[Place | None, Place | None]:
        """Of the image's and the text's output of an attention, whose name ends in a dot."""
        image, text = self.sites.get(attention + IMAGE), self.sites.get(attention + TEXT)
        return None if image is None else image.place, None if text is None else text.place

    def is_set(self, name: str) -> bool:
        """Whether any of an erasure's processors is on the model."""
        return any(
            self._is_there(site) for site, each in self.sites.items() if any(key[0] == name for key in each.parts)
        )

    def watched(self) -> Iterator[Watched]:
        for site, each in self.sites.items():
            if each.parts:
                yield Watched(site, each.module, frozenset(name for name, _ in each.parts))

    def inactive_reason(self) -> str | None:
        now = None if torch.compiler.is_compiling() else self.conditions.now
        for site, each in self.sites.items():
            acts = bool(each.parts) if now is None else each.place.number in now.edits
            if acts and not self._is_there(site):
                present = type(self._attention(site).processor).__name__
                names = sorted({name for name, _ in each.parts} or (() if now is None else now.names))
                return (
                    f"The erasures {names} were made as attention processors, and that of {site.rpartition('.to_')[0]!r} is {present}: "
                    "they were not set, or attention slicing, an IP-Adapter, fused projections or another call set others over "
                    "them. Call `ActEraseAttnProcessor.remove(model)`, do that first, and then make and set them; or load the "
                    "erasures with `pipe.load_erasure`, whose hooks stay on."
                )
        return None

    def _attention(self, site: str) -> Any:
        (model,) = self.model
        return attention_of(model, site.removesuffix(".0"))

    def _is_there(self, site: str) -> bool:
        processor = self._attention(site).processor
        if type(processor) is not ActEraseAttnProcessor:
            return False
        place = processor.text_place if site.endswith(TEXT) else processor.place
        return place is self.sites[site].place


def _patches_of(model: nn.Module) -> ProcessorPatches | None:
    state = state_of(model)
    live = None if state is None or PLACE not in state.layers else state.layers[PLACE]
    return live if isinstance(live, ProcessorPatches) else None


def _put_back(model: Any, live: ProcessorPatches | None = None) -> None:
    """Set the processors that were found again, where ours are, and none of `live` acts by them."""
    present = model.attn_processors
    back = {
        key: each if live is not None and any(live.places_at(key.removesuffix("processor"))) else _below(each)
        for key, each in present.items()
    }
    if any(back[key] is not each for key, each in present.items()):
        model.set_attn_processor(back)


def _below(processor: Any) -> Any:
    return processor.found[0] if type(processor) is ActEraseAttnProcessor else processor


def _has(processor: Any, places: tuple[Place | None, Place | None]) -> bool:
    ours = type(processor) is ActEraseAttnProcessor
    return ours and processor.place is places[0] and processor.text_place is places[1]


class PatchedAttention:
    """An attention as a processor sees it, in one call: all is the attention's own, but for the patched projections.

    The attention itself stays as it is, so that calls in other threads see nothing of this one.
    """

    def __init__(
        self, attention: Any, image: "PatchedProjection | None", text: "PatchedProjection | None" = None
    ) -> None:
        object.__setattr__(self, "attention", attention)
        if image is not None:
            object.__setattr__(self, "to_out", [image, *attention.to_out[1:]])
        if text is not None:
            object.__setattr__(self, TEXT, text)

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


def _projection(attention: Any, name: str, place: Place | None) -> PatchedProjection | None:
    """An output projection as it is patched in this pass, or `None` where it is not."""
    edit, now = (None, None) if place is None else place.at_work()
    if edit is None or now is None:
        return None
    return PatchedProjection(attention.to_out[0] if name == IMAGE else getattr(attention, name), edit, now)
