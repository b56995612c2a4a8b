"""All but One (Hong et al., AAAI 2024, arXiv 2312.12807): an **experimental reconstruction**, trained as a LoRA.

There is no public code, and what was read of the paper are its abstract and first figure: not the whole prediction is led away from the
concept, as by ESD, but the term by which classifier-free guidance steers, while the unconditional branch is held; and the user may name
what takes the concept's place. With g(x, p) = e(x, p) - e(x, ""), e the student, e* the base, c the concept and a the alternative:

    L = | g(x_t, c) - g*(x_t, a) |^2 + hold_weight | e(x_t, "") - e*(x_t, "") |^2

Guesses, all ours: both norms, and that they are weighed 1 : 1; that in g the unconditional prediction is the student's, without gradients,
so that the first term moves the conditional branch alone; that no alternative is no guidance, g* = 0; noisy latents by partial denoising with the concept,
as ESD has them; and a LoRA where text enters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..denoising.sampler import SAMPLE
from ..logging import get_logger
from ..schema import Concept
from ..settings import Number
from ..training import TrainConfig, TrainingRun, TrainSettings, fit_by_training, resolved_for
from ..training.config import with_layers_of
from ..training.objective import STUDENT, Step, squares
from ..training.objective import Objective as Method
from ..training.pool import Example
from .esd import PRESETS as ESD_PRESETS


logger = get_logger(__name__)

UNCONDITIONAL, ALTERNATIVE = "unconditional", "alternative"  # roles

PRESETS: dict[str, dict[str, Any]] = {
    task: {**{name: value for name, value in preset.items() if name not in ("formula", "eta")}, "hold_weight": 1.0}
    for task, preset in ESD_PRESETS.items()
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of the reconstruction of All but One, on top of those of [`TrainConfig`]. Those that are left out (`None`) come from
    the preset.

    Args:
        preset (`"style"`, `"object"` or `"nudity"`, *optional*, defaults to `"object"`): the kind of concept; what
            is not given is chosen for it.
        hold_weight (`float`, *optional*): of the unconditional branch, which must not move.
    """

    preset: Literal["style", "object", "nudity"] = "object"
    hold_weight: Annotated[float | None, Number()] = None

    def stated(self) -> Mapping[str, Any]:
        return with_layers_of(self, {**super().stated(), **PRESETS[self.preset]})


@dataclass(frozen=True, kw_only=True)
class Settings(TrainSettings):
    """What it works with: a [`Config`] with nothing left out."""

    preset: str
    hold_weight: float


class Objective(Method):
    """The loss above. Implements [`Objective`]."""

    teacher_roles: tuple[str, ...] = (UNCONDITIONAL, ALTERNATIVE)

    def __init__(self, hold_weight: float) -> None:
        self.hold_weight = hold_weight

    def examples(self, concepts: Sequence[Concept], templates: Sequence[str]) -> list[Example]:
        """Denoise with the concept; ask the student for it and for nothing, and the base for the alternative and for nothing."""
        found = []
        for template in templates:
            for concept in concepts:
                erased = template.format(concept.target)
                instead = template.format(concept.anchor) if concept.anchor else ""
                found.append(Example({SAMPLE: erased, STUDENT: erased, UNCONDITIONAL: "", ALTERNATIVE: instead}))
        return found

    def loss(self, step: Step) -> torch.Tensor:
        unconditional, alternative = step.teacher(UNCONDITIONAL, ALTERNATIVE)
        student, free = step.students(STUDENT, UNCONDITIONAL)
        guided = squares(student - free.detach(), alternative - unconditional)
        return guided + self.hold_weight * squares(free, unconditional)


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    logger.warning(
        "`abo` is an experimental reconstruction of All but One, of which no code is public; see its docs for what is guessed."
    )
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolved_for(pipe, concepts, config, Settings)
    return fit_by_training(pipe, "abo", concepts, Objective(settings.hold_weight), settings, run)
