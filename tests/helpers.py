"""A tiny pipeline with random weights, random erasures for it, and the dense edit that they are compared with."""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import diffusers_erasure
from benchmarks import builders
from benchmarks.builders import random_factors, site_of
from diffusers_erasure import Erasure, cards, tensors
from diffusers_erasure.base_model import family_of
from diffusers_erasure.live.marks import KEY
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import LORA_FILE, TENSOR_FILE, BaseModel, Concept, ErasureConfig, Method
from diffusers_erasure.training import loop


TOKENIZER = Path(diffusers_erasure.__file__).parent / "demo" / "assets" / "model" / "tokenizer"
WIDTH = 32
PROMPT = "a photo of a red apple"

# Two ways to the same numbers round differently: the erasure adds B(A x) to W x where the oracle multiplies (W + BA) x,
# and batches of other sizes are summed in another order, which the processor's kernels choose. By `roundings` below, a
# UNet's some fifty layers are apart by 20 at most then, and three steps of drawing too, on every set of kernels that was
# tried; an erasure moves images by more than EFFECT (0.1 to 0.3), which is 400,000.
ROUNDINGS = 200
EFFECT = 0.05

STYLE_SITES = ("attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_out.0", "ff.net.2")
UNET_SITES = tuple(
    f"unet.{block}.transformer_blocks.0.attn2.{part}"
    for block in ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.1")
    for part in ("to_k", "to_v")
)
CONV_SITES = ("unet.conv_in", "unet.down_blocks.0.downsamplers.0.conv", "unet.down_blocks.0.resnets.0.conv1")
TEXT_SITES = (
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder.text_model.encoder.layers.1.self_attn.v_proj",
)


def tiny_sd_pipe(
    seed: int = 0, *, cross_attention_dim: int = WIDTH, text_seed: int | None = None, levels: int = 2
) -> Any:
    """A `StableDiffusionPipeline` of a million random weights that draws 16 x 16 images; nothing is downloaded.

    With `levels=1` its UNet is as small as one can be, for what takes long (compilation).
    """
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=WIDTH,
        initializer_factor=5.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed if text_seed is None else text_seed)
        text_encoder = CLIPTextModel(text_config)
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 64)[:levels],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")[-levels:],
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")[:levels],
            mid_block_type="UNetMidBlock2DCrossAttn" if levels > 1 else None,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
    return builders.sd_pipeline(unet.eval(), text_encoder.eval(), tokenizer, vae.eval())


def tiny_sdxl_pipe(seed: int = 0) -> Any:
    """A `StableDiffusionXLPipeline` of random weights with two text encoders, of widths 32 and 48; nothing is downloaded."""
    tokenizer, second = (CLIPTokenizer.from_pretrained(TOKENIZER) for _ in range(2))
    second.pad_token = "!"  # as SDXL's second tokenizer pads
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_factor": 5.0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=32, projection_dim=32, **common))
        encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=48, projection_dim=40, **common))
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=80,
            attention_head_dim=4,
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=40 + 6 * 8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        text_encoder_2=encoder_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, **arguments: Any) -> np.ndarray:
    """The images of a pipeline for one prompt and one seed, values from 0 to 1; every argument can be replaced."""
    defaults: dict[str, Any] = {
        "prompt": PROMPT,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }
    if "prompt_embeds" in arguments:
        del defaults["prompt"]
    result = pipe(**{**defaults, **arguments}).images
    return result.float().numpy() if isinstance(result, torch.Tensor) else result


@cache
def base_images() -> np.ndarray:
    """Those of `tiny_sd_pipe()`, drawn once."""
    drawn = images(tiny_sd_pipe())
    drawn.flags.writeable = False
    return drawn


def noise(pipe: Any, unet: Any = None) -> torch.Tensor:
    """One prediction of a pipeline's UNet for fixed inputs, in the UNet's dtype."""
    generator = torch.Generator().manual_seed(1)
    dtype = pipe.unet.dtype
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    rows = torch.randn(2, 24, pipe.unet.config.cross_attention_dim, generator=generator).to(dtype)
    with torch.no_grad():
        return (pipe.unet if unet is None else unet)(latents, torch.tensor(500), encoder_hidden_states=rows).sample


def rows_of(pipe: Any, prompt: str = PROMPT) -> torch.Tensor:
    """A prompt's text rows."""
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit (but for the sign of zero)."""
    return a.shape == b.shape and bool((a == b).all())


def far(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference."""
    return float(np.abs(a.astype(np.float64) - b).max())


