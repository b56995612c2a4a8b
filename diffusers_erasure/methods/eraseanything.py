"""EraseAnything (Gao et al., ICML 2025, arXiv 2412.20413): a bi-level optimisation of a LoRA on the queries and keys of text.

Two kinds of steps, in turn, first the lower one:

    lower, erase:     | v(z, c) - (v*(z, 0) - eta (v*(z, c) - v*(z, 0))) |^2  +  l2 sum |A(z, c)|
    upper, preserve:  l3 | v(z', r) - v*(z', r) |^2  +  l4 log( e^(f.f*/tau) / (e^(f.f*/tau) + sum_k e^(g_k.f*/tau)) )

v is the student, v* the base (the LoRA off), c the concept, 0 the anchor, r a retained prompt on its own noisy latents z'. A are the
attention weights of the last block with text projections of its own, from all tokens to those of the concept's word; |A| is the norm
over heads. f are these weights as one vector, that the student makes of the concept, f* what the base makes of it, and g_k what the
base makes of retained words in the same prompt: the concept is drawn away from itself, towards them.

In the authors' code the teacher is the student itself, latents are finished pictures at any timestep, the preserving steps
re-teach pictures of the concept, and words come from a language model and a thesaurus; see docs/methods/eraseanything.md.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..denoising.prompts import nearest, parts_of, text_length
from ..errors import ErasureInputError
from ..logging import get_logger
from ..schema import Concept
from ..settings import Number, Whole
from ..training import TrainConfig, TrainingRun, TrainSettings, fit_by_training, resolved_for
from ..training.attention import AttentionToText, word_places
from ..training.config import and_doors_of_sd3
from ..training.objective import STUDENT, Step
from ..training.pool import Example
from . import esd


logger = get_logger(__name__)

WORD = "word {}"  # roles of retained words
UPPER_RATE = 0.5  # of the learning rate, in preserving steps
TEMPERATURE = 0.07

# The paper's, as far as the code agrees with it.
PUBLISHED: dict[str, Any] = {
    "train_set": "text_kq",
    "rank": 8,
    "templates": "none",
    "eta": 1.0,
    "attention_weight": 1e-3,
    "retain_weight": 0.1,
    "contrast_weight": 0.1,
    "learning_rate": 1e-3,
    "weight_decay": 1e-5,
    "steps": 1000,
    "batch_size": 1,
    "policy": "student",
    "trajectories": 0,
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
}
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **PUBLISHED,
        "train_set": and_doors_of_sd3(PUBLISHED["train_set"]),
        "templates": {"style": "style_context", "object": "object_context"}.get(task, "none"),
        "steps": 300,
        "batch_size": 4,
        "policy": "base",
        "trajectories": 16,
        "num_inference_steps": 20,
    }
    for task in ("style", "object", "nudity")
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of EraseAnything, on top of those of [`TrainConfig`]. Those that are left out (`None`) come from
    the preset. Retained prompts are needed in half of its steps; without any, all of them erase.

    Args:
        preset (`"style"`, `"object"` or `"nudity"`, *optional*, defaults to `"object"`): the kind of concept; what
            is not given is chosen for it.
        published (`bool`, *optional*, defaults to `False`): take the authors' settings instead of this library's.
        eta (`float`, *optional*): strength of the negative guidance, as in ESD's paper.
        attention_weight (`float`, *optional*): weight of the attention to the concept's word, in steps that erase.
        contrast_weight (`float`, *optional*): weight of the contrast with retained words, in steps that preserve.
        contrast_words (`int`, *optional*, defaults to 3): how many retained words the concept is contrasted with.
    """

    preset: Literal["style", "object", "nudity"] = "object"
    published: bool = False
    eta: Annotated[float | None, Number()] = None
    attention_weight: Annotated[float | None, Number()] = None
    contrast_weight: Annotated[float | None, Number()] = None
    contrast_words: Annotated[int, Whole(least=1)] = 3

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), **(PUBLISHED if self.published else PRESETS[self.preset])}


@dataclass(frozen=True, kw_only=True)
class Settings(TrainSettings):
    """What EraseAnything works with: a [`Config`] with nothing left out."""

    preset: str
    published: bool
    eta: float
    attention_weight: float
    contrast_weight: float
    contrast_words: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_checkpointing and (self.attention_weight or self.contrast_weight):
            raise ErasureInputError(
                "`gradient_checkpointing` computes attention again where nobody sees it. Leave it out, or set `attention_weight` and "
                "`contrast_weight` to 0."
            )


