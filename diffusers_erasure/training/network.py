"""The denoiser in training: one network, which is the teacher with its LoRA off and the student with it on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import nn

from .. import compat
from ..base_model import component
from ..errors import ErasureInputError
from ..layers.lora import DOWN, UP
from .prompts import Prompts
from .sampler import Sampler, generator_for


ADAPTER = "erasure_in_training"


class Network:
    """A UNet with a LoRA in float32 on some of its modules; made by [`in_training`].

    Args:
        unet: the UNet, peft's adapter in it.
        sites: names of the modules that have the adapter.
        prompts ([`Prompts`]): encoded prompts.
        sampler ([`Sampler`]): scales what goes into the network.
        accelerator ([`Accelerator`]): wraps the network for several processes.
    """

    def __init__(
        self, unet: Any, sites: Sequence[str], prompts: Prompts, sampler: Sampler, accelerator: Accelerator
    ) -> None:
        self.unet = unet
        self.prompts = prompts
        self.sampler = sampler
        self.factors: dict[str, nn.Parameter] = {}  # `site.lora_A.weight`, `site.lora_B.weight` -> parameter
        for site in sites:
            layer = unet.get_submodule(site)
            self.factors[site + DOWN] = layer.lora_A[ADAPTER].weight
            self.factors[site + UP] = layer.lora_B[ADAPTER].weight
        self.student_module = accelerator.prepare_model(unet, device_placement=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, float32."""
        return list(self.factors.values())

    def student(self, latents: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The prediction with the LoRA on, float32 [B, C, H, W]; gradients flow where they are enabled."""
        return self._call(self.student_module, latents, timesteps, prompts)

    @torch.no_grad()
    def student_rows(
        self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Sequence[Sequence[str]]
    ) -> list[torch.Tensor]:
        """Predictions with the LoRA on for several lists of prompts in one batch, without gradients."""
        return self._rows(latents, timesteps, rows)

    @torch.no_grad()
    def teacher_rows(
        self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Sequence[Sequence[str]]
    ) -> list[torch.Tensor]:
        """Predictions of the base, the LoRA off, for several lists of prompts in one batch."""
        self.unet.disable_adapters()
        try:
            return self._rows(latents, timesteps, rows)
        finally:
            self.unet.enable_adapters()

    def _rows(
        self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Sequence[Sequence[str]]
    ) -> list[torch.Tensor]:
        count = len(rows)
        flat = [prompt for row in rows for prompt in row]
        repeated = latents.repeat(count, *(1,) * (latents.ndim - 1)), timesteps.repeat(count)
        return list(self._call(self.unet, *repeated, flat).chunk(count))

    def _call(
        self, module: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        device, dtype = self.unet.device, self.unet.dtype
        timesteps = timesteps.to(device)
        scaled = self.sampler.model_input(latents.to(device), timesteps).to(dtype)
        arguments = self.prompts.batch(prompts, device, dtype)
        return module(scaled, timesteps, return_dict=False, **arguments)[0].float()


def check_trainable(pipe: Any) -> None:
    """See that a pipeline's denoiser can be trained through.

    Raises:
        ErasureInputError: it carries LoRAs, is offloaded, or computes in float16.
    """
    unet = component(pipe, "unet")
    if compat.has_adapters(unet):
        raise ErasureInputError(
            "The UNet carries LoRAs, but an erasure is trained on the clean base model. Call `pipe.unload_lora_weights()` "
            "first, and load them again afterwards: they compose with the erasure."
        )
    if compat.is_offloaded(unet):
        raise ErasureInputError(
            "The UNet is offloaded, but training needs it in memory. Load the pipeline without offloading, or call "
            "`pipe.remove_all_hooks()`; the text encoders and the VAE are moved away while training."
        )
    if unet.dtype == torch.float16:
        raise ErasureInputError(
            "The UNet is in float16, in which small gradients vanish. Load it with `dtype=torch.bfloat16` (or float32); "
            "the LoRA itself is trained in float32 with either."
        )


@contextmanager
def in_training(
    pipe: Any,
    sites: Mapping[str, nn.Module],
    rank: int,
    seed: int,
    prompts: Prompts,
    sampler: Sampler,
    accelerator: Accelerator,
    gradient_checkpointing: bool,
) -> Iterator[Network]:
    """Put a LoRA into the pipeline's UNet while a block runs; afterwards the UNet is as it was, bit for bit."""
    unet = component(pipe, "unet")
    wanted = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    had_checkpointing, was_training, attributes = unet.is_gradient_checkpointing, unet.training, set(vars(unet))
    unet.requires_grad_(False).eval()
    try:
        # Exact names: an ending could match other modules too.
        with torch.random.fork_rng(devices=[]):  # peft draws first values, which are then set from the seed
            unet.add_adapter(
                LoraConfig(r=rank, lora_alpha=rank, target_modules=compat.exactly(sites), init_lora_weights=True),
                adapter_name=ADAPTER,
            )
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        for site in sites:
            layer = unet.get_submodule(site)
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            values = torch.randn(down.shape, generator=generator_for(seed, "lora", site)) / rank
            down.data = values.to(down.device)
            up.data = torch.zeros(up.shape, device=up.device)
        yield Network(unet, list(sites), prompts, sampler, accelerator)
    finally:
        compat.delete_adapter(unet, ADAPTER)
        if gradient_checkpointing and not had_checkpointing:
            unet.disable_gradient_checkpointing()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        for name in set(vars(unet)) - attributes:  # what peft and accelerate noted down on it
            delattr(unet, name)
        unet.train(was_training)
