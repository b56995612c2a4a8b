"""SDD: safe self-distillation diffusion (Kim et al., ICML 2023 workshop, arXiv 2307.05977), trained as a LoRA.

The student's prediction for a concept is trained to be its own prediction for the empty prompt, at noisy latents that its
moving average denoises with all the concepts:

    x_t: denoised by the average with c_1, ..., c_n;    L = | e(x_t, c_s) - stop(e(x_t, 0)) |^2;
    average <- m average + (1 - m) student

Both sides come from the student, and the average is what is published. The authors' code pairs a finished picture with the
largest timestep in one step of N; here k = 0 is the untouched noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..artifact import Erasure
from ..denoising.sampler import SAMPLE
from ..encoding import check_prompts
from ..errors import ErasureInputError
from ..logging import get_logger
from ..schema import Concept
from ..training import TrainConfig, TrainingRun, TrainSettings, fit_by_training, resolved_for
from ..training.config import ALL_BUT_CROSS, LEARNING_RATE, STEPS, TRAJECTORIES, of_unets
from ..training.objective import STUDENT, Step, squares
from ..training.objective import Objective as Method
from ..training.pool import Example


logger = get_logger(__name__)

NEUTRAL = "neutral"  # role

# The defaults of the authors' code; theirs trains the weights themselves, at a tenth of the learning rate.
PUBLISHED: dict[str, Any] = {
    "train_set": "x",
    "rank": 4,
    "templates": "none",
    "learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "ema_decay": 0.999,
    "save": "ema",
    "steps": 1500,
    "batch_size": 1,
    "policy": "ema",
    "trajectories": 0,
    "num_inference_steps": 50,
    "guidance_scale": 3.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **PUBLISHED,
        "train_set": {"nudity": ALL_BUT_CROSS}.get(task, of_unets("x-strict", "x")),
        "rank": {"nudity": 16, "object": 8}.get(task, 4),
        "templates": {"style": "style_context", "object": "object_context"}.get(task, "none"),
        "ema_decay": 0.98,
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "cosine",
        "retain_weight": 2.0,
        "batch_size": 4,
        "trajectories": TRAJECTORIES,
        "num_inference_steps": 20,
        **({"whiten": of_unets(1e-3, 0.0), "accumulation": of_unets(2, 1)} if task != "nudity" else {}),
    }
    for task in ("style", "object", "nudity")
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of SDD, on top of those of [`TrainConfig`]. Those that are left out (`None`) come from
    the preset.

    Args:
        preset (`"style"`, `"object"` or `"nudity"`, *optional*, defaults to `"object"`): the kind of concept; what
            is not given is chosen for it.
        published (`bool`, *optional*, defaults to `False`): take the defaults of the authors' code instead of this library's.
        sample_with (`"joined"` or `"own"`, *optional*, defaults to `"joined"`): what noisy latents are denoised with: all the
            concepts, joined by commas (published), or the one that is trained on.
    """

    preset: Literal["style", "object", "nudity"] = "object"
    published: bool = False
    sample_with: Literal["joined", "own"] = "joined"

    def stated(self) -> Mapping[str, Any]:
        chosen = {**super().stated(), **(PUBLISHED if self.published else PRESETS[self.preset])}
        return {**chosen, "whiten": 0.0} if self.null_space else chosen


@dataclass(frozen=True, kw_only=True)
class Settings(TrainSettings):
    """What SDD works with: a [`Config`] with nothing left out."""

    preset: str
    published: bool
    sample_with: Literal["joined", "own"]


class Objective(Method):
    """SDD's loss. Implements [`Objective`]."""

    teacher_roles: tuple[str, ...] = ()

    def __init__(self, joined: bool = True) -> None:
        self.joined = joined

    def examples(self, concepts: Sequence[Concept], templates: Sequence[str]) -> list[Example]:
        """Denoise with all the concepts, ask the student for one of them, and for its anchor."""
        everything = ", ".join(str(concept.target) for concept in concepts)
        found = []
        for template in templates:
            for concept in concepts:
                own = template.format(concept.target)
                sample = template.format(everything) if self.joined else own
                neutral = template.format(concept.anchor) if concept.anchor else ""
                found.append(Example({SAMPLE: sample, STUDENT: own, NEUTRAL: neutral}))
        return found

    def loss(self, step: Step) -> torch.Tensor:
        return squares(step.student(), step.student_now(NEUTRAL))


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolved_for(pipe, concepts, config, Settings)
    joined = settings.sample_with == "joined"
    if joined and len(concepts) > 1:
        try:
            check_prompts(pipe, [e.prompts[SAMPLE] for e in Objective().examples(concepts, settings.template_list)])
        except ErasureInputError:
            logger.warning(
                "%d concepts, joined, are longer than the text encoder reads; each is denoised with itself "
                "(`sample_with='own'`).",
                len(concepts),
            )
            joined = False
    return fit_by_training(pipe, "sdd", concepts, Objective(joined), settings, run)
