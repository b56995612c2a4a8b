"""From a trained student to an erasure."""

from collections.abc import Sequence
from typing import Any

import torch

from ..artifact import Erasure
from ..assembling import bound_to_text, made_by
from ..errors import ErasureTrainingError
from ..layers.layer import Layer
from ..schema import BaseModel, Concept


CURVE = 16  # points of the loss curve that is recorded


def as_erasure(
    name: str,
    concepts: Sequence[Concept],
    config: Any,
    layers: Sequence[Layer],
    base: BaseModel,
    diagnostics: dict[str, Any],
) -> Erasure:
    """Put the artefact together: the tensors as they were made.

    `config` is the method's, with a `seed` and `recorded()`.

    Raises:
        ErasureTrainingError: one is not finite.
    """
    if not all(bool(torch.isfinite(value).all()) for layer in layers for value in layer.tensors.values()):
        raise ErasureTrainingError("What was trained is not finite; lower `learning_rate`.")
    method, bound = made_by(name, config, config.seed), bound_to_text(layers, base)
    return Erasure.from_layers(bound, base=base, concepts=concepts, method=method, diagnostics=diagnostics)


def curve(losses: Sequence[float]) -> list[float]:
    """Means over up to 16 equal parts of the run."""
    count = min(CURVE, len(losses))
    bounds = [len(losses) * i // count for i in range(count + 1)]
    parts = [losses[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [float(f"{sum(part) / len(part):.4g}") for part in parts]
