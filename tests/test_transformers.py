"""LoRA erasures and activation patches on FLUX.1's and Stable Diffusion 3's transformers, against plain functions and stock diffusers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureError,
    ErasureFileError,
    ErasureInactiveError,
    Layer,
    erase,
)
from diffusers_erasure.layers import lora
from diffusers_erasure.layers.activation import BLEND, MASK, MEANS, TIMESTEPS, pack
from diffusers_erasure.live.state import states
from tests.helpers import EFFECT, assert_like, dense_edit, equal, far, images, random_erasure, tiny_sdxl_pipe
from tests.tiny_transformers import PIPES, SIDE, SITES, drawn, sites_of, tiny_flux_pipe, tiny_sd3_pipe


KINDS = list(PIPES)
# Where images are patched: both feed-forwards, all attentions, and what is both in FLUX.1's single blocks.
PATCHED = {
    "flux": (
        *("transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff_context.net.2"),
        *("transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_add_out"),
        "single_transformer_blocks.1.proj_out",
    ),
    "sd3": (
        *("transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff_context.net.2"),
        *("transformer_blocks.1.attn.to_out.0", "transformer_blocks.0.attn.to_add_out"),
        "transformer_blocks.0.attn2.to_out.0",
    ),
}
TIMES = (1000.0, 600.0, 200.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["hook", "merge", "peft"])
def test_a_lora_is_the_dense_edit(kind: str, backend: Any) -> None:
    """By each backend; at strength 0 and unloaded the base, bit for bit."""
    pipe = PIPES[kind]()
    erasure, base = random_erasure(pipe, "lora", sites_of(kind), size=0.7), drawn(pipe)
    pipe.load_erasure(erasure, "e", backend=backend)
    assert_like(drawn(pipe), drawn(dense_edit(PIPES[kind](), erasure)), base)
    if backend != "merge":
        pipe.set_erasures("e", 0.5)
        assert_like(drawn(pipe), drawn(dense_edit(PIPES[kind](), (erasure, 0.5))), base)
    pipe.set_erasures("e", 0.0)
    assert equal(drawn(pipe), base)
    pipe.unload_erasure()
    assert equal(drawn(pipe), base)


@pytest.mark.parametrize("kind", KINDS)
def test_strengths_by_picture(kind: str) -> None:
    """Each picture of a batch as if it were drawn alone; SD3's batch holds them twice, for guidance."""
    pipe = PIPES[kind]()
    erasure = random_erasure(pipe, "lora", sites_of(kind), size=0.7)
    prompts = ["a photo of a red apple", "a green zebra on the table"]

    def drawn_with(strengths: list[float]) -> np.ndarray:
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        if kind == "flux":
            latents = latents.reshape(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 16)
        with pipe.erasure_strengths({"e": strengths}):
            return drawn(pipe, prompt=prompts, latents=latents)

    pipe.load_erasure(erasure, "e")
    both, first, second = drawn_with([0.0, 1.0]), drawn_with([0.0, 0.0]), drawn_with([1.0, 1.0])
    assert far(both[0], first[0]) < 1e-5 < EFFECT < far(first[1], second[1])
    assert far(both[1], second[1]) < 1e-5 < EFFECT < far(first[0], second[0])


STOCK = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
for pipe, erasure, found, arguments in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(pipe)
    pipe.load_lora_weights(erasure, weight_name="pytorch_lora_weights.safetensors")
    images = pipe("a photo of a red apple", num_inference_steps=3, guidance_scale=5.0, output_type="np",
                  generator=torch.Generator().manual_seed(0), **arguments).images
    np.save(found, images)
