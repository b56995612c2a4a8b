"""A LoRA file for stock diffusers beside layers that are none: the same edit as theirs, or an approximation of it.

Of layers that change weights once they are fused the LoRA is computed, W (T - I) = (W D^T) A for a text map, and is exact. Any
other LoRA is measured against that change where there is one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .artifact import Erasure
from .assembling import as_json, plain, rounded
from .base_model import component
from .errors import ErasureCompatibilityError, ErasureInputError
from .families import FAMILIES, ROWS
from .layers import layer_kind
from .layers.lora_keys import lora_layers
from .low_rank import DOWN, UP, Factors, norm, pad_rank, written
from .schema import LORA_FILE, LayerSpec, Stock
from .settings import Number, Range, Whole


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
    _check_limits(state_dict, error, rank, max_error)
    bare = without_stock_lora(erasure)
    if all(layer.file == LORA_FILE for layer in bare.config.layers):
        raise ErasureInputError("The erasure's layers are a LoRA already, which stock diffusers loads.")
    exact = _changes(bare, pipe)
    if state_dict is not None:
        found = _given(state_dict, pipe)
        measured = _distance(found, exact) if exact is not None else error
        if measured is None:
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
        found, measured = _written(exact, rank or None, max_error or None)
    form = "exact" if exact is not None and measured <= EXACT else "approximate"
    return _with(bare, found, Stock(LORA_FILE, rounded(measured), form, as_json("results", results)))


def _check_limits(state_dict: Any, error: Any, rank: Any, max_error: Any) -> None:
    rules: dict[str, tuple[Any, Range]] = {
        "error": (error, Number()),
        "rank": (rank, Whole(least=0)),
        "max_error": (max_error, Number(below=1)),
    }
    for name, (value, rule) in rules.items():
        if value is not None and not rule.holds(value):
            raise ErasureInputError(f"`{name}` must be {rule.expected}, not {value!r}.")
    if state_dict is None and error is not None:
        raise ErasureInputError("`error` goes with `state_dict`: that of a LoRA that is computed is known.")
    if state_dict is not None and (rank or max_error):
        raise ErasureInputError("`rank` and `max_error` are for a LoRA that is computed; this one is taken as it is.")


def _given(state_dict: Mapping[str, torch.Tensor], pipe: Any) -> dict[str, Factors]:
    """A LoRA's factors by component and module, once they are seen to fit the pipeline."""
    found: dict[str, Factors] = {}
    for layer in lora_layers(state_dict):
        model = component(pipe, layer.component)
        if model is None:
            raise ErasureInputError(f"The LoRA acts on {layer.component!r}, which this pipeline has not.")
        kind = layer_kind(layer.kind)
        spec = LayerSpec(
            layer.kind, layer.component, layer.sites, kind.file, kind.prefix(layer.component, layer.sites)
        )
        kind.check(model, spec, layer.tensors)
        for site in layer.sites:
            factors = layer.tensors[site + DOWN].double(), layer.tensors[site + UP].double()
            found[f"{layer.component}.{site}"] = factors
    return found


def summed_stock_lora(erasure: Erasure, parts: Sequence[Erasure]) -> Erasure:
    """Give a sum of maps the sum of the LoRAs that its parts carry, where each carries one that is the same edit.

    No weight is read: sum B A = W sum D^T A, and where the maps were truncated together what is left of that, W D'^T A', is the
    part of it in the rows of A'.
    """
    maps = {layer.sites[0]: layer for layer in erasure.config.layers if layer.kind == "text_map"}
    exact = [part.config.stock is not None and part.config.stock.is_exact for part in parts if part.lora_for_others()]
    if len(maps) < len(erasure.config.layers) or len(exact) < len(parts) or not all(exact):
        return erasure
    family = FAMILIES.get(erasure.config.base_model.family)
    rows, pooled = (ROWS, None) if family is None else (family.input, family.pooled)
    bases = {site: torch.linalg.qr(erasure.layer_tensors(layer)["A"].double().T).Q for site, layer in maps.items()}
    sums: dict[str, Factors] = {}
    lost: dict[str, float] = {}
    for part in parts:
        for name, factors in (
            (f"{c}.{s}", own) for c, found in stock_factors(part).items() for s, own in found.items()
        ):
            a, b = (factor.double() for factor in factors)
            assert part.config.stock is not None
            lost[name] = lost.get(name, 0.0) + part.config.stock.error * norm(a, b)
            sums[name] = (torch.cat([sums[name][0], a]), torch.cat([sums[name][1], b], 1)) if name in sums else (a, b)
    found, worst = {}, 0.0
    for name, (a, b) in sums.items():
        basis = bases.get(pooled.input if pooled is not None and name.endswith(f".{pooled.reader}") else rows)
        if basis is None:
            return erasure
        basis = F.pad(basis, (0, 0, 0, a.shape[1] - len(basis)))
        b = b @ (a @ basis)
        found[name], error = written(basis.T, b, None, None)
        size = norm(basis.T, b)
        worst = max(worst, error + (lost[name] / size if size else 0.0))
    return _with(erasure, found, Stock(LORA_FILE, rounded(min(worst, 0.999))))


