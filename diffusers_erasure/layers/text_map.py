"""Layer kind `text_map`: a low-rank linear map on a text input of the denoiser, by a pre-hook on the denoiser.

`x <- x + sum_i s_i (x A_i^T) D_i` for rows `x` of `encoder_hidden_states` (or of the pooled text vector): every map
adds from the unmapped input, so the order of loading does not matter. Where all readers of that input are linear,
this equals a LoRA `W (T - I)` on each of them (the form in which UCE is published); with a user's LoRA `U` on the same
Linear the two differ: the map gives `(W + U) T`, the LoRA `W T + U`.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureFileError
from ..schema import LayerSpec
from .base import Layer, PartKey, Tensors, live_buffer, placement, set_buffer
from .modifiers import Conditions, Factors, Modifier, spread


# Name of the input -> (the argument of `forward`, a key inside it, the entry of the model's config with its width).
INPUTS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "encoder_hidden_states": ("encoder_hidden_states", None, ("cross_attention_dim", "joint_attention_dim")),
    "pooled_projections": ("pooled_projections", None, ("pooled_projection_dim",)),
    "text_embeds": ("added_cond_kwargs", "text_embeds", ()),
}


class TextMap(nn.Module):
    """The live maps of all erasures on one input: `read` [R, C] (A, times strength) and `write` [R, C] (D)."""

    read: torch.Tensor
    write: torch.Tensor
    owner: torch.Tensor  # the part of each row, [R]

    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        self.factors = Factors(conditions)
        self.parts: dict[PartKey, tuple[torch.Tensor, torch.Tensor]] = {}
        self.modified: dict[PartKey, Modifier | None] = {}

    def rebuild(self, device: torch.device, dtype: torch.dtype) -> None:
        reads, writes = zip(*self.parts.values(), strict=True)
        self.modified = {key: self.modified[key] for key in self.parts}
        self.factors.rebuild([(modifier, 0) for modifier in self.modified.values()], device)
        if self.factors.acts:
            owner = torch.cat([torch.full((len(read),), part) for part, read in enumerate(reads)])
            live_buffer(self, "owner", owner, device, torch.int64)
        live_buffer(self, "read", torch.zeros_like(torch.cat(reads)), device, dtype)
        live_buffer(self, "write", torch.cat(writes), device, dtype)

    def fold(self, strengths: Mapping[str, float]) -> None:
        parts = [read.float() * strengths[name] for (name, _), (read, _) in self.parts.items()]
        set_buffer(self.read, torch.cat(parts))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        # The hook on the denoiser fires before offload brings these buffers over, hence `to`.
        read, write = self.read.to(rows.device, rows.dtype), self.write.to(rows.device, rows.dtype)
        reduced, factors = F.linear(rows, read), self.factors(rows.device)
        if factors is not None:
            owner = self.owner.to(rows.device)
            reduced = reduced * spread(factors, owner, reduced.ndim, -1).to(reduced.dtype)
        return rows + F.linear(reduced, write.T)


class MapInput:
    """Forward pre-hook of the denoiser: maps one of its inputs, which stays where it was given."""

    def __init__(self, text_map: TextMap, name: str, component: nn.Module) -> None:
        self.text_map = text_map
        self.argument, self.key, _ = INPUTS[name]
        self.position = _position(component, self.argument)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if len(args) > self.position:
            value = self._map(args[self.position])
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        if kwargs.get(self.argument) is None:
            return None
        return args, {**kwargs, self.argument: self._map(kwargs[self.argument])}

    def _map(self, value: Any) -> Any:
        if self.key is not None:
            return {**value, self.key: self.text_map(value[self.key])}
        if isinstance(value, tuple):  # an IP-Adapter's (text, image embeddings)
            return (self.text_map(value[0]), *value[1:])
        return self.text_map(value)


def _position(component: nn.Module, argument: str) -> int:
    names = list(inspect.signature(type(component).forward).parameters)[1:]  # without self
    if argument not in names:
        raise ErasureCompatibilityError(
            f"{type(component).__name__} takes no {argument!r}: the erasure was made for another architecture."
        )
    return names.index(argument)


class TextMapLayer(Layer):
    """All `text_map` layers on one denoiser."""

    kind: ClassVar[str] = "text_map"

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleDict()
        self.handles: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self.components: tuple[nn.Module, ...] = ()

    @classmethod
    def prefix(cls, component: str, sites: tuple[str, ...]) -> str:
        return "text_map." if sites == ("encoder_hidden_states",) else "pooled_map."

    @classmethod
    def validate(cls, spec: LayerSpec, tensors: Tensors) -> None:
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

    @classmethod
    def rescaled(cls, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        return {"A": tensors["A"] * factor, "D": tensors["D"]}

    @classmethod
    def check(cls, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        component = compat.unwrap_compiled(component)
        argument, _, entries = INPUTS[spec.sites[0]]
        _position(component, argument)
        config = getattr(component, "config", {})
        for width in (config.get(entry) for entry in entries):
            if isinstance(width, int) and width != tensors["A"].shape[1]:
                raise ErasureCompatibilityError(
                    f"{type(component).__name__} reads text rows of width {width}; the erasure maps rows of width "
                    f"{tensors['A'].shape[1]}: it was made for another architecture."
                )
        if spec.sites[0] == "text_embeds" and config.get("addition_embed_type") != "text_time":
            raise ErasureCompatibilityError(
                f"{type(component).__name__} reads no 'text_embeds' here: the erasure was made for another architecture."
            )

    def attach(self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors) -> None:
        component = compat.unwrap_compiled(component)
        site = spec.sites[0]
        if site not in self.maps:
            self.maps[site] = TextMap(self.conditions)
            hook = MapInput(self._map(site), site, component)
            self.handles[site] = component.register_forward_pre_hook(hook, with_kwargs=True)
            self.components = (component,)
        text_map = self._map(site)
        text_map.parts[key] = (tensors["A"], tensors["D"])
        text_map.modified[key] = self.modifier_of(key)
        text_map.rebuild(*_first_placement(component))

    def detach(self, name: str) -> None:
        for site in list(self.maps):
            text_map = self._map(site)
            kept = {key: part for key, part in text_map.parts.items() if key[0] != name}
            if len(kept) == len(text_map.parts):
                continue
            text_map.parts = kept
            if kept:
                text_map.rebuild(*_first_placement(self.components[0]))
            else:
                self.handles.pop(site).remove()
                del self.maps[site]

    def fold(self, strengths: Mapping[str, float]) -> None:
        for site in self.maps:
            self._map(site).fold(strengths)

    def is_empty(self) -> bool:
        return not len(self.maps)

    def _map(self, site: str) -> TextMap:
        text_map = self.maps[site]
        assert isinstance(text_map, TextMap)
        return text_map


def _first_placement(component: nn.Module) -> tuple[torch.device, torch.dtype]:
    owner = next(owner for _, owner, _, _ in compat.base_parameters(component))
    return placement(component, owner)
