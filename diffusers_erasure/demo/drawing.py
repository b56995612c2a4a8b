"""How the demo and the benchmarks draw with the tiny models: in few steps, to be quick on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import GUIDANCE_SCALE, load_pipeline, prompt
from .worlds import world_of


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

__all__ = ["BATCH", "GUIDANCE_SCALE", "STEPS", "draw", "fast_arguments", "fast_pipeline"]

STEPS = 8  # of the embedded model's second-order solver; its own DDIM takes `demo.NUM_INFERENCE_STEPS`
BATCH = 25


def fast_pipeline(pipe: DiffusionPipeline | None = None) -> DiffusionPipeline:
    """
    The embedded pipeline with a second-order solver, which needs fewer steps than its own DDIM, and fast on a CPU.

    The other tiny models keep their own schedulers, which are as quick.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`], *optional*):
            One that was made from it, or another tiny model, to be drawn with in the same way.

    Raises:
        `ErasureInputError`: It is no pipeline of a tiny model.
    """
    import torch
    from diffusers import DPMSolverMultistepScheduler

    pipe = load_pipeline() if pipe is None else pipe
    if world_of(pipe).embedded:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    for model in (getattr(pipe, "unet", None), pipe.vae):
        if model is not None:
            model.to(memory_format=torch.channels_last)
    return pipe


def fast_arguments(pipe: DiffusionPipeline) -> dict[str, Any]:
    """
    The keyword arguments with which the demo and the benchmarks call a pipeline.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): What [`fast_pipeline`] gives, erased or not.

    Raises:
        `ErasureInputError`: It is no pipeline of a tiny model.
    """
    world = world_of(pipe)
    return world.call_arguments() | ({"num_inference_steps": STEPS} if world.embedded else {})


def draw(
    pipe: DiffusionPipeline,
    pairs: Sequence[tuple[str, str]],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """
    Draw one image for each pair; the i-th image always starts from the same noise.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): What [`fast_pipeline`] gives, of any tiny model, erased or not.
        pairs (sequence of (`str`, `str`)): An object and a style each.
        progress (`Callable[[int], None]`, *optional*): Is told after each batch how many images are drawn.

    Returns:
        `list[PIL.Image.Image]`: The images, in the order of the pairs.
    """
    import torch

    arguments = fast_arguments(pipe)
    images: list[Image.Image] = []
    for start in range(0, len(pairs), BATCH):
        chunk = pairs[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chunk))]
        images += pipe([prompt(*pair) for pair in chunk], generator=generators, **arguments).images
        progress(len(images))
    return images
