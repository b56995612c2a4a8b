"""DuMo (Han et al., AAAI 2025, arXiv 2501.01125): an eraser beside the UNet's encoder that adds to its skip connections.

    stage 1, EPR:   a copy of the encoder whose features, through 1x1 convolutions that start at zero, are added to the
                    skips and to the mid feature; the UNet is frozen
    stage 2, TLMO:  a table [bins, sites] that scales these additions by timestep and site; the EPR is frozen

The paper's architecture and inference are public, its training is not. Ours, in both stages: ESD's target on the concept
(see `esd.py`), and the base's prediction on what is retained. The **compact** form is ours too: low-rank deltas on the
frozen encoder, run a second time, instead of a copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..artifact import Erasure
from ..errors import ErasureInputError
from ..logging import get_logger
from ..schema import Concept
from ..settings import Number, Whole
from ..training import Fit, TrainConfig, TrainingRun, TrainSettings, resolved_for
from ..training.epr_student import EprStudent, ScheduleStudent
from ..training.publish import curve
from .esd import PRESETS as ESD_PRESETS
from .esd import Objective


logger = get_logger(__name__)

PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **{name: value for name, value in preset.items() if name != "formula"},
        "form": "compact",
        "rank": 8,
        "zero_rank": 16,
        "train_set": "full",
        "eta": 3.0,
        "learning_rate": 2e-3,
        "retain_weight": 1.0,
        "accumulation": 1,
        "whiten": 1e-3,
        "steps": 200,
        "schedule_steps": 50,
    }
    for task, preset in ESD_PRESETS.items()
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of DuMo, on top of those of [`TrainConfig`]. Those that are left out (`None`) come from
    the preset.

    Args:
        preset (`"style"`, `"object"` or `"nudity"`, *optional*, defaults to `"object"`): the kind of concept; what
            is not given is chosen for it.
        train_set (*optional*): to be left out: DuMo trains a network of its own.
        null_space, pull, mixtures (*optional*): to be left out: they are for LoRAs.
        rank (`int`, *optional*): rank of the compact form's deltas.
        steps (`int`, *optional*): optimiser steps of stage 1.
        learning_rate (`float`, *optional*): AdamW's learning rate in stage 1.
        form (`"compact"` or `"full"`, *optional*): low-rank deltas on the frozen encoder (of `rank`; 30 MB in float16 for
            Stable Diffusion 1.x with whole convolutions), or a whole copy as published (720 MB).
        zero_rank (`int`, *optional*): rank of the 1x1 convolutions, 16 by default: whole ones, as published (0), learn faster
            than the encoder's deltas, and worse.
        eta (`float`, *optional*): strength of the negative guidance, in the units of ESD's paper.
        schedule_steps (`int`, *optional*): steps of stage 2; 0 for no schedule.
        schedule_learning_rate (`float`, *optional*, defaults to 0.02): AdamW's learning rate in stage 2.
        bins (`int`, *optional*, defaults to 20): rows of the schedule, as published.
    """

    preset: Literal["style", "object", "nudity"] = "object"
    form: Literal["compact", "full"] | None = None
    zero_rank: Annotated[int | None, Whole(least=0)] = None
    eta: Annotated[float | None, Number()] = None
    schedule_steps: Annotated[int | None, Whole(least=0)] = None
    schedule_learning_rate: Annotated[float, Number(above=0)] = 0.02
    bins: Annotated[int, Whole(least=1)] = 20

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), **PRESETS[self.preset]}

    def __post_init__(self) -> None:
        if self.train_set not in (None, "full"):
            raise ErasureInputError("DuMo trains a network of its own, on the whole encoder: leave `train_set` out.")
        super().__post_init__()
        given = [name for name in ("null_space", "pull", "mixtures") if getattr(self, name)]
        if given:
            raise ErasureInputError(f"DuMo trains no LoRA, for which `{'`, `'.join(given)}` is made: leave it out.")


@dataclass(frozen=True, kw_only=True)
class Settings(TrainSettings):
    """What DuMo works with: a [`Config`] with nothing left out."""

    preset: str
    form: Literal["compact", "full"]
    zero_rank: int
    eta: float
    schedule_steps: int
    schedule_learning_rate: float
    bins: int


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolved_for(pipe, concepts, config, Settings)
    stages = Fit(pipe, "dumo", concepts, Objective(settings.eta), settings, run)

    first = EprStudent(settings.form, settings.rank, settings.zero_rank or None, settings.seed)
    trained = stages.train(first, folder="stage-1")
    network = first.layer(trained.tensors)
    if not settings.schedule_steps:
        return stages.erasure(network, loss=curve(trained.losses), **trained.diagnostics)

    logger.info("The EPR is trained; now its schedule.")
    second = ScheduleStudent(network, settings.bins)
    changes: dict[str, Any] = {"steps": settings.schedule_steps, "learning_rate": settings.schedule_learning_rate}
    scaled = stages.train(second, trained, folder="stage-2", **changes)
    losses = {"loss": curve(trained.losses), "schedule_loss": curve(scaled.losses)}
    return stages.erasure(second.layer(scaled.tensors), **losses, **trained.diagnostics)
