"""How many operations erasures add to a step of the UNet, each of which a GPU is to be told of: views are none."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.unet_step import CountKernels
from tests.helpers import tiny_sd_pipe
from tests.test_activation import ATTENTION, FF, as_erasure, make_plan


ROWS = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def operations(pipe: Any, timestep: float = 500.0) -> int:
    with torch.no_grad(), CountKernels() as counter:
        pipe.unet(LATENTS, torch.tensor(timestep), encoder_hidden_states=ROWS)
    return counter.count


def added(pipe: Any, strengths: dict[str, Any] | None = None) -> list[int]:
    """By a first step and by two later ones, of other timesteps."""
    bare = operations(tiny_sd_pipe())
    with pipe.erasure_strengths(strengths) if strengths else nullcontext():
        return [operations(pipe, timestep) - bare for timestep in (500.0, 300.0, 20.0)]


@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.5, 0.2, 0.5), (0.5, 0.2, 0.0)])
def test_activation(strengths: tuple[float, ...]) -> None:
    """One for each site; and to look up the timestep, one for each strength and one that puts these together."""
    pipe = tiny_sd_pipe()
    pipe.load_erasure(as_erasure(make_plan((*FF, *ATTENTION))), "a")
    kinds = len(set(strengths))
    first, *later = added(pipe, {"a": strengths})
    assert max(later) <= len((*FF, *ATTENTION)) + 2 + kinds + (kinds > 1)
    assert first > max(later)  # makes the tables
