"""Double Projections (CVPR 2026): the targets' rows go to their anchors' along directions that what is retained leaves free.

With C and C* [C, n] the rows of the targets and of their anchors as columns, and B the projector off the retained rows,

    T = I + (C* - C) (B C)^+ B.

A retained row has no part in B, so that T leaves it exactly alone; and T takes each target exactly to its anchor, where no
target lies in what the others and the retained rows span. With E = C^T and D = (C* - C)^T that is T = I + D^T A,
A = (B E^T)^+ B: a map of the text rows whose rank is that of the targets' rows, whatever is retained and however many layers
read the rows.

Where much is retained it spans all directions. Then B leaves the first of them alone, by their share in the retained rows'
squares, and A is regularised, A = (E B E^T + ridge I)^-1 E B, in the other directions with the retained rows' sums beside the ridge, as UCE's:
what is retained moves a little, the targets almost arrive, and how far both are off is recorded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..assembling import rounded
from ..base_model import text_readers
from ..errors import ErasureInputError
from ..families import POOLED_INPUTS
from ..low_rank import Factors
from ..schema import Concept
from ..settings import Number, Whole, resolve
from .holding import scaled_up
from .publishing import Form, kept_names, make_erasure, publish, report, side_by_side
from .rows import SAME, KeptRows, MapConfig, TargetRows, by_part, kept_rows, parts_of, target_rows
from .suiting import suited
from .uce import MapSettings, relative_units, solve_holding


SUMS = 1e-12  # squares below this share of the largest are rounding of the rows, in the eigenvalues of their sums
WEIGHING = 1e-3  # UCE's `lamb`

# The paper's: the words' own rows, all of what is retained, nothing regularised.
PUBLISHED: dict[str, Any] = {
    "rows": "last",
    "templates": "none",
    "retain_rows": "last",
    "keep": 0,
    "threshold": 0.0,
    "ridge": 0.0,
    "retain_scale": 0.0,
    "per_encoder": False,
    "layer": "both",
}
# Ours, in prompts around the concept, what is retained too; picked on the development half of benchmarks/efficacy (docs/search.md).
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **PUBLISHED,
        **{"templates": templates, "retain_rows": "all", "retain_templates": True, "threshold": 1e-4, "ridge": 1e-3},
        **{"retain_scale": 1.0, "push": 0.6, "per_encoder": True},
    }
    for task, templates in (("object", "object_context"), ("style", "style"), ("person", "person"))
}
# Where text enters by a door, see UCE's; T5's rows of different words are more alike, and what is retained holds more back.
AT_DOORS: dict[str, Any] = {"rows": "window", "directions": 2, "threshold": 1e-3, "push": 1.0}


@dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """Settings of Double Projections. Those that are left out (`None`) come from the preset.

    Args:
        preset (`"object"`, `"style"` or `"person"`, *optional*, defaults to `"object"`): the kind of concept, which says in
            which `templates` it is encoded.
        published (`bool`, *optional*, defaults to `False`): take the paper's settings (no templates, the retained prompts' last
            rows and all of their directions, no ridge) instead of this library's.
        rows (`"last"`, `"window"`, `"all"` or `"whole"`, *optional*): which rows of a target's encoding are mapped, see
            [`TextConfig`].
        templates (`str` or a tuple of `str`, *optional*): prompts, with `{}` for the concept, in which each target and its
            anchor are encoded; the name of a set of them, see [`TextConfig`], or one's own.
        retain (tuple of `str`, *optional*): prompts whose rows must not change.
        retain_rows (`"all"` or `"last"`, *optional*): which rows of a retained prompt must not change: all of them, and those
            of the empty prompt, or that of its last word piece.
        keep (`int`, *optional*): how many directions of the retained rows must not change, those with the largest squares
            first; 0 for those that `threshold` says.
        threshold (`float`, *optional*): directions with at least this share of the retained rows' squares must not change, at
            most half of all there are; 0 for every one, so that no retained row moves at all.
        ridge (`float`, *optional*): weight of a small change, relative to the mean squared norm of the targets' rows; 0 takes
            the targets exactly to their anchors, where what is retained lets them.
        retain_scale (`float`, *optional*): weight of what is retained in the directions that may change, beside a `ridge` above 0, as
            UCE weighs it; 0 leaves these directions to the targets.
        layer (`"both"`, `"text_map"` or `"lora"`, *optional*): how the erasure is published: as a map of the text rows, by which
            it acts here, with the LoRA that is the same edit for stock diffusers; or as one of the two alone.
        directions (`int`, *optional*): let all rows of a concept go to its anchor's in so many directions, those in which they go
            farthest; 0 for each row's own. The map has the rank of these: 2 by default for Stable Diffusion 3, FLUX.1 and others,
            else 0.
        rank (`int`, *optional*): truncate to this rank; the error is recorded. 0, the default, for the exact one.
        max_error (`float`, *optional*): truncate to the least rank whose relative error is no larger; 0, the default, for none.
    """

    preset: Literal["object", "style", "person"] = "object"
    published: bool = False
    retain_rows: Literal["all", "last"] | None = None
    keep: Annotated[int | None, Whole(least=0)] = None
    threshold: Annotated[float | None, Number(below=1)] = None
    ridge: Annotated[float | None, Number()] = None
    retain_scale: Annotated[float | None, Number()] = None
    layer: Form | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ridge = self.stated()["ridge"] if self.ridge is None else self.ridge
        if self.retain_scale and not ridge:
            raise ErasureInputError("`retain_scale` weighs what is retained beside a `ridge`; give one above 0.")

    def stated(self) -> Mapping[str, Any]:
        preset = PUBLISHED if self.published else PRESETS[self.preset]
        return {**super().stated(), **preset, **({"retain_scale": 0.0} if self.ridge == 0 else {})}


@dataclass(frozen=True, kw_only=True)
class Settings(MapSettings):
    """What Double Projections works with: a [`Config`] with nothing left out."""

    keep: int
    threshold: float
    ridge: float
    retain_scale: float


@dataclass(frozen=True)
class Solution:
    """A map `(A, D)` of rows of some width, and how many directions of these it leaves alone."""

    factors: Factors
    kept: int
    width: int


def solve(
    rows: TargetRows,
    kept: KeptRows,
    *,
    keep: int = 0,
    threshold: float = 0.0,
    ridge: float = 0.0,
    retain_scale: float = 0.0,
) -> Solution:
    """The closed form, in float64: T = I + D^T A.

    Args:
        rows: what is mapped.
        kept: what must not change. The default lists are held by weights that even out how far their words move.
        keep, threshold: which directions of it, see [`Config`].
        ridge: added to E B E^T.
        retain_scale: weight of the other directions of it, beside the ridge.

    Raises:
        ErasureInputError: what is kept leaves none of the targets' directions free.
    """
    e, share, held = rows.targets, relative_units(rows, kept)[1], kept.held_beside(rows)
    # The weights of what is held are found with UCE's edit, which costs no eigenvectors and wants to move the same words.
    weighing = {"erase_scale": 1.0, "retain_scale": share, "lamb": WEIGHING * rows.squares}
    more = solve_holding(rows, kept, **weighing)[1] if len(held) else None
    squares, vectors, noise = _directions(kept, share, more)
    count = _count(squares, noise, vectors.shape[0], keep, threshold)
    u, rest = vectors[:, :count], vectors[:, count:]
    projected = e - (e @ u) @ u.T
    weights = retain_scale * squares[count:].clamp_min(0)
    a = _inverse(projected, float(torch.linalg.matrix_norm(e, 2)), ridge, rest, weights)
    factors = a, rows.way
    return Solution(scaled_up(factors, rows.probes) if len(held) else factors, count, e.shape[1])


def _directions(kept: KeptRows, share: float, more: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The directions [C, k] of what is kept, their squares, the largest first, and the share of it that is rounding.

    Args:
        share: weight of the retained rows beside `more`, the sums of what is held.
    """
    if kept.gram is None and more is None:
        # Of the rows themselves: their sums have twice the digits to lose.
        _, s, vh = torch.linalg.svd(kept.retain, full_matrices=False)
        return share * s.square(), vh.T, SAME**2
    sums = share * (kept.retain.T @ kept.retain if kept.gram is None else kept.gram)
    squares, vectors = torch.linalg.eigh(sums if more is None else sums + more)
    return squares.flip(-1), vectors.flip(-1), SUMS


