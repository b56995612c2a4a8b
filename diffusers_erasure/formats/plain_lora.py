"""A plain LoRA file, loaded as an erasure on the caller's word (`load_erasure(..., method="lora")`)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artifact import Erasure
from ..base_model import component, family_of
from ..errors import (
    ErasureCompatibilityError,
    ErasureError,
    ErasureFileError,
    ErasureInputError,
    ErasureNotFoundError,
)
from ..families.recognising import recognised
from ..layers import layer_kind
from ..layers.layer import Layer
from ..layers.lora_keys import lora_layers
from ..low_rank import DOWN
from ..schema import MAX_FILE_BYTES, BaseModel, Method
from ..tensors import MAX_HEADER_BYTES, check_header
from .kohya_names import by_component


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
        ErasureCompatibilityError: it acts on what the pipeline has not, as it was made for another family.
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
        state_dict = by_component(state_dict, family_of(pipe).name)
        layers = lora_layers(state_dict, alphas[0] if alphas else None, metadata)
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
    method, source = Method("lora"), str(Path(src) / (weight_name or ""))
    erasure = Erasure.from_layers(layers, base=BaseModel(family_of(pipe).name), concepts=(), method=method)
    erasure.source = source
    _check_fits(pipe, erasure, layers)
    return erasure


def _check_fits(pipe: Any, erasure: Erasure, layers: Sequence[Layer]) -> None:
    """Say for which family the file was made, as far as its names and widths tell, where it does not fit."""
    for layer, spec in zip(layers, erasure.config.layers, strict=True):
        model, why = component(pipe, layer.component), ""
        if model is None:
            why = f"it acts on {layer.component!r}, which the pipeline has not loaded."
        else:
            try:
                layer_kind(spec.kind).check(model, spec, layer.tensors)
            except ErasureCompatibilityError as error:
                why = str(error)
        if why:
            widths = {site: layer.tensors[site + DOWN].shape[1] for site in layer.sites}
            made_for, own = recognised(layer.component, widths), family_of(pipe)
            title = "another model" if made_for in (None, own) else made_for.title
            raise ErasureCompatibilityError(
                f"The LoRA was made for {title}, and this pipeline is {own.title}: {why} Load it into a pipeline of its own family."
            )


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
