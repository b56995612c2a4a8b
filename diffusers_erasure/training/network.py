"""The denoiser in training: one network, which is the teacher with its student off and the student with it on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .. import compat
from ..base_model import component
from ..denoising.prompts import Prompts
from ..denoising.sampler import Sampler, placed
from ..denoising.twin import private
from ..errors import ErasureInputError
from .student import Student


class Network:
    """A frozen UNet with a student in float32; made by [`in_training`].

    Args:
        unet: a UNet that nobody else draws with, the student in it.
        student ([`Student`]): what is trained.
        parameters: its parameters by name.
        prompts ([`Prompts`]): encoded prompts.
        sampler ([`Sampler`]): scales what goes into the network.
        accelerator ([`Accelerator`]): wraps the network for several processes.
    """

    def __init__(
        self,
        unet: Any,
        student: Student,
        parameters: Mapping[str, nn.Parameter],
        prompts: Prompts,
        sampler: Sampler,
        accelerator: Accelerator,
    ) -> None:
        self.unet = unet
        self.trained = student
        self.factors = dict(parameters)
        self.prompts = prompts
        self.sampler = sampler
        self.student_module = accelerator.prepare_model(unet, device_placement=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, float32."""
        return list(self.factors.values())

    def student(self, latents: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The prediction with the student on, float32 [B, C, H, W]; gradients flow where they are enabled."""
        return self._call(self.student_module, latents, timesteps, prompts)

    @torch.no_grad()
    def student_rows(
        self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Sequence[Sequence[str]]
    ) -> list[torch.Tensor]:
        """Predictions with the student on for several lists of prompts in one batch, without gradients."""
        return self._rows(latents, timesteps, rows)

    @torch.no_grad()
    def teacher_rows(
        self, latents: torch.Tensor, timesteps: torch.Tensor, rows: Sequence[Sequence[str]]
    ) -> list[torch.Tensor]:
        """Predictions of the base, the student off, for several lists of prompts in one batch."""
        self.trained.switch(self.unet, False)
        try:
            return self._rows(latents, timesteps, rows)
        finally:
            self.trained.switch(self.unet, True)

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
        timesteps = placed(timesteps, device)
        scaled = self.sampler.model_input(placed(latents, device), timesteps).to(dtype)
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
            "`pipe.remove_all_hooks()`. With `TrainingRun(release=True)` the text encoders and the VAE leave the memory."
        )
    if unet.dtype == torch.float16:
        raise ErasureInputError(
            "The UNet is in float16, in which small gradients vanish. Load it with `dtype=torch.bfloat16` (or float32); "
            "the LoRA itself is trained in float32 with either."
        )


@contextmanager
def in_training(
    pipe: Any,
    student: Student,
    prompts: Prompts,
    sampler: Sampler,
    accelerator: Accelerator,
    gradient_checkpointing: bool,
) -> Iterator[Network]:
    """Put a student into a private twin of the pipeline's UNet while a block runs.

    Where there can be no twin it is put into the UNet itself, which is afterwards as it was, bit for bit.
    """
    unet = private(component(pipe, "unet"))
    wanted = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    had_checkpointing, was_training, attributes = unet.is_gradient_checkpointing, unet.training, set(vars(unet))
    unet.requires_grad_(False).eval()
    try:
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        with student.inside(unet) as parameters:
            yield Network(unet, student, parameters, prompts, sampler, accelerator)
    finally:
        if gradient_checkpointing and not had_checkpointing:
            unet.disable_gradient_checkpointing()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        for name in set(vars(unet)) - attributes:  # what peft and accelerate noted down on it
            delattr(unet, name)
        unet.train(was_training)
