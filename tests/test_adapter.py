"""The layer kind `adapter`: against plain hooks, on all families, with schedules, gates and others, saved, added up and read from Receler."""

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInputError,
    combine,
    with_gate,
    with_schedule,
)
from diffusers_erasure.layers import adapter
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.schema import TENSOR_FILE, Concept, LayerSpec
from tests.flow_pipes import LENGTH, tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import ROUNDINGS, base_images, equal, far, images, random_erasure, tiny_sd_pipe, tiny_sdxl_pipe


PIPES: dict[str, Callable[[], Any]] = {
    "sd": tiny_sd_pipe,
    "sdxl": tiny_sdxl_pipe,
    "sd3": tiny_sd3_pipe,
    "flux": tiny_flux_pipe,
}
RANK = 3


def denoiser(pipe: Any) -> tuple[str, Any]:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    return name, getattr(pipe, name)


def draw(pipe: Any, **more: Any) -> np.ndarray:
    if hasattr(pipe, "transformer"):
        more = {"height": 16, "width": 16, "max_sequence_length": LENGTH, **more}
    return images(pipe, **more)


def tensors_for(pipe: Any, seed: int = 0, size: float = 1.0) -> dict[str, torch.Tensor]:
    name, model = denoiser(pipe)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in adapter.attentions(name, model):
        width = adapter.width_of(model, site)
        shapes = {
            adapter.DOWN: (RANK, width),
            adapter.DOWN_BIAS: (RANK,),
            adapter.UP: (width, RANK),
            adapter.UP_BIAS: (width,),
        }
        for part, shape in shapes.items():
            scale = size if part.startswith(".up") else 1.0
            found[site + part] = scale * torch.randn(shape, generator=generator)
    return found


def as_erasure(pipe: Any, tensors: dict[str, torch.Tensor], concept: str = "zebra") -> Erasure:
    name, _ = denoiser(pipe)
    sites = tuple(dict.fromkeys(key.removesuffix(adapter.DOWN) for key in tensors if key.endswith(adapter.DOWN)))
    layer = Layer("adapter", sites, tensors, name)
    return Erasure.from_layers([layer], base=pipe, concepts=Concept(concept, "horse"), method="random")


@cache
def erasure_of(kind: str, seed: int = 0) -> Erasure:
    pipe = PIPES[kind]()
    return as_erasure(pipe, tensors_for(pipe, seed), f"zebra {seed}")


@cache
def base_of(kind: str) -> np.ndarray:
    return draw(PIPES[kind]())


def plain(pipe: Any, tensors: dict[str, torch.Tensor], strength: float = 1.0) -> Any:
    """A pipeline with the same by hooks of torch alone."""
    _, model = denoiser(pipe)
    for site in {key.removesuffix(adapter.DOWN) for key in tensors if key.endswith(adapter.DOWN)}:
        own = [tensors[site + part] for part in adapter.PARTS]

        def behind(module: nn.Module, args: Any, output: Any, own: list[torch.Tensor] = own) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            hidden = F.gelu(first @ own[0].T + own[1])
            first = first + strength * (hidden @ own[2].T + own[3])
            return (first, *output[1:]) if isinstance(output, tuple) else first

        model.get_submodule(site).register_forward_hook(behind)
    return pipe


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return far(a, b) <= ROUNDINGS * torch.finfo(torch.float32).eps * float(np.abs(b).max())


# -------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("kind", list(PIPES))
def test_it_does_what_plain_hooks_do_and_leaves_nothing(kind: str) -> None:
    pipe, tensors = PIPES[kind](), tensors_for(PIPES[kind]())
    pipe.load_erasure(as_erasure(pipe, tensors), "no-zebra")
    found, expected = draw(pipe), draw(plain(PIPES[kind](), tensors))
    assert far(expected, base_of(kind)) > 0.02 and near(found, expected)
    pipe.set_erasures("no-zebra", 0.4)
    assert near(draw(pipe), draw(plain(PIPES[kind](), tensors, 0.4)))
    pipe.set_erasures("no-zebra", 0.0)
    assert equal(draw(pipe), base_of(kind))
    pipe.unload_erasure()
    assert equal(draw(pipe), base_of(kind))


def test_only_attentions_that_read_text_are_sites() -> None:
    assert all(site.endswith(".attn2") for site in adapter.attentions("unet", tiny_sd_pipe().unet))
    flux, sd3 = tiny_flux_pipe().transformer, tiny_sd3_pipe().transformer
    assert adapter.attentions("transformer", flux) == [
        f"transformer_blocks.{i}.attn" for i in range(len(flux.transformer_blocks))
    ]
    assert adapter.attentions("transformer", sd3)[0] == "transformer_blocks.0.attn"


def test_several_add_what_each_reads_of_the_attention_alone() -> None:
    """Not of one another: the order does not matter, and strengths by picture hold for each."""
    pipe = tiny_sd_pipe()
    pipe.load_erasure(erasure_of("sd", 1), "one")
    pipe.load_erasure(erasure_of("sd", 2), "two")
    both = draw(pipe)
    other = tiny_sd_pipe()
    other.load_erasure(erasure_of("sd", 2), "two")
    other.load_erasure(erasure_of("sd", 1), "one")
    assert near(draw(other), both)
    summed = combine([erasure_of("sd", 1), erasure_of("sd", 2)], mode="sum")
    alone = tiny_sd_pipe()
    alone.load_erasure(summed, "both")
    assert near(draw(alone), both)
    with pytest.raises(ErasureInputError, match="not linear"):
        combine([erasure_of("sd", 1), erasure_of("sd", 2)], mode="sum", rank=2)
    # the first picture with one of them, the second with the other
    prompts = ["a zebra on a hill"] * 2
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4)).repeat(2, 1, 1, 1)
    with pipe.erasure_strengths({"one": [1.0, 0.0], "two": [0.0, 0.5]}):
        mixed = draw(pipe, prompt=prompts, latents=noise)
    for row, strengths in enumerate(({"one": 1.0, "two": 0.0}, {"one": 0.0, "two": 0.5})):
        with pipe.erasure_strengths(strengths):
            assert near(mixed[row : row + 1], draw(pipe, prompt=prompts, latents=noise)[row : row + 1])


