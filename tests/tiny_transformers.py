"""Tiny FLUX.1 and Stable Diffusion 3 pipelines with random weights; nothing is downloaded."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
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

from tests.helpers import TOKENIZER, images


WORDS = "a photo of red green apple zebra horse on table the in picture house cat dog".split()
SIDE = 16  # of what they draw
SITES = {  # of LoRAs, one of each sort
    "flux": (
        "context_embedder",
        "time_text_embed.text_embedder.linear_1",
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.1.attn.add_q_proj",
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.0.proj",
        "single_transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.1.proj_mlp",
        "single_transformer_blocks.1.proj_out",
    ),
    "sd3": (
        "context_embedder",
        "time_text_embed.text_embedder.linear_1",
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.1.attn.add_q_proj",
        "transformer_blocks.0.attn.to_add_out",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.0.attn2.to_k",
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.0.proj",
    ),
}


def t5_tokenizer() -> Any:
    """Of a few words, and letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS]
    pieces += [(letter, -9.0) for letter in "▁bcdefghijklmnopqrstuvwxyz,.a"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=64)


def clip(kind: Any, width: int, tokenizer: Any, layers: int = 2) -> Any:
    """A CLIP text encoder of a class."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        projection_dim=width,
        initializer_factor=5.0,
    )
    return kind(config).eval()


def t5(width: int, tokenizer: Any, size: float = 2.0) -> Any:
    """A T5 encoder, with weights of a size."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=64, d_kv=8, num_layers=2, num_heads=4, initializer_factor=size
    )
    return T5EncoderModel(config).eval()


def vae(**settings: Any) -> Any:
    """A VAE of 16 x 16 pixels and 8 x 8 latents."""
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=SIDE,
        **{"scaling_factor": 0.5, "shift_factor": 0.0, **settings},
    ).eval()


def _grown(transformer: Any) -> Any:
    """Random weights so large that the text counts: diffusers starts modulations at zero, and all others small."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.3 * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        del name
    return transformer.eval()


def tiny_flux_pipe(seed: int = 0, *, guidance_embeds: bool = False) -> Any:
    """A `FluxPipeline` of random weights that draws 16 x 16 images: two blocks of both kinds, of 2 x 16."""
    tokenizer, second = CLIPTokenizer.from_pretrained(TOKENIZER), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            transformer=_grown(
                FluxTransformer2DModel(
                    patch_size=1,
                    in_channels=16,
                    num_layers=2,
                    num_single_layers=2,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=40,
                    pooled_projection_dim=24,
                    guidance_embeds=guidance_embeds,
                    axes_dims_rope=(4, 4, 8),
                )
            ),
            vae=vae(),
            text_encoder=clip(CLIPTextModel, 24, tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=t5(40, second),
            tokenizer_2=second,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_pipe(seed: int = 0) -> Any:
    """A `StableDiffusion3Pipeline` of random weights that draws 16 x 16 images: three blocks of 2 x 16.

    Its first block has a second attention, which sees the image alone, as those of SD3.5 medium have.
    """
    first, second, third = (*(CLIPTokenizer.from_pretrained(TOKENIZER) for _ in range(2)), t5_tokenizer())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusion3Pipeline(
            transformer=_grown(
                SD3Transformer2DModel(
                    sample_size=8,
                    patch_size=1,
                    in_channels=4,
                    out_channels=4,
                    num_layers=3,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=56,
                    caption_projection_dim=32,
                    pooled_projection_dim=40,
                    pos_embed_max_size=8,
                    dual_attention_layers=(0,),
                    qk_norm="rms_norm",
                )
            ),
            vae=vae(),
            text_encoder=clip(CLIPTextModelWithProjection, 16, first),
            tokenizer=first,
            text_encoder_2=clip(CLIPTextModelWithProjection, 24, second),
            tokenizer_2=second,
            text_encoder_3=t5(56, third),
            tokenizer_3=third,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPES = {"flux": tiny_flux_pipe, "sd3": tiny_sd3_pipe}


def drawn(pipe: Any, **arguments: Any) -> Any:
    """What a pipeline of these draws, see [`images`]."""
    return images(pipe, **{"height": SIDE, "width": SIDE, "max_sequence_length": 12, **arguments})


def sites_of(kind: str) -> tuple[str, ...]:
    """`SITES` with their component."""
    return tuple(f"transformer.{site}" for site in SITES[kind])
