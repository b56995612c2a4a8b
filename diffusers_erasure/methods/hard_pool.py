"""Pools of prompts among which an adversary searches for what an edit hurts most: near to a concept, by its rows or by what is drawn."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..base_model import component, family_of
from ..denoising.calls import Caller, latent_shape
from ..denoising.prompts import Prompts, nearest_to_each
from ..denoising.sampler import SAMPLE, sampler_for, trajectories
from ..denoising.twin import private
from ..encoding import short_enough
from ..errors import ErasureInputError
from ..lists import SHIPPED, names_any, read_list
from ..logging import get_logger
from ..schema import Concept
from ..training import TrainSettings
from ..training.pool import MOST_RETAINED


logger = get_logger(__name__)

RETAINED, VOCABULARY, FALLBACK = "retain", "vocabulary", "list:things"
MOST_WORDS = 2000  # of a vocabulary, the first in it: byte pairs are numbered in the order in which they were merged, the commonest first
WORD = re.compile(r"[a-z]{3,}")
LOOKS = 4  # noisy latents along a concept's way at which predictions are compared
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class PoolSettings(TrainSettings):
    """Settings of a method that has pools."""

    pool: str | tuple[str, ...]
    pool_nearest: int
    pool_by: Literal["rows", "output"]
    pool_size: int

    def recorded(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        settings, secret = super().recorded()
        # One's own prompts tell of the concept that they are near to.
        return settings, tuple(sorted({*secret, "pool"})) if not isinstance(self.pool, str) else secret


def pools_for(pipe: Any, concepts: Sequence[Concept], settings: PoolSettings) -> list[list[str]]:
    """For each concept its pool; none at all where the given one is empty.

    Raises:
        ErasureInputError: there is no such list, or nothing of it may be in a pool.
    """
    targets = [str(concept.target) for concept in concepts]
    candidates = candidates_of(pipe, settings)
    if not candidates:
        return []
    found = [word for word in dict.fromkeys(candidates) if not names_any(word, targets)]
    found = short_enough(pipe, found, settings.max_sequence_length)
    if not found:
        raise ErasureInputError(
            f"Of {len(candidates)} prompts of `pool` none may be preserved: each names a target, or is too long for the text encoders."
        )
    size = min(settings.pool_size, max(1, MOST_RETAINED // len(targets)))
    if size < settings.pool_size:
        logger.warning("%d concepts have pools of %d prompts, not %d.", len(targets), size, settings.pool_size)
    near = nearest_to_each(pipe, found, targets, settings.pool_nearest)
    if settings.pool_by == "output":
        near = [own[:size] for own in by_output(pipe, targets, near, settings)]
    return [spread(own, size) for own in near]


def candidates_of(pipe: Any, settings: PoolSettings) -> list[str]:
    """All prompts that `pool` stands for."""
    pool = settings.pool
    if pool == RETAINED:
        return [*settings.retain.prompts] or read_list(FALLBACK)
    if pool == VOCABULARY:
        return vocabulary(component(pipe, family_of(pipe).tokenizers[0]))
    if isinstance(pool, str):
        return read_list(pool if pool.startswith(SHIPPED) else SHIPPED + pool)
    return list(pool)


def vocabulary(tokenizer: Any) -> list[str]:
    """The common whole words of a tokenizer, lower-case, in its own order.

    Raises:
        ErasureInputError: it has none, as one that ends words in another way.
    """
    end = "</w>"
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [piece.removesuffix(end) for piece, _ in pieces if piece.endswith(end)]
    found = [word for word in words if WORD.fullmatch(word)][:MOST_WORDS]
    if not found:
        raise ErasureInputError("The tokenizer marks no whole words; give `pool` a list of prompts instead.")
    return found


def spread(ordered: Sequence[str], size: int) -> list[str]:
    """So many of a list, evenly spaced from its first on. (The authors' are nearest to the centres of a k-means over distances.)"""
    return [ordered[i * len(ordered) // size] for i in range(size)] if len(ordered) > size else list(ordered)


@torch.no_grad()
def by_output(
    pipe: Any, targets: Sequence[str], prompts: Sequence[Sequence[str]], settings: PoolSettings
) -> list[list[str]]:
    """For each target its prompts by how near the base's predictions for them are to those for the target, along the target's own way from
    one noise; the nearest first."""
    family = family_of(pipe)
    shape = latent_shape(pipe, settings.resolution)
    sampler = sampler_for(pipe, settings.num_inference_steps, shape[1:])
    pixels = shape[1] * getattr(pipe, "vae_scale_factor", 8)
    encoded = Prompts(
        pipe, [*targets, *(text for own in prompts for text in own)], pixels, settings.max_sequence_length
    )
    call = Caller(family, private(component(pipe, family.denoiser)), encoded, sampler)
    places = dict.fromkeys(len(sampler) * i // LOOKS for i in range(LOOKS))
    ordered = []
    for target, own in zip(targets, prompts, strict=True):
        noise = sampler.noise(settings.seed, ("hard pool", target), shape)[None]
        pairs = trajectories(call.rows, sampler, noise, {SAMPLE: [target]}, settings.guidance_scale or 1.0, ())
        far = torch.zeros(len(own), dtype=torch.float64)
        for place in places:
            latents, timestep = pairs.latents[:, place].float(), sampler.timesteps[place : place + 1]
            rows = [[text] for text in (target, *own)]
            batches = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
            predictions = torch.cat([each.cpu() for batch in batches for each in call.rows(latents, timestep, batch)])
            distances = (predictions[1:] - predictions[:1]).double().square().flatten(1).mean(1)
            far += distances / distances.mean().clamp(min=1e-30)  # so that each place counts as much
        ordered.append([own[i] for i in far.argsort(stable=True).tolist()])
    return ordered
