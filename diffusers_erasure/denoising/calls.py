"""How the denoisers of each family are called: latents [B, C, H, W] in, predictions of that shape out."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..base_model import component, family_of
from ..families import Family
from .prompts import Prompt, Prompts
from .sampler import PLAIN, Sampler, placed


def latent_shape(pipe: Any, resolution: int = 0) -> tuple[int, int, int]:
    """(C, H, W) of a base model's latents, for images of `resolution` pixels a side, or of its own size (0)."""
    family = family_of(pipe)
    model = component(pipe, family.denoiser)
    pixels = getattr(pipe, "vae_scale_factor", 8)
    size = resolution // pixels if resolution else getattr(model.config, "sample_size", None)
    if size is None:  # FLUX's transformer has no size of its own
        vae = component(pipe, "vae")
        size = pipe.default_sample_size if vae is None else vae.config.sample_size // pixels
    height, width = (size, size) if isinstance(size, int) else size
    return model.config.in_channels // family.packing**2, height, width


def packed(latents: torch.Tensor, side: int) -> torch.Tensor:
    """Latents [B, C, H, W] as tokens [B, H W / side², C side²]."""
    return F.pixel_unshuffle(latents, side).flatten(2).transpose(1, 2)


def unpacked(tokens: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """Undo [`packed`]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // side, width // side)), side)


class Caller:
    """Calls a denoiser.

    Args:
        family ([`Family`]): its family.
        model (`nn.Module`): the UNet or transformer.
        prompts ([`Prompts`]): encoded prompts.
        sampler ([`Sampler`]): scales what goes in.
    """

    def __init__(self, family: Family, model: Any, prompts: Prompts, sampler: Sampler) -> None:
        self.family, self.model, self.prompts, self.sampler = family, model, prompts, sampler
        self.ids: tuple[Any, dict[str, torch.Tensor]] = None, {}  # places of the tokens, where they are

    def __call__(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: Sequence[Prompt],
        guidance: Sequence[float] | None = None,
        module: nn.Module | None = None,
    ) -> torch.Tensor:
        """One pass.

        Args:
            latents (`torch.Tensor`): [B, C, H, W].
            timesteps (`torch.Tensor`): [B], or one for all; the scheduler's, of which 1,000 is the noise.
            prompts: one a sample, or a mixture of some.
            guidance (*optional*): one a sample, where the model has its guidance in the weights; 1 by default.
            module (`nn.Module`, *optional*): what is called in place of the model: a wrapper of it.

        Returns:
            `torch.Tensor`: float32 [B, C, H, W].
        """
        device, dtype = compat.execution_device(self.model), self.model.dtype
        call = self.model if module is None else module
        timesteps = placed(timesteps, device)
        scaled = self.sampler.model_input(placed(latents, device), timesteps).to(dtype)
        arguments = self.prompts.batch(prompts, device, dtype)
        if self.family.denoiser == "unet":
            return call(scaled, timesteps, return_dict=False, **arguments)[0].float()
        factor, offset = self.family.clock
        # Scaled in the model's dtype, as the pipelines do.
        times = (((timesteps if factor == 1 else timesteps.to(dtype)) - offset) / factor).expand(len(latents))
        if getattr(self.model.config, "guidance_embeds", False):
            values = torch.tensor(guidance or [PLAIN] * len(latents), dtype=torch.float32)
            arguments["guidance"] = placed(values, device)
        side, (height, width) = self.family.packing, latents.shape[-2:]
        if side > 1:
            arguments |= self._places(height // side, width // side, arguments[self.family.argument])
            scaled = packed(scaled, side)
        arguments[self.family.timestep] = times
        found = call(hidden_states=scaled, return_dict=False, **arguments)[0]
        return (unpacked(found, side, height, width) if side > 1 else found).float()

    def rows(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Sequence[Sequence[Prompt]],
        guidance: Sequence[float] | None = None,
    ) -> list[torch.Tensor]:
        """Predictions for several lists of prompts in one pass. A [`Predict`].

        Args:
            latents (`torch.Tensor`): [B, C, H, W].
            timesteps (`torch.Tensor`): [B].
            rows: lists of B prompts.
            guidance (*optional*): one a list.
        """
        count = len(rows)
        flat = [prompt for row in rows for prompt in row]
        repeated = latents.repeat(count, *(1,) * (latents.ndim - 1)), timesteps.repeat(count)
        each = None if guidance is None else [value for value in guidance for _ in range(len(latents))]
        return list(self(*repeated, flat, each).chunk(count))

    def _places(self, height: int, width: int, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where image and text tokens stand, for rotary embeddings."""
        key = height, width, rows.shape[1], rows.device, rows.dtype
        if self.ids[0] != key:
            image = torch.zeros(height, width, 3)
            image[..., 1], image[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None]
            text = torch.zeros(rows.shape[1], 3)
            found = {"img_ids": image.flatten(0, 1), "txt_ids": text}
            self.ids = key, {name: value.to(rows.device, rows.dtype) for name, value in found.items()}
        return self.ids[1]
