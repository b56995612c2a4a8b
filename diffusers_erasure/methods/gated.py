"""Gated text edit: for each concept probes on the text rows, and behind them a map of rows and pooled vector to its anchor's.

This library's own method. A linear map of all prompts has to trade what it erases for what it keeps; behind a gate it need keep nothing:

    gate   Fisher's discriminant of the name's rows against those of all that is kept, see [`gated_probes`]
    map    x -> x + (x A^T) D, ridge regression from the rows E of the concept's prompts to the rows G of the anchor's in the same
           contexts: M = E^T (E E^T + lamb)^-1 (G - E), of the rank that the setting gives

Relatives: the facilitated transport of SPM (CVPR 2024, arXiv 2312.16145) and DuMo (gates by the prompt's likeness), GLoCE (CVPR 2025,
gates by token). Whoever words a prompt so that no probe sees it has the concept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..artifact import Erasure
from ..assembling import bound_to_text, made_by, rounded
from ..base_model import describe_base, family_of
from ..encoding import check_prompts, pooled_source, row_sources
from ..families import ROWS
from ..layers.gated_map import in_two
from ..layers.layer import Layer
from ..logging import get_logger
from ..schema import LORA_FILE, Concept
from ..settings import Facts, resolve
from ..stock_lora import give_stock_lora
from . import dp, uce
from .gated_probes import Gates, Kept, fit_gates, fit_pooled_gates
from .gated_reading import Name, Reading, Split, anchored, kept_words, names_of, paired_prompts, paired_rows
from .gated_settings import Config, Settings
from .rows import pushed


__all__ = ["Config", "Settings", "fit"]

logger = get_logger(__name__)


def fit_map(
    e: torch.Tensor, g: torch.Tensor, ridge: float, rank: int, push: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(A, D)` [r, C]: ridge regression from rows E to rows G [n, C], or to some [`pushed`] away from E, of the directions in which these
    rows go farthest."""
    e, g = e.double(), g.double()
    way = pushed(e, g, push) - e
    lamb = ridge * float(e.square().sum()) / e.shape[1]
    alpha = torch.linalg.solve(e @ e.T + lamb * torch.eye(len(e), dtype=e.dtype), way)
    moved = way - lamb * alpha  # E M, with M = E^T alpha
    _, _, vh = torch.linalg.svd(moved, full_matrices=False)
    leading = vh[:rank]
    return (e.T @ (alpha @ leading.T)).T, leading


def fit(pipe: Any, concepts: Sequence[Concept], config: Config) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    family = family_of(pipe)
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolve(config, Settings, Facts(len(concepts), family=family.name))
    check_prompts(pipe, [str(concept.target) for concept in concepts], settings.max_sequence_length)
    sources = row_sources(pipe, length=settings.max_sequence_length, before_norm=True)
    encoders = {name for block in family.rows for name in block}
    apart = family.pooled is not None and encoders.isdisjoint(family.pooled.encoders)
    reading = Reading(sources, pooled_source(pipe) if settings.pooled else None, apart)
    names = names_of(concepts, settings, reading)
    prompts = Kept.of(reading, kept_words(pipe, settings, concepts, sources[0]), settings)
    gates = fit_gates(reading, concepts, names, prompts, settings)
    names = list(gates.names)
    tensors = {
        "probes": gates.probes,
        "thresholds": in_two(gates.thresholds),
        "probe_counts": torch.tensor([sum(n.concept == i for n in names) for i in range(len(concepts))]).float(),
    }
    maps: dict[str, list[torch.Tensor]] = {}
    went = {}
    for index, concept in enumerate(concepts):
        own = [name for name in names if name.concept == index]
        pairs = paired_prompts(concept, own)
        a, d = fit_map(*paired_rows(reading, pairs), settings.ridge, settings.rank, settings.push)
        _add(maps, "", a, d)
        went[str(concept.target)] = _went(reading, concept, own[0], a, d, settings.push)
        if reading.pooled is not None:
            known = [pair for pair in pairs if pair[0] in reading.vectors]
            targets, anchors = (torch.stack([reading.vectors[pair[side]] for pair in known]) for side in (0, 1))
            _add(maps, "pooled_", *fit_map(targets, anchors, settings.ridge, settings.rank, settings.push))
    tensors |= {name: torch.cat(values) for name, values in maps.items()}
    tensors |= fit_pooled_gates(reading, concepts, names, prompts, settings)
    base = describe_base(pipe)
    layer = Layer("gated_map", (ROWS,), tensors, family.denoiser)
    _warn(gates, settings)
    erasure = Erasure.from_layers(
        bound_to_text([layer], base),
        base=base,
        concepts=concepts,
        method=made_by("gated", settings),
        diagnostics=_diagnostics(gates, went, settings),
    )
    return erasure if settings.stock == "none" else with_linear_edit(erasure, pipe, concepts, settings)


