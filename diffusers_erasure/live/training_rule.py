"""What counts as training through an erasure: gradients that reach a parameter of the pipeline, or the text rows.

A model that diffusers has loaded has parameters that can be trained, in eval mode, so gradients alone do not tell:
guidance by gradients of the latents (Attend-and-Excite) wants them for the noisy sample and trains nothing. It is told
from training by what lies behind the sample.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


MOST_STEPS = 1000  # of a graph behind a sample: guidance has a few, sampling with gradients thousands
_SAMPLES = ("sample", "hidden_states")  # what denoisers call their first argument
# What a ControlNet or an adapter makes of the sample, beside it.
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


def trains(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward pass, with gradients on, trains the module or what its arguments come from.

    Args:
        module (`nn.Module`): the component whose pass it is.
        args (`tuple`): the positional arguments; the noisy sample is the first, or is among `kwargs`.
        kwargs (`dict`): the other arguments, with tensors within lists, tuples and dictionaries.
    """
    others = [*args[1:], *(value for name, value in kwargs.items() if name not in (*_SAMPLES, *_RESIDUALS))]
    if any(tensor.requires_grad for tensor in tensors_in(others)):
        return True  # textual inversion, a text encoder's training
    residuals = tensors_in([kwargs.get(name) for name in _RESIDUALS])
    if any(tensor.requires_grad and not _guides(module, tensor) for tensor in residuals):
        return True  # a ControlNet's
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return False
    sample = args[0] if args else next((kwargs[name] for name in _SAMPLES if name in kwargs), None)
    return module.training or not (isinstance(sample, torch.Tensor) and _guides(module, sample))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an argument, within lists, tuples and dictionaries too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def _guides(module: nn.Module, sample: torch.Tensor) -> bool:
    """Whether gradients are wanted for a sample (or what was made of one) which no parameter has made.

    What cannot be told counts as training: a long graph, a function of somebody's own (reentrant checkpointing hides
    the parameters within), a pass that is being compiled.
    """
    if torch.compiler.is_compiling() or not sample.requires_grad:
        return False
    own = {id(parameter) for parameter in module.parameters()}
    leaves = _leaves_behind(sample)
    return leaves is not None and not any(isinstance(leaf, nn.Parameter) or id(leaf) in own for leaf in leaves)


def _leaves_behind(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """The tensors to which gradients of a tensor lead, itself where it is one.

    `None` where the graph has more than `MOST_STEPS` nodes, or a node of a class that is written in Python
    (`torch.autograd.Function`), which may compute with tensors that are no neighbours of it in the graph.
    """
    if tensor.grad_fn is None:
        return [tensor]
    leaves, seen, ahead = [], {tensor.grad_fn}, [tensor.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if len(seen) > MOST_STEPS or isinstance(node, torch.autograd.function.BackwardCFunction):
            return None
        if hasattr(node, "variable"):  # where gradients are accumulated
            leaves.append(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        ahead += new
    return leaves
