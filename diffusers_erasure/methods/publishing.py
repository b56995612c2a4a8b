"""From a closed-form edit to an erasure: the LoRA or text map that is published, and what its maker is told."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..artifact import Erasure
from ..assembling import Rows, bound_to_text, made_by
from ..base_model import (
    component,
    describe_base,
    family_of,
    pooled_readers,
    text_attentions,
    text_readers,
    weight_times,
)
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..families import POOLED_INPUTS
from ..layers import layer_kind
from ..layers.layer import Layer
from ..lists.names import bare
from ..logging import get_logger
from ..low_rank import DOWN, UP, Factors, compress, pad_rank, truncated, written
from ..schema import Concept, LayerSpec, SolveRows
from ..stock_lora import give_stock_lora
from .rows import SAME, KeptRows, TargetRows, TextSettings, to_tensors


logger = get_logger(__name__)

Form = Literal["both", "text_map", "lora"]  # how an edit that is a map of the text rows is published
HARDLY_MOVED = 0.5
NEIGHBOUR_MOVED = 0.5


@dataclass(frozen=True, kw_only=True)
class FormSettings(TextSettings):
    """Settings of a method whose edit can be a map of the text rows."""

    layer: Form
    push: float


@dataclass(frozen=True)
class Edit:
    """A closed-form edit as layers: the relative error of a LoRA as it is written, and that of a truncated map.

    With `stock` the erasure carries the map's LoRA for stock diffusers besides. `form` is what is recorded of a map.
    """

    layers: tuple[Layer, ...]
    error: float = 0.0
    map_error: float = 0.0
    stock: bool = False
    form: Form | None = None


def publish(pipe: Any, maps: Mapping[str, Factors], settings: FormSettings) -> Edit:
    """Turn maps T = I + D^T A of the denoiser's inputs into layers: as they are, or as a LoRA `W D^T A` on what reads them.

    With `layer="both"` they are maps, and stock diffusers gets the LoRA. Where that would not be the same edit, they are the
    LoRA alone, which says so in the log.
    """
    reason = _unlike_its_lora(pipe, maps) if settings.layer == "both" else None
    if reason is None and settings.layer != "lora":
        edit = as_text_map(maps, settings, family_of(pipe).denoiser)
        if settings.layer == "both":
            _warn_of_size(pipe, len(edit.layers[0].tensors["A"]))
        return dataclasses.replace(edit, stock=settings.layer == "both", form=settings.layer)
    if reason is not None:
        logger.warning('Published as a LoRA alone (`layer="lora"`): %s', reason)
    sites: dict[str, Callable[[], Factors]] = {}
    for name, factors in maps.items():
        a, d = compress(*factors)
        for site, linear in (pooled_readers(pipe) if name in POOLED_INPUTS else text_readers(pipe)).items():
            sites[site] = functools.partial(_through, a, d, site, linear)
    return dataclasses.replace(as_lora(sites, settings, family_of(pipe).denoiser), form="lora")


def _through(a: torch.Tensor, d: torch.Tensor, site: str, linear: nn.Linear) -> Factors:
    """W (T - I) = (W D^T) A on a Linear that reads what is mapped, and perhaps something behind it."""
    return padded(a, linear.in_features), weight_times(linear, site, padded(d, linear.in_features).T)


def _unlike_its_lora(pipe: Any, maps: Mapping[str, Factors]) -> str | None:
    """Why maps and a LoRA on what is known to read them would not be one edit, `None` where they are."""
    family, kind = family_of(pipe), layer_kind("text_map")
    name, model = family.denoiser, component(pipe, family.denoiser)
    linear = family.door is not None or len(text_readers(pipe)) == 2 * sum(1 for _ in text_attentions(model))
    for site, (a, d) in maps.items():
        spec = LayerSpec(kind.name, name, (site,), kind.file, kind.prefix(name, (site,)))
        try:
            kind.weight_changes(model, spec, {"A": a, "D": d})
        except ErasureCompatibilityError:
            linear = False
        if not linear:
            return f"not everything that reads {site!r} is known to be linear, so a map of it would be another edit."
    return None


def _warn_of_size(pipe: Any, rank: int) -> None:
    shapes = [(linear.out_features, linear.in_features) for linear in text_readers(pipe).values()]
    size = sum(min(rank, *shape) * sum(shape) for shape in shapes)
    if size > sum(math.prod(shape) for shape in shapes):
        logger.warning(
            "The LoRA for stock diffusers has rank %d, and more numbers (%.0f MB) than the weights that it changes. "
            '`layer="text_map"` leaves it out; `rank` or `max_error` make it smaller.',
            rank,
            4e-6 * size,
        )


def as_lora(sites: Mapping[str, Callable[[], Factors]], config: TextSettings, component: str = "unet") -> Edit:
    """A LoRA on some sites, of one rank: those with less are padded with zeros.

    Args:
        sites: for each site what computes its factors, `a` [r, in] and `b` [out, r], float64.
        config ([`TextSettings`]): `rank` and `max_error`.
        component: the denoiser's name.
    """
    parts: dict[str, Factors] = {}
    worst = 0.0
    for site, factors in sites.items():
        parts[site], error = written(*factors(), config.rank or None, config.max_error or None)
        worst = max(worst, error)
    rank = max(len(a) for a, _ in parts.values())
    tensors: dict[str, torch.Tensor] = {}
    for site in sites:
        a, b = parts.pop(site)
        tensors[site + DOWN] = a if len(a) == rank else pad_rank(a, rank, 0)
        tensors[site + UP] = b if len(a) == rank else pad_rank(b, rank, 1)
    return Edit((Layer("lora", tuple(sites), tensors, component),), worst)


def as_text_map(maps: Mapping[str, Factors], config: TextSettings, component: str = "unet") -> Edit:
    """Text maps `x + (x A^T) D`, one for each input of the denoiser; `maps` gives `A` and `D`, both [r, C], float64."""
    layers = []
    worst = 0.0
    for name, (a, d) in maps.items():
        a, d, error = truncated(a, d, config.rank or None, config.max_error or None)
        worst = max(worst, error)
        layers.append(Layer("text_map", (name,), {"A": a, "D": d}, component))
    return Edit(tuple(layers), map_error=worst)


def padded(a: torch.Tensor, width: int, start: int = 0) -> torch.Tensor:
    """`a` [r, C] with zeros around it, for a Linear that reads more: the time beside the text, or another encoder's rows."""
    return F.pad(a, (start, width - start - a.shape[1]))


