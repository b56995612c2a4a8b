"""Layer kind `text_map`: a low-rank linear map on a text input of the denoiser.

`x <- x + sum_i s_i (x A_i^T) D_i` for rows `x` of `encoder_hidden_states` (or of the pooled text vector): every map
adds from the unmapped input, so the order of loading does not matter. Where all readers of that input are linear,
this equals a LoRA `W (T - I)` on each of them (the form in which UCE is published); with a user's LoRA `U` on the same
Linear the two differ: the map gives `(W + U) T`, the LoRA `W T + U`.

Which inputs a denoiser has, its row in the table of doors says (`families/`). The map is a pre-hook on the denoiser; where a norm
stands before the door, `door_input` is one on the door itself, which gives `W T + U` beside a user's LoRA.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat, low_rank
from ..base_model import door_module, input_readers, text_attentions, weight_times
from ..errors import ErasureCompatibilityError, ErasureFileError
from ..families import DOOR_INPUT, FAMILIES, ROWS, reading_family
from ..schema import LayerSpec
from .base import HookLayer, Watched
from .buffers import PartKey, Tensors, live_buffer, placement
from .changes import WeightChange, double
from .kind import LayerKind, Summand
from .layer import Layer
from .modifiers import Conditions, Modifier, RankScales, hold_owner, spread
from .passing import Pass, kept_for
from .sites import Place, SiteEdit, SiteLayer


POOLED, POOLED_READER = "text_embeds", "add_embedding.linear_1"  # SDXL's
TIME_IDS = (6, 5)  # of SDXL and its refiner: so many embeddings stand behind the pooled vector
INPUTS = frozenset(name for family in FAMILIES.values() for name in family.inputs)


# ---------------------------------------------------------------------------------------------------- the live side


@dataclass(frozen=True)
class MapPart:
    """One layer of one erasure: A and D, its schedule and gate."""

    read: torch.Tensor
    write: torch.Tensor
    modifier: Modifier | None
    index: int = 0


class TextMap(SiteEdit):
    """The maps of some erasures on one input: `read` [R, C] (A) and `write` [R, C] (D)."""

    read: torch.Tensor
    write: torch.Tensor
    owner: torch.Tensor | None  # the part of each row, [R]

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[PartKey, MapPart],
        columns: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(module, parts, columns, device, dtype)
        hold_owner(self, [len(part.read) for part in parts.values()], device)
        columns_of = [columns[name] for (name, _), part in parts.items() for _ in range(len(part.read))]
        self.scales = RankScales(columns_of, device)
        live_buffer(self, "read", torch.cat([part.read for part in parts.values()]), device, dtype)
        live_buffer(self, "write", torch.cat([part.write for part in parts.values()]), device, dtype)

    def of(self, rows: torch.Tensor, now: Pass) -> torch.Tensor:
        """The mapped rows, of this pass or, where nothing else decides, of an earlier one."""
        if self.factors.modified or torch.compiler.is_compiling():
            return self(rows, now)
        return kept_for(now, self, rows, lambda: self(rows, now))

    def of_list(self, prompts: Sequence[Any], now: Pass) -> list[Any]:
        """The same of a list with the rows of each picture, [L, C], or with a list of such."""

        def mapped(rows: Any, index: int) -> Any:
            if isinstance(rows, list):
                return [mapped(each, index) for each in rows]
            if self.factors.modified or torch.compiler.is_compiling():
                return self.of_picture(rows, now, index, len(prompts))
            own = self.of_picture
            return kept_for(now, (self, index), rows, lambda: own(rows, now, index, len(prompts)))

        return [mapped(rows, index) for index, rows in enumerate(prompts)]

    def of_picture(self, rows: torch.Tensor, now: Pass, index: int, count: int) -> torch.Tensor:
        """The mapped rows [L, C] of one picture of so many."""

        def own(factors: torch.Tensor) -> torch.Tensor:
            return factors if len(factors) == 1 else self.factors.for_rows(factors, now, count)[index : index + 1]

        return self._mapped(rows, now, own)

    def forward(self, rows: torch.Tensor, now: Pass) -> torch.Tensor:
        return self._mapped(rows, now, lambda factors: self.factors.for_rows(factors, now, len(rows)))

    def _mapped(self, rows: torch.Tensor, now: Pass, own: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        # The hook on the denoiser fires before offload brings these buffers over, hence `to`.
        read, write = self.read.to(rows.device, rows.dtype), self.write.to(rows.device, rows.dtype)
        reduced = F.linear(rows, read)
        if not self.factors.modified and not torch.compiler.is_compiling():
            if not now.ones:
                reduced = reduced * own(self.scales(now, reduced))
        elif (factors := self.factors.product(now, rows.device, reduced.dtype)) is not None:
            reduced = reduced * spread(own(factors), self.owner, reduced.ndim, -1)
        if reduced.dtype != rows.dtype:  # under autocast
            return rows + F.linear(reduced, write.T)
        return torch.addmm(rows.flatten(0, -2), reduced.flatten(0, -2), write).view(rows.shape)


class MapInput(Place):
    """Forward pre-hook of the denoiser: maps one of its inputs, which stays where it was given."""

    def __init__(self, conditions: Conditions, name: str, component: nn.Module) -> None:
        super().__init__(conditions)
        self.argument, self.key = argument_of(component, name)
        self.position = position_of(component, self.argument)

    @compat.untraced  # so that what is kept for a run is found when the model is compiled
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        edit, now = self.at_work()
        if edit is None or kwargs is None:  # without: it was taken off while the pass waited for that
            return None
        now.reached.add(self.number)
        if len(args) > self.position:
            value = self._mapped(edit, args[self.position], now)
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        if kwargs.get(self.argument) is None:
            return None
        return args, {**kwargs, self.argument: self._mapped(edit, kwargs[self.argument], now)}

    def _mapped(self, edit: TextMap, value: Any, now: Pass) -> Any:
        if self.key is not None:
            return {**value, self.key: edit.of(value[self.key], now)}
        if isinstance(value, tuple):  # an IP-Adapter's (text, image embeddings)
            return (edit.of(value[0], now), *value[1:])
        return edit.of_list(value, now) if isinstance(value, list) else edit.of(value, now)


class MapDoor(Place):
    """Forward pre-hook of a door behind a norm: maps what it reads."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        edit, now = self.at_work()
        return None if edit is None else (edit(args[0], now), *args[1:])


