"""Compiled graphs and recomputed blocks know the strengths of the pass that they belong to, and of no other one.

Each test compares with the same call in eager mode, or without checkpointing, where nothing is guarded or recomputed.
"""

import asyncio
import contextvars
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureInputError,
    ErasureTrainingError,
    compat,
    training_through_erasures,
    with_schedule,
)
from diffusers_erasure.live.state import state_of
from tests import test_stays_on
from tests.helpers import UNET_SITES, random_erasure, tiny_sd_pipe
from tests.test_copies import video_of


TABLE = [0.0, 0.3, 1.0, 0.6, 0.25]
ENDS = ("attn2.to_k", "attn2.to_v", "ff.net.2")
PER_PICTURE = [0.2, 0.9]

graphs, Graphs = test_stays_on.backend, test_stays_on.CountingBackend


def small(table: list[float] | None = None) -> Any:
    """A small UNet with an erasure at sites in each of its blocks."""
    pipe = tiny_sd_pipe(levels=1)
    sites = tuple(f"unet.{name}" for name, _ in pipe.unet.named_modules() if name.endswith(ENDS))
    erasure = random_erasure(pipe, "lora", sites, rank=3)
    pipe.load_erasure(erasure if table is None else with_schedule(erasure, table), "one", strict_base="ignore")
    return pipe


def given(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predicted(pipe: Any, rows: int = 2, time: int = 500, unet: Any = None) -> torch.Tensor:
    sample, text = given(rows, 4, 8, 8, seed=1), given(rows, 24, 32, seed=2)
    return (pipe.unet if unet is None else unet)(sample, torch.tensor(time), encoder_hidden_states=text).sample


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("transformer_blocks.0")]


# ------------------------------------------------------------------------------------------------ strengths, no guards


def compile_whole(pipe: Any, **options: Any) -> None:
    pipe.unet.compile(fullgraph=True, **options)


def compile_blocks(pipe: Any, **options: Any) -> None:
    for block in blocks_of(pipe.unet):
        block.compile(fullgraph=True, **options)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiled", [compile_whole, compile_blocks])
def test_no_graph_for_a_strength(graphs: Graphs, compiled: Callable[..., None], dynamic: bool | None) -> None:
    """Each size of a batch has one graph at most, also with strengths by picture."""
    pipe = small()
    eager = copy.deepcopy(pipe)
    compiled(pipe, backend=graphs, dynamic=dynamic)
    made: list[int] = []
    for rows in (2, 4):
        for strength in (0.1, 0.2, PER_PICTURE, 0.3, 1.0, PER_PICTURE[::-1]):
            before = graphs.graphs
            with (
                torch.no_grad(),
                pipe.erasure_strengths({"one": strength}),
                eager.erasure_strengths({"one": strength}),
            ):
                torch.testing.assert_close(predicted(pipe, rows), predicted(eager, rows))
            made.append(graphs.graphs - before)
    assert made[0] == 1 and made[6] <= 1
    assert not any(made[1:6] + made[7:])


@pytest.mark.slow
def test_no_graph_for_a_strength_where_rows_are_more_or_fewer(graphs: Graphs) -> None:
    """A video has rows for each frame; a chunked feed-forward has a part of them, and one graph more by picture."""
    pipe = small()
    for block in blocks_of(pipe.unet):
        block.set_chunk_feed_forward(2, 0)
    compile_whole(pipe, backend=graphs)
    with torch.no_grad():
        for strength in (0.1, 0.2, 1.0, 0.7):
            with pipe.erasure_strengths({"one": strength}):
                predicted(pipe, 4)
    assert graphs.graphs == 1

    source = tiny_sd_pipe()
    source.load_erasure(random_erasure(source, "lora", UNET_SITES, rank=3), "one", strict_base="ignore")
    video = video_of(source)
    torch.compiler.reset()
    graphs.graphs = 0
    video.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend=graphs, fullgraph=True)
    for strength in (0.1, 0.2, PER_PICTURE, PER_PICTURE[::-1], 0.3):
        with torch.no_grad(), video.erasure_strengths({"one": strength}):
            video.unet(given(2, 4, 3, 8, 8, seed=1), torch.tensor(500), encoder_hidden_states=given(6, 24, 32, seed=2))
    assert graphs.graphs == 1


# -------------------------------------------------------------------------------------------------- blocks by themselves


