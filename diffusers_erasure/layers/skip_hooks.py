"""The hooks by which networks beside a UNet's encoder act: they read a pass, run the networks, and add to mid block and skips."""

import copy
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import compat
from ..errors import ErasureInputError
from .encoder_copy import Inputs, spans
from .modifiers import Factors
from .passing import Pass, timesteps
from .sites import Place, find_site


if TYPE_CHECKING:
    from .epr import EPR

ATTRIBUTE, SKIPS = "erasure_skip_hooks", "res_hidden_states_tuple"
# The mid block's arguments by position, behind the hidden states and the time embedding.
MID_ARGUMENTS = ("encoder_hidden_states", "attention_mask", "cross_attention_kwargs", "encoder_attention_mask")


class SkipEdit(nn.Module):
    """What the networks of some erasures do: each with its strength, schedule and gate.

    Args:
        acting (sequence): the networks, and of each the factors at its sites.
    """

    def __init__(self, acting: "Sequence[tuple[EPR, Factors]]") -> None:
        super().__init__()
        self.networks = tuple(network for network, _ in acting)  # a tuple: they are children of the layer
        self.factors = nn.ModuleList(factors for _, factors in acting)

    def acting(self, now: Pass, sample: torch.Tensor) -> "list[tuple[EPR, torch.Tensor | None]]":
        """The networks, and the factors [1 or B, sites] of each; `None` where these are 1."""
        found = (factors(now, sample.device, len(sample)) for factors in self.factors)
        return list(zip(self.networks, found, strict=True))


class Seen:
    """What the hooks have seen of a pass.

    Attributes:
        timestep: as the UNet was given it, where a schedule is trained.
        sample, time, added: the inputs of `conv_in`, of the time embedding and of the added one.
        residuals: what the up blocks are to add.
        acting: the network whose encoder runs: then the hooks on the base's modules are still.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Hold nothing of a pass."""
        self.timestep: Any = None
        self.sample: torch.Tensor | None = None
        self.time: tuple[Any, ...] | None = None
        self.added: torch.Tensor | None = None
        self.residuals: list[torch.Tensor] | None = None
        self.acting: EPR | None = None


class PerThread(threading.local):
    """Each thread's [`Seen`]. A copy, or a pickle, has seen nothing.

    An object of its own, as a graph drops what it writes into a `threading.local` itself.
    """

    def __init__(self) -> None:
        self.seen = Seen()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PerThread":
        return PerThread()

    def __reduce__(self) -> tuple[type["PerThread"], tuple[()]]:
        return PerThread, ()


