"""From a trained student to an erasure."""

from collections.abc import Sequence
from typing import Any

import torch

from .._version import __version__
from ..artifact import Erasure
from ..errors import ErasureTrainingError
from ..schema import SCHEMA, BaseModel, Concept, ErasureConfig, Library, Method
from .student import Published


CURVE = 16  # points of the loss curve that is recorded


def text_components(base: BaseModel) -> tuple[str, ...]:
    """What encodes the text that a student is trained with: with another text encoder the erasure would miss."""
    return tuple(sorted(component for component in base.components if component != "unet"))


def as_erasure(
    name: str,
    concepts: Sequence[Concept],
    config: Any,
    published: Published,
    base: BaseModel,
    diagnostics: dict[str, Any],
) -> Erasure:
    """Put the artefact together: the tensors as they were made.

    `config` is the method's, with a `seed` and `recorded()`.

    Raises:
        ErasureTrainingError: one is not finite.
    """
    if not all(bool(torch.isfinite(value).all()) for own in published.tensors.values() for value in own.values()):
        raise ErasureTrainingError("What was trained is not finite; lower `learning_rate`.")
    settings, secret = config.recorded()
    return Erasure(
        ErasureConfig(
            schema=SCHEMA,
            library=Library("diffusers_erasure", __version__),
            method=Method(
                name=name,
                settings=settings,
                seed=config.seed,
                versions={"torch": torch.__version__.partition("+")[0]},
                concept_settings=secret,
            ),
            base_model=base,
            concepts=tuple(concepts),
            layers=published.layers,
            stock=published.stock,
            diagnostics=diagnostics,
        ),
        published.tensors,
    )


def curve(losses: Sequence[float]) -> list[float]:
    """Means over up to 16 equal parts of the run."""
    count = min(CURVE, len(losses))
    bounds = [len(losses) * i // count for i in range(count + 1)]
    parts = [losses[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [float(f"{sum(part) / len(part):.4g}") for part in parts]
