"""What an edit hurts most, found while it is trained: a distribution over a pool of prompts for each concept, that learns (EAP)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce

from ..denoising.prompts import Mixture, Prompt
from ..denoising.sampler import generator_for
from .network import Network
from .objective import RETAIN, Adversarial, Objective, Step, squares
from .pool import Example


MOST_TOLD = 8  # prompts of a concept that are told of


@dataclass(frozen=True)
class Picks:
    """What was picked for the samples of a batch.

    Attributes:
        places: [B], in the list of retained examples; -1 where nothing is picked.
        concepts: [B], whose distribution it is from.
        noise: Gumbel's, [B, n], float64.
    """

    places: torch.Tensor
    concepts: list[int]
    noise: torch.Tensor


class Adversary:
    """Logits [K, n] over the pools of K concepts, and their optimiser.

    A pick is Gumbel-softmax's, straight through: the one prompt with the highest logit plus noise, and for gradients the softmax of both
    over the temperature. Logits start equal and rise where the student is far from the base.

    Args:
        settings ([`Adversarial`]): how it searches.
        examples: the retained ones; the prompts of the pools are among them.
        texts: for each concept, as its pool is, the prompts as they stand in the examples.
        seed: noise depends on it, and on the number of the step and batch.
    """

    def __init__(
        self, settings: Adversarial, examples: Sequence[Example], texts: Sequence[Sequence[str]], seed: int
    ) -> None:
        place_of = {example.prompts[RETAIN]: place for place, example in reversed(list(enumerate(examples)))}
        self.settings, self.texts, self.seed = settings, [tuple(each) for each in texts], seed
        self.places = [[place_of[text] for text in each] for each in self.texts]
        count = max(map(len, self.texts))
        self.there = torch.tensor([[i < len(each) for i in range(count)] for each in self.texts])
        self.logits = torch.full((len(texts), count), 1 / count, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=settings.learning_rate)
        self.picked = torch.zeros(self.logits.shape, dtype=torch.float64)  # how often

    def picks(self, concepts: Sequence[int], what: Sequence[object], total: int, own: slice) -> Picks:
        """Pick for this process's samples.

        Args:
            concepts: whose distribution each of them is drawn from.
            what: the number of the step and batch, on which all depends.
            total: samples of the whole batch, over all processes.
            own: which of them are this process's.
        """
        generator = generator_for(self.seed, "adversary", *what)
        uniform = torch.rand(total, self.logits.shape[1], generator=generator, dtype=torch.float64)
        noise = -(-uniform.clamp(1e-12, 1 - 1e-12).log()).log()
        # Evenly spread: of a share of a half every second sample.
        wanted = [int((i + 1) * self.settings.share) > int(i * self.settings.share) for i in range(total)][own]
        best = self._scores(concepts, noise[own]).argmax(1).tolist()
        places = [self.places[k][i] if use else -1 for k, i, use in zip(concepts, best, wanted, strict=True)]
        return Picks(torch.tensor(places), list(concepts), noise[own])

    def _scores(self, concepts: Sequence[int], noise: torch.Tensor) -> torch.Tensor:
        """Logits and noise, [B, n]; where a pool is shorter than others nothing can be picked."""
        chosen = list(concepts)
        return (self.logits[chosen] + noise).masked_fill(~self.there[chosen], -torch.inf)

    def weights(self, picks: Picks) -> torch.Tensor:
        """Of each prompt in the pool, [B, n]: 1 for the one that was picked, with the gradients of the softmax."""
        scores = self._scores(picks.concepts, picks.noise)
        soft = (scores / self.settings.temperature).softmax(1)
        hard = torch.zeros_like(soft).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())  # in this order exactly one of them is 1

    def ascend(self, network: Network, objective: Objective, step: Step, accelerator: Accelerator) -> None:
        """One step of the logits, up the retained prompts' loss, by the latents that the student was trained at."""
        retained, picks = step.retained, step.picks
        if retained is None or picks is None:
            return
        rows = (picks.places >= 0).nonzero().flatten().tolist()
        weights = self.weights(picks)
        gradient = torch.zeros_like(self.logits)
        counted = torch.zeros_like(self.picked)
        if rows:
            asked: list[Prompt] = [
                Mixture(self.texts[picks.concepts[row]], weights[row, : len(self.texts[picks.concepts[row]])])
                for row in rows
            ]
            latents, timesteps = retained.latents[rows], retained.timesteps[rows]
            # Not by the wrapper of several processes, which waits for gradients of what is trained.
            found = network.call(latents, timesteps, asked)
            loss = (objective.scale(network.sampler, timesteps) * squares(found, step.kept()[rows]).cpu()).sum()
            (gradient,) = torch.autograd.grad(loss, [self.logits])
            for row in rows:
                concept = picks.concepts[row]
                counted[concept, self.places[concept].index(int(picks.places[row]))] += 1
        counted = reduce(counted.to(accelerator.device), "sum").cpu()
        self.picked += counted
        self.logits.grad = -reduce(gradient.to(accelerator.device), "sum").cpu() / counted.sum().clamp(min=1)
        self.optimizer.step()

    # ------------------------------------------------------------------------------------------ state and telling

    def saved(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        state = {f"adam.{key}": torch.as_tensor(value) for key, value in self.optimizer.state[self.logits].items()}
        return {"logits": self.logits.detach().clone(), "picked": self.picked, **state}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what [`saved`] gave."""
        with torch.no_grad():
            self.logits.copy_(tensors["logits"])
        self.picked = tensors["picked"].clone()
        adam = {key.removeprefix("adam."): value.clone() for key, value in tensors.items() if key.startswith("adam.")}
        if adam:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": {0: adam}, "param_groups": groups})

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What it found: for each concept the prompts that it picked most often, with how often; and how far the logits went."""
        told = []
        for pool, counts in zip(self.settings.pools, self.picked, strict=True):
            order = counts.argsort(descending=True, stable=True)[:MOST_TOLD].tolist()
            told.append({pool[i]: int(counts[i]) for i in order if i < len(pool) and counts[i]})
        spread = self.logits.detach().masked_fill(~self.there, torch.nan)
        rises = [float(row[there].max() - row[there].min()) for row, there in zip(spread, self.there, strict=True)]
        return {"picked": told, "pool": [len(pool) for pool in self.settings.pools], "logits": max(rises)}
