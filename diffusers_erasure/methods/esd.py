"""ESD: erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345), trained as a LoRA.

The student's prediction for the concept is trained to be the base's, guided away from it. At a noisy latent x_t:

    paper:   L = | e(x_t, c) - (e*(x_t, 0) - eta (e*(x_t, c) - e*(x_t, 0))) |^2
    newer:   L = | e(x_t, f) - (e*(x_t, f) - eta (e*(x_t, c) - e*(x_t, 0))) |^2

e is the student (LoRA on), e* the base (LoRA off), c the concept, 0 the anchor (by default the empty prompt) and f what
it is erased from, by default c itself. Then the second target is (1 - eta) e*(c) + eta e*(0), and the first one
(1 + eta) e*(0) - eta e*(c): the newer eta is the paper's plus one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..denoising.sampler import SAMPLE
from ..errors import ErasureInputError
from ..schema import Concept
from ..settings import ByFacts, Number, Of
from ..training import TrainConfig, TrainingRun, TrainSettings, fit_by_training, resolved_for
from ..training.config import (
    ALL_BUT_CROSS,
    DOOR_RATE,
    LEARNING_RATE,
    STEPS,
    TRAJECTORIES,
    of_unets,
    with_layers_of,
)
from ..training.objective import STUDENT, Step, squares
from ..training.objective import Objective as Method
from ..training.pool import Example


CONCEPT, NEUTRAL = "concept", "neutral"  # roles

# What the authors run: full weights in 2023 and 2025, here as a LoRA with the learning rate of one.
PUBLISHED: dict[str, dict[str, Any]] = {
    task: {
        "train_set": train_set,
        "rank": rank,
        "templates": "none",
        "formula": "paper",
        "eta": 1.0,
        "learning_rate": 1e-4,
        "steps": 1000,
        "batch_size": 1,
        "policy": "student",
        "trajectories": 0,
        "num_inference_steps": 50,
        "guidance_scale": 3.0,
    }
    for task, train_set, rank in (("style", "x", 4), ("object", ALL_BUT_CROSS, 8), ("nudity", ALL_BUT_CROSS, 16))
}
# Where text enters, and there alone. Without whitening a step that reaches one target changes everything: of eight objects in one LoRA
# each was still drawn, or all else went.
WHITENED = {
    "train_set": "doors",
    "whiten": 1e-3,
    "eta": 2.0,
    "accumulation": of_unets(2, 1),
    "learning_rate": DOOR_RATE,
    "retain_weight": 10.0,
    "retain_nearest": 32,
    "steps": ByFacts("300, and 60 for each further concept", lambda facts: 300 + 60 * (facts.concepts - 1)),
}
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **PUBLISHED[task],
        "train_set": ALL_BUT_CROSS,
        "templates": {"style": "style_context", "object": "object_context"}.get(task, "none"),
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "cosine",
        "retain_weight": 5.0,
        "batch_size": 4,
        "policy": "base",
        "trajectories": TRAJECTORIES,
        "num_inference_steps": 20,
        **(WHITENED if task != "nudity" else {}),
    }
    for task in PUBLISHED
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of ESD, on top of those of [`TrainConfig`]. Those that are left out (`None`) come from
    the preset.

    Args:
        preset (`"style"`, `"object"` or `"nudity"`, *optional*, defaults to `"object"`): the kind of concept; what
            is not given is chosen for it.
        published (`bool`, *optional*, defaults to `False`): take the authors' settings of the preset (fresh on-policy
            denoising of 50 steps for every sample, no templates) instead of this library's.
        formula (`"paper"` or `"newer"`, *optional*): the prediction from which the guidance away from the concept starts: the
            anchor's (`"paper"`), or that of `erase_from`, by default the concept's own (`"newer"`); see the module.
        eta (`float`, *optional*): strength of the negative guidance, in the units of the formula.
        erase_from (`str`, *optional*): with `"newer"`: erase the concept from what this prompt draws; one for all concepts.
    """

    preset: Literal["style", "object", "nudity"] = "object"
    published: bool = False
    formula: Literal["paper", "newer"] | None = None
    eta: Annotated[float | None, Number()] = None
    erase_from: Annotated[str | None, Of("a prompt", str)] = None

    def stated(self) -> Mapping[str, Any]:
        chosen = {**super().stated(), **(PUBLISHED if self.published else PRESETS)[self.preset], "erase_from": ""}
        # Only the newer formula knows what is erased from.
        if self.formula == "newer" or (self.formula is None and self.erase_from is not None):
            chosen |= {"formula": "newer", "eta": eta_of_paper(chosen["eta"])}
        return with_layers_of(self, chosen, self.published)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.erase_from is not None and not self.erase_from.strip():
            raise ErasureInputError("`erase_from` must not be empty; leave it out to erase the concept from itself.")


@dataclass(frozen=True, kw_only=True)
class Settings(TrainSettings):
    """What ESD works with: a [`Config`] with nothing left out; `erase_from` is empty for the concept itself."""

    preset: str
    published: bool
    formula: Literal["paper", "newer"]
    eta: float
    erase_from: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.erase_from and self.formula != "newer":
            raise ErasureInputError('`erase_from` needs `formula="newer"`.')

    def recorded(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        settings, secret = super().recorded()
        return {**settings, "erase_from": self.erase_from or None}, tuple(sorted((*secret, "erase_from")))


def eta_of_paper(eta: float) -> float:
    """The newer formula's `eta` that means what the paper's `eta` does."""
    return eta + 1


class Objective(Method):
    """ESD's loss. Implements [`Objective`]."""

    teacher_roles: tuple[str, ...] = (STUDENT, CONCEPT, NEUTRAL)

    def __init__(self, eta: float, erase_from: str | None = None, newer: bool = False) -> None:
        self.eta = eta if newer else eta_of_paper(eta)
        self.erase_from = erase_from

    def examples(self, concepts: Sequence[Concept], templates: Sequence[str]) -> list[Example]:
        """Denoise with f, ask the student for f, and the base for f, c and the anchor."""
        found = []
        for template in templates:
            for concept in concepts:
                erased = template.format(concept.target)
                source = template.format(self.erase_from) if self.erase_from else erased
                neutral = template.format(concept.anchor) if concept.anchor else ""
                found.append(Example({SAMPLE: source, STUDENT: source, CONCEPT: erased, NEUTRAL: neutral}))
        return found

    def loss(self, step: Step) -> torch.Tensor:
        source, concept, neutral = step.teacher(STUDENT, CONCEPT, NEUTRAL)
        return squares(step.student(), source - self.eta * (concept - neutral))


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolved_for(pipe, concepts, config, Settings)
    objective = Objective(settings.eta, settings.erase_from or None, settings.formula == "newer")
    return fit_by_training(pipe, "esd", concepts, objective, settings, run)
