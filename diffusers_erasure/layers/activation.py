"""Layer kind `activation`: at some timesteps some units of a module's input are replaced by stored means (ActErase).

The module is the last `Linear` of a feed-forward (in UNets its input is what GEGLU gives) or of an attention; in FLUX.1's single
blocks one `Linear` is both. A pre-hook on it writes, for every token alike, `x <- x + w (mu - x)` on the units that an erasure owns at the timestep:

    w_i = strength_i * blend_i * schedule_i * gate_i * mask_i      for each erasure i, [C]
    w   = max_i w_i,    mu = sum_i w_i mu_i / sum_i w_i

so that masks are joined and overlaps averaged, in whatever order they were loaded. Timesteps are matched to the nearest
stored one, of two equally near ones to the smaller. As long as nothing depends on the prompt, all of this is a table by
intervals of the timestep, one for each strength among the pictures, and a pass costs one look-up in each for all modules and
one fused multiply-add for each module; where every w is 0 it gives `x * 1 + 0`. With a gate what is looked up is joined in
each pass.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from ..errors import ErasureCompatibilityError, ErasureFileError
from ..logging import get_logger
from ..schema import TENSOR_FILE, LayerSpec
from .base import HookLayer
from .buffers import PartKey, Tensors, live_buffer
from .changes import WeightChange
from .kind import LayerKind
from .modifiers import Conditions, Modifier, bins_at
from .passing import Pass
from .sites import Place, SiteEdit, SiteLayer, find_site


logger = get_logger(__name__)

FEED_FORWARD, ATTENTIONS = ".ff.net.2", (".attn1.to_out.0", ".attn2.to_out.0")
# The same in the blocks of transformers, where text has its own; `attn2`, of SD3.5 medium, sees the image alone.
JOINT_FEED_FORWARDS = (FEED_FORWARD, ".ff_context.net.2")
JOINT_ATTENTIONS = (".attn.to_out.0", ".attn.to_add_out", ".attn2.to_out.0")
_SINGLE = re.compile(r"single_transformer_blocks\.\d+\.proj_out")
MASK, MEANS, TIMESTEPS, BLEND = ".mask", ".means", "timesteps", "blend"
MAX_TIMESTEPS = 1000
TABLES = 8  # that are kept, of different strengths
MANY = 5  # concepts; the paper reports heavy degradation at ten


def is_single(site: str) -> bool:
    """Whether a site is the last `Linear` of one of FLUX.1's single blocks."""
    return _SINGLE.fullmatch(site) is not None


def _may_act(component: str, site: str) -> bool:
    if component == "unet":
        return f".{site}".endswith((FEED_FORWARD, *ATTENTIONS))
    return f".{site}".endswith((*JOINT_FEED_FORWARDS, *JOINT_ATTENTIONS)) or is_single(site)


# ---------------------------------------------------------------------------------------------------- the tensors


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Write a mask [T, C] as bits, uint8 [T, ceil(C / 8)]: the first unit is the highest bit, the last byte is padded."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))


