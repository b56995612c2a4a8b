"""Schedules and gates put on an erasure, and taken off: strength by timestep and site, and by the prompt."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .artifact import Erasure
from .base_model import compare_base, denoiser_name
from .encoding import all_rows
from .errors import ErasureCompatibilityError, ErasureInputError
from .layers import layer_kind
from .live.blocks import erasures_disabled
from .logging import get_logger
from .schema import MODIFIER_PREFIX, TENSOR_FILE, GateSpec, LayerSpec, ScheduleSpec
from .stock_lora import give_stock_lora, without_stock_lora


logger = get_logger(__name__)


def with_schedule(
    erasure: Erasure, table: torch.Tensor | Sequence[float], *, layer: int | None = None, span: float = 1000.0
) -> Erasure:
    """Give an erasure's layers on the denoiser a schedule, instead of one that they may have.

    Args:
        erasure ([`Erasure`]): the erasure, which stays as it is.
        table (`torch.Tensor` or sequence of `float`): factors of the strength, [bins] or [bins, 1] for all sites, or
            [bins, sites]. Timestep `t` takes row `floor(t * bins / span)`, so the first row is that of the last steps.
        layer (`int`, *optional*): index of the layer; all layers on the denoiser by default.
        span (`float`, *optional*, defaults to 1000.0): the base model's number of training timesteps.

    Returns:
        [`Erasure`]: it needs this library to be loaded, also where its layers are a LoRA: the LoRA's file has no schedule. A
        LoRA for stock diffusers beside other layers is left out, which is logged.

    Raises:
        ErasureInputError: the table has another shape or is not finite, no layer acts on the denoiser, or one of its kind can
            have no schedule.

    Examples:

    ```py
    >>> late = with_schedule(erasure, [1.0, 1.0, 0.5, 0.0])  # not in the first quarter of the denoising
    ```
    """
    values = torch.as_tensor(table, dtype=torch.float32)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.numel() or not bool(torch.isfinite(values).all()):
        raise ErasureInputError(
            f"A schedule is a finite table of [bins] or [bins, sites], not of the shape {list(values.shape)}."
        )
    chosen = _denoising(erasure, layer)
    for index in chosen:
        spec = erasure.config.layers[index]
        _refuse(index, spec, "schedule", layer_kind(spec.kind).why_no_schedule(spec))
    for index in chosen:
        sites = len(erasure.config.layers[index].sites)
        if values.shape[1] not in (1, sites):
            raise ErasureInputError(f"The schedule has {values.shape[1]} columns; layer {index} has {sites} sites.")
    changes: dict[int, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for index in chosen:
        schedule = ScheduleSpec(f"{MODIFIER_PREFIX}{index}.schedule", len(values), float(span))
        changes[index] = {"schedule": schedule}
        tensors[schedule.name] = values.contiguous()
    return _changed(erasure, changes, tensors)


def with_gate(
    erasure: Erasure,
    pipe: Any,
    prompts: str | Sequence[str] | None = None,
    *,
    factor: float = 1.0,
    layout: str = "row",
    tokens: bool = False,
    by: Erasure | None = None,
) -> Erasure:
    """Give an erasure's layers on the denoiser a gate: they act less on prompts that seem to be about something else.

    With `by` the probes of a gated edit (`erase(..., method="gated")`) decide: a layer acts fully on prompts in which one of them finds a
    name, and not at all on others, which are drawn bit for bit as by the base model. An erasure that has a layer for each concept, as
    ActErase makes them, gets for each layer that concept's probes. Those on a pooled vector (FLUX.1) are not asked.

    A gate weakens an erasure, which its card says: a prompt that draws the concept without naming it may pass. A LoRA for stock
    diffusers beside other layers is left out, which is logged.

    Args:
        erasure ([`Erasure`]): the erasure, which stays as it is.
        pipe ([`DiffusionPipeline`]): the base model, whose text encoder encodes the concepts.
        prompts (`str` or sequence of `str`, *optional*): what the gate opens for; the erasure's concepts by default.
        factor (`float`, *optional*, defaults to 1.0): multiplies the cosine between the prompt's rows and a concept's.
        layout (`"row"` or `"uncond_first"`, *optional*, defaults to `"row"`): each row of the batch by its own text, or
            both guidance branches by the conditional one (as in DuMo), which needs batches that are laid out so.
        tokens (`bool`, *optional*, defaults to `False`): let the factor be at least the share of a concept's tokens that
            the prompt holds. For text that the pipeline's first text encoder was not seen to encode it is 1 then.
        by ([`Erasure`], *optional*): a gated edit of the same concepts and the same base model, with `factor` and `layout` alone.

    Raises:
        ErasureInputError: the concepts are not named and no `prompts` are given, a value is out of range, or a layer's kind
            can have no gate.
        ErasureCompatibilityError: the pipeline's text cannot be encoded.
    """
    names = [prompts] if isinstance(prompts, str) else list(prompts or [])
    if by is not None and (names or tokens):
        raise ErasureInputError("`prompts` and `tokens` belong to a gate without `by`.")
    if by is None:
        names = names or [concept.target for concept in erasure.concepts if concept.target is not None]
        if not names:
            raise ErasureInputError("The erasure does not name its concepts; give `prompts` for the gate.")
    elif not isinstance(by, Erasure):
        raise ErasureInputError(f"`by` takes an `Erasure`, as of `Erasure.from_pretrained`, not {type(by).__name__}.")
    if not isinstance(factor, int | float) or not 0 < factor < float("inf") or layout not in ("row", "uncond_first"):
        raise ErasureInputError(
            f'`factor` must be a finite number above 0 and `layout` "row" or "uncond_first", not {factor!r} and {layout!r}.'
        )
    chosen = _denoising(erasure, None)
    for index in chosen:
        layer = erasure.config.layers[index]
        if layer.component != denoiser_name(pipe):
            raise ErasureInputError("The erasure acts on another denoiser than this pipeline has.")
        _refuse(index, layer, "gate", layer_kind(layer.kind).why_no_gate(layer))
    if by is not None:
        layers = by.config.layers
        compare_base(
            by.config.base_model,
            pipe,
            needed={layer.component for layer in layers},
            derived_from={name for layer in layers for name in layer.derived_from},
        )
        return _behind_probes(erasure, chosen, probes_of(erasure, by), float(factor), layout)
    with erasures_disabled(pipe):
        rows, _ = all_rows(pipe, names)
    ids = None
    if tokens:
        encoded = [pipe.tokenizer(name, add_special_tokens=False).input_ids for name in names]
        ids = tuple(tuple(each) for each in encoded)
    changes: dict[int, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for index in chosen:
        spec = GateSpec(f"{MODIFIER_PREFIX}{index}.gate", float(factor), layout, ids)
        changes[index] = {"gate": spec}
        tensors[spec.name] = rows.to(torch.float16).contiguous()
    return _changed(erasure, changes, tensors)


def probes_of(erasure: Erasure, gated: Erasure) -> list[torch.Tensor]:
    """The probes of a gated edit for each concept of an erasure, [probes, width + 2] each: a probe and its threshold in two halves.

    Raises:
        ErasureInputError: it is no gated edit, or one of other concepts.
    """
    layer = next((each for each in gated.config.layers if each.kind == "gated_map"), None)
    if layer is None:
        raise ErasureInputError(f'`by` takes an erasure by "gated", not one by {gated.config.method.name!r}.')
    tensors = gated.layer_tensors(layer)
    counts = [int(count) for count in tensors["probe_counts"]]
    own = torch.cat([tensors["probes"].float(), tensors["thresholds"].float()], 1).split(counts)
    places = {concept.target: place for place, concept in enumerate(gated.concepts) if concept.target is not None}
    found = [places.get(concept.target or "") for concept in erasure.concepts]
    if None in found:
        missing = erasure.concepts[found.index(None)].target
        raise ErasureInputError(
            "`by` must be a gated edit of all concepts of the erasure, and both must name them; "
            + ("one is redacted." if missing is None else f"it has none for {missing!r}.")
        )
    return [own[place] for place in found if place is not None]


def _behind_probes(
    erasure: Erasure, chosen: Sequence[int], probes: Sequence[torch.Tensor], factor: float, layout: str
) -> Erasure:
    each_its_own = len(chosen) == len(probes) and all(erasure.config.layers[i].kind == "activation" for i in chosen)
    changes: dict[int, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for number, index in enumerate(chosen):
        spec = GateSpec(f"{MODIFIER_PREFIX}{index}.gate", factor, layout, probes=True)
        changes[index] = {"gate": spec}
        tensors[spec.name] = (probes[number] if each_its_own else torch.cat(list(probes))).contiguous()
    return _changed(erasure, changes, tensors)


def without_gate(erasure: Erasure) -> Erasure:
    """Take an erasure's gates off, so that it acts fully on every prompt. See [`with_gate`]."""
    return _changed(erasure, {i: {"gate": None} for i in range(len(erasure.config.layers))}, {})


