"""OCE: orthogonal concept erasure (Sun et al., ICML 2026, arXiv 2605.28902).

Each value projection W is turned by an orthogonal matrix R on its outputs, W' = R W, so that lengths of its columns and the angles
between them stay as they are: W'^T W' = W^T W. Where Q_E spans what W makes of the targets' rows E, and Q_G what it makes of
their anchors' rows G, R is the orthogonal matrix nearest to

    M = W K W^T - a Q_E Q_E^T (I - Q_G Q_G^T),    K = lamb I + b R^T R + g C,

with the retained rows R and the second moment C of all rows of the retained prompts: R leaves alone what they make, and turns away
from the targets what the anchors have no part in. With the SVD M = U S V^T it is R = U V^T, be its determinant 1 or -1:
a reflection keeps lengths and angles, too.

R differs from layer to layer, and (R - I) W has all ranks, most of them hardly: what is published is a LoRA, truncated, on
the values of a UNet or the door of a transformer, and the error is recorded. It is no map of the text rows.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..assembling import rounded
from ..base_model import family_of, plain_weight, text_readers
from ..families import POOLED_INPUTS
from ..low_rank import DOWN, Factors
from ..schema import Concept
from ..settings import Number, resolve
from .holding import HELD
from .publishing import as_lora, kept_names, least_share, make_erasure, padded, told_of
from .rows import (
    KeptRows,
    TargetRows,
    TextConfig,
    TextSettings,
    by_part,
    kept_rows,
    parts_of,
    target_rows,
)
from .speed import Site, by_name, sites_of
from .uce import relative_units


# What the authors run for each task; of what else they retain their scripts vary the weights (10 to 50 and 0 to 5).
PUBLISHED: dict[str, dict[str, Any]] = {
    task: {
        "rows": "last",
        "templates": "none",
        "erase_scale": erase_scale,
        "retain_scale": 1.0,
        "general_scale": 10.0,
        "lamb": 10.0,
        "absolute": True,
        "span": 0.0,
        "per_encoder": False,
        "max_error": 0.03,
    }
    for task, erase_scale in (("object", 2000.0), ("style", 500.0), ("person", 3500.0))
}
# Ours, relative to the rows' own scale. Picked on the development half of benchmarks/efficacy.
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **values,
        "templates": task,
        **{"erase_scale": 0.8, "retain_scale": 1.0, "general_scale": 10.0, "lamb": 1e-3, "absolute": False},
        **{"span": 0.1, "per_encoder": True},
    }
    for task, values in PUBLISHED.items()
}


@dataclass(frozen=True, kw_only=True)
class Config(TextConfig):
    """Settings of OCE. Those that are left out (`None`) come from the preset.

    Args:
        preset (`"object"`, `"style"` or `"person"`, *optional*, defaults to `"object"`): the kind of concept; what is not given
            is chosen for it.
        published (`bool`, *optional*, defaults to `False`): take the authors' settings of the preset (no templates, absolute
            weights) instead of this library's.
        templates (`str` or a tuple of `str`, *optional*): prompts, with `{}` for the concept, in which each target and its
            anchor are encoded; the name of a set of them, or one's own.
        retain (tuple of `str`, *optional*): prompts that must not change.
        erase_scale (`float`, *optional*): weight of turning away from the targets; relative to the squares of what a layer makes
            of their rows.
        retain_scale (`float`, *optional*): weight of the retained prompts' last rows; relative to the number of prompts, so that
            all together weigh no more than the targets.
        general_scale (`float`, *optional*): the same of all rows of the retained prompts and the empty one, by their mean square;
            the authors' are those of captions, which are not shipped.
        lamb (`float`, *optional*): weight of all directions alike; relative to the mean squared norm of the targets' rows.
        absolute (`bool`, *optional*): take these weights as they are, as published.
        span (`float`, *optional*): of what a layer makes of the targets and of the anchors, leave out directions with a singular
            value below this share of the largest, divided by the root of the number of concepts.
        rank (`int`, *optional*): truncate the LoRA to this rank; the error is recorded. 0, the default, for no limit.
        max_error (`float`, *optional*): truncate the LoRA to the least rank whose relative error is no larger, in each layer; 0
            for none. The error is that of a change that has all ranks.
    """

    preset: Literal["object", "style", "person"] = "object"
    published: bool = False
    erase_scale: Annotated[float | None, Number(above=0)] = None
    retain_scale: Annotated[float | None, Number()] = None
    general_scale: Annotated[float | None, Number()] = None
    lamb: Annotated[float | None, Number(above=0)] = None
    absolute: bool | None = None
    span: Annotated[float | None, Number(below=1)] = None

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), **(PUBLISHED if self.published else PRESETS)[self.preset]}


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """What OCE works with: a [`Config`] with nothing left out."""

    preset: str
    published: bool
    erase_scale: float
    retain_scale: float
    general_scale: float
    lamb: float
    absolute: bool
    span: float


@dataclass(frozen=True)
class Problem:
    """What the layers share for one input of the denoiser, or one encoder's columns of it.

    Attributes:
        columns: of the input.
        rows, kept: what is erased, and what is kept.
        sums: K [C, C].
    """

    columns: slice
    rows: TargetRows
    kept: KeptRows
    sums: torch.Tensor

    @classmethod
    def of(cls, columns: slice, rows: TargetRows, kept: KeptRows, settings: Settings) -> "Problem":
        """Weigh what is kept. What is held by default weighs as in UCE, each word alike."""
        norm, share = (1.0, 1.0) if settings.absolute else relative_units(rows, kept)
        general = 1.0 if settings.absolute else float(rows.prompts)
        held = kept.held_beside(rows)
        sums = settings.lamb * norm * torch.eye(rows.targets.shape[1], dtype=torch.float64)
        sums += settings.retain_scale * share * (kept.retain.T @ kept.retain)
        if kept.gram is not None:
            sums += settings.general_scale * general / kept.gram_count * kept.gram
        if len(held):
            weight = HELD if settings.absolute else HELD * rows.prompts
            sums += weight / len(held) * (held.T @ held)
        return cls(columns, rows, kept, sums)


def rotation(
    targets: torch.Tensor,
    anchors: torch.Tensor,
    kept: torch.Tensor,
    erase_scale: float,
    *,
    span: float = 0.0,
    absolute: bool = True,
) -> torch.Tensor:
    """R [o, o], in float64.

    Args:
        targets, anchors: what W makes of their rows, W E^T and W G^T [o, n].
        kept: W K W^T [o, o].
        erase_scale: `a`; where it is not `absolute`, in units of the weight from which on R reverses a direction of the targets
            that the anchors have no part in, on average.
        span: see [`Config`].
    """
    q_e, q_g = _span(targets, span), _span(anchors, span)
    own = q_e - q_g @ (q_g.T @ q_e)
    unit = 1.0
    if not absolute:
        unit = own.shape[1] * float((own * (kept @ own)).sum()) / max(float(own.square().sum()) ** 2, 1e-300)
    u, _, vh = torch.linalg.svd(kept - erase_scale * unit * (q_e @ own.T))
    return u @ vh


def _span(columns: torch.Tensor, least: float) -> torch.Tensor:
    """Orthonormal directions of what some columns span."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > max(least, 1e-10) * s[0].clamp_min(1e-300)]