def test_schedules_and_gates_act(pipe: Any) -> None:
    erasure = erasure_of("sd")
    pipe.load_erasure(with_schedule(erasure, [0.0] * 20), "off")
    assert near(draw(pipe), base_images())
    pipe.unload_erasure()
    pipe.load_erasure(with_schedule(erasure, [1.0] * 20), "on")
    whole = tiny_sd_pipe()
    whole.load_erasure(erasure, "on")
    assert near(draw(pipe), draw(whole))
    pipe.unload_erasure()
    pipe.load_erasure(with_gate(erasure, pipe, "zebra"), "gated")
    assert far(draw(pipe), base_images()) > 1e-3


def test_it_composes_with_a_lora_as_hooks_do() -> None:
    """The LoRA changes what the attention gives, on its own output projection too; the adapter reads that."""
    pipe, tensors = tiny_sd_pipe(), tensors_for(tiny_sd_pipe())
    sites = tuple(f"unet.{site}.to_out.0" for site in adapter.attentions("unet", pipe.unet))
    lora = random_erasure(pipe, "lora", sites, size=0.5)
    pipe.load_erasure(as_erasure(pipe, tensors), "adapter")
    pipe.load_erasure(lora, "lora")
    found = draw(pipe)
    expected = tiny_sd_pipe()
    expected.load_erasure(lora, "lora")
    assert near(found, draw(plain(expected, tensors)))
    pipe.fuse_erasures("lora")
    assert near(draw(pipe), found)
    with pytest.raises(ErasureCompatibilityError, match="no change of weights"):
        pipe.fuse_erasures("adapter")


def test_copies_pickles_and_dtypes(pipe: Any) -> None:
    pipe.load_erasure(erasure_of("sd"), "no-zebra")
    expected = draw(pipe)
    for again in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        other = tiny_sd_pipe()
        other.unet = again
        assert equal(draw(other), expected)
    pipe.to(torch.bfloat16)
    assert far(draw(pipe), expected) < 0.2 and far(draw(pipe), base_images()) > 0.02
    assert not any("up_bias" in name for name in pipe.unet.state_dict())


def test_a_compiled_unet_has_it(pipe: Any) -> None:
    pipe.load_erasure(erasure_of("sd"), "no-zebra")
    expected = draw(pipe)
    pipe.unet.compile(backend="aot_eager", fullgraph=True)
    assert near(draw(pipe), expected)
    pipe.set_erasures("no-zebra", 0.0)
    assert near(draw(pipe), base_images())


# ------------------------------------------------------------------------------------------------------------- its file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_and_read(pipe: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    erasure = erasure_of("sd")
    erasure.save_pretrained(tmp_path / "e", dtype=dtype)
    again = Erasure.from_pretrained(tmp_path / "e")
    assert again.config.layers == erasure.config.layers and again.config.layers[0].kind == "adapter"
    pipe.load_erasure(again)
    other = tiny_sd_pipe()
    other.load_erasure(erasure)
    assert far(draw(pipe), draw(other)) < (1e-6 if dtype == torch.float32 else 0.02)
    pipe.unload_erasure()
    pipe.load_erasure(erasure.rescaled(0.5), "half")
    other.unload_erasure()
    other.load_erasure(erasure, "half", strength=0.5)
    assert near(draw(pipe), draw(other))


def test_what_is_no_adapter_is_refused(pipe: Any) -> None:
    tensors = tensors_for(pipe)
    site = adapter.attentions("unet", pipe.unet)[0]
    own = {key: value for key, value in tensors.items() if key.startswith(site + ".")}
    kind = adapter.AdapterKind()
    good = LayerSpec("adapter", "unet", (site,), TENSOR_FILE, "adapter.")
    kind.validate(good, own)
    for spec in (
        LayerSpec("adapter", "text_encoder", (site,), TENSOR_FILE, "adapter."),
        LayerSpec("adapter", "unet", (site + ".to_out.0",), TENSOR_FILE, "adapter."),
        LayerSpec("adapter", "transformer", (site,), TENSOR_FILE, "adapter."),
    ):
        with pytest.raises(ErasureFileError, match="adapter"):
            kind.validate(spec, own)
    for broken in (
        {key: value for key, value in own.items() if not key.endswith(adapter.UP_BIAS)},
        {**own, site + ".extra": torch.zeros(1)},
        {**own, site + adapter.UP: own[site + adapter.UP].T},
        {**own, site + adapter.DOWN_BIAS: torch.zeros(RANK + 1)},
    ):
        with pytest.raises(ErasureFileError, match="adapter|shapes"):
            kind.validate(good, broken)
    wide = {key: torch.cat([value, value], -1) if key.endswith(adapter.DOWN) else value for key, value in own.items()}
    with pytest.raises(ErasureCompatibilityError, match="another architecture"):
        kind.check(pipe.unet, good, wide)
    with pytest.raises(ErasureCompatibilityError, match="no module"):
        kind.check(tiny_flux_pipe().transformer, good, own)
    with pytest.raises(ErasureCompatibilityError, match="behind an attention"):
        adapter.width_of(pipe.unet, "conv_in")
