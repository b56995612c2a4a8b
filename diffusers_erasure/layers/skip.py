"""Layer kind `skip`: DuMo's EPR (arXiv 2501.01125), a network whose output is added to the UNet's skip connections.

The network is the UNet's encoder, fed with the same latents, timestep and text, and one 1x1 convolution for each skip and
for the mid feature. It exists in two forms: **full**, a copy of the encoder with weights of its own, and **compact**, the
base's encoder run a second time with a low-rank delta on its `Linear` and `Conv2d` modules.

The residuals are added by native hooks: after the mid block, where the network also runs, and before each up block.
diffusers' own arguments for residuals are the caller's. So residuals of ControlNets and T2I-Adapters are in the skips
already and add up, FreeU filters the sum, and with DeepCache the skips that a step computes anew get residuals of that
step. The copy of the full form has stock attention: user LoRAs, image prompts and other erasures of the UNet's modules do
not enter it. In the compact form the base's own modules run again, with all that is attached to them and with the deltas of
the one erasure whose pass it is. Several erasures cost one encoder pass each; those of strength 0 cost none, but in compiled
graphs.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureFileError
from ..schema import LayerSpec
from .base import HookLayer, Watched
from .buffers import PartKey, Tensors, placement
from .changes import WeightChange
from .encoder_copy import PARTS, channels, check_unet, empty_copy, spans
from .epr import DOWN, EPR, MID, UP, ZERO, is_full, skip_sites, split
from .kind import LayerKind
from .lora import MAX_RANK, check_factors
from .modifiers import Conditions, Factors, Modifier
from .sites import Place, attention_of, find_site
from .skip_hooks import SkipEdit, SkipHooks


MAX_SKIPS = 256


class SkipLayer(HookLayer):
    """All `skip` layers on one UNet."""

    def __init__(self, conditions: Conditions) -> None:
        super().__init__(conditions)
        self.networks = nn.ModuleDict()  # also of what is detached, until `tidy`
        self.attached: dict[PartKey, Network] = {}
        self.place = Place(conditions)
        self.hooks: SkipHooks | None = None
        self.count = 0

    def attach(
        self, component: nn.Module, key: PartKey, spec: LayerSpec, tensors: Tensors, modifier: Modifier | None
    ) -> None:
        component = compat.unwrap_compiled(component)
        # a UNet by `check`, which the type does not tell
        device, dtype = placement(component, compat.base_layer(component.conv_in))  # type: ignore[arg-type]
        network = EPR(component, tensors, device, dtype)
        self.hooks = SkipHooks.of(component)
        self.hooks.add(network)
        self.hooks.place = self.place
        self.attached[key] = Network(component, network, modifier, str(self.count))
        compat.add_child(self.networks, str(self.count), network)  # names must have no dots
        self.count += 1

    def altered(self, component: nn.Module, spec: LayerSpec) -> Iterable[nn.Module]:
        unet: Any = compat.unwrap_compiled(component)
        return [unet, unet.mid_block, *unet.up_blocks]

    def detach(self, name: str) -> None:
        self.attached = {key: each for key, each in self.attached.items() if key[0] != name}

    def tidy(self) -> None:
        kept = {each.number for each in self.attached.values()}
        for number in [number for number in self.networks if number not in kept]:
            network = self.networks[number]
            assert self.hooks is not None and isinstance(network, EPR)
            self.hooks.drop(network)
            compat.remove_child(self.networks, number)
        if not self.networks and self.hooks is not None:
            self.hooks.place = None
            self.hooks = None

    def parts(self) -> Mapping[PartKey, "Network"]:
        return dict(self.attached)

    def build(self, parts: Any, names: Sequence[str]) -> dict[int, Any]:
        columns = {name: column for column, name in enumerate(names)}
        acting = []
        for (name, _), each in parts.items():
            if name in columns:
                sites = range(len(each.network.layer_sites))
                own = [(each.modifier, site, columns[name]) for site in sites]
                device, _ = placement(each.unet, compat.base_layer(each.unet.conv_in))
                acting.append((each.network, Factors(own, device)))
        return {self.place.number: SkipEdit(acting)} if acting else {}

    def places(self) -> Iterable[Any]:
        return [self.place]

    def is_empty(self) -> bool:
        return not self.networks

    def watched(self) -> Iterator[Watched]:
        names = {id(each.network): key[0] for key, each in self.attached.items()}
        for site, module, network, number in self.hooks.hooked() if self.hooks is not None and names else ():
            if network is None or id(network) in names:
                own = names.values() if network is None else (names[id(network)],)
                yield Watched(site, module, frozenset(own), (number,))

    def inactive_reason(self) -> str | None:
        for network in (each.network for each in self.attached.values()):
            for site in network.sites:
                assert self.hooks is not None
                if compat.has_fused_projections(attention_of(self.hooks.unet, site)):
                    return FUSED.format(site=site)
        return None


@dataclass(frozen=True)
class Network:
    """One layer of one erasure: the UNet, its network, its schedule and gate, and its number in the layer."""

    unet: Any
    network: EPR
    modifier: Modifier | None
    number: str


FUSED = (
    "The attention projections around {site!r} are fused, so that module is not called and a compact `skip` erasure on it "
    "would not act. Call `pipe.unfuse_qkv_projections()` first."
)


# ------------------------------------------------------------------------------------------------- the artefact side


class SkipKind(LayerKind):
    """The network's tensors: 1x1 convolutions, and an encoder's weights or deltas on the base's."""

    name: ClassVar[str] = "skip"
    live: ClassVar[type[HookLayer]] = SkipLayer

    def validate(self, spec: LayerSpec, tensors: Tensors) -> None:
        if spec.component != "unet":
            raise ErasureFileError(f"A `skip` layer acts on the UNet, not on {spec.component!r}.")
        skips = len(spec.sites) - 1
        if not 0 < skips <= MAX_SKIPS or spec.sites != skip_sites(skips):
            raise ErasureFileError(
                f"A `skip` layer has the sites 'skips.0' … 'skips.n' and 'mid_block', in this order, not "
                f"{[site[:60] for site in spec.sites[:3]]}."
            )
        zeros, encoder = split(tensors)
        if set(zeros) != {*map(str, range(skips)), MID}:
            raise ErasureFileError(
                f"{spec.file}: expected tensors {ZERO}0… to {ZERO}{skips - 1}… and {ZERO}{MID}…; there is "
                f"{[place[:60] for place in sorted(zeros)[:4]]}."
            )
        for place, own in zeros.items():
            if not _is_projection({name: tuple(value.shape) for name, value in own.items()}):
                shapes = {name[:60]: tuple(value.shape) for name, value in sorted(own.items())[:4]}
                raise ErasureFileError(
                    f"{spec.file}: {ZERO}{place} has tensors of the shapes {shapes}; expected `weight` [C, C], or `down` "
                    "[r, C] and `up` [C, r], and `bias` [C]."
                )
        (_validate_copy if is_full(encoder) else _validate_deltas)(spec, encoder)

    def rescaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor]:
        scaled = (".weight", ".up", ".bias")
        return {
            name: value * factor if name.startswith(ZERO) and name.endswith(scaled) else value
            for name, value in tensors.items()
        }

    def check(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> None:
        component = compat.unwrap_compiled(component)
        check_unet(component)
        zeros, encoder = split(tensors)
        widths = [len(zeros[place]["bias"]) for place in (*map(str, range(len(spec.sites) - 1)), MID)]
        if widths != channels(component) or spans(component)[-1][0] != 0:
            raise ErasureCompatibilityError(
                f"The UNet's skips and mid feature have {channels(component)} channels, those of the erasure {widths}: it "
                "was made for another architecture."
            )
        if not is_full(encoder):
            check_factors(component, _factors(encoder))
            return
        expected = {name: tuple(value.shape) for name, value in empty_copy(component).named_parameters()}
        found = {name: tuple(value.shape) for name, value in encoder.items()}
        odd = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if odd:
            raise ErasureCompatibilityError(
                f"The erasure's copy of the encoder is another one than this UNet's: {odd[0][:120]!r} has the shape "
                f"{found.get(odd[0])} there and {expected.get(odd[0])} here. It was made for another architecture."
            )

    def weight_changes(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Sequence[WeightChange]:
        raise ErasureCompatibilityError(
            "A `skip` layer is a network beside the UNet, and no change of its weights, so it cannot be fused. Leave the erasure "
            "unfused."
        )

    def reads(self, component: nn.Module, spec: LayerSpec, tensors: Tensors) -> Collection[Any] | None:
        _, encoder = split(tensors)
        deltas = () if is_full(encoder) else _factors(encoder)
        return {"encoder_hidden_states", *(find_site(component, site) for site in deltas)}


def _factors(encoder: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The deltas of a compact encoder, by the modules of the UNet."""
    sites = [name.removesuffix(DOWN) for name in encoder if name.endswith(DOWN)]
    return {site: (encoder[site + DOWN], encoder[site + UP]) for site in sites}


def _is_projection(shapes: dict[str, tuple[int, ...]]) -> bool:
    width = shapes.get("bias", ())
    if len(width) != 1:
        return False
    if set(shapes) == {"weight", "bias"}:
        return shapes["weight"] == (*width, *width)
    down, up = shapes.get("down", ()), shapes.get("up", ())
    return set(shapes) == {"down", "up", "bias"} and down[1:] == width and up == (*width, *down[:1])


def _validate_copy(spec: LayerSpec, encoder: Tensors) -> None:
    odd = sorted(name for name in encoder if name.partition(".")[0] not in PARTS)
    if odd:
        raise ErasureFileError(f"{spec.file}: {odd[0][:120]!r} is no tensor of a UNet's encoder.")


def _validate_deltas(spec: LayerSpec, encoder: Tensors) -> None:
    sites = sorted(name.removesuffix(DOWN) for name in encoder if name.endswith(DOWN))
    odd = sorted(set(encoder) ^ {site + half for site in sites for half in (DOWN, UP)})
    odd += [site for site in sites if site.partition(".")[0] not in PARTS]
    if odd or not sites:
        raise ErasureFileError(
            f"{spec.file}: a compact encoder has `<module>{DOWN}` and `<module>{UP}` for modules of the UNet's encoder; "
            f"missing or unexpected: {[name[:120] for name in odd[:3]]}."
        )
    for site in sites:
        down, up = encoder[site + DOWN], encoder[site + UP]
        shaped = (down.ndim == up.ndim == 2) or (down.ndim == up.ndim == 4 and up.shape[2:] == (1, 1))
        if not shaped or up.shape[1] != down.shape[0] or not 0 < down.shape[0] <= MAX_RANK:
            raise ErasureFileError(
                f"{spec.file}: {site[:120]!r} has factors of shapes {tuple(down.shape)} and {tuple(up.shape)}; expected "
                f"[r, in] and [out, r] (convolutions: [r, in, h, w] and [out, r, 1, 1]), r from 1 to {MAX_RANK}."
            )
