"""The encoder half of a UNet, as DuMo's network runs it a second time: its modules, what goes in and what comes out.

The encoder is `conv_in`, the time embedding (SDXL: and the added one), the down blocks and the mid block. Its features
are those that the decoder reads: n skips, which are the output of `conv_in` and of each resnet (with its attention) and
downsampler, and the mid block's output. Stable Diffusion 1.x has 12 skips, SDXL 9.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError
from .buffers import live_buffer


PARTS = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
MID_BLOCKS = ("UNetMidBlock2DCrossAttn",)
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
# Settings under which the encoder has other inputs than those below.
UNUSUAL = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "time_embedding_act_fn": None,
    "attention_type": "default",
}

Call = Callable[..., Any]


@dataclass
class Inputs:
    """What the encoder is given in one pass.

    Attributes:
        sample: the noisy latents, [B, C, H, W], as `conv_in` gets them.
        time: the arguments of the time embedding: the sinusoids [B or 1, E], and a condition or `None`.
        added: the input of the added embedding, [B, D]; `None` where the UNet has none.
        encoder_hidden_states: the text rows [B, L, C]; with an IP-Adapter (rows, image embeddings).
        attention_mask: bias on the latents' positions, or `None`.
        encoder_attention_mask: bias on the text rows, or `None`.
        cross_attention_kwargs: for the attention processors, or `None`.
    """

    sample: torch.Tensor
    time: tuple[Any, ...]
    added: torch.Tensor | None
    encoder_hidden_states: Any
    attention_mask: torch.Tensor | None
    encoder_attention_mask: torch.Tensor | None
    cross_attention_kwargs: dict[str, Any] | None

    def plain(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        """The inputs for a copy with stock attention: the text without an image prompt, and no processor's arguments."""

        def place(value: Any) -> Any:
            return value.to(device, dtype) if isinstance(value, torch.Tensor) else value

        text = self.encoder_hidden_states
        return replace(
            self,
            sample=place(self.sample),
            time=tuple(map(place, self.time)),
            added=place(self.added),
            encoder_hidden_states=place(text[0] if isinstance(text, tuple) else text),
            attention_mask=place(self.attention_mask),
            encoder_attention_mask=place(self.encoder_attention_mask),
            cross_attention_kwargs=None,
        )


def encode(encoder: Any, inputs: Inputs, call: Call) -> list[torch.Tensor]:
    """Run an encoder as `UNet2DConditionModel.forward` does; without the residuals of other networks.

    Args:
        encoder: a UNet, or a module with the parts of its encoder.
        inputs ([`Inputs`]): as the UNet's own modules are given them.
        call (callable): runs one module of the encoder, as `call(module, *args, **kwargs)`.

    Returns:
        `list` of `torch.Tensor`: the n skips in order and the mid block's output, each [B, C, H, W].
    """
    embedding = call(encoder.time_embedding, *inputs.time)
    if inputs.added is not None:
        embedding = embedding + call(encoder.add_embedding, inputs.added)
    text = {
        "encoder_hidden_states": inputs.encoder_hidden_states,
        "attention_mask": inputs.attention_mask,
        "cross_attention_kwargs": inputs.cross_attention_kwargs,
        "encoder_attention_mask": inputs.encoder_attention_mask,
    }
    hidden_states = call(encoder.conv_in, inputs.sample)
    features = [hidden_states]
    for block in encoder.down_blocks:
        arguments = text if getattr(block, "has_cross_attention", False) else {}
        hidden_states, own = call(block, hidden_states, embedding, **arguments)
        features += own
    return [*features, call(encoder.mid_block, hidden_states, embedding, **text)]


def check_unet(component: nn.Module) -> None:
    """See that a component is a UNet with an encoder of the known form.

    Raises:
        ErasureCompatibilityError: it is something else, or has other blocks or inputs.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(component, UNet2DConditionModel):
        raise ErasureCompatibilityError(
            f"A `skip` layer acts on the skip connections of a `UNet2DConditionModel` (Stable Diffusion 1, 2, XL); "
            f"{type(component).__name__} has none."
        )
    blocks = [
        (component.down_blocks, DOWN_BLOCKS),
        ([component.mid_block], MID_BLOCKS),
        (component.up_blocks, UP_BLOCKS),
    ]
    for found, known in blocks:
        odd = [type(block).__name__ for block in found if type(block).__name__ not in known]
        if odd:
            raise ErasureCompatibilityError(
                f"A `skip` layer knows UNets of the blocks {list(known)}; this one has {odd[0]!r} in their place."
            )
    config = component.config
    odd = [name for name, usual in UNUSUAL.items() if config.get(name) not in (usual, None)]
    if odd or config.get("addition_embed_type") not in (None, "text_time"):
        name = odd[0] if odd else "addition_embed_type"
        raise ErasureCompatibilityError(f"A `skip` layer knows no UNet with `{name}={config.get(name)!r}`.")


def channels(unet: Any) -> list[int]:
    """Channels of each feature: the skips in order, then the mid block's output."""
    first = compat.base_layer(unet.conv_in)
    found = [first.out_channels]
    for block in unet.down_blocks:
        found += [part.out_channels for part in (*block.resnets, *(block.downsamplers or ()))]
    return [*found, found[-1]]  # type: ignore[list-item]


def spans(unet: Any) -> list[tuple[int, int]]:
    """Which skips each up block reads, as (first, last + 1): the last ones first."""
    last, found = len(channels(unet)) - 1, []
    for block in unet.up_blocks:
        found.append((last - len(block.resnets), last))
        last -= len(block.resnets)
    return found


def empty_copy(unet: Any) -> nn.Module:
    """Return the parts of a UNet's encoder as fresh modules on the meta device: no hooks, adapters or processors of its."""
    from diffusers import UNet2DConditionModel

    # An IP-Adapter changes these two entries of a loaded UNet; they do not concern the encoder.
    config = {**unet.config, "encoder_hid_dim": None, "encoder_hid_dim_type": None}
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(config)
    encoder = nn.Module()
    for name in PARTS:
        if getattr(whole, name, None) is not None:
            encoder.add_module(name, getattr(whole, name))
    return encoder.eval()


def hold(
    module: nn.Module, name: str, value: torch.Tensor, device: torch.device, dtype: torch.dtype, trainable: bool
) -> None:
    """Register a tensor: as a parameter where it is trained, else as a non-persistent buffer."""
    if trainable:
        module.register_parameter(name, nn.Parameter(value.detach().to(device=device, dtype=dtype, copy=True)))
    else:
        live_buffer(module, name, value, device, dtype)


def filled_copy(
    unet: Any, tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype, trainable: bool
) -> nn.Module:
    """Return a copy of a UNet's encoder with these tensors, named as the UNet's own parameters."""
    encoder = empty_copy(unet)
    for place, part in encoder.named_modules():
        for name, _ in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            hold(part, name, tensors[f"{place}.{name}"], device, dtype, trainable)
    return encoder
