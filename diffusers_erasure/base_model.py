"""Base models: which family a pipeline belongs to, whether it is the one of an erasure, and its weights for a fit."""

import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import compat
from .errors import ErasureCompatibilityError, ErasureInputError
from .families import FAMILIES, ROWS, Family, denoiser_family, reading_family
from .fingerprints import Match, compare_component, describe_model, describe_tokenizer
from .schema import BaseModel


def component(pipe: Any, name: str) -> Any:
    """Return a component of a pipeline, taken out of `torch.compile`; `None` where it is missing or not loaded."""
    value = getattr(pipe, name, None)
    return compat.unwrap_compiled(value) if isinstance(value, nn.Module) else value


def denoiser_name(pipe: Any) -> str:
    """Name of the component that denoises: `"unet"` or `"transformer"`.

    Raises:
        ErasureCompatibilityError: the pipeline has neither, or it is not loaded.
    """
    for name in ("unet", "transformer"):
        if isinstance(component(pipe, name), nn.Module):
            return name
    raise ErasureCompatibilityError(
        f"{type(pipe).__name__} has no `unet` and no `transformer` loaded; load the pipeline's components first."
    )


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline, told by the class of its denoiser.

    Raises:
        ErasureCompatibilityError: no family of this library fits.
    """
    model = component(pipe, denoiser_name(pipe))
    family = denoiser_family(model)
    if family is None:
        raise ErasureCompatibilityError(
            f"{type(model).__name__} belongs to no known family of base models; known are "
            + ", ".join(each.title for each in FAMILIES.values())
            + "."
        )
    return family


def _text_components(pipe: Any, family: Family) -> Iterator[tuple[str, Any]]:
    for name in (*family.text_encoders, *family.tokenizers):
        value = component(pipe, name)
        if value is not None:
            yield name, value


def _repo_and_revision(pipe: Any, denoiser: Any) -> tuple[str | None, str | None]:
    """Repository id and commit, as far as the pipeline remembers them; a local path is no repository."""
    name = compat.name_or_path(pipe)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not os.path.isdir(name)
    repo = name if named else None
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})", compat.name_or_path(denoiser))
    return repo, commit[1] if repo and commit else None


def describe_base(pipe: Any) -> BaseModel:
    """Identify the base model of a pipeline.

    Returns:
        [`BaseModel`]: family, repository and revision where known, and a fingerprint of the denoiser, of each text
        encoder and of each tokenizer that is loaded.
    """
    family = family_of(pipe)
    denoiser = component(pipe, family.denoiser)
    repo, revision = _repo_and_revision(pipe, denoiser)
    components = {family.denoiser: describe_model(denoiser)}
    for name, value in _text_components(pipe, family):
        components[name] = describe_model(value) if isinstance(value, nn.Module) else describe_tokenizer(value)
    return BaseModel(family=family.name, repo=repo, revision=revision, components=components)


def compare_base(base: BaseModel, pipe: Any, *, needed: set[str], derived_from: set[str]) -> dict[str, Match]:
    """Compare a pipeline with the base model of an erasure.

    Args:
        base ([`BaseModel`]): what the erasure recorded.
        pipe: the pipeline.
        needed (`set` of `str`): components on which the erasure acts.
        derived_from (`set` of `str`): components from whose weights the erasure was computed.

    Returns:
        `dict`: for each recorded component `"same"`, `"different weights"` or `"unverified"` (not loaded, or quantised).

    Raises:
        ErasureCompatibilityError: another family, another architecture, a missing component that is acted on, or a
            component with other weights from which the erasure was derived.
    """
    missing = sorted(name for name in needed if not isinstance(component(pipe, name), nn.Module))
    if missing:
        raise ErasureCompatibilityError(
            f"The erasure acts on {missing}, but this pipeline has no such component loaded. Load it, for example with "
            f"`from_pretrained(..., {missing[0]}=...)`."
        )
    if "transformer" in needed:
        refuse_second_transformer(pipe)
    if not base.components:
        return {}
    family = family_of(pipe)
    if base.family != family.name:
        raise ErasureCompatibilityError(
            f"The erasure was made for {base.family} ({base.repo or 'a local model'}), this pipeline is {family.name}."
        )
    result: dict[str, Match] = {}
    for name, stored in base.components.items():
        live = component(pipe, name)
        if live is None:
            result[name] = "unverified"
            continue
        try:
            result[name] = compare_component(name, stored, live)
        except ErasureCompatibilityError:
            if name not in needed | derived_from:
                result[name] = "different weights"
                continue
            raise
        if result[name] == "different weights" and name in derived_from:
            raise ErasureCompatibilityError(
                f"The pipeline's {name} has other weights than the one from which the erasure was derived "
                f"({base.repo or base.family}); its text rows differ, so the concept would not be erased. "
                "Use the original text encoder, or make the erasure again for this base model."
            )
    return result


def refuse_second_transformer(pipe: Any) -> None:
    """See that one transformer makes all steps of a pipeline.

    Raises:
        ErasureCompatibilityError: two take turns, as in Wan 2.2.
    """
    if isinstance(component(pipe, "transformer_2"), nn.Module):
        raise ErasureCompatibilityError(
            f"{type(pipe).__name__} has two transformers that take turns (`transformer_2`), and an erasure acts on the first alone: "
            "the other would read the concept. Nothing was changed."
        )


def refuse_loras(module: nn.Module, what: str) -> None:
    """See that no adapter acts in a part of the base model on which an erasure is fitted.

    Raises:
        ErasureInputError: one does.
    """
    adapters = compat.active_adapters(module)
    if adapters:
        raise ErasureInputError(
            f"The {what} carries active LoRAs ({adapters}), but an erasure is fitted on the clean base model. Call "
            "`pipe.unload_lora_weights()` (or `pipe.disable_lora()`) first."
        )


def plain_weight(module: nn.Linear, name: str) -> torch.Tensor:
    """Return a layer's weight for fitting, in float64 on the CPU.

    Raises:
        ErasureInputError: the weight cannot be read or dequantised, or is not finite.
    """
    return _exact(readable_weight(module, name), name)


def weight_times(module: nn.Linear, name: str, right: torch.Tensor) -> torch.Tensor:
    """Return `plain_weight(module, name) @ right`, block by block so that the float64 copies stay in the CPU's cache.

    Raises:
        ErasureInputError: the weight cannot be read or dequantised, or is not finite.
    """
    blocks = readable_weight(module, name).cpu().split(128)
    return torch.cat([_exact(block, name) @ right for block in blocks])


def _exact(weight: torch.Tensor, name: str) -> torch.Tensor:
    result = weight.to("cpu", torch.float64)
    least, largest = torch.aminmax(result)  # NaN where any value is; faster than `isfinite(result).all()`
    if not bool(torch.isfinite(least) & torch.isfinite(largest)):
        raise ErasureInputError(f"The weight of {name!r} has values that are not finite; the base model is damaged.")
    return result


def readable_weight(module: nn.Linear, name: str) -> torch.Tensor:
    """Return a layer's weight as it is stored, dequantised where it is packed.

    Raises:
        ErasureInputError: the weight cannot be read or dequantised.
    """
    weight: torch.Tensor | None = compat.own_parameter(module, "weight")
    if weight is not None and weight.device.type == "meta":
        stored = compat.offloaded_tensor(module, "weight")
        weight = None if stored is None else nn.Parameter(stored, requires_grad=False)
    if weight is not None and (type(weight) is not nn.Parameter or not weight.dtype.is_floating_point):
        weight = compat.dequantized_weight(module)
    if weight is None or tuple(weight.shape) != (module.out_features, module.in_features):
        raise ErasureInputError(
            f"The weight of {name!r} cannot be read or dequantised; fit on a base model in float32, float16 or bfloat16."
        )
    return weight.detach()


def text_readers(pipe: Any) -> dict[str, nn.Linear]:
    """Return the Linears of a pipeline's denoiser that read the text rows first, by name.

    Raises:
        ErasureCompatibilityError: they are fused, or what reads the rows is no Linear.
    """
    return _readers_of_input(pipe, family_of(pipe).input)


def pooled_readers(pipe: Any) -> dict[str, nn.Linear]:
    """Return the Linear that reads the pooled text vector, by name; none where no pooled vector is read."""
    pooled = family_of(pipe).pooled
    return {} if pooled is None else _readers_of_input(pipe, pooled.input)


def _readers_of_input(pipe: Any, name: str) -> dict[str, nn.Linear]:
    model = component(pipe, denoiser_name(pipe))
    found = input_readers(model, name)
    if not found:
        raise ErasureCompatibilityError(
            f"What reads {name!r} in this {type(model).__name__} is no Linear, so its weight cannot be edited."
        )
    return found


def text_attentions(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the cross-attentions of a UNet, by name; those of motion modules have the name and read no text."""
    for name, module in unet.named_modules():
        if name.endswith(".attn2") and not name.startswith("erasure_modules"):
            if getattr(module, "is_cross_attention", True):
                yield name, module