def roundings(actual: Any, oracle: Any, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference of arrays or tensors, in units of `dtype`'s eps times the largest value.

    So many roundings to `dtype`, of numbers as large as the largest one, would have to add up to it.
    """
    a, b = (torch.as_tensor(each).detach().double() for each in (actual, oracle))
    assert a.shape == b.shape
    largest = float(b.abs().max())
    return float((a - b).abs().max()) / (torch.finfo(dtype).eps * largest) if largest else float(a.abs().max())


def assert_like(
    actual: np.ndarray, oracle: np.ndarray, base: np.ndarray, tolerance: float | None = None, ratio: float = 20.0
) -> None:
    """`actual` is the dense edit's output; it could not be if the erasure were off, or on twice."""
    if tolerance is None:
        tolerance = ROUNDINGS * torch.finfo(torch.float32).eps * float(np.abs(oracle).max())
    assert far(oracle, base) > max(EFFECT, ratio * tolerance), (
        f"the erasure has too little effect: {far(oracle, base)}"
    )
    assert far(actual, oracle) <= tolerance, f"{far(actual, oracle)} off; the whole effect is {far(oracle, base)}"


# --------------------------------------------------------------------------------------------------- erasures


def random_erasure(
    pipe: Any,
    kind: str = "lora",
    sites: tuple[str, ...] = UNET_SITES,
    rank: int = 3,
    seed: int = 0,
    *,
    size: float = 1.0,
    derived_from: tuple[str, ...] = (),
    base: BaseModel | None = None,
    concepts: tuple[Concept, ...] = (Concept("zebra", "horse"),),
    method: Method | None = None,
) -> Erasure:
    """An erasure with random tensors. Sites are named with their component; a `text_map` has none."""
    return builders.random_erasure(
        *(pipe, kind, sites, rank, seed),
        size=size,
        derived_from=derived_from,
        base=pipe if base is None else base,
        concepts=concepts,
        method=method or Method("random", settings={"seed": seed}, seed=seed),
    )


def random_gates(example: torch.Tensor, pooled: int = 0, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Tensors of a `gated_map` with two gates: one that any prompt with a row like an example's [C] opens, and one that none does."""
    generator, width = torch.Generator().manual_seed(13), len(example)
    row = torch.nn.functional.normalize(example.detach().float(), dim=0)
    far_along = torch.stack([0.01 * row @ example.float(), 1e4 * example.norm()])
    tensors = {
        "probes": torch.stack([row, row]),
        "thresholds": torch.stack(
            [far_along.bfloat16().float(), far_along - far_along.bfloat16().float()], 1
        ).detach(),
        "probe_counts": torch.ones(2),
    }
    for prefix, columns in (("", width), ("pooled_", pooled)):
        if columns:
            tensors[prefix + "A"] = size * torch.randn(5, columns, generator=generator) / columns**0.5
            tensors[prefix + "D"] = torch.randn(5, columns, generator=generator)
            tensors[prefix + "counts"] = torch.tensor([2.0, 3.0])
    return tensors


def only_family(pipe: Any) -> BaseModel:
    """A base model without fingerprints."""
    return BaseModel(family_of(pipe).name)


def dense_edit(pipe: Any, *erasures: Erasure | tuple[Erasure, float]) -> Any:
    """A copy of a pipeline whose weights were edited, in float64, by the sum of erasures: the oracle.

    A `lora` adds B A to each site's weight; a `text_map` adds W D^T A to each `attn2.to_k` and `attn2.to_v`.
    """
    edited = copy.deepcopy(pipe)
    deltas: dict[nn.Module, torch.Tensor] = {}

    def add(module: nn.Module, delta: torch.Tensor) -> None:
        deltas[module] = deltas.get(module, torch.zeros_like(delta)) + delta

    for pair in erasures:
        erasure, strength = pair if isinstance(pair, tuple) else (pair, 1.0)
        for layer in erasure.config.layers:
            tensors = {name: value.double() for name, value in erasure.layer_tensors(layer).items()}
            if layer.kind == "text_map":
                for name, module in edited.unet.named_modules():
                    if name.endswith(("attn2.to_k", "attn2.to_v")):
                        add(module, strength * module.weight.double() @ tensors["D"].T @ tensors["A"])
                continue
            for site in layer.sites:
                module = site_of(edited, f"{layer.component}.{site}")
                down, up = tensors[site + ".lora_A.weight"], tensors[site + ".lora_B.weight"]
                add(module, strength * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape))
    for module, delta in deltas.items():
        module.weight.data = (module.weight.double() + delta).to(module.weight.dtype)
    return edited


def style_lora(pipe: Any, seed: int = 7, endings: tuple[str, ...] = STYLE_SITES, rank: int = 2) -> dict[str, Any]:
    """A user's LoRA, not zero, on the UNet's modules whose names end so and on the text encoder, as a state dict."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    names = [f"unet.{name}" for name, _ in pipe.unet.named_modules() if name.endswith(endings) and "lora" not in name]
    for name in [*names, "text_encoder.text_model.encoder.layers.1.self_attn.out_proj"]:
        module = site_of(pipe, name)
        down, up = random_factors(getattr(module, "base_layer", module), rank, generator, 0.5)
        state_dict[name + ".lora_A.weight"], state_dict[name + ".lora_B.weight"] = down, up
    return state_dict


def load_style(pipe: Any) -> None:
    """Load a user's LoRA as the adapter "style"."""
    pipe.load_lora_weights(style_lora(tiny_sd_pipe()), adapter_name="style")


def cast_to_float8(pipe: Any) -> None:
    """Store the UNet's weights as float8 and compute with them in float32."""
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def normal(*shape: int, seed: int) -> torch.Tensor:
    """Normal draws in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------- "as it was before"


def _hooks(module: nn.Module) -> tuple[int, ...]:
    kinds = ("forward", "forward_pre", "backward", "backward_pre", "state_dict", "load_state_dict_pre")
    names = [f"_{kind}_hooks" for kind in kinds]
    return tuple(len(getattr(module, name)) for name in names)


def models(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's models by name."""
    return {name: value for name, value in pipe.components.items() if isinstance(value, nn.Module)}


def tree(pipe: Any) -> dict[str, Any]:
    """Everything that attaching could change: modules and their hooks, own attributes, buffers, the pipeline's own."""
    found: dict[str, Any] = {"pipeline": sorted(vars(pipe)), "config": sorted(pipe.config)}
    for component, model in models(pipe).items():
        for name, module in model.named_modules():
            found[f"{component}.{name}"] = (id(module), _hooks(module), sorted(vars(module)))
        found[component] = (
            list(model.state_dict()),
            [name for name, _ in model.named_parameters()],
            [name for name, _ in model.named_buffers()],
        )
    return found


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights, without the marks of erasures."""
    return {
        f"{component}.{name}": value.clone()
        for component, model in models(pipe).items()
        for name, value in model.state_dict().items()
        if not is_mark(name)
    }


def is_mark(name: str) -> bool:
    """Whether a key of a state dict only tells that an erasure is on."""
    return name.endswith(KEY.partition("{}")[2])


def unchanged_by(pipe: Any, action: Callable[[], Any]) -> Any:
    """Run `action`; assert that tree, weights and images of the pipeline are exactly as before. Returns its result."""
    drawn = images(pipe)  # first, as a call leaves attributes on the pipeline
    before, values = tree(pipe), weights(pipe)
    result = action()
    assert tree(pipe) == before
    assert_same_weights(values, weights(pipe))
    assert equal(images(pipe), drawn)
    return result


def assert_same_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_merged_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """The same sums in float64, perhaps in another order, rounded once.

    So all are equal but for the few, if any, that lie between two numbers of the dtype; these are neighbours.
    """
    assert a.keys() == b.keys()
    for name, value in a.items():
        apart = (value.double() - b[name].double()).abs()
        assert value.dtype == b[name].dtype, name
        if apart.any():
            assert (apart <= torch.finfo(value.dtype).eps * b[name].double().abs()).all(), name
            assert (apart > 0).sum() <= 1 + 1e-3 * apart.numel(), name


def edits(erasure: Erasure) -> dict[str, torch.Tensor]:
    """The change of each weight by a `lora`, or the map of a `text_map` (which then is what acts), in float64.

    They are what is the same where factors are not: any rotation between the two factors leaves it.
    """
    tensors = erasure.tensors.get(TENSOR_FILE, {})
    if "text_map.A" in tensors:
        return {"map": tensors["text_map.D"].double().T @ tensors["text_map.A"].double()}
    file = erasure.tensors[LORA_FILE]
    sites = [name.removesuffix(DOWN) for name in file if name.endswith(DOWN)]
    return {site: file[site + UP].double() @ file[site + DOWN].double() for site in sites}


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count what is done with erasures: configs that are parsed, bytes and contents hashed, values checked, cards."""
    counts: Counter[str] = Counter()
    parse, finite, sealed = ErasureConfig.from_json, torch.isfinite, cards.sealed

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return call

    def sha256(*data: bytes) -> Any:
        counts["files hashed" if data else "contents hashed"] += 1
        return hashlib.sha256(*data)

    with (
        mock.patch.object(ErasureConfig, "from_json", counted("configs parsed", parse)),
        mock.patch.object(tensors, "hashlib", SimpleNamespace(sha256=sha256)),
        mock.patch.object(torch, "isfinite", counted("tensors checked", finite)),
        mock.patch.object(cards, "sealed", counted("cards rendered", sealed)),
    ):
        yield counts


class Cut(BaseException):
    """Stands for whatever ends a process."""


def cut_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a training run end when the given step's checkpoint is written."""
    save = loop.Trainer._save

    def cut(self: Any, state: Any) -> None:
        save(self, state)
        if state.step == step:
            raise Cut

    monkeypatch.setattr(loop.Trainer, "_save", cut)
