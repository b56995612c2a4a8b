"""How the demo and the benchmarks draw with the embedded model: in few steps, to be quick on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import GUIDANCE_SCALE, load_pipeline, prompt


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL import Image

__all__ = ["BATCH", "GUIDANCE_SCALE", "STEPS", "draw", "fast_pipeline"]

STEPS = 8  # of a second-order solver; the model's own DDIM takes `demo.NUM_INFERENCE_STEPS`
BATCH = 25


def fast_pipeline(pipe: StableDiffusionPipeline | None = None) -> StableDiffusionPipeline:
    """
    The embedded pipeline with a second-order solver, which needs fewer steps than its own DDIM, and fast on a CPU.

    Args:
        pipe ([`~diffusers.StableDiffusionPipeline`], *optional*): One that was made from it, to be drawn with in the same way.
    """
    import torch
    from diffusers import DPMSolverMultistepScheduler

    pipe = load_pipeline() if pipe is None else pipe
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)
    return pipe


def draw(
    pipe: StableDiffusionPipeline,
    pairs: Sequence[tuple[str, str]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """
    Draw one image for each pair; the i-th image always starts from the same noise.

    Args:
        pipe ([`~diffusers.StableDiffusionPipeline`]): What [`fast_pipeline`] gives, erased or not.
        pairs (sequence of (`str`, `str`)): An object and a style each.
        progress (`Callable[[int], None]`, *optional*): Is told after each batch how many images are drawn.

    Returns:
        `list[PIL.Image.Image]`: The images, in the order of the pairs.
    """
    import torch

    images: list[Image.Image] = []
    for start in range(0, len(pairs), BATCH):
        chunk = pairs[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chunk))]
        images += pipe(
            [prompt(*pair) for pair in chunk],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
        ).images
        progress(len(images))
    return images
