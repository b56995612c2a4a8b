"""SPEED: scalable, precise and efficient concept erasure (Li et al., ICLR 2026, arXiv 2503.07392).

Each value projection W gets the edit that maps the targets' rows E to what W gave for the anchors' rows G, among those
edits that leave (nearly) alone whatever a refined retain set spans, and exactly alone the rows K of the empty prompt:

    min |(W + dW P) E^T - W G^T|^2 + ridge |dW P|^2   with   dW P K = 0,   P: the null space of the retain set.

The retain set is refined for each layer: influence-based prior filtering (IPF) drops rows that the edit hardly touches,
directed prior augmentation (DPA) adds variants of the rest along W's least direction. The algebra is in
[`nullspace`]: dW = B A with B = W (G - E)^T, so that the edit is a LoRA of as many rows as there are target rows, exactly.
Where it is the same A on all keys and values, without the refinement that is each layer's own, it is a map of the text rows.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..base_model import family_of, plain_weight, pooled_readers, text_readers, weight_times
from ..errors import ErasureInputError
from ..families import POOLED_INPUTS
from ..logging import get_logger
from ..schema import Concept
from ..settings import Number, Whole, resolve
from ..settings.texts import Templates
from . import base_sums
from .nullspace import Influence, centres_of, edit, kept_directions, refine
from .publishing import (
    Edit,
    Factors,
    Form,
    FormSettings,
    as_lora,
    kept_names,
    make_erasure,
    padded,
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


logger = get_logger(__name__)

SQUARES = 750.0  # |x|^2 of the text rows of Stable Diffusion 1.x, for which the absolute settings were published

# What the authors run for each task; `ridge` is their `retain_scale`.
PUBLISHED: dict[str, dict[str, Any]] = {
    task: {
        "anchor": anchor,
        "rows": "all" if task == "nudity" else "last",
        "templates": "none",
        "units": "absolute",
        "filter": task != "celebrity",
        "augment": 10,
        "threshold": 1e-4 if task == "celebrity" else 1e-1,
        "ridge": {"celebrity": 0.05, "nudity": 0.7}.get(task, 1.0),
        "lamb": 0.5 if task == "nudity" else 0.0,
        "params": "V",
        "retain_rows": "last",
        "retain_templates": False,
        "per_encoder": False,
        "layer": "both",
    }
    for task, anchor in {"instance": "", "style": "art", "celebrity": "person", "nudity": ""}.items()
}
# Ours: more of a prompt's rows, in units of the rows' own scale. Picked on the development half of benchmarks/efficacy.
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **values,
        "rows": "window",
        "templates": {"style": "style_context", "celebrity": "person"}.get(task, "object_context"),
        "params": "KV" if task == "style" else "V",
        "retain_rows": "all",
        "retain_templates": True,
        "units": "relative",
        "threshold": 1e-5,
        "ridge": 1e-3,
        "push": 0.4,
        "lamb": values["lamb"] * values["ridge"] / SQUARES,
        "max_error": 1e-3,
        "per_encoder": True,
    }
    for task, values in PUBLISHED.items()
}

AT_DOORS: dict[str, Any] = {"directions": 2, "ridge": 1e-2}  # where text enters by a door; see UCE's


@dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """Settings of SPEED. Those that are left out (`None`) come from the preset.

    Args:
        preset (`"instance"`, `"style"`, `"celebrity"` or `"nudity"`, *optional*, defaults to `"instance"`): the kind of
            concept; what is not given is chosen for it.
        published (`bool`, *optional*, defaults to `False`): take the authors' settings of the preset (last rows, no
            templates, absolute units) instead of this library's.
        params (`"V"`, `"K"` or `"KV"`, *optional*): which projections of a UNet are edited: values, keys or both.
        rows (`"last"`, `"window"`, `"all"` or `"whole"`, *optional*): which rows of a target are mapped: that of its last word
            piece, that and all after it, all but the start token's, or all; see [`TextConfig`].
        templates (`str` or a tuple of `str`, *optional*): prompts, with `{}` for the concept, in which each target and its
            anchor are encoded; the name of a set of them, or one's own.
        retain (tuple of `str`, *optional*): prompts whose rows must not change; the rows of the empty prompt otherwise.
        retain_rows (`"last"` or `"all"`, *optional*): ours, beside the published `"last"`: `"all"` also keeps all further
            rows of the retained prompts, padding included, unfiltered.
        retain_templates (`bool`, *optional*): encode the retained prompts in the templates too; by default up to 256 of them.
        units (`"absolute"` or `"relative"`, *optional*): whether `threshold`, `ridge` and `lamb` are the published numbers,
            which fit rows with |x|^2 of about 750, or shares: `threshold` of the retain set's mean |x|^2, `ridge` of the
            targets' mean |x|^2 and `lamb` of the same, divided by the ridge.
        filter (`bool`, *optional*): influence-based prior filtering: leave out retained rows that the edit hardly touches.
        augment (`int`, *optional*): how often each kept row is augmented; 0 for no augmentation.
        chunk (`int`, *optional*, defaults to 128): rows that are augmented and compared together.
        threshold (`float`, *optional*): directions of the retain set with a larger mean square must not change; of relative units those
            with the largest, at most half of all there are.
        ridge (`float`, *optional*): weight of a small change (the authors' `retain_scale`).
        lamb (`float`, *optional*): softens the invariance of the empty prompt's rows; 0 is exact.
        centres (`int`, *optional*, defaults to 3): k-means centres of the empty prompt's rows that stay, beside the start
            token's row.
        adversarial (`int`, *optional*, defaults to 0): rounds in which rows that still reach the targets through the edited
            weights (RECE) are added as targets.
        reg (`float`, *optional*, defaults to 0.1): RECE's weight of a small adversarial row; relative to the mean square of
            the projections' columns where `units` is `"relative"`.
        seed (`int`, *optional*, defaults to 0): seed of the augmentation, the chunks and k-means.
        pooled (`bool`, *optional*, defaults to `True`): SDXL, Stable Diffusion 3, FLUX.1: map the pooled text vector as well.
        per_encoder (`bool`, *optional*): SDXL, Stable Diffusion 3: map what each CLIP makes of a row by itself, so that the
            erasure acts whatever `prompt_2` is. Off, as published, both together; a call with another `prompt_2` is refused.
        max_sequence_length (`int`, *optional*, defaults to 0): rows that T5 makes of a prompt, as in calls of the pipeline; 0 for
            the pipeline's own number, see [`TextConfig`].
        directions (`int`, *optional*): let all rows of a concept go to its anchor's in so many directions, those in which they go
            farthest; 0 for each row's own. 2 by default for Stable Diffusion 3, FLUX.1 and others, else 0.
        layer (`"both"`, `"text_map"` or `"lora"`, *optional*): how the erasure is published where it is one map for all layers,
            with `params="KV"`, `filter=False` and `augment=0`, or where text enters by a door: as a map of the text rows, by which
            it acts here, with the LoRA that is the same edit for stock diffusers; or as one of the two alone. Elsewhere it is the
            LoRA, whatever is given.
        rank (`int`, *optional*): truncate what is published to this rank; the error is recorded. 0, the default, for no limit.
        max_error (`float`, *optional*): truncate what is published to the least rank whose relative error is no larger; 0 for
            none. Our presets do, as the many rows of a window lie close together.
    """

    preset: Literal["instance", "style", "celebrity", "nudity"] = "instance"
    published: bool = False
    params: Literal["V", "K", "KV"] | None = None
    rows: Which | None = None
    templates: Templates = None
    retain_rows: Literal["all", "last"] | None = None
    retain_templates: bool | None = None
    units: Literal["absolute", "relative"] | None = None
    filter: bool | None = None
    augment: Annotated[int | None, Whole(least=0)] = None
    chunk: Annotated[int, Whole(least=1)] = 128
    threshold: Annotated[float | None, Number()] = None
    ridge: Annotated[float | None, Number(above=0)] = None
    lamb: Annotated[float | None, Number()] = None
    centres: Annotated[int, Whole(least=0)] = 3
    adversarial: Annotated[int, Whole(least=0)] = 0
    reg: Annotated[float, Number(above=0)] = 0.1
    seed: Annotated[int, Whole(least=0)] = 0
    layer: Form | None = None

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), **(PUBLISHED if self.published else PRESETS)[self.preset]}

    @property
    def anchor(self) -> str:
        """What a target without an anchor is mapped to."""
        return str(PUBLISHED[self.preset]["anchor"])


@dataclass(frozen=True, kw_only=True)
class Settings(FormSettings):
    """What SPEED works with: a [`Config`] with nothing left out."""

    preset: str
    published: bool
    params: Literal["V", "K", "KV"]
    retain_rows: Literal["all", "last"]
    units: Literal["absolute", "relative"]
    filter: bool
    augment: int
    chunk: int
    threshold: float
    ridge: float
    lamb: float
    centres: int
    adversarial: int
    reg: float
    seed: int


@dataclass(frozen=True)
class Units:
    """`threshold`, `ridge`, `lamb` and the identity of the influence, as the algebra wants them."""

    threshold: float
    relative: bool
    ridge: float
    lamb: float
    identity: float

    @classmethod
    def of(cls, settings: Settings, rows: TargetRows) -> "Units":
        if settings.units == "absolute":
            return cls(settings.threshold, False, settings.ridge, settings.lamb, 1.0)
        # The published sums are means over the concepts, so that a ridge weighs more the more there are: ours does not.
        scale = rows.squares / rows.concepts
        return cls(settings.threshold, True, settings.ridge * scale, settings.lamb / settings.ridge, scale / SQUARES)


@dataclass(frozen=True)
class Problem:
    """All that the layers share for one input of the denoiser, or one encoder's columns of it.

    Rows, invariants, units, the influence, the shuffled retain set.
    """

    columns: slice
    rows: TargetRows
    retain: torch.Tensor
    extra: torch.Tensor | None
    invariants: torch.Tensor
    units: Units
    influence: Influence
    coordinates: torch.Tensor

    @classmethod
    def of(cls, columns: slice, rows: TargetRows, kept: KeptRows, settings: Settings) -> "Problem":
        """Set up; without a retain set the empty prompt's own rows are retained, as published. What is held joins it."""
        retain = torch.cat([kept.retain, kept.held_beside(rows)])
        starts, rest = kept.null[: kept.starts], kept.null[kept.starts :]
        retain = retain if len(retain) else rest
        order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(settings.seed))
        invariants = torch.cat([starts, centres_of(rest, settings.centres, settings.seed)])
        units = Units.of(settings, rows)
        influence = Influence.of(rows.targets, rows.concepts, units.identity)
        extra = None if kept.gram is None else kept.gram / max(1, kept.gram_count)
        retain = retain[order]
        return cls(columns, rows, retain, extra, invariants, units, influence, influence.coordinates(retain))


