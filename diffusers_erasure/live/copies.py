"""Where diffusers builds a model from the weights of a denoiser, the denoiser's erasures come along, or the call says why not.

`AnimateDiffPipeline` and its kin build a `UNetMotionModel`, and ControlNet-XS a `UNetControlNetXSModel`, from the UNet that
they are given, also by `from_pipe`. A ControlNet's encoder, too, is copied from a denoiser, but it draws nothing by itself.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError
from ..layers import layer_kind
from ..layers.sites import find_module
from ..logging import get_logger
from ..originals import digest
from ..schema import LayerSpec
from . import attachment, requests
from .peft_backend import PLACE
from .processor import BACKEND
from .state import ErasureModules, Loaded, state_of


logger = get_logger(__name__)

NAME = "unet"  # as which each of the new denoisers stands in its pipeline
DENOISERS = (("UNetMotionModel", "from_unet2d"), ("UNetControlNetXSModel", "from_unet"))
ENCODERS = (
    ("ControlNetModel", "from_unet"),
    ("ControlNetUnionModel", "from_unet"),
    ("SparseControlNetModel", "from_unet"),
    ("FluxControlNetModel", "from_transformer"),
    ("SD3ControlNetModel", "from_transformer"),
    ("HunyuanDiT2DControlNetModel", "from_transformer"),
    ("QwenImageControlNetModel", "from_transformer"),
)
# By these arguments of theirs they copy no weights.
LOADS = ("load_weights", "load_weights_from_unet", "load_weights_from_transformer")

Build = Callable[[], nn.Module]


def watch_builders() -> None:
    """Put the functions below into the places of diffusers' builders. A second call does nothing."""
    for cls, method, carry in _builders():
        present = vars(cls)[method]
        if not _ours(present):
            setattr(cls, method, classmethod(_wrapped(present.__func__, carry)))


def unwatch_builders() -> None:
    """Put diffusers' builders back."""
    for cls, method, _ in _builders():
        present = vars(cls)[method]
        if _ours(present):
            setattr(cls, method, classmethod(present.__func__.__wrapped__))


def _builders() -> list[tuple[Any, str, Callable[[Build, nn.Module], nn.Module]]]:
    import diffusers

    named = [(*each, carried_over) for each in DENOISERS] + [(*each, without_erasures) for each in ENCODERS]
    classes = [(getattr(diffusers, name, None), method, carry) for name, method, carry in named]
    return [
        each for each in classes if isinstance(each[0], type) and isinstance(vars(each[0]).get(each[1]), classmethod)
    ]


def _ours(present: Any) -> bool:
    return getattr(present.__func__, "_diffusers_erasure", False) is True


