"""Pools of prompts among which an adversary searches for what an edit hurts most: near to a concept, by its rows or by what is drawn."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..base_model import component, family_of
from ..denoising.calls import Caller, latent_shape
from ..denoising.prompts import Prompts, nearest
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
    pools = []
    for target in targets:
        near = nearest(pipe, found, [target], settings.pool_nearest)
        if settings.pool_by == "output":
            near = by_output(pipe, target, near, settings)[:size]
        pools.append(spread(near, size))
    return pools


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
def by_output(pipe: Any, target: str, prompts: Sequence[str], settings: PoolSettings) -> list[str]:
    """Prompts by how near the base's predictions for them are to those for the target, along the target's own way from one noise."""
    family = family_of(pipe)
    model = private(component(pipe, family.denoiser))
    shape = latent_shape(pipe, settings.resolution)
    sampler = sampler_for(pipe, settings.num_inference_steps, shape[1:])
    pixels = shape[1] * getattr(pipe, "vae_scale_factor", 8)
    encoded = Prompts(pipe, [target, *prompts], pixels, settings.max_sequence_length)
    call = Caller(family, model, encoded, sampler)

    def predict(
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Sequence[Sequence[str]],
        guidance: Sequence[float] | None = None,
    ) -> list[torch.Tensor]:
        flat = [prompt for row in rows for prompt in row]
        each = None if guidance is None else [value for value in guidance for _ in range(len(latents))]
        repeated = latents.repeat(len(rows), *(1,) * (latents.ndim - 1)), timesteps.repeat(len(rows))
        return list(call(*repeated, flat, each).chunk(len(rows)))

    noise = sampler.noise(settings.seed, ("hard pool", target), shape)[None]
    pairs = trajectories(predict, sampler, noise, {SAMPLE: [target]}, settings.guidance_scale or 1.0, ())
    places = [len(sampler) * i // LOOKS for i in range(LOOKS)]
    far = torch.zeros(len(prompts), dtype=torch.float64)
    for place in dict.fromkeys(places):
        latents = pairs.latents[:1, place].float()
        timestep = sampler.timesteps[place : place + 1]
        found = []
        for first in range(0, 1 + len(prompts), BATCH):
            asked = [target, *prompts][first : first + BATCH]
            many = latents.expand(len(asked), *latents.shape[1:]).contiguous()
            found.append(call(many, timestep.expand(len(asked)), asked).cpu())
        predictions = torch.cat(found).double()
        distances = (predictions[1:] - predictions[:1]).square().flatten(1).mean(1)
        far += distances / distances.mean().clamp(min=1e-30)  # so that each place counts as much
    return [prompts[i] for i in far.argsort(stable=True).tolist()]
