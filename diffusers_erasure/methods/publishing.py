"""From a closed-form edit to an erasure: the LoRA or text map that is published, and what its maker is told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..artifact import Erasure
from ..base_model import component, denoiser_name, describe_base, family_of
from ..logging import get_logger
from ..low_rank import DOWN, UP, Factors, balanced, cast_error, pad_rank, product, rank_for, truncated
from ..schema import (
    LORA_FILE,
    SCHEMA,
    SOLVE_PREFIX,
    TENSOR_FILE,
    Concept,
    ErasureConfig,
    LayerSpec,
    Library,
    Method,
    SolveRows,
    SolveSpec,
    Stock,
)
from .rows import ROWS, KeptRows, TargetRows, TextSettings, to_tensors


logger = get_logger(__name__)

POOLED_SITE = "add_embedding.linear_1"
HARDLY_MOVED = 0.5
NEIGHBOUR_MOVED = 0.5


@dataclass(frozen=True)
class Published:
    """A layer or two with their tensors by file, what stock diffusers gets, and the relative error of a truncated map."""

    layers: tuple[LayerSpec, ...]
    tensors: dict[str, dict[str, torch.Tensor]]
    stock: Stock | None
    map_error: float = 0.0


def as_lora(pipe: Any, sites: Mapping[str, Callable[[], Factors]], config: TextSettings) -> Published:
    """A LoRA on some sites, of one rank: those with less are padded with zeros.

    Args:
        pipe: the base model.
        sites: for each site what computes its factors, `a` [r, in] and `b` [out, r], float64.
        config ([`TextSettings`]): `rank` and `max_error`.
    """
    parts: dict[str, Factors] = {}
    worst = 0.0
    for site, factors in sites.items():
        a, b = factors()
        error = 0.0
        # More rows than the matrix has rank (many rows of a window) are written as fewer, exactly.
        if config.rank or config.max_error or len(a) > min(a.shape[1], b.shape[0]):
            u, s, vh = product(b, a)
            kept = rank_for(s, config.rank or None, config.max_error or None)
            lost, norm = float(s[kept:].norm()), float(s.norm())
            error = lost / norm if norm else 0.0
            a, b = vh[:kept], u[:, :kept] * s[:kept]
        a, b = balanced(a, b)
        names = f"unet.{site}{DOWN}", f"unet.{site}{UP}"
        written = a.float().contiguous(), b.float().contiguous()
        worst = max(worst, error + cast_error((a, b), written, names))
        parts[site] = written
    rank = max(len(a) for a, _ in parts.values())
    tensors: dict[str, torch.Tensor] = {}
    for site in sites:
        a, b = parts.pop(site)
        tensors[f"unet.{site}{DOWN}"] = a if len(a) == rank else pad_rank(a, rank, 0).contiguous()
        tensors[f"unet.{site}{UP}"] = b if len(a) == rank else pad_rank(b, rank, 1).contiguous()
    layer = LayerSpec("lora", "unet", tuple(sites), LORA_FILE, "unet.", text_components(pipe))
    return Published((layer,), {LORA_FILE: tensors}, Stock(LORA_FILE, float(f"{min(worst, 0.999):.3g}")))


def as_text_map(pipe: Any, maps: Mapping[str, Factors], config: TextSettings) -> Published:
    """Text maps `x + (x A^T) D`, one for each input of the denoiser; `maps` gives `A` and `D`, both [r, C], float64."""
    layers, tensors = [], {}
    worst = 0.0
    for name, (a, d) in maps.items():
        a, d, error = truncated(a, d, config.rank or None, config.max_error or None)
        worst = max(worst, error)
        prefix = "text_map." if name == ROWS else "pooled_map."
        layers.append(LayerSpec("text_map", "unet", (name,), TENSOR_FILE, prefix, text_components(pipe)))
        tensors[f"{prefix}A"], tensors[f"{prefix}D"] = a.float().contiguous(), d.float().contiguous()
    return Published(tuple(layers), {TENSOR_FILE: tensors}, None, worst)


def text_components(pipe: Any) -> tuple[str, ...]:
    """The components from which the text rows come: with other ones the edit would miss."""
    family = family_of(pipe)
    names = (*family.text_encoders, *family.tokenizers)
    return tuple(sorted(name for name in names if component(pipe, name) is not None))


def pooled_linear(pipe: Any) -> nn.Linear:
    """SDXL's Linear that reads the pooled text vector, with the time embeddings behind it."""
    linear = component(pipe, denoiser_name(pipe)).get_submodule(POOLED_SITE)
    assert isinstance(linear, nn.Linear)
    return linear