def argument_of(component: nn.Module, name: str) -> tuple[str, str | None]:
    """The argument of `forward` that holds an input, and the key inside it where it holds others too."""
    if name == ROWS:
        return reading_family(component).argument, None
    return ("added_cond_kwargs", name) if name == POOLED else (name, None)


def position_of(component: nn.Module, argument: str) -> int:
    names = list(inspect.signature(type(component).forward).parameters)[1:]  # without self
    if argument not in names:
        raise ErasureCompatibilityError(
            f"{type(component).__name__} takes no {argument!r}: the erasure was made for another architecture."
        )
    return names.index(argument)


def _door(component: nn.Module) -> nn.Module:
    """The module that reads text rows first, which `check` has seen."""
    name = reading_family(component).door
    assert name is not None
    return door_module(component, name)


class TextMapLayer(SiteLayer):
    """All `text_map` layers on one denoiser, whose sites are its inputs."""

    edit: ClassVar[type[SiteEdit]] = TextMap

    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        component = compat.unwrap_compiled(component)
        if site == DOOR_INPUT:
            door, behind = _door(component), MapDoor(self.conditions)
            return door, behind, door.register_forward_pre_hook(behind)
        place = MapInput(self.conditions, site, component)
        return component, place, component.register_forward_pre_hook(place, with_kwargs=True)

    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> MapPart:
        return MapPart(tensors["A"], tensors["D"], modifier)

    def entrances(self) -> Iterable[int]:
        return [each.place.number for site, each in self.sites.items() if site != DOOR_INPUT]

    def watched(self) -> Iterator[Watched]:
        """The door, by its own name; in front of others the pass is the call."""
        each = self.sites.get(DOOR_INPUT)
        if each is not None and each.parts:
            names = frozenset(name for name, _ in each.parts)
            door = reading_family(compat.unwrap_compiled(each.component)).door
            assert door is not None
            yield Watched(door, each.module, names, (each.handle.id,))

    def altered(self, component: nn.Module, spec: LayerSpec) -> Iterable[nn.Module]:
        """The denoiser, and where they are known the modules that read what is mapped."""
        component = compat.unwrap_compiled(component)
        family, (site,) = reading_family(component), spec.sites
        if family.door is None and site == ROWS:  # whatever the attentions' projections are now, fused or not
            readers = [
                attention.get_submodule(part)
                for _, attention in text_attentions(component)
                for part in ("to_k", "to_v")
            ]
        elif family.pooled is not None and site == family.pooled.input:
            readers = [door_module(component, family.pooled.reader)]
        else:
            readers = [_door(component)]
        return [component, *map(compat.base_layer, readers)]

    def placement(self, component: nn.Module, module: nn.Module) -> tuple[torch.device, torch.dtype]:
        return placement(module, next(owner for _, owner, _, _ in compat.base_parameters(module)))


