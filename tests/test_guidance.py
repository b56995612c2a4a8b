"""Guidance by gradients of the latents draws, erased; what trains is refused, whatever requires gradients beside it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAttendAndExcitePipeline
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_erasure import ErasureTrainingError
from tests.helpers import CONV_SITES, PROMPT, assert_like, dense_edit, random_erasure, tiny_sd_pipe


@pytest.fixture
def erased(pipe: Any) -> Iterator[Any]:
    """As diffusers loads a model: in eval mode, with parameters that can be trained."""
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    pipe.load_erasure(random_erasure(pipe))
    yield pipe


def attend_and_excite(pipe: Any) -> np.ndarray:
    guided = StableDiffusionAttendAndExcitePipeline.from_pipe(pipe)
    guided.set_progress_bar_config(disable=True)
    drawn = guided(
        PROMPT,
        token_indices=[4, 5],
        num_inference_steps=2,
        thresholds={0: 0.99},  # is never reached, so that the first step refines by many gradients
        max_iter_to_alter=2,
        attn_res=(4, 4),
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    return np.asarray(drawn)


def test_attend_and_excite(erased: Any) -> None:
    erasure = random_erasure(tiny_sd_pipe())
    drawn = attend_and_excite(erased)
    base, oracle = attend_and_excite(tiny_sd_pipe()), attend_and_excite(dense_edit(tiny_sd_pipe(), erasure))
    assert_like(drawn, oracle, base)


def predict(pipe: Any, sample: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    rows = torch.zeros(1, 24, 32) if rows is None else rows
    return pipe.unet(sample, torch.tensor(10), encoder_hidden_states=rows).sample


def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def test_what_guides(erased: Any) -> None:
    """The latents themselves, what was computed from them, and by name."""
    for steer in (lambda x: x, lambda x: (x * 2).unsqueeze(0).mean(0), lambda x: torch.cat([x, x])[:1]):
        leaf = latents().requires_grad_()
        predict(erased, steer(leaf)).sum().backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    leaf = latents().requires_grad_()
    erased.unet(sample=leaf, timestep=torch.tensor(10), encoder_hidden_states=torch.zeros(1, 24, 32))


def trained_text(pipe: Any) -> None:
    """Textual inversion, with guided latents beside it."""
    embedding = nn.Parameter(torch.zeros(1, 24, 32))
    predict(pipe, latents().requires_grad_(), embedding * 1)


def in_training_mode(pipe: Any) -> None:
    pipe.unet.train()
    predict(pipe, latents().requires_grad_())


def through_sampling(pipe: Any) -> None:
    """AlignProp: the second step's sample comes from the first step's prediction."""
    with pipe.erasures_disabled():
        sample = predict(pipe, latents().requires_grad_())
    predict(pipe, sample)


def through_checkpoints(pipe: Any) -> None:
    """Reentrant checkpoints hide what they compute with from the graph."""
    with pipe.erasures_disabled():
        leaf = latents().requires_grad_()
        sample = checkpoint(lambda x: predict(pipe, x), leaf, use_reentrant=True)
    predict(pipe, sample)


def through_tensors(pipe: Any) -> None:
    """Weights that are no `nn.Parameter` while they are trained, as with `torch.func.functional_call`."""
    name = CONV_SITES[0].removeprefix("unet.") + ".weight"
    weight = pipe.unet.get_parameter(name).detach().clone().requires_grad_()
    arguments = (latents() * weight.sum(), torch.tensor(10), torch.zeros(1, 24, 32))
    torch.func.functional_call(pipe.unet, {name: weight}, arguments)


def from_a_parameter(pipe: Any) -> None:
    """A network that makes the noise."""
    predict(pipe, nn.Parameter(torch.ones(1)) * latents())


def through_many_steps(pipe: Any) -> None:
    sample = latents().requires_grad_()
    for _ in range(2000):
        sample = sample + 1e-3
    predict(pipe, sample)


def pooled_rows(pipe: Any) -> None:
    """SDXL's pooled vector, within a dictionary."""
    rows = {"text_embeds": nn.Parameter(torch.zeros(1, 8)) * 1, "time_ids": torch.zeros(1, 6)}
    arguments = (latents().requires_grad_(), torch.tensor(10), torch.zeros(1, 24, 32))
    pipe.unet(*arguments, added_cond_kwargs=rows)


def residuals(pipe: Any, weight: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """A pass beside a ControlNet of one weight."""
    shapes: list[torch.Size] = []
    hooks = [
        each.register_forward_hook(lambda *args: shapes.append(args[-1].shape))
        for block in pipe.unet.down_blocks
        for each in (*block.resnets, *(block.downsamplers or []))
    ]
    hooks.append(pipe.unet.mid_block.register_forward_hook(lambda *args: shapes.append(args[-1].shape)))
    with torch.no_grad():
        first = pipe.unet.conv_in(latents()).shape
        predict(pipe, latents())
    for hook in hooks:
        hook.remove()
    made = [(weight * sample.mean()).expand(shape) for shape in (first, *shapes)]
    return pipe.unet(
        sample,
        torch.tensor(10),
        torch.zeros(1, 24, 32),
        down_block_additional_residuals=tuple(made[:-1]),
        mid_block_additional_residual=made[-1],
    ).sample


def trained_control(pipe: Any) -> None:
    """A ControlNet's training, with the UNet frozen or not, and guided latents or none."""
    residuals(pipe, nn.Parameter(torch.ones(1)), latents().requires_grad_())


TRAINING: list[Callable[[Any], None]] = [
    lambda pipe: predict(pipe, latents()).sum().backward(),
    trained_text,
    pooled_rows,
    trained_control,
    in_training_mode,
    through_sampling,
    through_checkpoints,
    through_tensors,
    from_a_parameter,
    through_many_steps,
]
NAMES = ["a plain sample", *(function.__name__ for function in TRAINING[1:])]


@pytest.mark.parametrize("train", TRAINING, ids=NAMES)
def test_what_trains(erased: Any, train: Callable[[Any], None]) -> None:
    with pytest.raises(ErasureTrainingError):
        train(erased)


def test_frozen_weights_are_not_trained(erased: Any) -> None:
    """Then latents may come from anything, in either mode; text rows may not require gradients all the same."""
    erased.unet.requires_grad_(False)
    from_a_parameter(erased)
    in_training_mode(erased)
    for train in (trained_text, pooled_rows, trained_control):
        with pytest.raises(ErasureTrainingError):
            train(erased)
    with pytest.raises(ErasureTrainingError):
        residuals(erased, nn.Parameter(torch.ones(1)), latents())


@pytest.mark.parametrize("frozen", [False, True])
def test_guidance_through_a_frozen_controlnet(erased: Any, frozen: bool) -> None:
    erased.unet.requires_grad_(not frozen)
    leaf = latents().requires_grad_()
    residuals(erased, torch.ones(1), leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_training_that_looks_like_guidance_is_not_noticed(erased: Any) -> None:
    """As the threat model says: weights in eval mode, with a sample that requires gradients."""
    weight = erased.unet.conv_in.weight
    predict(erased, latents().requires_grad_()).sum().backward()
    assert weight.requires_grad and weight.grad is not None and bool(weight.grad.any())
