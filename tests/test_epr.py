"""DuMo's network by itself: broken files and other UNets are refused, its size, and its training form."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInputError,
    with_schedule,
)
from diffusers_erasure.layers.epr import EPR, LearnedSchedule, fresh_tensors
from tests.helpers import ROUNDINGS, assert_same_weights, far, roundings, tiny_sd_pipe, tree, unchanged_by
from tests.test_skip import (
    EFFECT,
    FORMS,
    as_erasure,
    assert_close,
    erasure_of,
    given,
    inputs,
    predict,
    random_tensors,
    stock_residuals,
    tensors_of,
)


SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}


# --------------------------------------------------------------------------------------------------- files


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    compact = "conv_in.weight" not in tensors
    site = "conv_in.down" if compact else "conv_in.weight"
    changes: dict[str, dict[str, Any]] = {
        "a projection is missing": {"zero.1.weight": None, "zero.1.bias": None},
        "a bias is missing": {"zero.mid.bias": None},
        "a projection is not square": {"zero.0.weight": torch.ones(32, 31)},
        "both forms of a projection": {"zero.0.down": torch.ones(2, 32)},
        "one skip too many": {"zero.99.weight": torch.ones(4, 4), "zero.99.bias": torch.ones(4)},
        "a stranger": {"up_blocks.0.resnets.0.conv1.weight": torch.ones(3)},
        "not finite": {site: tensors[site] * torch.nan},
        "integers": {site: torch.ones(tensors[site].shape, dtype=torch.uint8)},
    }
    if compact:
        changes["half a delta is missing"] = {"conv_in.up": None}
        changes["factors of two ranks"] = {"conv_in.up": torch.ones(32, 7, 1, 1)}
        changes["no encoder"] = {name: None for name in tensors if not name.startswith("zero.")}
    merged = {**tensors, **changes[how]}
    return {name: value for name, value in merged.items() if value is not None}


COMMON = (
    "a projection is missing",
    "a bias is missing",
    "a projection is not square",
    "both forms of a projection",
    "one skip too many",
    "a stranger",
    "not finite",
    "integers",
)
COMPACT = ("half a delta is missing", "factors of two ranks", "no encoder")


@pytest.mark.parametrize(
    ("form", "how"),
    [*((form, how) for form in FORMS for how in COMMON), *(("compact", how) for how in COMPACT)],
)
def test_broken_files(pipe: Any, form: str, how: str) -> None:
    tensors = broken(random_tensors(pipe.unet, form), how)
    with pytest.raises(ErasureFileError):
        as_erasure(pipe, tensors)


def test_broken_sites(pipe: Any) -> None:
    tensors = random_tensors(pipe.unet, "compact")
    sites = erasure_of("compact").config.layers[0].sites
    for wrong in (sites[:-1], sites[::-1], ("mid_block",), ("conv_in", *sites[1:])):
        with pytest.raises(ErasureFileError, match="skips"):
            as_erasure(pipe, tensors, wrong)
    erasure = as_erasure(pipe, tensors)
    layer = dataclasses.replace(erasure.config.layers[0], component="text_encoder")
    with pytest.raises(ErasureFileError, match="UNet"):
        Erasure(dataclasses.replace(erasure.config, layers=(layer,)), erasure.tensors)


def other_width(tensors: dict[str, torch.Tensor]) -> None:
    for kind in ("weight", "bias"):
        tensors[f"zero.0.{kind}"] = tensors[f"zero.0.{kind}"][..., :16][:16]


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "another width": other_width,
    "a tensor more": lambda tensors: tensors.update({"conv_in.other": torch.ones(2)}),
    "a tensor less": lambda tensors: tensors.pop("time_embedding.linear_1.bias"),
    "another shape": lambda tensors: tensors.update({"conv_in.bias": torch.ones(31)}),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_copy_of_another_encoder(pipe: Any, how: str) -> None:
    tensors = random_tensors(pipe.unet, "full")
    CHANGES[how](tensors)
    erasure = as_erasure(pipe, tensors)

    def load() -> None:
        with pytest.raises(ErasureCompatibilityError, match="another architecture"):
            pipe.load_erasure(erasure)

    unchanged_by(pipe, load)


def test_deltas_of_another_encoder(pipe: Any) -> None:
    for site in ("down_blocks.0.resnets.0.norm1", "down_blocks.7.resnets.0.conv1", "time_embedding.linear_1"):
        tensors = random_tensors(pipe.unet, "compact")
        tensors[site + ".down"], tensors[site + ".up"] = torch.ones(2, 5), torch.ones(5, 2)
        with pytest.raises(ErasureCompatibilityError):
            pipe.load_erasure(as_erasure(pipe, tensors))
        assert pipe.list_erasures() == []


def test_other_denoisers_are_refused() -> None:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    with pytest.raises(ErasureCompatibilityError, match="UNet2DConditionModel"):
        EPR.fresh(transformer)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 32),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unusual: list[dict[str, Any]] = [
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")},
        {"class_embed_type": "timestep"},
        {"time_embedding_act_fn": "silu"},
        {"attention_type": "gated"},
    ]
    for change in unusual:
        with pytest.raises(ErasureCompatibilityError, match="skip"):
            EPR.fresh(UNet2DConditionModel(**{**settings, **change}))


@pytest.mark.parametrize(
    ("form", "zero_rank", "limit"), [("compact", 16, 7.8e6), ("compact", None, 30e6), ("full", None, 725e6)]
)
def test_size_of_an_artefact_for_stable_diffusion(form: str, zero_rank: int | None, limit: float) -> None:
    """By the shapes alone: 2 bytes a value, and at most 200 for the entry of each tensor in the header."""
    defaults = {k: v.default for k, v in inspect.signature(EPR.fresh).parameters.items() if k not in ("unet", "form")}
    with torch.device("meta"):
        tensors = fresh_tensors(UNet2DConditionModel(**SD15), form, **{**defaults, "zero_rank": zero_rank})
    size = sum(2 * value.numel() + 200 for value in tensors.values())
    assert 0.95 * limit < size <= limit
    assert len([name for name in tensors if name.startswith("zero.")]) == (2 if zero_rank is None else 3) * 13


# --------------------------------------------------------------------------------------------------- in training


def loss_of(unet: Any, **extra: Any) -> torch.Tensor:
    return unet(**inputs(unet), **extra).sample.square().sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(pipe: Any, form: str, checkpointing: bool) -> None:
    """Those of the loss by a stock ControlNet's route, also where activations are computed again on the way back."""
    unet = pipe.unet.requires_grad_(False).train(checkpointing)
    tensors = random_tensors(unet, form)
    network = EPR(unet, tensors, torch.device("cpu"), torch.float32, trainable=True)
    network.attach(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    loss = loss_of(unet)
    loss.backward()
    found = {name: value.grad for name, value in network.named_tensors().items()}
    assert [name for name, value in found.items() if value is None] == []
    assert {id(value) for value in network.parameters()} == {id(value) for value in network.named_tensors().values()}
    assert all(parameter.grad is None for parameter in unet.parameters())
    direction = {name: value / value.norm().clamp_min(1e-12) for name, value in found.items()}
    stock = tiny_sd_pipe().unet
    for group in ("zero.", "conv_in", "down_blocks.1", "mid_block", "time_embedding"):
        names = [name for name in tensors if name.startswith(group)]
        expected = sum(float((found[name] * direction[name]).sum()) for name in names)
        values = []
        for step in (1e-3, -1e-3):
            moved = {n: (v + step * direction[n] if n in names else v) for n, v in tensors.items()}
            residuals = stock_residuals(stock, moved)
            with torch.no_grad():
                values.append(float(loss_of(stock, **given(residuals)).double()))
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zero_rank", [None, 2])
def test_a_fresh_network_is_the_base_and_learns(pipe: Any, form: str, zero_rank: int | None) -> None:
    unet = pipe.unet.requires_grad_(False)
    base, before = predict(unet), tree(pipe)
    network = EPR.fresh(unet, form, 2, zero_rank)
    again = EPR.fresh(unet, form, 2, zero_rank)
    assert_same_weights(network.named_tensors(), again.named_tensors())
    network.attach(unet)
    assert torch.equal(predict(unet), base)
    with pytest.raises(ErasureInputError, match="detach"):
        network.attach(unet)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(unet).backward()
        optimizer.step()
    moved = [n for n, v in network.named_tensors().items() if not torch.equal(v, again.named_tensors()[n])]
    assert len(moved) > 0.9 * len(again.named_tensors())
    trained = predict(unet)
    assert far(trained.numpy(), base.numpy()) > EFFECT
    network.on = False
    assert torch.equal(predict(unet), base)
    network.on = True
    erasure = as_erasure(tiny_sd_pipe(), {n: v.detach().clone() for n, v in network.named_tensors().items()})
    network.detach()
    assert tree(pipe) == before
    pipe.load_erasure(erasure)
    assert torch.equal(predict(unet), trained)


def test_a_schedule_is_learned(pipe: Any) -> None:
    """Its gradients are in the row of the timestep, one for each skip; saved, it acts as it did in training."""
    unet = pipe.unet.requires_grad_(False)
    erasure = erasure_of("compact")
    network = EPR(unet, tensors_of(erasure), torch.device("cpu"), torch.float32, trainable=True).requires_grad_(False)
    network.schedule = LearnedSchedule(20, len(network.layer_sites))
    before = tree(pipe)
    network.attach(unet)
    loss_of(unet).backward()
    table = network.schedule.table
    assert table.grad is not None
    assert bool((table.grad[10] != 0).all()) and not bool(table.grad[[*range(10), *range(11, 20)]].any())
    with torch.no_grad():
        table.copy_(torch.rand(table.shape, generator=torch.Generator().manual_seed(5)))
    drawn = {time: predict(unet, time) for time in (0.0, 333.0, 999.0)}
    network.detach()
    assert tree(pipe) == before
    pipe.load_erasure(with_schedule(erasure, table.detach()))
    for time, oracle in drawn.items():
        assert roundings(predict(unet, time), oracle) <= ROUNDINGS


@pytest.mark.parametrize("form", FORMS)
def test_training_beside_a_loaded_erasure(pipe: Any, form: str) -> None:
    """One set of hooks: a pass of the one does not set off the other."""
    loaded, trained, stock = erasure_of("compact", 1), erasure_of(form, 2), tiny_sd_pipe().unet
    residuals = [stock_residuals(stock, tensors_of(erasure)) for erasure in (loaded, trained)]
    pipe.load_erasure(loaded)
    alone = predict(pipe.unet)
    network = EPR(pipe.unet, tensors_of(trained), torch.device("cpu"), torch.float32, trainable=True)
    network.attach(pipe.unet)
    total = [a + b for a, b in zip(*residuals, strict=True)]
    assert_close(predict(pipe.unet), predict(stock, **given(total)), alone)
    network.detach()
    assert torch.equal(predict(pipe.unet), alone)


def test_wrong_arguments(pipe: Any) -> None:
    for arguments in ({"form": "half"}, {"rank": 0}, {"zero_rank": 0}):
        with pytest.raises(ErasureInputError, match="EPR"):
            EPR.fresh(pipe.unet, **arguments)
