"""The names of a LoRA's factors in what others write, read into layers of the kind `lora`."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ErasureFileError
from ..low_rank import DOWN, UP, pad_rank
from ..schema import MAX_FILE_BYTES
from .layer import Layer
from .lora import MAX_RANK


# Padding all modules to the largest rank may multiply a file's size so much, and is free below the second number.
MAX_PADDING, FREE_PADDING = 16, 2**28
# Other initialisations change the base model's weights, so that such a file alone is not what was trained.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
_PREFIXES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")


def lora_layers(
    state_dict: Mapping[str, torch.Tensor],
    alphas: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    derived_from: tuple[str, ...] = (),
) -> list[Layer]:
    """Read a LoRA's state dict as layers, one a component, of one rank: those with less are padded with zeros.

    Args:
        state_dict (mapping): by names as diffusers writes them, the component's first: peft's (`….lora_A.weight`) or older
            ones.
        alphas (mapping, *optional*): diffusers' `network_alphas`.
        metadata (mapping, *optional*): peft's configuration by component, with `lora_alpha`.
        derived_from (tuple of `str`): see [`Layer`].

    Raises:
        ErasureFileError: keys that are no factors of a plain LoRA, ranks that differ too much, or too many bytes.
    """
    factors = _factors(state_dict, alphas, metadata)
    rank = max(down.shape[0] for down, _ in factors.values())
    held = sum(down.numel() + up.numel() for down, up in factors.values())
    padded = sum((down.numel() // down.shape[0] + up.shape[0]) * rank for down, up in factors.values())
    if rank > MAX_RANK or 4 * padded > max(MAX_PADDING * 4 * held, FREE_PADDING):
        raise ErasureFileError(
            f"The LoRA has ranks up to {rank}: more than {MAX_RANK}, or so uneven that padding all modules to one rank "
            f"would make {4 * padded} bytes of {4 * held}."
        )
    layers = []
    for prefix in _PREFIXES:
        sites = tuple(sorted(name.removeprefix(prefix) for name in factors if name.startswith(prefix)))
        tensors: dict[str, torch.Tensor] = {}
        for site in sites:
            down, up = factors[prefix + site]
            tensors[site + DOWN], tensors[site + UP] = pad_rank(down, rank, 0), pad_rank(up, rank, 1)
        if sites:
            layers.append(Layer("lora", sites, tensors, prefix.rstrip("."), derived_from))
    return layers


def _factors(
    state_dict: Mapping[str, torch.Tensor], alphas: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    from diffusers.utils import convert_unet_state_dict_to_peft

    # Checked before anything is computed: until here the file is only mapped into memory.
    if sum(value.numel() * value.element_size() for value in state_dict.values()) > MAX_FILE_BYTES:
        raise ErasureFileError(f"The file holds more than {MAX_FILE_BYTES} bytes.")
    plain: dict[str, torch.Tensor] = {}
    for prefix in _PREFIXES:
        part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if part and not any("lora_A" in key for key in part):
            part = convert_unet_state_dict_to_peft(part)
            if prefix.startswith("text_encoder"):
                part = {_of_text(key): value for key, value in part.items()}
        plain.update({prefix + key: value for key, value in part.items()})
    sites = sorted(key.removesuffix(DOWN) for key in plain if key.endswith(DOWN))
    strangers = set(plain) - {site + half for site in sites for half in (DOWN, UP)}
    strangers |= {key for key in state_dict if not key.startswith(_PREFIXES)}
    if strangers or not sites or any(site + UP not in plain for site in sites):
        raise ErasureFileError(
            f"The file is no plain LoRA: {len(sites)} modules found, and keys that are no factors of one: "
            f"{[key[:120] for key in sorted(strangers)[:3]]}."
        )
    odd = [site for site in sites if not _is_pair(plain[site + DOWN], plain[site + UP])]
    if odd:
        shapes = tuple(plain[odd[0] + DOWN].shape), tuple(plain[odd[0] + UP].shape)
        raise ErasureFileError(f"The factors of {odd[0][:120]!r} have shapes {shapes}, which are none of a LoRA.")
    scales = _scales(sites, plain, alphas, metadata)
    return {site: (plain[site + DOWN].float(), plain[site + UP].float() * scales[site]) for site in sites}


def _of_text(key: str) -> str:
    """A text encoder's projection by its own name; diffusers' older names are those of a UNet's attentions."""
    key = key.replace(".lora_linear_layer.down.", ".lora_A.").replace(".lora_linear_layer.up.", ".lora_B.")
    return re.sub(r"\.to_(q|k|v|out)(?:\.0)?(?=\.)", r".\1_proj", key)


def _is_pair(down: torch.Tensor, up: torch.Tensor) -> bool:
    matching = down.ndim == up.ndim and down.ndim in (2, 4) and down.shape[0] == up.shape[1]
    return matching and down.numel() > 0 and up.numel() > 0 and down.dtype.is_floating_point


def _alpha(value: Any) -> float:
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if type(number) not in (int, float) or not abs(number) <= 1e6:
        raise ErasureFileError(f"The LoRA's alpha must be a number up to a million, not {str(value)[:80]!r}.")
    return float(number)


def _scales(
    sites: list[str],
    plain: Mapping[str, torch.Tensor],
    alphas: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
) -> dict[str, float]:
    """alpha / rank of each module, from kohya's alphas or from peft's metadata; 1 where neither tells."""
    scales = dict.fromkeys(sites, 1.0)
    for key, alpha in (alphas or {}).items():
        # network_alphas are named like the down factor or the module, in the spelling of the file's own format
        named = key.replace("_lora", "").replace(".processor", "").replace(".to_out.down.", ".to_out.0.down.")
        named = _of_text(named) if key.startswith("text_encoder") else named
        site = next((site for site in sites if named.startswith(site)), None)
        if site is None:
            raise ErasureFileError(f"The file has an alpha for {key[:120]!r}, but no factors for that module.")
        scales[site] = _alpha(alpha) / plain[site + DOWN].shape[0]
    if not isinstance(metadata, Mapping | None):
        raise ErasureFileError("The LoRA's metadata is no JSON object.")
    for key, value in (metadata or {}).items():
        prefix, _, name = key.rpartition(".")
        if name in ("use_dora", "use_rslora") and value:
            raise ErasureFileError(f"The LoRA uses `{name}`, which is no plain low-rank delta.")
        if name == "init_lora_weights" and value not in _PLAIN_INITIALISATIONS:
            raise ErasureFileError(
                f"The LoRA was initialised by {str(value)[:80]!r}, which changes the base model's weights; convert it "
                "to a plain LoRA first (peft: `path_initial_model_for_weight_conversion`)."
            )
        if name in ("rank_pattern", "alpha_pattern") and value:
            raise ErasureFileError("The LoRA's metadata has patterns of ranks or alphas; save it with one rank.")
        if name == "lora_alpha":
            own = [site for site in sites if not prefix or site.startswith(prefix + ".")]
            if not own:
                raise ErasureFileError(
                    f"The LoRA's metadata has an alpha for {prefix[:120]!r}, but there are no factors there."
                )
            for site in own:
                scales[site] = _alpha(value) / plain[site + DOWN].shape[0]
    return scales
