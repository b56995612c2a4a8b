"""The embedded model: a real Stable Diffusion pipeline, small enough to ship in the wheel.

It draws 64 objects in 5 styles at 64x64 pixels and needs no network. Its judge names the object and the style of a
picture, so that an erasure can be made, applied and scored on any machine in a minute. A checkout holds three more, of
other families, which draw the same. See `docs/demo_model.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, overload

from .words import BROADER, HYPERNYMS, OBJECTS, STYLES, SYNONYMS
from .worlds import WORLDS, World, call_arguments, folder_of, settings


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    from ..schema import BaseModel
    from .dataset import Dataset
    from .judge import Judge

__all__ = [
    "BROADER",
    "GUIDANCE_SCALE",
    "HYPERNYMS",
    "NUM_INFERENCE_STEPS",
    "OBJECTS",
    "STYLES",
    "SYNONYMS",
    "WORLDS",
    "World",
    "call_arguments",
    "is_embedded",
    "load_images",
    "load_judge",
    "load_pipeline",
    "load_unseen_images",
    "prompt",
    "settings",
]

# The sampling which the embedded model was tuned for and which every published number of it uses.
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 3.0

# SHA-256 of the fingerprints that an erasure records of the embedded model: in float32 or float16, and in bfloat16.
_FINGERPRINTS = {
    "unet": (
        "dd1853530bd66bfaf4e211251336c476baa9b99fb739493d96dee438381ca578",
        "a4177f2ef0ac99a4e00f00980c64afe196d0743dcc2d85cba966dc4fae5ad08a",
    ),
    "text_encoder": (
        "6cd8f43e216b6ed140f7904b382b74c0af884bb950a2ac402ede675a65340e73",
        "94c19525c5c7e8061603fd9366c52887f0ba90400595d5d6212ad2b39ab793f1",
    ),
    "tokenizer": ("97a8960aec3230bba21aa06ea62f59fa66db8d53f896c7adec96648c9121fe65",),
}


def is_embedded(base: BaseModel) -> bool:
    """
    Whether an erasure was made on the embedded model, told by the fingerprints that it recorded.

    Args:
        base ([`~diffusers_erasure.schema.BaseModel`]):
            What the erasure recorded of its base model.

    Returns:
        `bool`: `False` where nothing was recorded, or a component is another one.
    """
    return "unet" in base.components and all(
        hashlib.sha256(f"{each.architecture} {each.values}".encode()).hexdigest() in _FINGERPRINTS.get(name, ())
        for name, each in base.components.items()
    )


def assets() -> Traversable:
    """The folder of the packaged weights and images."""
    return files("diffusers_erasure.demo") / "assets"


@overload
def load_pipeline(
    torch_dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> StableDiffusionPipeline: ...


@overload
def load_pipeline(
    name: str, torch_dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DiffusionPipeline: ...


def load_pipeline(  # type: ignore[misc]  # what comes first by position is told by its type
    name: Any = None, torch_dtype: Any = None, device: Any = None
) -> Any:
    """
    Load the embedded model, or by its name one of the tiny models of other families, which a checkout holds.

    Args:
        name (`str`, *optional*, defaults to `"sd1"`):
            One of [`WORLDS`]: `"sd1"`, the embedded model, `"sdxl"`, `"sd3"` or `"flux"`. It may be left out:
            `load_pipeline(torch_dtype, device)` is the embedded model too.
        torch_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            The dtype of the weights, which are stored as float16.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to put the pipeline.

    Returns:
        [`~diffusers.DiffusionPipeline`]: A fresh pipeline at each call, its progress bar off.

    Raises:
        `ErasureInputError`: There is no model by that name.
        `ErasureNotFoundError`: It is not in the installed package, but in a checkout of the repository.

    Example:

        >>> import torch
        >>> from diffusers_erasure import demo

        >>> pipe = demo.load_pipeline()
        >>> image = pipe(demo.prompt("cat", "ink"), num_inference_steps=20, guidance_scale=3.0).images[0]
        >>> pipe = demo.load_pipeline("flux", torch.float16, "cuda")
        >>> image = pipe(demo.prompt("cat", "ink"), **demo.call_arguments("flux")).images[0]
    """
    import torch
    from diffusers import DiffusionPipeline

    if not isinstance(name, str):
        if isinstance(torch_dtype, str | torch.device):  # both by position, without a name
            torch_dtype, device = None, torch_dtype
        name, torch_dtype = "sd1", name or torch_dtype
    world = settings(name)
    with (
        as_file(assets() / "model") if world.embedded else nullcontext(folder_of(world)) as folder,
        no_progress_bars(),
    ):
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch_dtype or torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    # It lies on the CPU already, and diffusers warns of half precision there, though it may be on its way elsewhere.
    return pipe if device is None or torch.device(device).type == "cpu" else pipe.to(device)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Where loading takes less than a second its bars would only be noise; the user's settings come back after it."""
    import diffusers
    import transformers

    enabled = [
        library.utils.logging
        for library in (diffusers, transformers)
        if library.utils.logging.is_progress_bar_enabled()
    ]
    for logging in enabled:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in enabled:
            logging.enable_progress_bar()


def load_judge(device: str | torch.device = "cpu") -> Judge:
    """
    Load the judge, a small classifier of the object and the style of a picture.

    Args:
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where the judge computes.

    Returns:
        [`~diffusers_erasure.demo.judge.Judge`]: The judge.

    Example:

        >>> judge = demo.load_judge()
        >>> judge.predict(image).objects
        ('cat',)
    """
    from .judge import Judge

    with as_file(assets() / "judge.safetensors") as file:
        return Judge.from_file(file, device=device)


def load_images() -> Dataset:
    """
    Load the 320 pictures which the model was trained on.

    Returns:
        [`~diffusers_erasure.demo.dataset.Dataset`]: `images`, uint8 [64 objects, 5 styles, 64, 64, 3], and their words.
    """
    return _load_images("emoji64")


def load_unseen_images() -> Dataset:
    """
    Load 60 pictures of 12 other objects which the model has never seen: what a user's LoRA may be trained on.

    Returns:
        [`~diffusers_erasure.demo.dataset.Dataset`]: `images`, uint8 [12 objects, 5 styles, 64, 64, 3], and their words.
    """
    return _load_images("emoji64_unseen")


def _load_images(name: str) -> Dataset:
    from .dataset import load_dataset

    with as_file(assets() / f"{name}.npz") as images, as_file(assets() / f"{name}.json") as labels:
        return load_dataset(images, labels)


def prompt(object: str, style: str | None = None) -> str:
    """
    The prompt which the published numbers use for an object, e.g. `"a cat in ink style"`.

    Args:
        object (`str`):
            What to draw: one of [`OBJECTS`], or any other word.
        style (`str`, *optional*):
            One of [`STYLES`]. Left out, the model chooses one.

    Returns:
        `str`: The prompt.
    """
    return f"a {object} in {style} style" if style else f"a {object}"
