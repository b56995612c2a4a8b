"""What an erasure's tensors must be, by its configuration. No pipeline is needed."""

from collections.abc import Mapping

import torch

from ..errors import ErasureConfigError, ErasureFileError
from ..low_rank import DOWN, UP
from ..schema import COMPONENTS, LORA_FILE, MODIFIER_PREFIX, SITE, TENSOR_FILE, ErasureConfig, LayerSpec, SolveSpec
from ..tensors import check_finite
from .registry import layer_kind


Files = Mapping[str, Mapping[str, torch.Tensor]]
ROWS = ("targets", "anchors", "probe_targets", "probe_anchors")


def layer_tensors(layer: LayerSpec, files: Files) -> dict[str, torch.Tensor]:
    """The tensors of one layer, their names without the layer's prefix."""
    return {
        key.removeprefix(layer.prefix): value
        for key, value in files[layer.file].items()
        if key.startswith(layer.prefix) and not key.startswith(MODIFIER_PREFIX)
    }


def modifier_tensors(layer: LayerSpec, files: Files) -> dict[str, torch.Tensor]:
    """The tensors of one layer's schedule and gate, by name.

    Raises:
        ErasureFileError: one is missing.
    """
    items = files[TENSOR_FILE] if layer.is_modified else {}
    missing = [name for name in layer.modifier_names if name not in items]
    if missing:
        raise ErasureFileError(f"{TENSOR_FILE} lacks {missing[0]!r}, a layer's schedule or gate.")
    return {name: items[name] for name in layer.modifier_names}


def solve_tensors(spec: SolveSpec, files: Files) -> dict[str, torch.Tensor]:
    """The rows that are kept for a joint solve, their names without the prefix."""
    items = files[spec.file].items()
    return {key.removeprefix(spec.prefix): value for key, value in items if key.startswith(spec.prefix)}


def check_tensors(config: ErasureConfig, files: Files) -> None:
    """See that there is every tensor that a configuration needs, each as it must be, and no other.

    Raises:
        ErasureFileError: one is missing, strange, not finite, or of a shape that cannot be right.
    """
    expected = config.tensor_files
    if set(files) != expected:
        raise ErasureFileError(f"The tensors lie in {sorted(expected)}, but there is {sorted(files)}.")
    for name in sorted(expected):
        check_finite(files[name], name)
    used: dict[str, set[str]] = {name: set() for name in (*expected, TENSOR_FILE)}
    for layer in config.layers:
        own, kind = layer_tensors(layer, files), layer_kind(layer.kind)
        kind.validate(layer, own)
        check_modified(layer)
        check_modifiers(layer, modifier_tensors(layer, files))
        used[TENSOR_FILE].update(layer.modifier_names)
        integers = [layer.prefix + name for name, value in own.items() if not value.dtype.is_floating_point]
        if integers and not kind.packed:
            raise ErasureFileError(f"{layer.file}: {integers[0][:200]!r} holds no floating-point numbers.")
        used[layer.file] |= {layer.prefix + name for name in own}
    if config.solve is not None:
        rows = solve_tensors(config.solve, files)
        check_solve(config.solve, rows)
        used[config.solve.file] |= {config.solve.prefix + name for name in rows}
    if config.stock is not None and any(layer.file != LORA_FILE for layer in config.layers):
        lora = {name: value for name, value in files[LORA_FILE].items() if name not in used[LORA_FILE]}
        if not lora:
            raise ErasureFileError(
                f"`stock` is set, but {LORA_FILE} holds nothing for the layers that lie outside it."
            )
        check_lora(lora)
        used[LORA_FILE] |= set(lora)
    for name in expected:
        strangers = sorted(set(files[name]) - used[name])
        if strangers:
            raise ErasureFileError(f"{name} holds tensors that no layer uses: {[s[:120] for s in strangers[:3]]}.")