assert not any(name.startswith("diffusers_erasure") for name in sys.modules)
"""
SDXL_SITES = (
    "unet.add_embedding.linear_1",
    "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2.text_model.encoder.layers.1.self_attn.v_proj",
)


def test_stock_diffusers_without_this_package(tmp_path: Path) -> None:
    """In a fresh process that does not import it, published LoRAs draw what `load_erasure` draws."""
    makes = {**PIPES, "sdxl": tiny_sdxl_pipe}
    small = {"height": SIDE, "width": SIDE, "max_sequence_length": 12}
    told, expected = [], {}
    for kind, make in makes.items():
        pipe, arguments = make(), {} if kind == "sdxl" else small
        sites = SDXL_SITES if kind == "sdxl" else sites_of(kind)
        erasure, base = random_erasure(pipe, "lora", sites, size=0.7), images(pipe, **arguments)
        assert erasure.config.stock is not None and erasure.config.stock.is_exact
        folder, found = tmp_path / kind, tmp_path / f"{kind}.npy"
        pipe.save_pretrained(folder / "pipe")
        erasure.save_pretrained(folder / "erasure")
        told.append([str(folder / "pipe"), str(folder / "erasure"), str(found), arguments])
        pipe.load_erasure(folder / "erasure")
        oracles = images(pipe, **arguments), images(dense_edit(make(), erasure), **arguments)
        expected[found] = base, *oracles
    command = [sys.executable, "-c", STOCK, json.dumps(told)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=500)
    for found, (base, ours, dense) in expected.items():
        assert_like(np.load(found), ours, base)
        assert_like(np.load(found), dense, base)


# ------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_door_keeps_its_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several steps what is drawn is the same bits with and without keeping; other modules' inputs are made in each pass."""
    pipe = PIPES[kind]()
    pipe.load_erasure(random_erasure(pipe, "lora", sites_of(kind), size=0.7), "e")
    pipe.load_erasure(random_erasure(pipe, "lora", sites_of(kind), size=0.4, seed=1), "f", strength=0.3)
    live = states(pipe)["transformer"]
    kept = {
        site
        for site, each in live.layers["lora"].sites.items()
        if live.plan.of(live.plan.names)[each.place.number].text is not None
    }
    assert kept == {"context_embedder"}
    made = []
    whole = lora.TextProduct.forward
    monkeypatch.setattr(lora.TextProduct, "forward", lambda *arguments: made.append(1) or whole(*arguments))
    steps = {"num_inference_steps": 4}
    with_keeping = drawn(pipe, **steps)
    assert len(made) == 1
    monkeypatch.setattr(lora, "kept_for", lambda now, key, rows, compute: compute())
    assert equal(drawn(pipe, **steps), with_keeping) and len(made) == 5
    monkeypatch.setattr(lora.TextProduct, "of", lambda *arguments: None)
    assert equal(drawn(pipe, **steps), with_keeping) and len(made) == 5


# -------------------------------------------------------------------------------------------------- activations


class Patches:
    """Masks and means by site, [T, C], and what they do without hooks."""

    def __init__(self, kind: str, seed: int = 0, times: tuple[float, ...] = TIMES) -> None:
        generator, transformer = torch.Generator().manual_seed(seed), PIPES[kind]().transformer
        self.times = torch.tensor(times)
        self.masks, self.means = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for site in PATCHED[kind]:
            shape = len(times), transformer.get_submodule(site).in_features
            self.masks[site] = torch.rand(shape, generator=generator) < 0.4
            self.means[site] = torch.randn(shape, generator=generator)

    def erasure(self, pipe: Any) -> Erasure:
        tensors = {TIMESTEPS: self.times, BLEND: torch.ones(1)}
        for site, mask in self.masks.items():
            tensors[site + MASK], tensors[site + MEANS] = pack(mask), self.means[site][mask]
        layer = Layer("activation", tuple(self.masks), tensors, "transformer")
        return Erasure.from_layers([layer], base=pipe, concepts="zebra", method="random")

    def plainly(self, pipe: Any) -> Any:
        """The pipeline with patched inputs, by the scheduler's timesteps; FLUX's transformer is given a thousandth of them."""
        now, transformer = [0.0], pipe.transformer
        factor = 1000.0 if isinstance(transformer, FluxTransformer2DModel) else 1.0
        forward = transformer.forward

        def note(*arguments: Any, **named: Any) -> Any:
            now[0] = float(named["timestep"].reshape(-1)[0]) * factor
            return forward(*arguments, **named)

        transformer.forward = note
        for site, mask in self.masks.items():
            module, means = transformer.get_submodule(site), self.means[site]

            def patched(x: torch.Tensor, call: Callable[..., Any], mask: Any, means: Any) -> Any:
                nearest = int((self.times - now[0]).abs().argmin())
                return call(torch.where(mask[nearest], means[nearest], x))

            call = module.forward
            module.forward = lambda x, call=call, mask=mask, means=means: patched(x, call, mask, means)
        return pipe


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_patched_by_the_familys_clock(kind: str, tmp_path: Path) -> None:
    pipe, patches = PIPES[kind](), Patches(kind)
    base = drawn(pipe, num_inference_steps=4)
    patches.erasure(pipe).save_pretrained(tmp_path / "e")
    pipe.load_erasure(tmp_path / "e")
    oracle = drawn(patches.plainly(PIPES[kind]()), num_inference_steps=4)
    assert_like(drawn(pipe, num_inference_steps=4), oracle, base)
    one = Patches(kind, times=(600.0,))  # the three timesteps of the masks matter
    assert far(drawn(one.plainly(PIPES[kind]()), num_inference_steps=4), oracle) > EFFECT
    pipe.set_erasures("e", 0.0)
    assert equal(drawn(pipe, num_inference_steps=4), base)
    pipe.unload_erasure()
    assert equal(drawn(pipe, num_inference_steps=4), base)