@dataclass(frozen=True)
class Turned:
    """A layer with its rotation: W = Q S with orthonormal columns in Q (`None` for I), and W' = Q R S."""

    q: torch.Tensor | None
    s: torch.Tensor
    r: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, problem: Problem, settings: Settings) -> "Turned":
        """Solve for one layer's columns W [o, C]. Of more outputs than columns those count that W reaches."""
        q, s = torch.linalg.qr(weight) if weight.shape[0] > weight.shape[1] else (None, weight)
        targets, anchors = s @ problem.rows.targets.T, s @ problem.rows.anchors.T
        kept = s @ problem.sums @ s.T
        # What all rows share grows with the concepts beside what is one concept's own.
        span = settings.span / problem.rows.concepts**0.5
        r = rotation(targets, anchors, kept, settings.erase_scale, span=span, absolute=settings.absolute)
        return cls(q, s, r)

    @property
    def turn(self) -> torch.Tensor:
        """R - I."""
        return self.r - torch.eye(len(self.r), dtype=self.r.dtype)

    @property
    def change(self) -> Factors:
        """`(A, B)` with W' - W = B A."""
        return self.s, self.turn if self.q is None else self.q @ self.turn

    def measured(self, problem: Problem, concepts: int) -> "Measured":
        """How far the outputs move: of the targets to their anchors', of what is kept by which share of their norm."""
        eye = torch.eye(len(self.r), dtype=self.r.dtype)
        probes = problem.rows.probes[0] @ self.s.T, problem.rows.probes[1] @ self.s.T
        shares = least_share(probes, [(self.turn, eye)], (), concepts)
        moved, null = (self._moved(rows) for rows in (problem.kept.retain, problem.kept.null))
        return Measured(shares, moved, null, bool(torch.linalg.det(self.r) < 0))

    def _moved(self, rows: torch.Tensor) -> torch.Tensor:
        images = rows @ self.s.T
        return (images @ self.turn.T).norm(dim=1) / images.norm(dim=1).clamp_min(1e-300)


