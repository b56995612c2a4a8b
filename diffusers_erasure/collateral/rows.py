"""How far text rows moved, as the denoiser's projections read them: for erasures that act on nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..artifact import Erasure
from ..base_model import family_of, plain_weight, pooled_readers, text_readers
from ..encoding import row_sources
from ..families import ROW_INPUTS
from ..layers.gated_map import numbered
from ..layers.layer import Layer
from ..low_rank import DOWN, UP


MOST_SITES = 24  # projections that are looked at, evenly spaced: as telling as all of them
CONTEXT = "{}"


def row_moves(pipe: Any, erasure: Erasure, words: Sequence[str], context: str = CONTEXT) -> torch.Tensor | None:
    """For each word 1 - cos(W' x, W x), where x is the row of its last word piece: 0 where it stays, 1 at right angles.

    It is the mean over projections W: over the keys' or over the values', whichever is larger; and of the text encoders whose
    rows stand one after another the one whose row turns farthest. How far a row turns orders
    words better by what becomes of their pictures than how far it moves (benchmarks/collateral.py).

    Args:
        pipe ([`DiffusionPipeline`]): the base model, un-erased.
        erasure ([`Erasure`]): LoRAs on what reads the text rows, or maps of these, behind gates or not.
        words (sequence of `str`): the words.
        context (`str`, *optional*): the prompt in which a word stands, at its end.

    Returns:
        `torch.Tensor`: float64 [N]; `None` where the erasure has other layers, or is scheduled or gated.
    """
    readers, pooled = text_readers(pipe), set(pooled_readers(pipe))
    layers = [_read(erasure, spec) for spec in erasure.config.layers]
    if any(spec.is_modified for spec in erasure.config.layers) or not all(
        _of_rows(each, readers, pooled) for each in layers
    ):
        return None
    if family_of(pipe).norm is not None and any(each.kind == "gated_map" for each in layers):
        return None  # these act on the rows in front of the norm
    length = erasure.config.method.settings.get("max_sequence_length", 0)
    texts = [context.format(word) for word in words]
    moves = [_turned(source.last(texts), layers, readers) for source in row_sources(pipe, length=length)]
    return torch.stack(moves).amax(0)


def _turned(rows: torch.Tensor, layers: Sequence[Layer], readers: Mapping[str, nn.Linear]) -> torch.Tensor:
    """How far each row turns [N]."""
    chosen = list(readers)[:: -(-len(readers) // MOST_SITES)] if len(readers) > MOST_SITES else list(readers)
    kinds: dict[str, list[torch.Tensor]] = {}
    for site in chosen:
        weight = plain_weight(readers[site], site)[:, : rows.shape[1]]
        change = sum((_changed(each, site, weight, rows) for each in layers), torch.zeros(()))
        before = rows @ weight.T
        turned = 1 - torch.nn.functional.cosine_similarity(before + change, before, dim=1, eps=1e-300)
        kinds.setdefault(site.rpartition(".")[2], []).append(turned.clamp_min(0))
    return torch.stack([torch.stack(shares).mean(0) for shares in kinds.values()]).amax(0)


def _read(erasure: Erasure, spec: Any) -> Layer:
    return Layer(spec.kind, spec.sites, erasure.layer_tensors(spec), component=spec.component)


def _of_rows(layer: Layer, readers: Mapping[str, nn.Linear], pooled: set[str]) -> bool:
    """Whether a layer acts on text rows alone; the pooled vector goes with them."""
    if layer.kind in ("text_map", "gated_map"):
        return True
    sites = set(layer.sites) - pooled
    return (
        layer.kind == "lora" and layer.component in ("unet", "transformer") and bool(sites) and sites <= set(readers)
    )


def _changed(layer: Layer, site: str, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """W' x - W x of each row [N, o]; zero where the layer does not act there."""
    own = {name: value.double() for name, value in layer.tensors.items()}
    if layer.kind == "text_map":
        return (rows @ own["A"].T) @ own["D"] @ weight.T if ROW_INPUTS & set(layer.sites) else torch.zeros(1)
    if layer.kind == "gated_map":
        return _behind_gates(own, rows) @ weight.T
    if site not in layer.sites:
        return torch.zeros(1)
    return (rows @ own[site + DOWN].T) @ own[site + UP].T


def _behind_gates(own: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """What the maps of a `gated_map` add to each row [N, C], with the gates that this row opens by itself."""
    hit = rows @ own["probes"].T > own["thresholds"].sum(1)
    concepts = len(own["counts"])
    opened = torch.zeros(len(rows), concepts).index_add(1, numbered(own["probe_counts"]), hit.float()) > 0
    return ((rows @ own["A"].T) * opened[:, numbered(own["counts"])]) @ own["D"]
