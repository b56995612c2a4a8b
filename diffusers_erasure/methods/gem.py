"""GEM (ICML 2026): attract to an anchor, repel from the concept, along the student's own way; trained as a LoRA.

At latents z that the student denoises with the concept c, early on its way, with v the student's prediction, v* the base's and
a the anchor:

    L = gamma relu( |v(z, c) - v*(z, a)| - eta |v(z, c) - v*(z, c)| )

Norms are plain, over the whole latent. The hinge is zero as soon as the student is nearer to the anchor than eta times its
distance from the concept; eta = 0 is regression to the anchor alone, and its square, over the number of values, ESD's loss for
the paper's eta = 0. The authors' code keeps latents as they are after a step, and gives them the timestep before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..denoising.sampler import SAMPLE
from ..errors import ErasureInputError
from ..schema import Concept
from ..settings import ByFacts, Number
from ..training import TrainConfig, TrainingRun, TrainSettings, fit_by_training, resolved_for
from ..training.config import and_doors_of_sd3
from ..training.objective import STUDENT, Step
from ..training.objective import Objective as Method
from ..training.pool import Example


CONCEPT, NEUTRAL = "concept", "neutral"  # roles

RATE = ByFacts("0.001; of SD3 0.0002", lambda facts: 2e-4 if facts.family == "stable-diffusion-3" else 1e-3)
# What the authors run. A step is one trajectory of the student, of which all noisy latents are taken.
PUBLISHED: dict[str, Any] = {
    "train_set": "qk_dual",
    "rank": 16,
    "dropout": 0.1,
    "templates": "none",
    "gamma": 100.0,
    "eta": 1.0,
    "learning_rate": RATE,
    "weight_decay": 0.01,
    "retain_weight": 0.0,
    "steps": 26,
    "batch_size": 10,
    "policy": "student",
    "trajectories": 1,
    "refresh_every": 1,
    "refresh": 1,
    "num_inference_steps": 28,
    "first_steps": 10,
    "guidance_scale": 3.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **PUBLISHED,
        "train_set": and_doors_of_sd3(PUBLISHED["train_set"]),
        "dropout": 0.0,
        "eta": 0.02,  # guidance makes more of what is left of the way to the anchor
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine",  # the norm's gradient is as large near its minimum as far away
        "retain_weight": 250.0,
        "steps": 160,
        "batch_size": 8,
        "trajectories": 8,
        "refresh_every": 4,
        "refresh": 2,
        "num_inference_steps": 10,
        "first_steps": 0,
        "templates": {"style": "style_context", "object": "object_context"}.get(task, "none"),
    }
    for task in ("style", "object", "nudity")
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of GEM, on top of those of [`TrainConfig`]. Those that are left out (`None`) come from
    the preset.

    Args:
        preset (`"style"`, `"object"` or `"nudity"`, *optional*, defaults to `"object"`): the kind of concept; what
            is not given is chosen for it.
        published (`bool`, *optional*, defaults to `False`): take the authors' settings instead of this library's.
        gamma (`float`, *optional*): weight of the loss.
        eta (`float`, *optional*): how far the student is driven from the concept, in its distances from the anchor; 0 for the
            anchor alone.
        dropout (`float`, *optional*): share of what the LoRA reads that is left out while it is trained.
        published_pairing (`bool`, *optional*, defaults to `False`): give each noisy latent the timestep before its own, as the
            authors' code does; the untouched noise is never trained on then.
    """

    preset: Literal["style", "object", "nudity"] = "object"
    published: bool = False
    gamma: Annotated[float | None, Number(above=0)] = None
    eta: Annotated[float | None, Number()] = None
    dropout: Annotated[float | None, Number(below=1)] = None
    published_pairing: bool = False

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), **(PUBLISHED if self.published else PRESETS[self.preset])}


@dataclass(frozen=True, kw_only=True)
class Settings(TrainSettings):
    """What GEM works with: a [`Config`] with nothing left out."""

    preset: str
    published: bool
    gamma: float
    eta: float
    dropout: float
    published_pairing: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.published_pairing and self.num_inference_steps < 2:
            raise ErasureInputError(
                "`published_pairing` needs two steps of denoising at least: give `num_inference_steps`."
            )


class Objective(Method):
    """GEM's loss. Implements [`Objective`]."""

    teacher_roles: tuple[str, ...] = (CONCEPT, NEUTRAL)

    def __init__(self, gamma: float, eta: float, late: int = 0) -> None:
        self.gamma, self.eta, self.late = gamma, eta, late

    def examples(self, concepts: Sequence[Concept], templates: Sequence[str]) -> list[Example]:
        """Denoise with the concept, ask the student for it, and the base for it and for the anchor."""
        found = []
        for template in templates:
            for concept in concepts:
                erased = template.format(concept.target)
                neutral = template.format(concept.anchor) if concept.anchor else ""
                found.append(Example({SAMPLE: erased, STUDENT: erased, CONCEPT: erased, NEUTRAL: neutral}))
        return found

    def loss(self, step: Step) -> torch.Tensor:
        concept, neutral = step.teacher(CONCEPT, NEUTRAL)
        student = step.student()
        return self.gamma * (_far(student, neutral) - self.eta * _far(student, concept)).relu()


def _far(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclid's distance over the whole latent, [B]."""
    return torch.linalg.vector_norm((a - b).flatten(1), dim=1)


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolved_for(pipe, concepts, config, Settings)
    objective = Objective(settings.gamma, settings.eta, int(settings.published_pairing))
    return fit_by_training(pipe, "gem", concepts, objective, settings, run, settings.dropout)
