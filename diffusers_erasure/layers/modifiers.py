"""Schedules and gates: how strongly a layer acts in one forward pass, by timestep and site, and by the prompt.

Both multiply a layer's strength. A schedule is a table [bins, sites], read at the timestep (DuMo's TLMO is one). A gate
is one number for each row of the batch, see `gate.py`. Only tensor operations, so that one compiled graph serves all
timesteps and prompts.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureInputError
from .buffers import PartKey, live_buffer
from .gate import Gate


PER_THOUSAND = ("FluxTransformer2DModel",)  # denoisers whose timestep is t / 1000


@dataclass(frozen=True)
class Modifier:
    """What modifies one layer of one erasure.

    Attributes:
        key: the erasure's name and the layer's index.
        schedule: factors [bins, sites], or [bins, 1] for all sites; `None` for no schedule.
        span: the timesteps 0 to `span` are divided into the bins.
        gated: whether it has a gate, which lies in [`Conditions`].
    """

    key: PartKey
    schedule: torch.Tensor | None = None
    span: float = 1000.0
    gated: bool = False

    def column(self, site: int) -> torch.Tensor | None:
        """The schedule at one site, [bins]."""
        if self.schedule is None:
            return None
        return self.schedule[:, min(site, self.schedule.shape[1] - 1)]


class Conditions(nn.Module):
    """What a denoiser is called with in the current forward pass, for the layers within it.

    The hook that reads it computes nothing: torch compiles the hooks on a compiled module as graphs of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.timestep: Any = None
        self.scale = 1.0  # from the denoiser's timesteps to those of the training
        self.text: torch.Tensor | None = None
        self.gates = nn.ModuleDict()
        self.keys: dict[PartKey, str] = {}  # names in a `ModuleDict` must have no dots
        self.values: dict[PartKey, torch.Tensor] = {}  # of the gates, once asked for in this pass
        self.count = 0
        self.handle: torch.utils.hooks.RemovableHandle | None = None

    def watch(self, component: nn.Module) -> None:
        """Read the arguments of each forward pass of a denoiser from now on, before other hooks change them."""
        if self.handle is None:
            hook = ReadConditions(self, compat.unwrap_compiled(component))
            self.handle = hook.component.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

    def unwatch(self) -> None:
        """Stop reading, where nothing is left that asks."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def add_gate(self, key: PartKey, gate: Gate) -> None:
        """Evaluate a gate in each pass."""
        self.keys[key] = str(self.count)
        self.gates[str(self.count)] = gate
        self.count += 1

    def drop_gates(self, name: str) -> None:
        """Forget the gates of one erasure."""
        for key in [key for key in self.keys if key[0] == name]:
            gate = self.gates[self.keys.pop(key)]
            assert isinstance(gate, Gate)
            gate.close()
            self.values.pop(key, None)
        kept = set(self.keys.values())
        for number in [number for number in self.gates if number not in kept]:
            del self.gates[number]

    def read(self, timestep: Any, text: Any) -> None:
        """Take over the arguments of a forward pass."""
        self.timestep = timestep
        text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter's (text, image embeddings)
        self.text = text if self.keys and isinstance(text, torch.Tensor) else None
        self.values.clear()

    def now(self, device: torch.device) -> torch.Tensor:
        """The timestep of this pass, [1] or [B], float32.

        Raises:
            ErasureInputError: a part of the denoiser was called by itself.
        """
        if self.timestep is None:
            raise ErasureInputError(
                "An erasure that acts by timestep was called outside of a forward pass of its denoiser."
            )
        value = torch.as_tensor(self.timestep, device=device).detach().reshape(-1).to(torch.float32)
        return value * self.scale if self.scale != 1.0 else value

    def gate(self, key: PartKey) -> torch.Tensor | None:
        """The value of a part's gate in this pass, [B]; `None` where there is no text."""
        if self.text is None:
            return None
        if key not in self.values:
            with torch.no_grad():
                self.values[key] = self.gates[self.keys[key]](self.text)
        return self.values[key]

    def factors(self, keys: Sequence[PartKey | None], device: torch.device) -> torch.Tensor:
        """The gates of several parts in this pass, [1 or B, parts]; 1 for `None`, and where there is no text."""
        known = [None if key is None else self.gate(key) for key in keys]
        batch = max((len(value) for value in known if value is not None), default=1)
        ones = torch.ones(batch, device=device)
        return torch.stack([ones if value is None else value.to(device) for value in known], dim=1)


