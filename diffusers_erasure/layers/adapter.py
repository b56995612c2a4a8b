"""Layer kind `adapter`: a bottleneck behind an attention, which adds to what the attention gives (Receler's eraser).

A hook on the attention adds, for every token of the image alike,

    a <- a + sum_i w_i (U_i gelu(D_i a + d_i) + u_i),    w_i = strength_i * schedule_i * gate_i

with D [r, C], d [r], U [C, r] and u [C] of each erasure i. In UNets it is the cross-attention, in transformers the attention of text and
image together where text has projections of its own, of which the image's part is read. All erasures at a site share one hook; their
bottlenecks are side by side.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureFileError, ErasureInputError
from ..schema import TENSOR_FILE, LayerSpec
from .base import HookLayer
from .buffers import PartKey, Tensors, live_buffer
from .kind import LayerKind, Summand
from .layer import Layer
from .modifiers import Modifier, hold_owner, spread
from .passing import Pass
from .sites import Place, SiteEdit, SiteLayer, find_module


DOWN, DOWN_BIAS, UP, UP_BIAS = ".down.weight", ".down.bias", ".up.weight", ".up.bias"
PARTS = (DOWN, DOWN_BIAS, UP, UP_BIAS)
CROSS, JOINT, DUAL = ".attn2", ".attn", "transformer_blocks."
MAX_RANK = 4096


def may_act(component: str, site: str) -> bool:
    """Whether a site is a cross-attention of a UNet, or a joint attention in which text has projections of its own."""
    if component == "unet":
        return site.endswith(CROSS)
    return site.startswith(DUAL) and site.endswith(JOINT)


def attentions(component: str, model: nn.Module) -> list[str]:
    """All sites of a denoiser, in its order. Among them are attentions of transformers only where text has projections of its own."""
    model = compat.unwrap_compiled(model)
    return [
        name
        for name, module in model.named_modules()
        if may_act(component, name)
        and "erasure_modules" not in name
        and (component == "unet" or getattr(module, "add_k_proj", None) is not None)
    ]


def width_of(component: nn.Module, site: str) -> int:
    """How many values a token has behind an attention.

    Raises:
        ErasureCompatibilityError: there is no such attention.
    """
    module = find_module(component, site)
    out = getattr(module, "to_out", None)
    last = compat.base_layer(out[0]) if isinstance(out, nn.ModuleList) and len(out) else None
    if not isinstance(last, nn.Linear):
        raise ErasureCompatibilityError(
            f"{site!r} is a {type(module).__name__}; an `adapter` stands behind an attention."
        )
    return last.out_features


def bottleneck(
    hidden_states: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor
) -> torch.Tensor:
    """What one adapter adds to [..., C]."""
    return F.linear(F.gelu(F.linear(hidden_states, down, down_bias)), up, up_bias)


# ---------------------------------------------------------------------------------------------------- the live side


@dataclass(frozen=True)
class Bottleneck:
    """One layer of one erasure at one site: its tensors by [`PARTS`], its schedule and gate, and the site's place in the layer."""

    tensors: Mapping[str, torch.Tensor]
    modifier: Modifier | None
    index: int


class Bottlenecks(SiteEdit):
    """Those of some erasures behind one attention."""

    down: torch.Tensor  # [R, C]
    down_bias: torch.Tensor  # [R]
    up: torch.Tensor  # [C, R]
    up_bias: torch.Tensor  # [parts, C]
    owner: torch.Tensor | None  # the part of each rank, [R]

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[PartKey, Bottleneck],
        columns: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(module, parts, columns, device, dtype)
        own = [part.tensors for part in parts.values()]
        hold_owner(self, [len(each[DOWN]) for each in own], device)
        live_buffer(self, "down", torch.cat([each[DOWN] for each in own]), device, dtype)
        live_buffer(self, "down_bias", torch.cat([each[DOWN_BIAS] for each in own]), device, dtype)
        live_buffer(self, "up", torch.cat([each[UP] for each in own], 1), device, dtype)
        live_buffer(self, "up_bias", torch.stack([each[UP_BIAS] for each in own]), device, dtype)

    def forward(self, hidden_states: torch.Tensor, now: Pass) -> torch.Tensor:
        """What the attention gave [B, ..., C], and what is added to it."""
        names = ("down", "down_bias", "up", "up_bias")
        like = hidden_states.device, hidden_states.dtype
        down, down_bias, up, up_bias = (getattr(self, name).to(*like) for name in names)
        reduced = F.gelu(F.linear(hidden_states, down, down_bias))
        factors = self.factors(now, hidden_states.device, len(hidden_states), hidden_states.dtype)
        if factors is None:
            return hidden_states + F.linear(reduced, up, up_bias.sum(0))
        reduced = reduced * spread(factors, self.owner, reduced.ndim, -1)
        bias = factors @ up_bias  # [1 or B, C]
        return hidden_states + F.linear(reduced, up) + bias.reshape(len(bias), *(1,) * (reduced.ndim - 2), -1)


