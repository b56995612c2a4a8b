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
from .whitening import Whitening


ADAPTER = "erasure_in_training"


class Student(Protocol):
    """What is trained.

    Attributes:
        whitening ([`Whitening`]): how it reads text; set by the loop, which knows the prompts.
    """

    whitening: Whitening

    def low_rank(self, model: Any) -> Sequence[str]:
        """The modules of a denoiser that it has a low-rank change of; where they read text it can be whitened."""
        ...

    def inside(self, model: Any) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """Put it into a denoiser whose parameters are frozen, while a block runs; gives its parameters by name, float32."""
        ...

    def switch(self, model: Any, on: bool) -> None:
        """Let it act, or leave the base alone."""
        ...

    def shuffle(self, *what: object) -> None:
        """Draw anew what is random in its next passes with gradients; it depends on its seed and on `what` alone."""
        ...

    def layer(self, tensors: Mapping[str, torch.Tensor]) -> Layer:
        """The layer that acts as it does, from its parameters' values by name, float32, on the CPU."""
        ...


class SeededDropout(nn.Module):
    """Dropout in passes with gradients, the same in each of them until its seed is another one: activations may be computed again.

    Args:
        share: of the values that are left out.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.seed = share, 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return values
        generator = torch.Generator(device=values.device).manual_seed(self.seed)
        kept = torch.rand(values.shape, generator=generator, device=values.device) >= self.share
        return values * kept / (1 - self.share)


class LoraStudent:
    """A LoRA on some modules, by peft; alpha is the rank.

    Args:
        sites: names of the modules.
        rank: its rank.
        seed: of its first values.
        component: of what they are modules.
        dropout: share of what the LoRA reads that is left out while it is trained.
    """

    def __init__(
        self, sites: Sequence[str], rank: int, seed: int, component: str = "unet", dropout: float = 0.0
    ) -> None:
        self.sites, self.rank, self.seed, self.component = tuple(sites), rank, seed, component
        self.dropout = {site: SeededDropout(dropout) for site in self.sites} if dropout else {}
        self.whitening = Whitening()

    def low_rank(self, model: Any) -> Sequence[str]:
        return self.sites

    @contextmanager
    def inside(self, model: Any) -> Iterator[dict[str, nn.Parameter]]:
        """See [`Student`]; `site.lora_A.weight` [r, in] and `site.lora_B.weight` [out, r] (convolutions: 4-d). Where text is read
        whitened the first one is what W is behind."""
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
                if site in self.dropout:
                    layer.lora_dropout[ADAPTER] = self.dropout[site]
                factors[site + DOWN], factors[site + UP] = down.weight, up.weight
                self.whitening.register(site, down, "weight")
            yield factors
        finally:
            compat.delete_adapter(model, ADAPTER)

    def switch(self, model: Any, on: bool) -> None:
        (model.enable_adapters if on else model.disable_adapters)()

    def shuffle(self, *what: object) -> None:
        for site, dropout in self.dropout.items():
            dropout.seed = generator_for(self.seed, "dropout", site, *what).initial_seed()

    def layer(self, tensors: Mapping[str, torch.Tensor]) -> Layer:
        return Layer("lora", self.sites, self.whitening.applied(tensors, DOWN), self.component)