def without_schedule(erasure: Erasure) -> Erasure:
    """Take an erasure's schedules off, so that it acts fully at every timestep. See [`with_schedule`]."""
    return _changed(erasure, {i: {"schedule": None} for i in range(len(erasure.config.layers))}, {})


def with_stock_lora(
    erasure: Erasure,
    pipe: Any,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    *,
    error: float | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    results: Mapping[str, Any] | None = None,
) -> Erasure:
    """Give an erasure that acts by other layers a LoRA besides, which stock diffusers loads in their place.

    This library goes on acting by the layers; the LoRA lies in the file that `load_lora_weights` reads. A text map's is
    computed from the base model's weights, and is the same edit. Any other erasure can carry a LoRA that comes near it, such
    as one that was trained to do what it does; the card says how near. Also an exact one differs where a LoRA of the
    user's lies on the same modules: a text map T gives (W + U) T there, its LoRA W T + U.

    Args:
        erasure ([`Erasure`]): the erasure, which stays as it is. A LoRA that was given to it before is replaced.
        pipe ([`DiffusionPipeline`]): the base model, with the weights for which the erasure was made.
        state_dict (mapping, *optional*): the LoRA's factors, as for [`Erasure.from_lora`]; computed by default. Its distance
            from the layers' change of the weights is measured, and up to 1e-5 it counts as exact.
        error (`float`, *optional*): how far `state_dict` is from the erasure, relative, where not all of its layers are
            changes of weights, so that you measured it.
        rank (`int`, *optional*), max_error (`float`, *optional*): truncate the LoRA that is computed; 0 for no limit.
        results (mapping, *optional*): what was measured on images with the LoRA.

    Raises:
        ErasureInputError: the layers are a LoRA already; no LoRA does what they do and none is given; or it does not fit.
        ErasureCompatibilityError: the erasure was made for another base model.

    Examples:

    ```py
    >>> erasure = with_stock_lora(erase(pipe, "Van Gogh", layer="text_map"), pipe)
    >>> erasure.config.stock.form
    'exact'
    ```
    """
    layers = erasure.config.layers
    origins = {name for layer in layers for name in layer.derived_from}
    with erasures_disabled(pipe):
        needed = {layer.component for layer in layers}
        match = compare_base(erasure.config.base_model, pipe, needed=needed, derived_from=origins)
        others = sorted(name for name in needed if match.get(name) == "different weights")
        if others:
            raise ErasureCompatibilityError(
                f"The weights of {others} in this pipeline are not those for which the erasure was made (a fine-tune, or fused "
                "LoRAs), so that its LoRA would be another edit. Use the base model itself."
            )
        return give_stock_lora(erasure, pipe, state_dict, error=error, rank=rank, max_error=max_error, results=results)