def padded(a: torch.Tensor, width: int) -> torch.Tensor:
    """`a` [r, C] with zeros behind it, for a Linear that reads more than the text."""
    return torch.cat([a, a.new_zeros(len(a), width - a.shape[1])], dim=1)


def report(
    found: Mapping[str, tuple[TargetRows, KeptRows]],
    edits: Mapping[str, Sequence[Factors]],
    concepts: Sequence[Concept],
    retained: Sequence[str] = (),
) -> dict[str, Any]:
    """How far targets moved to their anchors, and by which share of their norm rows moved that should stay.

    Args:
        found: for each input of the denoiser the rows that are mapped and kept.
        edits: for each input the map's factors `A` and `D` [r, C], in several versions where layers differ; then means
            over them are reported.
        concepts: the concepts, in the order of the probes.
        retained: names of the retained rows of `encoder_hidden_states`, for the warning.
    """
    result: dict[str, Any] = {}
    for name, (rows, kept) in found.items():
        part: dict[str, Any] = {}
        probes, anchors = rows.probes
        way = anchors - probes
        shares = _mean(
            [((_change(probes, f) * way).sum(1) / way.square().sum(1).clamp_min(1e-300)) for f in edits[name]]
        )
        part["completeness"] = {str(c.target): _rounded(v) for c, v in zip(concepts, shares, strict=True)}
        if len(kept.retain):
            change = _mean([_relative(kept.retain, f) for f in edits[name]])
            part["retained_change"] = {"median": _rounded(change.median()), "max": _rounded(change.max())}
            if name == ROWS:
                _warn_of_neighbours(change, retained)
        null = _mean([_relative(kept.null, f) for f in edits[name]])
        part["start_token_change" if name == ROWS else "empty_prompt_change"] = _rounded(null[0])
        if name == ROWS:
            part["empty_prompt_change"] = _rounded(null[1:].max()) if len(null) > 1 else 0.0
            _warn_of_targets(part["completeness"])
        result.update(part if name == ROWS else {"pooled": part})
    return result


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
        names = [repr(retained[i]) if i < len(retained) else f"row {i}" for i in moved[:3]]
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
    published: Published,
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
    recorded, secret = config.recorded()
    recorded.update(settings or {})
    if published.map_error:
        diagnostics = {**diagnostics, "truncation_error": _rounded(published.map_error)}
    tensors = {file: dict(items) for file, items in published.tensors.items()}
    numbers: dict[str, SolveRows] = {}
    solve_tensors: dict[str, torch.Tensor] = {}
    for stage, found in kept_for_solve.items():
        some, counted = to_tensors(found, f"{stage}." if stage else "")
        solve_tensors.update(some)
        numbers.update(counted)
    tensors.setdefault(TENSOR_FILE, {}).update({SOLVE_PREFIX + key: value for key, value in solve_tensors.items()})
    erasure_config = ErasureConfig(
        schema=SCHEMA,
        library=Library("diffusers_erasure", __version__),
        method=Method(
            name=name,
            settings=recorded,
            seed=seed,
            versions={"torch": torch.__version__.partition("+")[0]},
            concept_settings=secret,
        ),
        base_model=describe_base(pipe),
        concepts=tuple(concepts),
        layers=published.layers,
        stock=published.stock,
        solve=SolveSpec(TENSOR_FILE, SOLVE_PREFIX, numbers),
        diagnostics=diagnostics,
    )
    return Erasure(erasure_config, tensors)


def kept_names(config: TextSettings) -> list[str]:
    """Names of the retained rows, in the order in which [`kept_rows`] gives them."""
    kept = config.retain
    gone = {template.format(prompt) for prompt in kept.excluded for template in config.retained_in}
    return sorted({template.format(prompt) for prompt in kept.prompts for template in config.retained_in} - gone)