def side_by_side(factors: Sequence[Factors]) -> Factors:
    """Maps of the parts of a row as one map of the row; zeros between the parts are exact."""
    if len(factors) == 1:
        return factors[0]
    a, d = (torch.block_diag(*(pair[i] for pair in factors)) for i in (0, 1))
    return a, d


def report(
    found: Mapping[str, tuple[TargetRows, KeptRows]],
    edits: Mapping[str, Sequence[Factors]],
    concepts: Sequence[Concept],
    retained: Sequence[str] = (),
    parts: Sequence[slice] = (),
) -> dict[str, Any]:
    """How far targets moved to their anchors, and by which share of their norm rows moved that should stay.

    Args:
        found: for each input of the denoiser the rows that are mapped and kept.
        edits: for each input the map's factors `A` and `D` [r, C], in several versions where layers differ; then means
            over them are reported.
        concepts: the concepts, in the order of the probes.
        retained: names of the retained text rows, for the warning.
        parts: the columns of the rows that were mapped by themselves. A target moved as far as its part that moved least:
            with another `prompt_2` no other part may hold the concept.
    """
    result: dict[str, Any] = {}
    for name, (rows, kept) in found.items():
        pooled = name in POOLED_INPUTS
        shares = least_share(rows.probes, edits[name], () if pooled else parts, len(concepts))
        moved = _mean([_relative(kept.retain, f) for f in edits[name]])
        null = _mean([_relative(kept.null, f) for f in edits[name]])
        told = told_of(concepts, kept.starts, shares, moved, null, None if pooled else retained)
        result.update({"pooled": told} if pooled else told)
    return result


def told_of(
    concepts: Sequence[Concept],
    starts: int,
    shares: torch.Tensor,
    moved: torch.Tensor,
    null: torch.Tensor,
    retained: Sequence[str] | None,
) -> dict[str, Any]:
    """What is reported of one input of the denoiser.

    Args:
        concepts: the concepts.
        starts: how many of the empty prompt's rows are start tokens'.
        shares: how far each concept went to its anchor.
        moved, null: by which share of their norm the retained rows, and the empty prompt's, moved.
        retained: names of the retained rows, for the warning; `None` of a pooled vector.
    """
    part: dict[str, Any] = {
        "completeness": {str(c.target): _rounded(v) for c, v in zip(concepts, shares, strict=True)}
    }
    if len(moved):
        part["retained_change"] = {"median": _rounded(moved.median()), "max": _rounded(moved.max())}
    if retained is None:
        return {**part, "empty_prompt_change": _rounded(null[0])}
    if len(moved):
        _warn_of_neighbours(moved, retained)
    if starts:
        part["start_token_change"] = _rounded(null[:starts].max())
    part["empty_prompt_change"] = _rounded(null[starts:].max()) if len(null) > starts else 0.0
    _warn_of_targets(part["completeness"])
    return part


