"""ActErase as attention processors, for those who set processors. `load_erasure` uses hooks, which stay on."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from .. import compat
from ..errors import ErasureInputError
from ..layers.activation import ATTENTIONS, ActivationKind, ActivationPatch, Part
from ..layers.buffers import placement
from ..layers.modifiers import Conditions
from ..layers.sites import find_site


if TYPE_CHECKING:
    from ..artifact import Erasure


class ActEraseAttnProcessor(nn.Module):
    """Scaled dot-product attention whose output is patched before its projection, as ActErase does (arXiv 2601.00267).

    It does what the hooks of `pipe.load_erasure` do on `….attn1.to_out.0` and `….attn2.to_out.0`. Prefer those: loading an
    IP-Adapter, attention slicing and `fuse_qkv_projections` replace processors, and the concept is back without a word.
    Two differences: a LoRA of the user's on `to_out.0` reads the patched values here and the unpatched ones there, and
    nothing lists, guards or fuses processors. A module and not a plain object, so that it moves with the UNet.

    Args:
        patch (`ActivationPatch`, *optional*): what is done to the attention's output. Without it this is the plain
            processor; so diffusers makes one anew (`type(processor)()`).

    Examples:

    ```py
    >>> processors = ActEraseAttnProcessor.for_unet(pipe.unet, erasure)
    >>> pipe.unet.set_attn_processor(processors)
    >>> ActEraseAttnProcessor.remove(pipe.unet)
    ```
    """

    # What diffusers' attention dispatch looks for.
    _attention_backend: ClassVar[Any] = None
    _parallel_config: ClassVar[Any] = None

    def __init__(self, patch: ActivationPatch | None = None) -> None:
        super().__init__()
        self.patch = patch

    @classmethod
    def for_unet(cls, unet: nn.Module, erasure: "Erasure", strength: float = 1.0) -> dict[str, Any]:
        """Make the processors of a UNet from an erasure, for `unet.set_attn_processor`.

        They share one reader of the timestep, a forward pre-hook on the UNet, which stays until [`remove`] is called.

        Args:
            unet ([`UNet2DConditionModel`]): the UNet; it keeps its processors until you set the new ones.
            erasure ([`Erasure`]): one whose layers act on attention outputs only, without schedule and gate (method `acterase`
                with `sites="attn"`, `"attn1"` or `"attn2"`).
            strength (`float`, *optional*, defaults to 1.0): finite and at least 0.

        Returns:
            `dict`: a processor for each of `unet.attn_processors`; where the erasure does not act, the present one.

        Raises:
            ErasureInputError: the erasure has other layers, or the strength is negative.
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
        conditions = Conditions()
        patches: dict[str, ActivationPatch] = {}
        for index, layer in enumerate(layers):
            tensors = erasure.layer_tensors(layer)
            ActivationKind().check(unet, layer, tensors)
            for place, site in enumerate(layer.sites):
                module = find_site(unet, site)
                assert isinstance(module, nn.Linear)
                patch = patches.setdefault(site, ActivationPatch(module.in_features, conditions))
                patch.parts["", index] = Part.of(tensors, site, None, place)
        for site, patch in patches.items():
            patch.rebuild(*placement(unet, find_site(unet, site)))
            patch.fold({"": strength})
        conditions.watch(unet)
        bare: Any = compat.unwrap_compiled(unet)
        present = bare.attn_processors
        sites = {name: name.removesuffix("processor") + "to_out.0" for name in present}
        return {name: cls(patches[sites[name]]) if sites[name] in patches else old for name, old in present.items()}

    @classmethod
    def remove(cls, unet: nn.Module) -> None:
        """Put diffusers' plain processors where these are set, and take their reader of the timestep off the UNet.

        Args:
            unet ([`UNet2DConditionModel`]): the UNet.
        """
        bare: Any = compat.unwrap_compiled(unet)
        processors = bare.attn_processors
        for name, processor in processors.items():
            if isinstance(processor, cls):
                if processor.patch is not None:
                    processor.patch.source[0].unwatch()
                processors[name] = AttnProcessor2_0()
        bare.set_attn_processor(processors)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, as [`Attention`] calls its processor: hidden states [B, L, C] or [B, C, H, W], of the same shape again."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        query, key, value = (
            each.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for each in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
            attention_mask = attention_mask.unflatten(0, (len(context), attn.heads))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        hidden_states = found.transpose(1, 2).flatten(2).to(query.dtype)

        if self.patch is not None:
            hidden_states = self.patch(hidden_states)
        for module in attn.to_out:  # the projection, and dropout
            hidden_states = module(hidden_states)
        if residual.ndim == 4:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, residual.shape[2:])
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _is_attention(site: str) -> bool:
    return f".{site}".endswith(ATTENTIONS)
