"""Layer kind `gated_map`: maps of the text, each behind probes that ask whether a prompt names its concept.

For a prompt with rows x_1 … x_L and pooled vector p

    open_c = 1 where x_i . w_j > t_j for any row i and any probe j of the concept c, or p . v_k > u_k for any of its pooled probes k,
             else 0
    x_i <- x_i + s sum_c open_c (x_i A_c^T) D_c,        p <- p + s sum_c open_c (p P_c^T) Q_c

Pooled probes are for denoisers whose pooled vector is made by another encoder than the rows, so perhaps of another prompt (FLUX.1).
A prompt which no probe sees stays bit for bit what it was, while behind an open gate a map is free to move everything. Maps that
are open add up: of several names in one prompt all are to go. Gates depend on the text alone and are computed once a run.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureFileError, ErasureInputError
from ..families import ROWS, reading_family
from ..schema import LayerSpec
from .base import HookLayer
from .buffers import PartKey, Tensors, live_buffer
from .kind import LayerKind, Summand
from .layer import Layer
from .modifiers import Conditions, Modifier, hold_owner, spread
from .passing import Pass, kept_for
from .sites import Place, SiteEdit
from .text_map import TextMapLayer, argument_of, check_pooled_width, check_row_width, position_of


DIMENSIONS = {"probes": 2, "thresholds": 2, "probe_counts": 1, "A": 2, "D": 2, "counts": 1}
POOLED_DIMENSIONS = {"pooled_A": 2, "pooled_D": 2, "pooled_counts": 1}
POOLED_PROBES = {"pooled_probes": 2, "pooled_thresholds": 2, "pooled_probe_counts": 1}
COUNTED = {
    "probe_counts": "probes",
    "counts": "A",
    "pooled_counts": "pooled_A",
    "pooled_probe_counts": "pooled_probes",
}


def in_two(values: torch.Tensor) -> torch.Tensor:
    """Numbers [P] as sums of two [P, 2], of which no dtype that files are saved in takes more than a few millionths."""
    first = values.bfloat16().double()
    return torch.stack([first, values.double() - first], 1).float()


def numbered(counts: torch.Tensor) -> torch.Tensor:
    """The concept of each probe or rank, int64, of which each concept has so many, one concept after another."""
    return torch.arange(len(counts)).repeat_interleave(counts.detach().cpu().long())


# ---------------------------------------------------------------------------------------------------- the live side


@dataclass(frozen=True)
class GatedPart:
    """One layer of one erasure: its tensors by name, its schedule and gate."""

    tensors: Mapping[str, torch.Tensor]
    modifier: Modifier | None
    index: int = 0

    @property
    def concepts(self) -> int:
        """How many gates it has."""
        return len(self.tensors["probe_counts"])


class Probes(nn.Module):
    """Probes [P, C], each of one gate, and their thresholds; of parts that may have none.

    Args:
        parts: of each its probes, thresholds and counts, and the number of its first gate.
        count: how many gates there are.
    """

    bits: torch.Tensor  # float32 in the bits of whole numbers: no cast of the model rounds them
    thresholds: torch.Tensor  # likewise
    gates: torch.Tensor  # [P]

    def __init__(
        self,
        parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]],
        count: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.count = count
        probes, thresholds, counts, starts = zip(*parts, strict=True)
        bits = torch.cat(probes).float().contiguous().view(torch.int32)
        live_buffer(self, "bits", bits, device, torch.int32)
        exact = torch.cat([each.double().sum(1).float() for each in thresholds])
        live_buffer(self, "thresholds", exact.view(torch.int32), device, torch.int32)
        gates = torch.cat([numbered(each) + start for each, start in zip(counts, starts, strict=True)])
        live_buffer(self, "gates", gates, device, torch.int64)

    @torch.no_grad()
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Which gates are open, bool [B, gates], for rows [B, L, C]."""
        probes = self.bits.to(rows.device).view(torch.float32)
        with _exactly(rows.device):
            values = F.linear(rows.float(), probes).amax(1)
        hit = (values > self.thresholds.to(rows.device).view(torch.float32)).to(torch.int32)
        gates = self.gates.to(rows.device).expand(len(rows), -1)
        return torch.zeros(len(rows), self.count, dtype=torch.int32, device=rows.device).scatter_add(1, gates, hit) > 0