def readers_of_text(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linears of a UNet that read the text rows: each cross-attention's `to_k` and `to_v`, in model order.

    Raises:
        ErasureCompatibilityError: the denoiser has none, or its attention projections are fused.
    """
    readers: dict[str, nn.Linear] = {}
    for name, module in text_attentions(unet):
        if compat.has_fused_projections(module):
            raise ErasureCompatibilityError(
                f"The attention projections of {name!r} are fused; call `pipe.unfuse_qkv_projections()` first."
            )
        for part in ("to_k", "to_v"):
            linear = compat.base_layer(module.get_submodule(part))
            if isinstance(linear, nn.Linear):
                readers[f"{name}.{part}"] = linear
    if not readers:
        raise ErasureCompatibilityError(f"{type(unet).__name__} has no cross-attention that reads text rows.")
    return readers


def door_readers(model: nn.Module) -> dict[str, dict[str, nn.Linear]]:
    """Return the Linears that text passes first in a denoiser: by the name of what they read, and by their own.

    A map of that input is another weight of these, W (T x) = (W T) x, and a bias stays as it is. Of a UNet they are the keys'
    and values' of [`readers_of_text`], of a transformer its door (see [`~diffusers_erasure.families.Family`]), which behind a norm
    reads `"door_input"`; where there is a pooled vector the Linear that reads it too. What is read by no Linear, as a quantised
    layer of another class is none, is left out.

    Args:
        model (`nn.Module`): the denoiser. What is in no row of the table is read as a UNet is.

    Raises:
        ErasureCompatibilityError: a UNet has no cross-attention, or its projections are fused; or a door is missing.
    """
    inputs = reading_family(compat.unwrap_compiled(model)).inputs
    return {name: readers for name in inputs if (readers := input_readers(model, name))}


def input_readers(model: nn.Module, name: str) -> dict[str, nn.Linear]:
    """Return the Linears that read one input of a denoiser, by name: of [`door_readers`] those of that input; empty for none."""
    model = compat.unwrap_compiled(model)
    family = reading_family(model)
    if family.door is None and name == ROWS:
        return readers_of_text(model)
    doors = {} if family.pooled is None else {family.pooled.input: family.pooled.reader}
    if family.door is not None:
        doors[family.input] = family.door
    found = {} if name not in doors else {doors[name]: door_module(model, doors[name])}
    return {site: module for site, module in found.items() if isinstance(module, nn.Linear)}


def door_module(model: nn.Module, name: str) -> nn.Module:
    """Return a module that the table of doors names, below any peft wrapper.

    Raises:
        ErasureCompatibilityError: this denoiser was built without it.
    """
    here: nn.Module | None = model
    for part in name.split("."):
        here = None if here is None else compat.child(compat.base_layer(here), part)
    if here is None:
        raise ErasureCompatibilityError(
            f"This {type(model).__name__} has no {name!r}, by which text enters others of its class: the erasure was made for "
            "another architecture."
        )
    return compat.base_layer(here)
