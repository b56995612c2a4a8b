"""One set of models and many requests in many threads, each with its own erasures: every picture is the serial one, bit for bit."""

import asyncio
import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.builders import twin
from diffusers_erasure import demo, erase
from tests.helpers import equal, far, tree
from tests.serving import (
    KINDS,
    ON_UNET,
    PATIENCE,
    Request,
    another,
    at_once,
    elsewhere,
    erasures,
    mixed,
    serving,
)


ROOT = Path(__file__).resolve().parents[1]
EFFECT = 0.05  # what an erasure moves a picture by at least


def all_differ(pictures: list[np.ndarray]) -> bool:
    first = [picture[0] for picture in pictures]
    return all(far(a, b) > EFFECT for i, a in enumerate(first) for b in first[:i])


# ------------------------------------------------------------------------------------------------------- threads


def test_control_without_erasures() -> None:
    """In the same arrangement of twins and schedulers threads and pictures are as they were: what differs below is ours."""
    pipe = demo.load_pipeline()
    twins = [twin(pipe) for _ in range(8)]
    alone = [request.draw(each) for request, each in zip(mixed(), twins, strict=True)]
    for _ in range(2):
        drawn = at_once(*(partial(request.draw, each) for request, each in zip(mixed(), twins, strict=True)))
        assert all(map(equal, drawn, alone))


class Admin:
    """Fits, draws within `erasures_disabled`, loads, sets and unloads other erasures, over and over.

    What it loads and sets is 0 until all requests have begun, as it may act on those that begin later.
    """

    def __init__(self, pipe: Any, strength: float) -> None:
        self.pipe, self.strength = pipe, strength
        self.stop, self.free, self.turned = threading.Event(), threading.Event(), threading.Event()
        self.pictures: list[np.ndarray] = []

    def work(self) -> None:
        request, pipe = Request(seed=77), twin(self.pipe)
        while not self.stop.is_set():
            free = self.free.is_set()
            with pipe.erasures_disabled():
                self.pictures.append(request.draw(pipe))
            fitted = erase(pipe, "rose", anchors="flower", retain=["tulip", "cat"], compare=False, method="uce")
            pipe.load_erasure(another(), "another", strength=float(free))
            pipe.load_erasure(fitted, "fitted", strength=0.0)
            pipe.set_erasures({"another": 0.5 * free, "fitted": float(free)})
            if free:
                pipe.set_erasures(dict.fromkeys(KINDS, 0.1))
            pipe.unload_erasure("another")
            pipe.unload_erasure("fitted")
            if free:
                pipe.set_erasures(dict.fromkeys(KINDS, self.strength))
                self.turned.set()