class SkipHooks:
    """The hooks of all networks on one UNet.

    It lies in the UNet's attribute `erasure_skip_hooks` while there is a network.

    Attributes:
        place: asks which of the loaded networks act in a pass; `None` as long as none is loaded.
        networks: all, also those of which only earlier passes know.
        trained: those that act in every pass while they are on.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.place: Place | None = None
        self.networks: list[EPR] = []
        self.trained: list[EPR] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.around: list[torch.utils.hooks.RemovableHandle] = []  # on the UNet itself
        self.sites: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self.fixed: list[tuple[str, nn.Module]] = []  # what the handles are on, by name
        self.modules: dict[str, nn.Module] = {}  # what the hooks of the sites are on
        self.threads = PerThread()

    @property
    def seen(self) -> Seen:
        """Of the calling thread's pass."""
        return self.threads.seen

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

    def hooked(self) -> "Iterator[tuple[str, nn.Module, EPR | None, int]]":
        """What has to be called: names and modules, the network whose delta is there (`None`: all), and the hook's number."""
        for (name, module), handle in zip(self.fixed, self.handles, strict=True):
            yield name, module, None, handle.id
        for site, handle in self.sites.items():
            for network in self.networks:
                if site in network.sites:
                    yield site, self.modules[site], network, handle.id

    def add(self, network: "EPR") -> None:
        """Take in a network."""
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
            self.around = [
                unet.register_forward_pre_hook(self.begin, with_kwargs=True),
                unet.register_forward_hook(self.end, always_call=True),
            ]
        self.networks.append(network)
        for site in network.sites:
            if site not in self.sites:
                delta = AddDelta(self, site)
                self.modules[site] = find_site(unet, site)
                self.sites[site] = self.modules[site].register_forward_hook(delta, with_kwargs=True)

    def drop(self, network: "EPR") -> None:
        """Forget a network; with the last one all hooks go."""
        self.networks = [other for other in self.networks if other is not network]
        self.trained = [other for other in self.trained if other is not network]
        for site in [site for site in self.sites if not any(site in other.sites for other in self.networks)]:
            self.sites.pop(site).remove()
        if not self.networks:
            for handle in (*self.handles, *self.around):
                handle.remove()
            self.handles, self.around = [], []
            if hasattr(self.unet, ATTRIBUTE):
                delattr(self.unet, ATTRIBUTE)

    @compat.untraced
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before the UNet's pass; without `kwargs` where it was taken off while the pass waited for that."""
        self.seen.forget()
        if any(network.schedule is not None for network in self.trained):
            self.seen.timestep = args[1] if len(args) > 1 else (kwargs or {})["timestep"]

    @compat.untraced
    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it, also where it raised."""
        self.seen.forget()

    def see_sample(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before `conv_in`."""
        if self.seen.acting is None:
            self.seen.sample = args[0]

    def see_time(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the time embedding, the first module of a pass."""
        if self.seen.acting is None:
            self.seen.time, self.seen.added = args, None

    def see_added(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the added embedding."""
        if self.seen.acting is None:
            self.seen.added = args[0]

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        """After the mid block: run the networks, add to its output, and keep what the up blocks' skips get."""
        seen = self.seen
        if seen.acting is not None:
            return None
        sample, time, added = seen.sample, seen.time, seen.added
        seen.sample = seen.time = seen.added = seen.residuals = None
        edit, now = (None, None) if self.place is None else self.place.at_work()
        if edit is None and not any(network.on for network in self.trained):
            return None
        if sample is None or time is None:
            raise ErasureInputError(
                "The mid block of a UNet with a `skip` erasure was called outside of a forward pass."
            )
        acting = [] if edit is None else edit.acting(now, sample)
        for network in self.trained:
            if network.on:
                schedule = network.schedule
                step = None if schedule is None else timesteps(seen.timestep, (1.0, 0.0), sample.device)
                acting.append((network, None if schedule is None else schedule(step)))
        given = {**dict(zip(MID_ARGUMENTS, args[2:], strict=False)), **kwargs}
        inputs = Inputs(sample, time, added, **{name: given.get(name) for name in MID_ARGUMENTS})
        total: list[torch.Tensor] = []
        for network, factors in acting:
            found = network.residuals(self, inputs)
            if factors is not None:
                factors = factors.to(found[0].dtype)
                found = [value * factors[:, site, None, None, None] for site, value in enumerate(found)]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        seen.residuals = total[:-1]
        return output + total[-1].to(output.dtype)

    def call(self, network: "EPR", module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run one module of a network's encoder; recomputed on the way back where the UNet's blocks are."""
        checkpointing = any(getattr(block, "gradient_checkpointing", False) for block in self.unet.down_blocks)
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(self._call_whole, network, module, *args, use_reentrant=False, **kwargs)
        return self._call(network, module, *args, **kwargs)

    def _call(self, network: "EPR", module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen.acting = network
        try:
            return module(*args, **kwargs)
        finally:
            self.seen.acting = None

    def _call_whole(self, network: "EPR", module: nn.Module, *args: Any, **kwargs: Any) -> Any:
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
        acting = self.hooks.seen.acting
        delta = None if acting is None else acting.delta(self.site)
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
        seen = self.hooks.seen
        if seen.residuals is None:
            return None
        residuals = seen.residuals[self.first : self.last]
        if self.first == 0:
            seen.residuals = None
        if len(args) > 1:
            return (args[0], self._sum(args[1], residuals), *args[2:]), kwargs
        return args, {**kwargs, SKIPS: self._sum(kwargs[SKIPS], residuals)}

    def _sum(self, skips: tuple[torch.Tensor, ...], residuals: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(skip + residual.to(skip.dtype) for skip, residual in zip(skips, residuals, strict=True))
