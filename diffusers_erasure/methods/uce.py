"""UCE: Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761).

Every cross-attention key and value projection W gets the closed-form edit that maps the rows E of the targets to what
W gave for the rows G of the anchors, and keeps the rows R to retain:

    W' = (lamb W + a sum W g e^T + b sum W r r^T) M^-1,    M = lamb I + a E^T E + b R^T R.

Since `W M` reproduces all terms but one, W' = W T with T = I + (G - E)^T A, A = a E M^-1: one C x C Cholesky
factorisation serves the whole model, and each edit is low rank, dW = B A with B = W (G - E)^T. It is published as a
LoRA of that rank, or as a map of the text rows (`layer="text_map"`), which does the same to an unmodified model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..base_model import text_readers, weight_times
from ..errors import ErasureInputError
from ..low_rank import compress
from ..schema import Concept
from ..settings import Number
from .publishing import (
    POOLED_SITE,
    Edit,
    Factors,
    as_lora,
    as_text_map,
    kept_names,
    make_erasure,
    padded,
    pooled_linear,
    report,
)
from .rows import POOLED, ROWS, KeptRows, TargetRows, TextConfig, kept_rows, target_rows


@dataclass(frozen=True, kw_only=True)
class Config(TextConfig):
    """Settings of UCE.

    Args:
        rows (`"last"`, `"window"`, `"all"` or `"whole"`, *optional*, defaults to `"last"`): which rows of a target's encoding
            are mapped, see [`TextConfig`]. `"last"` is the row of its last word piece (the authors' code of 2025); `"window"` that row and all
            after it, padding included (their code of 2023, which RECE, MACE and SPEED compare with).
        templates (`str` or a tuple of `str`, *optional*, defaults to `"object"`): prompts, with `{}` for the concept, in which
            each target and its anchor are encoded; the name of a set of them, see [`TextConfig`], or one's own.
        retain (tuple of `str`, *optional*): prompts whose rows must not change.
        retain_rows (`"all"` or `"last"`, *optional*, defaults to `"all"`): which rows of a retained prompt must not
            change: all of them (published with `"window"`), or that of its last word piece (published with `"last"`).
        retain_templates (`bool`, *optional*, defaults to `False`): encode the retained prompts in the templates too.
        erase_scale (`float`, *optional*, defaults to 1.0): weight `a` of the targets' rows.
        retain_scale (`float`, *optional*, defaults to 1.0): weight `b` of the retained rows. Relative to the number of
            prompts: all the retained ones together weigh no more than all the targets', however long the list is.
        lamb (`float`, *optional*, defaults to 1e-3): weight of staying near the original. Relative to the mean squared
            norm of the targets' rows: the published 0.5 is 7e-4 for Stable Diffusion 1.x (|x|^2 about 750).
        absolute (`bool`, *optional*, defaults to `False`): take `retain_scale` and `lamb` as they are, as published.
        layer (`"lora"` or `"text_map"`, *optional*, defaults to `"lora"`): how the erasure is published: as a LoRA,
            or as a map of the text rows.
        pooled (`bool`, *optional*, defaults to `True`): SDXL: map the pooled text vector as well.
        rank (`int`, *optional*): truncate to this rank; the error is recorded. The exact rank by default.
        max_error (`float`, *optional*): truncate to the least rank whose relative error is no larger.
    """

    retain_rows: Literal["all", "last"] = "all"
    erase_scale: Annotated[float, Number(above=0)] = 1.0
    retain_scale: Annotated[float, Number()] = 1.0
    lamb: Annotated[float, Number(above=0)] = 1e-3
    absolute: bool = False
    layer: Literal["lora", "text_map"] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is None or self.templates is None:
            raise ErasureInputError("UCE has no presets: name `rows` and `templates`.")


def solve(
    rows: TargetRows, kept: KeptRows, *, erase_scale: float, retain_scale: float, lamb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The closed form: `(A, D)`, both float64 [n, C], with T = I + D^T A."""
    e = rows.targets
    gram = kept.retain.T @ kept.retain if kept.gram is None else kept.gram
    m = lamb * torch.eye(e.shape[1], dtype=e.dtype) + erase_scale * (e.T @ e) + retain_scale * gram
    a = torch.cholesky_solve(erase_scale * e.T, torch.linalg.cholesky(m)).T
    return a, rows.way


def relative_units(rows: TargetRows, kept: KeptRows) -> tuple[float, float]:
    """What `lamb` and `retain_scale` are multiplied by: the targets' mean |x|^2; target prompts a retained one, at most 1."""
    return rows.squares, min(1.0, rows.prompts / max(1, kept.prompts))


def solve_all(
    found: Mapping[str, tuple[TargetRows, KeptRows]], config: Config
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Solve for each input of the denoiser, in the units of the settings."""
    maps = {}
    for name, (rows, kept) in found.items():
        norm, share = (1.0, 1.0) if config.absolute else relative_units(rows, kept)
        maps[name] = solve(
            rows,
            kept,
            erase_scale=config.erase_scale,
            retain_scale=config.retain_scale * share,
            lamb=config.lamb * norm,
        )
    return maps


def fit(pipe: Any, concepts: Sequence[Concept], config: Config) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    text_readers(pipe)  # a denoiser that cannot be edited is told before anything is encoded
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    assert config.rows is not None
    return refit(pipe, concepts, config, {"": target_rows(pipe, concepts, config.template_list(), config.rows)})


def refit(
    pipe: Any, concepts: Sequence[Concept], config: Config, targets: Mapping[str, Mapping[str, TargetRows]]
) -> Erasure:
    """Make the erasure from targets' rows that are known: those of [`fit`], or what several artefacts kept."""
    templates = config.template_list() if config.retain_templates else ("{}",)
    kept = kept_rows(pipe, config.kept(), templates, with_gram=config.retain_rows == "all")
    wanted = [name for name in targets[""] if name == ROWS or config.pooled]
    found = {name: (targets[""][name], kept[name]) for name in wanted}
    maps = solve_all(found, config)
    diagnostics = report(found, {name: [factors] for name, factors in maps.items()}, concepts, kept_names(config))
    return make_erasure(pipe, "uce", concepts, config, publish(pipe, maps, config), diagnostics, targets)


def publish(pipe: Any, maps: Mapping[str, Factors], config: TextConfig) -> Edit:
    """Turn maps T = I + D^T A of the denoiser's inputs into layers: as they are, or as a LoRA `W D^T A` on what reads them."""
    if getattr(config, "layer", "lora") == "text_map":
        return as_text_map(maps, config)
    sites: dict[str, Any] = {}
    a, d = compress(*maps[ROWS])
    for site, linear in text_readers(pipe).items():
        sites[site] = lambda site=site, linear=linear: (a, weight_times(linear, site, d.T))
    if POOLED in maps:
        linear = pooled_linear(pipe)
        pooled_a, pooled_d = compress(*maps[POOLED])
        wide = padded(pooled_d, linear.in_features)
        sites[POOLED_SITE] = lambda: (padded(pooled_a, linear.in_features), weight_times(linear, POOLED_SITE, wide.T))
    return as_lora(sites, config)
