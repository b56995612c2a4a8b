"""Changes of what is loaded beside passes and requests of other threads: nobody waits for ever, and nothing is done by half."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from diffusers_erasure import ErasureError, ErasureInactiveError, ErasureInputError
from diffusers_erasure.live.state import state_of
from diffusers_erasure.live.turnstile import of
from diffusers_erasure.schema import Concept
from tests.helpers import (
    TEXT_SITES,
    UNET_SITES,
    equal,
    images,
    noise,
    random_erasure,
    tiny_sd_pipe,
    tree,
)


PATIENCE = 60.0  # seconds until a test says that somebody waits for ever
SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Some threads that know nothing of the test's blocks, and change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(4) as pool:
        for started in [pool.submit(time.sleep, 0.01) for _ in range(4)]:
            started.result()
        yield pool
    sys.setswitchinterval(before)


def two() -> tuple[Any, Any]:
    """Two erasures of different concepts at the same sites."""
    pipe = tiny_sd_pipe()
    return random_erasure(pipe, sites=(SITE,)), random_erasure(pipe, sites=(SITE,), seed=5, concepts=(Concept("q"),))


def both(pool: ThreadPoolExecutor, *calls: Callable[[], Any]) -> list[BaseException | None]:
    """Make calls at once, each in a thread; gives what each raised."""
    barrier = threading.Barrier(len(calls))

    def call(each: Callable[[], Any]) -> None:
        barrier.wait(PATIENCE)
        each()

    return [future.exception(PATIENCE) for future in [pool.submit(call, each) for each in calls]]


# ----------------------------------------------------------------------------------------------- nobody waits for ever


def test_a_change_waits_for_a_block_whose_own_passes_go_on(threads: ThreadPoolExecutor) -> None:
    pipe = tiny_sd_pipe()
    base = images(pipe)
    pipe.load_erasure(random_erasure(pipe), "a")
    pipe.fuse_erasures()
    inside, waits = threading.Event(), of(pipe.unet)

    def within() -> Any:
        with pipe.erasures_disabled():
            inside.set()
            deadline = time.monotonic() + PATIENCE
            while not (waits.waiting or waits.closing) and time.monotonic() < deadline:
                time.sleep(0.01)
            return images(pipe)

    drawn: Future[Any] = threads.submit(within)
    assert inside.wait(PATIENCE)
    change = threads.submit(pipe.set_erasures, "a", 0.5)
    assert equal(drawn.result(PATIENCE), base)
    change.result(PATIENCE)
    assert pipe.list_erasures()[0].strength == 0.5 and not equal(images(pipe), base)


def test_two_blocks_that_draw_with_each_other(threads: ThreadPoolExecutor) -> None:
    pipes = tiny_sd_pipe(), tiny_sd_pipe(1)
    for pipe in pipes:
        pipe.load_erasure(random_erasure(pipe), "a")
        pipe.fuse_erasures()
    barrier = threading.Barrier(2)

    def crossed(mine: Any, other: Any) -> None:
        with mine.erasures_disabled():
            barrier.wait(PATIENCE)
            images(other)

    found = [threads.submit(crossed, *pair) for pair in (pipes, pipes[::-1])]
    errors = [each.exception(PATIENCE) for each in found]
    assert [type(each) for each in errors if each is not None] == [ErasureError]  # the other one draws then


def test_another_task_of_the_thread_is_told(threads: ThreadPoolExecutor) -> None:
    """It can't wait, as that would hold up the task for which it waits."""
    pipe = tiny_sd_pipe()
    pipe.load_erasure(random_erasure(pipe), "a")
    on = noise(pipe)
    pipe.fuse_erasures()

    async def main() -> None:
        begun, told = asyncio.Event(), asyncio.Event()

        async def within() -> None:
            with pipe.erasures_disabled():
                begun.set()
                await told.wait()

        task = asyncio.create_task(within())
        await begun.wait()
        with pytest.raises(ErasureError, match="Another task of this thread"):
            noise(pipe)
        told.set()
        await task

    asyncio.run(main())
    assert torch.allclose(noise(pipe), on, atol=1e-5)


