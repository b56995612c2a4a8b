"""Fine-tuning a LoRA as users do, and how far its weights undo an erasure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks.reemergence.new_objects import to_pixels
from benchmarks.reemergence.plan import TrainingSet


TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention, as diffusers' own LoRA scripts have it


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained."""

    rank: int = 8
    learning_rate: float = 5e-4  # twice as much costs the un-erased model most of its other objects
    batch_size: int = 4
    weight_decay: float = 1e-2
    max_norm: float = 1.0


# --------------------------------------------------------------------------------------------------- fine-tuning


def train_lora(
    pipe: Any, data: TrainingSet, checkpoints: Sequence[int], folder: Path, recipe: Recipe, seed: int
) -> list[float]:
    """
    Train a LoRA on the pipeline's UNet with the loss that the model was trained with, and save it on the way.

    Args:
        pipe ([`StableDiffusionPipeline`]): The base; its own weights stay as they are.
        data ([`TrainingSet`]): Pictures with captions.
        checkpoints (sequence of `int`): After which steps to save, to `folder/<step>`; the last one ends the training.
        folder (`Path`): Where to.
        recipe ([`Recipe`]): Rank, rate and batch.
        seed (`int`): Of the LoRA's start, the order of the pictures and flips, the captions, the noise.

    Returns:
        `list[float]`: The loss of each step.
    """
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.requires_grad_(False)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
    )
    pipe.unet.add_adapter(config)
    pipe.unet.to(memory_format=torch.contiguous_format)  # faster than channels last in small batches
    parameters = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    means, deviations = encode_pictures(pipe.vae, data.images)
    device = pipe.unet.device  # all that is random is drawn on the CPU, the same for every device
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    order: list[int] = []
    losses = []
    pipe.unet.train()
    for step in range(1, max(checkpoints) + 1):
        if len(order) < recipe.batch_size:
            fresh = list(range(len(data.images)))
            rng.shuffle(fresh)
            order += fresh
        batch, order = order[: recipe.batch_size], order[recipe.batch_size :]
        with torch.no_grad():
            captions = [data.caption(index, rng) for index in batch]
            rows = pipe.text_encoder(tokens(pipe.tokenizer, captions).to(device))[0]
        flips = [rng.randrange(2) for _ in batch]
        mean, deviation = means[flips, batch], deviations[flips, batch]
        latents = mean + deviation * torch.randn(mean.shape, generator=generator).to(device)
        latents = latents * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator).to(device)
        times = torch.randint(noise_scheduler.config.num_train_timesteps, (len(batch),), generator=generator)
        times = times.to(device)
        noisy = noise_scheduler.add_noise(latents, noise, times)
        loss = F.mse_loss(pipe.unet(noisy, times, rows).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step in checkpoints:
            StableDiffusionPipeline.save_lora_weights(
                folder / str(step),
                unet_lora_layers=get_peft_model_state_dict(pipe.unet),
                unet_lora_adapter_metadata=config.to_dict(),
            )
    pipe.unet.eval()
    return losses


@torch.no_grad()
def noise_loss(pipe: Any, data: TrainingSet, times: Sequence[int] = (200, 500, 800)) -> float:
    """The training's loss on (20 of) its pictures, with a plain caption, always the same noise and no flips."""
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    every = range(0, len(data.images), -(-len(data.images) // 20))
    latents = encode_pictures(pipe.vae, data.images[list(every)])[0][0] * pipe.vae.config.scaling_factor
    captions = [f"a {data.objects[i]} in {data.styles[i]} style" for i in every]
    device = pipe.unet.device
    rows = pipe.text_encoder(tokens(pipe.tokenizer, captions).to(device))[0]
    generator = torch.Generator().manual_seed(0)
    losses = []
    for time in times:
        noise = torch.randn(latents.shape, generator=generator).to(device)
        at = torch.full((len(latents),), time, device=device)
        predicted = pipe.unet(noise_scheduler.add_noise(latents, noise, at), at, rows).sample
        losses.append(F.mse_loss(predicted, noise).item())
    return sum(losses) / len(losses)


def tokens(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:
    """Padded tokens, [n, positions]."""
    length = tokenizer.model_max_length
    return tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_pictures(vae: Any, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents of pictures as they are and flipped, [2, n, channels, height, width] each."""
    pixels = to_pixels(images).to(vae.device) * 2 - 1
    both = [vae.encode(each).latent_dist for each in (pixels, pixels.flip(3))]
    return torch.stack([each.mean for each in both]), torch.stack([each.std for each in both])


# --------------------------------------------------------------------------------------------------- weights


def lora_deltas(pipe: Any) -> dict[str, torch.Tensor]:
    """What the loaded LoRA adds to each weight, by the name of the module in the UNet."""
    deltas = {}
    for name, module in pipe.unet.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A"):
            (adapter,) = module.lora_A
            deltas[name] = module.get_delta_weight(adapter).detach().double()
    return deltas


def weight_changes(erased: Any, clean: Any) -> dict[str, torch.Tensor]:
    """What an exported erasure changed, by the name of the module in the UNet; unchanged weights are left out."""
    before = dict(clean.unet.named_parameters())
    changes = {}
    for name, after in erased.unet.named_parameters():
        if name.endswith(".weight") and not torch.equal(after, before[name]):
            changes[name.removesuffix(".weight")] = (after - before[name]).detach().double()
    return changes


def undoing(fine_tuned: Mapping[str, torch.Tensor], safe: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """
    How far fine-tuning points against an erasure, over the weights that both change, taken as one vector.

    Args:
        fine_tuned (`Mapping[str, torch.Tensor]`): What fine-tuning added to each weight.
        safe (`Mapping[str, torch.Tensor]`): What the erasure added.

    Returns:
        `tuple[float, float]`: The cosine of `fine_tuned` and `-safe`, and the share of `safe` that `fine_tuned` takes back
        (its projection on `-safe`, over the length of `safe`: 1 would be all of it).
    """
    common = sorted(set(fine_tuned) & set(safe))
    if not common:
        return float("nan"), float("nan")
    against = -sum(float((fine_tuned[name] * safe[name]).sum()) for name in common)
    length, safe_length = (
        sum(float(each[name].square().sum()) for name in common) ** 0.5 for each in (fine_tuned, safe)
    )
    return against / max(length * safe_length, 1e-300), against / max(safe_length**2, 1e-300)