class Ranks(nn.Module):
    """The maps on one input: `read` and `write` [R, C], the gate of each rank and the part that it belongs to."""

    read: torch.Tensor
    write: torch.Tensor
    gate: torch.Tensor
    owner: torch.Tensor | None

    def __init__(
        self,
        maps: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        reads, writes, gates = zip(*maps, strict=True)
        hold_owner(self, [len(read) for read in reads], device)
        live_buffer(self, "read", torch.cat(reads), device, dtype)
        live_buffer(self, "write", torch.cat(writes), device, dtype)
        live_buffer(self, "gate", torch.cat(gates), device, torch.int64)

    def forward(self, values: torch.Tensor, is_open: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        """Map [B, …, C] behind gates [B, gates]; factors [1 or B, parts]."""
        # The hook on the denoiser fires before offload brings these buffers over, hence `to`.
        read, write = self.read.to(values.device, values.dtype), self.write.to(values.device, values.dtype)
        shape = (len(values), *(1,) * (values.ndim - 2), -1)
        weights = is_open[:, self.gate.to(is_open.device)].to(values.dtype).reshape(shape)
        if factors is not None:
            weights = weights * spread(factors.to(values.dtype), self.owner, values.ndim, -1)
        mapped = values + F.linear(F.linear(values, read) * weights, write.T).to(values.dtype)
        return torch.where(is_open.any(1).reshape(len(values), *(1,) * (values.ndim - 1)), mapped, values)


class GatedMap(SiteEdit):
    """The gated maps of some erasures on one denoiser: their probes, and the maps behind the gates."""

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[PartKey, GatedPart],
        columns: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(module, parts, columns, device, dtype)
        own = [part.tensors for part in parts.values()]
        starts = [sum(part.concepts for part in list(parts.values())[:i]) for i in range(len(own))]
        count = sum(part.concepts for part in parts.values())

        def probes(w: str, t: str, of: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
            return [(each[w], each[t], each[of], start) for each, start in zip(own, starts, strict=True) if w in each]

        self.probes = Probes(probes("probes", "thresholds", "probe_counts"), count, device)
        pooled = probes("pooled_probes", "pooled_thresholds", "pooled_probe_counts")
        self.pooled_probes = Probes(pooled, count, device) if pooled else None

        def maps(a: str, d: str, of: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
            return [
                (each[a], each[d], numbered(each[of]) + start)
                for each, start in zip(own, starts, strict=True)
                if a in each
            ]

        self.ranks = Ranks(maps("A", "D", "counts"), device, dtype)
        self.pooled: Ranks | None = None
        self.of_pooled = [i for i, each in enumerate(own) if "pooled_A" in each]
        if self.of_pooled:
            self.pooled = Ranks(maps("pooled_A", "pooled_D", "pooled_counts"), device, dtype)

    def opened(self, rows: torch.Tensor, vectors: torch.Tensor | None, now: Pass) -> torch.Tensor:
        """Which gates are open for each prompt, bool [B, gates], of rows [B, L, C] and pooled vectors [B, c]."""
        found = self._seen("probes", rows, now)
        if self.pooled_probes is None or vectors is None or len(vectors) != len(rows):
            return found
        return found | self._seen("pooled_probes", vectors, now)

    def _seen(self, name: str, values: torch.Tensor, now: Pass) -> torch.Tensor:
        probes = getattr(self, name)

        def seen() -> torch.Tensor:
            return probes(values if values.ndim == 3 else values[:, None])

        return seen() if torch.compiler.is_compiling() else kept_for(now, (self, name), values, seen)

    def of_rows(
        self, rows: torch.Tensor, vectors: torch.Tensor | None, now: Pass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mapped rows [B, L, C], and which gates are open."""
        is_open = self.opened(rows, vectors, now)

        def mapped() -> torch.Tensor:
            return self.ranks(rows, is_open, self._factors(now, rows))

        # What is kept is that of rows, and pooled probes look at more.
        if self.factors.modified or self.pooled_probes is not None or torch.compiler.is_compiling():
            return mapped(), is_open
        return kept_for(now, self, rows, mapped), is_open

    def of_list(self, prompts: Sequence[Any], now: Pass) -> list[Any]:
        """The mapped rows of a list with those of each picture, [L, C], or with a list of such."""

        def of_picture(rows: Any, index: int) -> Any:
            if isinstance(rows, list):
                return [of_picture(each, index) for each in rows]
            factors = self.factors.product(now, rows.device)
            if factors is not None and len(factors) > 1:
                factors = self.factors.for_rows(factors, now, len(prompts))[index : index + 1]
            return self.ranks(rows[None], self.probes(rows[None]), factors)[0]

        return [of_picture(rows, index) for index, rows in enumerate(prompts)]

    def of_pooled_vectors(self, vectors: torch.Tensor, is_open: torch.Tensor, now: Pass) -> torch.Tensor:
        """The mapped pooled vectors [B, C] behind the gates of their prompts' rows."""
        if self.pooled is None or len(vectors) != len(is_open):
            return vectors
        factors = self._factors(now, vectors)
        return self.pooled(vectors, is_open, None if factors is None else factors[:, self.of_pooled])

    def _factors(self, now: Pass, values: torch.Tensor) -> torch.Tensor | None:
        return self.factors(now, values.device, len(values))


def _exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would round rows to half precision before they are compared."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class GatedInput(Place):
    """Forward pre-hook of the denoiser: maps text rows and pooled vector, which stay where they were given."""

    def __init__(self, conditions: Conditions, component: nn.Module) -> None:
        super().__init__(conditions)
        pooled = reading_family(component).pooled
        self.argument = argument_of(component, ROWS)[0]
        self.position = position_of(component, self.argument)
        self.pooled = None if pooled is None else argument_of(component, pooled.input)
        self.pooled_position = None if self.pooled is None else position_of(component, self.pooled[0])

    @compat.untraced  # so that what is kept for a run is found when the model is compiled
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        edit, now = self.at_work()
        if edit is None or kwargs is None:  # without: it was taken off while the pass waited for that
            return None
        now.reached.add(self.number)
        arguments = list(args)
        given = arguments[self.position] if len(arguments) > self.position else kwargs.get(self.argument)
        if given is None:
            return None
        vectors = self._vectors(arguments, kwargs)
        mapped, is_open = self._rows(edit, given, vectors, now)
        kwargs = _put(arguments, kwargs, self.position, self.argument, mapped)
        if is_open is not None and vectors is not None:
            kwargs = self._with_vectors(arguments, kwargs, edit.of_pooled_vectors(vectors, is_open, now))
        return tuple(arguments), kwargs

    def _rows(
        self, edit: GatedMap, given: Any, vectors: torch.Tensor | None, now: Pass
    ) -> tuple[Any, torch.Tensor | None]:
        if isinstance(given, list):
            return edit.of_list(given, now), None
        rows = given[0] if isinstance(given, tuple) else given  # an IP-Adapter's (text, image embeddings)
        mapped, is_open = edit.of_rows(rows, vectors, now)
        return ((mapped, *given[1:]) if isinstance(given, tuple) else mapped), is_open

    def _vectors(self, arguments: list[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The pooled vectors of this call, where it has some."""
        if self.pooled is None or self.pooled_position is None:
            return None
        name, key = self.pooled
        held = arguments[self.pooled_position] if len(arguments) > self.pooled_position else kwargs.get(name)
        return held if key is None or held is None else held.get(key)

    def _with_vectors(self, arguments: list[Any], kwargs: dict[str, Any], vectors: torch.Tensor) -> dict[str, Any]:
        assert self.pooled is not None and self.pooled_position is not None
        name, key = self.pooled
        if key is None:
            return _put(arguments, kwargs, self.pooled_position, name, vectors)
        held = arguments[self.pooled_position] if len(arguments) > self.pooled_position else kwargs[name]
        return _put(arguments, kwargs, self.pooled_position, name, {**held, key: vectors})


def _put(arguments: list[Any], kwargs: dict[str, Any], position: int, name: str, value: Any) -> dict[str, Any]:
    """A value where the argument was given: written into the list, or in new keyword arguments."""
    if len(arguments) > position:
        arguments[position] = value
        return kwargs
    return {**kwargs, name: value}


class GatedMapLayer(TextMapLayer):
    """All `gated_map` layers on one denoiser."""

    edit: ClassVar[type[SiteEdit]] = GatedMap

    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        component = compat.unwrap_compiled(component)
        place = GatedInput(self.conditions, component)
        return component, place, component.register_forward_pre_hook(place, with_kwargs=True)

    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> Any:
        return GatedPart(dict(tensors), modifier)


# ------------------------------------------------------------------------------------------------- the artefact side


class GatedMapKind(LayerKind):
    """`probes` [P, C] with `thresholds` [P, 2] (sums of two), `A` and `D` [R, C], and how many of them each concept has, one after
    another: `probe_counts` and `counts` [concepts]; where the denoiser reads a pooled vector `pooled_A`, `pooled_D` and
    `pooled_counts` besides, and probes on it: `pooled_probes`, `pooled_thresholds` and `pooled_probe_counts`."""

    name: ClassVar[str] = "gated_map"
    live: ClassVar[type[HookLayer]] = GatedMapLayer

    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        if spec.component not in ("unet", "transformer") or tuple(spec.sites) != (ROWS,):
            raise ErasureFileError(
                f"A `gated_map` acts on {ROWS!r} of the denoiser, not on {spec.component!r}, {list(spec.sites)[:3]}."
            )
        wanted = dict(DIMENSIONS)
        for optional in (POOLED_DIMENSIONS, POOLED_PROBES):
            wanted |= optional if set(tensors) & set(optional) else {}
        if set(tensors) != set(wanted):
            raise ErasureFileError(
                f"{spec.file}: a `gated_map` has the tensors {sorted(wanted)}, not {sorted(tensors)[:12]}."
            )
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        probes, maps = shapes["probes"], shapes["A"]
        fits = all(len(shapes[name]) == count for name, count in wanted.items())
        fits = fits and shapes["thresholds"] == (probes[0], 2) and shapes["D"] == maps and maps[1:] == probes[1:]
        fits = fits and shapes.get("pooled_A") == shapes.get("pooled_D")
        if "pooled_probes" in shapes:
            probes = shapes["pooled_probes"]
            fits = fits and shapes["pooled_thresholds"] == (probes[0], 2)
            fits = fits and probes[1:] == shapes.get("pooled_A", probes)[1:]
        concepts = shapes["probe_counts"]
        for name, of in COUNTED.items():
            fits = fits and (
                of not in shapes or _counts(tensors[name], concepts, shapes[of][0], name == "probe_counts")
            )
        if not fits:
            raise ErasureFileError(f"{spec.file}: a `gated_map` cannot have tensors of the shapes {shapes}.")

    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        scaled = {name: tensors[name] * factor for name in ("A", "pooled_A") if name in tensors}
        return {**tensors, **scaled}

    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        component = compat.unwrap_compiled(component)
        family, kind = reading_family(component), type(component).__name__
        position_of(component, argument_of(component, ROWS)[0])
        check_row_width(component, tensors["A"].shape[1])
        for name in sorted({"pooled_A", "pooled_probes"} & set(tensors)):
            if family.pooled is None:
                raise ErasureCompatibilityError(
                    f"The erasure reads a pooled text vector, and {kind} reads none: it was made for another architecture."
                )
            check_pooled_width(component, tensors[name].shape[1])

    def reads(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Collection[Any] | None:
        pooled = reading_family(compat.unwrap_compiled(component)).pooled
        looked = pooled is not None and not {"pooled_A", "pooled_probes"}.isdisjoint(tensors)
        return {ROWS, *((pooled.input,) if looked and pooled is not None else ())}

    def summed(
        self, members: Sequence[Summand], rank: int | None, max_error: float | None
    ) -> list[tuple[Layer, float]]:
        if rank or max_error:
            raise ErasureInputError(
                "Maps behind gates are put side by side: `rank` and `max_error` do not go with them."
            )
        by_component: dict[str, list[Summand]] = {}
        for member in members:
            by_component.setdefault(member.spec.component, []).append(member)
        return [(_side_by_side(self.name, component, own), 0.0) for component, own in by_component.items()]


def _counts(counts: torch.Tensor, concepts: tuple[int, ...], total: int, each_some: bool) -> bool:
    """Whether these are how many of so many each concept has."""
    values = counts.double()
    whole = tuple(values.shape) == concepts and bool((values == values.round()).all() and (values >= each_some).all())
    return whole and int(values.sum()) == total and len(values) > 0


def _side_by_side(kind: str, component: str, members: Sequence[Summand]) -> Layer:
    """Gated maps as those of one layer; maps of the pooled vector only where each has some."""
    pooled = all("pooled_A" in member.tensors for member in members)
    names = [*DIMENSIONS, *(POOLED_DIMENSIONS if pooled else ())]
    if not pooled and any("pooled_A" in member.tensors for member in members):
        raise ErasureInputError(
            "Of these erasures some map the pooled text vector and some do not; load them side by side."
        )
    parts = [dict(member.tensors) for member in members]
    with_probes = next((part for part in parts if "pooled_probes" in part), None)
    if with_probes is not None:
        names += POOLED_PROBES
        for part in parts:
            none = (
                with_probes["pooled_probes"][:0],
                with_probes["pooled_thresholds"][:0],
                torch.zeros(len(part["probe_counts"])),
            )
            part |= {name: part.get(name, empty) for name, empty in zip(POOLED_PROBES, none, strict=True)}
    tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in names}
    origins = {name for member in members for name in member.spec.derived_from}
    return Layer(kind, (ROWS,), tensors, component, tuple(sorted(origins)))
