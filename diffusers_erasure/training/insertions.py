"""Rows that bring a concept back, found while it is erased: they are put behind a prompt's words (Receler's adversary)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce

from ..denoising.prompts import Inserted, Prompt, Prompts
from ..denoising.sampler import generator_for
from .network import Network
from .objective import STUDENT, Inserting, Step, squares
from .pool import Example


class Insertions:
    """Rows [n, C] of each concept, in units of the root mean square of the prompts' own rows, and their optimisers.

    Args:
        settings ([`Inserting`]): how they are searched for.
        prompts ([`Prompts`]): encoded prompts.
        examples: all concepts in the first template, then all in the next.
        concepts: how many there are.
        seed: of the first values, uniform from 0 to 1.
    """

    def __init__(
        self, settings: Inserting, prompts: Prompts, examples: Sequence[Example], concepts: int, seed: int
    ) -> None:
        self.settings = settings
        self.concept_of = {id(example): i % concepts for i, example in enumerate(examples)}
        own = torch.stack([prompts.rows[prompts.index[example.prompts[STUDENT]]] for example in examples]).float()
        self.unit, self.length = float(own.square().mean().sqrt()), own.shape[1]
        shape = settings.count, own.shape[2]
        self.rows = [
            torch.rand(shape, generator=generator_for(seed, "insertions", k)).requires_grad_() for k in range(concepts)
        ]
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizers = [torch.optim.Adam([rows], lr=rate, weight_decay=decay) for rows in self.rows]
        self.found: list[float] = []  # the last losses of the search

    def asked(self, concept: int, prompt: str) -> Inserted:
        """A prompt with the concept's rows behind its words, as far as there is room."""
        place = self.settings.places[prompt]
        return Inserted(prompt, place, self.unit * self.rows[concept][: self.length - place])

    def search(self, network: Network, step: Step, accelerator: Accelerator) -> Step:
        """Lead the student, as it is, to what the base predicts for the concepts; and the batch as it is asked with the rows found."""
        drawn = step.drawn
        concepts = [self.concept_of[id(example)] for example in drawn.examples]
        texts = [example.prompts[STUDENT] for example in drawn.examples]
        (wanted,) = step.teacher(self.settings.role)
        for number in range(self.settings.steps):
            asked: list[Prompt] = [self.asked(k, text) for k, text in zip(concepts, texts, strict=True)]
            # Not by the wrapper of several processes, which waits for gradients of what is trained.
            losses = squares(network.call(drawn.latents, drawn.timesteps, asked), wanted)
            involved = sorted(set(concepts))
            slopes = dict(
                zip(involved, torch.autograd.grad(losses.sum(), [self.rows[k] for k in involved]), strict=True)
            )
            counts = torch.tensor([float(concepts.count(k)) for k in range(len(self.rows))])
            summed = torch.stack([slopes.get(k, torch.zeros_like(rows)) for k, rows in enumerate(self.rows)])
            counts = reduce(counts.to(accelerator.device), "sum").cpu()
            summed = reduce(summed.to(accelerator.device), "sum").cpu()
            for k, optimizer in enumerate(self.optimizers):
                if counts[k]:
                    self.rows[k].grad = summed[k] / counts[k]
                    optimizer.step()
            if number == self.settings.steps - 1:
                mean = reduce(losses.detach().mean(), "mean")
                self.found = [*self.found[-15:], float(mean)]
        with torch.no_grad():
            mixed: list[Mapping[str, Prompt]] = [
                {**example.prompts, STUDENT: self.asked(k, example.prompts[STUDENT])}
                for k, example in zip(concepts, drawn.examples, strict=True)
            ]
        return Step(network, dataclasses.replace(drawn, mixed=mixed), step.retained, step.number, step.picks)

    # ------------------------------------------------------------------------------------------ state and telling

    def saved(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        found = {"losses": torch.tensor(self.found, dtype=torch.float64)}
        for k, (rows, optimizer) in enumerate(zip(self.rows, self.optimizers, strict=True)):
            found[f"{k}.rows"] = rows.detach().clone()
            found |= {f"{k}.adam.{key}": torch.as_tensor(v) for key, v in optimizer.state[rows].items()}
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what [`saved`] gave."""
        self.found = tensors["losses"].tolist()
        for k, (rows, optimizer) in enumerate(zip(self.rows, self.optimizers, strict=True)):
            with torch.no_grad():
                rows.copy_(tensors[f"{k}.rows"])
            prefix = f"{k}.adam."
            state = {key.removeprefix(prefix): v.clone() for key, v in tensors.items() if key.startswith(prefix)}
            if state:
                optimizer.load_state_dict(
                    {"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]}
                )

    @property
    def diagnostics(self) -> dict[str, Any]:
        """How near the rows came to the concept in the last steps: mean squares."""
        last = sum(self.found) / len(self.found) if self.found else 0.0
        return {"rows": self.settings.count, "loss": float(f"{last:.4g}")}
