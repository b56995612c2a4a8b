"""Schedules and gates: how strongly a layer acts in one forward pass, by timestep and site, and by the prompt.

Both multiply a layer's strength, and with it make one factor for each row of the batch. A schedule is a table [bins, sites],
read at the timestep (DuMo's TLMO is one). A gate is one number for each row, see `gate.py`. Only tensor operations, so that one
compiled graph serves all strengths, timesteps and prompts. Each module of a graph computes its own factors; outside of graphs
those of a layer are computed once a pass, for all of its sites.
"""

import inspect
import itertools
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..families import denoiser_family
from . import graphs
from .buffers import PartKey, live_buffer
from .gate import Gate
from .passing import Here, Pass


MOST_SCALES = 16  # sets of strengths that are held ready at one place
_numbers = itertools.count()  # by which graphs know components


@dataclass(frozen=True)
class Modifier:
    """What modifies one layer of one erasure.

    Attributes:
        key: the erasure's name and the layer's index.
        schedule: factors [bins, sites], or [bins, 1] for all sites; `None` for no schedule.
        span: the timesteps 0 to `span` are divided into the bins.
        gate: its gate, `None` for none.
        placed: the schedule, and its numbers of bins and span, on the devices where it was read.
    """

    key: PartKey
    schedule: torch.Tensor | None = None
    span: float = 1000.0
    gate: Gate | None = field(default=None, compare=False)
    placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        """A copy may be read where there are no such devices."""
        return {**vars(self), "placed": {}}

    def column(self, site: int) -> torch.Tensor | None:
        """The schedule at one site, [bins]."""
        if self.schedule is None:
            return None
        return self.schedule[:, self.place(site)]

    def place(self, site: int) -> int:
        """The schedule's column for a site."""
        return 0 if self.schedule is None else min(site, self.schedule.shape[1] - 1)

    def factors(self, now: Pass, column: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Strength, schedule and gate in a pass, once for all sites: [1 or B, columns of the schedule]. Not in graphs.

        Args:
            column (`int`): of the erasure among the strengths.
        """

        def compute() -> torch.Tensor:
            parts = [] if now.ones else [now.strengths.to(device)[:, column : column + 1]]
            if self.schedule is not None:
                parts.append(self._scheduled(now, device))
            value = None if self.gate is None else now.gate(self.key, self.gate)
            if value is not None:
                parts.append(value.to(device)[:, None])
            product = parts[0] if parts else torch.ones(1, 1, device=device)
            for part in parts[1:]:
                product = product * part
            return product.to(dtype)

        return now.once((self.key, column, device, dtype), compute)

    def _scheduled(self, now: Pass, device: torch.device) -> torch.Tensor:
        """The schedule at the pass's timestep, [1 or B, columns]. The bin is that of all schedules of as many."""
        assert self.schedule is not None
        placed = self.placed.get(device)
        if placed is None:
            with torch.inference_mode(False), torch.no_grad():
                bins, span = torch.tensor([len(self.schedule)]), torch.tensor([self.span], dtype=torch.float32)
                placed = self.schedule.float().to(device), bins.to(device), span.to(device)
            if not compat.is_capturing():  # what is made then belongs to the graph
                self.placed[device] = placed
        table, bins, span = placed
        timestep, key = now.now(device), ("bin", len(self.schedule), self.span, device)
        return table.index_select(0, now.once(key, lambda: bins_at(timestep, bins, span)))


class Conditions(nn.Module):
    """The passes of one component, for the layers within it.

    Args:
        beside (callable, *optional*): gives the pass for a module that is called outside of any pass of the component; without
            it nothing acts there, as in a copy of a part of the component.

    Attributes:
        here: the calling thread's pass.
        traced: the pass within a larger graph that a user compiles, while it is traced: what such a graph runs it is told then.
        asked: gives it the strengths, see [`graphs.strengths`].
        returning: the passes through which gradients may still come; they live as long as what autograd holds for them.
    """

    defaults: torch.Tensor  # [erasures that are loaded], their strengths; what is set is written into it in place

    def __init__(self, beside: Callable[[], Pass] | None = None) -> None:
        super().__init__()
        self.beside = beside
        self.asked: Callable[[int, torch.device, bool, str, bool], torch.Tensor] | None = None
        self.here = Here()
        self.returning: weakref.WeakSet[Pass] = weakref.WeakSet()
        live_buffer(self, "defaults", torch.zeros(0), torch.device("cpu"), torch.float32)
        self.traced = _empty(self.defaults[None])
        self.tracing = False
        self.number = next(_numbers)
        graphs.make_known(self.number, self)
        self.clock = (1.0, 0.0)  # from the denoiser's timesteps to those of the training
        self.named = "timestep", "encoder_hidden_states"  # the arguments that hold timestep and text
        self.joined = False  # as [`Family`] has it
        self.gates = nn.ModuleDict()  # as children, so that they move with the model
        self.names: dict[PartKey, str] = {}  # there they must have no dots
        self.count = 0
        self.arguments: list[str] | None = None  # of the denoiser, once something asks for the timestep or the text

    def __getstate__(self) -> dict[str, Any]:
        own = {"traced": _empty(self.defaults[None]), "tracing": False, "beside": None, "asked": None}
        return {**super().__getstate__(), **own, "returning": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.returning = weakref.WeakSet()
        self.number = next(_numbers)
        graphs.make_known(self.number, self)

    def forward(self) -> torch.Tensor:
        """The strengths of what is loaded. What has tensors may be given hooks, and these want a function."""
        return self.defaults

    @property
    def now(self) -> Pass:
        """The pass that is under way."""
        here = self.here
        if here.now is not None:
            return here.now
        if torch.compiler.is_compiling():
            if here.back is not None:
                return here.back
            if self.tracing or self.asked is None:
                return self.traced
            return _empty(graphs.strengths(self.defaults, self.number, 1, False, "", False))
        return self.traced if self.beside is None else self.beside()

    def watch(self, component: nn.Module) -> None:
        """Read timestep and text of each pass from now on.

        Raises:
            ErasureCompatibilityError: the component has no timestep.
        """
        component = compat.unwrap_compiled(component)
        arguments = list(inspect.signature(type(component).forward).parameters)[1:]  # without self
        family = denoiser_family(component)
        if family is not None:
            self.clock = family.clock_of(getattr(component, "config", {}))
            self.named = family.timestep, family.argument
        if self.named[0] not in arguments:
            raise ErasureCompatibilityError(
                f"{type(component).__name__} takes no 'timestep', so nothing in it can act by timestep: the erasure was made "
                "for another architecture."
            )
        self.arguments = arguments

    def unwatch(self) -> None:
        """Read them no more, where nothing is left that asks."""
        self.arguments = None

    def add_gate(self, key: PartKey, gate: Gate) -> None:
        """Take in the gate of one layer, in the place of an earlier one."""
        self._drop_gate(key)
        self.names[key] = str(self.count)
        compat.add_child(self.gates, str(self.count), gate)
        self.count += 1

    def keep_gates(self, names: Collection[str]) -> None:
        """Forget the gates of other erasures than these."""
        for key in [key for key in self.names if key[0] not in names]:
            self._drop_gate(key)

    def _drop_gate(self, key: PartKey) -> None:
        number = self.names.pop(key, None)
        if number is not None:
            gate = self.gates[number]
            assert isinstance(gate, Gate)
            gate.close()
            compat.remove_child(self.gates, number)

    def read(self, now: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give a pass what the denoiser is called with."""
        now.joined = self.joined
        if self.arguments is not None:
            timestep, text = (self._argument(name, args, kwargs) for name in self.named)
            now.read(timestep, self.clock, text)

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str | None, trains: bool) -> None:
        """A pass within a larger graph begins.

        Args:
            args, kwargs: of the component.
            reason (`str`, *optional*): why an erasure would not act in it.
            trains (`bool`): it would train weights.
        """
        rows, _ = rows_of(args, kwargs)
        self.traced.whole = graphs.strengths(self.defaults, self.number, rows, True, reason or "", trains)
        self.read(self.traced, args, kwargs)
        self.tracing = True

    def end_trace(self) -> None:
        """It is over; nothing of the graph is held."""
        self.tracing = False
        self.traced.whole = self.traced.strengths
        self.traced.read(None, (1.0, 0.0), None)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.arguments is not None
        if name not in self.arguments:
            return None
        position = self.arguments.index(name)
        return args[position] if position < len(args) else kwargs.get(name)


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, torch.device]:
    """How many rows a pass has that is called with some arguments, and where they are."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, torch.Tensor) and each.ndim:
            return len(each), each.device
    return 1, torch.device("cpu")


def _empty(whole: torch.Tensor) -> Pass:
    """A pass of which a graph knows the strengths alone, [rows, loaded]."""
    return Pass((), {}, whole, None, whole)


class Factors(nn.Module):
    """The factors of all parts on one site in a pass: strength, schedule and gate.

    Args:
        parts (sequence): of each part its modifier (`None` for none), the site's index in its layer, and the column of its
            erasure among the strengths.
        device (`torch.device`): where the tables are kept.
    """

    columns: torch.Tensor  # [parts]
    table: torch.Tensor  # [parts, bins]
    bins: torch.Tensor  # [parts]
    spans: torch.Tensor  # [parts]

    def __init__(self, parts: Sequence[tuple[Modifier | None, int, int]], device: torch.device) -> None:
        super().__init__()
        self.parts = [
            (modifier, 0 if modifier is None else modifier.place(site), column) for modifier, site, column in parts
        ]
        self.key = tuple((None if each is None else each.key, place, column) for each, place, column in self.parts)
        modifiers = [modifier for modifier, _, _ in parts]
        own = [column for _, _, column in parts]
        self.width = len(own)
        self.first = own == list(range(len(own)))  # then the first strengths are those of the parts
        if not self.first:
            live_buffer(self, "columns", torch.tensor(own), device, torch.int64)
        columns = [None if modifier is None else modifier.column(site) for modifier, site, _ in parts]
        self.scheduled = any(column is not None for column in columns)
        self.gates = [
            (each.key, each.gate) if each is not None and each.gate is not None else None for each in modifiers
        ]
        self.gated = any(gate is not None for gate in self.gates)
        if not self.scheduled:
            return
        plain = [torch.ones(1) if column is None else column.float() for column in columns]
        most = max(len(column) for column in plain)
        table = torch.stack([F.pad(column, (0, most - len(column))) for column in plain])
        live_buffer(self, "table", table, device, torch.float32)
        live_buffer(self, "bins", torch.tensor([len(column) for column in plain]), device, torch.int64)
        spans = torch.tensor([1000.0 if modifier is None else modifier.span for modifier in modifiers])
        live_buffer(self, "spans", spans, device, torch.float32)

    @property
    def modified(self) -> bool:
        """Whether any part has a schedule or a gate."""
        return self.scheduled or self.gated

    def forward(
        self, now: Pass, device: torch.device, rows: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor | None:
        """Factors for a tensor of so many rows, [1 or rows, parts]; `None` where all of them are 1.

        Raises:
            ErasureInputError: they differ by row, and the tensor has other rows than the pass.
        """
        factors = self.product(now, device, dtype)
        return None if factors is None else self.for_rows(factors, now, rows)

    def product(self, now: Pass, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Factors for the rows of the pass, [1 or B, parts]; `None` where all of them are 1, which a graph never knows."""
        if torch.compiler.is_compiling():
            return self._within_graph(now, device).to(dtype)
        if now.ones and not self.modified:
            return None
        if len(self.parts) == 1 and (modifier := self.parts[0][0]) is not None:
            _, place, column = self.parts[0]
            return modifier.factors(now, column, device, dtype)[:, place : place + 1]
        return now.once((self.key, device, dtype), lambda: self._side_by_side(now, device, dtype))

    def _side_by_side(self, now: Pass, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if not self.modified:
            return self._strengths(now.strengths, device).to(dtype)
        strengths = now.strengths.to(device, dtype)
        own = [
            strengths[:, column : column + 1]
            if modifier is None
            else modifier.factors(now, column, device, dtype)[:, place : place + 1]
            for modifier, place, column in self.parts
        ]
        rows = max(map(len, own))
        return torch.cat([each.expand(rows, -1) for each in own], dim=1)

    def _within_graph(self, now: Pass, device: torch.device) -> torch.Tensor:
        factors = self._strengths(now.whole, device)
        if self.scheduled:
            factors = factors * self.schedule(now.now(device))
        return factors * self.gate_values(now, device) if self.gated else factors

    def _strengths(self, strengths: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Of all strengths of a pass those of the parts, [1 or B, parts]."""
        strengths = strengths.to(device)
        return strengths[:, : self.width] if self.first else strengths[:, self.columns.to(device)]

    def schedule(self, timestep: torch.Tensor) -> torch.Tensor:
        """The schedules at timesteps [B]: [B, parts]."""
        table = self.table.to(timestep.device)
        index = bins_at(timestep[:, None], self.bins, self.spans)  # [B, parts]
        return table.float().expand(len(timestep), -1, -1).gather(2, index[..., None]).squeeze(2)

    def gate_values(self, now: Pass, device: torch.device) -> torch.Tensor:
        """The gates' values, [1 or B, parts]; 1 for parts without one, and where there is no text."""
        known = [None if each is None else now.gate(*each) for each in self.gates]
        sizes = [len(value) for value in known if value is not None]
        batch = max(sizes) if sizes else 1  # torch.compile knows no `default`
        ones = torch.ones(batch, device=device)
        return torch.stack([ones if value is None else value.to(device) for value in known], dim=1)

    def for_rows(self, factors: torch.Tensor, now: Pass, rows: int) -> torch.Tensor:
        """What depends on factors, [1 or B, ...], for a tensor of so many rows.

        Raises:
            ErasureInputError: it differs by row, and the tensor has other rows than the pass.
        """
        if len(factors) == 1 or len(factors) == rows:
            return factors
        if now.joined:
            return self._alike(factors, now)
        if rows % len(factors) == 0:  # several rows for each picture, such as the frames of a video
            return factors.repeat_interleave(rows // len(factors), 0)
        one_time = now.timestep is None or torch.as_tensor(now.timestep).numel() == 1
        if now.uniform and one_time and not self.gated:
            return factors[:1]  # one for all
        raise ErasureInputError(
            f"An erasure acts by the strength, timestep or prompt of each of {len(factors)} rows, but a module got {rows}: it is "
            "chunked along the batch. Chunk along the tokens: `unet.enable_forward_chunking(chunk_size, dim=1)`."
        )

    def _alike(self, factors: torch.Tensor, now: Pass) -> torch.Tensor:
        """What depends on factors, where it is the same for all pictures: [1, ...]."""
        same = now.uniform and not self.modified
        if same or (not torch.compiler.is_compiling() and bool((factors == factors[:1]).all())):
            return factors[:1]
        raise ErasureInputError(
            f"An erasure acts by the strength, timestep or prompt of each of {len(factors)} pictures, but a module of this denoiser reads "
            "the rows of all of them one after another. Give all pictures of a batch one strength, or make one picture a call; "
            "with `torch.compile` an erasure with a schedule makes one picture a pass."
        )


class RankScales(nn.Module):
    """Strengths as factors of what low-rank factors `down` give: made once for each set of strengths, which is used often.

    Args:
        owner (sequence of `int`): the column of each rank among a pass's strengths.
        device (`torch.device`): where it is kept.
    """

    owner: torch.Tensor  # [R]

    def __init__(self, owner: Sequence[int], device: torch.device) -> None:
        super().__init__()
        live_buffer(self, "owner", torch.tensor(owner), device, torch.int64)
        self.known: dict[Any, torch.Tensor] = {}

    def forward(self, now: Pass, reduced: torch.Tensor) -> torch.Tensor:
        """Factors for a tensor [B, ..., R], [1 or B, ..., R], of its dtype. Not in graphs."""
        key = now.strengths, reduced.device, reduced.dtype, reduced.ndim
        found = self.known.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = now.strengths.index_select(1, self.owner.to(now.strengths.device))
                found = found.to(reduced.device, reduced.dtype).reshape(len(found), *(1,) * (reduced.ndim - 2), -1)
            if not compat.is_capturing():  # what is made then belongs to the graph
                for old in list(self.known)[: 1 - MOST_SCALES]:
                    self.known.pop(old, None)
                self.known[key] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "known": {}}


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


def hold_owner(edit: nn.Module, ranks: Sequence[int], device: torch.device) -> None:
    """Register as `owner` the part of each rank, [R], for [`spread`]; `None` where there is but one part."""
    if len(ranks) > 1:
        owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
        live_buffer(edit, "owner", owner, device, torch.int64)
    else:
        edit.register_buffer("owner", None, persistent=False)


def spread(factors: torch.Tensor, owner: torch.Tensor | None, ndim: int, dim: int) -> torch.Tensor:
    """Factors [B, parts] as a tensor that multiplies one of `ndim` dimensions whose `dim` runs over ranks.

    Args:
        factors (`torch.Tensor`): [1 or B, parts].
        owner (`torch.Tensor`, *optional*): the part of each rank, [R]; `None` where there is but one part.
    """
    if owner is not None:
        factors = factors[:, owner.to(factors.device)]
    shape = [1] * ndim
    shape[0], shape[dim] = factors.shape
    return factors.reshape(shape)
