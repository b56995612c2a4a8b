"""What a context variable says goes along with work that is handed to threads, and stays nowhere. Real threads and event loops."""

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Any

import pytest

from diffusers_erasure.live import carrying
from diffusers_erasure.live.carrying import carry


VALUE: ContextVar[str] = ContextVar("VALUE")
OTHER: ContextVar[str] = ContextVar("OTHER")  # not carried: left to Python
PATIENCE = 30  # seconds until something that hangs is a failure


@pytest.fixture(autouse=True)
def carried() -> None:
    carry(VALUE, lambda value: f"{value} for threads")


@contextmanager
def value(new: str) -> Iterator[None]:
    token = VALUE.set(new)
    try:
        yield
    finally:
        VALUE.reset(token)


def seen() -> str | None:
    return VALUE.get(None)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """One worker, which is started by the first job."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def in_thread(thread: Callable[[Callable[[], None]], threading.Thread]) -> Any:
    """What a thread that is made and started here sees."""
    found: list[Any] = []
    made = thread(lambda: found.append(seen()))
    made.start()
    made.join(PATIENCE)
    return found[0]


# ----------------------------------------------------------------------------------------------------- executors


def test_a_job_has_the_value_of_whoever_hands_it_over(pool: ThreadPoolExecutor) -> None:
    assert pool.submit(seen).result() is None
    with value("a"):
        job = pool.submit(seen)
    assert job.result() == "a"
    with value("b"):
        assert list(pool.map(lambda n: (n, seen()), range(3))) == [(0, "b"), (1, "b"), (2, "b")]
    assert pool.submit(seen).result() is None


def test_a_worker_keeps_no_value_of_the_job_that_started_it(pool: ThreadPoolExecutor) -> None:
    with value("a"):
        assert pool.submit(seen).result() == "a"
    assert pool.submit(seen).result() is None
    with value("b"):
        assert pool.submit(seen).result() == "b"
    assert pool.submit(threading.active_count).result() >= 2 and pool.submit(seen).result() is None


def test_a_value_waits_in_the_queue(pool: ThreadPoolExecutor) -> None:
    """Jobs of several contexts wait behind one that is held."""
    go = threading.Event()
    held = pool.submit(go.wait, PATIENCE)
    jobs: list[Future[str | None]] = []
    for name in ("a", "b"):
        with value(name):
            jobs.append(pool.submit(seen))
        jobs.append(pool.submit(seen))
    go.set()
    assert held.result() and [job.result() for job in jobs] == ["a", None, "b", None]


def test_two_contexts_share_a_pool_that_neither_has_started() -> None:
    barrier = threading.Barrier(4, timeout=PATIENCE)

    def job() -> tuple[str | None, str | None]:
        before = seen()
        barrier.wait()  # four at once: a worker each
        with value("the job's own"):
            barrier.wait()
        return before, seen()

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            jobs = {}
            for name in ("a", "b", "c"):
                context = copy_context()
                context.run(VALUE.set, name)
                jobs[name] = context.run(pool.submit, job)
            jobs["none"] = pool.submit(job)
            expected = {name: (None, None) if name == "none" else (name, name) for name in jobs}
            assert {name: each.result() for name, each in jobs.items()} == expected


def test_nested_jobs() -> None:
    """A job's own jobs go with its value, also where the inner pool is started by one of them."""
    with ThreadPoolExecutor(1) as outer, ThreadPoolExecutor(1) as inner:

        def both() -> list[str | None]:
            first = inner.submit(seen)
            with value("inner"):
                second = inner.submit(seen)
            return [first.result(), second.result(), seen(), inner.submit(seen).result()]

        with value("a"):
            job = outer.submit(both)
        assert job.result() == ["a", "inner", "a", "a"]
        assert outer.submit(both).result() == [None, "inner", None, None]


def test_a_job_leaves_nothing_behind_when_it_fails_or_sets_the_variable(pool: ThreadPoolExecutor) -> None:
    def fail() -> None:
        VALUE.set("left behind")
        raise ZeroDivisionError("in the job")

    with value("a"):
        job = pool.submit(fail)
        with pytest.raises(ZeroDivisionError, match="in the job"):
            job.result()
    assert pool.submit(seen).result() is None


