"""A private twin of a denoiser: the same weights in modules of its own, so that a fit touches nothing that other threads draw with.

Training puts adapters into a UNet, switches them, and asks its weights for no gradients; a calibration watches passes. On a
twin all of that is seen by nobody else, and it costs no memory: parameters and buffers share the original's storage.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import compat
from ..layers.sites import Site
from ..logging import get_logger


logger = get_logger(__name__)

PACKAGE = __name__.partition(".")[0]
ERASURES = "erasure_modules"  # the child that holds what erasures have attached


def private(model: nn.Module) -> Any:
    """The twin of a network, or the network itself where there can be none: see [`twin_of`]."""
    twin = twin_of(model)
    return compat.unwrap_compiled(model) if twin is None else twin


def twin_of(model: nn.Module) -> Any | None:
    """Make a network that computes what another one does without its erasures, with the same weights.

    Adapters, attention processors and the hooks of others act in it as they do now; what is then done to one of the two is
    not done to the other, but for what is written into the weights themselves. It is in eval mode, not compiled, and its
    weights want no gradients. The original is only read.

    Args:
        model (`nn.Module`): the network, compiled or not.

    Returns:
        `nn.Module`, *optional*: of the same class. `None` where there can be no twin: the network is offloaded, so that its
        weights come and go; something has replaced the `forward` of a module, as caches and layerwise casting do, which
        would go on calling the original's; or it holds what cannot be copied.
    """
    model = compat.unwrap_compiled(model)
    if compat.is_offloaded(model) or any(map(_is_replaced, model.modules())):
        logger.debug("No twin of %s: it is offloaded, or a `forward` in it was replaced.", type(model).__name__)
        return None
    state: Any = compat.child(model, ERASURES)
    try:
        twin = _copied(model, state)
    except Exception as error:  # of whatever others have put into the network
        logger.info("The %s cannot be copied, so that it is worked on itself: %s", type(model).__name__, error)
        return None
    if state is not None:
        compat.remove_child(twin, ERASURES)
        _without_adapters(twin, state)
    return twin.eval()


def _copied(model: nn.Module, state: nn.Module | None) -> Any:
    """A deep copy that shares all tensors; of what erasures have attached only an empty child is left."""
    of_erasures = set() if state is None else set(state.modules())
    memo: dict[int, Any] = {id(part): nn.Module() for part in of_erasures}
    parts = {part for part in model.modules() if part not in of_erasures}
    numbers = set(_numbers(of_erasures))
    for part in parts:
        _share(part, memo)
    for part in parts:
        for table in compat.hook_tables(part):
            memo[id(table)] = type(table)(
                # A hook may hold anything, and stays the same; a method of one of the modules becomes one of its copy.
                (number, copy.deepcopy(hook, memo) if _is_method_of(parts, hook) else hook)
                for number, hook in list(table.items())
                if number not in numbers and not _ours(getattr(hook, "hook", hook))
            )
    for part in parts:
        inner = compat.unwrap_compiled(part)
        if inner is not part:
            memo[id(part)] = copy.deepcopy(inner, memo)
    own = [name for name, value in vars(model).items() if _ours(value)]  # guards of `save_pretrained` and the like
    memo.update({id(vars(model)[name]): None for name in own})
    twin = copy.deepcopy(model, memo)
    for name in own:
        del vars(twin)[name]
    return twin


def _share(part: nn.Module, memo: dict[int, Any]) -> None:
    """Let a copy of a module have the same values in the same memory."""
    for parameter in part.parameters(recurse=False):
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        else:  # a packed one: its class need not survive being made anew, and it is never trained
            memo[id(parameter)] = parameter
            memo.update({id(value): value for value in vars(parameter).values()})
    for value in (*part.buffers(recurse=False), *vars(part).values()):
        if isinstance(value, torch.Tensor):
            memo[id(value)] = value


def _without_adapters(twin: Any, state: Any) -> None:
    """Take from a twin the erasures that are adapters or attention processors of the original."""
    for item in state.loaded.values():
        if item.backend == "peft":
            compat.delete_adapter(twin, item.name)
    for part in list(twin.modules()):
        processor: Any = compat.child(part, "processor")
        if processor is not None and _ours(processor):
            part.set_processor(processor.found[0])


def _is_replaced(part: nn.Module) -> bool:
    """Whether something else than its class's `forward` computes a module; `torch.compile`'s wrapper has one of its own."""
    return "forward" in vars(part) and compat.unwrap_compiled(part) is part


def _is_method_of(parts: set[nn.Module], hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, nn.Module) and owner in parts


def _ours(value: Any) -> bool:
    """Whether a hook, or a value that lies in a module, is an object of this library or a method of one."""
    return type(getattr(value, "__self__", value)).__module__.partition(".")[0] == PACKAGE


def _numbers(of_erasures: set[nn.Module]) -> Iterator[int]:
    """The numbers of the hooks of which the live layers hold handles: layer kinds from outside have hooks of any class."""

    def held(value: Any) -> Iterator[int]:
        if isinstance(value, RemovableHandle):
            yield value.id
        elif isinstance(value, dict | list | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                yield from held(each)
        elif isinstance(value, Site):
            yield value.handle.id

    for part in of_erasures:
        for value in list(vars(part).values()):
            yield from held(value)
