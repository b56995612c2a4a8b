"""Tiny pipelines of random weights whose denoisers are transformers that predict velocities; nothing is downloaded."""

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.helpers import TOKENIZER
from tests.tiny_transformers import clip, t5, vae


LENGTH = 12  # text rows that their T5 makes
FLUX_SITES, SD3_SITES = "transformer_blocks.0.attn.", "transformer_blocks.1.attn."


def _tokenizers(count: int) -> list[Any]:
    """CLIP's words for all of them: a T5 has no words of its own before it is trained."""
    found = [CLIPTokenizer.from_pretrained(TOKENIZER) for _ in range(count)]
    found[-1].model_max_length = LENGTH
    return found


def _vae() -> Any:
    return vae(scaling_factor=0.8, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def tiny_flux_pipe(seed: int = 0, *, guidance_embeds: bool = False, **scheduler: Any) -> Any:
    """A `FluxPipeline` with two double and two single blocks, whose VAE makes 16 x 16 pixels of 8 x 8 latents."""
    tokenizers = _tokenizers(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        ).eval()
        encoders = clip(CLIPTextModel, 32, tokenizers[0], 3), t5(32, tokenizers[1], 1.0)
        decoder = _vae()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=decoder,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_pipe(seed: int = 0, **scheduler: Any) -> Any:
    """A `StableDiffusion3Pipeline` of two blocks, the second of which has SD3.5's attention of the image alone too."""
    tokenizers = _tokenizers(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(1,),
            qk_norm="rms_norm",
        ).eval()
        clips = [clip(CLIPTextModelWithProjection, 16, tokenizer, 3) for tokenizer in tokenizers[:2]]
        third, decoder = t5(32, tokenizers[2], 1.0), _vae()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=decoder,
        text_encoder=clips[0],
        tokenizer=tokenizers[0],
        text_encoder_2=clips[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=third,
        tokenizer_3=tokenizers[2],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