class ReadConditions:
    """Forward pre-hook of the denoiser. A class and no closure, so that models stay picklable."""

    def __init__(self, conditions: Conditions, component: nn.Module) -> None:
        self.conditions, self.component = conditions, component
        self.names = list(inspect.signature(type(component).forward).parameters)[1:]  # without self
        if "timestep" not in self.names:
            raise ErasureCompatibilityError(
                f"{type(component).__name__} takes no 'timestep', so nothing in it can act by timestep: the erasure was made "
                "for another architecture."
            )
        conditions.scale = 1000.0 if type(component).__name__ in PER_THOUSAND else 1.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = self._argument("encoder_hidden_states", args, kwargs)
        self.conditions.read(self._argument("timestep", args, kwargs), text)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.names:
            return None
        position = self.names.index(name)
        return args[position] if position < len(args) else kwargs.get(name)


class Factors(nn.Module):
    """The factors of all parts on one site in the current pass, from their schedules and gates.

    Args:
        conditions ([`Conditions`]): of the denoiser.
    """

    table: torch.Tensor  # [parts, bins]
    bins: torch.Tensor  # [parts]
    spans: torch.Tensor  # [parts]

    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        self.source = (conditions,)  # a tuple, because a module assigned to a module would become its child
        self.parts: list[tuple[Modifier | None, int]] = []
        self.scheduled = self.gated = False

    def rebuild(self, parts: Sequence[tuple[Modifier | None, int]], device: torch.device) -> None:
        """Take the parts' modifiers (`None` for none), each with the index of this site in its layer."""
        self.parts = list(parts)
        columns = [None if modifier is None else modifier.column(site) for modifier, site in parts]
        self.scheduled = any(column is not None for column in columns)
        self.gated = any(modifier is not None and modifier.gated for modifier, _ in parts)
        if not self.scheduled:
            return
        plain = [torch.ones(1) if column is None else column.float() for column in columns]
        most = max(len(column) for column in plain)
        table = torch.stack([F.pad(column, (0, most - len(column))) for column in plain])
        live_buffer(self, "table", table, device, torch.float32)
        live_buffer(self, "bins", torch.tensor([len(column) for column in plain]), device, torch.int64)
        spans = torch.tensor([1000.0 if modifier is None else modifier.span for modifier, _ in parts])
        live_buffer(self, "spans", spans, device, torch.float32)

    @property
    def acts(self) -> bool:
        """Whether any part is modified."""
        return self.scheduled or self.gated

    def forward(self, device: torch.device) -> torch.Tensor | None:
        """Factors [1 or B, parts], float32; `None` where no part is modified."""
        factors = self.schedule(self.source[0].now(device)) if self.scheduled else None
        if self.gated:
            gates = self.gates(device)
            factors = gates if factors is None else factors * gates
        return factors

    def schedule(self, timestep: torch.Tensor) -> torch.Tensor:
        """The schedules at timesteps [B]: [B, parts]."""
        table = self.table.to(timestep.device)
        index = bins_at(timestep[:, None], self.bins, self.spans)  # [B, parts]
        return table.float().expand(len(timestep), -1, -1).gather(2, index[..., None]).squeeze(2)

    def gates(self, device: torch.device) -> torch.Tensor:
        """The gates' values in this pass, [B, parts]; 1 for parts without one, and where there is no text."""
        keys = [modifier.key if modifier and modifier.gated else None for modifier, _ in self.parts]
        return self.source[0].factors(keys, device)


def bins_at(timestep: torch.Tensor, bins: torch.Tensor | int, span: torch.Tensor | float) -> torch.Tensor:
    """Which bins of schedules act at timesteps: 0 to `span` is divided evenly, and what lies beyond has the outermost.

    Every reader of a schedule asks here, as another order of these float32 operations rounds to another bin.

    Args:
        timestep (`torch.Tensor`): float32.
        bins (`int` or `torch.Tensor`): how many.
        span (`float` or `torch.Tensor`): where the last one ends.
    """
    count = torch.as_tensor(bins, device=timestep.device)
    place = timestep * count / torch.as_tensor(span, device=timestep.device, dtype=torch.float32)
    return place.floor().to(torch.int64).clamp_min(0).minimum(count - 1)


def spread(factors: torch.Tensor, owner: torch.Tensor, ndim: int, dim: int) -> torch.Tensor:
    """Factors [B, parts] as a tensor that multiplies one of `ndim` dimensions whose `dim` runs over ranks.

    Args:
        factors (`torch.Tensor`): [1 or B, parts].
        owner (`torch.Tensor`): the part of each rank, [R].
    """
    shape = [1] * ndim
    shape[0], shape[dim] = len(factors), len(owner)
    return factors[:, owner].reshape(shape)
