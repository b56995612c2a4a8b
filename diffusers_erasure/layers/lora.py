"""Layer kind `lora`: a low-rank delta on `Linear` and `Conv2d` modules, added by a hook on the base module.

The hook sits on the module itself, below whatever peft wraps around it, and adds `up(down(x))` to its output. It never
reads the module's own weight, which may be offloaded or quantised. All erasures on a module share one hook: their
factors are concatenated on rank, so that a tenth erasure costs rank and no further kernels. Strengths, which may be those of one
request, multiply what `down` gives. An erasure whose strength is 0 is left out of the pass: the base, bit for bit.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat, low_rank
from ..errors import ErasureCompatibilityError, ErasureFileError
from ..families import DENOISERS
from ..low_rank import DOWN, UP, balanced, heaviest, norm_without, pad_rank, svd
from ..schema import LORA_FILE, LayerSpec
from .base import HookLayer
from .buffers import PartKey, Tensors, live_buffer
from .changes import WeightChange, double
from .kind import LayerKind, Summand
from .layer import Layer
from .modifiers import Conditions, Factors, Modifier, RankScales, hold_owner, spread
from .passing import Pass, kept_for
from .sites import Place, Site, SiteEdit, SiteLayer, attention_of, find_site, next_number


MAX_RANK = 4096
_CROSS = (".attn2.to_k", ".attn2.to_v")  # keys and values of text in cross-attentions


def reads_rows(component: nn.Module, site: str) -> bool:
    """Whether a module reads the text rows as the denoiser is given them, or as all modules of its kind do in a pass.

    So does a door without a norm, and each cross-attention. Keys and values of joint attentions read what the blocks before
    have made of the rows, and the image; `attn2` of SD3.5 medium reads the image alone.
    """
    families = DENOISERS.get(type(compat.unwrap_compiled(component)).__name__, ())
    if not families:
        return site.endswith(_CROSS)
    cross = any(name in _CROSS for family in families for name in family.text_sites)
    return (cross and site.endswith(_CROSS)) or any(site == family.door and family.norm is None for family in families)


# ---------------------------------------------------------------------------------------------------- the live side


@dataclass(frozen=True)
class LowRankPart:
    """One layer of one erasure at one site: its factors, its schedule and gate, and the site's place in the layer."""

    down: torch.Tensor
    up: torch.Tensor
    modifier: Modifier | None
    index: int


class LowRankDelta(SiteEdit):
    """The factors of some erasures on one module: `down` [R, in] (or [R, in, kh, kw]) and `up` [out, R]."""

    down: torch.Tensor
    up: torch.Tensor
    owner: torch.Tensor | None  # the part of each rank, [R]

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[PartKey, LowRankPart],
        columns: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(module, parts, columns, device, dtype)
        self.convolution: dict[str, Any] | None = None
        if isinstance(module, nn.Conv2d):
            self.convolution = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        hold_owner(self, [len(part.down) for part in parts.values()], device)
        live_buffer(self, "down", torch.cat([part.down for part in parts.values()]), device, dtype)
        live_buffer(self, "up", torch.cat([part.up for part in parts.values()], dim=1), device, dtype)
        # Where the module reads text rows. A tuple, because a module assigned to a module would become its child.
        self.text: tuple[TextProduct, int] | None = None

    def forward(self, output: torch.Tensor, hidden_states: torch.Tensor, now: Pass) -> torch.Tensor:
        up = self.up.to(hidden_states.device, hidden_states.dtype)
        if self.convolution is not None:
            down = self.down.to(hidden_states.device, hidden_states.dtype)
            reduced = self._scaled(F.conv2d(hidden_states, down, **self.convolution), 1, now)
            return output + F.conv2d(reduced, up).to(output.dtype)
        reduced = self._reduced(hidden_states, now)
        if reduced.dtype != output.dtype or len(reduced) != len(output):
            return output + F.linear(reduced, up).to(output.dtype)
        flat = torch.addmm(output.flatten(0, -2), reduced.flatten(0, -2), up.to(output.dtype).T)
        return flat.view(output.shape)

    def _reduced(self, hidden_states: torch.Tensor, now: Pass) -> torch.Tensor:
        """What the factors `down` make of the input, times strengths, schedules and gates: [B, ..., R]."""
        # In a graph each module for itself: its place in the product would keep alike blocks from sharing one.
        if self.text is not None and not torch.compiler.is_compiling():
            product, first = self.text
            whole = product.of(hidden_states, now)
            if whole is not None:
                return whole[..., first : first + len(self.down)]
        down = self.down.to(hidden_states.device, hidden_states.dtype)
        return self._scaled(F.linear(hidden_states, down), -1, now)

    def _scaled(self, reduced: torch.Tensor, dim: int, now: Pass) -> torch.Tensor:
        factors = self.factors(now, reduced.device, len(reduced), reduced.dtype)
        if factors is None:
            return reduced
        return reduced * spread(factors, self.owner, reduced.ndim, dim)


