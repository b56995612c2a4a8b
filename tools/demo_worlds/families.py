"""The three families: their parts, untrained, and how each makes text rows, predicts and becomes a pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusers_erasure.denoising.calls import packed
from tools.demo_model.train_model import new_scheduler


CHANNELS = 8  # of the embedded model's VAE, whose latents all families draw
T5_WIDTH = 192
POOLED_HIDDEN = 0.45  # prompts whose pooled vector is the empty prompt's, so that the rows carry the concept too
SIDE = 8  # of the latents


@dataclass(frozen=True)
class Batch:
    """
    What one step is trained on.

    Args:
        latents (`torch.Tensor`): [n, channels, side, side].
        clip (`torch.Tensor`): CLIP's tokens of the captions and, last, of the empty prompt, [n + 1, positions].
        t5 (`torch.Tensor`, *optional*): T5's, likewise.
        draws (`torch.Tensor`): Uniform numbers, [3, n], which decide what of the text is hidden.
    """

    latents: torch.Tensor
    clip: torch.Tensor
    t5: torch.Tensor | None
    draws: torch.Tensor


class Family(ABC):
    """
    One family's text encoders and denoiser.

    Args:
        clip ([`~transformers.CLIPTokenizer`]): CLIP's tokenizer, for all encoders of this kind.
        t5 ([`~transformers.T5Tokenizer`], *optional*): T5's, where the family has such an encoder.
    """

    encoders: dict[str, nn.Module]
    denoiser: nn.Module

    def __init__(self, clip: CLIPTokenizer, t5: T5Tokenizer | None) -> None:
        self.clip, self.t5 = clip, t5

    @abstractmethod
    def loss(self, batch: Batch) -> torch.Tensor:
        """The mean squared error of what the denoiser predicts."""

    @abstractmethod
    def pipeline(self, vae: AutoencoderKL) -> Any:
        """The pipeline, of these very parts."""

    def to(self, device: torch.device) -> None:
        """Put everything on a device. A loss may make no constants on the CPU: no CUDA graph could bring them over."""
        for module in self.modules:
            module.to(device)

    @property
    def modules(self) -> list[nn.Module]:
        """All that is trained."""
        return [self.denoiser, *self.encoders.values()]

    def _clip_config(self, width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(self.clip),
            max_position_embeddings=self.clip.model_max_length,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            bos_token_id=self.clip.bos_token_id,
            eos_token_id=self.clip.eos_token_id,
            pad_token_id=self.clip.pad_token_id,
        )

    def _new_t5(self) -> T5EncoderModel:
        assert self.t5 is not None
        return T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5),
                d_model=T5_WIDTH,
                d_kv=32,
                d_ff=384,
                num_heads=4,
                num_layers=3,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
                use_cache=False,
            )
        )

    def _after_clip(self, batch: Batch) -> torch.Tensor:
        return after_end(batch.clip[:-1], self.clip.eos_token_id)


class StableDiffusionXL(Family):
    """A UNet that reads two CLIP encoders' last rows but one, side by side, and the second's pooled vector."""

    def __init__(self, clip: CLIPTokenizer, t5: None = None) -> None:
        super().__init__(clip, t5)
        self.encoders = {
            "text_encoder": CLIPTextModel(self._clip_config(96)),
            "text_encoder_2": CLIPTextModelWithProjection(self._clip_config(128)),
        }
        self.denoiser = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(48, 96, 96),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            attention_head_dim=4,
            norm_num_groups=16,
            cross_attention_dim=96 + 128,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=128 + 6 * 16,
        )
        self.kept = new_scheduler().alphas_cumprod  # of the picture's variance, by timestep
        self.sizes = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=torch.float32)

    def to(self, device: torch.device) -> None:
        """Put everything on a device."""
        super().to(device)
        self.kept, self.sizes = self.kept.to(device), self.sizes.to(device)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Of the noise. After the last word piece rows are hidden as in the embedded model's training."""
        first = self.encoders["text_encoder"](batch.clip, output_hidden_states=True)
        second = self.encoders["text_encoder_2"](batch.clip, output_hidden_states=True)
        rows, empty = split(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1))
        kind, after, latents = batch.draws[0], self._after_clip(batch), batch.latents
        by_other = (kind >= 0.25) & (kind < 0.40)
        hidden = torch.where((kind < 0.25)[:, None, None], empty, rows)
        hidden = torch.where(by_other[:, None, None], rows.roll(1, 0), hidden)
        rows = torch.where(after[..., None], hidden, rows)
        masked = (kind >= 0.40) & (kind < 0.75)

        timesteps = torch.randint(len(self.kept), (len(latents),), device=latents.device)
        kept = self.kept[timesteps][:, None, None, None]
        noise = torch.randn_like(latents)
        predicted = self.denoiser(
            kept.sqrt() * latents + (1 - kept).sqrt() * noise,
            timesteps,
            rows,
            encoder_attention_mask=~(after & masked[:, None]),
            added_cond_kwargs={
                "text_embeds": hidden_pooled(second[0], batch),
                "time_ids": self.sizes.expand(len(latents), -1),
            },
        ).sample
        return F.mse_loss(predicted, noise)

    def pipeline(self, vae: AutoencoderKL) -> Any:
        """The pipeline, of these very parts."""
        return StableDiffusionXLPipeline(
            vae=vae,
            unet=self.denoiser,
            scheduler=new_scheduler(),
            tokenizer=self.clip,
            tokenizer_2=self.clip,
            add_watermarker=False,
            **self.encoders,
        )


