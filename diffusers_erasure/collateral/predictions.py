"""How far the denoiser's predictions moved, for erasures that do not act on text rows alone: those that were trained."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import compat
from ..artifact import Erasure
from ..base_model import component
from ..denoising.prompts import Prompts, nearest
from ..denoising.sampler import SAMPLE, Pairs, Predict, Sampler, trajectories
from ..live.blocks import alone


CONTEXT = "a {}"
STEPS, TRAJECTORIES = 4, 2  # noisy latents of a word: so many on the way of each of so many noises
NEAR, SPREAD = 20, 20  # words that are looked at: the nearest to the targets, and others evenly spaced in the list
MOST_TARGETS = 4
BATCH = 8


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
    """

    def __init__(self, pipe: Any, words: Sequence[str], targets: Sequence[str]) -> None:
        self.pipe = pipe
        self.words = looked_at(pipe, words, targets)
        self.texts = [CONTEXT.format(word) for word in (*targets[:MOST_TARGETS], *self.words)]
        unet = component(pipe, "unet")
        size = unet.config.sample_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.prompts = Prompts(pipe, self.texts, self.size[0] * getattr(pipe, "vae_scale_factor", 8))

    @torch.no_grad()
    def moves(self, erasure: Erasure) -> torch.Tensor:
        """For each word |e' - e|, over noisy latents of it, as a share of that of the targets: float64 [N].

        Latents lie on the base's own way from noise to picture, without guidance. Where the targets moved less far than
        from their own predictions to the empty prompt's, that is taken for the whole: an edit that does next to nothing
        moves nothing far.
        """
        unet = component(self.pipe, "unet")
        training = unet.training
        unet.eval()
        sampler = Sampler(self.pipe.scheduler.config, STEPS)
        shape = (unet.config.in_channels, *self.size)
        noise = torch.stack([sampler.noise(0, ("collateral", i), shape) for i in range(TRAJECTORIES)])

        def predict(
            latents: torch.Tensor, timesteps: torch.Tensor, rows: Sequence[Sequence[str]]
        ) -> list[torch.Tensor]:
            return [self._call(unet, sampler, latents, timesteps, row) for row in rows]

        batches = [self.texts[start : start + BATCH] for start in range(0, len(self.texts), BATCH)]
        asked = [[text for text in texts for _ in range(TRAJECTORIES)] for texts in batches]
        try:
            base = [
                trajectories(predict, sampler, noise.repeat(len(texts), 1, 1, 1), {SAMPLE: repeated}, 1.0, (SAMPLE,))
                for texts, repeated in zip(batches, asked, strict=True)
            ]
            count = len(self.texts) - len(self.words)  # of targets, all in the first batch
            whole = self._change(predict, sampler, base[0], [""] * len(asked[0]))[:count]
            with alone(self.pipe, erasure):
                found = [self._change(predict, sampler, *each) for each in zip(base, asked, strict=True)]
        finally:
            unet.train(training)
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

    def _call(
        self, unet: Any, sampler: Sampler, latents: torch.Tensor, timesteps: torch.Tensor, texts: Sequence[str]
    ) -> torch.Tensor:
        device = compat.execution_device(unet)
        times = timesteps.to(device)
        scaled = sampler.model_input(latents.to(device), times).to(unet.dtype)
        arguments = self.prompts.batch(texts, device, unet.dtype)
        return unet(scaled, times, return_dict=False, **arguments)[0].float()