def test_a_compiled_block_by_itself(graphs: Graphs) -> None:
    """It acts as in eager mode, by what holds where it is called; a copy of it alone does nothing."""
    pipe = small()
    block = blocks_of(pipe.unet)[0]
    compiled = torch.compile(block, backend=graphs)
    width = block.norm1.normalized_shape[0]  # type: ignore[index,union-attr]
    hidden, text = given(2, 16, width, seed=3), given(2, 24, 32, seed=2)

    def run(module: Any) -> torch.Tensor:
        return module(hidden, encoder_hidden_states=text)

    with torch.no_grad():
        erased = run(block)
        with pipe.erasures_disabled():
            base = run(block)
            torch.testing.assert_close(run(compiled), base)
        assert (erased - base).abs().max() > 0.01
        torch.testing.assert_close(run(compiled), erased)
        with pipe.erasure_strengths({"one": 0.3}):
            torch.testing.assert_close(run(compiled), run(block))
        alone = copy.deepcopy(block)
        assert torch.equal(run(alone), base)
        assert torch.equal(run(torch.compile(alone, backend=graphs)), base)


# ---------------------------------------------------------------------------------------------------- larger graphs


def larger(pipe: Any, graphs: Graphs) -> Callable[[], torch.Tensor]:
    sample, text, time = given(2, 4, 8, 8, seed=1), given(2, 24, 32, seed=2), torch.tensor(500)

    def scaled(sample: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return pipe.unet(sample, time, encoder_hidden_states=text).sample * 2.0

    compiled = torch.compile(scaled, backend=graphs, fullgraph=True)
    return lambda: compiled(sample, text) / 2.0


def test_a_larger_graph_follows_blocks(graphs: Graphs) -> None:
    """One graph for all strengths, for those by picture, for blocks of other tasks and in copied contexts."""
    pipe = small()
    graph = larger(pipe, graphs)

    def alike() -> None:
        with torch.no_grad():
            torch.testing.assert_close(graph(), predicted(pipe))

    alike()
    for default, strength in ((0.0, 1.0), (1.0, 0.0), (1.0, [1.0, 0.0]), (0.5, [0.2, 0.9])):
        pipe.set_erasures("one", default)
        alike()
        with pipe.erasure_strengths({"one": strength}):
            alike()
    with pipe.erasures_disabled():
        alike()
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(failing := Kept(alike),))
        thread.start()
        thread.join()
        assert failing.error is None, failing.error
    with pipe.erasure_strengths({"one": [1.0, 0.5, 0.2]}), pytest.raises(ErasureInputError, match="3 pictures"):
        alike()
    assert graphs.graphs == 1

    async def off(began: asyncio.Event, over: asyncio.Event) -> None:
        with pipe.erasures_disabled():
            began.set()
            await over.wait()

    async def on(began: asyncio.Event, over: asyncio.Event) -> None:
        await began.wait()
        alike()
        over.set()

    async def both() -> None:
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(off(*events), on(*events))

    asyncio.run(both())


