"""One compiled denoiser serves requests of different strengths: neither a new graph nor another request's numbers."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_erasure import Erasure, with_gate, with_schedule
from tests import test_stays_on
from tests.helpers import equal, far, images, random_erasure, tiny_sd_pipe
from tests.serving import at_once
from tests.test_activation import Plan
from tests.test_activation import as_erasure as activation_of
from tests.test_skip import as_erasure as skip_of
from tests.test_skip import random_tensors, small_pipe


backend, CountingBackend = test_stays_on.backend, test_stays_on.CountingBackend
BLOCK = "unet.up_blocks.0.attentions.0.transformer_blocks.0"
SITES = tuple(f"{BLOCK}.attn2.{part}" for part in ("to_k", "to_v"))
PROMPTS = ["a photo of a red apple", "two green pears"]
EFFECT = 1e-3  # of one small block; rounding is 1e-6


def made(kind: str, pipe: Any) -> Erasure:
    """A random erasure of the smallest pipeline."""
    if kind == "activation":
        site = f"{BLOCK}.ff.net.2".removeprefix("unet.")
        width, generator = pipe.unet.get_submodule(site).in_features, torch.Generator().manual_seed(0)
        mask = torch.rand(2, width, generator=generator) < 0.5
        plan = Plan(torch.tensor([700.0, 300.0]), {site: mask}, {site: torch.randn(2, width, generator=generator)})
        return activation_of(plan, pipe=pipe)
    if kind == "skip":
        return skip_of(pipe, random_tensors(pipe.unet, "compact"))
    erasure = random_erasure(pipe, "text_map" if kind == "text_map" else "lora", SITES)
    if kind == "scheduled":
        return with_schedule(erasure, [2.0, 0.0] * 10)
    return with_gate(erasure, pipe, "an apple") if kind == "gated" else erasure


def draw(pipe: Any) -> np.ndarray:
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return images(pipe, prompt=PROMPTS, generator=generator)


def fresh(kind: str) -> Any:
    """The smallest pipeline that has room for the kind."""
    return small_pipe() if kind == "skip" else tiny_sd_pipe(levels=1)


def pair(kind: str, compiled_with: Callable[..., Any]) -> tuple[Any, Any]:
    """A pipeline with an erasure whose UNet is compiled, and one that is not."""
    pipe = fresh(kind)
    pipe.load_erasure(made(kind, pipe), "one")
    eager = copy.deepcopy(pipe)
    pipe.unet = torch.compile(pipe.unet, backend=compiled_with, fullgraph=True)
    return pipe, eager


@pytest.mark.parametrize("kind", ["lora", "text_map", "activation", "skip", "scheduled", "gated"])
def test_strengths_make_no_graph(kind: str, backend: Any) -> None:
    pipe, eager = pair(kind, backend)
    full = draw(pipe)
    assert far(full, draw(eager)) < 1e-5
    graphs, off = backend.graphs, draw(fresh(kind))
    assert graphs and far(full, off) > EFFECT
    for strength in (0.5, [0.0, 1.0], [0.3, 0.0], 0.0, 1.0, [0.7, 0.2]):
        with pipe.erasure_strengths({"one": strength}), eager.erasure_strengths({"one": strength}):
            assert far(draw(pipe), draw(eager)) < 1e-5
    for strength in (0.5, 0.0, 2.0):
        for each in (pipe, eager):
            each.set_erasures("one", strength)
        assert far(draw(pipe), draw(eager)) < 1e-5
    with pipe.erasures_disabled():
        assert far(draw(pipe), off) < 1e-5
    assert backend.graphs == graphs


@pytest.mark.parametrize("kind", ["lora", "text_map", "activation"])
def test_two_threads_on_one_compiled_unet(kind: str, backend: Any) -> None:
    pipe, eager = pair(kind, backend)
    strengths: tuple[Any, ...] = (1.0, [0.0, 0.6])
    alone = []
    for strength in strengths:
        with pipe.erasure_strengths({"one": strength}):
            alone.append(draw(pipe))
        with eager.erasure_strengths({"one": strength}):
            assert far(alone[-1], draw(eager)) < 1e-5
    assert far(*alone) > EFFECT
    graphs = backend.graphs

    def serve(index: int) -> list[np.ndarray]:
        parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
        mine = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        mine.set_progress_bar_config(disable=True)
        with mine.erasure_strengths({"one": strengths[index]}):
            return [draw(mine) for _ in range(10)]

    for drawn, wanted in zip(at_once(lambda: serve(0), lambda: serve(1)), alone, strict=True):
        assert [equal(each, wanted) for each in drawn] == [True] * 10
    assert backend.graphs == graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "text_map"])
def test_below_autograd(kind: str) -> None:
    """With graphs of operators, as compilers for a device get them."""
    torch.compiler.reset()
    pipe, eager = pair(kind, "aot_eager")  # type: ignore[arg-type]
    for strength in (1.0, [0.0, 1.0], 0.3):
        with pipe.erasure_strengths({"one": strength}), eager.erasure_strengths({"one": strength}):
            assert far(draw(pipe), draw(eager)) < 1e-5
    torch.compiler.reset()
