"""DuMo's EPR (arXiv 2501.01125): a network beside a UNet's encoder.

One class for both uses: loaded, its tensors are buffers, and in training parameters. See [`diffusers_erasure.layers.skip`].
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import ErasureInputError
from .buffers import Tensors, placement
from .encoder_copy import Inputs, channels, check_unet, empty_copy, encode, filled_copy, hold
from .modifiers import bins_at
from .sites import find_site
from .skip_hooks import SkipHooks


FORMS = ("full", "compact")
ZERO, MID = "zero.", "mid"
DOWN, UP = ".down", ".up"


def skip_sites(skips: int) -> tuple[str, ...]:
    """The sites of a `skip` layer, which are a schedule's columns: `skips.0` … and `mid_block`."""
    return (*(f"skips.{index}" for index in range(skips)), "mid_block")


def split(tensors: Tensors) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Divide a layer's tensors into those of the 1x1 convolutions, by `"0"` … `"mid"`, and the encoder's."""
    zeros: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(ZERO):
            place, _, kind = name.removeprefix(ZERO).partition(".")
            zeros.setdefault(place, {})[kind] = value
    return zeros, {name: value for name, value in tensors.items() if not name.startswith(ZERO)}


def is_full(encoder: Tensors) -> bool:
    """Whether the encoder's tensors are weights of its own, and not deltas on the base's."""
    return "conv_in.weight" in encoder


class Projection(nn.Module):
    """The 1x1 convolution on one feature: `weight` [C, C], or the factors `down` [r, C] and `up` [C, r]; `bias` [C]."""

    def __init__(self, tensors: Tensors, device: torch.device, dtype: torch.dtype, trainable: bool) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, value in tensors.items():
            hold(self, name, value, device, dtype, trainable)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        tensors = {name: getattr(self, name).to(feature.device) for name in self.names}
        feature = feature.to(tensors["bias"].dtype)
        if "down" in tensors:
            feature = F.conv2d(feature, tensors["down"][:, :, None, None])
        weight = tensors["up"] if "down" in tensors else tensors["weight"]
        return F.conv2d(feature, weight[:, :, None, None], tensors["bias"])


class Delta(nn.Module):
    """The low-rank delta on one module of the base: `down` [r, in] (or [r, in, h, w]) and `up` [out, r] (or [out, r, 1, 1])."""

    down: torch.Tensor
    up: torch.Tensor

    def __init__(
        self,
        module: nn.Module,
        factors: tuple[torch.Tensor, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        trainable: bool,
    ) -> None:
        super().__init__()
        self.convolution: dict[str, Any] | None = None
        if isinstance(module, nn.Conv2d):
            self.convolution = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        for name, value in zip(("down", "up"), factors, strict=True):
            hold(self, name, value, device, dtype, trainable)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        down, up = self.down.to(hidden_states.device), self.up.to(hidden_states.device)
        hidden_states = hidden_states.to(down.dtype)
        if self.convolution is None:
            return F.linear(F.linear(hidden_states, down), up)
        return F.conv2d(F.conv2d(hidden_states, down, **self.convolution), up)


class LearnedSchedule(nn.Module):
    """A schedule in training, DuMo's TLMO: a table [bins, sites] that starts at 1, read at the timestep of the pass.

    Args:
        bins (`int`): the timesteps from 0 to `span` are divided into so many.
        sites (`int`): one column each.
        span (`float`, *optional*, defaults to 1000): the base model's number of training timesteps.
    """

    def __init__(self, bins: int, sites: int, span: float = 1000.0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(bins, sites))
        self.span = span

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Factors [1 or B, sites], float32, at timesteps [1 or B]."""
        table = self.table.to(timestep.device)
        return table[bins_at(timestep, len(table), self.span)]


def fresh_tensors(unet: Any, form: str, rank: int, zero_rank: int | None, seed: int) -> dict[str, torch.Tensor]:
    """The first values of a network that is to be trained, float32. See [`EPR.fresh`]."""
    if form not in FORMS or rank < 1 or (zero_rank is not None and zero_rank < 1):
        raise ErasureInputError(f"An EPR has a form of {FORMS} and ranks above 0, not {form!r}, {rank}, {zero_rank}.")
    check_unet(unet)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:  # so that it keeps the size of what it reads
        return torch.randn(*shape, generator=generator) / float(torch.Size(shape[1:]).numel()) ** 0.5

    tensors: dict[str, torch.Tensor] = {}
    widths = channels(unet)
    for place, width in zip([*map(str, range(len(widths) - 1)), MID], widths, strict=True):
        if zero_rank is None:
            tensors[f"{ZERO}{place}.weight"] = torch.zeros(width, width)
        else:
            tensors[f"{ZERO}{place}.down"] = random(min(zero_rank, width), width)
            tensors[f"{ZERO}{place}.up"] = torch.zeros(width, min(zero_rank, width))
        tensors[f"{ZERO}{place}.bias"] = torch.zeros(width)
    empty = empty_copy(unet)
    if form == "full":
        wanted = {name for name, _ in empty.named_parameters()}
        own = {name: value.detach().float() for name, _, _, value in compat.base_parameters(unet) if name in wanted}
        tensors.update(own)
    else:
        for site, module in empty.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                shape = module.weight.shape
                tensors[site + DOWN] = random(rank, *shape[1:])
                tensors[site + UP] = torch.zeros(shape[0], rank, *(1,) * (len(shape) - 2))
    return tensors


