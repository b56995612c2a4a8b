"""A pipeline of each family with a tiny random denoiser, no text encoder and no VAE: prompts come as rows, latents go out.

What enters where is written here by hand, and not taken from the library's table, which it is to check.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusers_erasure import Erasure
from diffusers_erasure.layers.layer import Layer


ROWS, DOOR, POOLED = "encoder_hidden_states", "door_input", "pooled_projections"
CONTEXT = {ROWS: ("context_embedder",)}
BOTH = {**CONTEXT, POOLED: ("time_text_embed.text_embedder.linear_1",)}
CAPTION = {ROWS: ("caption_projection.linear_1",)}
LENGTH = 6  # text rows
EXACT = 1e-5  # relative
EFFECT = 1e-2  # the same: what a map changes at the least
SCHEDULE = torch.tensor([[1.0], [0.0]])  # it acts in the half next to the picture
FLUX, SD3, QWEN, Z = "FLUX.1 dev", "SD3", "Qwen-Image", "Z-Image"
KINDS = FLUX, SD3, QWEN  # with rows and a pooled vector, and with a norm before the door


@dataclass(frozen=True)
class Tiny:
    """A pipeline of a family.

    Attributes:
        family: the family's name.
        pipeline, denoiser: the classes in diffusers.
        config: the denoiser's.
        doors: for each input that a map may act on the Linears that read it; a dot at the front is for all that end so.
        widths: of the inputs.
        call: further arguments of the pipeline.
        parts: components that are no model.
        predicts: `"flow"`, or what a DDIM scheduler is told.
        loads_loras: whether stock diffusers loads LoRAs into such a pipeline.
        packed: the tokens that the latents of 8 x 8 are given as to the denoiser; 0 where they stay a picture.
    """

    family: str
    pipeline: str
    denoiser: str
    config: Mapping[str, Any]
    doors: Mapping[str, tuple[str, ...]]
    widths: Mapping[str, int]
    call: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("text_encoder", "tokenizer", "vae")
    predicts: str = "flow"
    loads_loras: bool = True
    packed: int = 0

    @property
    def component(self) -> str:
        """The pipeline's attribute that holds the denoiser."""
        return "unet" if "UNet" in self.denoiser else "transformer"

    def make(self) -> Any:
        """The pipeline; all calls give equal ones."""
        given: dict[str, Any] = dict.fromkeys(self.parts)
        extra = {"requires_safety_checker": False} if self.pipeline == "StableDiffusionPipeline" else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(diffusers, self.denoiser)(**self.config)
            if "Img2Img" in self.pipeline:  # the refiner's asks a VAE how its latents are scaled
                extra = {"requires_aesthetics_score": True}
                given["vae"] = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
        fill(model)
        given[self.component] = model.eval().requires_grad_(False)
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        if self.predicts != "flow":
            options = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
            scheduler = DDIMScheduler(prediction_type=self.predicts, **options)
        pipe = getattr(diffusers, self.pipeline)(scheduler=scheduler, **given, **extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, steps: int = 2, **arguments: Any) -> torch.Tensor:
        """What the pipeline makes of one prompt, or of as many as `arguments` have rows of."""
        generator = torch.Generator().manual_seed(1)
        given = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", "return_dict": False}
        with torch.no_grad():
            return pipe(**{**given, **texts(self), **self.call, **arguments})[0]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random numbers for all parameters, so that none is zero and text has a say."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(drawn * (parameter[0].numel() ** -0.5))
        else:
            parameter.copy_(0.1 * drawn + (1.0 if name.endswith("weight") else 0.0))


def rows(width: int, seed: int = 3, batch: int = 1, length: int = LENGTH) -> torch.Tensor:
    """Text rows, [batch, length, width]."""
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def texts(tiny: Tiny, batch: int = 1) -> dict[str, Any]:
    """Prompts and negative prompts, as the pipeline takes them."""
    found: dict[str, Any] = {}
    for index, sign in enumerate(("", "negative_")):
        text = rows(tiny.widths.get(ROWS, 0), 3 + index, batch)
        found[f"{sign}prompt_embeds"] = list(text) if tiny.family == "z-image" else text
        mask = torch.ones(batch, LENGTH, dtype=torch.bool if tiny.family == "chroma" else torch.long)
        if tiny.family in ("pixart", "sana", "auraflow", "lumina-2", "ltx-video", "chroma"):
            found[f"{sign}prompt_attention_mask"] = mask
        if tiny.family == "qwen-image":
            found[f"{sign}prompt_embeds_mask"] = mask
        for pooled in (POOLED, "text_embeds"):
            if pooled in tiny.widths:
                found[f"{sign}pooled_prompt_embeds"] = rows(tiny.widths[pooled], 5 + index, batch, 1).squeeze(1)
    if tiny.family == "flux-2":
        del found["negative_prompt_embeds"]
    if tiny.family in ("pixart", "sana"):
        found["negative_prompt"] = None  # it is "" by default
    return found


UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
PROJECTIONS = {ROWS: (".attn2.to_k", ".attn2.to_v")}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
POOLED_XL = {**PROJECTIONS, "text_embeds": ("add_embedding.linear_1",)}
SIZE = {"height": 64, "width": 64}
FLUX_SIZES = {
    **{"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
    **{"joint_attention_dim": 20, "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)},
}
SD3_SIZES = {
    **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8},
    **{"num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 20, "pooled_projection_dim": 12},
    **{"out_channels": 4, "pos_embed_max_size": 8},
}
THREE = tuple(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")) + ("vae",)
TWO = tuple(name for name in THREE if not name.endswith("_3"))
SANA = {
    **{"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2},
    **{"attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8},
    **{"cross_attention_dim": 16, "caption_channels": 20, "sample_size": 8},
}
SMALL = {"height": 256, "width": 256, "use_resolution_binning": False}  # SANA's VAE makes 8 x 8 of it
SD3_DENOISER, BOTH_WIDTHS = "SD3Transformer2DModel", {ROWS: 20, POOLED: 12}

FAMILIES: dict[str, Tiny] = {
    "SD 2": Tiny(
        *("stable-diffusion", "StableDiffusionPipeline", "UNet2DConditionModel"),
        *({**UNET, "cross_attention_dim": 20}, PROJECTIONS, {ROWS: 20}, {**SIZE, "guidance_scale": 3.0}),
        parts=("text_encoder", "tokenizer", "vae", "safety_checker", "feature_extractor"),
        predicts="v_prediction",
    ),
    "SDXL": Tiny(
        *("stable-diffusion-xl", "StableDiffusionXLPipeline", "UNet2DConditionModel"),
        {**UNET, **XL, "cross_attention_dim": 20, "projection_class_embeddings_input_dim": 12 + 6 * 8},
        *(POOLED_XL, {ROWS: 20, "text_embeds": 12}, {**SIZE, "guidance_scale": 3.0}, TWO),
        predicts="epsilon",
    ),
    "SDXL refiner": Tiny(  # both encoders are missing, as prompts come as rows
        *("stable-diffusion-xl", "StableDiffusionXLImg2ImgPipeline", "UNet2DConditionModel"),
        {**UNET, **XL, "cross_attention_dim": 16, "projection_class_embeddings_input_dim": 12 + 5 * 8},
        *(POOLED_XL, {ROWS: 16, "text_embeds": 12}),
        {"image": rows(16, 7, 4, 4).reshape(1, 4, 8, 8), "strength": 1.0, "guidance_scale": 3.0},
        *(TWO, "epsilon"),
    ),
    "SD3": Tiny(
        *("stable-diffusion-3", "StableDiffusion3Pipeline", SD3_DENOISER, SD3_SIZES, BOTH, BOTH_WIDTHS),
        *({**SIZE, "guidance_scale": 3.0}, THREE),
    ),
    "SD3.5 medium": Tiny(
        *("stable-diffusion-3", "StableDiffusion3Pipeline", SD3_DENOISER),
        *({**SD3_SIZES, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}, BOTH, BOTH_WIDTHS, SIZE, THREE),
    ),
    "FLUX.1 dev": Tiny(
        *(
            "flux",
            "FluxPipeline",
            "FluxTransformer2DModel",
            {**FLUX_SIZES, "guidance_embeds": True},
            BOTH,
            BOTH_WIDTHS,
        ),
        *(SIZE, TWO),
        packed=16,
    ),
    "FLUX.1 schnell": Tiny(
        *("flux", "FluxPipeline", "FluxTransformer2DModel", FLUX_SIZES, BOTH, BOTH_WIDTHS, SIZE, TWO), packed=16
    ),
    "FLUX.2": Tiny(
        *("flux-2", "Flux2Pipeline", "Flux2Transformer2DModel"),
        {
            **{"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16},
            **{"num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 4, 4, 4)},
            "timestep_guidance_channels": 16,
        },
        *(CONTEXT, {ROWS: 20}, SIZE),
        packed=16,
    ),
    "Qwen-Image": Tiny(
        *("qwen-image", "QwenImagePipeline", "QwenImageTransformer2DModel"),
        {
            **{"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16},
            **{"num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (8, 4, 4)},
        },
        *({DOOR: ("txt_in",)}, {ROWS: 20}, {**SIZE, "true_cfg_scale": 3.0}),
        packed=16,
    ),
    "Z-Image": Tiny(
        *("z-image", "ZImagePipeline", "ZImageTransformer2DModel"),
        {
            **{"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
            **{"cap_feat_dim": 20, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]},
        },
        *({DOOR: ("cap_embedder.1",)}, {ROWS: 20}, {**SIZE, "guidance_scale": 3.0}),
    ),
    "Chroma": Tiny(
        *("chroma", "ChromaPipeline", "ChromaTransformer2DModel"),
        {
            **{key: value for key, value in FLUX_SIZES.items() if key != "pooled_projection_dim"},
            **{"approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16},
        },
        *(CONTEXT, {ROWS: 20}, {**SIZE, "guidance_scale": 3.0}),
        packed=16,
    ),
    "PixArt-Σ": Tiny(
        *("pixart", "PixArtSigmaPipeline", "PixArtTransformer2DModel"),
        {
            **{"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2},
            **{"caption_channels": 20, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16},
        },
        *(CAPTION, {ROWS: 20}, {**SIZE, "guidance_scale": 3.0, "use_resolution_binning": False}),
        predicts="epsilon",
        loads_loras=False,
    ),
    "SANA": Tiny(
        *(
            "sana",
            "SanaPipeline",
            "SanaTransformer2DModel",
            SANA,
            CAPTION,
            {ROWS: 20},
            {**SMALL, "guidance_scale": 3.0},
        )
    ),
    "SANA, time from 0 to 1": Tiny(
        *("sana", "SanaPipeline", "SanaTransformer2DModel", {**SANA, "timestep_scale": 0.001}, CAPTION, {ROWS: 20}),
        {**SMALL, "guidance_scale": 3.0},
    ),
    "AuraFlow": Tiny(
        *("auraflow", "AuraFlowPipeline", "AuraFlowTransformer2DModel"),
        {
            **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "attention_head_dim": 8},
            **{"num_single_dit_layers": 1, "num_attention_heads": 4, "caption_projection_dim": 32},
            **{"joint_attention_dim": 20, "out_channels": 4, "pos_embed_max_size": 64},
        },
        *(CONTEXT, {ROWS: 20}, {**SIZE, "guidance_scale": 3.0}),
    ),
    "Lumina 2": Tiny(
        *("lumina-2", "Lumina2Pipeline", "Lumina2Transformer2DModel"),
        {
            **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2},
            **{"num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16},
            **{"axes_dim_rope": (8, 4, 4), "cap_feat_dim": 20},
        },
        *({DOOR: ("time_caption_embed.caption_embedder.1",)}, {ROWS: 20}, {**SIZE, "guidance_scale": 3.0}),
    ),
    "Wan": Tiny(
        *("wan", "WanPipeline", "WanTransformer3DModel"),
        {
            **{"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4},
            **{"text_dim": 20, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
        },
        {ROWS: ("condition_embedder.text_embedder.linear_1",)},
        *({ROWS: 20}, {**SIZE, "num_frames": 5, "guidance_scale": 3.0}),
    ),
    "LTX-Video": Tiny(
        *("ltx-video", "LTXPipeline", "LTXVideoTransformer3DModel"),
        {
            **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16},
            **{"cross_attention_dim": 32, "num_layers": 2, "caption_channels": 20},
        },
        *(CAPTION, {ROWS: 20}, {"height": 256, "width": 256, "num_frames": 9, "guidance_scale": 3.0}),
    ),
}


def linears(tiny: Tiny, pipe: Any, source: str) -> dict[str, nn.Linear]:
    """The Linears that read an input, as `doors` says."""
    model: nn.Module = getattr(pipe, tiny.component)
    found = {
        name: module
        for name, module in model.named_modules()
        if any(name == door or (door.startswith(".") and name.endswith(door)) for door in tiny.doors[source])
    }
    assert found and all(isinstance(module, nn.Linear) for module in found.values())
    return found  # type: ignore[return-value]


Maps = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def maps_of(tiny: Tiny, seed: int = 0, sources: tuple[str, ...] = ()) -> Maps:
    """Random maps, `A` and `D` [2, C], of all inputs or of those named."""
    generator = torch.Generator().manual_seed(seed)
    widths = {source: tiny.widths.get(source, tiny.widths[ROWS]) for source in sources or tiny.doors}
    return {
        source: (torch.randn(2, width, generator=generator) / width**0.5, torch.randn(2, width, generator=generator))
        for source, width in widths.items()
    }


def edit(tiny: Tiny, pipe: Any, maps: Maps, strength: float = 1.0) -> Any:
    """Write maps into the weights of what reads them: W + s W Dᵀ A. The oracle; returns the pipeline."""
    for source, (a, d) in maps.items():
        for linear in linears(tiny, pipe, source).values():
            weight = linear.weight.double()
            own, written = a.double(), d.double()
            behind = weight.shape[1] - a.shape[1]  # time embeddings, which are not mapped
            own, written = (nn.functional.pad(each, (0, behind)) for each in (own, written))
            linear.weight.data = (weight + strength * weight @ written.T @ own).float()
    return pipe


@cache
def base(name: str) -> torch.Tensor:
    """What a pipeline makes without any erasure."""
    return FAMILIES[name].draw(FAMILIES[name].make())


@cache
def edited(name: str) -> torch.Tensor:
    """What it makes with the first maps of all inputs in its weights."""
    tiny = FAMILIES[name]
    return tiny.draw(edit(tiny, tiny.make(), maps_of(tiny)))


def erasure_of(tiny: Tiny, pipe: Any, maps: Maps, schedule: torch.Tensor | None = None) -> Erasure:
    layers = [
        Layer("text_map", (source,), {"A": a, "D": d}, tiny.component, schedule=schedule)
        for source, (a, d) in maps.items()
    ]
    return Erasure.from_layers(layers, base=pipe, concepts="zebra")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def assert_close(actual: torch.Tensor, oracle: torch.Tensor, plain: torch.Tensor) -> None:
    """`actual` is the oracle's output, which is another than that of the base."""
    assert apart(oracle, plain) > EFFECT
    assert apart(actual, oracle) < EXACT


@cache
def arguments(name: str, batch: int = 2) -> dict[str, Any]:
    """What the pipeline gives its denoiser in the first step."""
    tiny, found = FAMILIES[name], list[dict[str, Any]]()
    pipe = tiny.make()
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: found.append(kwargs), with_kwargs=True)
    more = {} if tiny.family == "qwen-image" else {"guidance_scale": 1.0}
    tiny.draw(pipe, **{**texts(tiny, batch), **more})
    handle.remove()
    return found[0]


def predict(name: str, model: Any, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments(name, batch))[0]


def loaded(name: str, *maps: Maps, schedule: torch.Tensor | None = None) -> Any:
    """A pipeline with an erasure of each of some maps, by default of the first: "0", "1" and so on."""
    tiny = FAMILIES[name]
    pipe = tiny.make()
    for number, each in enumerate(maps or (maps_of(tiny),)):
        pipe.load_erasure(erasure_of(tiny, pipe, each, schedule), str(number))
    return pipe


def oracle(name: str, batch: int = 2, strength: float = 1.0) -> torch.Tensor:
    tiny = FAMILIES[name]
    return predict(name, edit(tiny, tiny.make(), maps_of(tiny), strength).transformer, batch)


def plain(name: str, batch: int = 2) -> torch.Tensor:
    return predict(name, FAMILIES[name].make().transformer, batch)


def summed(*maps: tuple[Maps, float]) -> Maps:
    """Maps at their strengths as one."""
    sources = maps[0][0]
    return {
        source: (
            torch.cat([strength * each[source][0] for each, strength in maps]),
            torch.cat([each[source][1] for each, _ in maps]),
        )
        for source in sources
    }
