"""One embedded model, and requests for it: erasures of every layer kind, twins that share its components, many threads."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.builders import random_activation
from diffusers_erasure import Erasure, demo, with_gate, with_schedule
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.schema import Concept
from tests.helpers import random_erasure
from tests.test_skip import random_tensors


PATIENCE = 120  # seconds until what waits is a failure
TEXT_SITES = tuple(f"text_encoder.text_model.encoder.layers.{layer}.mlp.fc1" for layer in (0, 2))
KINDS = ("lora", "text_map", "activation", "skip", "scheduled", "gated", "text encoder")
ON_UNET = KINDS[:-1]


@cache  # nobody changes one
def erasures() -> dict[str, Erasure]:
    """A random erasure of each kind for the embedded model; each moves a picture visibly."""
    pipe = demo.load_pipeline()
    sites = tuple(f"unet.{name}" for name in text_readers(pipe))

    def made(name: str, kind: str = "lora", sites: tuple[str, ...] = sites, size: float = 0.3) -> Erasure:
        seed, concepts = KINDS.index(name), (Concept(name, "horse"),)
        return random_erasure(pipe, kind, sites, 3, seed, size=size, concepts=concepts)

    skips = [f"skips.{index}" for index in range(9)]
    network = {
        name: 0.2 * value if name.startswith("zero.") else value
        for name, value in random_tensors(pipe.unet, "compact").items()
    }
    skip = Layer("skip", (*skips, "mid_block"), network)
    return {
        "lora": made("lora"),
        "text_map": made("text_map", "text_map", ()),
        "activation": random_activation(pipe.unet, 10),
        "skip": Erasure.from_layers([skip], base=pipe, concepts="skip", method="random"),
        "scheduled": with_schedule(made("scheduled", size=1.0), [2.0, 0.0] * 10),
        "gated": with_gate(made("gated", size=1.0), pipe, "a cat", tokens=True),
        "text encoder": made("text encoder", sites=TEXT_SITES, size=2.0),
    }


@cache
def another() -> Erasure:
    """One that none of the others is."""
    pipe = demo.load_pipeline()
    sites = tuple(f"unet.{name}" for name in text_readers(pipe))
    return random_erasure(pipe, "lora", sites, 2, 99, size=2.0, concepts=(Concept("another", "horse"),))


def serving(kinds: Sequence[str] = KINDS, strength: float = 1.0) -> Any:
    """A fresh embedded model with erasures of these kinds."""
    pipe = demo.load_pipeline()
    for kind in kinds:
        pipe.load_erasure(erasures()[kind], kind, strength=strength)
    return pipe


@dataclass(frozen=True)
class Request:
    """What somebody asks for: prompts, and how strongly what is loaded acts."""

    prompts: tuple[str, ...] = ("a cat",)
    strengths: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 4
    seed: int = 0
    guidance: float = 3.0

    def draw(self, pipe: Any, **options: Any) -> np.ndarray:
        """The pictures, with whatever acts."""
        return pipe(
            list(self.prompts),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=torch.Generator().manual_seed(self.seed),
            output_type="np",
            **options,
        ).images

    def served(self, pipe: Any, **options: Any) -> np.ndarray:
        """The pictures, with the strengths."""
        with pipe.erasure_strengths(self.strengths):
            return self.draw(pipe, **options)


def mixed(kinds: Sequence[str] = KINDS) -> list[Request]:
    """Eight different requests: one for each kind (or half of them), and one for all; all others are 0 there."""
    off = dict.fromkeys(kinds, 0.0)
    prompts = [demo.prompt(name, style) for name, style in zip(demo.OBJECTS, demo.STYLES * 2, strict=False)]
    requests = []
    for index in range(8):
        chosen = {kinds[index]: 1.0 - 0.05 * index} if index < len(kinds) else dict.fromkeys(kinds, 0.3)
        texts = ("a cat", prompts[index])[: 1 + index % 2]
        requests.append(Request(texts, {**off, **chosen}, 4 + index % 3, index, (3.0, 1.0, 2.0)[index % 3]))
    return requests


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of jobs, each in a thread of its own; raises what the first of them raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(job) for job in jobs]]


def elsewhere(job: Callable[[], Any]) -> Any:
    """The result of a job in another thread, which is waited for and has no part in the caller's blocks."""
    return Context().run(at_once, job)[0]
