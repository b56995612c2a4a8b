"""The denoiser in training: one network, which is the teacher with its student off and the student with it on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .. import compat
from ..base_model import component, family_of
from ..denoising.calls import Caller
from ..denoising.prompts import Prompt, Prompts
from ..denoising.sampler import Sampler
from ..denoising.twin import private
from ..errors import ErasureInputError
from ..families import Family
from .student import Student


DENOISER_NAMES = {"unet": "UNet", "transformer": "transformer"}


class Network:
    """A frozen denoiser with a student in float32; made by [`in_training`].

    Args:
        family ([`Family`]): of the base model.
        model: a UNet or transformer that nobody else draws with, the student in it.
        student ([`Student`]): what is trained.
        parameters: its parameters by name.
        prompts ([`Prompts`]): encoded prompts.
        sampler ([`Sampler`]): scales what goes into the network.
        accelerator ([`Accelerator`]): wraps the network for several processes.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        student: Student,
        parameters: Mapping[str, nn.Parameter],
        prompts: Prompts,
        sampler: Sampler,
        accelerator: Accelerator,
    ) -> None:
        self.model = model
        self.trained = student
        self.factors = dict(parameters)
        self.prompts = prompts
        self.sampler = sampler
        self.call = Caller(family, model, prompts, sampler)
        self.student_module = accelerator.prepare_model(model, device_placement=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, float32."""
        return list(self.factors.values())

    def student(self, latents: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """The prediction with the student on, float32 [B, C, H, W]; gradients flow where they are enabled."""
        return self.call(latents, timesteps, prompts, module=self.student_module)

    @torch.no_grad()
    def student_rows(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Sequence[Sequence[Prompt]],
        guidance: Sequence[float] | None = None,
    ) -> list[torch.Tensor]:
        """Predictions with the student on for several lists of prompts in one batch, without gradients."""
        return self.call.rows(latents, timesteps, rows, guidance)

    @torch.no_grad()
    def teacher_rows(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        rows: Sequence[Sequence[Prompt]],
        guidance: Sequence[float] | None = None,
    ) -> list[torch.Tensor]:
        """Predictions of the base, the student off, for several lists of prompts in one batch."""
        self.trained.switch(self.model, False)
        try:
            return self.call.rows(latents, timesteps, rows, guidance)
        finally:
            self.trained.switch(self.model, True)


def check_trainable(pipe: Any) -> None:
    """See that a pipeline's denoiser can be trained through.

    Raises:
        ErasureInputError: it carries LoRAs, is offloaded, or computes in float16.
    """
    name = family_of(pipe).denoiser
    model, called = component(pipe, name), DENOISER_NAMES[name]
    if compat.has_adapters(model):
        raise ErasureInputError(
            f"The {called} carries LoRAs, but an erasure is trained on the clean base model. Call `pipe.unload_lora_weights()` "
            "first, and load them again afterwards: they compose with the erasure."
        )
    if compat.is_offloaded(model):
        raise ErasureInputError(
            f"The {called} is offloaded, but training needs it in memory. Load the pipeline without offloading, or call "
            "`pipe.remove_all_hooks()`. With `TrainingRun(release=True)` the text encoders and the VAE leave the memory."
        )
    if model.dtype == torch.float16:
        raise ErasureInputError(
            f"The {called} is in float16, in which small gradients vanish. Load it with `dtype=torch.bfloat16` (or float32); "
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
    """Put a student into a private twin of the pipeline's denoiser while a block runs.

    Where there can be no twin it is put into the denoiser itself, which is afterwards as it was, bit for bit.
    """
    family = family_of(pipe)
    model = private(component(pipe, family.denoiser))
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    had_checkpointing, was_training, attributes = model.is_gradient_checkpointing, model.training, set(vars(model))
    model.requires_grad_(False).eval()
    try:
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        with without_cudnn_attention(), student.inside(model) as parameters:
            yield Network(family, model, student, parameters, prompts, sampler, accelerator)
    finally:
        if gradient_checkpointing and not had_checkpointing:
            model.disable_gradient_checkpointing()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        for name in set(vars(model)) - attributes:  # what peft and accelerate noted down on it
            delattr(model, name)
        model.train(was_training)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """torch picks among its other kinds of attention: cuDNN's backward pass failed on an H200 in FLUX.1's shapes (torch 2.11)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