class AddBottleneck(Place):
    """Forward hook on an attention: of several outputs the first, the image's, is changed."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        edit, now = self.at_work()
        if edit is None:
            return None
        if isinstance(output, tuple):
            return (edit(output[0], now), *output[1:])
        return edit(output, now)


class AdapterLayer(SiteLayer):
    """All `adapter` layers on one denoiser."""

    edit: ClassVar[type[SiteEdit]] = Bottlenecks

    def hook(self, component: nn.Module, site: str) -> tuple[nn.Module, Place, torch.utils.hooks.RemovableHandle]:
        module, place = find_module(component, site), AddBottleneck(self.conditions)
        return module, place, module.register_forward_hook(place, with_kwargs=True)

    def part(self, spec: LayerSpec, tensors: Tensors, index: int, modifier: Modifier | None) -> Bottleneck:
        site = spec.sites[index]
        return Bottleneck({name: tensors[site + name] for name in PARTS}, modifier, index)


# ------------------------------------------------------------------------------------------------- the artefact side


class AdapterKind(LayerKind):
    """For each site `….down.weight` [r, C], `….down.bias` [r], `….up.weight` [C, r] and `….up.bias` [C]."""

    name: ClassVar[str] = "adapter"
    live: ClassVar[type[HookLayer]] = AdapterLayer

    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        if spec.component not in ("unet", "transformer") or spec.file != TENSOR_FILE:
            raise ErasureFileError(f"An `adapter` layer acts on a UNet or transformer and lies in {TENSOR_FILE}.")
        odd = [site for site in spec.sites if not may_act(spec.component, site)]
        if odd:
            known = f"…{CROSS}" if spec.component == "unet" else f"{DUAL}N{JOINT}"
            raise ErasureFileError(f"On a {spec.component} an `adapter` layer acts on {known}, not on {odd[0]!r}.")
        expected = {site + name for site in spec.sites for name in PARTS}
        if set(tensors) != expected:
            strangers = sorted(set(tensors) ^ expected)
            raise ErasureFileError(
                f"{spec.file}: an `adapter` layer has {', '.join(name[1:] for name in PARTS)} for each site; missing or unexpected: "
                f"{[name[:120] for name in strangers[:3]]}{' …' if len(strangers) > 3 else ''}."
            )
        for site in spec.sites:
            shapes = [tuple(tensors[site + name].shape) for name in PARTS]
            rank, width = shapes[0] if len(shapes[0]) == 2 else (0, 0)
            if shapes != [(rank, width), (rank,), (width, rank), (width,)] or not 0 < rank <= MAX_RANK:
                raise ErasureFileError(
                    f"{spec.file}: {site!r} has tensors of the shapes {shapes}; expected [r, C], [r], [C, r] and [C] with r from 1 to "
                    f"{MAX_RANK}."
                )

    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        return {name: value * factor if name.endswith((UP, UP_BIAS)) else value for name, value in tensors.items()}

    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        for site in spec.sites:
            expected, found = width_of(component, site), tensors[site + DOWN].shape[1]
            if expected != found:
                raise ErasureCompatibilityError(
                    f"{site!r} gives {expected} values a token in this pipeline, but the erasure's adapter reads {found}: it was made for "
                    "another architecture."
                )

    def reads(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Collection[Any] | None:
        return ()  # what an attention gives, fused or not

    def summed(
        self, members: Sequence[Summand], rank: int | None, max_error: float | None
    ) -> list[tuple[Layer, float]]:
        """Side by side on rank, site by site: exact, as each reads what the attention gives and not what another adds."""
        if rank is not None or max_error is not None:
            raise ErasureInputError(
                "`adapter` layers are not linear and cannot be truncated: leave `rank` and `max_error` out."
            )
        found = []
        for component in dict.fromkeys(member.spec.component for member in members):
            own = [member for member in members if member.spec.component == component]
            sites = tuple(dict.fromkeys(site for member in own for site in member.spec.sites))
            tensors: dict[str, torch.Tensor] = {}
            for site in sites:
                there = [member.tensors for member in own if site in member.spec.sites]
                tensors[site + DOWN] = torch.cat([each[site + DOWN].float() for each in there])
                tensors[site + DOWN_BIAS] = torch.cat([each[site + DOWN_BIAS].float() for each in there])
                tensors[site + UP] = torch.cat([each[site + UP].float() for each in there], 1)
                tensors[site + UP_BIAS] = torch.stack([each[site + UP_BIAS].float() for each in there]).sum(0)
            origins = {name for member in own for name in member.spec.derived_from}
            layer = Layer(self.name, sites, tensors, component, tuple(sorted(origins)))
            found.append((layer, max(member.error for member in own)))
        return found
