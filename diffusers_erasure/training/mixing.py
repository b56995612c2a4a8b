"""Mixtures of a concept's prompts: what the denoiser is asked is a convex mixture of their encodings (as in TICoE)."""

import dataclasses
from collections.abc import Sequence

import torch

from ..denoising.prompts import Mixture
from ..denoising.sampler import generator_for
from ..errors import ErasureInputError
from .pool import Drawn, Example


class Mixing:
    """Draws mixtures of the templates in which a concept is trained.

    The weights are Dirichlet's with all parameters 1: uniform over all that add up to 1. They are the same for all roles of a
    sample, so that teacher and student are asked the same of concept and anchor. Noisy latents are denoised with one prompt, which
    is always among those that are mixed.

    Args:
        examples: as an objective gives them: all concepts in the first template, then all in the next.
        concepts: how many there are.
        count: templates in a mixture.
        seed: the weights depend on it, and on the number of the step and batch.

    Raises:
        ErasureInputError: there are fewer templates than that.
    """

    def __init__(self, examples: Sequence[Example], concepts: int, count: int, seed: int) -> None:
        self.examples, self.concepts, self.count, self.seed = list(examples), concepts, count, seed
        self.templates = len(self.examples) // concepts
        if self.templates < count:
            raise ErasureInputError(
                f"`mixtures` is {count}, but a concept has prompts in {self.templates} templates; give as many `templates`, such as "
                '"object_context", or mix fewer.'
            )
        self.places = {id(example): place for place, example in enumerate(self.examples)}

    def mixes(self, role: str) -> bool:
        """Whether prompts of a role differ by the template; the empty anchor does not."""
        texts = [example.prompts[role] for example in self.examples]
        return any(texts[i] != texts[i % self.concepts] for i in range(len(texts)))

    def of(self, drawn: Drawn, what: Sequence[object], total: int, own: slice) -> Drawn:
        """Samples with mixtures for their prompts.

        Args:
            drawn ([`Drawn`]): this process's samples.
            what: the number of the step and batch, on which all depends.
            total: samples of the whole batch, over all processes.
            own: which of them are this process's.
        """
        generator = generator_for(self.seed, "mixtures", *what)
        weights = torch.empty(total, self.count, dtype=torch.float64).exponential_(generator=generator)
        weights = weights / weights.sum(1, keepdim=True)
        order = torch.rand(total, self.templates, generator=generator)
        mixed = []
        for example, row, values in zip(drawn.examples, order[own], weights[own].tolist(), strict=True):
            place = self.places[id(example)]
            row[place // self.concepts] = -1  # the prompt that was denoised with comes first
            parts = [
                self.examples[template * self.concepts + place % self.concepts]
                for template in row.argsort()[: self.count].tolist()
            ]
            mixed.append(
                {role: Mixture.of([part.prompts[role] for part in parts], values) for role in example.prompts}
            )
        return dataclasses.replace(drawn, mixed=mixed)
