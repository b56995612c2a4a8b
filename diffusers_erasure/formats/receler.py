"""Folders that Receler's code writes (arXiv 2311.17717), read as erasures.

A folder holds `eraser_weights.pt`, tensors by attention, and `eraser_config.json`. Only local files are read.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..artifact import Erasure
from ..base_model import component
from ..errors import ErasureCompatibilityError, ErasureFileError, ErasureNotFoundError
from ..layers import Layer, adapter, layer_kind
from ..schema import MAX_CONFIG_BYTES, Method
from .weight_files import read_bytes, read_weights


CONFIG, WEIGHTS = "eraser_config.json", "eraser_weights.pt"
BLOCK = (
    ".transformer_blocks.0.attn2"  # which their names leave out: an attention of Stable Diffusion 1.x has one block
)


def read_receler(pipe: Any, folder: str | os.PathLike[str], concepts: str | Sequence[str] = ()) -> Erasure:
    """Read a folder that Receler's code wrote as an erasure with an `adapter` layer.

    Args:
        pipe ([`DiffusionPipeline`]): the base model, Stable Diffusion 1.x for what is published.
        folder (`str` or `os.PathLike`): a local folder.
        concepts (`str` or sequence of `str`, *optional*): what the erasers remove; the folder does not say it.

    Returns:
        [`Erasure`].

    Raises:
        ErasureNotFoundError: the folder holds no erasers.
        ErasureFileError: a file is cut short, too large, not finite, or holds other tensors.
        ErasureCompatibilityError: the erasers are of another kind, or for another architecture.
    """
    place, unet = Path(folder), component(pipe, "unet")
    if not (place / WEIGHTS).is_file():
        raise ErasureNotFoundError(f"{place} holds no erasers of Receler: it needs {WEIGHTS}.")
    rank = _rank(place / CONFIG) if (place / CONFIG).is_file() else None
    tensors: dict[str, torch.Tensor] = {}
    for name, value in read_weights(place / WEIGHTS).items():
        part = next((part for part in adapter.PARTS if name.endswith(part)), None)
        if part is None:
            raise ErasureFileError(f"{WEIGHTS}: {name[:120]!r} is no tensor of an eraser; expected {adapter.PARTS}.")
        tensors[name.removesuffix(part) + BLOCK + part] = value.float().contiguous()
    sites = tuple(dict.fromkeys(name.removesuffix(adapter.DOWN) for name in tensors if name.endswith(adapter.DOWN)))
    missing = [site for site in adapter.attentions("unet", unet) if site not in sites]
    if missing:
        raise ErasureCompatibilityError(
            f"The erasers are for {len(sites)} attentions, but this UNet has others too, such as {missing[0]!r}: they were made for another "
            "architecture."
        )
    ranks = {len(tensors[site + adapter.DOWN]) for site in sites}
    if rank is not None and ranks != {rank}:
        raise ErasureFileError(f"{CONFIG} has a rank of {rank}, but the tensors of {sorted(ranks)}.")
    names = [concepts] if isinstance(concepts, str) else list(concepts)
    method = Method("receler", settings={"converted": True})
    erasure = Erasure.from_layers([Layer("adapter", sites, tensors)], base=pipe, concepts=names, method=method)
    layer_kind("adapter").check(unet, erasure.config.layers[0], tensors)
    return erasure


def _rank(path: Path) -> int | None:
    """The rank that a folder states.

    Raises:
        ErasureFileError: the file is no JSON object.
        ErasureCompatibilityError: its erasers are of another kind.
    """
    data = read_bytes(path, MAX_CONFIG_BYTES)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ErasureFileError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise ErasureFileError(f"{path} is no JSON object.")
    kind, rank = config.get("eraser_type", "adapter"), config.get("eraser_rank")
    if kind != "adapter":
        raise ErasureCompatibilityError(
            f"The folder holds erasers of the kind {str(kind)[:80]!r}; only 'adapter' is read."
        )
    return rank if isinstance(rank, int) else None
