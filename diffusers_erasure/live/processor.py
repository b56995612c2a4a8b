"""ActErase as attention processors, for those who set processors. `load_erasure` uses hooks, which stay on."""

import math
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..layers.activation import ATTENTIONS, ActivationKind, ActivationPatch, Part
from ..layers.buffers import placement
from ..layers.modifiers import Conditions
from ..layers.sites import find_site


if TYPE_CHECKING:
    from ..artifact import Erasure

READER = "erasure_processor_reader"  # a UNet's attribute: a tuple of what reads its timestep for the processors


class ActEraseAttnProcessor(nn.Module):
    """An attention processor whose output is patched before its projection, as ActErase does (arXiv 2601.00267).

    It has no attention of its own: it calls the processor that it found, be it diffusers' default, a sliced or a fused one or an
    IP-Adapter's, with an attention whose `to_out[0]` patches what it reads. To whoever asks it is that processor: it has its
    class, its attributes and its parameters, under the same names in a state dict. So `set_ip_adapter_scale` works as before.

    It does what the hooks of `pipe.load_erasure` do on `….attn1.to_out.0` and `….attn2.to_out.0`, bit for bit. Prefer those.
    Whatever sets other processors afterwards takes these away, and the concept is back without a word: attention slicing,
    loading or unloading an IP-Adapter, `fuse_qkv_projections` (until it is undone), `set_default_attn_processor`. Do that first.
    Two more differences: a LoRA of the user's on `to_out.0` reads the patched values here and the unpatched ones there, and
    nothing lists, guards or fuses processors.

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
            raise ErasureInputError(
                "This processor patches already, and one upon another is not what the erasures do together. Call "
                "`ActEraseAttnProcessor.remove(unet)` first, or load the erasures with `pipe.load_erasure`."
            )
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
    def for_unet(cls, unet: nn.Module, erasure: "Erasure", strength: float = 1.0) -> dict[str, Any]:
        """Make the processors of a UNet from an erasure, for `unet.set_attn_processor`.

        They share one reader of the timestep, a forward pre-hook on the UNet, which stays until [`remove`] is called.

        Args:
            unet ([`UNet2DConditionModel`]): the UNet; it keeps its processors until you set the new ones, and within these.
            erasure ([`Erasure`]): one whose layers act on attention outputs only, without schedule and gate (method `acterase`
                with `sites="attn"`, `"attn1"` or `"attn2"`).
            strength (`float`, *optional*, defaults to 1.0): finite and at least 0.

        Returns:
            `dict`: a processor for each of `unet.attn_processors`; where the erasure does not act, the present one.

        Raises:
            ErasureInputError: the erasure has other layers, the strength is negative, or such processors are set already.
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
        bare: Any = compat.unwrap_compiled(unet)
        (conditions,) = getattr(bare, READER, None) or (Conditions(),)
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
        processors = dict(bare.attn_processors)
        for name, found in processors.items():
            site = name.removesuffix("processor") + "to_out.0"
            if site in patches:
                processors[name] = cls(patches[site], found)
        conditions.watch(unet)
        setattr(bare, READER, (conditions,))
        return processors

    @classmethod
    def remove(cls, unet: nn.Module) -> None:
        """Put the processors that were found back, the very objects, and take the reader of the timestep off the UNet.

        Processors that were set over these since then stay.

        Args:
            unet ([`UNet2DConditionModel`]): the UNet.
        """
        bare: Any = compat.unwrap_compiled(unet)
        present = bare.attn_processors.items()
        bare.set_attn_processor({name: each.found[0] if isinstance(each, cls) else each for name, each in present})
        if hasattr(bare, READER):
            (conditions,) = getattr(bare, READER)
            conditions.unwatch()
            delattr(bare, READER)

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend, as [`Attention`] calls its processor, with what the found one takes.

        Raises:
            ErasureCompatibilityError: the found processor did not call the attention's `to_out[0]`.
        """
        (found,) = self.found
        if self.patch is None:
            return found(attn, *args, **kwargs)
        projection = PatchedProjection(attn.to_out[0], self.patch)
        output = found(PatchedAttention(attn, projection), *args, **kwargs)
        if not projection.called:
            raise ErasureCompatibilityError(
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
