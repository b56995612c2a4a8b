"""How a method that takes long is carried out."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from ..errors import ErasureInputError
from ..settings import Of, Whole, check_settings


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """How a training run is carried out; nothing of it changes the result.

    Args:
        checkpoint_dir (`str` or `os.PathLike`, *optional*): folder for checkpoints and sample images. Without it an
            interrupted run is lost.
        checkpoint_every (`int`, *optional*, defaults to 100): steps between checkpoints; the last two are kept. Ctrl-C and
            SIGTERM save one too.
        resume (`bool`, *optional*, defaults to `False`): go on from the newest checkpoint, where there is one.
        sample_every (`int`, *optional*): steps between sample images.
        sample_prompts (sequence of `str`, *optional*): their prompts; the concepts and the first retained prompts by default.
        release (`bool`, *optional*, defaults to `False`): take the text encoders (and, without sample images, the VAE) out
            of the pipeline for good, as soon as they are not needed any more, which frees memory; from then on the pipeline
            cannot draw. Otherwise nothing is moved, and other threads can draw with the pipeline meanwhile.
        progress (`bool`, *optional*, defaults to `True`): show a bar.
    """

    checkpoint_dir: Annotated[str | os.PathLike[str] | None, Of("a folder", str, os.PathLike)] = None
    checkpoint_every: Annotated[int, Whole(least=1)] = 100
    resume: bool = False
    sample_every: Annotated[int | None, Whole(least=1)] = None
    sample_prompts: Annotated[Sequence[str], Of("a list of prompts", Iterable)] = ()
    release: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        if self.checkpoint_dir is None and (self.resume or self.sample_every):
            raise ErasureInputError("`resume` and `sample_every` need a `checkpoint_dir`.")