def check_lora(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check what a LoRA file holds for others than this library: pairs `component.site.lora_A.weight` and `…lora_B.weight`.

    Raises:
        ErasureFileError: one is no factor of a LoRA.
    """
    for name, value in tensors.items():
        component, _, site = name.removesuffix(DOWN).removesuffix(UP).partition(".")
        named = component in COMPONENTS and bool(SITE.fullmatch(site))
        pair = [tensors.get(f"{component}.{site}{half}") for half in (DOWN, UP)]
        shapes = [tuple(each.shape) for each in pair if each is not None]
        fit = len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) in (2, 4) and shapes[0][0] == shapes[1][1]
        if not (named and fit and value.dtype.is_floating_point):
            raise ErasureFileError(f"{LORA_FILE}: {name[:120]!r} is no factor of a LoRA that stock diffusers reads.")


def check_modified(layer: LayerSpec) -> None:
    """Check that a layer's kind allows its schedule and gate.

    Raises:
        ErasureConfigError: it does not.
    """
    kind = layer_kind(layer.kind)
    asked = {"schedule": (layer.schedule, kind.why_no_schedule), "gate": (layer.gate, kind.why_no_gate)}
    for word, (spec, why_not) in asked.items():
        reason = None if spec is None else why_not(layer)
        if reason is not None:
            raise ErasureConfigError(f"A layer {layer.kind!r} has a {word}, which it cannot have: {reason}.")


def check_modifiers(layer: LayerSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the tensors of a layer's schedule and gate.

    Raises:
        ErasureFileError: one holds no floating-point numbers, or is of a shape that cannot be right.
    """
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ErasureFileError(f"{TENSOR_FILE}: {name!r} holds no floating-point numbers.")
    if layer.schedule is not None:
        shape, sites = tuple(tensors[layer.schedule.name].shape), len(layer.sites)
        if shape not in ((layer.schedule.bins, sites), (layer.schedule.bins, 1)):
            raise ErasureFileError(
                f"{TENSOR_FILE}: a schedule of {layer.schedule.bins} bins for {sites} sites has the shape {shape}."
            )
    if layer.gate is not None:
        rows, tokens = tensors[layer.gate.name], layer.gate.tokens
        if layer.gate.probes:
            if rows.ndim != 2 or not len(rows) or rows.shape[1] < 3:
                raise ErasureFileError(
                    f"{TENSOR_FILE}: a gate's probes have the shape {tuple(rows.shape)}; expected [probes, width + 2]."
                )
        elif rows.ndim != 3 or (tokens is not None and len(tokens) != len(rows)):
            raise ErasureFileError(
                f"{TENSOR_FILE}: a gate's rows have the shape {tuple(rows.shape)}; expected [concepts, length, width], with "
                "tokens for each concept or for none."
            )


def check_solve(spec: SolveSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check names and shapes of the rows that are kept for a joint solve.

    Raises:
        ErasureFileError: a tensor is missing, unexpected, or of a shape that cannot be right.
    """
    known = {f"{name}.{part}" for name in spec.rows for part in ROWS}
    strangers = sorted(set(tensors) - known)
    if strangers:
        raise ErasureFileError(f"{spec.file} holds unknown rows for a joint solve: {strangers[0][:120]!r}.")
    for name in spec.rows:
        parts = {part: tensors.get(f"{name}.{part}") for part in ROWS}
        shapes = {part: () if value is None else tuple(value.shape) for part, value in parts.items()}
        rows, width = shapes["targets"] if len(shapes["targets"]) == 2 else (0, 0)
        fit = rows > 0 and shapes["anchors"] in ((1, width), (rows, width))
        probes = [shapes["probe_targets"], shapes["probe_anchors"]]
        fit = fit and (
            probes == [(), ()] or (len(probes[0]) == 2 and probes[0] == probes[1] and probes[0][1] == width)
        )
        if not fit:
            raise ErasureFileError(
                f"{spec.file}: the rows {name!r} for a joint solve are missing or do not fit together."
            )
