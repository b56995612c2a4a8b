"""A plain LoRA file, loaded as an erasure on the caller's word (`load_erasure(..., method="lora")`)."""

import os
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..artifact import Erasure
from ..base_model import family_of
from ..errors import ErasureError, ErasureFileError, ErasureInputError, ErasureNotFoundError
from ..layers.lora import MAX_RANK
from ..low_rank import DOWN, UP, pad_rank
from ..schema import LORA_FILE, MAX_FILE_BYTES, BaseModel, ErasureConfig, LayerSpec, Library, Method
from ..tensors import MAX_HEADER_BYTES, check_header


# Padding all modules to the largest rank may multiply a file's size so much, and is free below the second number.
MAX_PADDING, FREE_PADDING = 16, 2**28
# Other initialisations change the base model's weights, so that such a file alone is not what was trained.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
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
        ErasureNotFoundError: there is no such file.
        ErasureFileError: the file holds keys that are no LoRA factors, is too large, or is not valid.
    """
    if not hasattr(pipe, "lora_state_dict"):
        raise ErasureInputError(f"{type(pipe).__name__} cannot load LoRAs.")
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise ErasureInputError(f"Only safetensors files are read, not {weight_name!r}.")
    _check_local_files(Path(src), hub.get("subfolder"), weight_name)
    try:
        result = pipe.lora_state_dict(
            src, weight_name=weight_name, use_safetensors=True, return_lora_metadata=True, **hub
        )
        state_dict, *alphas, metadata = result
        factors = _factors(state_dict, alphas[0] if alphas else None, metadata)
    except ErasureError:
        raise
    except OSError as error:
        if _is_hub_error(error):
            raise
        raise ErasureNotFoundError(f"There is no LoRA file to read in {src!r}: {str(error)[:300]}") from error
    except Exception as error:  # whatever diffusers' converters raise at what somebody else wrote
        if _is_hub_error(error):
            raise
        raise ErasureFileError(f"The file in {src!r} is no LoRA that diffusers reads: {str(error)[:300]}") from error
    rank = max(down.shape[0] for down, _ in factors.values())
    held = sum(down.numel() + up.numel() for down, up in factors.values())
    padded = sum((down.numel() // down.shape[0] + up.shape[0]) * rank for down, up in factors.values())
    if rank > MAX_RANK or 4 * padded > max(MAX_PADDING * 4 * held, FREE_PADDING):
        raise ErasureFileError(
            f"The LoRA has ranks up to {rank}: more than {MAX_RANK}, or so uneven that padding all modules to one rank "
            f"would make {4 * padded} bytes of {4 * held}."
        )
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


def _check_local_files(src: Path, subfolder: str | None, weight_name: str | None) -> None:
    """Check sizes and headers of local files before diffusers opens them, and for what it would drop silently."""
    if src.is_file():
        files = [src]
    elif src.is_dir():
        folder = src / (subfolder or "")
        files = [folder / weight_name] if weight_name else [*src.glob("*.safetensors"), *folder.glob("*.safetensors")]
    else:
        return
    for path in files:
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ErasureFileError(f"{path} has {path.stat().st_size} bytes; at most {MAX_FILE_BYTES} are read.")
        with open(path, "rb") as handle:
            head = handle.read(8)
            head += handle.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
        # One byte more, as the tensors' data is not read here.
        check_header(head + b"\0", str(path))
        if b"dora_scale" in head:
            raise ErasureFileError(f"{path} holds a DoRA, which is no plain low-rank delta.")


def _is_hub_error(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    return isinstance(error, HfHubHTTPError | LocalEntryNotFoundError)


def _factors(
    state_dict: dict[str, torch.Tensor], alphas: dict[str, Any] | None, metadata: dict[str, Any] | None
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


def _is_pair(down: torch.Tensor, up: torch.Tensor) -> bool:
    matching = down.ndim == up.ndim and down.ndim in (2, 4) and down.shape[0] == up.shape[1]
    return matching and down.numel() > 0 and up.numel() > 0 and down.dtype.is_floating_point


def _alpha(value: Any) -> float:
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if type(number) not in (int, float) or not abs(number) <= 1e6:
        raise ErasureFileError(f"The LoRA's alpha must be a number up to a million, not {str(value)[:80]!r}.")
    return float(number)


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
            raise ErasureFileError(f"The file has an alpha for {key[:120]!r}, but no factors for that module.")
        scales[site] = _alpha(alpha) / plain[site + DOWN].shape[0]
    if not isinstance(metadata, dict | None):
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
            for site in sites:
                if site.startswith(prefix + "."):
                    scales[site] = _alpha(value) / plain[site + DOWN].shape[0]
    return scales