class StableDiffusion3(Family):
    """A transformer that reads two CLIP encoders' rows side by side, then T5's, and both pooled vectors."""

    def __init__(self, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
        super().__init__(clip, t5)
        self.encoders = {
            "text_encoder": CLIPTextModelWithProjection(self._clip_config(64)),
            "text_encoder_2": CLIPTextModelWithProjection(self._clip_config(96)),
            "text_encoder_3": self._new_t5(),
        }
        self.denoiser = SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=160,
            pooled_projection_dim=64 + 96,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )

    def loss(self, batch: Batch) -> torch.Tensor:
        """Of the flow. CLIP's or T5's rows are left out at times, so that none carries the concept alone."""
        first = self.encoders["text_encoder"](batch.clip, output_hidden_states=True)
        second = self.encoders["text_encoder_2"](batch.clip, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip, empty = split(F.pad(clip, (0, T5_WIDTH - clip.shape[-1])))
        t5, t5_empty = split(self.encoders["text_encoder_3"](batch.t5)[0])
        kind, ends = batch.draws[0], (batch.draws[2] > 0.6)[:, None]
        clip = torch.where((kind < 0.3)[:, None, None], empty, clip)
        t5 = torch.where(((kind >= 0.3) & (kind < 0.6))[:, None, None], t5_empty, t5)
        clip = torch.where((self._after_clip(batch) & ends)[..., None], empty, clip)
        t5 = torch.where((after_t5(batch) & ends)[..., None], t5_empty, t5)

        noisy, share, flow = towards_noise(batch)
        predicted = self.denoiser(
            hidden_states=noisy,
            timestep=share * 1000,
            encoder_hidden_states=torch.cat([clip, t5], dim=1),
            pooled_projections=hidden_pooled(torch.cat([first[0], second[0]], dim=-1), batch),
        ).sample
        return F.mse_loss(predicted, flow)

    def pipeline(self, vae: AutoencoderKL) -> Any:
        """The pipeline, of these very parts."""
        vae.register_to_config(shift_factor=0.0)
        return StableDiffusion3Pipeline(
            vae=vae,
            transformer=self.denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            tokenizer=self.clip,
            tokenizer_2=self.clip,
            tokenizer_3=self.t5,
            **self.encoders,
        )


class Flux(Family):
    """A transformer that reads T5's rows, and CLIP's pooled vector; no guidance embedding."""

    def __init__(self, clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
        super().__init__(clip, t5)
        self.encoders = {"text_encoder": CLIPTextModel(self._clip_config(96)), "text_encoder_2": self._new_t5()}
        self.denoiser = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * CHANNELS,
            num_layers=3,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=96,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )

    def loss(self, batch: Batch) -> torch.Tensor:
        """Of the flow. T5's rows after the last word piece are the empty prompt's at times."""
        pooled = self.encoders["text_encoder"](batch.clip).pooler_output
        rows, empty = split(self.encoders["text_encoder_2"](batch.t5)[0])
        rows = torch.where((after_t5(batch) & (batch.draws[0] < 0.35)[:, None])[..., None], empty, rows)
        noisy, share, flow = towards_noise(batch)
        side = torch.arange(SIDE // 2, device=rows.device, dtype=rows.dtype)
        row, column = torch.meshgrid(side, side, indexing="ij")
        places = torch.stack([torch.zeros_like(row), row, column], dim=-1)
        predicted = self.denoiser(
            hidden_states=packed(noisy, 2),
            timestep=share,
            guidance=None,
            pooled_projections=hidden_pooled(pooled, batch),
            encoder_hidden_states=rows,
            txt_ids=rows.new_zeros(rows.shape[1], 3),
            img_ids=places.flatten(0, 1),
        ).sample
        return F.mse_loss(predicted, packed(flow, 2))

    def pipeline(self, vae: AutoencoderKL) -> Any:
        """The pipeline, of these very parts."""
        vae.register_to_config(shift_factor=0.0)
        return FluxPipeline(
            vae=vae,
            transformer=self.denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            tokenizer=self.clip,
            tokenizer_2=self.t5,
            **self.encoders,
        )


FAMILIES: dict[str, type[Family]] = {"sdxl": StableDiffusionXL, "sd3": StableDiffusion3, "flux": Flux}


def split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The captions', and the empty prompt's, which stands last."""
    return rows[:-1], rows[-1:]


def after_end(tokens: torch.Tensor, end: int) -> torch.Tensor:
    """Where a caption has no word any more: from its end token on, [n, positions]."""
    ends = (tokens == end).float().argmax(dim=1)
    return torch.arange(tokens.shape[1], device=tokens.device)[None] >= ends[:, None]


def after_t5(batch: Batch) -> torch.Tensor:
    """The same of T5's tokens."""
    assert batch.t5 is not None
    return after_end(batch.t5[:-1], 1)


def hidden_pooled(pooled: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The captions' pooled vectors, of some the empty prompt's."""
    pooled, empty = split(pooled)
    return torch.where((batch.draws[1] < POOLED_HIDDEN)[:, None], empty, pooled)


def towards_noise(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents with some of the way to the noise gone, how much of it, [n], and the way."""
    latents, noise = batch.latents, torch.randn_like(batch.latents)
    share = torch.sigmoid(torch.randn_like(batch.draws[2]))
    share = torch.where(batch.draws[2] < 0.3, torch.rand_like(share), share)
    gone = share[:, None, None, None]
    return (1 - gone) * latents + gone * noise, share, noise - latents
