"""How far the denoiser's predictions moved, for erasures that do not act on text rows alone: those that were trained."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..artifact import Erasure
from ..base_model import component, family_of
from ..denoising.calls import Caller, latent_shape
from ..denoising.prompts import Prompts, nearest
from ..denoising.sampler import SAMPLE, Pairs, Predict, Sampler, sampler_for, trajectories
from ..denoising.twin import twin_of
from ..errors import ErasureCompatibilityError
from ..live.attachment import Loaded, attach, detach
from ..runs.interrupts import Interrupt


CONTEXT = "a {}"
STEPS, TRAJECTORIES = 4, 2  # noisy latents of a word: so many on the way of each of so many noises
NEAR, SPREAD = 20, 20  # words that are looked at: the nearest to the targets, and others evenly spaced in the list
MOST_TARGETS = 4
BATCH = 8


class StoppedError(Exception):
    """The comparison was asked to stop."""


def looked_at(pipe: Any, words: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The words of which predictions are compared, at most 40, in the list's order."""
    near = nearest(pipe, words, targets[:MOST_TARGETS], NEAR)[:NEAR]
    rest = [word for word in words if word not in near]
    step = max(1, -(-len(rest) // SPREAD))
    chosen = {*near, *rest[::step]}
    return [word for word in words if word in chosen]


class Predictions:
    """Compares predictions of the un-erased model with those of an erasure.

    Args:
        pipe ([`DiffusionPipeline`]): the base model, its text encoders still there: prompts are encoded now.
        words (sequence of `str`): the words.
        targets (sequence of `str`): the concepts that are erased.
        progress (`bool`, *optional*, defaults to `False`): show a bar.
    """

    def __init__(self, pipe: Any, words: Sequence[str], targets: Sequence[str], progress: bool = False) -> None:
        self.pipe, self.progress = pipe, progress
        self.words = looked_at(pipe, words, targets)
        self.texts = [CONTEXT.format(word) for word in (*targets[:MOST_TARGETS], *self.words)]
        self.family = family_of(pipe)
        self.shape = latent_shape(pipe)
        self.prompts = Prompts(pipe, self.texts, self.shape[1] * getattr(pipe, "vae_scale_factor", 8))

    @torch.no_grad()
    def moves(self, erasure: Erasure, interrupt: Interrupt | None = None) -> torch.Tensor:
        """For each word |e' - e|, over noisy latents of it, as a share of that of the targets: float64 [N].

        Latents lie on the base's own way from noise to picture, without guidance. Where the targets moved less far than
        from their own predictions to the empty prompt's, that is taken for the whole: an edit that does next to nothing
        moves nothing far.

        All passes are those of a twin of the denoiser, in which no other erasure acts.

        Raises:
            StoppedError: a signal came.
            ErasureCompatibilityError: the denoiser can have no twin, as it is offloaded.
        """
        name = self.family.denoiser
        model = twin_of(component(self.pipe, name))
        if model is None:
            raise ErasureCompatibilityError(f"the {name} is offloaded, cached or cast layer by layer.")
        sampler = sampler_for(self.pipe, STEPS, self.shape[1:])
        noise = torch.stack([sampler.noise(0, ("collateral", i), self.shape) for i in range(TRAJECTORIES)])
        call = Caller(self.family, model, self.prompts, sampler)

        def predict(
            latents: torch.Tensor,
            timesteps: torch.Tensor,
            rows: Sequence[Sequence[str]],
            guidance: Sequence[float] | None = None,  # that of trajectories without any
        ) -> list[torch.Tensor]:
            found = []
            for row in rows:
                if interrupt is not None and interrupt.signal is not None:
                    raise StoppedError
                found.append(call(latents, timesteps, row))
                bar.update()
            return found

        batches = [self.texts[start : start + BATCH] for start in range(0, len(self.texts), BATCH)]
        asked = [[text for text in texts for _ in range(TRAJECTORIES)] for texts in batches]
        hidden = not self.progress or int(os.environ.get("LOCAL_RANK", "0")) > 0
        passes = len(sampler) * (2 * len(batches) + 1)
        with tqdm(total=passes, desc="comparing", disable=hidden, dynamic_ncols=True) as bar:
            base = [
                trajectories(predict, sampler, noise.repeat(len(texts), 1, 1, 1), {SAMPLE: repeated}, 1.0, (SAMPLE,))
                for texts, repeated in zip(batches, asked, strict=True)
            ]
            count = len(self.texts) - len(self.words)  # of targets, all in the first batch
            whole = self._change(predict, sampler, base[0], [""] * len(asked[0]))[:count]
            with _attached(name, model, erasure):
                found = [self._change(predict, sampler, *each) for each in zip(base, asked, strict=True)]
        total = torch.cat(found)
        return total[count:] / torch.maximum(total[:count], whole).mean().clamp_min(1e-300)

    def _change(self, predict: Predict, sampler: Sampler, base: Pairs, texts: Sequence[str]) -> torch.Tensor:
        """|e' - e| of each word of a batch, summed over its latents."""
        change = torch.zeros(len(texts), dtype=torch.float64)
        for index, timestep in enumerate(sampler.timesteps):
            latents = base.latents[:, index]
            (after,) = predict(latents, timestep.expand(len(texts)), [texts])
            change += (after - base.predictions[SAMPLE][:, index]).flatten(1).norm(dim=1).double().cpu()
        return change.view(-1, TRAJECTORIES).sum(1)


@contextmanager
def _attached(component: str, model: nn.Module, erasure: Erasure) -> Iterator[None]:
    """Within the block an erasure acts on a denoiser. Without a text encoder beside it: all prompts are encoded."""
    name = "being compared"
    attach({component: model}, [component], Loaded(name, erasure, 1.0, {}, ""))
    try:
        yield
    finally:
        detach([model], name)  # now, as what is attached is freed only when cycles are looked for