def test_arguments_of_every_name(pool: ThreadPoolExecutor) -> None:
    def job(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs, seen()

    names = {name: name for name in ("self", "fn", "values", "function", "variable", "args", "kwargs")}
    with value("a"):
        assert pool.submit(job, 1, 2, **names).result() == ((1, 2), names, "a")
        with pytest.raises(TypeError):
            pool.submit()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="not callable"):
            pool.submit(3).result()  # type: ignore[arg-type]


def test_futures_are_the_executors_own(pool: ThreadPoolExecutor) -> None:
    go = threading.Event()
    with value("a"):
        held, waiting = pool.submit(go.wait, PATIENCE), pool.submit(seen)
        assert type(waiting) is Future and waiting.cancel() and not held.cancel()
        go.set()
        with pytest.raises(CancelledError):
            waiting.result()
        done: list[Any] = []
        pool.submit(seen).add_done_callback(lambda job: done.append(job.result()))
        pool.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(seen)
    assert done == ["a"]


def test_initializers_see_no_value_and_may_set_one() -> None:
    found = []

    def begin(name: str) -> None:
        found.append((name, seen()))
        OTHER.set(name)

    with ThreadPoolExecutor(1, initializer=begin, initargs=("x",)) as pool:
        with value("a"):
            assert pool.submit(lambda: (seen(), OTHER.get())).result() == ("a", "x")
    assert found == [("x", None)]


def test_other_variables_are_left_to_python(pool: ThreadPoolExecutor) -> None:
    token = OTHER.set("here")
    try:
        with value("a"):
            assert pool.submit(lambda: (seen(), OTHER.get(None))).result() == ("a", None)
            assert OTHER.get() == "here" and seen() == "a"
    finally:
        OTHER.reset(token)


def test_an_executor_of_ones_own() -> None:
    """A subclass that changes what is submitted sees what it was given, and its workers are as clean."""

    class Counting(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            given.append((fn, seen()))
            return super().submit(fn, *args, **kwargs)

    given: list[Any] = []
    with Counting(1) as pool:
        with value("a"):
            assert pool.submit(seen).result() == "a"
        assert pool.submit(seen).result() is None
    assert given == [(seen, "a"), (seen, None)]


def test_a_finished_job_holds_no_value(pool: ThreadPoolExecutor) -> None:
    class Big:
        pass

    variable: ContextVar[Big] = ContextVar("variable")
    carry(variable, lambda value: value)
    big = Big()
    alive = weakref.ref(big)
    token = variable.set(big)
    assert pool.submit(variable.get).result() is big
    variable.reset(token)
    del big, token
    pool.submit(int).result()  # the worker lets a job go when it takes the next one
    gc.collect()
    assert alive() is None


# ------------------------------------------------------------------------------------------------------- threads


def test_a_thread_has_the_value_for_threads() -> None:
    def plain(target: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=target)

    assert in_thread(plain) is None
    with value("a"):
        assert in_thread(plain) == "a for threads"
        made = plain(lambda: None)
        assert seen() == "a"
    with value("b"):  # what counts is where it is started
        found: list[Any] = []
        made = threading.Thread(target=lambda: found.append(seen()))
    made.start()
    made.join(PATIENCE)
    assert found == [None]


def test_threads_of_threads() -> None:
    def nested(target: Callable[[], None]) -> threading.Thread:
        def outer() -> None:
            inner = threading.Thread(target=target)
            inner.start()
            inner.join(PATIENCE)

        return threading.Thread(target=outer)

    with value("a"):
        assert in_thread(nested) == "a for threads for threads"


class OwnRun(threading.Thread):
    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.action = action

    def run(self) -> None:
        assert "run" not in vars(self)
        self.action()


@pytest.mark.parametrize("thread", [OwnRun, lambda action: threading.Timer(0.0, action)])
def test_subclasses(thread: Callable[[Callable[[], None]], threading.Thread]) -> None:
    assert in_thread(thread) is None
    with value("a"):
        assert in_thread(thread) == "a for threads"


def test_a_thread_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: raised.append((hook.exc_type, hook.thread)))
    with value("a"):
        thread = threading.Thread(target=lambda: 1 / 0, name="mine")
        before = set(vars(thread))
        thread.start()
        thread.join(PATIENCE)
        assert raised == [(ZeroDivisionError, thread)] and "run" in dir(thread) and "run" not in vars(thread)
        assert vars(thread).keys() <= before and thread.name == "mine"
        with pytest.raises(RuntimeError, match="only be started once"):
            thread.start()
        assert "run" not in vars(thread)