def stock_factors(erasure: Erasure) -> dict[str, dict[str, Factors]]:
    """The factors of the LoRA file by component and module: all that stock diffusers has of the erasure."""
    parts: dict[str, dict[str, Factors]] = {}
    file = erasure.tensors[LORA_FILE]
    for name in sorted(key.removesuffix(DOWN) for key in file if key.endswith(DOWN)):
        component, _, site = name.partition(".")
        parts.setdefault(component, {})[site] = file[name + DOWN], file[name + UP]
    return parts


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


def _changes(erasure: Erasure, pipe: Any) -> dict[str, Factors] | None:
    """The change that the layers outside the LoRA file make, by component and module; `None` where they are more than that."""
    found: dict[str, Factors] = {}
    if any(layer.is_modified for layer in erasure.config.layers):
        return None
    for layer in erasure.config.layers:
        model, tensors, kind = component(pipe, layer.component), erasure.layer_tensors(layer), layer_kind(layer.kind)
        kind.check(model, layer, tensors)
        if layer.file == LORA_FILE:
            continue
        own: Mapping[str, Factors | None] | None = kind.lora(layer, tensors)
        if own is None:
            try:
                own = {change.site: change.factors() for change in kind.weight_changes(model, layer, tensors)}
            except ErasureCompatibilityError:
                return None
        for site, factors in own.items():
            if factors is None:
                return None
            name, (a, b) = f"{layer.component}.{site}", (factor.double().cpu() for factor in factors)
            if name in found:  # several maps of one input add from the unmapped input
                a, b = torch.cat([found[name][0], a]), torch.cat([found[name][1], b], dim=1)
            found[name] = a, b
    return found


def _written(
    exact: Mapping[str, Factors], rank: int | None, max_error: float | None
) -> tuple[dict[str, Factors], float]:
    """The factors as they are written; `(factors, largest relative error over the modules)`."""
    found: dict[str, Factors] = {}
    worst = 0.0
    for name, factors in exact.items():
        found[name], error = written(*factors, rank, max_error)
        worst = max(worst, error)
    return found, worst


def _distance(found: Mapping[str, Factors], exact: Mapping[str, Factors]) -> float:
    """The largest |found - exact| / |exact| over the modules (Frobenius norms).

    Of a module that the erasure leaves alone: |found| / the largest |exact|.
    """
    sizes = {name: norm(*factors) for name, factors in exact.items()}
    largest = max(sizes.values())
    worst = 0.0
    for name in {*found, *exact}:
        added, wanted = found.get(name), exact.get(name)
        parts = [part for part in (added, None if wanted is None else (-wanted[0], wanted[1])) if part is not None]
        off = norm(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1))
        size = sizes.get(name) or largest
        worst = max(worst, off / size if size else 0.0)
    return worst


def _with(erasure: Erasure, factors: Mapping[str, Factors], stock: Stock) -> Erasure:
    """The erasure with factors in its LoRA file, all of one rank."""
    tensors = {file: dict(items) for file, items in erasure.tensors.items()}
    file = tensors.setdefault(LORA_FILE, {})
    own = {layer.component for layer in erasure.config.layers if layer.file == LORA_FILE}
    both = sorted(own & {name.partition(".")[0] for name in factors})
    if both:
        raise ErasureInputError(
            f"On {both[0]!r} the erasure has a LoRA layer of its own, which the LoRA file holds; another LoRA there, for stock "
            "diffusers alone, cannot lie beside it."
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
