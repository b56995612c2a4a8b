"""What is made of the text rows once and kept for the later steps of a request: the same as if it were made anew each time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from benchmarks.unet_step import CountKernels
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.live import requests
from diffusers_erasure.live.state import states
from tests.helpers import random_erasure, tiny_sd_pipe


LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def fresh_rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(seed))


def erased(kind: str = "lora", rank: int = 2, count: int = 1) -> Any:
    pipe = tiny_sd_pipe()
    sites = tuple(f"unet.{name}" for name in text_readers(pipe)) if kind == "lora" else ()
    for number in range(count):
        pipe.load_erasure(random_erasure(pipe, kind, sites, rank=rank, seed=number), str(number))
    return pipe


@contextmanager
def a_request(pipe: Any) -> Iterator[None]:
    """As within a call of the pipeline."""
    with requests.request(pipe, states) as frame:
        try:
            yield
        finally:
            from diffusers_erasure.live.attachment import end_request

            end_request(frame)


def step(pipe: Any, rows: torch.Tensor) -> torch.Tensor:
    return pipe.unet(LATENTS, torch.tensor(500), encoder_hidden_states=rows).sample.clone()


def anew(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """A step of a pipeline that has seen nothing."""
    with torch.no_grad():
        return step(erased(kind), rows.clone())


def operations(pipe: Any, rows: torch.Tensor) -> int:
    with torch.no_grad(), CountKernels() as counter:
        step(pipe, rows)
    return counter.count


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("strengths", [{}, {"0": 0.5}, {"0": [0.5, 0.0]}])
def test_operations_of_a_lora(rank: int, count: int, strengths: dict[str, Any]) -> None:
    """One for each module that reads text rows, and two for all of them together in the first step."""
    pipe, rows = erased("lora", rank, count), fresh_rows()
    readers, bare = len(text_readers(pipe)), operations(tiny_sd_pipe(), rows)
    with pipe.erasure_strengths(strengths), a_request(pipe):
        operations(pipe, fresh_rows(1))  # the strengths become a tensor once
        assert operations(pipe, rows) - bare <= readers + 2
        assert operations(pipe, rows) - bare == readers


@pytest.mark.parametrize("strengths", [{}, {"0": 0.5}, {"0": [0.5, 0.0]}])
def test_operations_of_a_map(strengths: dict[str, Any]) -> None:
    pipe, rows = erased("text_map", count=2), fresh_rows()
    bare = operations(tiny_sd_pipe(), rows)
    with pipe.erasure_strengths(strengths), a_request(pipe):
        operations(pipe, fresh_rows(1))
        assert 0 < operations(pipe, rows) - bare <= 3
        assert operations(pipe, rows) == bare


WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "in place": lambda rows: rows.copy_(fresh_rows(7)),
    "a part": lambda rows: rows[0].mul_(-1),
    "through a view": lambda rows: rows.view(-1).add_(1.0),
    "out": lambda rows: torch.mul(fresh_rows(7), 2, out=rows),
    "another storage": lambda rows: setattr(rows, "data", fresh_rows(7)) or rows,
}


@pytest.mark.parametrize("kind", ["lora", "text_map"])
@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("inference", [False, True])
def test_rows_that_are_overwritten(kind: str, write: str, inference: bool) -> None:
    """`inference_mode` counts no writes, so nothing is kept of rows that were made in it."""
    if inference and write == "another storage":
        pytest.skip("torch allows no such write there")
    pipe = erased(kind)
    with torch.inference_mode() if inference else torch.no_grad(), a_request(pipe):
        rows = fresh_rows() * 1.0
        for _ in range(2):
            before = step(pipe, rows)
        WRITES[write](rows)
        after = step(pipe, rows)
        assert torch.equal(after, anew(kind, rows)) and not torch.equal(after, before)


@pytest.mark.parametrize("kind", ["lora", "text_map"])
def test_what_else_may_change(kind: str) -> None:
    """Other rows that have the place of freed ones, strengths, erasures, dtypes."""
    pipe = erased(kind)
    with torch.no_grad(), a_request(pipe):
        for seed in range(6):  # each is freed before the next is made, and most likely lies where it lay
            rows = fresh_rows(seed)
            assert torch.equal(step(pipe, rows), anew(kind, rows))
            del rows
        rows = fresh_rows()
        first = step(pipe, rows)
        pipe.set_erasures("0", 0.5)
        half = step(pipe, rows)
        pipe.set_erasures("0", 1.0)
        assert torch.equal(step(pipe, rows), first) and not torch.equal(half, first)
        with pipe.erasures_disabled():
            assert torch.equal(step(pipe, rows), step(tiny_sd_pipe(), rows))
        pipe.load_erasure(random_erasure(tiny_sd_pipe(), "text_map", seed=9), "other")
        assert not torch.equal(step(pipe, rows), first)
        pipe.unload_erasure("other")
        assert torch.equal(step(pipe, rows), first)
        with torch.autocast("cpu", torch.bfloat16):
            cast = step(pipe, rows)
        assert torch.equal(step(pipe, rows), first) and not torch.equal(cast, first)
        pipe.unet.to(torch.float64)
        exact = pipe.unet(LATENTS.double(), torch.tensor(500), encoder_hidden_states=rows.double()).sample
        assert torch.allclose(exact.float(), first, atol=1e-5)


@pytest.mark.parametrize("within", [True, False])
def test_nothing_is_held_once_a_request_is_over(within: bool) -> None:
    """And outside of one nothing is kept from step to step: who writes the loop may do with the rows what they like."""
    pipe, rows = erased("text_map"), fresh_rows()
    here = pipe.unet.erasure_modules.conditions.here
    with torch.no_grad(), a_request(pipe) if within else nullcontext():
        step(pipe, rows)
        assert bool(here.kept) == within
    assert here.now is None and not here.kept
    if not within:
        kept = operations(pipe, rows)
        assert operations(pipe, rows) == kept > operations(tiny_sd_pipe(), rows)
