"""Pictures of candidates, for a picker to look at."""

import copy
from typing import TYPE_CHECKING, Any

import torch

from ..base_model import component, family_of
from ..denoising.calls import latent_shape
from ..errors import ErasureCompatibilityError, ErasureInputError


if TYPE_CHECKING:
    from PIL.Image import Image


IMAGES = 4
STEPS = 20  # fewer than for a good picture: it only has to be told what it is of


class Pictures:
    """Draws a few pictures of a word, once; each is from noise of its own seed, the same for all words.

    Args:
        pipe ([`DiffusionPipeline`]): the base model. A copy of it is called, with a scheduler of its own.
        context (`str`): the prompt, with `{}` for the word.
        count (`int`): how many.
        length (`int`, *optional*, defaults to 0): rows that T5 makes of a prompt; 0 for the pipeline's own number.

    Raises:
        ErasureCompatibilityError: the denoiser or the VAE is not loaded.
    """

    def __init__(self, pipe: Any, context: str, count: int, length: int = 0) -> None:
        missing = [name for name in (family_of(pipe).denoiser, "vae") if not _is_loaded(pipe, name)]
        if missing:
            raise ErasureCompatibilityError(
                f"A `picker` looks at pictures, and the pipeline's {' and '.join(missing)} is not loaded. Load it, or leave `picker` "
                "out: anchors are then picked by text rows alone."
            )
        self.context, self.count = context, count
        self.pipe = copy.copy(pipe)
        self.pipe.scheduler = copy.deepcopy(pipe.scheduler)  # calls change it, and the user's pipeline is only read
        self.pipe.set_progress_bar_config(disable=True)
        height, width = (size * getattr(pipe, "vae_scale_factor", 8) for size in latent_shape(pipe)[1:])
        self.arguments = {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": "pil"}
        self.arguments |= {"max_sequence_length": length} if length else {}
        self.known: dict[str, list[Image]] = {}

    @torch.no_grad()
    def of(self, word: str) -> "list[Image]":
        """The pictures of a word."""
        if word not in self.known:
            self.known[word] = [
                self.pipe(
                    self.context.format(word), generator=torch.Generator().manual_seed(seed), **self.arguments
                ).images[0]
                for seed in range(self.count)
            ]
        return self.known[word]


def _is_loaded(pipe: Any, name: str) -> bool:
    model = component(pipe, name)
    return model is not None and all(parameter.device.type != "meta" for parameter in model.parameters())


def checked_share(share: Any) -> float:
    """The share that a picker gave.

    Raises:
        ErasureInputError: it is none.
    """
    try:
        value = float(share)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value <= 1:
        raise ErasureInputError(
            f"A picker gives the share of pictures that show the target, from 0 to 1, not {share!r}."
        )
    return value
