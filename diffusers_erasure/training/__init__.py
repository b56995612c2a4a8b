"""Fine-tuning: one training loop for all methods. A method is an objective, settings and presets (see `methods/esd.py`)."""

from collections.abc import Sequence
from typing import Any

from ..artifact import Erasure
from ..base_model import describe_base
from ..compat import accelerate_state_restored
from ..encoding import last_rows
from ..schema import Concept
from .config import TrainConfig, TrainingRun
from .loop import Trainer
from .objective import Objective
from .publish import as_erasure


__all__ = ["TrainConfig", "TrainingRun", "fit_by_training"]


def fit_by_training(
    pipe: Any,
    name: str,
    concepts: Sequence[Concept],
    objective: Objective,
    config: TrainConfig,
    run: TrainingRun | None = None,
) -> Erasure:
    """Train a method's objective, and make the erasure.

    Args:
        pipe ([`DiffusionPipeline`]): the base model; afterwards as it was.
        name (`str`): the method's.
        concepts (sequence of [`Concept`]): what is erased.
        objective ([`Objective`]): prompts and loss.
        config ([`TrainConfig`]): effective settings.
        run ([`TrainingRun`], *optional*): checkpoints, progress and samples.
    """
    run = run or TrainingRun()
    squares = float(last_rows(pipe, [str(concept.target) for concept in concepts]).double().square().sum(1).mean())
    config = config.resolved(len(concepts), squares)
    base = describe_base(pipe)
    settings, _ = config.recorded()
    pairs = [[concept.target, concept.anchor] for concept in concepts]
    identity = {"method": name, "settings": settings, "concepts": pairs}
    with accelerate_state_restored():
        trainer = Trainer(pipe, concepts, objective, config, run, identity, base)
        trained = trainer.train()
    return as_erasure(name, concepts, config, trained, base)
