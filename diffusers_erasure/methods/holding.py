"""How the closed forms keep the default lists: each entry as firmly as the edit would move it, so that none vanishes.

A list of many words that weigh alike keeps their mean where it is, while single words that lie near a target go with it. So
the rows X of the held words get weights w: with the edit's factors A and D

    w_i <- w_i sqrt(|D^T A x_i|^2 / |x_i|^2 / mean),   a few rounds, sum w = HELD times the targets' prompts

which evens out how far they move. The stricter edit moves the targets less far, too; it is then scaled up until they have
gone REACH of their way on average, at most by MOST. All three numbers were picked on the development half of
benchmarks/efficacy (docs/lists.md).
"""

from collections.abc import Callable

import torch

from ..lists import Retained, read_list
from ..low_rank import Factors


HELD = 10.0
ROUNDS = 8
REACH, MOST = 0.8, 1.5
LEAST = 1e-3  # of the mean square: a word that the edit does not touch is still held a little
SAME = 0.9  # cosine to a target's or anchor's own row above which a word means the same; other objects reach 0.88
CONTEXTS = ("{}", "a {}")


def held_prompts(retained: Retained) -> tuple[list[str], list[bool]]:
    """All prompts of the default lists, each entry alone and behind an article; and which of them are held.

    Lists are encoded whole, so that what is cached of them serves any targets.
    """
    held = set(retained.held)
    words = dict.fromkeys(word for name in retained.default for word in read_list(name))
    pairs = [(context.format(word), word in held) for word in words for context in CONTEXTS]
    return [prompt for prompt, _ in pairs], [kept for _, kept in pairs]


def others_than(held: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Held rows [N, C] without those that say the same as one of some rows [n, C], such as a target's in other words."""
    if not len(held) or not len(rows):
        return held
    cosines = _unit(held) @ _unit(rows).T
    return held[cosines.amax(1) < SAME]


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)


def moved(rows: torch.Tensor, factors: Factors) -> torch.Tensor:
    """|D^T A x|^2 / |x|^2 of each row [N]."""
    a, d = factors
    return ((rows @ a.T) @ d).square().sum(1) / rows.square().sum(1).clamp_min(1e-300)


def holding(
    held: torch.Tensor, total: float, solve: Callable[[torch.Tensor], Factors]
) -> tuple[Factors, torch.Tensor]:
    """Solve with held rows, and find their weights.

    Args:
        held: X [N, C], float64.
        total: the sum of the weights.
        solve: `(A, D)` from what is added to the sums of the rows to keep [C, C].

    Returns:
        `tuple`: `(A, D)`, and `sum w x x^T` [C, C].
    """
    weights = torch.ones(len(held), dtype=held.dtype)
    for round in range(ROUNDS + 1):
        shares = weights * (total / weights.sum())
        gram = held.T @ (held * shares[:, None])
        factors = solve(gram)
        if round < ROUNDS:
            change = moved(held, factors)
            weights = weights * (change / change.mean().clamp_min(1e-300) + LEAST).sqrt()
    return factors, gram


def scaled_up(factors: Factors, probes: tuple[torch.Tensor, torch.Tensor]) -> Factors:
    """The edit, larger where it moves the targets' own rows less than `REACH` of the way to their anchors on average."""
    targets, anchors = probes
    a, d = factors
    way = anchors - targets
    shares = ((targets @ a.T) @ d * way).sum(1) / way.square().sum(1).clamp_min(1e-300)
    mean = float(shares.mean())
    return (a * min(MOST, REACH / mean), d) if 0 < mean < REACH else factors