def least_share(
    probes: tuple[torch.Tensor, torch.Tensor], edits: Sequence[Factors], parts: Sequence[slice], concepts: int
) -> torch.Tensor:
    """How far each concept moves to its anchor: of its rows, and their parts, the one that moves least.

    A row or a part that is the anchor's is left out, such as that of an encoder which does not know the word.
    """
    rows, anchors = probes
    way = anchors - rows
    changes = [_change(rows, f) for f in edits]
    columns = parts if len(parts) > 1 else [slice(None)]
    squares = torch.stack([way[:, part].square().sum(1) for part in columns])
    shares = [
        _mean([(c[:, part] * way[:, part]).sum(1) / own.clamp_min(1e-300) for c in changes])
        for part, own in zip(columns, squares, strict=True)
    ]
    found = torch.stack(shares)
    found, squares = (each.T.reshape(concepts, -1) for each in (found, squares))  # all of a concept's rows and parts
    alike = (squares <= SAME**2 * squares.sum(1, keepdim=True)) & (squares < squares.amax(1, keepdim=True))
    return found.masked_fill(alike, float("inf")).amin(1)


def _change(rows: torch.Tensor, factors: Factors) -> torch.Tensor:
    a, d = factors
    return (rows @ a.T) @ d


def _relative(rows: torch.Tensor, factors: Factors) -> torch.Tensor:
    return _change(rows, factors).norm(dim=1) / rows.norm(dim=1).clamp_min(1e-300)


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean(0)


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")


def _warn_of_targets(completeness: Mapping[str, float]) -> None:
    weak = {name: share for name, share in completeness.items() if share < HARDLY_MOVED}
    for name, share in list(weak.items())[:5]:
        logger.warning(
            "%r moved only %.0f %% of the way to its anchor: what is retained, or `lamb`/`ridge`, holds it back. Check that "
            "nothing like it is retained, or retain less strictly.",
            name,
            100 * share,
        )
    if len(weak) > 5:
        logger.warning("%d further targets moved less than half the way.", len(weak) - 5)


def _warn_of_neighbours(change: torch.Tensor, retained: Sequence[str]) -> None:
    moved = [i for i in change.argsort(descending=True).tolist() if change[i] > NEIGHBOUR_MOVED]
    if moved:
        names = [repr(retained[i % len(retained)]) if retained else f"row {i}" for i in moved[:3]]
        logger.warning(
            "%d retained prompts changed by more than %.0f %% of their norm: %s%s. Erase less near to them, or give an anchor "
            "that is nearer to the target.",
            len(moved),
            100 * NEIGHBOUR_MOVED,
            ", ".join(names),
            ", …" if len(moved) > 3 else "",
        )


def make_erasure(
    pipe: Any,
    name: str,
    concepts: Sequence[Concept],
    config: TextSettings,
    edit: Edit,
    diagnostics: dict[str, Any],
    kept_for_solve: Mapping[str, Mapping[str, TargetRows]],
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Erasure:
    """Put the artefact together, with the rows that a later joint solve needs.

    Args:
        kept_for_solve: rows by the name of the stage that uses them ("" for a method with one).
        settings: effective settings, where these are not the config's own.
    """
    if edit.form is not None:  # where a LoRA took the map's place that is not what was asked for
        settings = {**(settings or {}), "layer": edit.form}
    if edit.map_error:
        diagnostics = {**diagnostics, "truncation_error": _rounded(edit.map_error)}
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, SolveRows] = {}
    for stage, found in kept_for_solve.items():
        some, counted = to_tensors(found, f"{stage}." if stage else "")
        tensors.update(some)
        numbers.update(counted)
    base = describe_base(pipe)
    erasure = Erasure.from_layers(
        bound_to_text(edit.layers, base),
        base=base,
        concepts=concepts,
        method=made_by(name, config, seed, **(settings or {})),
        error=edit.error,
        rows=Rows(tensors, numbers),
        diagnostics=diagnostics,
    )
    return give_stock_lora(erasure, pipe) if edit.stock else erasure


def with_anchors(concepts: Sequence[Concept], anchor: str) -> list[Concept]:
    """Give the preset's anchor to concepts that have none."""
    found = [Concept(c.target, anchor if c.anchor is None else c.anchor) for c in concepts]
    for concept in found:
        if bare(concept.target or "") == bare(concept.anchor or ""):
            raise ErasureInputError(
                f"The target {concept.target!r} is the anchor of this preset, so nothing would be erased; give `anchors`."
            )
    return found


def kept_names(config: TextSettings) -> list[str]:
    """Names of the retained rows, in the order in which [`kept_rows`] gives them."""
    kept = config.retain
    gone = {template.format(prompt) for prompt in kept.excluded for template in config.retained_in}
    return sorted({template.format(prompt) for prompt in kept.prompts for template in config.retained_in} - gone)