class Objective(esd.Objective):
    """EraseAnything's losses, by turns. Implements [`Objective`].

    Args:
        eta: of ESD.
        attention_weight, contrast_weight: of the other terms.
        words: retained words, by target; as many of each.
        places: at which text rows the word that a prompt is about stands, by prompt.
        alternates: whether every second step preserves.
    """

    def __init__(
        self,
        eta: float,
        attention_weight: float,
        contrast_weight: float,
        words: Mapping[str, Sequence[str]] | None = None,
        places: Mapping[str, Sequence[int]] | None = None,
        alternates: bool = True,
    ) -> None:
        super().__init__(eta)
        self.attention_weight, self.contrast_weight = attention_weight, contrast_weight
        self.words, self.places, self.alternates = dict(words or {}), dict(places or {}), alternates
        self.count = len(next(iter(self.words.values()), ()))
        self.attention = AttentionToText()

    def examples(self, concepts: Sequence[Concept], templates: Sequence[str]) -> list[Example]:
        """As ESD's, and each retained word in the concept's place."""
        found = []
        for template in templates:
            for concept, example in zip(concepts, super().examples(concepts, (template,)), strict=True):
                words = self.words.get(str(concept.target), ())
                roles = {WORD.format(i): template.format(word) for i, word in enumerate(words)}
                found.append(Example({**example.prompts, **roles}))
        return found

    def inside(self, model: Any) -> AbstractContextManager[None]:
        return self.attention.watching(model)

    def preserves(self, number: int) -> bool:
        """Whether a step is an upper one."""
        return self.alternates and number % 2 == 1

    def retains(self, number: int) -> bool:
        return self.preserves(number)

    def rate(self, number: int) -> float:
        return UPPER_RATE if self.preserves(number) else 1.0

    def loss(self, step: Step) -> torch.Tensor:
        student = step.student()
        if self.preserves(step.number):
            return self._contrast(step) if self.contrast_weight and self.count else student.flatten(1).sum(1) * 0
        erased = super().loss(step)
        if not self.attention_weight:
            return erased
        own = self._to_words(self.attention.take(len(student)), step, STUDENT)
        norms = torch.linalg.vector_norm(own, dim=1)  # over heads
        return erased + self.attention_weight * norms.flatten(1).sum(1)

    def _contrast(self, step: Step) -> torch.Tensor:
        count = len(step.drawn.latents)
        own = self._features(self.attention.take(count), step, STUDENT)
        roles = [STUDENT, *(WORD.format(i) for i in range(self.count))]
        rows = [step.drawn.asked(role) for role in roles]
        step.network.teacher_rows(step.drawn.latents, step.drawn.timesteps, rows)
        taken = self.attention.take(count * len(rows)).chunk(len(rows))
        base, *others = (self._features(each, step, role) for each, role in zip(taken, roles, strict=True))
        similar = torch.stack([(each * base).sum(1) for each in (own, *others)], 1)
        return self.contrast_weight * (similar / TEMPERATURE).log_softmax(1)[:, 0]

    def _to_words(self, weights: torch.Tensor, step: Step, role: str) -> torch.Tensor:
        """Attention weights [B, heads, tokens, text], 0 but to the word that each prompt is about, or as much of it as is mixed in."""
        mask = torch.zeros(len(weights), weights.shape[-1])
        for row, prompt in zip(mask, step.drawn.asked(role), strict=True):
            for part, weight in parts_of(prompt):
                row[list(self.places[part])] += weight
        return weights * mask.to(weights.device)[:, None, None]

    def _features(self, weights: torch.Tensor, step: Step, role: str) -> torch.Tensor:
        """How much each token looks at the word: unit vectors [B, tokens]."""
        sums = self._to_words(weights, step, role).sum(-1).mean(1)
        return torch.nn.functional.normalize(sums, dim=1)


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolved_for(pipe, concepts, config, Settings)
    targets, kept = [str(concept.target) for concept in concepts], [*settings.retain.prompts, *settings.retain.held]
    if not kept:
        logger.warning("Nothing is retained, so that no step preserves anything: name in `retain` what must stay.")
    words = {target: nearest(pipe, kept, [target], settings.contrast_words) for target in targets if kept}
    length = settings.max_sequence_length or text_length(pipe)
    places = {
        template.format(word): word_places(pipe, template.format(word), word, length)
        for template in settings.template_list
        for word in (*targets, *(word for own in words.values() for word in own))
    }
    weights = settings.attention_weight, settings.contrast_weight
    objective = Objective(settings.eta, *weights, words, places, alternates=bool(kept))
    return fit_by_training(pipe, "eraseanything", concepts, objective, settings, run)
