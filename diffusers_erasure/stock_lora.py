"""A LoRA file for stock diffusers beside layers that are none: the same edit as theirs, or an approximation of it.

Of layers that change weights once they are fused the LoRA is computed, W (T - I) = (W D^T) A for a text map, and is exact. Any
other LoRA is measured against that change where there is one: |file's delta - exact delta| / |exact delta|, over all modules
together.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from .artifact import Erasure
from .assembling import plain, rounded
from .base_model import component
from .errors import ErasureCompatibilityError, ErasureInputError
from .layers import layer_kind
from .layers.lora_keys import lora_layers
from .low_rank import DOWN, UP, Factors, balanced, cast_error, norm, pad_rank, product, rank_for
from .schema import LORA_FILE, Stock


EXACT = 1e-5  # relative; what is further from the layers' edit is called an approximation


def give_stock_lora(
    erasure: Erasure,
    pipe: Any,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    *,
    error: float | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    results: Mapping[str, Any] | None = None,
) -> Erasure:
    """See [`with_stock_lora`]; here no erasure may be on."""
    bare = without_stock_lora(erasure)
    layers = [layer for layer in bare.config.layers if layer.file != LORA_FILE]
    if not layers:
        raise ErasureInputError("The erasure's layers are a LoRA already, which stock diffusers loads.")
    exact = _changes(bare, pipe)
    if state_dict is not None:
        found = {
            f"{layer.component}.{site}": (layer.tensors[site + DOWN].double(), layer.tensors[site + UP].double())
            for layer in lora_layers(state_dict)
            for site in layer.sites
        }
        measured = _distance(found, exact) if exact is not None else error
        if measured is None or not 0 <= measured < math.inf:
            raise ErasureInputError(
                "How far this LoRA is from the erasure cannot be computed, as not all its layers are changes of weights: "
                "measure it, and give `error`, a number of at least 0."
            )
    elif exact is None:
        raise ErasureInputError(
            "No LoRA does what this erasure does: not all its layers are changes of weights. Give a LoRA that comes near it, "
            "and its `error`."
        )
    else:
        found, measured = _written(exact, rank, max_error)
    return _with(bare, found, Stock(LORA_FILE, rounded(measured), _form(measured, exact), dict(results or {})))


def without_stock_lora(erasure: Erasure) -> Erasure:
    """Take the LoRA for stock diffusers away, where an erasure acts by other layers. See [`with_stock_lora`]."""
    extra = erasure.lora_for_others()
    if not extra:
        return erasure
    tensors = {file: dict(items) for file, items in erasure.tensors.items()}
    tensors[LORA_FILE] = {name: value for name, value in tensors[LORA_FILE].items() if name not in extra}
    if not tensors[LORA_FILE]:
        del tensors[LORA_FILE]
    config = dataclasses.replace(erasure.config, stock=None, files={})
    return dataclasses.replace(erasure, config=config, tensors=tensors)


def _form(error: float, exact: Any) -> str:
    return "exact" if exact is not None and error <= EXACT else "approximate"


def _changes(erasure: Erasure, pipe: Any) -> dict[str, Factors] | None:
    """The change that the layers outside the LoRA file make, by component and module; `None` where they are more than that."""
    found: dict[str, Factors] = {}
    for layer in erasure.config.layers:
        model, tensors, kind = component(pipe, layer.component), erasure.layer_tensors(layer), layer_kind(layer.kind)
        kind.check(model, layer, tensors)
        if layer.file == LORA_FILE:
            continue
        try:
            changes = [] if layer.is_modified else kind.weight_changes(model, layer, tensors)
        except ErasureCompatibilityError:
            return None
        for change in changes:
            factors, name = change.factors(), f"{layer.component}.{change.site}"
            if factors is None:
                return None
            a, b = (factor.double().cpu() for factor in factors)
            if name in found:  # several maps of one input add from the unmapped input
                a, b = torch.cat([found[name][0], a]), torch.cat([found[name][1], b], dim=1)
            found[name] = a, b
        if layer.is_modified or not changes:
            return None
    return found


def _written(
    exact: Mapping[str, Factors], rank: int | None, max_error: float | None
) -> tuple[dict[str, Factors], float]:
    """The factors in float32, truncated where that is asked for; `(factors, largest relative error over the modules)`."""
    found: dict[str, Factors] = {}
    worst = 0.0
    for name, (a, b) in exact.items():
        error = 0.0
        if rank is not None or max_error is not None:
            u, s, vh = product(b, a)
            kept = rank_for(s, rank, max_error)
            error = float(s[kept:].norm() / s.norm()) if float(s.norm()) else 0.0
            a, b = vh[:kept], u[:, :kept] * s[:kept]
        a, b = balanced(a, b)
        found[name] = a.float(), b.float()
        worst = max(worst, error + cast_error((a, b), found[name], (name + DOWN, name + UP)))
    return found, worst


def _distance(found: Mapping[str, Factors], exact: Mapping[str, Factors]) -> float:
    """|found - exact| / |exact| over all modules together (Frobenius norms)."""
    whole = sum(norm(*factors) ** 2 for factors in exact.values()) ** 0.5
    total = 0.0
    for name in {*found, *exact}:
        parts = [
            *([found[name]] if name in found else []),
            *([(-exact[name][0], exact[name][1])] if name in exact else []),
        ]
        shapes = {(tuple(a.shape[1:]), b.shape[0]) for a, b in parts}
        if len(shapes) > 1:
            raise ErasureInputError(f"The LoRA's factors of {name!r} do not fit that module.")
        total += norm(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)) ** 2
    return total**0.5 / whole if whole else math.inf


def _with(erasure: Erasure, factors: Mapping[str, Factors], stock: Stock) -> Erasure:
    """The erasure with factors in its LoRA file, all of one rank."""
    tensors = {file: dict(items) for file, items in erasure.tensors.items()}
    file = tensors.setdefault(LORA_FILE, {})
    taken = sorted(name for name in factors if name + DOWN in file)
    if taken:
        raise ErasureInputError(
            f"{taken[0]!r} has a LoRA layer of the erasure's own already, and a LoRA file holds one for each module."
        )
    rank = max(
        [len(a) for a, _ in factors.values()] + [len(value) for name, value in file.items() if name.endswith(DOWN)]
    )
    for name, (a, b) in factors.items():
        file[name + DOWN], file[name + UP] = plain(pad_rank(a, rank, 0)), plain(pad_rank(b, rank, 1))
    # Stock readers need one rank for all modules, also those of the erasure's own layers.
    for name, value in file.items():
        dim = 0 if name.endswith(DOWN) else 1
        file[name] = value if value.shape[dim] == rank else pad_rank(value, rank, dim)
    config = dataclasses.replace(erasure.config, stock=stock, files={})
    return dataclasses.replace(erasure, config=config, tensors=tensors)