def _add(maps: dict[str, list[torch.Tensor]], prefix: str, a: torch.Tensor, d: torch.Tensor) -> None:
    for name, value in (("A", a), ("D", d), ("counts", torch.tensor([float(len(a))]))):
        maps.setdefault(prefix + name, []).append(value)


def _went(reading: Reading, concept: Concept, name: Name, a: torch.Tensor, d: torch.Tensor, push: float) -> float:
    """How far a target's own rows go to what they are mapped to in contexts that were held out: 1 all the way."""
    done = wanted = 0.0
    for context in name.split.testing:
        for own, its in zip(
            reading.of(context.format(name.text)), reading.of(anchored(context, concept.anchor)), strict=True
        ):
            row = own.word.double()
            way = pushed(row, its.word.double(), push) - row
            done, wanted = done + float(((row @ a.T) @ d) @ way), wanted + float(way @ way)
    return done / wanted if wanted else 1.0


def _warn(gates: Gates, settings: Settings) -> None:
    if gates.blurred and not settings.strict:
        logger.warning(
            "%d names cannot be told surely from what is kept (%s): their gates may miss them, or open for others. Retain nothing "
            "that means the same, or give `strict=True`.",
            len(gates.blurred),
            ", ".join(map(repr, gates.blurred[:5])),
        )
    for target, share in [each for each in gates.missed.items() if each[1] > 0.25][:5]:
        logger.warning("The gate of %r missed %.0f %% of the prompts that test it.", target, 100 * share)


def _diagnostics(gates: Gates, went: Mapping[str, float], settings: Settings) -> dict[str, Any]:
    split = Split.of(settings.template_list)
    return {
        "completeness": {target: rounded(share) for target, share in went.items()},
        "gates": {
            "names": len(gates.names),
            "contexts": {"fitting": len(split.fitting), "setting": len(split.setting), "testing": len(split.testing)},
            "missed": {target: rounded(share) for target, share in gates.missed.items()},
            "kept_tested": gates.tested,
            "kept_opened": len(gates.opened),
        },
    }


def with_linear_edit(erasure: Erasure, pipe: Any, concepts: Sequence[Concept], settings: Settings) -> Erasure:
    """The erasure with a linear edit's LoRA of the same concepts for stock diffusers, and how far that goes."""
    method: Any = {"dp": dp, "uce": uce}[settings.stock]
    config = method.Config(
        preset=settings.preset,
        retain=settings.retain,
        layer="lora",
        pooled=settings.pooled,
        max_sequence_length=settings.max_sequence_length,
    )
    linear = method.fit(pipe, concepts, config)
    shares = linear.config.diagnostics["completeness"]
    error = max(abs(1 - share) for share in shares.values())
    results = {"completeness": shares, "retained_change": linear.config.diagnostics.get("retained_change", {})}
    return give_stock_lora(erasure, pipe, linear.tensors[LORA_FILE], error=error, results={settings.stock: results})
