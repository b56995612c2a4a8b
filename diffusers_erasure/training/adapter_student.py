"""Receler's eraser as a student: bottlenecks behind the attentions that read text."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import compat
from ..denoising.sampler import generator_for
from ..layers import adapter
from ..layers.buffers import placement
from ..layers.layer import Layer
from .student import ADAPTER, LoraStudent
from .whitening import Whitening


OUTPUT = ".to_out.0"
CHILD = "erasure_adapters_in_training"  # of the denoiser, so that several processes find the parameters


class AdapterStudent:
    """Adapters, in training. At first they add nothing.

    Args:
        sites: the attentions.
        rank: of the bottlenecks.
        seed: of the first values.
        component: of what they are modules.

    Attributes:
        added: what each site added in the last pass with gradients, [B, tokens, C], while `watched`.
    """

    def __init__(self, sites: Sequence[str], rank: int, seed: int, component: str) -> None:
        self.sites, self.rank, self.seed, self.component = tuple(sites), rank, seed, component
        self.whitening = Whitening()
        self.on = True
        self.watched = False
        self.added: dict[str, torch.Tensor] = {}

    def low_rank(self, model: Any) -> Sequence[str]:
        """None: they do not read text."""
        return ()

    @contextmanager
    def inside(self, model: Any) -> Iterator[dict[str, nn.Parameter]]:
        handles: list[Any] = []
        parameters: dict[str, nn.Parameter] = {}
        children = nn.ModuleDict()
        model.add_module(CHILD, children)
        try:
            for site in self.sites:
                module = model.get_submodule(site)
                width, (device, _) = adapter.width_of(model, site), placement(model, module)
                values = self._first_values(site, width)
                own = nn.ParameterList([nn.Parameter(values[name].to(device)) for name in adapter.PARTS])
                children[site.replace(".", "_")] = own
                parameters |= {site + name: value for name, value in zip(adapter.PARTS, own, strict=True)}
                handles.append(module.register_forward_hook(self._behind(site, own)))
            yield parameters
        finally:
            for handle in handles:
                handle.remove()
            compat.remove_child(model, CHILD)
            self.added = {}

    def _first_values(self, site: str, width: int) -> dict[str, torch.Tensor]:
        """As torch begins a Linear, and zeros for what is added."""
        generator, bound = generator_for(self.seed, "adapter", site), width**-0.5
        return {
            adapter.DOWN: (2 * torch.rand(self.rank, width, generator=generator) - 1) * bound,
            adapter.DOWN_BIAS: (2 * torch.rand(self.rank, generator=generator) - 1) * bound,
            adapter.UP: torch.zeros(width, self.rank),
            adapter.UP_BIAS: torch.zeros(width),
        }

    def _behind(self, site: str, own: nn.ParameterList) -> Any:
        def add(module: nn.Module, args: Any, output: Any) -> Any:
            if not self.on:
                return None
            first = output[0] if isinstance(output, tuple) else output
            added = adapter.bottleneck(first.float(), *own)
            if self.watched and torch.is_grad_enabled():
                self.added[site] = added
            found = first + added.to(first.dtype)
            return (found, *output[1:]) if isinstance(output, tuple) else found

        return add

    def switch(self, model: Any, on: bool) -> None:
        self.on = on

    def shuffle(self, *what: object) -> None:
        """Nothing in them is random."""

    def layer(self, tensors: Mapping[str, torch.Tensor]) -> Layer:
        return Layer("adapter", self.sites, dict(tensors), self.component)


class OutputStudent(LoraStudent):
    """A LoRA on the output projections of attentions, the adapters' linear form: without what makes them bend, and on what they read.

    Attributes:
        added: as of [`AdapterStudent`].
    """

    def __init__(self, sites: Sequence[str], rank: int, seed: int, component: str) -> None:
        super().__init__([site + OUTPUT for site in sites], rank, seed, component)
        self.watched = False
        self.added: dict[str, torch.Tensor] = {}

    @contextmanager
    def inside(self, model: Any) -> Iterator[dict[str, nn.Parameter]]:
        with super().inside(model) as parameters:
            handles = [
                model.get_submodule(site).lora_B[ADAPTER].register_forward_hook(partial(self._note, site))
                for site in self.sites
            ]
            try:
                yield parameters
            finally:
                for handle in handles:
                    handle.remove()
                self.added = {}

    def _note(self, site: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.watched and torch.is_grad_enabled():
            self.added[site] = output
