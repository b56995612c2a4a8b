"""DuMo's EPR (arXiv 2501.01125): a network beside a UNet's encoder, and the hooks that add its output to the skips.

One class for both uses: loaded, its tensors are buffers, and in training parameters. See [`diffusers_erasure.layers.skip`].
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import compat
from ..errors import ErasureInputError
from .buffers import Tensors, placement, set_buffer
from .encoder_copy import Inputs, channels, check_unet, empty_copy, encode, filled_copy, hold, spans
from .modifiers import Conditions, Factors, bins_at
from .sites import find_site


FORMS = ("full", "compact")
ZERO, MID = "zero.", "mid"
DOWN, UP = ".down", ".up"
ATTRIBUTE, SKIPS = "erasure_skip_hooks", "res_hidden_states_tuple"
# The mid block's arguments by position, behind the hidden states and the time embedding.
MID_ARGUMENTS = ("encoder_hidden_states", "attention_mask", "cross_attention_kwargs", "encoder_attention_mask")


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
        # What the strength multiplies, exact; the live tensors are 0 until `fold`.
        self.exact = {} if trainable else {name: value for name, value in tensors.items() if name != "down"}
        for name, value in tensors.items():
            hold(self, name, torch.zeros_like(value) if name in self.exact else value, device, dtype, trainable)

    def fold(self, strength: float) -> None:
        for name, value in self.exact.items():
            set_buffer(getattr(self, name), value.float() * strength)

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
        self.conditions = Conditions()  # watches the UNet while the network is attached

    def forward(self, device: torch.device) -> torch.Tensor:
        """Factors [1 or B, sites], float32."""
        table = self.table.to(device)
        return table[bins_at(self.conditions.now(device), len(table), self.span)]


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
        trainable (`bool`, *optional*, defaults to `False`): make them parameters, at strength 1. Otherwise they are
            buffers, and the strength is 0 until `fold`.

    Attributes:
        on (`bool`): whether it runs. Off, the UNet is the base.
        factors (`Factors` or `LearnedSchedule`, *optional*): called with a device, gives factors [1 or B, sites] that
            multiply the residuals.
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
        self.factors: Factors | LearnedSchedule | None = None
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

    def fold(self, strength: float) -> None:
        """Write the strength into the projections, in place."""
        for projection in self.projections:
            assert isinstance(projection, Projection)
            projection.fold(strength)

    def attach(self, unet: Any) -> None:
        """Let a network in training act on a UNet, beside what is loaded there."""
        if self.hooks is not None:
            raise ErasureInputError("The EPR is attached already; call `detach()` first.")
        self.hooks = SkipHooks.of(compat.unwrap_compiled(unet))
        self.hooks.add(self)
        if isinstance(self.factors, LearnedSchedule):
            self.factors.conditions.watch(unet)

    def detach(self) -> None:
        """Leave the UNet as it was."""
        if self.hooks is not None:
            self.hooks.drop(self)
            self.hooks = None
        if isinstance(self.factors, LearnedSchedule):
            self.factors.conditions.unwatch()

    def residuals(self, hooks: "SkipHooks", inputs: Inputs) -> list[torch.Tensor]:
        """What is added to the n skips and to the mid block's output, each [B, C, H, W].

        A plain method and not `forward`, as accelerate moves whatever a `forward` is given, here the whole UNet.
        """
        encoder: Any = hooks.unet
        if self.hidden:
            encoder, device = self.hidden[0], inputs.sample.device
            if encoder.conv_in.weight.device != device:  # sequential and group offloading do not know of it
                encoder.to(device)
            inputs = inputs.plain(device, encoder.conv_in.weight.dtype)
        features = encode(encoder, inputs, partial(hooks.call, self))
        found = [projection(feature) for projection, feature in zip(self.projections, features, strict=True)]
        factors = None if self.factors is None else self.factors(features[0].device)
        if factors is None:
            return found
        return [value * factors[:, site, None, None, None].to(value.dtype) for site, value in enumerate(found)]

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


class SkipHooks:
    """The hooks of all networks on one UNet, and what they have seen of the pass that is under way.

    It lies in the UNet's attribute `erasure_skip_hooks` while there is a network.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.networks: list[EPR] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.sites: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self.fixed: list[tuple[str, nn.Module]] = []  # what the handles are on, by name
        self.modules: dict[str, nn.Module] = {}  # what the hooks of the sites are on
        self.sample: torch.Tensor | None = None
        self.time: tuple[Any, ...] | None = None
        self.added: torch.Tensor | None = None
        self.residuals: list[torch.Tensor] | None = None
        self.acting: EPR | None = None  # whose encoder runs now: then the hooks on the base's modules are still

    def __deepcopy__(self, memo: dict[int, Any]) -> "SkipHooks":
        """A copy of a block alone gets hooks that do nothing, or all of the UNet would be copied with it."""
        copied = SkipHooks(None)
        memo[id(self)] = copied
        if id(self.unet) in memo:
            vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @classmethod
    def of(cls, unet: Any) -> "SkipHooks":
        """The hooks that a UNet has, or new ones."""
        hooks = getattr(unet, ATTRIBUTE, None)
        return hooks if isinstance(hooks, cls) else cls(unet)

    def hooked(self) -> Iterator[tuple[str, nn.Module, EPR | None, int]]:
        """What has to be called: names and modules, the network whose delta is there (`None`: all), and the hook's number."""
        for (name, module), handle in zip(self.fixed, self.handles, strict=True):
            yield name, module, None, handle.id
        for site, handle in self.sites.items():
            for network in self.networks:
                if site in network.sites:
                    yield site, self.modules[site], network, handle.id

    def add(self, network: EPR) -> None:
        """Let a network act from now on."""
        unet = self.unet
        if not self.handles:
            setattr(unet, ATTRIBUTE, self)
            reads = [(compat.base_layer(unet.conv_in), self.see_sample), (unet.time_embedding, self.see_time)]
            self.fixed = [("conv_in", reads[0][0]), ("time_embedding", reads[1][0])]
            if getattr(unet, "add_embedding", None) is not None:
                reads.append((unet.add_embedding, self.see_added))
                self.fixed.append(("add_embedding", unet.add_embedding))
            self.fixed.append(("mid_block", unet.mid_block))
            self.fixed += [(f"up_blocks.{index}", block) for index, block in enumerate(unet.up_blocks)]
            self.handles = [module.register_forward_pre_hook(hook) for module, hook in reads]
            self.handles.append(unet.mid_block.register_forward_hook(self.run, with_kwargs=True))
            for block, (first, last) in zip(unet.up_blocks, spans(unet), strict=True):
                hook = AddToSkips(self, first, last)
                self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        self.networks.append(network)
        for site in network.sites:
            if site not in self.sites:
                delta = AddDelta(self, site)
                self.modules[site] = find_site(unet, site)
                self.sites[site] = self.modules[site].register_forward_hook(delta, with_kwargs=True)

    def drop(self, network: EPR) -> None:
        """Let a network act no more; with the last one all hooks go."""
        self.networks = [other for other in self.networks if other is not network]
        for site in [site for site in self.sites if not any(site in other.sites for other in self.networks)]:
            self.sites.pop(site).remove()
        if not self.networks:
            for handle in self.handles:
                handle.remove()
            self.handles = []
            if hasattr(self.unet, ATTRIBUTE):
                delattr(self.unet, ATTRIBUTE)

    def see_sample(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before `conv_in`."""
        if self.acting is None:
            self.sample = args[0]

    def see_time(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the time embedding, the first module of a pass."""
        if self.acting is None:
            self.time, self.added = args, None

    def see_added(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the added embedding."""
        if self.acting is None:
            self.added = args[0]

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        """After the mid block: run all networks, add to its output, and keep what the up blocks' skips get."""
        if self.acting is not None:
            return None
        sample, time, added = self.sample, self.time, self.added
        self.sample, self.time, self.added, self.residuals = None, None, None, None
        networks = [network for network in self.networks if network.on]
        if not networks:
            return None
        if sample is None or time is None:
            raise ErasureInputError(
                "The mid block of a UNet with a `skip` erasure was called outside of a forward pass."
            )
        given = {**dict(zip(MID_ARGUMENTS, args[2:], strict=False)), **kwargs}
        inputs = Inputs(sample, time, added, **{name: given.get(name) for name in MID_ARGUMENTS})
        total = networks[0].residuals(self, inputs)
        for network in networks[1:]:
            total = [a + b for a, b in zip(total, network.residuals(self, inputs), strict=True)]
        self.residuals = total[:-1]
        return output + total[-1].to(output.dtype)

    def call(self, network: EPR, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run one module of a network's encoder; recomputed on the way back where the UNet's blocks are."""
        checkpointing = any(getattr(block, "gradient_checkpointing", False) for block in self.unet.down_blocks)
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(self._call_whole, network, module, *args, use_reentrant=False, **kwargs)
        return self._call(network, module, *args, **kwargs)

    def _call(self, network: EPR, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.acting = network
        try:
            return module(*args, **kwargs)
        finally:
            self.acting = None

    def _call_whole(self, network: EPR, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Without checkpoints of its own: parts would be recomputed when nobody knows whose deltas are on."""
        parts: list[Any] = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
        for part in parts:
            part.gradient_checkpointing = False
        try:
            return self._call(network, module, *args, **kwargs)
        finally:
            for part in parts:
                part.gradient_checkpointing = True


class AddDelta:
    """Forward hook of a module of the base: adds the delta of the network whose encoder runs."""

    def __init__(self, hooks: SkipHooks, site: str) -> None:
        self.hooks, self.site = hooks, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        delta = None if self.hooks.acting is None else self.hooks.acting.delta(self.site)
        if delta is None:
            return None
        return output + delta(args[0] if args else kwargs["input"]).to(output.dtype)


class AddToSkips:
    """Forward pre-hook of an up block: adds the residuals to the skips that it reads."""

    def __init__(self, hooks: SkipHooks, first: int, last: int) -> None:
        self.hooks, self.first, self.last = hooks, first, last

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.hooks.residuals is None:
            return None
        residuals = self.hooks.residuals[self.first : self.last]
        if self.first == 0:
            self.hooks.residuals = None
        if len(args) > 1:
            return (args[0], self._sum(args[1], residuals), *args[2:]), kwargs
        return args, {**kwargs, SKIPS: self._sum(kwargs[SKIPS], residuals)}

    def _sum(self, skips: tuple[torch.Tensor, ...], residuals: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(skip + residual.to(skip.dtype) for skip, residual in zip(skips, residuals, strict=True))