# ------------------------------------------------------------------------------------------------- the artefact side


def check_pooled_width(component: nn.Module, width: int) -> None:
    """See that a denoiser's pooled vectors are so wide.

    Raises:
        ErasureCompatibilityError: they are not.
    """
    pooled = reading_family(component).pooled
    assert pooled is not None
    read = getattr(door_module(component, pooled.reader), "in_features", None)
    behind = [0]
    if pooled.input == POOLED:
        config = getattr(component, "config", {})
        behind = [count * config.get("addition_time_embed_dim", 0) for count in TIME_IDS]
    if read is not None and read - width not in behind:
        raise ErasureCompatibilityError(
            f"The erasure maps pooled vectors of width {width}, which are not those of this {type(component).__name__}: it was "
            "made for another architecture."
        )


def check_row_width(component: nn.Module, width: int) -> None:
    """See that a denoiser's text rows are so wide.

    Raises:
        ErasureCompatibilityError: they are not.
    """
    family, config = reading_family(component), getattr(component, "config", {})
    own = None if family.door is None else getattr(door_module(component, family.door), "in_features", None)
    widths = [own] if own else [config.get(entry) for entry in ("cross_attention_dim", "joint_attention_dim")]
    for read in widths:
        if isinstance(read, int) and read != width:
            raise ErasureCompatibilityError(
                f"{type(component).__name__} reads text rows of width {read}; the erasure maps rows of width {width}: it was made "
                "for another architecture."
            )