def solve_layer(
    problem: Problem, images: torch.Tensor, settings: Settings, v: torch.Tensor | None, draws: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """One layer: `A` [n, C], with dW = (W D^T) A / c; and how many directions must not change.

    Args:
        images: W D^T [o, n].
        v, draws: the layer's least direction [C] and the scalars [times, N] of the augmentation.
    """
    prior = refine(
        problem.retain,
        problem.coordinates,
        images.T @ images,
        filter=settings.filter,
        v=v,
        v_coordinates=None if v is None else problem.influence.coordinates(v[None]),
        draws=draws,
        chunk=settings.chunk,
    )
    units = problem.units
    kept = kept_directions(prior, units.threshold, units.relative, problem.extra)
    e, c = problem.rows.targets, problem.rows.concepts
    return edit(e, kept, problem.invariants, c, ridge=units.ridge, lamb=units.lamb), kept.shape[1]


@dataclass(frozen=True)
class Site:
    """One projection that is edited: its Linear, the problem that is solved for it, and its columns that read those rows.

    Where each text encoder's part of the rows is a problem of its own, a projection is a site of each.
    """

    name: str
    linear: Any
    reads: str
    columns: slice

    @property
    def key(self) -> tuple[str, str]:
        """By which its factors are found."""
        return self.name, self.reads


def sites_of(pipe: Any, params: str, columns: Mapping[str, slice]) -> list[Site]:
    """The projections that `params` names, or the door of the rows, and what reads the pooled vector; `columns` by problem."""
    door = family_of(pipe).door
    wanted = [f"to_{letter.lower()}" for letter in params] if door is None else [door.rpartition(".")[2]]
    of_rows = [name for name in columns if name not in POOLED_INPUTS]
    sites = [
        Site(name, linear, reads, columns[reads])
        for name, linear in text_readers(pipe).items()
        if name.rpartition(".")[2] in wanted
        for reads in of_rows
    ]
    for reads in POOLED_INPUTS & set(columns):
        sites += [Site(name, linear, reads, columns[reads]) for name, linear in pooled_readers(pipe).items()]
    return sites


def solve_sites(
    pipe: Any, problems: Mapping[str, Problem], sites: Sequence[Site], settings: Settings
) -> tuple[dict[tuple[str, str], Factors], dict[tuple[str, str], int]]:
    """Solve every layer: `(A, B)` with dW = B A on the site's columns, and the dimension of the null space, by [`Site.key`]."""
    directions: dict[str, torch.Tensor] = {}
    if settings.augment:
        linears = {f"{site.name}/{site.reads}": site.linear for site in sites}
        directions = base_sums.least_directions(linears, {f"{site.name}/{site.reads}": site.columns for site in sites})
    factors: dict[tuple[str, str], Factors] = {}
    free: dict[tuple[str, str], int] = {}
    for index, site in enumerate(sites):
        problem = problems[site.reads]
        draws = None
        if settings.augment:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
            draws = torch.randn(settings.augment, len(problem.retain), generator=generator, dtype=torch.float64)
        way = padded(problem.rows.way, site.linear.in_features, site.columns.start)
        images = weight_times(site.linear, site.name, way.T)
        a, kept = solve_layer(problem, images, settings, directions.get(f"{site.name}/{site.reads}"), draws)
        factors[site.key] = a, images / problem.rows.concepts
        free[site.key] = a.shape[1] - kept
    return factors, free


def fit(pipe: Any, concepts: Sequence[Concept], config: Config) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    text_readers(pipe)  # a denoiser that cannot be edited is told before anything is encoded
    concepts = with_anchors(concepts, config.anchor)
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
    rows = next(name for name in found if name not in POOLED_INPUTS)
    _warn_of_units(settings, found[rows][0])
    parts = parts_of(pipe, settings)
    problems = problems_of(found, settings, parts)
    sites = sites_of(pipe, settings.params, {name: problem.columns for name, problem in problems.items()})
    factors, free = solve_sites(pipe, problems, sites, settings)
    for _ in range(settings.adversarial):
        more = {
            name: adversarial_rows(problem.rows, factors, [s for s in sites if s.reads == name], settings)
            for name, problem in problems.items()
            if name not in POOLED_INPUTS
        }
        problems.update(problems_of({rows: found[rows]}, settings, parts, more))
        factors, free = solve_sites(pipe, problems, sites, settings)
    edits: dict[str, list[Factors]] = {name: [] for name in found}
    for own in by_name(sites).values():
        maps = [(factors[s.key][0], problems[s.reads].rows.way / problems[s.reads].rows.concepts) for s in own]
        edits[own[0].reads if own[0].reads in found else rows].append(side_by_side(maps))
    diagnostics = report(found, edits, concepts, kept_names(settings), parts)
    diagnostics["null_space"] = null_space(free, sites)
    edit = as_edit(pipe, edits, factors, sites, settings, told=config.layer is not None)
    return make_erasure(pipe, "speed", concepts, settings, edit, diagnostics, targets, seed=settings.seed)


def problems_of(
    found: Mapping[str, tuple[TargetRows, KeptRows]],
    settings: Settings,
    parts: Sequence[slice] = (),
    targets: Mapping[str, TargetRows] | None = None,
) -> dict[str, Problem]:
    """The problems of each input of the denoiser: of rows in `parts` one a part, whose name has a number behind it.

    Args:
        targets: other rows to map than those of `found`, by the problem's name.
    """
    problems = {}
    for name, pair in found.items():
        cut = by_part(() if name in POOLED_INPUTS else parts, *pair)
        for number, (columns, rows, kept) in enumerate(cut):
            own = name if len(cut) == 1 else f"{name}.{number}"
            problems[own] = Problem.of(columns, (targets or {}).get(own, rows), kept, settings)
    return problems


def as_edit(
    pipe: Any,
    edits: Mapping[str, Sequence[Factors]],
    factors: Mapping[tuple[str, str], Factors],
    sites: Sequence[Site],
    settings: Settings,
    *,
    told: bool,
) -> Edit:
    """The layers: one map of the rows where all that reads them was edited by the same one, else a LoRA of each layer's own.

    Args:
        edits: for each input of the denoiser the maps of the layers that read it.
        told: whether `layer` was given, so that another form than that is worth a warning.
    """
    first = {name: own[0] for name, own in edits.items() if own}
    shared = all(torch.equal(a, first[name][0]) for name, own in edits.items() for a, _ in own)
    if (settings.params == "KV" or family_of(pipe).door is not None) and shared:
        return publish(pipe, first, settings)
    if settings.layer != "lora":
        logger.log(
            logging.WARNING if told else logging.INFO,
            "The edit differs from layer to layer (`params`, `filter`, `augment`), so it is no map of the text rows and is "
            "published as a LoRA.",
        )
    return dataclasses.replace(as_lora(lazy_factors(factors, sites), settings, family_of(pipe).denoiser), form="lora")


def by_name(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """The sites of each projection."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.name, []).append(site)
    return found


def lazy_factors(
    factors: Mapping[tuple[str, str], Factors], sites: Sequence[Site]
) -> dict[str, Callable[[], Factors]]:
    """For each projection what puts its factors together: `a` [r, in], with zeros where it reads something else."""

    def together(own: Sequence[Site]) -> Factors:
        placed = [padded(factors[s.key][0], s.linear.in_features, s.columns.start) for s in own]
        return torch.cat(placed), torch.cat([factors[s.key][1] for s in own], dim=1)

    return {name: functools.partial(together, own) for name, own in by_name(sites).items()}


def null_space(free: Mapping[tuple[str, str], int], sites: Sequence[Site]) -> dict[str, int]:
    """Least and largest dimension of the layers' null spaces, and the width of the rows."""
    values = [sum(free[s.key] for s in own) for own in by_name(sites).values() if own[0].reads not in POOLED_INPUTS]
    width = max(site.columns.stop for site in sites if site.reads not in POOLED_INPUTS)
    if max(values) == 0:
        raise ErasureInputError(
            f"Nothing can be erased: what is retained spans all {width} dimensions of the text rows in every layer. "
            "Raise `threshold`, or retain less."
        )
    if min(values) == 0:
        logger.warning("In some layers what is retained leaves no direction free; raise `threshold`, or retain less.")
    return {"least": min(values), "largest": max(values), "width": width}


def _warn_of_units(settings: Settings, rows: TargetRows) -> None:
    if settings.units == "absolute" and not SQUARES / 4 < rows.squares < SQUARES * 4:
        logger.warning(
            "Absolute `threshold`, `ridge` and `lamb` were published for text rows with |x|^2 of about %.0f; those of this "
            "base model have %.3g. Use `units='relative'`.",
            SQUARES,
            rows.squares,
        )


def adversarial_rows(
    rows: TargetRows, factors: Mapping[tuple[str, str], Factors], sites: Sequence[Site], settings: Settings
) -> TargetRows:
    """Add RECE's rows as targets: those which the edited weights W' map nearest to what W made of the targets.

    X P^T with P = (reg I + sum W'^T W')^-1 sum W'^T W, where W' = W + B A.
    """
    width = rows.targets.shape[1]
    edited, mixed = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    for site in sites:
        a, b = factors[site.key]
        before = plain_weight(site.linear, site.name)[:, site.columns]
        after = torch.addmm(before, b, a)
        edited.addmm_(after.T, after)
        mixed.addmm_(after.T, before)
    scale = float(edited.diagonal().mean()) if settings.units == "relative" else 1.0
    edited.diagonal().add_(settings.reg * scale)
    reached = rows.targets @ torch.linalg.solve(edited, mixed).T
    targets, anchors = torch.cat([rows.targets, reached]), torch.cat([rows.anchors, rows.anchors])
    return dataclasses.replace(rows, targets=targets, anchors=anchors)