def unpack(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Read [`pack`]'s bits: bool [T, width]."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=1, count=width)).bool()


@dataclass(frozen=True)
class Part:
    """One layer of one erasure at one site.

    Attributes:
        timesteps: [T], float32, ascending.
        mask: bits, uint8 [T, ceil(C / 8)], in the order of `timesteps`.
        means: of the set bits, row by row.
        blend: multiplies the strength.
        modifier: its schedule and gate, `None` for none.
        index: of the site in its layer.
    """

    timesteps: torch.Tensor
    mask: torch.Tensor
    means: torch.Tensor
    blend: float
    modifier: Modifier | None = None
    index: int = 0

    @classmethod
    def of(cls, tensors: Tensors, site: str, modifier: Modifier | None = None, index: int = 0) -> "Part":
        """Take one site from a layer's tensors."""
        timesteps, mask, means = tensors[TIMESTEPS].float(), tensors[site + MASK], tensors[site + MEANS]
        if len(timesteps) > 1 and timesteps[0] > timesteps[-1]:
            counts = _set_bits(mask).sum(1).tolist()
            timesteps, mask, means = timesteps.flip(0), mask.flip(0), torch.cat(means.split(counts)[::-1])
        return cls(timesteps, mask, means, float(tensors[BLEND]), modifier, index)

    def dense(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask and means as float64 [T, width]."""
        mask = unpack(self.mask, width)
        means = torch.zeros(mask.shape, dtype=torch.float64)
        means[mask] = self.means.cpu().double()
        return mask.double(), means

    def limits(self) -> torch.Tensor:
        """Up to where each stored timestep but the last is the nearest one: float32 [T - 1], inclusive."""
        middle = (self.timesteps[:-1].double() + self.timesteps[1:].double()) / 2
        limits = middle.float()
        below = torch.nextafter(limits, torch.zeros_like(limits))
        # float32's rounding must not reach past the middle.
        return torch.where(limits.double() > middle, below, limits)

    def scheduled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The schedule's values [bins], and up to where each bin but the last reaches, float32 [bins - 1]."""
        column = None if self.modifier is None else self.modifier.column(self.index)
        if column is None or self.modifier is None:
            return torch.ones(1, dtype=torch.float64), torch.zeros(0)
        bins, span = len(column), self.modifier.span
        first = torch.arange(1, bins)
        limits = (first.double() * span / bins).float()
        infinity = torch.full_like(limits, torch.inf)

        def reached(timestep: torch.Tensor) -> torch.Tensor:
            return bins_at(timestep, bins, span) >= first

        while bool((inside := reached(limits)).any()):
            limits = torch.where(inside, torch.nextafter(limits, -infinity), limits)
        while bool((short := ~reached(torch.nextafter(limits, infinity))).any()):
            limits = torch.where(short, torch.nextafter(limits, infinity), limits)
        return column.double(), limits

    def at(self, timesteps: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight at strength 1 and without a gate, and mean: float64 [len(timesteps), width]."""
        mask, means = self.dense(width)
        values, ends = self.scheduled()
        nearest = torch.searchsorted(self.limits(), timesteps)
        factors = self.blend * values[torch.searchsorted(ends, timesteps)]
        return factors[:, None] * mask[nearest], means[nearest]


def _set_bits(mask: torch.Tensor) -> torch.Tensor:
    return unpack(mask, 8 * mask.shape[1])


def joined(weights: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """What x is multiplied by, and what is added: [..., 2, C] from weights and means [..., parts, C]."""
    weights = weights.clamp_min(0)  # a schedule may fall below
    most, total = weights.amax(-2), weights.sum(-2)
    mean = (weights * means).sum(-2) / torch.where(total > 0, total, 1.0)
    return torch.stack([1 - most, most * mean], dim=-2)


def static_rows(parts: Sequence[tuple[float, Part]], width: int) -> torch.Tensor:
    """[`joined`] for parts of one timestep each, with their strengths: float64 [2, width]."""
    dense = [(strength * part.blend, *part.dense(width)) for strength, part in parts]
    weights = torch.stack([weight * mask[0] for weight, mask, _ in dense])
    return joined(weights, torch.stack([means[0] for _, _, means in dense]))


# ---------------------------------------------------------------------------------------------------- the live side


class Tables:
    """What [`joined`] gives at the sites at which the same erasures act, beside one another in one table by intervals.

    So a pass looks up its timestep once for all of them. A table is made for one row's strengths, in float64, and kept; where
    strengths differ by picture, each row of the batch is read in the table of its own.

    Args:
        sites (sequence): the parts and the width of each.
        columns (`dict`): as of [`SiteEdit`].
    """

    def __init__(self, sites: Sequence[tuple[Mapping[PartKey, Part], int]], columns: Mapping[str, int]) -> None:
        self.sites = sites
        self.columns = [columns[name] for name, _ in sites[0][0]]
        self.limits = _limits(sites[0][0].values())
        # Is replaced and never changed, as threads read it.
        self.made: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, now: Pass, like: torch.Tensor) -> torch.Tensor | None:
        """What acts in this pass, [1 or B, twice the widths of all sites].

        `None` where strengths are not known as numbers, or are of more kinds than tables are kept.
        """
        key = self, like.device, like.dtype
        if key not in now.looked:
            now.looked[key] = self._look_up(now, like.device, like.dtype)
        return now.looked[key]

    def _look_up(self, now: Pass, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        if now.numbers is None:
            return None
        own = [tuple(row[column] for column in self.columns) for row in now.numbers]
        kinds = dict.fromkeys(own)
        if len(kinds) > TABLES:
            return None
        tables = {values: self._table(values, device, dtype) for values in kinds}
        rows, limits = tables[own[0]]
        index = torch.bucketize(now.now(device).contiguous(), limits) if len(rows) > 1 else None  # [1] or [B]
        if len(kinds) == 1:
            return rows if index is None else rows.index_select(0, index)
        if index is not None and len(index) > 1:
            each = zip(own, index.split(1), strict=True)
            return torch.cat([tables[values][0].index_select(0, place) for values, place in each])
        found = {
            values: rows if index is None else rows.index_select(0, index) for values, (rows, _) in tables.items()
        }
        return torch.cat([found[values] for values in own])

    def _table(
        self, values: tuple[float, ...], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The table for one row's strengths, and its limits."""
        key = values, device, dtype
        made = self.made.get(key)
        if made is None:
            made = self._make(values, device, dtype)
            last = list(self.made.items())[1 - TABLES :]
            self.made = {**dict(last), key: made}
        return made

    def _make(
        self, values: tuple[float, ...], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A table [intervals, twice the widths of all sites], and its limits."""
        with torch.inference_mode(False), torch.no_grad():
            inside = torch.cat([self.limits, torch.tensor([torch.inf])])  # a timestep of each interval
            rows = []
            for parts, width in self.sites:
                found = [part.at(inside, width) for part in parts.values()]
                weights = torch.stack([value * weight for value, (weight, _) in zip(values, found, strict=True)], 1)
                rows.append(joined(weights, torch.stack([means for _, means in found], 1)).flatten(1))
            return torch.cat(rows, 1).to(dtype).to(device), self.limits.to(device)


class ActivationPatch(SiteEdit):
    """What some erasures do to the input of one module.

    Their parts are joined in [`Tables`]. With gates, in graphs, and with very many strengths by picture each part is looked up by
    itself, and they are joined in the pass.
    """

    parts: Mapping[PartKey, Part]
    mask: torch.Tensor  # [stored timesteps of all parts, C], bool
    means: torch.Tensor  # [stored timesteps of all parts, C]
    limits: torch.Tensor  # [parts, most timesteps - 1], infinite where a part has fewer; float32's bits
    blends: torch.Tensor  # [parts], float32's bits
    offsets: torch.Tensor  # [parts], of a part's first row

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[PartKey, Part],
        columns: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(module, parts, columns, device, dtype)
        assert isinstance(module, nn.Linear)
        self.parts, self.width = parts, module.in_features
        self.tables, self.first = Tables([(parts, self.width)], columns), 0
        dense = [part.dense(self.width) for part in parts.values()]
        live_buffer(self, "mask", torch.cat([mask for mask, _ in dense]), device, torch.bool)
        live_buffer(self, "means", torch.cat([means for _, means in dense]), device, dtype)
        # As integers, which a model's `.to(dtype)` leaves as they are.
        limits = nn.utils.rnn.pad_sequence([part.limits() for part in parts.values()], True, torch.inf)
        live_buffer(self, "limits", limits.contiguous().view(torch.int32), device, torch.int32)
        blends = torch.tensor([part.blend for part in parts.values()])
        live_buffer(self, "blends", blends.view(torch.int32), device, torch.int32)
        lengths = torch.tensor([len(mask) for mask, _ in dense])
        live_buffer(self, "offsets", lengths.cumsum(0) - lengths, device, torch.int64)

    def acting(self, hidden_states: torch.Tensor, now: Pass) -> torch.Tensor:
        """What acts in this pass: what [`joined`] gives, [1 or B, 2, C]."""
        whole = None
        if not torch.compiler.is_compiling() and not self.factors.gated:
            whole = self.tables.of(now, hidden_states)
        if whole is None:
            return self._joined(hidden_states.device, now)
        return whole[:, self.first : self.first + 2 * self.width].unflatten(1, (2, self.width))

    def forward(self, hidden_states: torch.Tensor, now: Pass) -> torch.Tensor:
        """Patch hidden states [B, ..., C]; the same for every token of a row.

        Raises:
            ErasureInputError: the rows are patched differently, and are others than those of the pass.
        """
        rows = self.factors.for_rows(self.acting(hidden_states, now), now, len(hidden_states))
        shape = (len(rows), *(1,) * (hidden_states.ndim - 2), self.width)
        keep, add = (row.to(hidden_states.dtype).reshape(shape) for row in rows.unbind(1))
        return torch.addcmul(add, hidden_states, keep)

    def _joined(self, device: torch.device, now: Pass) -> torch.Tensor:
        limits, blends = (bits.to(device).view(torch.float32) for bits in (self.limits, self.blends))
        index = self.offsets.to(device)[None]
        if limits.shape[1]:
            index = index + (now.now(device)[:, None, None] > limits).sum(-1)  # [1 or B, parts]
        factors = self.factors.product(now, device)
        factors = blends[None] if factors is None else blends * factors
        return joined(self.mask.to(device)[index] * factors[..., None], self.means.to(device)[index].float())


def _limits(parts: Collection[Part]) -> torch.Tensor:
    """Up to where each interval but the last reaches on which no part changes: float32, inclusive, ascending."""
    return torch.cat([limits for part in parts for limits in (part.limits(), part.scheduled()[1])]).unique()


def join_tables(patches: Iterable[ActivationPatch], columns: Mapping[str, int]) -> None:
    """Let the patches at which the same erasures act have one table."""
    alike: dict[tuple[PartKey, ...], list[ActivationPatch]] = {}
    for patch in patches:
        alike.setdefault(tuple(patch.parts), []).append(patch)
    for own in alike.values():
        tables, first = Tables([(patch.parts, patch.width) for patch in own], columns), 0
        for patch in own:
            patch.tables, patch.first = tables, first
            first += 2 * patch.width


class PatchInput(Place):
    """Forward pre-hook: the module reads patched hidden states."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        edit, now = self.at_work()
        if edit is None:
            return None
        if args:
            return (edit(args[0], now), *args[1:]), kwargs
        return args, {**kwargs, "input": edit(kwargs["input"], now)}


class ActivationLayer(SiteLayer):
    """All `activation` layers on one UNet or transformer."""

    edit: ClassVar[type[SiteEdit]] = ActivationPatch
    by_timestep: ClassVar[bool] = True

    def __init__(self, conditions: Conditions) -> None:
        super().__init__(conditions)
        self.keys: set[PartKey] = set()

    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        module, place = find_site(component, site), PatchInput(self.conditions)
        return module, place, module.register_forward_pre_hook(place, with_kwargs=True)

    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> Part:
        return Part.of(tensors, spec.sites[index], modifier, index)

    def build(self, parts: Any, names: Sequence[str]) -> dict[int, Any]:
        found = super().build(parts, names)
        join_tables(found.values(), {name: column for column, name in enumerate(names)})
        return found

    def attach(
        self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors, modifier: Modifier | None
    ) -> None:
        self.keys.add(key)
        if len(self.keys) == MANY + 1:
            logger.warning(
                "More than %d concepts are erased by activations on one model; their masks join, and the paper reports heavy "
                "damage to all images at ten. Look at what is kept, or use another method for many concepts.",
                MANY,
            )
        super().attach(component, key, spec, tensors, modifier)

    def detach(self, name: str) -> None:
        self.keys = {key for key in self.keys if key[0] != name}
        super().detach(name)


# ------------------------------------------------------------------------------------------------- the artefact side


class PatchChange(WeightChange):
    """W diag(keep), b + W add, for a patch that is the same at all timesteps; several join as their hooks do.

    Args:
        site (`str`), module (`nn.Module`): where.
        part ([`Part`]): of one timestep.
    """

    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    on_input: ClassVar[bool] = True

    def __init__(self, site: str, module: nn.Module, part: Part) -> None:
        super().__init__(site, module)
        self.part = part

    @classmethod
    def applied(
        cls, parameters: Mapping[str, torch.Tensor], changes: Sequence[tuple[float, Self]]
    ) -> dict[str, torch.Tensor]:
        weight, bias = parameters["weight"], parameters["bias"]
        parts = [(strength, change.part) for strength, change in changes]
        keep, add = static_rows(parts, weight.shape[1]).to(weight.device)
        return {"weight": weight * keep, "bias": bias + weight @ add}


class ActivationKind(LayerKind):
    """`timesteps` and `blend`, and for each site a mask and the means of its units."""

    name: ClassVar[str] = "activation"
    live: ClassVar[type[HookLayer]] = ActivationLayer
    packed: ClassVar[bool] = True

    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        if spec.component not in ("unet", "transformer") or spec.file != TENSOR_FILE:
            raise ErasureFileError(f"An `activation` layer acts on a UNet or transformer and lies in {TENSOR_FILE}.")
        odd = [site for site in spec.sites if not _may_act(spec.component, site)]
        if odd:
            known: tuple[str, ...] = (FEED_FORWARD, *ATTENTIONS)
            if spec.component != "unet":
                known = (*JOINT_FEED_FORWARDS, *JOINT_ATTENTIONS, "single_transformer_blocks.N.proj_out")
            raise ErasureFileError(
                f"On a {spec.component} an `activation` layer acts on modules whose names end in {known}, not on {odd[0]!r}."
            )
        expected = {TIMESTEPS, BLEND} | {site + half for site in spec.sites for half in (MASK, MEANS)}
        if set(tensors) != expected:
            strangers = sorted(set(tensors) ^ expected)
            raise ErasureFileError(
                f"{spec.file}: an `activation` layer has {TIMESTEPS!r}, {BLEND!r}, and for each site a mask and means; missing or "
                f"unexpected: {[name[:120] for name in strangers[:3]]}{' …' if len(strangers) > 3 else ''}."
            )
        for name, tensor in tensors.items():
            if (tensor.dtype == torch.uint8) != name.endswith(MASK):
                raise ErasureFileError(f"{spec.file}: {name!r} is {tensor.dtype}; masks, and only they, are uint8.")
        timesteps, blend = tensors[TIMESTEPS], tensors[BLEND]
        steps = timesteps.double().diff()
        if (
            timesteps.ndim != 1
            or not 0 < len(timesteps) <= MAX_TIMESTEPS
            or bool((timesteps < 0).any())
            or not (bool((steps > 0).all()) or bool((steps < 0).all()))
        ):
            raise ErasureFileError(
                f"{spec.file}: {TIMESTEPS!r} must be 1 to {MAX_TIMESTEPS} numbers of at least 0 that only rise or only fall."
            )
        if tuple(blend.shape) != (1,) or not float(blend) >= 0:
            raise ErasureFileError(f"{spec.file}: {BLEND!r} must be one number of at least 0.")
        for site in spec.sites:
            mask, means = tensors[site + MASK], tensors[site + MEANS]
            count = int(_set_bits(mask).sum()) if mask.ndim == 2 and len(mask) == len(timesteps) else 0
            if not count or tuple(means.shape) != (count,):
                raise ErasureFileError(
                    f"{spec.file}: {site!r} has a mask of the shape {tuple(mask.shape)} with {count} units, and means of the shape "
                    f"{tuple(means.shape)}; expected [{len(timesteps)}, ceil(units / 8)], and one mean for each unit that is set."
                )

    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        return {**tensors, BLEND: tensors[BLEND] * factor}

    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        for site in spec.sites:
            module, mask = find_site(component, site), tensors[site + MASK]
            if not isinstance(module, nn.Linear):
                raise ErasureCompatibilityError(f"{site!r} is a {type(module).__name__}; expected a Linear.")
            width = module.in_features
            beyond = _set_bits(mask)[:, width:]
            if mask.shape[1] != -(-width // 8) or bool(beyond.any()):
                raise ErasureCompatibilityError(
                    f"{site!r} reads {width} units in this pipeline, but the erasure's mask has {mask.shape[1]} bytes a timestep, or "
                    "bits beyond them: it was made for another architecture, or is damaged."
                )

    def weight_changes(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Sequence[WeightChange]:
        if len(tensors[TIMESTEPS]) > 1:
            raise ErasureCompatibilityError(
                "An `activation` layer that acts by timestep is no change of weights, so it cannot be fused. Leave the erasure "
                "unfused, or make one that is the same at all timesteps (method `acterase`: `by_timestep=False`)."
            )
        modules = {site: find_site(component, site) for site in spec.sites}
        bare = [site for site, module in modules.items() if module.bias is None]
        if bare:
            raise ErasureCompatibilityError(f"{bare[0]!r} has no bias, so patches of its input cannot be fused there.")
        return [PatchChange(site, module, Part.of(tensors, site)) for site, module in modules.items()]

    def reads(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Collection[Any] | None:
        return {find_site(component, site) for site in spec.sites}
