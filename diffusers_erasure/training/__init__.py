"""Fine-tuning: one training loop for all methods. A method is an objective, settings and presets (see `methods/esd.py`)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artifact import Erasure
from ..base_model import describe_base
from ..compat import accelerate_state_restored
from ..encoding import last_rows
from ..layers.layer import Layer
from ..schema import Concept
from .config import TrainConfig, TrainingRun
from .loop import Trained, Trainer
from .network import check_trainable
from .objective import Objective
from .publish import as_erasure, curve
from .sites import check_rank, find_sites
from .student import LoraStudent, Student


__all__ = ["Fit", "TrainConfig", "TrainingRun", "fit_by_training"]


class Fit:
    """One fit by training, in one or several stages.

    Args:
        pipe ([`DiffusionPipeline`]): the base model; afterwards as it was.
        name (`str`): the method's.
        concepts (sequence of [`Concept`]): what is erased.
        objective ([`Objective`]): prompts and loss.
        config ([`TrainConfig`]): effective settings.
        run ([`TrainingRun`], *optional*): checkpoints, progress and samples.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        concepts: Sequence[Concept],
        objective: Objective,
        config: TrainConfig,
        run: TrainingRun | None = None,
    ) -> None:
        check_trainable(pipe)
        self.pipe, self.name, self.concepts, self.objective = pipe, name, concepts, objective
        self.run = run or TrainingRun()
        targets = [str(concept.target) for concept in concepts]
        squares = float(last_rows(pipe, targets).double().square().sum(1).mean())
        self.config = config.resolved(len(concepts), squares)
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
        settings, _ = self.config.recorded()
        pairs = [[concept.target, concept.anchor] for concept in self.concepts]
        identity = {"method": self.name, "settings": settings, "concepts": pairs}
        config = dataclasses.replace(self.config, **stage)
        with accelerate_state_restored():
            how = config, run, identity, self.base, earlier
            return Trainer(self.pipe, student, self.concepts, self.objective, *how).train()

    def erasure(self, layer: Layer, **diagnostics: Any) -> Erasure:
        """The erasure of what was trained."""
        return as_erasure(self.name, self.concepts, self.config, [layer], self.base, diagnostics)


def fit_by_training(
    pipe: Any,
    name: str,
    concepts: Sequence[Concept],
    objective: Objective,
    config: TrainConfig,
    run: TrainingRun | None = None,
) -> Erasure:
    """Train a LoRA by a method's objective, and make the erasure. The arguments are those of [`Fit`]."""
    fit = Fit(pipe, name, concepts, objective, config, run)
    sites = find_sites(pipe, config.train_set or "x")
    assert config.rank is not None  # filled in by the preset
    check_rank(sites, config.rank)
    student = LoraStudent(list(sites), config.rank, config.seed)
    trained = fit.train(student)
    return fit.erasure(student.layer(trained.tensors), loss=curve(trained.losses))
