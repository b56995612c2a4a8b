"""Fusing erasures into the base model's weights, and undoing it exactly.

The change of each weight is computed in float64 from all erasures that are fused and added once, so that the order of
loading does not matter; the original is kept and put back bit for bit. Nothing acts twice: the hooks of a fused erasure
are taken off. Which weights a layer changes, and how, its kind says (`LayerKind.weight_changes`): first what modules do, W + B A
of a `lora`, and last what they read, (W + B A) T of a `text_map` T, which is what the hooks give.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import compat
from ..artifact import Erasure
from ..errors import ErasureCompatibilityError, ErasureError, ErasureInputError
from ..layers import WeightChange, layer_kind
from ..layers.sites import attention_of, find_module
from ..logging import get_logger
from ..originals import Kept, digest
from . import attachment, requests
from .loaded import components, known, loaded, states
from .state import Loaded


logger = get_logger(__name__)


@dataclass
class _Weight:
    """One module whose parameters are to be changed, by the changes of all layers at their strengths."""

    component: str
    site: str
    module: nn.Module
    changes: list[tuple[float, WeightChange]] = field(default_factory=list)

    @property
    def classes(self) -> list[type[WeightChange]]:
        """The classes of the changes; those of what the module reads come last."""
        return sorted(dict.fromkeys(type(change) for _, change in self.changes), key=lambda each: each.on_input)

    @property
    def names(self) -> list[str]:
        """The module's parameters that change."""
        return list(dict.fromkeys(name for each in self.classes for name in each.parameters))

    def merged(self, originals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters with all changes, computed in float64 and rounded once."""
        first = next(iter(originals.values())).device
        device = first if first.type in ("cpu", "cuda") else torch.device("cpu")
        exact = {name: value.to(device, torch.float64) for name, value in originals.items()}
        for each in self.classes:
            exact |= each.applied(exact, [(s, change) for s, change in self.changes if type(change) is each])
        result = {name: value.to(originals[name].dtype) for name, value in exact.items()}
        odd = next((name for name, value in result.items() if not bool(torch.isfinite(value).all())), None)
        if odd is not None:
            raise ErasureInputError(
                f"The fused {odd} of {self.site!r} has values that {originals[odd].dtype} cannot hold; nothing was changed. "
                "Use the pipeline in another dtype, or leave the erasure unfused."
            )
        return result


# ------------------------------------------------------------------------------------------------- the functions


def fuse_erasures(pipe: Any, names: str | Sequence[str] | None = None) -> int:
    """Fuse loaded erasures into the base model's weights, at their present strengths. They cost no time then.

    They stay listed (`backend="merge"`), and `set_erasures`, `unload_erasure` and `erasures_disabled` work on them as on
    others, though not as fast: the weights are restored and fused again. The original of each changed weight is kept in
    the CPU's memory, in its own dtype: `ErasureInfo.kept_bytes` says how much that is. A copy or a pickle of the
    pipeline holds it too; `save_pretrained` saves the fused weights without it (see [`export_erased`]).

    Fuse and unfuse in the order of a stack: what changes the same weights after this (`fuse_lora`, a cast to another
    dtype) must be undone before `unfuse_erasures`, which otherwise raises.

    Args:
        pipe ([`DiffusionPipeline`] or [`ModularPipeline`]): the pipeline.
        names (`str` or sequence of `str`, *optional*): the erasures; all of them by default.

    Returns:
        `int`: bytes of all the originals that are kept.

    Raises:
        ErasureNotFoundError: a name is not loaded.
        ErasureCompatibilityError: a weight is quantised or offloaded, attention projections are fused, or a layer has no
            form as a change of weights. Nothing is changed then.
        ErasureInputError: the erasures are disabled, none is loaded, one was loaded with `backend="peft"`, or one would
            have to be fused with another.
        ErasureError: erasures were fused before and the weights were changed since.
    """
    with attachment.changing_alone(components(pipe).values(), weights=True):
        return _fuse(pipe, names)


def _fuse(pipe: Any, names: str | Sequence[str] | None) -> int:
    wanted = list(loaded(pipe)) if names is None else [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise ErasureInputError("No erasure is loaded that could be fused.")
    for name in wanted:
        known(pipe, name)
    already = fused_names(pipe)
    together = [name for name in loaded(pipe) if name in wanted or name in already]
    if together != already:
        refuse_while_disabled(pipe)
        plan(pipe, together)
        unfuse_erasures(pipe)
        try:
            merge(pipe, together)
        except BaseException:
            if already:
                merge(pipe, already)
            raise
    count = sum(kept.bytes for state in states(pipe).values() for kept in state.fused.values())
    logger.info("Fused the erasures %s; the original weights that are kept take %.1f MB.", together, count / 1e6)
    return count


def unfuse_erasures(pipe: Any) -> None:
    """Put the original weights back, bit for bit. The erasures stay on, as they were loaded: by hooks.

    Args:
        pipe ([`DiffusionPipeline`] or [`ModularPipeline`]): the pipeline; nothing happens where none is fused.

    Raises:
        ErasureError: a weight is no longer what fusing left. Nothing is changed; the message says what to undo first.
    """
    if not any(state.merged for state in states(pipe).values()):
        return
    with attachment.changing_alone(components(pipe).values(), weights=True):
        _unfuse(pipe)


def _unfuse(pipe: Any) -> None:
    live = components(pipe)
    held = {name: state for name, state in states(pipe).items() if state.merged}
    for name, state in held.items():
        for kept in state.fused.values():
            _check_restorable(live[name], name, kept)
    for name, state in held.items():
        for item in state.loaded.values():  # all of them, for the order of loading is that of the sums
            if item.backend == "hook":
                attachment.detach_layers(live[name], item.name)
                attachment.attach_layers({name: live[name]}, item, live)
        for kept in state.fused.values():
            _write(kept)
        state.fused, state.merged = {}, []
        state.replan(weights_changed=True)
    attachment.reset_compiled(live[name] for name in held)


def refuse_while_disabled(pipe: Any) -> None:
    """Refuse what would act in all threads alike, and so within `erasures_disabled()` too.

    Raises:
        ErasureInputError: the caller, or another thread, is within such a block.
    """
    found = [requests.disabled(compat.unwrap_compiled(each)) for each in components(pipe).values()]
    if any(own for own, _ in found):
        raise ErasureInputError(
            "Erasures cannot be put into the weights within `erasures_disabled()`; they would act there."
        )
    if any(others for _, others in found):
        raise ErasureInputError(
            "Erasures cannot be put into the weights while another thread or task is within `erasures_disabled()` (a fit is): they "
            "would act there. Do it before or after."
        )


def fused_names(pipe: Any) -> list[str]:
    """Names of the erasures that are fused, in the order of loading."""
    merged = {name for state in states(pipe).values() for name in state.merged}
    return [name for name in loaded(pipe) if name in merged]


def kept_bytes(pipe: Any, name: str) -> int:
    """Memory of the originals at the weights that a fused erasure changed; others may have changed them too."""
    if name not in fused_names(pipe):
        return 0
    held = states(pipe)
    modules = {weight.module for weight in _weights(pipe, [loaded(pipe)[name]])}
    return sum(each.bytes for state in held.values() for each in state.fused.values() if each.module in modules)


@contextmanager
def unfused(pipe: Any) -> Iterator[None]:
    """Within the block nothing is fused; what was and is still loaded is fused again at its end.

    Where that cannot be done, the erasures stay on by hooks, with a warning.

    Raises:
        ErasureError: see [`unfuse_erasures`].
    """
    names = fused_names(pipe)
    unfuse_erasures(pipe)
    try:
        yield
    finally:
        names = [name for name in loaded(pipe) if name in names]
        if names:
            try:
                refuse_while_disabled(pipe)
                merge(pipe, names)
            except Exception as error:
                logger.warning("The erasures %s are on, but by hooks: they could not be fused again: %s", names, error)


@contextmanager
def changing(pipe: Any, names: Sequence[str] | None = None) -> Iterator[None]:
    """Within the block strengths of the named erasures (by default all) may be changed, and they may be unloaded.

    Raises:
        ErasureError: the weights of fused ones were changed since, or `fuse_lora` has merged their adapters.
    """
    for state in states(pipe).values():
        reason = next((reason for layer in state.live() if (reason := layer.fixed_reason())), None)
        if reason is not None:
            raise ErasureError(reason)
    if names is None or set(names) & set(fused_names(pipe)):
        with unfused(pipe):
            yield
    else:
        yield


def attach_fused(pipe: Any, name: str) -> None:
    """Fuse an erasure that has just been attached, or take it off again."""
    try:
        fuse_erasures(pipe, name)
    except BaseException:
        attachment.detach(components(pipe).values(), name)
        raise


def check_beside_fused(pipe: Any, erasure: Erasure) -> None:
    """Refuse to load an erasure that would not add to the fused ones as it adds to unfused ones.

    Raises:
        ErasureInputError: what a module reads is changed by a fused one, and the erasure works on the same values or
            changes what reads them.
    """
    items = [loaded(pipe)[name] for name in fused_names(pipe)]
    if _reads_there(pipe, erasure, _places(pipe, (item.erasure for item in items))):
        raise ErasureInputError(
            f"The fused erasures {[item.name for item in items]} change what a module reads; this one works on the same values, "
            "and the two are exact only where both are fused or neither is. Call `pipe.unfuse_erasures()`, load it, and "
            "then `pipe.fuse_erasures()`."
        )


# ------------------------------------------------------------------------------------------------------ planning


def plan(pipe: Any, names: Sequence[str], *, alone: bool = False) -> list[_Weight]:
    """Every weight that the named erasures change; refuses before anything is changed.

    With `alone=True` the other erasures will not act beside them.
    """
    items = [known(pipe, name) for name in names]
    for item in items:
        if item.backend != "hook":
            instead = "where peft fuses (`pipe.fuse_lora()`)" if item.backend == "peft" else "which are not fused"
            raise ErasureInputError(
                f"The erasure {item.name!r} acts by `backend={item.backend!r}`, {instead}. Unload it, and load it with "
                '`backend="merge"`.'
            )
    beside = [item for name, item in loaded(pipe).items() if name not in names]
    places = _places(pipe, (item.erasure for item in items))
    both = [each.name for each in beside if _reads_there(pipe, each.erasure, places)]
    if both and not alone:
        raise ErasureInputError(
            f"{list(names)} change what a module reads on which {both} work too; they are exact only where all are fused or "
            f"none is. Fuse them together: `pipe.fuse_erasures({[*names, *both]})`."
        )
    weights = _weights(pipe, items)
    parameters: dict[int, str] = {}
    for weight in weights:
        for parameter in _plain_parameters(components(pipe)[weight.component], weight).values():
            if id(parameter) in parameters:
                raise ErasureCompatibilityError(
                    f"{weight.site!r} and {parameters[id(parameter)]!r} share one weight, which cannot be fused."
                )
            parameters[id(parameter)] = weight.site
    return weights


def _weights(pipe: Any, items: Sequence[Loaded]) -> list[_Weight]:
    weights: dict[nn.Module, _Weight] = {}
    for item in items:
        for name, change in _changes(pipe, item.erasure):
            weight = weights.setdefault(change.module, _Weight(name, change.site, change.module))
            weight.changes.append((item.strength, change))
    for weight in weights.values():
        if sum(each.on_input for each in weight.classes) > 1:
            raise ErasureCompatibilityError(
                f"Layers of two kinds change what {weight.site!r} reads, so they cannot be fused together. Fuse one of the "
                "erasures and leave the other unfused, or leave both."
            )
    return list(weights.values())


def _changes(pipe: Any, erasure: Erasure) -> list[tuple[str, WeightChange]]:
    """What an erasure changes when it is fused, each change with its component."""
    live, found = components(pipe), []
    for layer in erasure.config.layers:
        if layer.is_modified:
            raise ErasureCompatibilityError(
                f"A layer {layer.kind!r} acts by timestep or by prompt (a schedule or a gate), which no change of weights does, "
                "so it cannot be fused. Leave the erasure unfused."
            )
        kind, tensors = layer_kind(layer.kind), erasure.layer_tensors(layer)
        kind.check(live[layer.component], layer, tensors)
        changes = kind.weight_changes(live[layer.component], layer, tensors)
        found += [(layer.component, change) for change in changes]
    return found


def _places(pipe: Any, erasures: Iterable[Erasure]) -> dict[str, set[Any]]:
    """What is read otherwise once some erasures are fused, by component: see [`WeightChange.places`]."""
    places: dict[str, set[Any]] = {}
    for name, change in (found for erasure in erasures for found in _changes(pipe, erasure)):
        if change.on_input:
            places.setdefault(name, set()).update(change.places)
    return places


def _reads_there(pipe: Any, erasure: Erasure, places: Mapping[str, set[Any]]) -> bool:
    """Whether an erasure reads at any of these places, and so meets what is fused there otherwise than by its hooks."""
    for layer in erasure.config.layers:
        if layer.component in places:
            component, tensors = components(pipe)[layer.component], erasure.layer_tensors(layer)
            reads = layer_kind(layer.kind).reads(component, layer, tensors)
            if reads is None or not places[layer.component].isdisjoint(reads):
                return True
    return False


def _plain_parameters(component: nn.Module, weight: _Weight) -> dict[str, nn.Parameter]:
    return {name: _plain_parameter(component, weight, name) for name in weight.names}


def _plain_parameter(component: nn.Module, weight: _Weight, name: str) -> nn.Parameter:
    parameter = compat.own_parameter(weight.module, name)
    if parameter is None and compat.own_parameter(weight.module, "weight") is not None:
        raise ErasureCompatibilityError(
            f"{weight.site!r} has no {name}, into which a layer is fused; nothing was changed. Leave the erasure unfused."
        )
    if parameter is not None and parameter.device.type == "meta" or compat.is_group_offloaded(component):
        raise ErasureCompatibilityError(
            f"The {name} of {weight.site!r} is offloaded, so an erasure cannot be fused into it; nothing was changed. "
            "Call `pipe.remove_all_hooks()`, or use `enable_model_cpu_offload()`, which keeps whole weights."
        )
    plain = type(parameter) is nn.Parameter and parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1
    if parameter is None or not plain:
        raise ErasureCompatibilityError(
            f"The {name} of {weight.site!r} is quantised or of a class of its own, so an erasure cannot be fused into it; "
            "nothing was changed. Leave the erasure unfused: hooks act on quantised weights too."
        )
    return parameter


# ------------------------------------------------------------------------------------------------------- merging


def merge(pipe: Any, names: Sequence[str], *, alone: bool = False) -> None:
    """Fuse erasures, none of which is fused. After an error nothing is changed."""
    with attachment.changing_alone(components(pipe).values(), weights=True):
        if fused_names(pipe):
            raise ErasureError(f"{fused_names(pipe)} were fused meanwhile, in another thread; nothing was changed.")
        _merge(pipe, names, alone)


def _merge(pipe: Any, names: Sequence[str], alone: bool) -> None:
    live, held = components(pipe), states(pipe)
    done: list[tuple[str, Kept]] = []
    try:
        for weight in plan(pipe, names, alone=alone):
            parameters = _plain_parameters(live[weight.component], weight)
            for name, merged in weight.merged({key: value.detach() for key, value in parameters.items()}).items():
                original = parameters[name].detach().to("cpu", copy=True)
                kept = Kept(weight.site, weight.module, original, merged.dtype, digest(merged), name)
                done.append((weight.component, kept))
                _write(kept, merged)
    except BaseException:
        for _, kept in done:
            _write(kept)
        raise
    for component, kept in done:
        held[component].fused[f"{kept.site.removeprefix('text_model.')}.{kept.name}"] = kept
    for component, state in held.items():
        merged_here = [name for name in names if name in state.loaded]
        state.merged.extend(merged_here)
        for name in merged_here:
            attachment.detach_layers(live[component], name)
        state.replan(weights_changed=True)
        attachment.tidy(live[component])
    attachment.reset_compiled(live.values())


def _write(kept: Kept, value: torch.Tensor | None = None) -> None:
    """Write a value, by default the original, into the parameter of which the original is kept."""
    parameter = compat.own_parameter(kept.module, kept.name)
    assert parameter is not None
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.data.copy_(kept.original if value is None else value)


def _check_restorable(component: nn.Module, name: str, kept: Kept) -> None:
    place = f"{name}.{kept.site}"
    if compat.has_fused_projections(attention_of(component, kept.site)):
        raise ErasureError(
            f"The attention projections around {place!r} were fused after the erasures. Call "
            "`pipe.unfuse_qkv_projections()` first; nothing was changed."
        )
    try:
        found: nn.Module | None = find_module(component, kept.site)
    except ErasureCompatibilityError:
        found = None
    parameter = None if found is None else compat.own_parameter(found, kept.name)
    if found is not kept.module or parameter is None or parameter.device.type == "meta":
        raise ErasureError(
            f"The weight of {place!r} was offloaded, or its module replaced, after erasures were fused into it. Undo that "
            "(`pipe.remove_all_hooks()`), or load the pipeline again; nothing was changed."
        )
    if parameter.dtype != kept.dtype:
        raise ErasureError(
            f"The weight of {place!r} was cast from {kept.dtype} to {parameter.dtype} after erasures were fused into it, "
            "so the original cannot be put back exactly; nothing was changed. Load the pipeline again, and unfuse before "
            "you cast."
        )
    if digest(parameter) != kept.digest:
        raise ErasureError(
            f"The weight of {place!r} is no longer what fusing the erasures left: something changed it since, such as a "
            "LoRA that was fused after them. Undo that first (`pipe.unfuse_lora()`); where that does not bring the very "
            "same bits back, load the pipeline again. Nothing was changed."
        )