def _denoising(erasure: Erasure, layer: int | None) -> list[int]:
    layers = erasure.config.layers
    found = [i for i, spec in enumerate(layers) if spec.component in ("unet", "transformer") and layer in (None, i)]
    if not found:
        raise ErasureInputError(
            f"No layer {'on the denoiser' if layer is None else f'{layer} on the denoiser'}, where a schedule or gate could "
            f"act; layers are {[f'{spec.kind} on {spec.component}' for spec in layers]}."
        )
    return found


def _refuse(index: int, spec: LayerSpec, word: str, reason: str | None) -> None:
    if reason is not None:
        raise ErasureInputError(f"Layer {index}, of the kind {spec.kind!r}, can have no {word}: {reason}.")


def _changed(erasure: Erasure, changes: dict[int, dict[str, Any]], added: dict[str, torch.Tensor]) -> Erasure:
    layers: list[LayerSpec] = []
    for index, spec in enumerate(erasure.config.layers):
        layers.append(dataclasses.replace(spec, **changes.get(index, {})))
    if not added and tuple(layers) == erasure.config.layers:
        return erasure
    if erasure.lora_for_others():
        erasure = without_stock_lora(erasure)  # it was that of the layers as they were
        logger.warning(
            "The LoRA for stock diffusers is left out: it was that of the layers as they were. `with_stock_lora` takes another one."
        )
    used = {name for spec in layers for name in spec.modifier_names}
    tensors = {file: dict(items) for file, items in erasure.tensors.items()}
    own = {**tensors.pop(TENSOR_FILE, {}), **added}
    own = {name: value for name, value in own.items() if not name.startswith(MODIFIER_PREFIX) or name in used}
    if own:
        tensors[TENSOR_FILE] = own
    stock = None if used else erasure.config.stock
    config = dataclasses.replace(erasure.config, layers=tuple(layers), stock=stock, files={})
    return Erasure(config, tensors)
