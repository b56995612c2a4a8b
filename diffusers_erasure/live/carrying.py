"""Context variables that go along with work handed to other threads: to executors, and so from asyncio, and to new threads.

Python's threads begin with an empty context, so what a `with` block says about the current context ends at
`ThreadPoolExecutor.submit` and `Thread.start`. (`asyncio.to_thread` takes the context along; `loop.run_in_executor` does not. From
Python 3.14 on threads may inherit it.) Other variables are left to what Python does with them.
"""

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar


T = TypeVar("T")
_UNSET: Any = object()

_lock = threading.Lock()
# Replaced as a whole, as other threads read it.
_carried: dict[ContextVar[Any], tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {}


def carry(
    variable: ContextVar[T], for_threads: Callable[[T], T], for_jobs: Callable[[T], T] = lambda value: value
) -> None:
    """Let a context variable go along with work that is handed to other threads, in this process from now on.

    A job given to [`~concurrent.futures.ThreadPoolExecutor`] (also by `loop.run_in_executor` and `asyncio.to_thread`) runs with
    `for_jobs` of the value that the variable has where it is handed over. The executor's threads do not keep it: they serve others as well. A
    [`~threading.Thread`] that is started runs with `for_threads(value)`, unless it was given a context in which the variable has
    another value. Where the variable is not set, or is an empty tuple, nothing is changed.

    Args:
        variable (`ContextVar`): the variable. A second call for the same one does nothing.
        for_threads (`Callable`): makes the value for a new thread from that of the thread which starts it, in which it is called.
        for_jobs (`Callable`, *optional*): makes that for a job; the same value by default.
    """
    global _carried
    with _lock:
        if not _carried:
            ThreadPoolExecutor.submit = _carrying_submit(ThreadPoolExecutor.submit)  # type: ignore[method-assign]
            threading.Thread.start = _carrying_start(threading.Thread.start)  # type: ignore[method-assign]
        if variable not in _carried:
            _carried = {**_carried, variable: (for_threads, for_jobs)}


def _carrying_submit(submit: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(submit)
    def carrying(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        values = [
            (each, for_jobs(value))
            for each, (_, for_jobs) in _carried.items()
            if (value := each.get(_UNSET)) not in (_UNSET, ())
        ]
        if not values:
            return submit(self, fn, *args, **kwargs)
        # The executors of other interpreters (Python 3.14) pickle their jobs; what is set here says nothing there.
        if not isinstance(self, getattr(concurrent.futures, "InterpreterPoolExecutor", ())):
            _set_in_own_context(fn, values)
            fn = functools.partial(_run_job, values, fn)
        # A thread that the executor starts meanwhile would run all its later jobs with what it inherits.
        return _context_without(values).run(submit, self, fn, *args, **kwargs)

    return carrying


def _carrying_start(start: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(start)
    def carrying(self: threading.Thread) -> None:
        values = [
            (each, value, for_threads(value))
            for each, (for_threads, _) in _carried.items()
            if (value := each.get(_UNSET)) not in (_UNSET, ())
        ]
        if not values:
            return start(self)
        own = vars(self).get("run", _UNSET)  # somebody else has wrapped it in the same way

        def put_back() -> None:
            if own is _UNSET:
                vars(self).pop("run", None)
            else:
                self.run = own  # type: ignore[method-assign]

        # Subclasses have a `run` of their own, which is looked up when the thread begins.
        self.run = functools.partial(_run_thread, values, self.run, put_back)  # type: ignore[method-assign]
        try:
            start(self)
        except BaseException:
            put_back()
            raise

    return carrying


def _set_in_own_context(fn: Callable[..., Any], values: Sequence[tuple[ContextVar[Any], Any]]) -> None:
    """Where a job brings a copy of its context along, as that of `asyncio.to_thread` does, the values are set in there."""
    run = fn.func if isinstance(fn, functools.partial) else fn
    context = getattr(run, "__self__", None)
    if isinstance(context, Context):
        for variable, value in values:
            if variable in context:
                context.run(variable.set, value)


def _run_job(
    values: Sequence[tuple[ContextVar[Any], Any]], function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Run an executor's job with variables set, and leave its thread as it was."""
    tokens = [(variable, variable.set(value)) for variable, value in values]
    try:
        return function(*args, **kwargs)
    finally:
        for variable, token in tokens:
            variable.reset(token)


def _run_thread(
    values: list[tuple[ContextVar[Any], Any, Any]], run: Callable[[], None], put_back: Callable[[], None]
) -> None:
    """Be the `run` of a thread. The value of the starting thread, or none, stands for no choice of the thread's own."""
    put_back()
    new = [(each, changed) for each, value, changed in values if each.get(value) is value]
    values.clear()  # a thread may live long, and its value may hold less
    _run_job(new, run)


def _context_without(values: Sequence[tuple[ContextVar[Any], Any]]) -> Context:
    """A copy of the current context in which some variables are not set; a variable can only be reset by who has set it."""
    left_out = {variable for variable, _ in values}
    context = Context()
    for variable, value in copy_context().items():
        if variable not in left_out:
            context.run(variable.set, value)
    return context
