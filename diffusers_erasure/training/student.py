"""What is trained in or beside the frozen denoiser; switched off, the denoiser is the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from peft import LoraConfig
from torch import nn

from .. import compat
from ..denoising.sampler import generator_for
from ..layers.layer import Layer
from ..low_rank import DOWN, UP


ADAPTER = "erasure_in_training"


class Student(Protocol):
    """What is trained."""

    def inside(self, model: Any) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """Put it into a denoiser whose parameters are frozen, while a block runs; gives its parameters by name, float32."""
        ...

    def switch(self, model: Any, on: bool) -> None:
        """Let it act, or leave the base alone."""
        ...

    def layer(self, tensors: Mapping[str, torch.Tensor]) -> Layer:
        """The layer that acts as it does, from its parameters' values by name, float32, on the CPU."""
        ...


class LoraStudent:
    """A LoRA on some modules, by peft; alpha is the rank.

    Args:
        sites: names of the modules.
        rank: its rank.
        seed: of its first values.
        component: of what they are modules.
    """

    def __init__(self, sites: Sequence[str], rank: int, seed: int, component: str = "unet") -> None:
        self.sites, self.rank, self.seed, self.component = tuple(sites), rank, seed, component

    @contextmanager
    def inside(self, model: Any) -> Iterator[dict[str, nn.Parameter]]:
        """See [`Student`]; `site.lora_A.weight` [r, in] and `site.lora_B.weight` [out, r] (convolutions: 4-d)."""
        try:
            # peft draws first values. On the meta device these take nothing from the generator of the process, by which others
            # may be drawing, and they are then set from the seed. Exact names: an ending could match other modules too.
            with torch.device("meta"):
                model.add_adapter(
                    LoraConfig(
                        r=self.rank,
                        lora_alpha=self.rank,
                        target_modules=compat.exactly(self.sites),
                        init_lora_weights=True,
                    ),
                    adapter_name=ADAPTER,
                )
            factors: dict[str, nn.Parameter] = {}
            for site in self.sites:
                layer = model.get_submodule(site)
                down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
                device = next(compat.base_layer(layer).parameters()).device
                values = torch.randn(down.weight.shape, generator=generator_for(self.seed, "lora", site)) / self.rank
                down.weight = nn.Parameter(values.to(device))
                up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))
                factors[site + DOWN], factors[site + UP] = down.weight, up.weight
            yield factors
        finally:
            compat.delete_adapter(model, ADAPTER)

    def switch(self, model: Any, on: bool) -> None:
        (model.enable_adapters if on else model.disable_adapters)()

    def layer(self, tensors: Mapping[str, torch.Tensor]) -> Layer:
        return Layer("lora", self.sites, tensors, self.component)
