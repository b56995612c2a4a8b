"""Images of the tiny models, one for each prompt, as `diffusers-erasure demo` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diffusers_erasure.demo.drawing import BATCH, GUIDANCE_SCALE, STEPS, fast_arguments
from diffusers_erasure.errors import ErasureInputError


if TYPE_CHECKING:
    from PIL import Image


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    batch: int = BATCH,
    **further: Any,
) -> list[Image.Image]:
    """
    Draw.

    Args:
        pipe ([`DiffusionPipeline`]): A tiny model, with whatever is loaded.
        prompts (sequence of `str`): One for each image.
        seeds (sequence of `int`): Of each image's first noise.
        steps (`int`, *optional*): Of the pipeline's sampler; by default as the demo draws.
        batch (`int`, *optional*): Images at once.
        further: Arguments of the pipeline's call. A text is given once for each prompt, as pipelines want it.
    """
    common = _arguments(pipe) | ({} if steps is None else {"num_inference_steps": steps})
    images: list[Image.Image] = []
    for begin in range(0, len(prompts), batch):
        some = list(prompts[begin : begin + batch])
        images += pipe(
            some,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[begin : begin + batch]],
            **common
            | {key: [value] * len(some) if isinstance(value, str) else value for key, value in further.items()},
        ).images
    return images


def _arguments(pipe: Any) -> dict[str, Any]:
    try:
        return fast_arguments(pipe)
    except ErasureInputError:  # image to image and its like, which take their size from the picture
        return {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}


def draw_shots(pipe: Any, shots: Sequence[Any], steps: int | None = None) -> list[Image.Image]:
    """The images of [`~benchmarks.efficacy.plan.Shot`]s."""
    return draw(pipe, [shot.prompt for shot in shots], [shot.seed for shot in shots], steps)
