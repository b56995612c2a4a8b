"""Fine-tuning: one training loop for all methods. A method is an objective, settings and presets (see `methods/esd.py`)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..artifact import Erasure
from ..base_model import describe_base, family_of
from ..compat import accelerate_state_restored
from ..encoding import check_prompts, last_rows
from ..layers.layer import Layer
from ..lists import read_list
from ..runs.options import TrainingRun
from ..schema import Concept
from ..settings import Facts, resolve
from .config import TrainConfig, TrainSettings
from .loop import Trained, Trainer
from .network import check_trainable
from .objective import Objective
from .publish import as_erasure, curve
from .sites import check_rank, find_sites
from .student import LoraStudent, Student


__all__ = ["Fit", "TrainConfig", "TrainSettings", "TrainingRun", "fit_by_training", "resolved_for"]


Settings = TypeVar("Settings", bound=TrainSettings)


def resolved_for(pipe: Any, concepts: Sequence[Concept], config: TrainConfig, into: type[Settings]) -> Settings:
    """A method's settings for some concepts on a base model, with nothing left out.

    Raises:
        ErasureInputError: the base model cannot be trained as it is, or a target is too long.
    """
    check_trainable(pipe)
    family, targets = family_of(pipe), [str(concept.target) for concept in concepts]
    if family.denoiser != "unet":
        check_prompts(pipe, targets, config.max_sequence_length or 0)
        return resolve(config, into, Facts(len(concepts), family=family.name))
    # What all words share says nothing of a target; a fixed list, so that the rate depends on nothing else that is given.
    center = last_rows(pipe, read_list("list:things")).mean(0)
    squares = float((last_rows(pipe, targets) - center).square().sum(1).mean())
    return resolve(config, into, Facts(len(concepts), squares, family.name))


class Fit:
    """One fit by training, in one or several stages.

    Args:
        pipe ([`DiffusionPipeline`]): the base model; afterwards as it was.
        name (`str`): the method's.
        concepts (sequence of [`Concept`]): what is erased.
        objective ([`Objective`]): prompts and loss.
        settings ([`TrainSettings`]): from [`resolved_for`].
        run ([`TrainingRun`], *optional*): checkpoints, progress and samples.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        concepts: Sequence[Concept],
        objective: Objective,
        settings: TrainSettings,
        run: TrainingRun | None = None,
    ) -> None:
        self.pipe, self.name, self.concepts, self.objective = pipe, name, concepts, objective
        self.run, self.settings = run or TrainingRun(), settings
        self.base = describe_base(pipe)

    def train(self, student: Student, earlier: Trained | None = None, **stage: Any) -> Trained:
        """Train one student.

        Args:
            student ([`Student`]): what is trained.
            earlier ([`Trained`], *optional*): the stage before, whose noisy latents and encoded prompts are taken over.
            stage: settings that are others in this stage; with `folder`, a folder of its own for the checkpoints.
        """
        run, folder = self.run, stage.pop("folder", None)
        if folder is not None and run.checkpoint_dir is not None:
            run = dataclasses.replace(run, checkpoint_dir=Path(run.checkpoint_dir) / folder)
        settings, _ = self.settings.recorded()
        pairs = [[concept.target, concept.anchor] for concept in self.concepts]
        identity = {"method": self.name, "settings": settings, "concepts": pairs}
        own = dataclasses.replace(self.settings, **stage)
        with accelerate_state_restored():
            how = own, run, identity, self.base, earlier
            return Trainer(self.pipe, student, self.concepts, self.objective, *how).train()

    def erasure(self, layer: Layer, **diagnostics: Any) -> Erasure:
        """The erasure of what was trained."""
        return as_erasure(self.name, self.concepts, self.settings, [layer], self.base, diagnostics)


def fit_by_training(
    pipe: Any,
    name: str,
    concepts: Sequence[Concept],
    objective: Objective,
    settings: TrainSettings,
    run: TrainingRun | None = None,
    dropout: float = 0.0,
) -> Erasure:
    """Train a LoRA by a method's objective, and make the erasure. The arguments are those of [`Fit`] and [`LoraStudent`]."""
    fit = Fit(pipe, name, concepts, objective, settings, run)
    sites = find_sites(pipe, settings.train_set)
    check_rank(sites, settings.rank)
    student = LoraStudent(list(sites), settings.rank, settings.seed, family_of(pipe).denoiser, dropout)
    trained = fit.train(student)
    return fit.erasure(student.layer(trained.tensors), loss=curve(trained.losses), **trained.diagnostics)
