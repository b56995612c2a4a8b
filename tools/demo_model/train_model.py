"""Trains text encoder and UNet together, from scratch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_erasure.demo.dataset import Dataset

from .captions import Captions
from .loop import train
from .train_vae import encode, to_pixels


@dataclass(frozen=True)
class ModelSettings:
    """
    How text encoder and UNet are trained.

    Args:
        plain_steps (`int`): Optimiser steps of the first phase, in which prompts are used as they are.
        word_steps (`int`): Optimiser steps of the second phase, in which the words' rows have to carry the concept.
        batch_size (`int`): Pictures a step.
        learning_rate (`float`): The peak of each phase's one-cycle schedule.
        ema_decay (`float`): The highest decay of the moving average of the weights.
        empty_share (`float`): Second phase: prompts whose rows after the last word are the empty prompt's.
        other_share (`float`): Second phase: prompts whose rows after the last word are another prompt's.
        masked_share (`float`): Second phase: prompts whose rows after the last word are masked.
        seed (`int`): Seeds weights and draws.
    """

    plain_steps: int = 2000
    word_steps: int = 4500
    batch_size: int = 48
    learning_rate: float = 1.5e-3
    ema_decay: float = 0.9995
    empty_share: float = 0.25
    other_share: float = 0.15
    masked_share: float = 0.35
    seed: int = 0


def train_model(
    dataset: Dataset,
    captions: Captions,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    settings: ModelSettings,
    accelerator: Accelerator,
) -> tuple[CLIPTextModel, UNet2DConditionModel, dict[str, float]]:
    """
    Train text encoder and UNet on the latents of the pictures and of their mirror images.

    Args:
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]): The pictures.
        captions ([`~tools.demo_model.captions.Captions`]): Draws their captions.
        vae ([`~diffusers.AutoencoderKL`]): The trained autoencoder.
        tokenizer ([`~transformers.CLIPTokenizer`]): The trained tokenizer.
        settings ([`ModelSettings`]): Steps, sizes and the seed.
        accelerator ([`~accelerate.Accelerator`]): Where to compute.

    Returns:
        `tuple`: Text encoder and UNet with their averaged weights, and the mean loss of each phase's last tenth.
    """
    set_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    device = accelerator.device
    text_encoder = new_text_encoder(tokenizer).to(device)
    unet = new_unet(tokenizer, dataset.size // 8).to(device)
    scheduler = new_scheduler()
    vae = vae.to(device)
    pixels = to_pixels(dataset)
    # Mirrored before and not after encoding: the autoencoder is not symmetric.
    latents = torch.stack([encode(pixels, vae), encode(pixels.flip(3), vae)]) * vae.config.scaling_factor
    num_styles = len(dataset.styles)

    def draw_loss(by_word_rows: bool) -> torch.Tensor:
        count = settings.batch_size
        index = torch.randint(0, latents.shape[1], (count,), generator=generator)
        mirrored = torch.randint(0, 2, (count,), generator=generator)
        clean = latents[mirrored, index]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (count,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        prompts = [captions.draw(item // num_styles, item % num_styles, rng) for item in index.tolist()]
        tokens = tokenize([*prompts, ""], tokenizer).to(device)
        rows = text_encoder(tokens)[0]
        rows, empty = rows[:-1], rows[-1]
        mask = None
        if by_word_rows:
            rows, mask = hide_padding(rows, empty, tokens[:-1], tokenizer.eos_token_id, settings, generator)
        predicted = unet(noisy.to(device), timesteps.to(device), rows, encoder_attention_mask=mask).sample
        return F.mse_loss(predicted.float(), noise.to(device))

    parameters = [*text_encoder.parameters(), *unet.parameters()]
    measured = {}
    for name, steps in (("plain", settings.plain_steps), ("word", settings.word_steps)):
        if steps == 0:
            continue
        ema = EMAModel(parameters, decay=settings.ema_decay)
        losses = train(
            f"model, {name} phase",
            [text_encoder, unet],
            partial(draw_loss, by_word_rows=name == "word"),
            steps=steps,
            learning_rate=settings.learning_rate,
            accelerator=accelerator,
            ema=ema,
        )
        ema.copy_to(parameters)
        tail = losses[-max(1, steps // 10) :]
        measured[f"{name}_loss"] = sum(tail) / len(tail)
    return text_encoder, unet, measured


def hide_padding(
    rows: torch.Tensor,
    empty: torch.Tensor,
    tokens: torch.Tensor,
    eos_token_id: int,
    settings: ModelSettings,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Take the concept out of the rows after the last word piece, so that the model has to read it from the words' rows.

    Trained without this, the model reads everything from the end-of-text row and the padding after it, which see the
    whole prompt; then editing a word's row, as closed-form methods do, changes nothing.

    Args:
        rows (`torch.Tensor`): The encoded prompts, [n, positions, width].
        empty (`torch.Tensor`): The encoded empty prompt, [positions, width].
        tokens (`torch.Tensor`): The prompts' tokens, [n, positions].
        eos_token_id (`int`): The token which ends a prompt and pads it.
        settings ([`ModelSettings`]): The shares of prompts that each change is made to.
        generator (`torch.Generator`): Decides which.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The changed rows, and the mask for cross-attention, [n, positions].
    """
    count, positions = tokens.shape
    padding = tokens == eos_token_id
    end = padding.int().argmax(dim=1)
    # Another prompt's rows from its own end on: its words must not come along.
    other = torch.arange(count, device=rows.device).roll(1)
    positions_of_other = torch.maximum(torch.arange(positions, device=rows.device), end[other][:, None])
    others_rows = rows[other[:, None], positions_of_other]

    kind = torch.rand(count, generator=generator).to(rows.device)[:, None]
    by_empty = kind < settings.empty_share
    by_other = ~by_empty & (kind < settings.empty_share + settings.other_share)
    masked = ~by_empty & ~by_other & (kind < settings.empty_share + settings.other_share + settings.masked_share)
    rows = torch.where((padding & by_empty)[:, :, None], empty, rows)
    rows = torch.where((padding & by_other)[:, :, None], others_rows, rows)
    return rows, ~(padding & masked)


def tokenize(prompts: list[str], tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Padded tokens, [n, positions]."""
    return tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of the embedded model's architecture."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet(tokenizer: CLIPTokenizer, sample_size: int) -> UNet2DConditionModel:
    """An untrained UNet of the embedded model's architecture."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """The scheduler of the embedded model: Stable Diffusion's betas."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
