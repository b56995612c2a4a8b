"""How many operations erasures add to a step of the UNet, each of which a GPU is to be told of: views are none."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.unet_step import CountKernels
from diffusers_erasure import Erasure, with_gate, with_schedule
from diffusers_erasure.layers.gate import Gate
from tests.helpers import UNET_SITES, equal, images, random_erasure, rows_of, tiny_sd_pipe
from tests.test_activation import ATTENTION, FF, as_erasure, make_plan
from tests.test_skip import erasure_of as skip_erasure


SELF_SITES = tuple(site.replace("attn2", "attn1") for site in UNET_SITES)
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


def loras(*changes: Callable[[Erasure], Erasure], sites: tuple[str, ...] = UNET_SITES) -> Any:
    """A pipeline with one erasure for each of `changes`, which give it a schedule or a gate."""
    pipe = tiny_sd_pipe()
    for number, change in enumerate(changes):
        pipe.load_erasure(change(random_erasure(pipe, "lora", sites, seed=number)), str(number))
    return pipe


def plain(erasure: Erasure) -> Erasure:
    return erasure


def test_a_schedule() -> None:
    """At a site what multiplies, and for several erasures what puts theirs beside one another; the look-up is one a pass."""
    sites = len(UNET_SITES)
    table = torch.rand(7, sites, generator=torch.Generator().manual_seed(2))
    look_up = 7 + 1  # bin and row
    assert added(loras(plain, sites=SELF_SITES)) == [2 * sites] * 3
    found = added(loras(lambda erasure: with_schedule(erasure, table)))
    assert found == [3 * sites + look_up] * 3
    half = added(loras(lambda erasure: with_schedule(erasure, table)), {"0": 0.5})
    assert half == [3 * sites + look_up + 1] * 3
    two = added(loras(lambda erasure: with_schedule(erasure, table), plain))
    assert two == [5 * sites + look_up + 1, *[5 * sites + look_up] * 2]  # at first the strengths by row are made
    alike = added(loras(*(lambda erasure: with_schedule(erasure, [0.2, 0.5, 1.0]),) * 2))
    assert alike[1:] == [4 * sites + look_up + 1 + 1] * 2  # two rows of one bin, put together once


def gated(erasure: Erasure) -> Erasure:
    return with_gate(erasure, tiny_sd_pipe(), "red apple", tokens=True)


def gate_of(pipe: Any) -> Gate:
    (gate,) = pipe.unet.erasure_modules.conditions.gates.values()
    return gate


def test_a_gate() -> None:
    """At a site what multiplies; the gate itself is one a pass, and copies what was noted once."""
    sites, pipe = len(UNET_SITES), loras(gated)
    with torch.no_grad(), CountKernels() as counter:
        gate_of(pipe)(ROWS)
    gate = counter.count - 1  # the copy
    assert added(pipe) == [3 * sites + gate] * 3
    assert added(pipe, {"0": 0.5}) == [3 * sites + gate + 1] * 3
    rows_of(pipe, "a sea")
    assert added(pipe) == [3 * sites + gate + 1, *[3 * sites + gate] * 2]


def test_a_gate_asks_once_a_request_and_anew_when_a_text_was_noted() -> None:
    pipe, called = loras(gated), []
    gate = gate_of(pipe)
    gate.register_forward_hook(lambda module, args, output: called.append(output))
    asked = images(pipe, num_inference_steps=4)
    assert len(called) == 1
    assert equal(images(pipe, num_inference_steps=4), asked) and len(called) == 2
    rows, called[:] = rows_of(pipe, "red"), []
    gate.record.fill_(torch.nan)

    def note(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            gate.note(torch.full(rows.shape[:2], 10**6), rows)
        return {}

    images(pipe, num_inference_steps=4, prompt=None, prompt_embeds=rows, guidance_scale=1.0, callback_on_step_end=note)
    unknown, known = map(float, called)
    assert unknown == 1.0 and known < 1.0


@pytest.mark.parametrize("form", ["full", "compact"])
def test_a_schedule_of_residuals(form: str) -> None:
    """At a residual what multiplies; the look-up is one a pass, and all of its row is used."""
    erasure = skip_erasure(form)
    sites = len(erasure.config.layers[0].sites)
    table = torch.rand(7, sites, generator=torch.Generator().manual_seed(2))
    found = []
    for each in (erasure, with_schedule(erasure, table)):
        pipe = tiny_sd_pipe()
        pipe.load_erasure(each, "a")
        found.append(added(pipe))
    unscheduled, scheduled = found
    assert unscheduled == [unscheduled[0]] * 3
    assert scheduled == [unscheduled[0] + sites + 8 + 1] * 3
