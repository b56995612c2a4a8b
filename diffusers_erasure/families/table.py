"""The table of doors: one row for each family."""

from .doors import Family, Pooled


_TWO_ENCODERS = ("text_encoder", "text_encoder_2")
_TWO_TOKENIZERS = ("tokenizer", "tokenizer_2")
_CROSS = (".attn2.to_k", ".attn2.to_v")
_JOINT = (".attn.add_k_proj", ".attn.add_v_proj")

ROWS_OF_TABLE = (
    Family(
        "stable-diffusion",
        "Stable Diffusion 1.x and 2.x",
        ("UNet2DConditionModel",),
        denoiser="unet",
        causal=("text_encoder",),
        text_sites=_CROSS,
        prediction="scheduler",
        judged=True,
    ),
    Family(
        "stable-diffusion-xl",
        "Stable Diffusion XL",
        ("UNet2DConditionModel",),
        text_encoders=_TWO_ENCODERS,
        tokenizers=_TWO_TOKENIZERS,
        denoiser="unet",
        rows=(("text_encoder", "text_encoder_2"),),
        causal=("text_encoder", "text_encoder_2"),
        pooled=Pooled("text_embeds", "add_embedding.linear_1", ("text_encoder_2",)),
        text_sites=_CROSS,
        prediction="scheduler",
        judged=True,
    ),
    Family(
        "stable-diffusion-3",
        "Stable Diffusion 3 and 3.5",
        ("SD3Transformer2DModel",),
        text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
        rows=(("text_encoder", "text_encoder_2"), ("text_encoder_3",)),
        causal=("text_encoder", "text_encoder_2"),
        door="context_embedder",
        pooled=Pooled(
            "pooled_projections", "time_text_embed.text_embedder.linear_1", ("text_encoder", "text_encoder_2")
        ),
        text_sites=_JOINT,  # `attn2` of SD3.5 medium sees the image alone
        judged=True,
    ),
    Family(
        "flux",
        "FLUX.1",
        ("FluxTransformer2DModel",),
        text_encoders=_TWO_ENCODERS,
        tokenizers=_TWO_TOKENIZERS,
        rows=(("text_encoder_2",),),
        causal=("text_encoder",),
        door="context_embedder",
        pooled=Pooled("pooled_projections", "time_text_embed.text_embedder.linear_1", ("text_encoder",)),
        text_sites=_JOINT,
        clock=(1000.0, 0.0),
        packing=2,
        even_sigmas=True,
        guided=False,
        judged=True,
    ),
    Family(
        "flux-2",
        "FLUX.2",
        ("Flux2Transformer2DModel",),
        causal=("text_encoder",),
        door="context_embedder",
        text_sites=_JOINT,
        clock=(1000.0, 0.0),
        packing=2,
        even_sigmas=True,
    ),
    Family(
        "qwen-image",
        "Qwen-Image",
        ("QwenImageTransformer2DModel",),
        causal=("text_encoder",),
        door="txt_in",
        norm="txt_norm",
        text_sites=_JOINT,
        clock=(1000.0, 0.0),
        packing=2,
        even_sigmas=True,
    ),
    Family(
        "z-image",
        "Z-Image",
        ("ZImageTransformer2DModel",),
        causal=("text_encoder",),
        argument="cap_feats",
        timestep="t",
        door="cap_embedder.1",
        norm="cap_embedder.0",
        clock=(-1000.0, 1000.0),
    ),
    Family(
        "chroma",
        "Chroma",
        ("ChromaTransformer2DModel",),
        door="context_embedder",
        text_sites=_JOINT,
        clock=(1000.0, 0.0),
        packing=2,
        even_sigmas=True,
    ),
    Family(
        "pixart",
        "PixArt-Σ and PixArt-α",
        ("PixArtTransformer2DModel",),
        door="caption_projection.linear_1",
        text_sites=_CROSS,
        prediction="scheduler",
    ),
    Family(
        "sana",
        "SANA",
        ("SanaTransformer2DModel",),
        causal=("text_encoder",),
        door="caption_projection.linear_1",
        text_sites=_CROSS,
    ),
    Family(
        "auraflow",
        "AuraFlow",
        ("AuraFlowTransformer2DModel",),
        door="context_embedder",
        text_sites=_JOINT,
        clock=(1000.0, 0.0),
    ),
    Family(
        "lumina-2",
        "Lumina 2",
        ("Lumina2Transformer2DModel",),
        causal=("text_encoder",),
        door="time_caption_embed.caption_embedder.1",
        norm="time_caption_embed.caption_embedder.0",
        clock=(-1000.0, 1000.0),
        even_sigmas=True,
    ),
    Family(
        "wan",
        "Wan",
        ("WanTransformer3DModel",),
        door="condition_embedder.text_embedder.linear_1",
        text_sites=_CROSS,
    ),
    Family(
        "ltx-video",
        "LTX-Video",
        ("LTXVideoTransformer3DModel",),
        door="caption_projection.linear_1",
        text_sites=_CROSS,
        even_sigmas=True,
    ),
)

FAMILIES = {family.name: family for family in ROWS_OF_TABLE}
# Denoisers by class, with the families that they may belong to.
DENOISERS: dict[str, tuple[Family, ...]] = {
    kind: tuple(family for family in ROWS_OF_TABLE if kind in family.classes)
    for kind in sorted({kind for family in ROWS_OF_TABLE for kind in family.classes})
}
