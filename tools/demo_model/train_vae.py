"""Trains the autoencoder: 64x64 pixels to 8x8 latents of 8 channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL

from diffusers_erasure.demo.dataset import Dataset

from .loop import train


@dataclass(frozen=True)
class VaeSettings:
    """
    How the autoencoder is trained.

    Args:
        steps (`int`): Optimiser steps.
        batch_size (`int`): Pictures a step.
        learning_rate (`float`): The peak of the one-cycle schedule.
        gradient_weight (`float`): Weight of the difference between neighbouring pixels, which keeps edges sharp.
        kl_weight (`float`): Weight of the Kullback-Leibler divergence.
        seed (`int`): Seeds weights and draws.
    """

    steps: int = 3000
    batch_size: int = 16
    learning_rate: float = 3e-3
    gradient_weight: float = 0.5
    kl_weight: float = 2e-6
    seed: int = 0


def train_vae(
    dataset: Dataset, settings: VaeSettings, accelerator: Accelerator
) -> tuple[AutoencoderKL, dict[str, float]]:
    """
    Train the autoencoder and set its scaling factor.

    Args:
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]): The pictures.
        settings ([`VaeSettings`]): Steps, sizes and the seed.
        accelerator ([`~accelerate.Accelerator`]): Where to compute.

    Returns:
        `tuple`: The autoencoder and its mean absolute error over all pictures, `{"l1": …}`, for pixels in [0, 1].
    """
    set_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    vae = new_vae(dataset.size).to(accelerator.device)
    pixels = to_pixels(dataset)

    def loss() -> torch.Tensor:
        index = torch.randint(0, len(pixels), (settings.batch_size,), generator=generator)
        flip = torch.rand(settings.batch_size, generator=generator) < 0.5
        batch = pixels[index]
        batch = torch.where(flip[:, None, None, None], batch.flip(3), batch).to(accelerator.device)
        with torch.autocast(accelerator.device.type, dtype=torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        return (
            _reconstruction_loss(output.float(), batch, settings) + settings.kl_weight * posterior.kl().float().mean()
        )

    train("vae", [vae], loss, steps=settings.steps, learning_rate=settings.learning_rate, accelerator=accelerator)
    latents = encode(pixels, vae)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    with torch.no_grad():
        decoded = torch.cat([vae.decode(chunk.to(vae.device)).sample.cpu() for chunk in latents.split(64)])
    return vae, {"l1": F.l1_loss(decoded, pixels).item() / 2}


def new_vae(size: int) -> AutoencoderKL:
    """An untrained autoencoder of the embedded model's architecture."""
    return AutoencoderKL(
        sample_size=size,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def to_pixels(dataset: Dataset) -> torch.Tensor:
    """All pictures in [-1, 1], [objects * styles, 3, size, size]; the styles of an object are neighbours."""
    pixels = torch.from_numpy(dataset.images).flatten(0, 1).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).contiguous()


@torch.no_grad()
def encode(pixels: torch.Tensor, vae: AutoencoderKL, batch_size: int = 64) -> torch.Tensor:
    """The unscaled latents of pixels in [-1, 1], on the CPU."""
    chunks = [vae.encode(chunk.to(vae.device)).latent_dist.mode().cpu() for chunk in pixels.split(batch_size)]
    return torch.cat(chunks)


def _reconstruction_loss(output: torch.Tensor, target: torch.Tensor, settings: VaeSettings) -> torch.Tensor:
    edges = sum(F.l1_loss(output.diff(dim=dim), target.diff(dim=dim)) for dim in (2, 3))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + settings.gradient_weight * edges
