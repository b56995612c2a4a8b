"""A plain LoRA file, loaded as an erasure on the caller's word (`load_erasure(..., method="lora")`)."""

import os
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .artifact import Erasure
from .base_model import family_of
from .errors import ErasureFileError, ErasureInputError
from .layers.lora import DOWN, UP, pad_rank
from .schema import LORA_FILE, BaseModel, ErasureConfig, LayerSpec, Library, Method


_PREFIXES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")


def read_plain_lora(pipe: Any, src: str | os.PathLike[str], *, weight_name: str | None, **hub: Any) -> Erasure:
    """Read a LoRA in any form that diffusers reads, with the help of the pipeline's own converter.

    Args:
        pipe: the pipeline whose `lora_state_dict` converts the file.
        src (`str` or `os.PathLike`): a folder, a safetensors file, or a repository id.
        weight_name (`str`, *optional*): the file's name.
        hub: the Hub arguments of [`Erasure.from_pretrained`].

    Returns:
        [`Erasure`]: of the method `"lora"`, with no base model recorded and one uniform, zero-padded rank.

    Raises:
        ErasureInputError: the pipeline's class cannot load LoRAs.
        ErasureFileError: the file holds keys that are no LoRA factors.
    """
    if not hasattr(pipe, "lora_state_dict"):
        raise ErasureInputError(f"{type(pipe).__name__} cannot load LoRAs.")
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise ErasureInputError(f"Only safetensors files are read, not {weight_name!r}.")
    result = pipe.lora_state_dict(src, weight_name=weight_name, use_safetensors=True, return_lora_metadata=True, **hub)
    state_dict, *alphas, metadata = result
    factors = _factors(state_dict, alphas[0] if alphas else None, metadata)
    rank = max(down.shape[0] for down, _ in factors.values())
    tensors, layers = {}, []
    for prefix in _PREFIXES:
        sites = sorted(name.removeprefix(prefix) for name in factors if name.startswith(prefix))
        for site in sites:
            down, up = factors[prefix + site]
            tensors[prefix + site + DOWN] = pad_rank(down, rank, 0)
            tensors[prefix + site + UP] = pad_rank(up, rank, 1)
        if sites:
            layers.append(LayerSpec("lora", prefix.rstrip("."), tuple(sites), LORA_FILE, prefix))
    config = ErasureConfig(
        schema="1.0",
        library=Library("diffusers_erasure", __version__),
        method=Method("lora"),
        base_model=BaseModel(family_of(pipe).name),
        concepts=(),
        layers=tuple(layers),
    )
    return Erasure(config, {LORA_FILE: tensors}, source=str(Path(src) / (weight_name or "")))


def _factors(
    state_dict: dict[str, torch.Tensor], alphas: dict[str, Any] | None, metadata: dict[str, Any] | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    from diffusers.utils import convert_unet_state_dict_to_peft

    plain: dict[str, torch.Tensor] = {}
    for prefix in _PREFIXES:
        part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if part and not any("lora_A" in key for key in part):
            part = convert_unet_state_dict_to_peft(part)
        plain.update({prefix + key: value for key, value in part.items()})
    sites = sorted(key.removesuffix(DOWN) for key in plain if key.endswith(DOWN))
    strangers = set(plain) - {site + half for site in sites for half in (DOWN, UP)}
    strangers |= {key for key in state_dict if not key.startswith(_PREFIXES)}
    if strangers or not sites or any(site + UP not in plain for site in sites):
        raise ErasureFileError(
            f"The file is no plain LoRA: {len(sites)} modules found, and keys that are no factors of one: "
            f"{sorted(strangers)[:3]}."
        )
    scales = _scales(sites, plain, alphas, metadata)
    return {site: (plain[site + DOWN].float(), plain[site + UP].float() * scales[site]) for site in sites}


def _scales(
    sites: list[str], plain: dict[str, torch.Tensor], alphas: dict[str, Any] | None, metadata: dict[str, Any] | None
) -> dict[str, float]:
    """alpha / rank of each module, from kohya's alphas or from peft's metadata; 1 where neither tells."""
    scales = dict.fromkeys(sites, 1.0)
    for key, alpha in (alphas or {}).items():
        # network_alphas are named like the down factor or the module, in the spelling of the file's own format
        site = next(
            (site for site in sites if key.replace("_lora", "").replace(".processor", "").startswith(site)), None
        )
        if site is None:
            raise ErasureFileError(f"The file has an alpha for {key!r}, but no factors for that module.")
        scales[site] = float(alpha) / plain[site + DOWN].shape[0]
    for key, value in (metadata or {}).items():
        prefix, _, name = key.rpartition(".")
        if name in ("use_dora", "use_rslora") and value:
            raise ErasureFileError(f"The LoRA uses `{name}`, which is no plain low-rank delta.")
        if name in ("rank_pattern", "alpha_pattern") and value:
            raise ErasureFileError("The LoRA's metadata has patterns of ranks or alphas; save it with one rank.")
        if name == "lora_alpha":
            for site in sites:
                if site.startswith(prefix + "."):
                    scales[site] = float(value) / plain[site + DOWN].shape[0]
    return scales