class MapChange(WeightChange):
    """W (I + s D^T A), for a module that reads what is mapped; several add from the unmapped input.

    Args:
        site (`str`), module (`nn.Module`): where.
        source (`str`): the input of the denoiser.
        a (`torch.Tensor`), d (`torch.Tensor`): A and D.
    """

    on_input: ClassVar[bool] = True

    def __init__(self, site: str, module: nn.Module, source: str, a: torch.Tensor, d: torch.Tensor) -> None:
        super().__init__(site, module)
        self.source, self.a, self.d = source, a, d

    @property
    def places(self) -> set[Any]:
        return {self.module, self.source}

    @classmethod
    def applied(
        cls, parameters: Mapping[str, torch.Tensor], changes: Sequence[tuple[float, Self]]
    ) -> dict[str, torch.Tensor]:
        weight = parameters["weight"]
        added = [s * (weight @ double(each.d, weight).T) @ double(each.a, weight) for s, each in changes]
        return {"weight": sum(added, weight)}

    def factors(self) -> low_rank.Factors | None:
        """W (T - I) = (W D^T) A."""
        assert isinstance(self.module, nn.Linear)
        return self.a.double(), weight_times(self.module, self.site, self.d.double().cpu().T)

    def values(self, name: str, positions: list[int]) -> torch.Tensor | None:
        """Values of W (T - I), from W T, which is what a fused module holds."""
        held = compat.own_parameter(self.module, name)
        if name != "weight" or held is None or held.device.type == "meta" or held.shape[1:] != self.a.shape[1:]:
            return None
        weight = held.detach()
        weight = weight if weight.dtype.itemsize > 1 else weight.float()  # float8 has no indexing
        width = weight.shape[1]
        rows = weight[[p // width for p in positions]].to("cpu", torch.float64)
        whole = torch.eye(width).double() + self.d.double().T @ self.a.double()
        before = torch.linalg.lstsq(whole.T, rows.T).solution.T
        return (rows - before)[torch.arange(len(positions)), [p % width for p in positions]]


class TextMapKind(LayerKind):
    """`A` and `D`, both [n, C], for one input of the denoiser."""

    name: ClassVar[str] = "text_map"
    live: ClassVar[type[HookLayer]] = TextMapLayer

    def prefix(self, component: str, sites: Sequence[str]) -> str:
        return "text_map." if tuple(sites) in ((ROWS,), (DOOR_INPUT,)) else "pooled_map."

    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        if spec.component not in ("unet", "transformer"):
            raise ErasureFileError(f"A `text_map` acts on the denoiser, not on {spec.component!r}.")
        if len(spec.sites) != 1 or spec.sites[0] not in INPUTS:
            raise ErasureFileError(f"A `text_map` has one site, one of {sorted(INPUTS)}, not {spec.sites[:3]}.")
        if set(tensors) != {"A", "D"}:
            raise ErasureFileError(
                f"{spec.file}: a `text_map` has the tensors 'A' and 'D', not {sorted(tensors)[:4]}."
            )
        shapes = tuple(tensors["A"].shape), tuple(tensors["D"].shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] > shapes[0][1]:
            raise ErasureFileError(f"{spec.file}: A and D have shapes {shapes}; expected twice [n, C] with n <= C.")

    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        return {"A": tensors["A"] * factor, "D": tensors["D"]}

    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        component, (site,) = compat.unwrap_compiled(component), spec.sites
        family, width = reading_family(component), tensors["A"].shape[1]
        if site not in family.inputs:
            others = " and ".join(map(repr, family.inputs))
            raise ErasureCompatibilityError(
                f"{type(component).__name__} reads no {site!r} here, but {others}: the erasure was made for another architecture."
            )
        if site != DOOR_INPUT:
            position_of(component, argument_of(component, site)[0])
        if family.pooled is not None and site == family.pooled.input:
            check_pooled_width(component, width)
        else:
            check_row_width(component, width)

    def weight_changes(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Sequence[WeightChange]:
        component, (site,) = compat.unwrap_compiled(component), spec.sites
        config = getattr(component, "config", {})
        added, projected = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
        of_unet = reading_family(component).door is None and site == ROWS
        all_known = added in (None, "text_time") and projected is None
        readers = input_readers(component, site) if all_known or not of_unet else {}
        if not readers:
            raise ErasureCompatibilityError(
                f"A layer {self.name!r} on {site!r} of {spec.component!r} cannot be fused: not everything that reads "
                "this input is known to be linear. Leave the erasure unfused."
            )
        a, d = tensors["A"], tensors["D"]
        if site == POOLED:  # its reader has the time embeddings behind it
            rest = next(iter(readers.values())).in_features - a.shape[1]
            a, d = F.pad(a, (0, rest)), F.pad(d, (0, rest))
        return [MapChange(name, module, site, a, d) for name, module in readers.items()]

    def reads(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Collection[Any] | None:
        return set(spec.sites)

    def summed(
        self, members: Sequence[Summand], rank: int | None, max_error: float | None
    ) -> list[tuple[Layer, float]]:
        by_input: dict[tuple[str, str], list[Summand]] = {}
        for member in members:
            by_input.setdefault((member.spec.component, member.spec.sites[0]), []).append(member)
        found = []
        for (component, site), own in by_input.items():
            a, d = (torch.cat([member.tensors[name].double() for member in own]) for name in ("A", "D"))
            a, d, lost = low_rank.truncated(a, d, rank, max_error)
            tensors = {"A": a.float().contiguous(), "D": d.float().contiguous()}
            origins = {name for member in own for name in member.spec.derived_from}
            found.append((Layer(self.name, (site,), tensors, component, tuple(sorted(origins))), lost))
        return found