class TextProduct(nn.Module):
    """What the factors `down` of all modules that read text rows make of these: one product for a pass, or for a run.

    Args:
        edits (sequence of [`LowRankDelta`]): of the modules, without schedules and gates.
        parts (sequence): of each edit its parts.
        columns (`dict`): as of [`SiteEdit`].
        device (`torch.device`), dtype (`torch.dtype`): of its tensors.
    """

    down: torch.Tensor  # [R of all, C]

    def __init__(
        self,
        edits: Sequence[LowRankDelta],
        parts: Sequence[Mapping[PartKey, LowRankPart]],
        columns: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.factors = Factors([(None, 0, column) for column in columns.values()], device)
        every = [(columns[name], part.down) for each in parts for (name, _), part in each.items()]
        live_buffer(self, "down", torch.cat([down for _, down in every]), device, dtype)
        self.scales = RankScales([column for column, down in every for _ in range(len(down))], device)
        first = 0
        for edit in edits:
            edit.text = self, first
            first += len(edit.down)

    def of(self, rows: torch.Tensor, now: Pass) -> torch.Tensor | None:
        """The product [B, ..., R of all], times the strengths; `None` where these are not the first rows of the pass.

        Others, such as those that a module has normalised for itself, are left to it.
        """
        if now.rows is None:
            now.rows = rows
        if now.rows is not rows or torch.is_grad_enabled():  # with gradients it would be made again for each module
            return None
        return kept_for(now, self, rows, lambda: self(rows, now))

    def forward(self, rows: torch.Tensor, now: Pass) -> torch.Tensor:
        reduced = F.linear(rows, self.down.to(rows.device, rows.dtype))
        return reduced if now.ones else reduced * self.factors.for_rows(self.scales(now, reduced), now, len(rows))


class AddDelta(Place):
    """Forward hook: output + delta(input)."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        edit, now = self.at_work()
        if edit is None:
            return None
        return edit(output, args[0] if args else kwargs["input"], now)


class LoraLayer(SiteLayer):
    """All `lora` layers on one component."""

    edit: ClassVar[type[SiteEdit]] = LowRankDelta

    def __init__(self, conditions: Conditions) -> None:
        super().__init__(conditions)
        self.attentions: dict[str, nn.Module] = {}  # of the sites that are projections
        self.number = next_number()  # of the product of all that read text rows

    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        module, place = find_site(component, site), AddDelta(self.conditions)
        return module, place, module.register_forward_hook(place, with_kwargs=True)

    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> LowRankPart:
        site = spec.sites[index]
        return LowRankPart(tensors[site + DOWN], tensors[site + UP], modifier, index)

    def build(self, parts: Any, names: Sequence[str]) -> dict[int, Any]:
        found = super().build(parts, names)
        columns = {name: column for column, name in enumerate(names)}
        readers: list[tuple[Site, LowRankDelta, dict[PartKey, LowRankPart]]] = []
        for name, (site, own) in parts.items():
            edit = found.get(site.place.number)
            if edit is not None and not edit.factors.modified and reads_rows(site.component, name):
                readers.append((site, edit, {key: part for key, part in own.items() if key[0] in columns}))
        if readers and len({edit.down.shape[1] for _, edit, _ in readers}) == 1:
            device, dtype = self.placement(readers[0][0].component, readers[0][0].module)
            whole = TextProduct([e for _, e, _ in readers], [p for *_, p in readers], columns, device, dtype)
            found[self.number] = whole
        return found

    def attach(
        self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors, modifier: Modifier | None
    ) -> None:
        super().attach(component, key, spec, tensors, modifier)
        around = {site: attention_of(component, site) for site in spec.sites}
        self.attentions.update({site: each for site, each in around.items() if hasattr(each, "fused_projections")})

    def tidy(self) -> None:
        super().tidy()
        self.attentions = {site: each for site, each in self.attentions.items() if site in self.sites}

    def inactive_reason(self) -> str | None:
        for site, attention in self.attentions.items():
            if compat.has_fused_projections(attention):  # to_q, to_k and to_v are not called: hooks never fire
                return _FUSED.format(site=site)
        return None


_FUSED = (
    "The attention projections around {site!r} are fused, so that module is not called and an erasure on it would not "
    "act. Call `pipe.unfuse_qkv_projections()` first."
)


# ------------------------------------------------------------------------------------------------- the artefact side


class LowRankChange(WeightChange):
    """W + s B A.

    Args:
        site (`str`), module (`nn.Module`): where.
        down (`torch.Tensor`), up (`torch.Tensor`): A and B.
    """

    def __init__(self, site: str, module: nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__(site, module)
        self.down, self.up = down, up

    @classmethod
    def applied(
        cls, parameters: Mapping[str, torch.Tensor], changes: Sequence[tuple[float, Self]]
    ) -> dict[str, torch.Tensor]:
        weight = parameters["weight"]
        for strength, change in changes:
            delta = double(change.up, weight).flatten(1) @ double(change.down, weight).flatten(1)
            weight = weight + strength * delta.reshape(weight.shape)
        return {"weight": weight}

    def factors(self) -> low_rank.Factors:
        return self.down.double(), self.up.double()

    def values(self, name: str, positions: list[int]) -> torch.Tensor | None:
        if name != "weight":
            return None
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        rows, columns = [p // down.shape[1] for p in positions], [p % down.shape[1] for p in positions]
        return (up[rows] * down[:, columns].T).sum(1)


class LoraKind(LayerKind):
    """Factors `….lora_A.weight` and `….lora_B.weight` for each site, of one rank, under the names that peft reads."""

    name: ClassVar[str] = "lora"
    live: ClassVar[type[HookLayer]] = LoraLayer
    file: ClassVar[str] = LORA_FILE

    def prefix(self, component: str, sites: Sequence[str]) -> str:
        return f"{component}."

    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        expected = {site + half for site in spec.sites for half in (DOWN, UP)}
        if set(tensors) != expected:
            odd = sorted(set(tensors) ^ expected)
            raise ErasureFileError(
                f"{spec.file}: expected two tensors for each of the {len(spec.sites)} sites; missing or unexpected: "
                f"{[name[:120] for name in odd[:3]]}{' …' if len(odd) > 3 else ''}."
            )
        rank = tensors[spec.sites[0] + DOWN].shape[0]
        for site in spec.sites:
            down, up = tensors[site + DOWN], tensors[site + UP]
            shaped = (down.ndim == up.ndim == 2) or (down.ndim == up.ndim == 4 and up.shape[2:] == (1, 1))
            if not shaped or down.shape[0] != rank or up.shape[1] != rank or not 0 < rank <= MAX_RANK:
                raise ErasureFileError(
                    f"{spec.file}: {site!r} has factors of shapes {tuple(down.shape)} and {tuple(up.shape)}; expected "
                    f"[r, in] and [out, r] (convolutions: [r, in, h, w] and [out, r, 1, 1]) with one r from 1 to "
                    f"{MAX_RANK} for all sites."
                )

    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        return {name: tensor * factor if name.endswith(UP) else tensor for name, tensor in tensors.items()}

    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        check_factors(component, self.lora(spec, tensors))

    def weight_changes(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Sequence[WeightChange]:
        factors = self.lora(spec, tensors)
        return [LowRankChange(site, find_site(component, site), *factors[site]) for site in spec.sites]

    def reads(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Collection[Any] | None:
        return {find_site(component, site) for site in spec.sites}

    def lora(self, spec: LayerSpec, tensors: Tensors) -> dict[str, low_rank.Factors]:
        return {site: (tensors[site + DOWN], tensors[site + UP]) for site in spec.sites}

    def summed(
        self, members: Sequence[Summand], rank: int | None, max_error: float | None
    ) -> list[tuple[Layer, float]]:
        by_component: dict[str, list[Summand]] = {}
        for member in members:
            by_component.setdefault(member.spec.component, []).append(member)
        return [self._summed(component, own, rank, max_error) for component, own in by_component.items()]

    def _summed(
        self, component: str, members: Sequence[Summand], rank: int | None, max_error: float | None
    ) -> tuple[Layer, float]:
        """Concatenate factors on rank, site by site; the error is the largest over the sites."""
        own: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
        for member in members:
            for site, (down, up) in self.lora(member.spec, member.tensors).items():
                own.setdefault(site, []).append((down, up, member.error))
        found: dict[str, low_rank.Factors] = {}
        worst = 0.0
        for site, factors in own.items():
            a = torch.cat([down for down, _, _ in factors]).double()
            b = torch.cat([up for _, up, _ in factors], dim=1).double()
            norm = low_rank.norm(a, b)
            lost = sum(stated * low_rank.norm(down.double(), up.double()) for down, up, stated in factors)
            if rank is not None or max_error is not None:
                u, s, vh = svd(b.flatten(1), a.flatten(1))
                kept = heaviest(s, vh, rank, max_error)
                lost += norm_without(s, kept)
                small = balanced(vh[kept], u[:, kept] * s[kept])
                a, b = small[0].reshape(-1, *a.shape[1:]), small[1].reshape(b.shape[0], -1, *b.shape[2:])
            worst = max(worst, lost / norm if norm else 0.0)
            found[site] = a.float(), b.float()
        full = max(len(a) for a, _ in found.values())
        tensors = {}
        for site, (a, b) in found.items():
            tensors[site + DOWN], tensors[site + UP] = pad_rank(a, full, 0), pad_rank(b, full, 1)
        origins = {name for member in members for name in member.spec.derived_from}
        return Layer(self.name, tuple(found), tensors, component, tuple(sorted(origins))), worst


def check_factors(component: nn.Module, factors: Mapping[str, low_rank.Factors]) -> None:
    """Check that factors fit the modules of a live component, each by its site.

    Raises:
        ErasureCompatibilityError: a site is missing, is of another type, or has another shape.
    """
    for site, (down, up) in factors.items():
        module = find_site(component, site)
        expected: tuple[tuple[int, ...], int]
        if isinstance(module, nn.Conv2d):
            expected = ((module.in_channels, *module.kernel_size), module.out_channels)
            plain = module.padding_mode == "zeros"
        else:
            expected, plain = ((module.in_features,), module.out_features), True
        if (tuple(down.shape[1:]), up.shape[0]) != expected or not plain:
            raise ErasureCompatibilityError(
                f"{site!r} maps {expected[0]} to {expected[1]} in this pipeline, but the erasure's factors have "
                f"shapes {tuple(down.shape)} and {tuple(up.shape)}: it was made for another architecture."
            )
        if compat.has_fused_projections(attention_of(component, site)):
            raise ErasureCompatibilityError(_FUSED.format(site=site))
