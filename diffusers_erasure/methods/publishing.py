"""From a closed-form edit to an erasure: the LoRA or text map that is published, and what its maker is told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..artifact import Erasure, low_rank_error
from ..base_model import component, denoiser_name, describe_base, family_of
from ..layers.lora import DOWN, UP, pad_rank
from ..logging import get_logger
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
from .rows import ROWS, KeptRows, TargetRows, TextConfig, to_tensors


logger = get_logger(__name__)

ROUNDING = 1e-13  # singular values below this share of the largest are rounding, not edit
POOLED_SITE = "add_embedding.linear_1"
HARDLY_MOVED = 0.5
NEIGHBOUR_MOVED = 0.5


def product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The SVD `u [m, k], s [k], vh [k, C]` of `left [m, n] @ right [n, C]`, without the product where n is small."""
    if right.shape[0] >= min(left.shape[0], right.shape[1]):
        u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
        return u, s, vh
    q_l, r_l = torch.linalg.qr(left)
    q_r, r_r = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_l @ r_r.T, full_matrices=False)
    return q_l @ u, s, vh @ q_r.T


def rank_for(s: torch.Tensor, rank: int | None, max_error: float | None) -> int:
    """The least rank that keeps the error within `max_error`, or all that is no rounding; at most `rank`."""
    kept = max(1, int((s > ROUNDING * s[0]).sum()))
    if max_error is not None:
        tail = s.square().flip(0).cumsum(0).flip(0)  # tail[r]: what is lost with the rank r
        kept = min(kept, max(1, int((tail > (max_error**2) * tail[0]).sum())))
    return kept if rank is None else min(kept, rank)


def compress(a: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write D^T A with as few rows as it has rank, the heaviest first, balanced between the two factors."""
    u, s, vh = product(d.T, a)
    kept = rank_for(s, None, None)
    root = s[:kept].sqrt()
    return vh[:kept] * root[:, None], (u[:, :kept] * root).T


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give both factors a like magnitude, by a power of two (exact), so that neither overflows in half precision."""
    largest_a, largest_b = (torch.linalg.vector_norm(factor, float("inf")) for factor in (a, b))
    if not float(largest_a) or not float(largest_b):
        return a, b
    shift = float(torch.exp2((largest_b.log2() - largest_a.log2()).div(2).round()))
    return a * shift, b / shift


Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """A layer or two with their tensors by file, what stock diffusers gets, and the relative error of a truncated map."""

    layers: tuple[LayerSpec, ...]
    tensors: dict[str, dict[str, torch.Tensor]]
    stock: Stock | None
    map_error: float = 0.0


def as_lora(pipe: Any, sites: Mapping[str, Callable[[], Factors]], config: TextConfig) -> Published:
    """A LoRA on some sites, of one rank: those with less are padded with zeros.

    Args:
        pipe: the base model.
        sites: for each site what computes its factors, `a` [r, in] and `b` [out, r], float64.
        config ([`TextConfig`]): `rank` and `max_error`.
    """
    parts: dict[str, Factors] = {}
    worst = 0.0
    for site, factors in sites.items():
        a, b = factors()
        error = 0.0
        # More rows than the matrix has rank (many rows of a window) are written as fewer, exactly.
        if config.rank is not None or config.max_error is not None or len(a) > min(a.shape[1], b.shape[0]):
            u, s, vh = product(b, a)
            kept = rank_for(s, config.rank, config.max_error)
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


def cast_error(exact: Factors, written: Factors, names: tuple[str, str]) -> float:
    """Relative error |B'A' - BA| / |BA| of writing factors in float32: exact for small ranks.

    For larger ones, where that costs more than the edit itself, it is estimated from what both make of 32 random rows.
    """
    if len(exact[0]) <= 64:
        return low_rank_error(dict(zip(names, exact, strict=True)), dict(zip(names, written, strict=True)))
    width = exact[0].shape[1]
    probes = torch.randn(width, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = exact[1] @ (exact[0] @ probes)
    return float(
        (written[1].double() @ (written[0].double() @ probes) - image).norm() / image.norm().clamp_min(1e-300)
    )


def as_text_map(pipe: Any, maps: Mapping[str, Factors], config: TextConfig) -> Published:
    """Text maps `x + (x A^T) D`, one for each input of the denoiser; `maps` gives `A` and `D`, both [r, C], float64."""
    layers, tensors = [], {}
    worst = 0.0
    for name, (a, d) in maps.items():
        a, d, error = truncated(a, d, config.rank, config.max_error)
        worst = max(worst, error)
        prefix = "text_map." if name == ROWS else "pooled_map."
        layers.append(LayerSpec("text_map", "unet", (name,), TENSOR_FILE, prefix, text_components(pipe)))
        tensors[f"{prefix}A"], tensors[f"{prefix}D"] = a.float().contiguous(), d.float().contiguous()
    return Published(tuple(layers), {TENSOR_FILE: tensors}, None, worst)


def truncated(
    a: torch.Tensor, d: torch.Tensor, rank: int | None, max_error: float | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`D^T A` with as few rows as wanted, and the relative error (Frobenius norm) of leaving the others out."""
    a, d = compress(a, d)
    values = a.norm(dim=1) * d.norm(dim=1)  # the singular values
    kept = rank_for(values, rank, max_error)
    norm = float(values.norm())
    return a[:kept], d[:kept], float(values[kept:].norm()) / norm if norm else 0.0


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
    config: TextConfig,
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


def kept_names(config: TextConfig) -> list[str]:
    """Names of the retained rows, in the order in which [`kept_rows`] gives them."""
    kept = config.kept()
    templates = config.template_list() if config.retain_templates else ("{}",)
    gone = {template.format(prompt) for prompt in kept.excluded for template in templates}
    return sorted({template.format(prompt) for prompt in kept.prompts for template in templates} - gone)
