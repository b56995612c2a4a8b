"""RECE: reliable and efficient concept erasure (Gong et al., ECCV 2024, arXiv 2407.12383).

UCE leaves rows that the edited weights still map to the target. RECE looks for them in closed form and erases them too,
a few times over. All key and value projections carry the same map, W = W_old T, so that with S = sum W_old^T W_old an
epoch is a few C x C solves and needs neither the UNet nor its layers one by one:

    P = (reg I + T^T S T)^-1 T^T S                  # X P^T: rows that W maps nearest to what W_old made of X
    T <- T (I + a (G P' - P X^T X P^T) M^-1),       # UCE's step from X P^T to the anchors' rows
    M = lamb I + a P X^T X P^T + b R^T R,           # with G P' = G^T X P^T; ours: + X^T X, see `keep_erased`

X are the rows of the concepts, G those of their anchors, R what is retained. The result is a text map, exactly, or the
LoRA W_old (T - I) on every projection, which stock diffusers loads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn

from ..artifact import Erasure
from ..base_model import pooled_readers, text_readers
from ..families import POOLED_INPUTS
from ..schema import Concept
from ..settings import Number, Whole, resolve
from ..settings.texts import Templates
from . import base_sums
from .publishing import (
    Factors,
    Form,
    kept_names,
    make_erasure,
    publish,
    report,
    side_by_side,
    with_anchors,
)
from .rows import (
    KeptRows,
    MapConfig,
    TargetRows,
    Which,
    by_part,
    kept_rows,
    parts_of,
    target_rows,
)
from .suiting import suited
from .uce import MapSettings, relative_units, solve_holding


# What the authors run. `uce_*` are the settings of the edit before the first epoch (the UCE code of 2023).
PUBLISHED: dict[str, dict[str, Any]] = {
    task: {
        "anchor": "art" if task == "artist" else "",
        "rows": "window",
        "templates": "none",
        "adversarial_rows": "whole",
        "units": "absolute",
        "epochs": {"nudity": 3, "unsafe": 2}.get(task, 1),
        "reg": 1e-3 if task in ("artist", "hard_object") else 1e-1,
        "keep_erased": False,
        "lamb": 0.1,
        "retain_scale": 0.1,
        "uce_lamb": 0.5,
        "uce_retain_scale": 0.1 if task == "artist" else 1.0,
        "per_encoder": False,
        "layer": "text_map",  # of windows of rows it has nearly full rank, and its LoRA more numbers than the weights
    }
    for task in ("nudity", "unsafe", "artist", "object", "hard_object")
}
# Ours: UCE's edit, then the authors' epochs, in units of the rows' and the weights' own scale; picked on the development half of
# benchmarks/efficacy. Nothing is pushed as UCE's targets are: from the far side of an anchor another row reaches the target again.
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **values,
        "rows": "last",
        "templates": "style" if task == "artist" else "object_context",
        "adversarial_rows": "last",
        "units": "relative",
        "reg": 1e-4 if task in ("artist", "hard_object") else 1e-3,
        "keep_erased": True,
        "retain_templates": True,
        "lamb": 1e-3,
        "retain_scale": 1.0,
        "uce_lamb": 1e-3,
        "uce_retain_scale": 1.0,
        "per_encoder": True,
        "layer": "both",
    }
    for task, values in PUBLISHED.items()
}
# Where text enters by a door, see UCE's. There what is retained in templates would hold back nearly all of an edit that is not pushed.
AT_DOORS: dict[str, Any] = {"rows": "window", "adversarial_rows": "window", "retain_templates": False}


@dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """Settings of RECE. Those that are left out (`None`) come from the preset.

    Args:
        preset (`"object"`, `"hard_object"`, `"artist"`, `"nudity"` or `"unsafe"`, *optional*, defaults to `"object"`): the
            kind of concept; what is not given is chosen for it. The authors call objects hard that one epoch with a large
            `reg` does not remove.
        published (`bool`, *optional*, defaults to `False`): take the authors' settings of the preset (window rows, no
            templates, absolute units) instead of this library's.
        rows (`"last"`, `"window"`, `"all"` or `"whole"`, *optional*): which rows of a target the first edit (UCE) maps: that
            of its last word piece, that and all after it, all but the start token's, or all; see [`TextConfig`].
        templates (`str` or a tuple of `str`, *optional*): prompts, with `{}` for the concept, in which each target and its
            anchor are encoded; the name of a set of them, or one's own.
        adversarial_rows (as `rows`, *optional*): for which rows of a target the epochs look for others
            that still reach it.
        retain (tuple of `str`, *optional*): prompts that must not change; with `retain_rows="all"` the empty prompt too.
        retain_rows (`"all"` or `"last"`, *optional*, defaults to `"all"`): which rows of a retained prompt must not change.
        retain_templates (`bool`, *optional*): encode the retained prompts in the templates too; by default up to 256 of them, on UNets.
        epochs (`int`, *optional*): how often rows are looked for and erased; 0 leaves UCE.
        reg (`float`, *optional*): weight of a small adversarial row; the smaller, the farther it may lie.
        keep_erased (`bool`, *optional*): ours: an epoch's edit leaves the targets' own rows where the edits before it have put
            them. As published, they move again with the rows that were found, and may move back.
        lamb (`float`, *optional*): weight of staying near the weights before, in an epoch's edit.
        retain_scale (`float`, *optional*): weight of the retained rows, in an epoch's edit.
        uce_lamb (`float`, *optional*): weight of staying near the original, in the first edit.
        uce_retain_scale (`float`, *optional*): weight of the retained rows, in the first edit.
        units (`"absolute"` or `"relative"`, *optional*): whether these are the published numbers, or shares: `lamb` of the
            targets' mean |x|^2, `retain_scale` of the number of prompts as in UCE, `reg` of the mean square of the
            projections' columns.
        layer (`"both"`, `"text_map"` or `"lora"`, *optional*): how the erasure is published: as a map of the text rows, by which
            it acts here, with the LoRA that is the same edit for stock diffusers; or as one of the two alone. The LoRA has the
            map's rank in every layer: of the published windows of rows, whose rank is high, there is the map alone.
        pooled (`bool`, *optional*, defaults to `True`): SDXL, Stable Diffusion 3, FLUX.1: map the pooled text vector as well.
        per_encoder (`bool`, *optional*): SDXL, Stable Diffusion 3: map what each CLIP makes of a row by itself, so that the
            erasure acts whatever `prompt_2` is. Off, as published, both are mapped together, and a call with another `prompt_2` is
            refused.
        max_sequence_length (`int`, *optional*, defaults to 0): rows that T5 makes of a prompt, as in calls of
            the pipeline; 0 for the pipeline's own number, see [`TextConfig`].
        directions (`int`, *optional*): let all rows of a concept go to its anchor's in so many directions, those in which they go
            farthest; 0, the default, for each row's own.
        rank (`int`, *optional*): truncate what is published to this rank; the error is recorded. 0, the default, for the exact
            one.
        max_error (`float`, *optional*): truncate what is published to the least rank whose relative error is no larger; 0, the
            default, for none.
    """

    preset: Literal["object", "hard_object", "artist", "nudity", "unsafe"] = "object"
    published: bool = False
    rows: Which | None = None
    templates: Templates = None
    adversarial_rows: Which | None = None
    retain_rows: Literal["all", "last"] = "all"
    epochs: Annotated[int | None, Whole(least=0)] = None
    reg: Annotated[float | None, Number(above=0)] = None
    keep_erased: bool | None = None
    lamb: Annotated[float | None, Number(above=0)] = None
    retain_scale: Annotated[float | None, Number()] = None
    uce_lamb: Annotated[float | None, Number(above=0)] = None
    uce_retain_scale: Annotated[float | None, Number()] = None
    units: Literal["absolute", "relative"] | None = None
    layer: Form | None = None

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), **(PUBLISHED if self.published else PRESETS)[self.preset]}


@dataclass(frozen=True, kw_only=True)
class Settings(MapSettings):
    """What RECE works with: a [`Config`] with nothing left out."""

    adversarial_rows: Which
    epochs: int
    reg: float
    keep_erased: bool
    lamb: float
    retain_scale: float
    uce_lamb: float
    uce_retain_scale: float
    units: Literal["absolute", "relative"]


@dataclass(frozen=True)
class Scales:
    """The settings in the units of the algebra, for one input of the denoiser."""

    uce_lamb: float
    uce_retain: float
    lamb: float
    retain: float
    reg: float

    @classmethod
    def of(
        cls, settings: Settings, rows: TargetRows, concept: TargetRows, kept: KeptRows, weights: torch.Tensor
    ) -> "Scales":
        uce_lamb, uce_retain = settings.uce_lamb, settings.uce_retain_scale
        lamb, retain, reg = settings.lamb, settings.retain_scale, settings.reg
        if settings.units == "absolute":
            return cls(uce_lamb, uce_retain, lamb, retain, reg)
        norm, share = relative_units(rows, kept)
        own_norm, own_share = relative_units(concept, kept)
        scale = float(weights.diagonal().mean())
        return cls(uce_lamb * norm, uce_retain * share, lamb * own_norm, retain * own_share, reg * scale)


def solve(
    rows: TargetRows,
    concept: TargetRows,
    kept: KeptRows,
    weights: torch.Tensor,
    scales: Scales,
    epochs: int,
    keep_erased: bool = False,
) -> Factors:
    """The algorithm: `(A, D)` [n, C] in float64, with T = I + D^T A and W' = W T for every projection.

    T^T S and T^T S T are carried along: an epoch changes them, as T, by no more ranks than X has rows.

    Args:
        rows, kept: what UCE maps first, and what is retained throughout.
        concept: the rows X of the concepts, and G of their anchors, of the epochs.
        weights: S = sum W^T W [C, C].
        keep_erased: add X to what the epochs retain.
    """
    x, g = concept.targets, concept.anchors
    eye = torch.eye(weights.shape[0], dtype=torch.float64)
    retained = scales.retain * (kept.retain.T @ kept.retain if kept.gram is None else kept.gram)
    retained = retained + x.T @ x if keep_erased else retained
    (a, d), held = solve_holding(rows, kept, erase_scale=1.0, retain_scale=scales.uce_retain, lamb=scales.uce_lamb)
    retained = retained if held is None else retained + held
    reads, writes = [a], [d]
    ts = weights + a.T @ (d @ weights)
    tst = ts + (ts @ d.T) @ a
    for _ in range(epochs):
        factor = torch.linalg.cholesky(scales.reg * eye + (tst + tst.T) / 2)
        found = torch.cholesky_solve(ts @ x.T, factor).T  # X P^T
        m = scales.lamb * eye + found.T @ found + retained
        a, d = torch.cholesky_solve(found.T, torch.linalg.cholesky(m)).T, g - found
        # T <- T (I + D^T A): T D^T is D^T and what the edits so far make of it.
        writes.append(d + sum((d @ read.T) @ write for read, write in zip(reads, writes, strict=True)))
        reads.append(a)
        ts = ts + a.T @ (d @ ts)
        tst = tst + a.T @ (d @ tst)
        tst = tst + (tst @ d.T) @ a
    return torch.cat(reads), torch.cat(writes)


def solve_parts(
    found: tuple[TargetRows, KeptRows],
    concept: TargetRows,
    weights: torch.Tensor,
    settings: Settings,
    parts: Sequence[slice] = (),
) -> Factors:
    """Solve in the units of the settings; rows in `parts` for each part by itself, with what the weights do to it."""
    solved = []
    for columns, rows, kept in by_part(parts, *found):
        own = concept if len(parts) < 2 else concept.part(columns)
        weight = weights[columns, columns]
        scales = Scales.of(settings, rows, own, kept, weight)
        solved.append(solve(rows, own, kept, weight, scales, settings.epochs, settings.keep_erased))
    return side_by_side(solved)


def readers_of(pipe: Any, name: str) -> dict[str, nn.Linear]:
    """The projections that read one input of the denoiser."""
    return pooled_readers(pipe) if name in POOLED_INPUTS else text_readers(pipe)


def fit(pipe: Any, concepts: Sequence[Concept], config: Config) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    text_readers(pipe)  # a denoiser that cannot be edited is told before anything is encoded
    concepts = with_anchors(concepts, str(PUBLISHED[config.preset]["anchor"]))
    config = suited(config, pipe, AT_DOORS)
    settings = resolve(config, Settings)
    first = target_rows(pipe, concepts, settings, push=settings.push)
    if settings.rows == settings.adversarial_rows:
        return refit(pipe, concepts, config, {"": first})
    later = target_rows(pipe, concepts, settings, settings.adversarial_rows, settings.push)
    return refit(pipe, concepts, config, {"": first, "epochs": later})


def refit(
    pipe: Any, concepts: Sequence[Concept], config: Config, targets: Mapping[str, Mapping[str, TargetRows]]
) -> Erasure:
    """Make the erasure from targets' rows that are known: those of [`fit`], or what several artefacts kept."""
    config = suited(config, pipe, AT_DOORS)
    settings = resolve(config, Settings)
    kept = kept_rows(pipe, settings, with_gram=settings.retain_rows == "all")
    first, later = targets[""], targets.get("epochs", targets[""])
    names = [name for name in first if name not in POOLED_INPUTS or settings.pooled]
    parts = parts_of(pipe, settings)
    maps, found = {}, {}
    for name in names:
        found[name] = first[name], kept[name]
        weights = base_sums.weight_gram(readers_of(pipe, name), first[name].targets.shape[1])
        maps[name] = solve_parts(found[name], later[name], weights, settings, () if name in POOLED_INPUTS else parts)
    edits = {name: [factors] for name, factors in maps.items()}
    diagnostics = report(found, edits, concepts, kept_names(settings), parts)
    return make_erasure(pipe, "rece", concepts, settings, publish(pipe, maps, settings), diagnostics, targets)
