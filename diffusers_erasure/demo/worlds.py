"""The tiny models by name: the embedded one, and those of other families, which a checkout holds; how each is called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ErasureInputError, ErasureNotFoundError


# Where else the folders may lie, for those who installed a wheel.
FOLDER_VARIABLE = "DIFFUSERS_ERASURE_WORLDS"
_IN_A_CHECKOUT = "tools/demo_worlds/models"


@dataclass(frozen=True)
class World:
    """
    One tiny model, and the call with which its published numbers were measured.

    Args:
        name (`str`): By which it is loaded: `"sd1"`, `"sdxl"`, `"sd3"` or `"flux"`.
        title (`str`): As people call its family.
        family (`str`): As an erasure's configuration names the family.
        pipeline (`str`): The class of its pipeline.
        num_inference_steps (`int`): Steps of its own scheduler.
        guidance_scale (`float`, *optional*): Left out where the model was trained for none.
        max_sequence_length (`int`, *optional*): Rows of the T5 encoder, where there is one.
        size (`int`, *optional*, defaults to 64): Height and width of its pictures.
    """

    name: str
    title: str
    family: str
    pipeline: str
    num_inference_steps: int
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    size: int = 64

    @property
    def embedded(self) -> bool:
        """Whether the installed package holds it."""
        return self.name == "sd1"

    def call_arguments(self) -> dict[str, Any]:
        """The keyword arguments for a call of its pipeline."""
        arguments: dict[str, Any] = {
            "height": self.size,
            "width": self.size,
            "num_inference_steps": self.num_inference_steps,
        }
        optional = {"guidance_scale": self.guidance_scale, "max_sequence_length": self.max_sequence_length}
        return arguments | {name: value for name, value in optional.items() if value is not None}


WORLDS: dict[str, World] = {
    world.name: world
    for world in (
        World("sd1", "Stable Diffusion", "stable-diffusion", "StableDiffusionPipeline", 20, 3.0),
        World("sdxl", "Stable Diffusion XL", "stable-diffusion-xl", "StableDiffusionXLPipeline", 8, 3.0),
        World("sd3", "Stable Diffusion 3", "stable-diffusion-3", "StableDiffusion3Pipeline", 10, 3.0, 32),
        World("flux", "FLUX.1", "flux", "FluxPipeline", 10, None, 32),
    )
}


def settings(name: str) -> World:
    """
    How a tiny model is called.

    Args:
        name (`str`): One of [`WORLDS`].

    Returns:
        [`World`]: Its family, steps, guidance scale and size.

    Raises:
        `ErasureInputError`: There is no model by that name.

    Example:

        >>> demo.settings("flux").num_inference_steps
        10
    """
    if name not in WORLDS:
        raise ErasureInputError(f"There is no tiny model {name!r}; there are {', '.join(WORLDS)}.")
    return WORLDS[name]


def call_arguments(name: str) -> dict[str, Any]:
    """
    The keyword arguments for a call of a tiny model: size, steps, and guidance scale or text length where it has them.

    Args:
        name (`str`): One of [`WORLDS`].

    Returns:
        `dict[str, Any]`: A new dictionary at each call.

    Raises:
        `ErasureInputError`: There is no model by that name.

    Example:

        >>> pipe = demo.load_pipeline("flux")
        >>> image = pipe(demo.prompt("cat", "ink"), **demo.call_arguments("flux")).images[0]
    """
    return settings(name).call_arguments()


def world_of(pipe: Any) -> World:
    """
    Which tiny model a pipeline is made like, told by its class.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): What `load_pipeline` gave, whatever is loaded on it.

    Returns:
        [`World`]: The one whose pipeline has this class, or a class from which it is derived.

    Raises:
        `ErasureInputError`: No tiny model has such a pipeline.
    """
    by_class = {world.pipeline: world for world in WORLDS.values()}
    for kind in type(pipe).__mro__:
        if kind.__name__ in by_class:
            return by_class[kind.__name__]
    raise ErasureInputError(
        f"{type(pipe).__name__} is no pipeline of a tiny model; theirs are {', '.join(sorted(by_class))}."
    )


def folder_of(world: World) -> Path:
    """
    The folder of a model that is not embedded.

    Raises:
        `ErasureNotFoundError`: It is not here: the wheel does not hold it.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    # An editable install imports the package from the checkout itself.
    models = Path(named).expanduser() if named else Path(__file__).resolve().parents[2] / _IN_A_CHECKOUT
    folder = models / world.name
    if not (folder / "model_index.json").is_file():
        raise ErasureNotFoundError(
            f"The tiny model {world.name!r} ({world.title}) is not in {models}"
            + (f", which {FOLDER_VARIABLE} names. " if named else ". ")
            + f"It is no part of the installed package: it lies in {_IN_A_CHECKOUT} of the source repository. Install a "
            f"checkout (`pip install --editable .`), or name that folder in the environment variable {FOLDER_VARIABLE}. "
            "The embedded model, 'sd1', is in every installation."
        )
    return folder
