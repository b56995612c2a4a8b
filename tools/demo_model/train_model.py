"""Trains text encoder and UNet together, from scratch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_erasure.demo.dataset import Dataset
from tools.graph_loop import LoopSettings, train

from .captions import Captions
from .train_vae import encode, to_pixels


@dataclass(frozen=True)
class ModelSettings:
    """
    How text encoder and UNet are trained.

    Args:
        loop ([`~tools.graph_loop.LoopSettings`]): For how long.
        batch_size (`int`): Pictures a step.
        captions (`int`): Captions that are drawn for each picture, before the training.
        empty_share (`float`): Prompts whose rows after the last word are the empty prompt's.
        other_share (`float`): Prompts whose rows after the last word are another prompt's.
        masked_share (`float`): Prompts whose rows after the last word are masked.
        seed (`int`): Seeds weights and draws.
    """

    loop: LoopSettings = field(default_factory=LoopSettings)
    batch_size: int = 128
    captions: int = 200
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
    device: torch.device,
) -> tuple[CLIPTextModel, UNet2DConditionModel, dict[str, float]]:
    """
    Train text encoder and UNet on the latents of the pictures and of their mirror images.

    Args:
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]): The pictures.
        captions ([`~tools.demo_model.captions.Captions`]): Draws their captions.
        vae ([`~diffusers.AutoencoderKL`]): The trained autoencoder.
        tokenizer ([`~transformers.CLIPTokenizer`]): The trained tokenizer.
        settings ([`ModelSettings`]): Steps, sizes and the seed.
        device (`torch.device`): Where to compute; a GPU runs a step as one CUDA graph.

    Returns:
        `tuple`: Text encoder and UNet with their averaged weights, and what the loop measured.
    """
    torch.manual_seed(settings.seed)
    text_encoder = new_text_encoder(tokenizer).to(device)
    unet = new_unet(tokenizer, dataset.size // 8).to(device).train()  # no part has dropout
    kept = new_scheduler().alphas_cumprod.to(device)  # of the picture's variance, by timestep
    vae = vae.to(device)
    pixels = to_pixels(dataset)
    # Mirrored before and not after encoding: the autoencoder is not symmetric.
    latents = torch.stack([encode(pixels, vae), encode(pixels.flip(3), vae)], dim=1) * vae.config.scaling_factor
    latents = latents.to(device)
    texts = draw_captions(captions, dataset, settings.captions, settings.seed)
    tokens = tokenize([*texts, ""], tokenizer).to(device)

    def loss() -> torch.Tensor:
        # All draws on the device, of its own generator: a CUDA graph makes them anew at each replay.
        size = (settings.batch_size,)
        picture = torch.randint(len(latents), size, device=device)
        clean = latents[picture, torch.randint(2, size, device=device)]
        chosen = tokens[picture * settings.captions + torch.randint(settings.captions, size, device=device)]
        rows = text_encoder(torch.cat([chosen, tokens[-1:]]))[0]
        draws = torch.rand(size, device=device)
        rows, mask = hide_padding(rows[:-1], rows[-1], chosen, tokenizer.eos_token_id, settings, draws)
        timesteps = torch.randint(len(kept), size, device=device)
        share = kept[timesteps][:, None, None, None]
        noise = torch.randn_like(clean)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        return F.mse_loss(unet(noisy, timesteps, rows, encoder_attention_mask=mask).sample, noise)

    measured = train([text_encoder, unet], loss, settings.loop)
    return text_encoder.eval(), unet.eval(), measured


def draw_captions(captions: Captions, dataset: Dataset, count: int, seed: int) -> list[str]:
    """So many captions for each picture, picture by picture; the styles of an object are neighbours."""
    rng, styles = random.Random(seed), len(dataset.styles)
    return [
        captions.draw(picture // styles, picture % styles, rng)
        for picture in range(len(dataset.objects) * styles)
        for _ in range(count)
    ]


def hide_padding(
    rows: torch.Tensor,
    empty: torch.Tensor,
    tokens: torch.Tensor,
    eos_token_id: int,
    settings: ModelSettings,
    draws: torch.Tensor,
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
        draws (`torch.Tensor`): Uniform numbers, [n], which decide which.

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

    kind = draws[:, None]
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
