"""Layer kind `lora`: a low-rank delta on `Linear` and `Conv2d` modules, added by a hook on the base module.

The hook sits on the module itself, below whatever peft wraps around it, and adds `up(down(x))` to its output. It never
reads the module's own weight, which may be offloaded or quantised. All erasures on a module share one hook: their
factors are concatenated on rank, with the strengths folded into the `down` half, so that a tenth erasure costs rank and
no further kernels, and strength 0 multiplies the input by zeros: the base, bit for bit.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureFileError
from ..low_rank import DOWN, UP
from ..schema import LORA_FILE, LayerSpec
from .base import Layer, PartKey, Tensors, live_buffer, placement, set_buffer
from .modifiers import Conditions, Factors, Modifier, spread


MAX_RANK = 4096


class LowRankDelta(nn.Module):
    """The live factors of all erasures on one module: `down` [R, in] (or [R, in, kh, kw]) and `up` [out, R]."""

    down: torch.Tensor
    up: torch.Tensor
    owner: torch.Tensor  # the part of each rank, [R]

    def __init__(self, module: nn.Module, conditions: Conditions) -> None:
        super().__init__()
        self.factors = Factors(conditions)
        self.convolution: dict[str, Any] | None = None
        if isinstance(module, nn.Conv2d):
            self.convolution = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        self.parts: dict[PartKey, tuple[torch.Tensor, torch.Tensor]] = {}
        self.modified: dict[PartKey, tuple[Modifier | None, int]] = {}

    def rebuild(self, device: torch.device, dtype: torch.dtype) -> None:
        """Concatenate the factors of all parts; the strengths are 0 until `fold`."""
        downs, ups = zip(*self.parts.values(), strict=True)
        self.modified = {key: self.modified[key] for key in self.parts}
        self.factors.rebuild(list(self.modified.values()), device)
        if self.factors.acts:
            owner = torch.cat([torch.full((len(down),), part) for part, down in enumerate(downs)])
            live_buffer(self, "owner", owner, device, torch.int64)
        live_buffer(self, "down", torch.zeros_like(torch.cat(downs)), device, dtype)
        live_buffer(self, "up", torch.cat(ups, dim=1), device, dtype)

    def fold(self, strengths: Mapping[str, float]) -> None:
        parts = [down.float() * strengths[name] for (name, _), (down, _) in self.parts.items()]
        set_buffer(self.down, torch.cat(parts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        down = self.down.to(hidden_states.device, hidden_states.dtype)
        up = self.up.to(hidden_states.device, hidden_states.dtype)
        if self.convolution is None:
            return F.linear(self._modified(F.linear(hidden_states, down), -1), up)
        return F.conv2d(self._modified(F.conv2d(hidden_states, down, **self.convolution), 1), up)

    def _modified(self, reduced: torch.Tensor, dim: int) -> torch.Tensor:
        factors = self.factors(reduced.device)
        if factors is None:
            return reduced
        owner = self.owner.to(reduced.device)
        return reduced * spread(factors, owner, reduced.ndim, dim).to(reduced.dtype)


class AddDelta:
    """Forward hook: output + delta(input). A class and no closure, so that models stay picklable."""

    def __init__(self, delta: LowRankDelta) -> None:
        self.delta = delta

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden_states = args[0] if args else kwargs["input"]
        return output + self.delta(hidden_states).to(output.dtype)


def find_site(component: nn.Module, site: str) -> nn.Module:
    """Return the base module named `site`, below any peft wrapper.

    CLIP's text encoder lost its level `text_model` in transformers 5; files name it, so both forms are found.

    Raises:
        ErasureCompatibilityError: the component has no such `Linear` or `Conv2d`.
    """
    component = compat.unwrap_compiled(component)
    for name in (site, site.removeprefix("text_model."), f"text_model.{site}"):
        try:
            module = compat.base_layer(component.get_submodule(name))
        except AttributeError:
            continue
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            return module
        raise ErasureCompatibilityError(
            f"{site!r} is a {type(module).__name__}; a `lora` layer acts on Linear and on Conv2d with one group."
        )
    raise ErasureCompatibilityError(
        f"{type(component).__name__} has no module {site!r}: the erasure was made for another architecture."
    )


class LoraLayer(Layer):
    """All `lora` layers on one component."""

    kind: ClassVar[str] = "lora"
    file: ClassVar[str] = LORA_FILE

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, int] = {}  # name of a site -> its index in `deltas`: names there must have no dots
        self.deltas = nn.ModuleDict()
        self.handles: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self.modules_hooked: dict[str, tuple[nn.Module, ...]] = {}
        self.attentions: dict[str, nn.Module] = {}
        self.count = 0

    @classmethod
    def prefix(cls, component: str, sites: tuple[str, ...]) -> str:
        return f"{component}."

    @classmethod
    def validate(cls, spec: LayerSpec, tensors: Tensors) -> None:
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

    @classmethod
    def rescaled(cls, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        return {name: tensor * factor if name.endswith(UP) else tensor for name, tensor in tensors.items()}

    @classmethod
    def check(cls, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        for site in spec.sites:
            module = find_site(component, site)
            down, up = tensors[site + DOWN], tensors[site + UP]
            if isinstance(module, nn.Conv2d):
                expected = ((module.in_channels, *module.kernel_size), module.out_channels)
                plain = module.padding_mode == "zeros"
            else:
                assert isinstance(module, nn.Linear)
                expected, plain = ((module.in_features,), module.out_features), True
            if (tuple(down.shape[1:]), up.shape[0]) != expected or not plain:
                raise ErasureCompatibilityError(
                    f"{site!r} maps {expected[0]} to {expected[1]} in this pipeline, but the erasure's factors have "
                    f"shapes {tuple(down.shape)} and {tuple(up.shape)}: it was made for another architecture."
                )
            attention = attention_of(component, site)
            if compat.has_fused_projections(attention):
                raise ErasureCompatibilityError(_FUSED.format(site=site))

    def attach(self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors) -> None:
        for index, site in enumerate(spec.sites):
            module = find_site(component, site)
            if site not in self.sites:
                delta = LowRankDelta(module, self.conditions)
                self.handles[site] = module.register_forward_hook(AddDelta(delta), with_kwargs=True)
                self.sites[site] = self.count
                self.deltas[str(self.count)] = delta
                # A tuple, because a module assigned to a module would become its child.
                self.modules_hooked[site] = (component, module)
                self.count += 1
                attention = attention_of(component, site)
                if hasattr(attention, "fused_projections"):
                    self.attentions[site] = attention
            delta = self._delta(site)
            delta.parts[key] = (tensors[site + DOWN], tensors[site + UP])
            delta.modified[key] = (self.modifier_of(key), index)
            delta.rebuild(*placement(component, module))

    def detach(self, name: str) -> None:
        for site in list(self.sites):
            delta = self._delta(site)
            kept = {key: part for key, part in delta.parts.items() if key[0] != name}
            if len(kept) == len(delta.parts):
                continue
            delta.parts = kept
            if kept:
                delta.rebuild(*placement(*self.modules_hooked[site]))
            else:
                self.handles.pop(site).remove()
                self.modules_hooked.pop(site)
                self.attentions.pop(site, None)
                del self.deltas[str(self.sites.pop(site))]

    def fold(self, strengths: Mapping[str, float]) -> None:
        for site in self.sites:
            self._delta(site).fold(strengths)

    def is_empty(self) -> bool:
        return not self.sites

    def inactive_reason(self) -> str | None:
        for site, attention in self.attentions.items():
            if compat.has_fused_projections(attention):  # to_q, to_k and to_v are not called: hooks never fire
                return _FUSED.format(site=site)
        return None

    def _delta(self, site: str) -> LowRankDelta:
        delta = self.deltas[str(self.sites[site])]
        assert isinstance(delta, LowRankDelta)
        return delta


_FUSED = (
    "The attention projections around {site!r} are fused, so that module is not called and an erasure on it would not "
    "act. Call `pipe.unfuse_qkv_projections()` first."
)


def attention_of(component: nn.Module, site: str) -> nn.Module:
    """Return the module around a site: an attention for its projections, the component where there is none."""
    parent = site.rpartition(".")[0]
    component = compat.unwrap_compiled(component)
    for name in (parent, parent.removeprefix("text_model."), f"text_model.{parent}"):
        try:
            return component.get_submodule(name)
        except AttributeError:
            continue
    return component
