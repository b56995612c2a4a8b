"""Text rows: what the text encoders of a base model make of prompts, as its pipeline would feed them to the denoiser."""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ErasureCompatibilityError
from .known import fingerprint, one_fit
from .readers import PADDED_BATCH, token_ids
from .sources import (
    CACHED_FROM,
    Source,
    check_prompts,
    part_widths,
    pooled_source,
    row_sources,
    short_enough,
)


__all__ = [
    "CACHED_FROM",
    "PADDED_BATCH",
    "Source",
    "all_rows",
    "check_prompts",
    "fingerprint",
    "gram",
    "last_rows",
    "null_rows",
    "one_fit",
    "part_widths",
    "pooled_rows",
    "pooled_source",
    "row_sources",
    "short_enough",
    "token_ids",
]


def last_rows(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Encode prompts, and keep for each the row of its last word piece (for the empty prompt, of the first token).

    Args:
        pipe: a pipeline of a known family; its text encoders and tokenizers are used, of several blocks of rows (Stable
            Diffusion 3) the first.
        prompts (sequence of `str`): the prompts, each once. Lists of 8 and more are cached on disk.

    Returns:
        `torch.Tensor`: float64 [N, C] on the CPU; C = 768 (SD 1.x), 1024 (SD 2.x), 2048 (SDXL), 4096 (SD3 and FLUX.1).

    Raises:
        ErasureCompatibilityError: another family, or no text encoder is loaded; or two tokenizers cut a prompt into different
            numbers of pieces, so that no row that the pipeline makes is the last piece's of both.
        ErasureInputError: a prompt is too long, a text encoder carries an active LoRA, or its rows are not finite.
    """
    return row_sources(pipe)[0].last(prompts)


def pooled_rows(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """The pooled vectors of prompts that the denoiser reads beside the rows: float64 [N, p]. Otherwise as `last_rows`."""
    source = pooled_source(pipe)
    if source is None:
        raise ErasureCompatibilityError("The denoiser of this base model reads no pooled vector of the text.")
    return source.last(prompts)


def all_rows(pipe: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
    """Encode prompts with their padding.

    Args:
        pipe, prompts: as in `last_rows`; nothing is cached.

    Returns:
        `tuple`: float64 [N, L, C] on the CPU, with the encoder's length L; and for each prompt the index of its last
        word piece (0, the first token, for the empty prompt).
    """
    rows, last = row_sources(pipe)[0].all(prompts)
    return torch.stack(list(rows)), last


def null_rows(pipe: Any) -> torch.Tensor:
    """The empty prompt's rows, the start token's first: float64 [L, C]. Cached on disk."""
    return row_sources(pipe)[0].null()


def gram(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """`sum x x^T` over all rows, padding included, of some prompts: float64 [C, C]. Lists of 8 and more are cached."""
    return row_sources(pipe)[0].gram(prompts)