def test_somebody_else_wraps_run_too() -> None:
    """As tracers do: on the object. What they put there runs, and stays there."""
    calls: list[Any] = []

    def wrapped(target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target)
        run = thread.run

        def traced() -> None:
            calls.append((seen(), vars(thread)["run"] is traced))
            run()

        thread.run = traced  # type: ignore[method-assign]
        return thread

    with value("a"):
        assert in_thread(wrapped) == "a for threads"
    assert calls == [("a for threads", True)]


def test_a_thread_that_cannot_be_made_for_starts_not() -> None:
    variable: ContextVar[int] = ContextVar("variable")

    def refuse(value: int) -> int:
        raise ValueError("not for threads")

    carry(variable, refuse)
    token = variable.set(1)
    thread = threading.Thread(target=print)
    try:
        with pytest.raises(ValueError, match="not for threads"):
            thread.start()
    finally:
        variable.reset(token)
    assert not thread.is_alive() and "run" not in vars(thread)
    thread.start()
    thread.join(PATIENCE)


# ------------------------------------------------------------------------------------------------------- asyncio


def test_to_thread_and_run_in_executor() -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        found = [await asyncio.to_thread(seen), await loop.run_in_executor(None, seen)]
        with ThreadPoolExecutor(1) as own:
            found.append(await loop.run_in_executor(own, seen))
            with value("inside"):
                found += [await asyncio.to_thread(seen), await loop.run_in_executor(None, seen)]
                found.append(await loop.run_in_executor(own, seen))
            found += [await asyncio.to_thread(seen), await loop.run_in_executor(None, seen)]
            found.append(await loop.run_in_executor(own, seen))
        return found

    assert asyncio.run(main()) == [None] * 3 + ["inside"] * 3 + [None] * 3
    with value("outside"):
        assert asyncio.run(main()) == ["outside"] * 3 + ["inside"] * 3 + ["outside"] * 3


@pytest.mark.parametrize("workers", [1, 4])
def test_tasks_with_values_of_their_own(workers: int) -> None:
    """Each task waits within its block while others enter and leave theirs."""

    async def request(name: str | None, pool: ThreadPoolExecutor | None) -> list[str | None]:
        loop = asyncio.get_running_loop()
        found: list[str | None] = []
        if name is not None:
            VALUE.set(name)  # of the task's own context
        for _ in range(5):
            found.append(await loop.run_in_executor(pool, seen))
            await asyncio.sleep(0)
            found.append(await asyncio.to_thread(seen))
        return found

    async def main(pool: ThreadPoolExecutor) -> list[list[str | None]]:
        names = ("a", None, "b", "c", None)
        return await asyncio.gather(*(request(name, each) for name in names for each in (pool, None)))

    with ThreadPoolExecutor(workers) as pool:
        found = asyncio.run(main(pool))
    assert found == [[name] * 10 for name in ("a", None, "b", "c", None) for _ in range(2)]


def test_threads_of_anyio() -> None:
    """As web frameworks run their handlers: a worker is started within a block, and serves requests outside of it."""
    anyio = pytest.importorskip("anyio")

    async def main() -> list[Any]:
        with value("inside"):
            found = [await anyio.to_thread.run_sync(seen)]
        return [*found, await anyio.to_thread.run_sync(seen)]

    assert asyncio.run(main()) == ["inside", None]


# ------------------------------------------------------------------------------------------- what is put in place


def test_a_second_call_changes_nothing(pool: ThreadPoolExecutor) -> None:
    placed = ThreadPoolExecutor.submit, threading.Thread.start
    carry(VALUE, lambda value: "another function")
    another: ContextVar[int] = ContextVar("another")
    carry(another, lambda value: value + 1)
    assert (ThreadPoolExecutor.submit, threading.Thread.start) == placed
    token = another.set(1)
    found: list[Any] = []
    try:
        with value("a"):
            assert in_thread(lambda target: threading.Thread(target=target)) == "a for threads"
            thread = threading.Thread(target=lambda: found.append((another.get(), seen())))
            thread.start()
            thread.join(PATIENCE)
        assert pool.submit(lambda: (another.get(), seen())).result() == (1, None)
    finally:
        another.reset(token)
    assert found == [(2, "a for threads")]


