"""Images of the embedded model, one for each prompt, as `diffusers-erasure demo` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffusers_erasure.demo.drawing import BATCH, GUIDANCE_SCALE, STEPS


if TYPE_CHECKING:
    from PIL import Image


def draw(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int = STEPS, batch: int = BATCH, **further: Any
) -> list[Image.Image]:
    """
    Draw.

    Args:
        pipe ([`DiffusionPipeline`]): The embedded model, with whatever is loaded.
        prompts (sequence of `str`): One for each image.
        seeds (sequence of `int`): Of each image's first noise.
        steps (`int`, *optional*): Of the pipeline's sampler.
        batch (`int`, *optional*): Images at once.
        further: Arguments of the pipeline's call. A text is given once for each prompt, as pipelines want it.
    """
    images: list[Image.Image] = []
    for begin in range(0, len(prompts), batch):
        some = list(prompts[begin : begin + batch])
        images += pipe(
            some,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[begin : begin + batch]],
            **{key: [value] * len(some) if isinstance(value, str) else value for key, value in further.items()},
        ).images
    return images


def draw_shots(pipe: Any, shots: Sequence[Any], steps: int = STEPS) -> list[Image.Image]:
    """The images of [`~benchmarks.efficacy.plan.Shot`]s."""
    return draw(pipe, [shot.prompt for shot in shots], [shot.seed for shot in shots], steps)