@dataclass(frozen=True)
class Measured:
    """What one layer does, see [`Turned.measured`]; `reflects`: its rotation is one with a reflection."""

    shares: torch.Tensor
    moved: torch.Tensor
    null: torch.Tensor
    reflects: bool


def solve_layer(
    own: Sequence[Site],
    problems: Mapping[str, Problem],
    settings: Settings,
    concepts: int,
    told: dict[str, list[Measured]],
) -> Factors:
    """`(A, B)` of one projection, whose columns are those of several problems where each encoder's part is turned by itself.

    Args:
        told: what each problem's layers do, to add to.
    """
    placed = []
    for site in own:
        problem = problems[site.reads]
        turned = Turned.of(plain_weight(site.linear, site.name)[:, site.columns], problem, settings)
        told.setdefault(site.reads, []).append(turned.measured(problem, concepts))
        a, b = turned.change
        placed.append((padded(a, site.linear.in_features, site.columns.start), b))
    return torch.cat([a for a, _ in placed]), torch.cat([b for _, b in placed], dim=1)


def problems_of(
    found: Mapping[str, tuple[TargetRows, KeptRows]], settings: Settings, parts: Sequence[slice]
) -> dict[str, Problem]:
    """The problems of each input of the denoiser: of rows in `parts` one a part, whose name has a number behind it."""
    problems = {}
    for name, pair in found.items():
        cut = by_part(() if name in POOLED_INPUTS else parts, *pair)
        for number, (columns, rows, kept) in enumerate(cut):
            problems[name if len(cut) == 1 else f"{name}.{number}"] = Problem.of(columns, rows, kept, settings)
    return problems


def reported(
    told: Mapping[str, Sequence[Measured]],
    problems: Mapping[str, Problem],
    concepts: Sequence[Concept],
    names: Sequence[str],
) -> dict[str, Any]:
    """What is reported: means over the layers of how outputs move; of encoders that are turned by themselves the worst."""
    pooled = [name for name in told if name in POOLED_INPUTS]
    result: dict[str, Any] = {}
    for own in ([name for name in told if name not in pooled], pooled):
        if own:
            shares = torch.stack([_mean(each.shares for each in told[name]) for name in own]).amin(0)
            moved = torch.stack([_mean(each.moved for each in told[name]) for name in own]).amax(0)
            null = torch.stack([_mean(each.null for each in told[name]) for name in own]).amax(0)
            starts = problems[own[0]].kept.starts
            part = told_of(concepts, starts, shares, moved, null, None if own == pooled else names)
            result.update({"pooled": part} if own == pooled else part)
    layers = [each for own in told.values() for each in own]
    result["rotations"] = {"layers": len(layers), "reflections": sum(each.reflects for each in layers)}
    return result


def _mean(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean(0)


def fit(pipe: Any, concepts: Sequence[Concept], config: Config) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    text_readers(pipe)  # a denoiser that cannot be edited is told before anything is encoded
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolve(config, Settings)
    return refit(pipe, concepts, config, {"": target_rows(pipe, concepts, settings)})


def refit(
    pipe: Any, concepts: Sequence[Concept], config: Config, targets: Mapping[str, Mapping[str, TargetRows]]
) -> Erasure:
    """Make the erasure from targets' rows that are known: those of [`fit`], or what several artefacts kept."""
    settings = resolve(config, Settings)
    kept = kept_rows(pipe, settings, with_gram=settings.general_scale > 0)
    found = {
        name: (rows, kept[name]) for name, rows in targets[""].items() if name not in POOLED_INPUTS or settings.pooled
    }
    problems = problems_of(found, settings, parts_of(pipe, settings))
    sites = sites_of(pipe, "V", {name: problem.columns for name, problem in problems.items()})
    told: dict[str, list[Measured]] = {}
    layers: dict[str, Callable[[], Factors]] = {
        name: functools.partial(solve_layer, own, problems, settings, len(concepts), told)
        for name, own in by_name(sites).items()
    }
    edit = as_lora(layers, settings, family_of(pipe).denoiser)
    diagnostics = reported(told, problems, concepts, kept_names(settings))
    diagnostics["rotations"]["rank"] = len(edit.layers[0].tensors[next(iter(layers)) + DOWN])
    diagnostics["truncation_error"] = rounded(edit.error)
    return make_erasure(pipe, "oce", concepts, settings, edit, diagnostics, targets)