@pytest.mark.slow
def test_eight_requests_and_an_administrator() -> None:
    pipe, base = serving(), demo.load_pipeline()
    requests, twins = mixed(), [twin(pipe) for _ in range(8)]
    alone = [request.served(each) for request, each in zip(requests, twins, strict=True)]
    assert all_differ(alone) and all_differ([*alone[:7], requests[0].draw(base)])
    admin, all_begun = Admin(pipe, 1.0), threading.Barrier(8, action=lambda: admin.free.set(), timeout=PATIENCE)

    def wait_for_the_others(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            all_begun.wait()
        if step == 1:
            assert admin.turned.wait(PATIENCE)
        return values

    def client(request: Request, pipe: Any) -> list[np.ndarray]:
        drawn = [request.served(pipe) for _ in range(3)]  # whenever it comes
        return [*drawn, request.served(pipe, callback_on_step_end=wait_for_the_others)]

    with ThreadPoolExecutor(1) as other:
        working = other.submit(admin.work)
        try:
            drawn = at_once(*(partial(client, *each) for each in zip(requests, twins, strict=True)))
        finally:
            admin.stop.set()
        working.result(PATIENCE)
    for pictures, wanted in zip(drawn, alone, strict=True):
        assert [equal(picture, wanted) for picture in pictures] == [True] * 4
    plain = Request(seed=77).draw(base)
    assert len(admin.pictures) > 1 and all(equal(picture, plain) for picture in admin.pictures)
    assert {info.name: info.strength for info in pipe.list_erasures()} == dict.fromkeys(KINDS, 1.0)


def test_strengths_of_a_request_are_those_that_could_be_set() -> None:
    """Bit for bit what `set_erasures` gives, and within the block nothing else sees them."""
    pipe, base = serving(), demo.load_pipeline()
    for request in mixed():
        with pipe.erasure_strengths(request.strengths):
            drawn = request.draw(pipe)
            told = elsewhere(pipe.list_erasures)
            assert {info.name: info.acting for info in pipe.list_erasures()} == request.strengths
        assert all(info.strength == 1.0 for info in told)
        pipe.set_erasures(request.strengths)
        assert equal(request.draw(pipe), drawn)
        pipe.set_erasures(dict.fromkeys(KINDS, 1.0))
    with pipe.erasure_strengths(dict.fromkeys(KINDS, 0.0)):
        assert equal(Request().draw(pipe), Request().draw(base))
    assert far(Request().draw(pipe), Request().draw(base)) > EFFECT


def test_strengths_without_a_block_are_shared_and_others_keep_theirs() -> None:
    pipe = serving(("lora", "text_map"))
    wanted = Request(strengths={"lora": 0.4, "text_map": 0.7}).served(pipe)
    pipe.set_erasures({"lora": 0.9, "text_map": 0.7})
    with pipe.erasure_strengths({"lora": 0.4}):
        assert {info.name: info.acting for info in pipe.list_erasures()} == {"lora": 0.4, "text_map": 0.7}
        assert equal(Request().draw(pipe), wanted)
        with pipe.erasure_strengths({"lora": 0.0}), pipe.erasures_disabled():
            assert {info.acting for info in pipe.list_erasures()} == {0.0}
        assert equal(Request().draw(pipe), wanted)
    assert {info.name: info.acting for info in pipe.list_erasures()} == {"lora": 0.9, "text_map": 0.7}
    with pytest.raises(ZeroDivisionError):
        with pipe.erasure_strengths({"lora": 0.0}):
            _ = 1 / 0
    assert pipe.list_erasures()[0].acting == 0.9


def test_disabled_is_of_whoever_says_it() -> None:
    pipe, base = serving(("lora",)), demo.load_pipeline()
    erased, plain = Request().draw(pipe), Request().draw(base)
    assert far(erased, plain) > EFFECT
    with pipe.erasures_disabled():
        assert equal(Request().draw(pipe), plain)
        assert equal(elsewhere(partial(Request().draw, twin(pipe))), erased)
        assert elsewhere(pipe.list_erasures)[0].acting == 1.0
        assert (pipe.list_erasures()[0].acting, pipe.list_erasures()[0].strength) == (0.0, 1.0)
    assert equal(Request().draw(pipe), erased)


# --------------------------------------------------------------------------------- a request that others come into


class Held:
    """A step callback that lets `meanwhile` happen at a step."""

    def __init__(self, meanwhile: Callable[[], Any], step: int = 1) -> None:
        self.meanwhile, self.step, self.latents = meanwhile, step, None

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == self.step:
            self.latents = values["latents"].clone()
            self.meanwhile()
        return values


def names_of(pipe: Any) -> list[str]:
    return [info.name for info in pipe.list_erasures()]


def load_another(pipe: Any) -> None:
    pipe.load_erasure(another(), "another")


def set_to_zero(pipe: Any) -> None:
    pipe.set_erasures(dict.fromkeys(names_of(pipe), 0.0))


def unload_all(pipe: Any) -> None:
    pipe.unload_erasure()


def unload_half(pipe: Any) -> None:
    for name in names_of(pipe)[::2]:
        pipe.unload_erasure(name)


def exchange(pipe: Any) -> None:
    """The same name, another erasure."""
    pipe.unload_erasure("lora")
    pipe.load_erasure(another(), "lora")


def all_of_it(pipe: Any) -> None:
    for action in (load_another, set_to_zero, unload_half, unload_all, load_another):
        action(pipe)


MEANWHILE = [load_another, set_to_zero, unload_all, unload_half, exchange, all_of_it]


@pytest.mark.parametrize("within", [False, True], ids=["loaded", "in a block"])
@pytest.mark.parametrize("action", MEANWHILE, ids=lambda action: action.__name__)
def test_a_request_keeps_what_it_began_with(action: Callable[[Any], None], within: bool) -> None:
    pipe = serving()
    request = mixed()[7] if within else Request()
    draw = request.served if within else request.draw
    alone = draw(pipe)
    held = Held(lambda: elsewhere(partial(action, twin(pipe))))
    assert equal(draw(pipe, callback_on_step_end=held), alone)
    assert held.latents is not None
    # The next request begins with what there is then.
    fresh = serving()
    action(fresh)
    assert names_of(pipe) == names_of(fresh)
    assert equal(Request().draw(pipe), Request().draw(fresh))


def test_a_request_of_the_base_keeps_it() -> None:
    """Begun without erasures, or within `erasures_disabled`."""
    pipe = demo.load_pipeline()
    plain = Request().draw(pipe)
    assert equal(
        Request().draw(pipe, callback_on_step_end=Held(lambda: elsewhere(partial(load_another, pipe)))), plain
    )
    with pipe.erasures_disabled():

        def change() -> None:
            pipe.set_erasures("another", 0.7)
            pipe.load_erasure(erasures()["lora"], "lora")

        assert equal(Request().draw(pipe, callback_on_step_end=Held(lambda: elsewhere(change))), plain)
    assert {info.name: info.acting for info in pipe.list_erasures()} == {"another": 0.7, "lora": 1.0}


@pytest.mark.parametrize("action", MEANWHILE, ids=lambda action: action.__name__)
def test_a_change_of_the_requests_own_holds_from_then_on(action: Callable[[Any], None]) -> None:
    """As if the other steps were another pipeline's, which goes on from these latents."""
    pipe, after, request = serving(ON_UNET, 0.3), serving(ON_UNET, 0.3), Request(steps=5)
    alone = request.draw(pipe)
    held = Held(lambda: action(pipe), 2)
    drawn = request.draw(pipe, callback_on_step_end=held)
    action(after)

    def go_on(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "latents": held.latents} if step == 2 else values

    assert equal(drawn, request.draw(after, callback_on_step_end=go_on))
    assert far(drawn, alone) > EFFECT


def test_a_thread_that_outlives_its_block() -> None:
    """The block holds for a thread that is started within, as long as it lasts."""
    pipe, base = serving(("lora",)), demo.load_pipeline()
    drawn: list[np.ndarray] = []
    once, over = threading.Event(), threading.Event()

    def work() -> None:
        drawn.append(Request().draw(pipe))
        once.set()
        assert over.wait(PATIENCE)
        drawn.append(Request().draw(pipe))

    with pipe.erasures_disabled():
        thread = threading.Thread(target=work)
        thread.start()
        assert once.wait(PATIENCE)
    over.set()
    thread.join(PATIENCE)
    assert equal(drawn[0], Request().draw(base)) and equal(drawn[1], Request().draw(pipe))
    assert far(*drawn) > EFFECT


def test_a_thread_that_a_request_starts_holds_nothing_of_it() -> None:
    """As the monitor of progress bars is started, which lives as long as the process."""
    pipe, stop = serving(("lora",)), threading.Event()
    alive = weakref.ref(pipe.unet)
    thread = threading.Thread(target=stop.wait, daemon=True)
    try:
        Request(strengths={"lora": 0.5}).served(pipe, callback_on_step_end=Held(thread.start))
        del pipe
        gc.collect()
        assert thread.is_alive() and alive() is None
    finally:
        stop.set()


# ------------------------------------------------------------------------------------------- executors and asyncio


def test_a_job_has_the_strengths_of_the_block_that_handed_it_over() -> None:
    """Also when it begins after the block, and the worker keeps them for nobody."""
    pipe, go = serving(), threading.Event()
    requests, twins = mixed(), [twin(pipe) for _ in range(2)]
    alone, plain = [request.served(pipe) for request in requests], Request().draw(pipe)
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(go.wait, PATIENCE) for _ in twins]
        jobs = []
        for index, request in enumerate(requests):
            with pipe.erasure_strengths(request.strengths):
                jobs.append(pool.submit(request.draw, twin(pipe)))
            jobs.append(pool.submit(Request().draw, twin(pipe)))
            assert index == len(jobs) // 2 - 1
        go.set()
        assert all(job.result(PATIENCE) for job in held)
        drawn = [job.result(PATIENCE) for job in jobs]
    assert all(map(equal, drawn[::2], alone)) and all(equal(each, plain) for each in drawn[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("own_pool", [False, True])
def test_requests_of_an_event_loop(own_pool: bool) -> None:
    """Tasks wait within their blocks while others enter and leave theirs."""
    pipe = serving()
    requests = mixed()
    alone, plain = [request.served(pipe) for request in requests], Request().draw(pipe)

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(4) if own_pool else None

        async def inside(request: Request) -> list[Any]:
            mine = twin(pipe)
            with pipe.erasure_strengths(request.strengths):
                first = await loop.run_in_executor(pool, request.draw, mine)
                await asyncio.sleep(0.001)
                return [first, await asyncio.to_thread(request.draw, mine)]

        async def outside(request: Request) -> list[Any]:
            mine = twin(pipe)
            return [
                await loop.run_in_executor(pool, request.served, mine),
                await asyncio.to_thread(request.served, mine),
            ]

        async def without() -> list[Any]:
            return [await loop.run_in_executor(pool, Request().draw, twin(pipe))]

        tasks = [task(request) for request in requests for task in (inside, outside)]
        try:
            return await asyncio.gather(*tasks, without())
        finally:
            if pool is not None:
                pool.shutdown()

    *drawn, last = asyncio.run(main())
    for index, pictures in enumerate(drawn):
        assert [equal(each, alone[index // 2]) for each in pictures] == [True, True]
    assert equal(last[0], plain)


# ------------------------------------------------------------------------------------------------ coming and going


def test_others_load_and_unload_all_the_time() -> None:
    """Nothing raises, and nothing is left behind; what a request began with is its own affair."""
    pipe, made = demo.load_pipeline(), erasures()
    plain = Request().draw(pipe)
    before = tree(pipe)
    kinds = ("lora", "text_map", "skip", "gated")
    done = threading.Event()

    def churn(kind: str) -> int:
        mine, count = twin(pipe), 0
        while not done.is_set() or count < 3:
            mine.load_erasure(made[kind], kind, strength=0.5)
            assert kind in names_of(mine)
            mine.set_erasures(kind, 1.0)
            mine.unload_erasure(kind)
            count += 1
        return count

    def client(seed: int) -> None:
        mine, request = twin(pipe), Request(seed=seed)
        try:
            for _ in range(2):
                assert np.isfinite(request.draw(mine)).all()
                with mine.erasures_disabled():
                    drawn.append((seed, request.draw(mine)))
        finally:
            ended.append(seed)
            if len(ended) == 4:
                done.set()

    drawn: list[tuple[int, np.ndarray]] = []
    ended: list[int] = []
    counts = at_once(*(partial(churn, kind) for kind in kinds), *(partial(client, seed) for seed in range(4)))
    assert all(count >= 3 for count in counts[:4]) and pipe.list_erasures() == []
    assert len(drawn) == 8
    assert all(equal(picture, Request(seed=seed).draw(pipe)) for seed, picture in drawn)
    assert tree(pipe) == before and equal(Request().draw(pipe), plain)


# ---------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("block", ["none", "strengths", "disabled"])
def test_copies(duplicate: Callable[[Any], Any], block: str) -> None:
    """A copy has what is loaded, at the strengths that were set; a block is about requests, and not in what is copied."""
    pipe, request = serving(), mixed()[2]
    plain, served = request.draw(pipe), request.served(pipe)
    blocks = {"none": nullcontext, "strengths": lambda: pipe.erasure_strengths(request.strengths)}
    with blocks.get(block, pipe.erasures_disabled)():
        made = duplicate(pipe)
    for each in (made, pipe):
        assert equal(request.draw(each), plain) and equal(request.served(each), served)
        assert [(info.strength, info.acting) for info in each.list_erasures()] == [(1.0, 1.0)] * len(KINDS)
    made.unload_erasure()
    assert made.list_erasures() == [] and equal(request.draw(pipe), plain)
    assert equal(request.draw(made), request.draw(demo.load_pipeline()))


UNPICKLED = """
import pickle, sys, threading
import numpy as np, torch
torch.set_num_threads(1)
pipe, wanted = pickle.load(open(sys.argv[1], "rb"))

def change(pipe, step, timestep, values):
    other = threading.Thread(target=pipe.set_erasures, args=("lora", 0.0))
    other.start()
    other.join()
    return values

from contextvars import Context
def draw():
    generator = torch.Generator().manual_seed(0)
    return pipe(["a cat"], num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="np",
                callback_on_step_end=lambda *args: Context().run(change, *args)).images
assert np.array_equal(draw(), wanted)
assert not np.array_equal(draw(), wanted)
"""


def test_a_pickle_in_another_process(tmp_path: Path) -> None:
    """There its class was never made a pipeline of, and a call is a request all the same."""
    pipe = serving(("lora",))
    (tmp_path / "pickle").write_bytes(pickle.dumps((pipe, Request().draw(pipe))))
    command = [sys.executable, "-c", UNPICKLED, str(tmp_path / "pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_copy_in_the_middle_of_a_request() -> None:
    pipe = serving()
    alone = Request().served(pipe)
    made: list[Any] = []
    assert equal(Request().draw(pipe, callback_on_step_end=Held(lambda: made.append(copy.deepcopy(pipe)))), alone)
    assert equal(Request().draw(made[0]), alone)
    assert equal(elsewhere(partial(Request().draw, made[0])), alone)
