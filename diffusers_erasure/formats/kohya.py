"""kohya-style LoRA files, for other user interfaces: the factors of an erasure under the names that they read."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..artifact import Erasure
from ..errors import ErasureError, ErasureInputError
from ..layers import layer_kind
from ..low_rank import Factors, pad_rank
from ..stock_lora import stock_factors
from ..storage import write_file
from ..tensors import dtype_of, dump
from .kohya_names import NAMES, PREFIX, common_rank, fused_modules


_PREFIXES = {
    "stable-diffusion": {"unet": PREFIX, "text_encoder": "lora_te_"},
    "stable-diffusion-xl": {"unet": PREFIX, "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "flux": {"transformer": PREFIX, "text_encoder": "lora_te1_"},
    "stable-diffusion-3": {"transformer": PREFIX},
}
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# The original code's names of SDXL's pooled door, the only ones that are read.
_ORIGINAL = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}


def to_kohya(erasure: Erasure, *, dtype: torch.dtype | str = torch.float32) -> dict[str, torch.Tensor]:
    """Return an erasure as the tensors of a kohya-style LoRA file.

    All modules have one rank (padded with zeros) and one alpha, equal to it: readers disagree about anything else.

    Of FLUX.1 and Stable Diffusion 3 the names are those of the original code, in which a block's query, key and value are one
    matrix. Of FLUX.1 stock diffusers reads what lies in blocks, and drops `context_embedder`, `x_embedder` and
    `time_text_embed` without a word; of Stable Diffusion 3 it reads nothing. Give it, and ComfyUI, which knows both names, the
    erasure's own LoRA file.

    Args:
        erasure ([`Erasure`]): for Stable Diffusion 1.x, 2.x, XL or 3, or FLUX.1, of `lora` layers alone or with a LoRA for stock
            diffusers besides (see [`with_stock_lora`]), which then is what is written.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): of the factors.

    Returns:
        `dict`: for each module `lora_unet_….lora_down.weight`, `….lora_up.weight` and `….alpha`.

    Raises:
        ErasureInputError: the erasure is of another family, has layers that are no LoRA or modules whose names diffusers
            would not read back, or its values do not fit the dtype.
    """
    dtype = dtype_of(dtype)
    family = erasure.config.base_model.family
    prefixes = _PREFIXES.get(family)
    layers = erasure.config.layers
    parts: dict[str, dict[str, Factors]] = {}
    others = set()
    modified = any(layer.is_modified for layer in layers)
    for layer in layers:
        factors = layer_kind(layer.kind).lora(layer, erasure.layer_tensors(layer))
        if factors is None:
            others.add(layer.kind)
        else:
            parts[layer.component] = factors
    if erasure.lora_for_others():
        parts, others, modified = stock_factors(erasure), set(), False
    if prefixes is None or others or modified:
        why = f"it is for {family}" if prefixes is None else "it has a schedule or a gate"
        why = f"it has layers of the kinds {sorted(others)}" if prefixes and others else why
        raise ErasureInputError(
            f"This erasure has no kohya form: {why}. Only LoRA layers for {sorted(_PREFIXES)} have one; others are loaded "
            "with `load_erasure`."
        )
    strange = sorted(parts.keys() - prefixes.keys())
    if strange:
        raise ErasureInputError(
            f"A kohya file for {family} has no place for {strange[0]!r}, on which this erasure acts."
        )
    if family in NAMES:
        parts = {name: own if name in _TEXT_ENCODERS else fused_modules(own, family) for name, own in parts.items()}
    tensors, expected = {}, {}
    rank = common_rank(parts.values(), joined=family in NAMES)
    for component, factors in parts.items():
        for site, own in factors.items():
            down, up = (pad_rank(factor, rank, dim).to(dtype) for dim, factor in enumerate(own))
            if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
                raise ErasureInputError(f"Some values of {site!r} are too large for {dtype}; use float32.")
            text = component in _TEXT_ENCODERS
            name = f"text_model.{site.removeprefix('text_model.')}" if text else site
            key = prefixes[component] + _ORIGINAL.get(name, name.replace(".", "_"))
            if f"{key}.alpha" in tensors:
                raise ErasureInputError(f"Two modules would have the name {key!r} in a kohya file.")
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
            expected[f"{component}.{name}"] = down
        if component in _TEXT_ENCODERS:
            tensors.update(_marker(factors, prefixes[component], rank, dtype))
    if family not in NAMES:
        _check_names(tensors, expected, family)
    return tensors


def _marker(factors: Mapping[str, Factors], prefix: str, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A LoRA of zeros on one `out_proj`, without which diffusers 0.42 drops the text encoder's `q`, `k` and `v` in silence.

    It tells by the name `to_out_lora` in which of two spellings the text encoder's keys are, and takes the other
    spelling where none is there.
    """
    attention = [site for site in factors if site.endswith((".q_proj", ".k_proj", ".v_proj"))]
    if not attention or any(site.endswith(".out_proj") for site in factors):
        return {}
    width = len(factors[attention[0]][1])
    name = f"text_model.{attention[0].removeprefix('text_model.').rpartition('.')[0]}.out_proj"
    key = prefix + name.replace(".", "_")
    return {
        f"{key}.lora_down.weight": torch.zeros(rank, width, dtype=dtype),
        f"{key}.lora_up.weight": torch.zeros(width, rank, dtype=dtype),
        f"{key}.alpha": torch.tensor(float(rank)),
    }


def save_kohya(erasure: Erasure, file: str | os.PathLike[str], *, dtype: torch.dtype | str = torch.float32) -> Path:
    """Save an erasure as a kohya-style LoRA file.

    Args:
        erasure ([`Erasure`]): see [`to_kohya`].
        file (`str` or `os.PathLike`): a new file, ending in `.safetensors`.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): of the factors.

    Returns:
        `Path`: the file.
    """
    path = Path(file).expanduser()
    if path.suffix != ".safetensors" or path.exists():
        raise ErasureInputError(f"{path} must be a new file whose name ends in .safetensors.")
    data = dump(to_kohya(erasure, dtype=dtype))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    except OSError as error:
        raise ErasureError(f"Saving {path} failed: {error}") from error
    return path


def _check_names(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], family: str) -> None:
    """Underscores for dots lose what a dot was: see that diffusers' own reader finds the modules again."""
    import diffusers

    kind: Any = getattr(
        diffusers, "StableDiffusionXLPipeline" if family.endswith("-xl") else "StableDiffusionPipeline"
    )
    read, _ = kind.lora_state_dict(dict(tensors))
    found = {_plain(key): value for key, value in read.items() if _DOWN.search(key)}
    wrong = sorted(name for name, down in expected.items() if name not in found or not torch.equal(found[name], down))
    if wrong:
        raise ErasureInputError(
            f"diffusers does not read these modules back from a kohya file: {wrong[:3]}. Use the diffusers format."
        )


_DOWN = re.compile(r"(\.lora\.down|\.lora_linear_layer\.down|_lora\.down|\.lora_A)\.weight$")
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _plain(key: str) -> str:
    """The module of a down factor in any of diffusers' own spellings."""
    name = _DOWN.sub("", key).replace(".processor.", ".")
    parent, _, last = name.rpartition(".")
    if key.startswith("text_encoder"):
        return f"{parent}.{_TEXT.get(last, last)}"
    return f"{name}.0" if last == "to_out" else name
