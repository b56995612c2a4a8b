"""The numbers about words that moved, and the warning."""

from collections.abc import Sequence
from typing import Any

import torch

from ..logging import get_logger


logger = get_logger(__name__)

WORST = 10  # words that are named
QUANTILES = (0.5, 0.9, 1.0)


def told(
    words: Sequence[str], moves: torch.Tensor, lists: Sequence[str], measure: str, threshold: float
) -> dict[str, Any]:
    """Warn of words that moved far, and return the numbers for the artefact.

    Args:
        words (sequence of `str`): none of them a target or an anchor.
        moves (`torch.Tensor`): how far each moved [N].
        lists (sequence of `str`): where they come from.
        measure (`str`): what `moves` are, in words.
        threshold (`float`): moves above it are warned of.
    """
    order = sorted(range(len(words)), key=lambda i: (-float(moves[i]), words[i]))
    worst = {words[i]: _rounded(moves[i]) for i in order[:WORST]}
    far = [i for i in order if float(moves[i]) > threshold]
    if far:
        named = ", ".join(f"{words[i]!r} {_rounded(moves[i]):.2f}" for i in far[:WORST])
        logger.warning(
            "%d of the %d words of %s moved by more than %.2f (%s), and pictures of such words often change: %s%s. Name in `retain` "
            "what must stay, give an anchor that is nearer to the target, or lower the strength.",
            len(far),
            len(words),
            ", ".join(lists),
            threshold,
            measure,
            named,
            ", …" if len(far) > WORST else "",
        )
    quantiles = torch.quantile(moves.double(), torch.tensor(QUANTILES, dtype=torch.float64))
    return {
        "lists": list(lists),
        "words": len(words),
        "measure": measure,
        "threshold": threshold,
        "above": len(far),
        "quantiles": {f"{q:g}": _rounded(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
        "worst": worst,
    }


def _rounded(value: Any) -> float:
    return float(f"{float(value):.3g}")
