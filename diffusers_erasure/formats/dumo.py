"""Folders that DuMo's authors publish (arXiv 2501.01125), read as erasures.

A folder holds a `config.json`, the network's weights, and for styles and cartoons `time_scale.npy`, the schedule. Only
local files are read. The published repository has no licence, so whether a converted erasure may be passed on is not ours
to say.
"""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..artifact import Erasure
from ..base_model import component
from ..errors import ErasureCompatibilityError, ErasureFileError, ErasureInputError, ErasureNotFoundError
from ..layers import Layer, layer_kind
from ..layers.encoder_copy import PARTS, check_unet
from ..layers.epr import MID, ZERO, skip_sites
from ..modifying import with_gate, with_schedule
from ..schema import MAX_BINS, MAX_CONFIG_BYTES, Method
from .weight_files import read_bytes, read_weights


CONFIG, TABLE = "config.json", "time_scale.npy"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
SKIP, MIDDLE = "dumo_down_blocks.", "dumo_mid_block."
MAX_TABLE_BYTES = 2**20
# What the network computes with and its tensors' shapes do not show.
SETTINGS = (
    "attention_head_dim",
    "norm_num_groups",
    "norm_eps",
    "act_fn",
    "flip_sin_to_cos",
    "freq_shift",
    "downsample_padding",
    "mid_block_scale_factor",
    "down_block_types",
    "upcast_attention",
)


def read_dumo(
    pipe: Any, folder: str | os.PathLike[str], concepts: str | Sequence[str] = (), *, gate: bool | None = None
) -> Erasure:
    """Read a folder that DuMo's authors publish as an erasure with a `skip` layer in the full form.

    Args:
        pipe ([`DiffusionPipeline`]): the base model, Stable Diffusion 1.4 for what is published. Its text encoder encodes
            the concepts for the gate.
        folder (`str` or `os.PathLike`): a local folder.
        concepts (`str` or sequence of `str`, *optional*): what the network removes; the folder does not say it.
        gate (`bool`, *optional*): whether the erasure acts less on prompts about something else. By default where the
            folder has a schedule, as in the authors' scripts.

    Returns:
        [`Erasure`]: its schedule is `time_scale.npy`, its gate of the layout `"uncond_first"`, with tokens.

    Raises:
        ErasureNotFoundError: the folder holds no such network.
        ErasureFileError: a file is cut short, too large, not finite, or holds other tensors.
        ErasureCompatibilityError: the network is for another architecture.
        ErasureInputError: a gate without `concepts`.
    """
    place, unet = Path(folder), component(pipe, "unet")
    check_unet(unet)
    names = [concepts] if isinstance(concepts, str) else list(concepts)
    weights = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    if weights is None or not (place / CONFIG).is_file():
        raise ErasureNotFoundError(f"{place} holds no network of DuMo: it needs {CONFIG} and one of {list(WEIGHTS)}.")
    table = _read_table(place / TABLE) if (place / TABLE).exists() else None
    gated = table is not None if gate is None else gate
    if gated and not names:
        raise ErasureInputError(
            "The published erasure acts by the prompt, for which its concepts are encoded. Name them (`--concept`), or "
            "leave the gate out (`gate=False`, `--no-gate`): then it acts on every prompt."
        )
    _check_config(place / CONFIG, unet.config)
    tensors = _renamed(read_weights(weights), weights.name)
    skips = sum(name.startswith(ZERO) and name.endswith(".weight") for name in tensors) - 1
    if table is not None and table.shape[1] != skips + 1:
        raise ErasureFileError(f"{TABLE} has {table.shape[1]} columns for {skips} skips and the mid block.")
    layer = Layer("skip", skip_sites(skips), tensors)
    method = Method("dumo", settings={"converted": True})
    erasure = Erasure.from_layers([layer], base=pipe, concepts=names, method=method)
    layer_kind("skip").check(unet, erasure.config.layers[0], tensors)
    if table is not None:
        erasure = with_schedule(erasure, table)
    return with_gate(erasure, pipe, names, layout="uncond_first", tokens=True) if gated else erasure


def _check_config(path: Path, own: Any) -> None:
    """See that the network computes as the base's encoder does."""
    try:
        config = json.loads(read_bytes(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ErasureFileError):
            raise
        raise ErasureFileError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise ErasureFileError(f"{path} is no JSON object.")
    for name in SETTINGS:
        if name in config and _each(config[name]) != _each(own.get(name)):
            raise ErasureCompatibilityError(
                f"The network has `{name}` {str(config[name])[:80]}, this UNet {own.get(name)}: it was made for another base "
                "model."
            )


def _each(value: Any) -> Any:
    """A setting that may stand once for all blocks."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values[0] if all(each == values[0] for each in values[1:]) and values else values


def _renamed(found: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The network's tensors by their names in a `skip` layer."""
    tensors: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        if not key.startswith((SKIP, MIDDLE)):
            if key.partition(".")[0] not in PARTS:
                raise ErasureFileError(f"{name}: {key[:120]!r} is no tensor of a network of DuMo.")
            tensors[key] = value.contiguous()
            continue
        place, _, kind = (
            key.removeprefix(SKIP).partition(".") if key.startswith(SKIP) else (MID, "", key[len(MIDDLE) :])
        )
        shaped = kind == "bias" or (kind == "weight" and value.ndim == 4 and value.shape[2:] == (1, 1))
        if not shaped:
            raise ErasureFileError(
                f"{name}: {key[:120]!r} has the shape {tuple(value.shape)}; expected a 1x1 convolution, [C, C, 1, 1] and [C]."
            )
        tensors[f"{ZERO}{place}.{kind}"] = (value if kind == "bias" else value.flatten(1)).contiguous()
    if "conv_in.weight" not in tensors:
        raise ErasureFileError(f"{name} holds no encoder: 'conv_in.weight' is missing.")
    return tensors


def _read_table(path: Path) -> torch.Tensor:
    data = read_bytes(path, MAX_TABLE_BYTES)
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        values = len(shape) == 2 and 0 < shape[0] <= MAX_BINS and 0 < shape[1] <= MAX_BINS and dtype.kind == "f"
        table = np.load(io.BytesIO(data), allow_pickle=False) if values else None
    except Exception as error:  # whatever numpy raises at what somebody else wrote
        raise ErasureFileError(f"{path} is no file of one array: {str(error)[:200]}") from error
    if table is None or not np.isfinite(table).all():
        raise ErasureFileError(f"{path} must hold finite numbers [bins, sites], not {dtype} of the shape {shape}.")
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.float32))