def _count(squares: torch.Tensor, noise: float, width: int, keep: int, threshold: float) -> int:
    """How many directions of what is kept must not change."""
    if not len(squares) or not float(squares[0]) > 0:
        return 0
    count = int((squares > noise * squares[0]).sum())
    if keep:
        return min(count, keep)
    if threshold:
        return min(count, width // 2, int((squares >= threshold * squares.sum()).sum()))
    return count


def _inverse(
    projected: torch.Tensor, scale: float, ridge: float, rest: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`(B E^T)^+ B`, regularised, of the projected rows F = E B [n, C], where E's largest singular value is `scale`.

    With the directions `rest` of what is retained, and their weights, it is (I + F N^-1 F^T)^-1 F N^-1 where N is the ridge and
    these weights.
    """
    u, s, vh = torch.linalg.svd(projected, full_matrices=False)
    free = s > SAME * scale
    if not bool(free.any()):
        raise ErasureInputError(
            "Nothing can be erased: what is retained spans all directions of the targets' rows. Keep only some of its directions "
            '(`keep`, or a `threshold` above 0), or retain less (`retain_default="none"` leaves the shipped lists out).'
        )
    if not bool(weights.any()):
        u, s, vh = u[:, free], s[free], vh[free]
        return (u * (s / (s.square() + ridge))) @ vh
    held = projected - (projected @ rest * (weights / (ridge + weights))) @ rest.T  # ridge F N^-1
    gram = held @ projected.T
    return torch.linalg.solve((gram + gram.T) / 2 + ridge * torch.eye(len(gram), dtype=gram.dtype), held)


def left_over(rows: TargetRows, kept: KeptRows, solution: Solution) -> dict[str, Any]:
    """How far a solution is from both promises: shares of the targets' way that are left, and of retained rows' norm that moved."""
    a, d = solution.factors
    far = (rows.targets @ a.T) @ d - rows.way
    retained = torch.cat([kept.retain, kept.held_beside(rows)])
    moved = float(((retained @ a.T) @ d).norm() / retained.norm()) if len(retained) else 0.0
    return {
        "kept_directions": solution.kept,
        "width": solution.width,
        "target_residual": rounded(float(far.norm() / rows.way.norm().clamp_min(1e-300))),
        "retained_residual": rounded(moved),
    }


def fit(pipe: Any, concepts: Sequence[Concept], config: Config) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    text_readers(pipe)  # a denoiser that cannot be edited is told before anything is encoded
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    config = suited(config, pipe, AT_DOORS)
    settings = resolve(config, Settings)
    return refit(pipe, concepts, config, {"": target_rows(pipe, concepts, settings, push=settings.push)})


def refit(
    pipe: Any, concepts: Sequence[Concept], config: Config, targets: Mapping[str, Mapping[str, TargetRows]]
) -> Erasure:
    """Make the erasure from targets' rows that are known: those of [`fit`], or what several artefacts kept."""
    config = suited(config, pipe, AT_DOORS)
    settings = resolve(config, Settings)
    kept = kept_rows(pipe, settings, with_gram=settings.retain_rows == "all")
    found = {
        name: (rows, kept[name]) for name, rows in targets[""].items() if name not in POOLED_INPUTS or settings.pooled
    }
    parts = parts_of(pipe, settings)
    maps: dict[str, Factors] = {}
    residuals: dict[str, list[dict[str, Any]]] = {}
    for name, pair in found.items():
        solved = []
        for _, rows, own in by_part(() if name in POOLED_INPUTS else parts, *pair):
            solution = solve(
                rows,
                own,
                keep=settings.keep,
                threshold=settings.threshold,
                ridge=settings.ridge * rows.squares,
                retain_scale=settings.retain_scale,
            )
            solved.append(solution.factors)
            residuals.setdefault(name, []).append(left_over(rows, own, solution))
        maps[name] = side_by_side(solved)
    diagnostics = report(
        found, {name: [factors] for name, factors in maps.items()}, concepts, kept_names(settings), parts
    )
    for name, told in residuals.items():
        place = diagnostics["pooled"] if name in POOLED_INPUTS else diagnostics
        place["projections"] = told[0] if len(told) == 1 else told
    return make_erasure(pipe, "dp", concepts, settings, publish(pipe, maps, settings), diagnostics, targets)
