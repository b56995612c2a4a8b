"""From a trained LoRA to an erasure, which stock diffusers can load."""

from collections.abc import Sequence

import torch

from .._version import __version__
from ..artifact import Erasure
from ..errors import ErasureTrainingError
from ..schema import LORA_FILE, SCHEMA, BaseModel, Concept, ErasureConfig, LayerSpec, Library, Method, Stock
from .config import TrainConfig
from .loop import Trained


CURVE = 16  # points of the loss curve that is recorded


def as_erasure(
    name: str, concepts: Sequence[Concept], config: TrainConfig, trained: Trained, base: BaseModel
) -> Erasure:
    """Put the artefact together: the factors as they were trained, alpha = rank.

    Raises:
        ErasureTrainingError: a factor is not finite.
    """
    if not all(bool(torch.isfinite(factor).all()) for factor in trained.factors.values()):
        raise ErasureTrainingError("The trained LoRA is not finite; lower `learning_rate`.")
    settings, secret = config.recorded()
    # Trained with these text rows: with another text encoder's the edit would miss.
    text = tuple(sorted(component for component in base.components if component != "unet"))
    layer = LayerSpec("lora", "unet", trained.sites, LORA_FILE, "unet.", text)
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
            layers=(layer,),
            stock=Stock(LORA_FILE, 0.0),
            diagnostics={"loss": curve(trained.losses)},
        ),
        {LORA_FILE: {f"unet.{key}": factor.contiguous() for key, factor in trained.factors.items()}},
    )


def curve(losses: Sequence[float]) -> list[float]:
    """Means over up to 16 equal parts of the run."""
    count = min(CURVE, len(losses))
    bounds = [len(losses) * i // count for i in range(count + 1)]
    parts = [losses[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [float(f"{sum(part) / len(part):.4g}") for part in parts]
