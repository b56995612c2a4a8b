"""Trains the judge on the pictures and on copies of them as the autoencoder draws them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_erasure.demo.dataset import Dataset
from diffusers_erasure.demo.judge import Judge, JudgeNet

from .augment import Augmentation
from .loop import train


@dataclass(frozen=True)
class JudgeSettings:
    """
    How the judge is trained and tested.

    Args:
        steps (`int`): Optimiser steps.
        batch_size (`int`): Pictures a step.
        learning_rate (`float`): The peak of the one-cycle schedule.
        copies (`int`): Copies of each picture through the autoencoder.
        test_draws (`int`): Test pictures made from each picture.
        seed (`int`): Seeds the weights and all draws of the training; the test draws have another.
    """

    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 4e-3
    copies: int = 16
    test_draws: int = 10
    seed: int = 0


TRAIN_AUGMENTATION = Augmentation()
# The test goes further in every respect and ends with a change that training does not have, JPEG.
TEST_AUGMENTATION = Augmentation(rotation=12.0, scale=0.18, shift=0.12, colour=0.2, blur=0.9, noise=0.05)
TEST_JPEG_QUALITY = 70
# The most noise on the latents, as a share of their standard deviation.
LATENT_NOISE = 0.3


def train_judge(
    dataset: Dataset, vae: AutoencoderKL, settings: JudgeSettings, accelerator: Accelerator
) -> tuple[Judge, dict[str, float]]:
    """
    Train the judge and test it on held-out augmentations.

    Args:
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]): The pictures and their words.
        vae ([`~diffusers.AutoencoderKL`]): The autoencoder of the model whose pictures will be judged.
        settings ([`JudgeSettings`]): Steps, sizes and the seed.
        accelerator ([`~accelerate.Accelerator`]): Where to compute.

    Returns:
        `tuple`: The judge and its held-out accuracy, `{"object": …, "style": …}`.
    """
    set_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    vae = vae.to(accelerator.device).eval()
    pixels, objects, styles = _examples(dataset)
    # The copies are changed before the autoencoder and, in the batch, once more after it: generated pictures are decoded
    # ones too, and what the decoder does to a shape depends on where it lies.
    copies = [autoencode(TRAIN_AUGMENTATION(pixels, generator), vae, generator) for _ in range(settings.copies)]
    pool = torch.stack([pixels, *copies])

    net = JudgeNet(len(dataset.objects), len(dataset.styles)).to(accelerator.device)

    def loss() -> torch.Tensor:
        # Half of the batch are pictures as they are, half went through the autoencoder.
        copy = torch.randint(1, len(pool), (settings.batch_size,), generator=generator)
        copy *= torch.randint(0, 2, (settings.batch_size,), generator=generator)
        index = torch.randint(0, len(pixels), (settings.batch_size,), generator=generator)
        batch = TRAIN_AUGMENTATION(pool[copy, index].to(accelerator.device), generator)
        with torch.autocast(accelerator.device.type, dtype=torch.bfloat16):
            object_logits, style_logits = net(batch)
        object_loss = F.cross_entropy(
            object_logits.float(), objects[index].to(accelerator.device), label_smoothing=0.05
        )
        style_loss = F.cross_entropy(style_logits.float(), styles[index].to(accelerator.device), label_smoothing=0.05)
        return object_loss + style_loss

    train(
        "judge",
        [net],
        loss,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.05,
        accelerator=accelerator,
    )
    judge = Judge(net, dataset.objects, dataset.styles, dataset.size)
    return judge, held_out_accuracy(judge, dataset, vae, draws=settings.test_draws, seed=settings.seed + 1_000_003)


def held_out_accuracy(
    judge: Judge, dataset: Dataset, vae: AutoencoderKL, draws: int = 10, seed: int = 1_000_003
) -> dict[str, float]:
    """
    Test a judge on augmentations that it was not trained on.

    Args:
        judge ([`~diffusers_erasure.demo.judge.Judge`]): The judge.
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]): The pictures and their words.
        vae ([`~diffusers.AutoencoderKL`]): Applied after the augmentation, as generated pictures come out of it.
        draws (`int`, *optional*, defaults to 10): Test pictures made from each picture.
        seed (`int`, *optional*, defaults to 1000003): Seeds the draws.

    Returns:
        `dict[str, float]`: The accuracy of `object` and of `style`.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels, objects, styles = _examples(dataset)
    seen_objects, seen_styles = [], []
    for _ in range(draws):
        changed = autoencode(TEST_AUGMENTATION(pixels, generator), vae, generator)
        result = judge.predict(_jpeg(changed, TEST_JPEG_QUALITY))
        seen_objects.append(result.object_indices == objects.numpy())
        seen_styles.append(result.style_indices == styles.numpy())
    return {"object": float(np.mean(seen_objects)), "style": float(np.mean(seen_styles))}


@torch.no_grad()
def autoencode(
    pixels: torch.Tensor, vae: AutoencoderKL, generator: torch.Generator, batch_size: int = 64
) -> torch.Tensor:
    """Pixels in [0, 1] through encoder and decoder, with a little noise on the latents as sampling leaves it there."""
    outputs = []
    for chunk in pixels.split(batch_size):
        with torch.autocast(vae.device.type, dtype=torch.bfloat16):
            latents = vae.encode(2 * chunk.to(vae.device) - 1).latent_dist.mode()
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            level = torch.rand(len(latents), 1, 1, 1, generator=generator).to(latents)
            decoded = vae.decode(latents + LATENT_NOISE / vae.config.scaling_factor * level * noise).sample
        outputs.append((decoded.float().cpu() / 2 + 0.5).clamp(0, 1))
    return torch.cat(outputs)


def _examples(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels in [0, 1], [n, 3, size, size], with the index of each one's object and style."""
    num_objects, num_styles = dataset.images.shape[:2]
    pixels = torch.from_numpy(dataset.images).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    objects = torch.arange(num_objects).repeat_interleave(num_styles)
    return pixels.contiguous(), objects, torch.arange(num_styles).repeat(num_objects)


def _jpeg(pixels: torch.Tensor, quality: int) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for array in (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=quality)
        pictures.append(Image.open(buffer))
    return pictures
