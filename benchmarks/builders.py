"""Models, tokenizers and erasures with made-up weights, for benchmarks and tests: SD 1.5's and SDXL's shapes, and small ones.

Times, operations and bytes do not depend on the values of weights.
"""

import copy
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import nn

from diffusers_erasure import Erasure
from diffusers_erasure.layers.activation import BLEND, FEED_FORWARD, MASK, MEANS, TIMESTEPS, pack
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import BaseModel


# Stable Diffusion 1.5's own unet/config.json and text_encoder/config.json, as far as they differ from the classes' defaults.
UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
TEXT_ENCODER: dict[str, Any] = {
    **{"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_attention_heads": 12},
    **{"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2},
}
# The same of Stable Diffusion XL's UNet.
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The same layouts, all their sites included, small enough for a test.
SMALL_UNET = {**UNET, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": 4}
SMALL_TEXT_ENCODER = {
    **TEXT_ENCODER,
    **{"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"projection_dim": 64, "num_attention_heads": 4},
}
SMALL_SDXL_UNET = {
    **SDXL_UNET,
    **{
        "block_out_channels": (32, 64, 128),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 8),
    },
    **{"cross_attention_dim": 64, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 96},
}


# ------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def make_unet(smoke: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A UNet with random weights; on `device="meta"` without any."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):  # skips torch's own initialisation, which takes longer than all that follows
        unet = UNet2DConditionModel(**(SMALL_UNET if smoke else UNET)).eval().requires_grad_(False)
    if device == "meta":
        return unet
    # In its dtype at once: a copy in float32 would decide about the peak memory.
    unet = unet.to(dtype).to_empty(device="cpu")
    # One block of random numbers over and over, of a prime length so that no two rows of a weight are equal.
    block = torch.rand(1_000_003, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                parameter.fill_(1.0 if name == "weight" else 0.0)
            else:
                scale = (3.0 / max(1, parameter[0].numel())) ** 0.5
                for part in parameter.view(-1).split(len(block)):
                    torch.mul(block[: len(part)], scale, out=part)
    return unet if device == "cpu" else unet.to(device)


def share_weights(model: Any) -> Any:
    """A copy of a model with modules of its own, so that it can be hooked, and the same weights in the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def sd_pipeline(unet: Any, text_encoder: Any, tokenizer: Any, vae: Any = None) -> Any:
    """A Stable Diffusion pipeline of these parts; without a VAE, which neither an erasure nor a LoRA touches, it draws nothing."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def twin(pipe: Any) -> Any:
    """A Stable Diffusion pipeline of the same models for another thread.

    Its own are the scheduler, which keeps count of steps, and the tokenizer, which is set to how each call pads and truncates.
    """
    from diffusers import StableDiffusionPipeline

    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own = {"scheduler": scheduler, "tokenizer": copy.deepcopy(pipe.tokenizer)}
    made = StableDiffusionPipeline(**{**pipe.components, **own}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def make_pipeline(smoke: bool = False, unet: Any = None) -> Any:
    """A pipeline in Stable Diffusion 1.5's shapes, without a VAE, whose tokenizer knows [`made_up_names`]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(**(SMALL_TEXT_ENCODER if smoke else TEXT_ENCODER)))
    unet = make_unet(smoke) if unet is None else unet
    return sd_pipeline(unet, encoder.eval().requires_grad_(False), name_tokenizer(smoke))


@torch.no_grad()
def make_sdxl_text_readers(smoke: bool = False, dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
    """SDXL's UNet of which only the Linears that read text have (random) weights; all others are on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SMALL_SDXL_UNET if smoke else SDXL_UNET)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "add_embedding.linear_1")):
            weight = (torch.rand(module.weight.shape, generator=generator) * 2 - 1) * (3 / module.in_features) ** 0.5
            module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return unet


CONSONANTS, VOWELS = "bcdfghjklmnprstvwxyz", "aeiou"
PROMPT_WORDS = "a an art by drawing image in of painting person photo picture portrait style the".split()


def name_tokenizer(smoke: bool = False) -> Any:
    """A tokenizer of the right size that has prompts' words and made-up ones of two syllables as one piece.

    Words of three syllables are two pieces, and others are cut into syllables and letters. Capitals, which no text reaches,
    fill it up, so that it has nearly as many merges as pieces, as a trained one has.
    """
    from transformers import CLIPTokenizer

    size = (SMALL_TEXT_ENCODER if smoke else TEXT_ENCODER)["vocab_size"]
    syllables = [(c, v) for c in (CONSONANTS[:4] if smoke else CONSONANTS) for v in VOWELS]
    merges = [(c, v + end) for end in ("", "</w>") for c, v in syllables]
    merges += [("".join(first), "".join(second) + "</w>") for first in syllables for second in syllables]
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    capitals = [letter.upper() for letter in CONSONANTS + VOWELS] + [f"{letter.upper()}</w>" for letter in VOWELS]
    unreached = [(a.upper(), b.upper().replace("</W>", "</w>")) for a, b in merges]
    unreached += [(a + b, c + d) for a, b in unreached[: len(syllables)] for c, d in unreached[2 * len(syllables) :]]

    def tokenizer() -> Any:
        pieces = [*letters, *capitals, *dict.fromkeys("".join(merge) for merge in merges)]
        more = unreached[: size - 2 - len(pieces)]
        pieces += ["".join(merge) for merge in more] + ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        return CLIPTokenizer(vocab=vocabulary, merges=[*merges, *more], model_max_length=77)

    cut = tokenizer()
    known = set(merges)
    for word in PROMPT_WORDS:  # what is left of a word is joined from its front
        first, *others = cut.tokenize(word)
        for other in others:
            merge = first, other
            merges += [] if merge in known else [merge]
            known.add(merge)
            first += other
    return tokenizer()


def made_up_names(count: int, smoke: bool = False, seed: int = 0) -> list[str]:
    """Different names of three pieces of [`name_tokenizer`]: one word of two syllables and one of three."""
    consonants = CONSONANTS[:4] if smoke else CONSONANTS
    draw = Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [draw.choice(consonants) + draw.choice(VOWELS) for _ in range(5)]
        names["".join(syllables[:2]) + " " + "".join(syllables[2:])] = None
    return list(names)


def forget_vocabulary(pipe: Any) -> None:
    """Give a pipeline a new tokenizer, whose vocabulary has not been hashed yet, as in a new process."""
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)


class UNetOnly:
    """The least that the erasure functions take for a pipeline: something with a `unet`."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet


# ----------------------------------------------------------------------------------------------------- erasures


def site_of(pipe: Any, name: str) -> nn.Module:
    """The module of a site that is named with its component, as in `unet.conv_in`."""
    component, _, site = name.partition(".")
    model = getattr(pipe, component)
    try:
        return model.get_submodule(site)
    except AttributeError:
        return model.get_submodule(site.removeprefix("text_model."))


def random_factors(module: nn.Module, rank: int, generator: torch.Generator, size: float) -> tuple[torch.Tensor, ...]:
    """`down` and `up` for a module, so large that |up down| is about `size` |W|."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator)
    return down, up * (size * float(weight.detach().float().std()) / rank**0.5)


def random_erasure(
    pipe: Any,
    kind: str,
    sites: Sequence[str],
    rank: int,
    seed: int = 0,
    *,
    size: float = 1.0,
    derived_from: tuple[str, ...] = (),
    base: Any = BaseModel("stable-diffusion"),
    **told: Any,
) -> Erasure:
    """
    An erasure with random tensors.

    Args:
        pipe: Something with the components that the sites name.
        kind (`str`): `"lora"` or `"text_map"`.
        sites (sequence of `str`): With their component; a `text_map` has none.
        rank (`int`): Of each site's factors.
        seed (`int`, *optional*): Of the tensors.
        size (`float`, *optional*): About how large the change is beside the weights.
        derived_from (`tuple[str, ...]`, *optional*): Components that the layers depend on.
        base ([`DiffusionPipeline`] or `BaseModel`, *optional*): Whose fingerprints are recorded; by default none.
        told: What else [`Erasure.from_layers`] takes, the concepts at least.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    if kind == "text_map":
        width = pipe.unet.config.cross_attention_dim
        a = torch.randn(rank, width, generator=generator) * size / width**0.5
        d = torch.randn(rank, width, generator=generator) * size
        layers.append(Layer(kind, ("encoder_hidden_states",), {"A": a, "D": d}, derived_from=derived_from))
    else:
        for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
            names = [name.removeprefix(f"{component}.") for name in sites if name.startswith(f"{component}.")]
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                module = site_of(pipe, f"{component}.{name}")
                tensors[name + DOWN], tensors[name + UP] = random_factors(module, rank, generator, size)
            if names:
                layers.append(Layer(kind, tuple(names), tensors, component, derived_from))
    return Erasure.from_layers(layers, base=base, **told)


def random_activation(unet: Any, timesteps: int, seed: int = 0, density: float = 0.05) -> Erasure:
    """Random masks of a density, and random means, on all feed-forwards of a UNet: an `activation` erasure."""
    generator = torch.Generator().manual_seed(seed)
    sites = {name: part.in_features for name, part in unet.named_modules() if f".{name}".endswith(FEED_FORWARD)}
    tensors = {TIMESTEPS: torch.linspace(999, 0, timesteps + 1)[:-1], BLEND: torch.ones(1)}
    for site, width in sites.items():
        mask = torch.rand(timesteps, width, generator=generator) < density
        tensors[site + MASK] = pack(mask)
        tensors[site + MEANS] = torch.randn(int(mask.sum()), generator=generator)
    layer = Layer("activation", tuple(sites), tensors)
    return Erasure.from_layers([layer], base=BaseModel("stable-diffusion"), concepts="a concept")