def test_signatures_and_names_stay() -> None:
    assert str(inspect.signature(ThreadPoolExecutor.submit)) == "(self, fn, /, *args, **kwargs)"
    assert str(inspect.signature(threading.Thread.start)) == "(self)"
    for function, name in (
        (ThreadPoolExecutor.submit, "ThreadPoolExecutor.submit"),
        (threading.Thread.start, "start"),
    ):
        assert function.__qualname__.endswith(name) and inspect.getdoc(function)


BEGIN = f"""
import contextvars, importlib.util, sys, threading
from concurrent.futures import ThreadPoolExecutor

def load():
    spec = importlib.util.spec_from_file_location("carrying", {carrying.__file__!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

variable = contextvars.ContextVar("variable")
def seen():
    return variable.get(None)
def in_thread(**options):
    found = []
    thread = threading.Thread(target=lambda: found.append(seen()), **options)
    thread.start()
    thread.join()
    return found[0]
"""


def in_process(code: str) -> None:
    """Run code in a process in which nothing is carried yet."""
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_nothing_is_put_in_place_before_the_first_call() -> None:
    in_process("""
submit, start = ThreadPoolExecutor.submit, threading.Thread.start
carry = load().carry
assert (ThreadPoolExecutor.submit, threading.Thread.start) == (submit, start)
variable.set("a")
assert in_thread() is None
carry(variable, str.upper)
assert (ThreadPoolExecutor.submit.__wrapped__, threading.Thread.start.__wrapped__) == (submit, start)
assert in_thread() == "A"
""")


def test_where_threads_inherit_contexts() -> None:
    """As Python 3.14 does by choice, and without a global lock by default. `Thread.start` is made to do so before `carry`."""
    in_process("""
plain = threading.Thread.start
def start(self):
    context, run = getattr(self, "given", None) or contextvars.copy_context(), self.run
    self.run = lambda: context.run(run)
    plain(self)
threading.Thread.start = start
class Given(threading.Thread):
    def __init__(self, context, **options):
        super().__init__(**options)
        self.given = context
variable.set("a")
assert in_thread() == "a"
load().carry(variable, str.upper)
assert in_thread() == "A"

with ThreadPoolExecutor(1) as pool:  # its worker is started by a job with a value
    assert pool.submit(seen).result() == "a"
    assert contextvars.Context().run(pool.submit, seen).result() is None
with ThreadPoolExecutor(1) as pool:
    assert contextvars.Context().run(pool.submit, seen).result() is None
    assert pool.submit(seen).result() == "a"

other = contextvars.ContextVar("other")
other.set("x")
with ThreadPoolExecutor(1) as pool:  # Python's own inheritance goes on
    assert pool.submit(lambda: (seen(), other.get(None))).result() == ("a", "x")

own = contextvars.Context()
own.run(variable.set, "b")
threading.Thread = Given
assert in_thread(context=own) == "b"  # a context that was given decides
assert own.run(seen) == "b"
assert in_thread(context=contextvars.Context()) == "A"
""")


def test_context_of_the_starting_thread_is_untouched(pool: ThreadPoolExecutor) -> None:
    """Also in a context that is entered elsewhere: it is copied, not entered again."""
    context = Context()

    def work() -> tuple[str | None, str | None]:
        VALUE.set("a")
        return pool.submit(seen).result(), seen()

    assert context.run(work) == ("a", "a") and context.run(seen) == "a" and seen() is None


@pytest.mark.skipif(sys.version_info < (3, 14), reason="executors of interpreters came with Python 3.14")
def test_executors_of_interpreters() -> None:
    from concurrent.futures import InterpreterPoolExecutor  # type: ignore[attr-defined]

    with value("a"), InterpreterPoolExecutor(1) as pool:
        assert pool.submit(int, "7").result() == 7