def test_a_pass_that_broke_off(monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor) -> None:
    """Ctrl-C leaves a pass without its end: others need not wait for it, and nothing is saved that is not erased."""
    pipe = tiny_sd_pipe()
    pipe.load_erasure(random_erasure(pipe), "a")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.unet.mid_block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), pipe.erasures_disabled():
        noise(pipe)
    handle.remove()
    assert of(pipe.unet).passes == {threading.get_ident()}
    with pytest.raises(ErasureInactiveError, match="act beside the weights"):
        pipe.unet.save_pretrained("nowhere")
    threads.submit(pipe.set_erasures, "a", 0.5).result(PATIENCE)
    threads.submit(pipe.unload_erasure).result(PATIENCE)
    assert torch.equal(noise(pipe), noise(tiny_sd_pipe()))


# ----------------------------------------------------------------------------------------------- nothing by half


def test_first_erasures_at_once(threads: ThreadPoolExecutor) -> None:
    one, other = two()
    wanted = tiny_sd_pipe()
    base = noise(wanted)
    wanted.load_erasure(one, "a")
    wanted.load_erasure(other, "b")
    for _ in range(5):
        pipe = tiny_sd_pipe()
        errors = both(threads, lambda p=pipe: p.load_erasure(one, "a"), lambda p=pipe: p.load_erasure(other, "b"))
        assert errors == [None, None] and {each.name for each in pipe.list_erasures()} == {"a", "b"}
        assert torch.allclose(noise(pipe), noise(wanted), atol=1e-5)  # in whichever order
        pipe.unload_erasure()
        assert state_of(pipe.unet) is None and torch.equal(noise(pipe), base)


def test_one_name_twice_at_once(threads: ThreadPoolExecutor) -> None:
    for one, other, names in ((*two(), ("x", "x")), (two()[0], two()[0], ("x", "y"))):
        pipe = tiny_sd_pipe()
        errors = both(
            threads,
            lambda p=pipe, e=one, n=names[0]: p.load_erasure(e, n),
            lambda p=pipe, e=other, n=names[1]: p.load_erasure(e, n),
        )
        assert sorted(type(each).__name__ for each in errors) == ["ErasureInputError", "NoneType"]
        assert len(pipe.list_erasures()) == 1


def test_fused_at_once(threads: ThreadPoolExecutor) -> None:
    """The original that is kept is the base's."""
    one, other = two()
    for _ in range(5):
        pipe = tiny_sd_pipe()
        base = noise(pipe)
        errors = both(
            threads,
            lambda p=pipe: p.load_erasure(one, "a", backend="merge"),
            lambda p=pipe: p.load_erasure(other, "b", backend="merge"),
        )
        assert errors == [None, None] and {each.backend for each in pipe.list_erasures()} == {"merge"}
        pipe.unload_erasure()
        assert torch.equal(noise(pipe), base)


@pytest.mark.parametrize("backend", ["merge", "peft"])
def test_nothing_is_put_into_weights_that_are_to_be_the_base(backend: Any, threads: ThreadPoolExecutor) -> None:
    """Neither by who is within the block, nor by another thread."""
    pipe = tiny_sd_pipe()
    base = images(pipe)
    asked = threading.Event()

    def load() -> None:
        assert asked.wait(PATIENCE)
        pipe.load_erasure(random_erasure(tiny_sd_pipe()), "a", backend=backend)

    other = threads.submit(load)
    with pipe.erasures_disabled():
        asked.set()
        for job in (other, threads.submit(load)):
            error = job.exception(PATIENCE)
            assert isinstance(error, ErasureInputError) and "erasures_disabled" in str(error)
        assert equal(images(pipe), base)
    assert pipe.list_erasures() == []