class Kept:
    """Calls a function and keeps its error."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call, self.error = call, None

    def __call__(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.error = error  # type: ignore[assignment]


def test_a_larger_graph_refuses_to_train(graphs: Graphs) -> None:
    """With gradients, unless the block says so; whether it does is seen when the graph runs."""
    pipe = small()
    graph = larger(pipe, graphs)
    with training_through_erasures(pipe):
        assert graph().requires_grad
    with pytest.raises(ErasureTrainingError):
        graph()
    with pipe.erasures_disabled():
        assert torch.allclose(graph(), predicted(pipe), atol=1e-5)


def test_a_larger_graph_holds_nothing(graphs: Graphs) -> None:
    """With a schedule too, for which it reads the timestep."""
    pipe = small(TABLE)
    with torch.no_grad():
        torch.testing.assert_close(larger(pipe, graphs)(), predicted(pipe))
    state = state_of(pipe.unet)
    assert state is not None
    traced = state.conditions.traced
    assert traced.text is None and traced.timestep is None and not state.conditions.tracing


# ---------------------------------------------------------------------------------------------- recomputed on the way back


def trained(checkpointing: bool, erasure: Erasure | None = None, backend: Any = None) -> Any:
    pipe = tiny_sd_pipe()
    erasure = random_erasure(pipe, size=0.7) if erasure is None else erasure
    pipe.load_erasure(erasure, "one", strict_base="ignore")
    pipe.unet.train()
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if backend is not None:
        compile_blocks(pipe, backend=backend)
    return pipe


def gradients(pipe: Any) -> torch.Tensor:
    return torch.cat([each.grad.flatten() for each in pipe.unet.parameters() if each.grad is not None])


def loss_of(pipe: Any, strength: float, time: int) -> torch.Tensor:
    with pipe.erasure_strengths({"one": strength}):
        return predicted(pipe, time=time).square().sum()


def two_together(pipe: Any) -> None:
    (loss_of(pipe, 0.2, 50) + loss_of(pipe, 1.0, 450)).backward()


def first_of_two(pipe: Any) -> None:
    first, _ = loss_of(pipe, 1.0, 450), loss_of(pipe, 0.25, 50)
    first.backward()


def with_one_off(pipe: Any) -> None:
    with pipe.erasures_disabled():
        base = predicted(pipe, time=450)
    (loss_of(pipe, 1.0, 450) + (predicted(pipe, time=50) - base).square().sum()).backward()


@pytest.mark.parametrize("way", [two_together, first_of_two, with_one_off])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheduled", [True, False])
def test_recomputed_blocks(graphs: Graphs, way: Callable[[Any], None], compiled: bool, scheduled: bool) -> None:
    """They act as in the pass that they are of, however many passes there were since."""
    erasure = random_erasure(tiny_sd_pipe(), size=0.7)
    erasure = with_schedule(erasure, TABLE) if scheduled else erasure
    found = []
    for checkpointing in (False, True):
        pipe = trained(checkpointing, erasure, "aot_eager" if compiled and checkpointing else None)
        with training_through_erasures(pipe):
            way(pipe)
        found.append(gradients(pipe))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_passes_of_several_threads() -> None:
    """On a common way back their nodes are mixed: refused, unless each goes back alone."""
    pipe = trained(True)
    losses: list[torch.Tensor] = []
    with training_through_erasures(pipe):
        for strength in (0.2, 1.0):
            context = contextvars.copy_context()
            thread = threading.Thread(
                target=context.run, args=(lambda s=strength: losses.append(loss_of(pipe, s, 5)),)
            )
            thread.start()
            thread.join()
        with pytest.raises(ErasureTrainingError, match="recomputed"):
            sum(losses).backward()  # type: ignore[union-attr]
        pipe.unet.zero_grad()
        losses = [loss_of(pipe, 0.2, 5)]
        losses[0].backward()
    plain = trained(False)
    with training_through_erasures(plain):
        loss_of(plain, 0.2, 5).backward()
    torch.testing.assert_close(gradients(pipe), gradients(plain))


def test_a_pass_that_is_not_known() -> None:
    """Gradients that come by no output of the pass say nothing of it."""
    pipe = trained(True)
    inner: list[torch.Tensor] = []
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: inner.append(output))
    with training_through_erasures(pipe):
        predicted(pipe)
        with pytest.raises(ErasureTrainingError, match="recomputed"):
            inner[0].sum().backward()


def test_nothing_is_held_after_the_way_back() -> None:
    """Neither text rows nor what autograd holds for them."""
    pipe = trained(True, with_schedule(random_erasure(tiny_sd_pipe()), TABLE))
    text = nn.Parameter(given(2, 24, 32, seed=2)) * 2
    known = weakref.ref(text)
    with training_through_erasures(pipe):
        output = pipe.unet(given(2, 4, 8, 8, seed=1), torch.tensor(5), encoder_hidden_states=text).sample
        output.sum().backward()
    del text, output
    gc.collect()
    assert known() is None
    state = state_of(pipe.unet)
    assert state is not None and state.conditions.here.back is None and not state.conditions.here.ways


# ------------------------------------------------------------------------------------------------------ CUDA graphs


@pytest.mark.parametrize("strength", [None, 0.4, PER_PICTURE])
def test_capture(monkeypatch: pytest.MonkeyPatch, strength: Any) -> None:
    """Nothing that is made while a graph is captured is kept: it lies in that graph's memory. What was kept is not used."""
    pipe = small()
    state = state_of(pipe.unet)
    assert state is not None
    edits = [each for each in state.edits.modules() if hasattr(each, "known")]
    assert edits
    block = pipe.erasure_strengths({} if strength is None else {"one": strength})
    with torch.no_grad(), block:
        wanted = predicted(pipe)
        known = [dict(each.known) for each in edits], dict(state.tensors.known), list(state.plan.ready)
        monkeypatch.setattr(compat, "is_capturing", lambda: True)
        monkeypatch.setattr(torch, "tensor", refuse(torch.tensor))
        drawn = predicted(pipe)
        torch.testing.assert_close(drawn, wanted)
        after = [dict(each.known) for each in edits], dict(state.tensors.known), list(state.plan.ready)
    assert list(map(list, after[0])) == list(map(list, known[0]))
    assert list(after[1]) == list(known[1]) and after[2] == known[2]


def refuse(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor`, but for lists, which would be copied from the host."""

    def made(value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not isinstance(value, list | tuple), "a copy from the host"
        return make(value, *args, **kwargs)

    return made
