"""Observing a model while a method runs it: nothing is changed, and the hooks are gone when the block ends."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import compat


See = Callable[[str, torch.Tensor], None]


class _Observe:
    def __init__(self, name: str, see: See) -> None:
        self.name, self.see, self.thread = name, see, threading.get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self.thread:
            self.see(self.name, (args[0] if args else kwargs["input"]).detach())


@contextmanager
def inputs_seen(component: nn.Module, modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Within the block `see(name, input)` is called whenever one of the modules is, by the thread that entered it.

    A feed-forward that is chunked calls its modules several times in a pass, with a part of the input each time.

    Args:
        component (`nn.Module`): the model that has the modules; compiled graphs of it are forgotten, as they know no new hooks.
        modules (`dict`): the modules by name, below what peft wraps around them.
        see: takes a name and an input, which it must not change or keep.
    """
    compiled = compat.is_compiled(component)
    if compiled:
        compat.reset_compiled()
    handles = [
        module.register_forward_pre_hook(_Observe(name, see), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if compiled:
            compat.reset_compiled()


class Moments:
    """Running sums over the tokens that a module reads, by timestep: of the values, and of the squares of normalised rows.

    Sums are float64 on the CPU; a row is a token's C values, and normalised it has the norm 1.

    Args:
        times (`int`): number of timesteps T.
        widths (`dict`): units C of each module's input, by name.
    """

    def __init__(self, times: int, widths: Mapping[str, int]) -> None:
        self.values = {name: torch.zeros(times, width, dtype=torch.float64) for name, width in widths.items()}
        self.squares = {name: torch.zeros(times, width, dtype=torch.float64) for name, width in widths.items()}
        self.counts = {name: torch.zeros(times, dtype=torch.float64) for name in widths}

    def add(self, name: str, time: int, hidden_states: torch.Tensor) -> None:
        """Count in hidden states [..., C] at the timestep number `time`."""
        rows = hidden_states.flatten(0, -2).float()
        double = torch.float32 if rows.device.type == "mps" else torch.float64
        self.values[name][time] += rows.sum(0, dtype=double).cpu()
        shares = rows.square() / rows.square().sum(1, keepdim=True).clamp_min(1e-30)
        self.squares[name][time] += shares.sum(0, dtype=double).cpu()
        self.counts[name][time] += len(rows)

    def pooled(self) -> "Moments":
        """The sums over all timesteps, as if they were one."""
        result = Moments(1, {})
        result.values = {name: value.sum(0, keepdim=True) for name, value in self.values.items()}
        result.squares = {name: value.sum(0, keepdim=True) for name, value in self.squares.items()}
        result.counts = {name: value.sum(0, keepdim=True) for name, value in self.counts.items()}
        return result

    def mean(self, name: str) -> torch.Tensor:
        """The mean of each unit, [T, C]."""
        return self.values[name] / self.counts[name][:, None].clamp_min(1)

    def root_mean_square(self, name: str) -> torch.Tensor:
        """The root of the mean square of each unit of the normalised rows, [T, C]."""
        return (self.squares[name] / self.counts[name][:, None].clamp_min(1)).sqrt()

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All sums, for a checkpoint; `restore` takes them back."""
        kinds = {"values": self.values, "squares": self.squares, "counts": self.counts}
        return {f"{prefix}{kind}.{name}": value for kind, items in kinds.items() for name, value in items.items()}

    def restore(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what [`tensors`] gave."""
        for kind, items in (("values", self.values), ("squares", self.squares), ("counts", self.counts)):
            for name in items:
                items[name] = tensors[f"{prefix}{kind}.{name}"].clone()