def test_weights_wait_for_requests(threads: ThreadPoolExecutor) -> None:
    """A request under way has none of its steps with other weights; in its own callback fusing is refused."""
    pipe = tiny_sd_pipe()
    base = images(pipe)
    fused: list[Future[Any]] = []
    refused: list[BaseException] = []

    def step(_: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if not fused:
            fused.append(threads.submit(pipe.load_erasure, random_erasure(tiny_sd_pipe()), "a", backend="merge"))
            time.sleep(0.2)
        assert not fused[0].done()
        return values

    other = threads.submit(images, pipe, callback_on_step_end=step)
    assert equal(other.result(PATIENCE), base)
    fused[0].result(PATIENCE)
    assert not equal(images(pipe), base)
    pipe.unload_erasure()
    assert refused == [] and equal(images(pipe), base)


def test_unloaded_within_its_own_block() -> None:
    pipe = tiny_sd_pipe()
    images(pipe)
    before, base = tree(pipe), images(pipe)
    pipe.load_erasure(random_erasure(pipe, sites=(*UNET_SITES, *TEXT_SITES)), "a")
    with pipe.erasure_strengths({"a": 0.5}):
        pipe.unload_erasure("a")
        assert tree(pipe) == before
    assert equal(images(pipe), base)


def test_passes_outside_of_a_pipelines_call(threads: ThreadPoolExecutor) -> None:
    """torch lists a module's hooks before the first one waits: then a pass may be told to begin again, and none is half erased."""
    pipe = tiny_sd_pipe()
    base = noise(pipe)
    erasure = random_erasure(pipe, "text_map")
    pipe.load_erasure(erasure, "a")
    on = noise(pipe)
    pipe.unload_erasure()
    over = threading.Event()

    def draw() -> int:
        count = 0
        while not over.is_set():
            try:
                drawn = noise(pipe)
            except ErasureInactiveError as error:
                assert "Run it again" in str(error)
                continue
            assert torch.equal(drawn, base) or torch.equal(drawn, on)
            count += 1
        return count

    drawing = [threads.submit(draw) for _ in range(3)]
    for _ in range(25):
        pipe.load_erasure(erasure, "a")
        pipe.unload_erasure()
    over.set()
    assert all(each.result(PATIENCE) > 0 for each in drawing)
    assert state_of(pipe.unet) is None and torch.equal(noise(pipe), base)


# ----------------------------------------------------------------------------------------------- where blocks end


def test_blocks_of_generators_end_in_any_order() -> None:
    pipe = tiny_sd_pipe()
    pipe.load_erasure(random_erasure(pipe), "a")

    def generator() -> Iterator[None]:
        with pipe.erasures_disabled():
            yield

    first, second = generator(), generator()
    next(first), next(second)
    assert pipe.list_erasures()[0].acting == 0
    first.close()
    assert pipe.list_erasures()[0].acting == 0
    second.close()
    assert pipe.list_erasures()[0].acting == 1


def test_a_block_that_another_thread_ends(threads: ThreadPoolExecutor) -> None:
    """As frameworks run the two halves of a dependency in whichever thread is free."""
    pipe = tiny_sd_pipe()
    pipe.load_erasure(random_erasure(pipe), "a")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        block = pipe.erasures_disabled()
        one.submit(block.__enter__).result(PATIENCE)
        assert one.submit(lambda: pipe.list_erasures()[0].acting).result(PATIENCE) == 0
        other.submit(block.__exit__, None, None, None).result(PATIENCE)
        for pool in (one, other):
            assert pool.submit(lambda: pipe.list_erasures()[0].acting).result(PATIENCE) == 1


def test_jobs_that_begin_after_their_block() -> None:
    pipe = tiny_sd_pipe()
    pipe.load_erasure(random_erasure(pipe), "a")
    over = threading.Event()

    def acting() -> Any:
        assert over.wait(PATIENCE)
        return pipe.list_erasures()[0].acting

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        with pipe.erasure_strengths({"a": 0.5}):
            jobs = [asyncio.create_task(asyncio.to_thread(acting)), loop.run_in_executor(None, acting)]
            await asyncio.sleep(0.05)  # the task hands its job over
        over.set()
        return [await job for job in jobs]

    assert asyncio.run(main()) == [0.5, 0.5] and acting() == 1.0


def test_a_task_that_outlives_its_request() -> None:
    pipe = tiny_sd_pipe()
    pipe.load_erasure(random_erasure(pipe), "a", strength=0.0)
    base = images(pipe)

    async def main() -> None:
        over = asyncio.Event()
        tasks: list[asyncio.Task[Any]] = []

        async def later() -> Any:
            await over.wait()
            return images(pipe)

        def step(_: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if not tasks:
                tasks.append(asyncio.get_running_loop().create_task(later()))
            return values

        images(pipe, callback_on_step_end=step)
        pipe.set_erasures("a", 1.0)
        on = images(pipe)
        over.set()
        assert not equal(on, base) and equal(await tasks[0], on)

    asyncio.run(main())