def _wrapped(build: Callable[..., nn.Module], carry: Callable[[Build, nn.Module], nn.Module]) -> Callable[..., Any]:
    @functools.wraps(build)
    def method(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
        source = _source(build, cls, *args, **kwargs)
        return build(cls, *args, **kwargs) if source is None else carry(lambda: build(cls, *args, **kwargs), source)

    method._diffusers_erasure = True  # type: ignore[attr-defined]
    return method


def _source(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module | None:
    """The model with erasures whose weights a builder is to copy, if there is one."""
    try:
        given = inspect.signature(build).bind(*args, **kwargs).arguments
    except TypeError:  # the builder says it itself
        return None
    model = given.get("unet", given.get("transformer"))
    loads = all(given.get(name, True) for name in LOADS)
    return model if loads and state_of(model) is not None else None


# --------------------------------------------------------------------------------------------- a new denoiser


def carried_over(build: Build, unet: nn.Module) -> nn.Module:
    """Build a denoiser from the base weights of an erased UNet, and attach the UNet's erasures to it, by hooks.

    Fused erasures that do not fit the new denoiser stay in the weights that it is built from, with a warning.

    Args:
        build (callable): builds it from whatever the UNet's weights are.
        unet (`nn.Module`): the UNet, which is afterwards as it was.

    Returns:
        `nn.Module`: the new denoiser, with the same names, strengths and blocks (`erasures_disabled`) as the UNet.

    Raises:
        ErasureCompatibilityError: an erasure cannot be carried over.
    """
    state = state_of(unet)
    assert state is not None
    if PLACE in state.layers:
        raise ErasureCompatibilityError(
            f'Erasures of {list(state.loaded)} were loaded with `backend="peft"`, and diffusers builds no other denoiser from a '
            "UNet with adapters. Unload them, and load them with the default backend."
        )
    for item in state.loaded.values():
        if any(layer.gate is not None for layer in _layers(item)):
            raise ErasureCompatibilityError(
                f"The erasure {item.name!r} has a gate, one factor for each row of the batch; a denoiser that is built from this "
                "UNet may have other rows (AnimateDiff repeats them by frames). Unload it, or load it without its gate "
                "(`without_gate`)."
            )
    with requests.within(requests.Block(None, [unet], exact={})):
        new = build()
    beside = [item for item in state.loaded.values() if item.name not in state.merged]
    for item in beside:
        try:
            _check(new, item)
        except ErasureCompatibilityError as error:
            raise ErasureCompatibilityError(
                f"The erasure {item.name!r} cannot be carried over to the {type(new).__name__} that is built from this UNet: "
                f"{error} {_advice(unet, item)}"
            ) from error
    contained = (
        [] if _put_originals_back(state, new) else [name for name in state.merged if _layers(state.loaded[name])]
    )
    if contained:
        logger.warning(
            "The erasures %s are fused, and do not fit %s as layers: they are contained in its weights, and not listed there.",
            contained,
            type(new).__name__,
        )
    requests.extend(compat.unwrap_compiled(unet), new)
    _attach(new, [item for item in state.loaded.values() if item.name not in contained])
    return new


def _layers(item: Loaded) -> list[LayerSpec]:
    return [layer for layer in item.erasure.config.layers if layer.component == NAME]


def _check(new: nn.Module, item: Loaded) -> None:
    for layer in _layers(item):
        layer_kind(layer.kind).check(new, layer, item.erasure.layer_tensors(layer))


def _advice(unet: nn.Module, item: Loaded) -> str:
    try:
        for layer in _layers(item):
            layer_kind(layer.kind).weight_changes(unet, layer, item.erasure.layer_tensors(layer))
    except ErasureCompatibilityError:
        fused = False
    else:
        fused = not any(layer.is_modified for layer in _layers(item))
    if fused:
        return (
            f"Call `pipe.fuse_erasures({item.name!r})` first: the new denoiser is built from the erased weights then."
        )
    return f"Call `pipe.unload_erasure({item.name!r})` first, for a denoiser without it."


def _put_originals_back(state: ErasureModules, new: nn.Module) -> bool:
    """Make the weights of a new denoiser the base's, where erasures are fused into those that it was built from.

    Returns:
        `bool`: whether all of them fit the new denoiser, so that they can act there by hooks; otherwise nothing is done.
    """
    places: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name in state.merged:
            _check(new, state.loaded[name])
        for kept in state.fused.values():
            copied = compat.own_parameter(find_module(new, kept.site), kept.name)
            if copied is None or copied.dtype != kept.dtype or digest(copied) != kept.digest:
                return False
            places.append((copied, kept.original))
    except ErasureCompatibilityError:
        return False
    with torch.no_grad():
        for weight, original in places:
            weight.copy_(original)
    return True


def _attach(new: nn.Module, items: list[Loaded]) -> None:
    if not items:
        return
    own = attachment.ensure_state(new)
    for item in items:
        backend = "hook" if item.backend == BACKEND else item.backend  # what processors do, hooks do
        twin = dataclasses.replace(item, backend=backend)
        own.add(twin)
        attachment.attach_layers({NAME: new}, twin)
    own.replan()


# -------------------------------------------------------------------------------------------- another network


def without_erasures(build: Build, model: nn.Module) -> nn.Module:
    """Build a network that draws nothing by itself, such as a ControlNet, from the weights of an erased denoiser as they are.

    Args:
        build (callable): builds it from whatever the denoiser's weights are.
        model (`nn.Module`): the denoiser.
    """
    state = state_of(model)
    assert state is not None
    acting = state.marks.ledger.acting
    with requests.within(requests.Block(None, [model], exact={})):
        new = build()
    if acting:
        logger.warning(
            "This %s was built from the base weights of the %s: the erasures %s act in that denoiser, and not in it.",
            type(new).__name__,
            type(compat.unwrap_compiled(model)).__name__,
            acting,
        )
    return new