@pytest.mark.parametrize("kind", KINDS)
def test_patches_that_are_the_same_at_all_timesteps_are_fused(kind: str) -> None:
    pipe, patches = PIPES[kind](), Patches(kind, times=(500.0,))
    base, oracle = drawn(pipe), drawn(patches.plainly(PIPES[kind]()))
    pipe.load_erasure(patches.erasure(pipe), backend="merge")
    assert_like(drawn(pipe), oracle, base)
    pipe.unload_erasure()
    assert equal(drawn(pipe), base)


@pytest.mark.parametrize("site", ["proj_out", "transformer_blocks.0.attn.to_q", "x.attn1.to_out.0"])
def test_other_sites_are_refused(site: str) -> None:
    tensors = {TIMESTEPS: torch.ones(1), BLEND: torch.ones(1)}
    tensors |= {site + MASK: torch.full((1, 4), 255, dtype=torch.uint8), site + MEANS: torch.ones(32)}
    with pytest.raises(ErasureFileError, match="single_transformer_blocks.N.proj_out"):
        Erasure.from_layers(
            [Layer("activation", (site,), tensors, "transformer")], base=tiny_flux_pipe(), concepts="zebra"
        )


def test_a_patch_where_no_bias_is_cannot_be_fused() -> None:
    pipe, patches = tiny_flux_pipe(), Patches("flux", times=(500.0,))
    module = pipe.transformer.transformer_blocks[0].attn.to_add_out
    module.bias = None
    with pytest.raises(ErasureCompatibilityError, match="no bias"):
        pipe.load_erasure(patches.erasure(pipe), backend="merge")


# ------------------------------------------------------------------------------------------ processors and others


class Silent(FluxAttnProcessor):
    """Attends, and computes with a weight itself instead of calling `to_out[0]`."""

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        whole = attn.to_out[0]
        attn.to_out[0] = _Weights(whole)
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            attn.to_out[0] = whole


class _Weights(nn.Module):
    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.whole = (module,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (module,) = self.whole
        return nn.functional.linear(x, module.weight, module.bias)


def test_a_processor_that_leaves_a_site_out_is_an_error() -> None:
    pipe = tiny_flux_pipe()
    pipe.load_erasure(Patches("flux").erasure(pipe))
    drawn(pipe, num_inference_steps=1)
    pipe.transformer.transformer_blocks[0].attn.set_processor(Silent())
    with pytest.raises(ErasureInactiveError, match="transformer_blocks.0.attn.to_out.0"):
        drawn(pipe, num_inference_steps=1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_for_unets_says_so(kind: str) -> None:
    pipe = PIPES[kind]()
    for method in ("dumo",):
        with pytest.raises(ErasureError, match="Stable Diffusion|stable-diffusion"):
            erase(pipe, "zebra", anchors="horse", method=method)


def test_fused_projections_are_told() -> None:
    pipe = tiny_flux_pipe()
    pipe.load_erasure(random_erasure(pipe, "lora", ("transformer.transformer_blocks.0.attn.to_q",)))
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ErasureInactiveError, match="fused"):
        drawn(pipe, num_inference_steps=1)
    pipe.transformer.unfuse_qkv_projections()
    drawn(pipe, num_inference_steps=1)


def test_sd35s_second_attention_is_no_reader_of_text() -> None:
    transformer = tiny_sd3_pipe().transformer
    assert lora.reads_rows(transformer, "context_embedder")
    assert not any(lora.reads_rows(transformer, site) for site in SITES["sd3"] if site != "context_embedder")
    unet = tiny_sdxl_pipe().unet
    assert lora.reads_rows(unet, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
