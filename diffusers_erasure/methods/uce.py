"""UCE: Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761).

Every cross-attention key and value projection W gets the closed-form edit that maps the rows E of the targets to what
W gave for the rows G of the anchors, and keeps the rows R to retain:

    W' = (lamb W + a sum W g e^T + b sum W r r^T) M^-1,    M = lamb I + a E^T E + b R^T R.

Since `W M` reproduces all terms but one, W' = W T with T = I + (G - E)^T A, A = a E M^-1: one C x C Cholesky
factorisation serves the whole model, and each edit is a LoRA, dW = B A with B = W (G - E)^T. It is published as the
map of the text rows, which does the same to an unmodified model, with that LoRA for stock diffusers; or as either alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..base_model import text_readers
from ..families import POOLED_INPUTS
from ..schema import Concept
from ..settings import Number, resolve
from .holding import HELD, holding, scaled_up
from .publishing import Factors, Form, FormSettings, kept_names, make_erasure, publish, report, side_by_side
from .rows import KeptRows, MapConfig, TargetRows, by_part, kept_rows, parts_of, target_rows
from .suiting import suited


# What the authors' code of 2025 does, whatever the concept is.
PUBLISHED: dict[str, Any] = {
    "rows": "last",
    "templates": "none",
    "retain_rows": "last",
    "erase_scale": 1.0,
    "retain_scale": 1.0,
    "lamb": 0.5,
    "absolute": True,
    "per_encoder": False,
    "layer": "both",
}
# Ours: in prompts around the concept, what is retained too, and relative to the rows' own scale; picked on the development half of
# benchmarks/efficacy (docs/search.md).
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **PUBLISHED,
        **{"templates": templates, "retain_rows": "all", "retain_templates": True, "retain_scale": 3.0, "push": 0.5},
        **{"lamb": 1e-3, "absolute": False, "per_encoder": True},
    }
    for task, templates in (("object", "object_context"), ("style", "style"), ("person", "person"))
}
# Where text enters by a door: T5 puts a word into every row, and a causal encoder into all rows after it. Its rows of different words
# are alike, and what is retained holds more back.
AT_DOORS: dict[str, Any] = {"rows": "window", "directions": 2, "retain_scale": 0.3}


@dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """Settings of UCE. Those that are left out (`None`) come from the preset.

    Args:
        preset (`"object"`, `"style"` or `"person"`, *optional*, defaults to `"object"`): the kind of concept, which says in
            which `templates` it is encoded.
        published (`bool`, *optional*, defaults to `False`): take the settings of the authors' code of 2025 (no templates, the
            retained prompts' last rows, absolute weights) instead of this library's.
        rows (`"last"`, `"window"`, `"all"` or `"whole"`, *optional*): which rows of a target's encoding are mapped, see
            [`TextConfig`]. `"last"` is the row of its last word piece (the authors' code of 2025); `"window"` that row and all
            after it, padding included (their code of 2023, which RECE, MACE and SPEED compare with).
        templates (`str` or a tuple of `str`, *optional*): prompts, with `{}` for the concept, in which each target and its
            anchor are encoded; the name of a set of them, see [`TextConfig`], or one's own.
        retain (tuple of `str`, *optional*): prompts whose rows must not change.
        retain_rows (`"all"` or `"last"`, *optional*): which rows of a retained prompt must not change: all of them (published
            with `"window"`), or that of its last word piece (published with `"last"`).
        retain_templates (`bool`, *optional*): encode the retained prompts in the templates too; by default up to 256 of them.
        erase_scale (`float`, *optional*): weight `a` of the targets' rows.
        retain_scale (`float`, *optional*): weight `b` of the retained rows. Relative to the number of prompts: all the
            retained ones together weigh no more than all the targets, however long the list is.
        lamb (`float`, *optional*): weight of staying near the original. Relative to the mean squared norm of the targets'
            rows: the published 0.5 is 7e-4 for Stable Diffusion 1.x (|x|^2 about 750).
        absolute (`bool`, *optional*): take `retain_scale` and `lamb` as they are, as published.
        layer (`"both"`, `"text_map"` or `"lora"`, *optional*): how the erasure is published: as a map of the text rows, by which
            it acts here, with the LoRA that is the same edit for stock diffusers; or as one of the two alone.
        pooled (`bool`, *optional*, defaults to `True`): SDXL, Stable Diffusion 3, FLUX.1: map the pooled text vector as well.
        per_encoder (`bool`, *optional*): SDXL, Stable Diffusion 3: map what each CLIP makes of a row by itself, so that the
            erasure acts whatever `prompt_2` is. Off, as published, both are mapped together, and a call with another `prompt_2` is
            refused.
        max_sequence_length (`int`, *optional*, defaults to 0): rows that T5 makes of a prompt, as in calls of
            the pipeline; 0 for the pipeline's own number, see [`TextConfig`].
        directions (`int`, *optional*): let all rows of a concept go to its anchor's in so many directions, those in which they go
            farthest; 0 for each row's own. UCE's map has the rank of these: 2 by default for Stable Diffusion 3, FLUX.1 and others, else 0.
        rank (`int`, *optional*): truncate to this rank; the error is recorded. 0, the default, for the exact one.
        max_error (`float`, *optional*): truncate to the least rank whose relative error is no larger; 0, the default, for none.
    """

    preset: Literal["object", "style", "person"] = "object"
    published: bool = False
    retain_rows: Literal["all", "last"] | None = None
    erase_scale: Annotated[float | None, Number(above=0)] = None
    retain_scale: Annotated[float | None, Number()] = None
    lamb: Annotated[float | None, Number(above=0)] = None
    absolute: bool | None = None
    layer: Form | None = None

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), **(PUBLISHED if self.published else PRESETS[self.preset])}


@dataclass(frozen=True, kw_only=True)
class MapSettings(FormSettings):
    """What UCE and RECE, which map the rows, share."""

    preset: str
    published: bool
    retain_rows: Literal["all", "last"]


@dataclass(frozen=True, kw_only=True)
class Settings(MapSettings):
    """What UCE works with: a [`Config`] with nothing left out."""

    erase_scale: float
    retain_scale: float
    lamb: float
    absolute: bool


def solve(
    rows: TargetRows, kept: KeptRows, *, erase_scale: float, retain_scale: float, lamb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The closed form: `(A, D)`, both float64 [n, C], with T = I + D^T A."""
    return solve_holding(rows, kept, erase_scale=erase_scale, retain_scale=retain_scale, lamb=lamb)[0]


def solve_holding(
    rows: TargetRows, kept: KeptRows, *, erase_scale: float, retain_scale: float, lamb: float
) -> tuple[Factors, torch.Tensor | None]:
    """The same, and the sums [C, C] by which the default lists were held, weighed; `None` where nothing is held."""
    e = rows.targets
    gram = kept.retain.T @ kept.retain if kept.gram is None else kept.gram
    m = lamb * torch.eye(e.shape[1], dtype=e.dtype) + erase_scale * (e.T @ e) + retain_scale * gram

    def solved(more: torch.Tensor | None = None) -> Factors:
        factor = torch.linalg.cholesky(m if more is None else m + more)
        return torch.cholesky_solve(erase_scale * e.T, factor).T, rows.way

    held = kept.held_beside(rows)
    if not len(held):
        return solved(), None
    factors, sums = holding(held, HELD * erase_scale * rows.prompts, solved)
    return scaled_up(factors, rows.probes), sums


def relative_units(rows: TargetRows, kept: KeptRows) -> tuple[float, float]:
    """What `lamb` and `retain_scale` are multiplied by: the targets' mean |x|^2; target prompts a retained one, at most 1."""
    return rows.squares, min(1.0, rows.prompts / max(1, kept.prompts))


def solve_all(
    found: Mapping[str, tuple[TargetRows, KeptRows]], settings: Settings, parts: Sequence[slice] = ()
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Solve for each input of the denoiser, in the units of the settings; rows in `parts` for each part by itself."""
    maps = {}
    for name, pair in found.items():
        solved = []
        for _, rows, kept in by_part(() if name in POOLED_INPUTS else parts, *pair):
            norm, share = (1.0, 1.0) if settings.absolute else relative_units(rows, kept)
            factors = solve(
                rows,
                kept,
                erase_scale=settings.erase_scale,
                retain_scale=settings.retain_scale * share,
                lamb=settings.lamb * norm,
            )
            solved.append(factors)
        maps[name] = side_by_side(solved)
    return maps


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
    wanted = [name for name in targets[""] if name not in POOLED_INPUTS or settings.pooled]
    found = {name: (targets[""][name], kept[name]) for name in wanted}
    parts = parts_of(pipe, settings)
    maps = solve_all(found, settings, parts)
    edits = {name: [factors] for name, factors in maps.items()}
    diagnostics = report(found, edits, concepts, kept_names(settings), parts)
    return make_erasure(pipe, "uce", concepts, settings, publish(pipe, maps, settings), diagnostics, targets)