class EPR(nn.Module):
    """The network of one erasure, in the full or in the compact form.

    Args:
        unet ([`UNet2DConditionModel`]): the base. It gives the architecture; its weights are read by `fresh` alone.
        tensors (mapping): the tensors of a `skip` layer.
        device (`torch.device`): where they are kept.
        dtype (`torch.dtype`): dtype of the tensors, in which the network also computes.
        trainable (`bool`, *optional*, defaults to `False`): make them parameters, and not buffers.

    Attributes:
        on (`bool`): whether it runs while it is attached by [`attach`]. Off, the UNet is the base.
        schedule (`LearnedSchedule`, *optional*): multiplies the residuals then.
    """

    def __init__(
        self,
        unet: Any,
        tensors: Tensors,
        device: torch.device,
        dtype: torch.dtype,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        zeros, encoder = split(tensors)
        self.on = True
        self.schedule: LearnedSchedule | None = None
        self.hooks: SkipHooks | None = None  # of a network in training, while it is attached
        places = [str(index) for index in range(len(zeros) - 1)] + [MID]
        self.projections = nn.ModuleList(Projection(zeros[place], device, dtype, trainable) for place in places)
        self.deltas = nn.ModuleList()
        self.sites: dict[str, int] = {}  # of the compact form: name of a module -> its place in `deltas`
        # Hidden in a tuple: as children they would be found by the endings of their names, which are those of the base's
        # own modules, and a user's LoRA or attention processors would be put into them.
        self.hidden: tuple[nn.Module, ...] = ()
        if is_full(encoder):
            self.hidden = (filled_copy(unet, encoder, device, dtype, trainable),)
            if trainable:  # nobody's LoRA comes in between, and an optimizer has to find the parameters
                self.add_module("encoder", self.hidden[0])
        else:
            for site in sorted(name.removesuffix(DOWN) for name in encoder if name.endswith(DOWN)):
                factors = encoder[site + DOWN], encoder[site + UP]
                self.sites[site] = len(self.deltas)
                self.deltas.append(Delta(find_site(unet, site), factors, device, dtype, trainable))

    @classmethod
    def fresh(
        cls, unet: Any, form: str = "compact", rank: int = 8, zero_rank: int | None = None, seed: int = 0
    ) -> "EPR":
        """Return a network to train, float32 on the UNet's device. It leaves the UNet's output as it is.

        Args:
            unet ([`UNet2DConditionModel`]): the base, in memory.
            form (`str`, *optional*, defaults to `"compact"`): `"full"` copies the encoder's weights; `"compact"` puts a
                delta on each `Linear` and `Conv2d` of the encoder, which starts at 0.
            rank (`int`, *optional*, defaults to 8): rank of the deltas. With it a network for Stable Diffusion 1.x has
                29.9 MB in float16.
            zero_rank (`int`, *optional*): rank of the 1x1 convolutions; whole ones by default.
            seed (`int`, *optional*, defaults to 0): of the random factors.

        Raises:
            ErasureCompatibilityError: the UNet has blocks or inputs that the network does not know.
            ErasureInputError: another form, or a rank below 1.
        """
        unet = compat.unwrap_compiled(unet)
        tensors = fresh_tensors(unet, form, rank, zero_rank, seed)
        device, _ = placement(unet, compat.base_layer(unet.conv_in))
        return cls(unet, tensors, device, torch.float32, trainable=True)

    @property
    def layer_sites(self) -> tuple[str, ...]:
        """The `sites` of its layer: the n skips and the mid block."""
        return skip_sites(len(self.projections) - 1)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The network's own tensors (in training: parameters) by their names in the layer."""
        places = [*map(str, range(len(self.projections) - 1)), MID]
        found: dict[str, torch.Tensor] = {}
        for place, projection in zip(places, self.projections, strict=True):
            assert isinstance(projection, Projection)
            found.update({f"{ZERO}{place}.{name}": getattr(projection, name) for name in projection.names})
        for encoder in self.hidden:
            found.update({**dict(encoder.named_buffers()), **dict(encoder.named_parameters())})
        for site, index in self.sites.items():
            delta = self.deltas[index]
            assert isinstance(delta, Delta)
            found[site + DOWN], found[site + UP] = delta.down, delta.up
        return found

    def attach(self, unet: Any) -> None:
        """Let a network in training act on a UNet, beside what is loaded there."""
        if self.hooks is not None:
            raise ErasureInputError("The EPR is attached already; call `detach()` first.")
        self.hooks = SkipHooks.of(compat.unwrap_compiled(unet))
        self.hooks.add(self)
        self.hooks.trained.append(self)

    def detach(self) -> None:
        """Leave the UNet as it was."""
        if self.hooks is not None:
            self.hooks.drop(self)
            self.hooks = None

    def residuals(self, hooks: SkipHooks, inputs: Inputs) -> list[torch.Tensor]:
        """What is added at strength 1 to the n skips and to the mid block's output, each [B, C, H, W].

        A plain method and not `forward`, as accelerate moves whatever a `forward` is given, here the whole UNet.
        """
        encoder: Any = hooks.unet
        if self.hidden:
            encoder, device = self.hidden[0], inputs.sample.device
            if encoder.conv_in.weight.device != device:  # sequential and group offloading do not know of it
                encoder.to(device)
            inputs = inputs.plain(device, encoder.conv_in.weight.dtype)
        features = encode(encoder, inputs, partial(hooks.call, self))
        return [projection(feature) for projection, feature in zip(self.projections, features, strict=True)]

    def delta(self, site: str) -> Delta | None:
        """The delta on a module of the base, where the network has one."""
        if site not in self.sites:
            return None
        delta = self.deltas[self.sites[site]]
        assert isinstance(delta, Delta)
        return delta

    def _apply(self, fn: Any, recurse: bool = True) -> "EPR":
        super()._apply(fn, recurse)
        for encoder in self.hidden if compat.child(self, "encoder") is None else ():
            encoder._apply(fn, recurse)
        return self
