"""Where a step's noisy latents come from: a pool of trajectories, or each denoised anew."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from ..denoising.prompts import Prompt
from ..denoising.sampler import SAMPLE, Pairs, Predict, Sampler, generator_for, partial, trajectories


MOST_RETAINED = 256  # retained prompts that are trained on
LATENT_CELLS = 32_768  # of the latents that are denoised together: 8 of 64 x 64


@dataclass(frozen=True)
class Example:
    """What one sample is about: prompts by role. `"sample"` is denoised with, `"student"` is what the student is asked."""

    prompts: dict[str, str]


@dataclass(frozen=True)
class Drawn:
    """Noisy latents [B, C, H, W], timesteps [B], examples, predictions of the base that are known already, and prompts by role that
    are asked in place of the examples' own, for each sample or for none."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    examples: list[Example]
    known: dict[str, torch.Tensor] = field(default_factory=dict)
    mixed: Sequence[Mapping[str, Prompt]] = ()

    def asked(self, role: str) -> list[Prompt]:
        """What is asked in a role, one a sample."""
        return [each[role] for each in self.mixed or [example.prompts for example in self.examples]]


class Source:
    """Draws noisy latents for a list of examples.

    Args:
        sampler ([`Sampler`]): of the trajectories.
        examples: what they are about; those first in the list come first into the pool.
        count: trajectories of the pool; 0 for none.
        keep: roles whose predictions are kept along (for the policy `"base"`, where they are the teacher's).
        shape: (C, H, W) of a latent.
        guidance_scale: of the denoising.
        seed, name: everything random depends on these, and on the number of the trajectory or sample.
        dtype: of what is kept in memory, that of the network.
        favoured: examples of which half of the samples are drawn, the other half of all.
        late: steps by which latents are cleaner than the timesteps that they are given; 0 is right.
    """

    def __init__(
        self,
        sampler: Sampler,
        examples: Sequence[Example],
        count: int,
        keep: Sequence[str],
        shape: Sequence[int],
        guidance_scale: float,
        seed: int,
        name: str,
        dtype: torch.dtype,
        favoured: Sequence[int] = (),
        late: int = 0,
    ) -> None:
        self.late = late
        self.sampler, self.examples, self.count, self.keep = sampler, list(examples), count, tuple(keep)
        self.shape, self.guidance_scale, self.dtype = tuple(shape), guidance_scale, dtype
        self.seed, self.name = seed, name
        wanted, places = set(favoured), range(self.count or len(self.examples))
        self.liked = torch.tensor([place for place in places if place % len(self.examples) in wanted])
        self.drawn_times = 0  # trajectories that were drawn so far; those after the first `count` replace the oldest
        self.latents = torch.empty(0)
        self.predictions: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------------------------------------ the pool

    @property
    def is_full(self) -> bool:
        return self.drawn_times >= self.count

    def chunk(self, accelerator: Accelerator) -> int:
        """Trajectories that are drawn together."""
        cells = self.shape[-1] * self.shape[-2]
        return max(1, min(16, LATENT_CELLS // cells)) * accelerator.num_processes

    def extend(self, predict: Predict, accelerator: Accelerator, most: int) -> int:
        """Draw the next trajectories, at most `most` and a chunk of them; returns how many.

        Several processes share the work, and all of them get all.
        """
        numbers = list(range(self.drawn_times, self.drawn_times + min(most, self.chunk(accelerator))))
        share = -(-len(numbers) // accelerator.num_processes)
        padded = (numbers * share * accelerator.num_processes)[: share * accelerator.num_processes]
        own = padded[accelerator.process_index * share :][:share]
        noise = torch.stack([self.sampler.noise(self.seed, (self.name, number), self.shape) for number in own])
        examples = [self.examples[number % len(self.examples)] for number in own]
        prompts = {role: [each.prompts[role] for each in examples] for role in (SAMPLE, *self.keep)}
        pairs = trajectories(predict, self.sampler, noise, prompts, self.guidance_scale, self.keep)
        self._place(numbers, self._gathered(pairs, accelerator, len(numbers)))
        self.drawn_times += len(numbers)
        return len(numbers)

    def _gathered(self, pairs: Pairs, accelerator: Accelerator, count: int) -> Pairs:
        def everyones(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(self.dtype)
            if accelerator.num_processes > 1:
                tensor = accelerator.gather(tensor.to(accelerator.device).contiguous())
            return tensor[:count].cpu()

        return Pairs(everyones(pairs.latents), {role: everyones(value) for role, value in pairs.predictions.items()})

    def _place(self, numbers: Sequence[int], pairs: Pairs) -> None:
        if not len(self.latents):
            size = self.count, *pairs.latents.shape[1:]
            self.latents = torch.zeros(size, dtype=self.dtype)
            self.predictions = {role: torch.zeros(size, dtype=self.dtype) for role in pairs.predictions}
        places = [number % self.count for number in numbers]
        self.latents[places] = pairs.latents
        for role, value in pairs.predictions.items():
            self.predictions[role][places] = value

    def _example_at(self, place: int) -> Example:
        """What the trajectory at a place of the pool is about."""
        rounds = (self.drawn_times - 1 - place) // self.count
        return self.examples[(place + rounds * self.count) % len(self.examples)]

    # ------------------------------------------------------------------------------------------------- drawing

    def draw(
        self,
        what: Sequence[object],
        total: int,
        own: slice,
        predict: Callable[[], Predict],
        picked: torch.Tensor | None = None,
    ) -> Drawn:
        """Draw this process's samples of a batch.

        Args:
            what: the number of the step and batch, on which all depends.
            total: samples of the whole batch, over all processes.
            own: which of them are this process's.
            predict: gives the network to denoise with, where there is no pool.
            picked: for each of these the place of its example in the list, -1 for any.
        """
        generator = generator_for(self.seed, self.name, "batch", *what)
        length = len(self.sampler) - self.late
        # One k from each of `total` equal parts of 0..N-1: uniform, with less variance than independent ones.
        k = (
            ((torch.rand(total, generator=generator) + torch.arange(total)) * length / total)
            .long()
            .clamp(max=length - 1)
        )
        k = k[torch.randperm(total, generator=generator)][own]
        timesteps = self.sampler.timesteps[k]
        places = self._chosen(total, generator)[own]
        if picked is not None:
            places = torch.where(picked < 0, places, picked)
        if self.count:
            known = {role: value[places, k].float() for role, value in self.predictions.items()}
            k = k + self.late
            examples = [self._example_at(place) for place in places.tolist()]
            return Drawn(self.latents[places, k].float(), timesteps, examples, known)
        examples = [self.examples[place] for place in places.tolist()]
        numbers = range(total)[own]
        noise = torch.stack([self.sampler.noise(self.seed, (self.name, *what, n), self.shape) for n in numbers])
        prompts = [each.prompts[SAMPLE] for each in examples]
        latents = partial(predict(), self.sampler, noise, (k + self.late).tolist(), prompts, self.guidance_scale)
        return Drawn(latents, timesteps, examples)

    def _chosen(self, total: int, generator: torch.Generator) -> torch.Tensor:
        """Places of `total` samples in the pool, or among the examples where there is none; every second one favoured."""
        chosen = torch.randint(self.count or len(self.examples), (total,), generator=generator)
        if len(self.liked):
            chosen[::2] = self.liked[torch.randint(len(self.liked), (total,), generator=generator)][::2]
        return chosen

    # --------------------------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, torch.Tensor]:
        """The pool, to be saved."""
        if not self.count or not self.drawn_times:
            return {}
        return {"latents": self.latents, **{f"predictions.{role}": value for role, value in self.predictions.items()}}

    def restore(self, tensors: dict[str, torch.Tensor], drawn_times: int) -> None:
        """Take a saved pool."""
        self.drawn_times = drawn_times
        if tensors:
            self.latents = tensors["latents"]
            prefix = "predictions."
            self.predictions = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }
