"""The one way to put an artefact together: from layers, and what is known of them, to a configuration and tensors by file."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._version import __version__
from .base_model import describe_base
from .errors import ErasureInputError
from .layers import layer_kind
from .layers.layer import Layer
from .schema import (
    LORA_FILE,
    MODIFIER_PREFIX,
    SCHEMA,
    SOLVE_PREFIX,
    TENSOR_FILE,
    BaseModel,
    Concept,
    ErasureConfig,
    LayerSpec,
    Library,
    Method,
    ScheduleSpec,
    SolveRows,
    SolveSpec,
    Stock,
)


Concepts = str | Concept | Sequence[str | Concept]


@dataclass(frozen=True)
class Rows:
    """Text rows that are kept so that others can join the erasure: tensors by name, and the numbers of each set."""

    tensors: Mapping[str, torch.Tensor]
    sets: Mapping[str, SolveRows]


def made_by(name: str, settings: Any, seed: int | None = None, **further: Any) -> Method:
    """What is recorded of a method: its name, its settings and what they were made with.

    Args:
        name (`str`): the method's.
        settings: has `recorded()`: the settings by name, and the names of those that would reveal a concept.
        seed (`int`, *optional*): of what is random.
        further: settings that are recorded besides, or instead.
    """
    recorded, secret = settings.recorded()
    versions = {"torch": torch.__version__.partition("+")[0]}
    return Method(name, {**recorded, **further}, seed, versions, secret)


def bound_to_text(layers: Iterable[Layer], base: BaseModel) -> list[Layer]:
    """Layers that were made with a base model's text rows, and so are refused where another text encoder is."""
    return [dataclasses.replace(layer, derived_from=base.text_components) for layer in layers]


def assemble(
    layers: Sequence[Layer],
    *,
    base: Any,
    concepts: Concepts,
    anchors: str | Sequence[str] | None = None,
    method: Method | str = "custom",
    error: float = 0.0,
    rows: Rows | None = None,
    diagnostics: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> tuple[ErasureConfig, dict[str, dict[str, torch.Tensor]]]:
    """Put an artefact together; the arguments are those of [`Erasure.from_layers`].

    Returns:
        `tuple`: the configuration, and for each file its tensors.
    """
    layers = [_tidy(layer) for layer in layers]
    if not layers:
        raise ErasureInputError("An erasure has at least one layer.")
    made = Method(method) if isinstance(method, str) else method
    specs = _places(layers)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for layer, spec in zip(layers, specs, strict=True):
        own = {spec.prefix + name: value for name, value in layer.tensors.items()}
        tensors.setdefault(spec.file, {}).update({name: plain(value) for name, value in own.items()})
        if spec.schedule is not None and layer.schedule is not None:
            tensors.setdefault(TENSOR_FILE, {})[spec.schedule.name] = plain(layer.schedule)
    if rows is not None:
        kept = {SOLVE_PREFIX + name: value for name, value in rows.tensors.items()}
        tensors.setdefault(TENSOR_FILE, {}).update(kept)
    config = ErasureConfig(
        schema=SCHEMA,
        library=Library("diffusers_erasure", __version__),
        method=dataclasses.replace(made, settings=as_json("settings", made.settings)),
        base_model=base if isinstance(base, BaseModel) else describe_base(base),
        concepts=named_concepts(concepts, anchors),
        layers=tuple(specs),
        stock=Stock(LORA_FILE, rounded(min(error, 0.999))) if all(map(_is_stock, specs)) else None,
        solve=None if rows is None else SolveSpec(TENSOR_FILE, SOLVE_PREFIX, dict(rows.sets)),
        diagnostics=as_json("diagnostics", diagnostics),
        results=as_json("results", results),
    )
    return config, tensors


def _tidy(layer: Layer) -> Layer:
    """A layer with tuples and tensors where lists and arrays were given.

    Raises:
        ErasureInputError: what is given for a tensor is none.
    """
    sites = (layer.sites,) if isinstance(layer.sites, str) else tuple(layer.sites)
    try:
        tensors = {name: torch.as_tensor(value) for name, value in layer.tensors.items()}
        schedule = None if layer.schedule is None else torch.as_tensor(layer.schedule)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ErasureInputError(f"A layer's tensors cannot be read as such: {str(error)[:200]}") from error
    if schedule is not None and schedule.ndim == 1:
        schedule = schedule[:, None]
    origins = tuple(layer.derived_from)
    return dataclasses.replace(layer, sites=sites, tensors=tensors, derived_from=origins, schedule=schedule)


def as_json(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dictionary as it reads back from the configuration.

    Raises:
        ErasureInputError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(dict(value or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ErasureInputError(f"`{name}` must be what JSON can hold: {str(error)[:200]}") from error


def _places(layers: Sequence[Layer]) -> list[LayerSpec]:
    """Where the layers' tensors lie: as their kinds say, with a number in the name where several would lie at one place."""
    kinds = [layer_kind(layer.kind) for layer in layers]
    places = [(kind.file, kind.prefix(each.component, each.sites)) for kind, each in zip(kinds, layers, strict=True)]
    specs = []
    for index, (layer, (file, prefix)) in enumerate(zip(layers, places, strict=True)):
        if places.count((file, prefix)) > 1:
            if file == LORA_FILE:
                raise ErasureInputError(
                    f"Two LoRAs act on {layer.component!r}, but a LoRA file holds one: make an erasure of each, and add them "
                    'with `combine(..., mode="sum")`.'
                )
            prefix = f"{prefix}{index}."
        schedule = None
        if layer.schedule is not None:
            schedule = ScheduleSpec(f"{MODIFIER_PREFIX}{index}.schedule", len(layer.schedule), layer.span)
        origins = layer.derived_from
        specs.append(LayerSpec(layer.kind, layer.component, layer.sites, file, prefix, origins, schedule=schedule))
    return specs


def _is_stock(spec: LayerSpec) -> bool:
    return spec.file == LORA_FILE and not spec.is_modified


def plain(value: torch.Tensor) -> torch.Tensor:
    """A tensor as it is saved: a copy on the CPU, without gradient, contiguous; float64 in float32."""
    dtype = torch.float32 if value.dtype == torch.float64 else value.dtype
    return value.detach().to("cpu", dtype, copy=True).contiguous()


def rounded(value: float) -> float:
    """A number for the configuration: three digits."""
    return float(f"{value:.3g}")


def named_concepts(concepts: Concepts, anchors: str | Sequence[str] | None = None) -> tuple[Concept, ...]:
    """Concepts from names, with one anchor for all or one for each.

    Raises:
        ErasureInputError: there are other numbers of concepts and anchors.
    """
    listed = [concepts] if isinstance(concepts, str | Concept) else list(concepts)
    found = [each if isinstance(each, Concept) else Concept(each) for each in listed]
    if anchors is None:
        return tuple(found)
    mapped = [anchors] * len(found) if isinstance(anchors, str) else list(anchors)
    mapped = mapped * len(found) if len(mapped) == 1 else mapped
    if len(mapped) != len(found):
        raise ErasureInputError(f"There are {len(found)} targets and {len(mapped)} anchors; give one, or one each.")
    return tuple(Concept(each.target, anchor) for each, anchor in zip(found, mapped, strict=True))
