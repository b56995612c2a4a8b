"""Passes of a component and changes to it: a change waits for the passes that are under way, and new passes wait for it.

A pass is short (one step of a request), so nothing waits long. They take turns: before the next change the passes go that waited
for the last one. What a request began with it keeps, see `requests.py`.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from .. import compat
from ..errors import ErasureError
from ..logging import get_logger


logger = get_logger(__name__)

PATIENCE = 30.0  # seconds after which a pass or a change says what it waits for
_world = threading.Condition()
_under_way: dict[int, int] = {}  # passes by thread, of all components: one within another is not held up for a change
_waits: "dict[int, Turnstile]" = {}  # threads whose pass or request waits, and where


class Turnstile:
    """Of one component, whether it has erasures or not: also the first one is loaded by one thread at a time.

    Args:
        component (`nn.Module`): the component.
    """

    def __init__(self, component: nn.Module) -> None:
        self.component = weakref.ref(component)
        self.requests: Counter[int] = Counter()  # by thread, those under way
        self.closing = 0  # changes of weights that wait for requests to end, and let none begin
        self.passes: set[int] = set()  # threads whose pass is under way
        self.thread: int | None = None  # that holds it for a change
        self.holder: object = None  # the block, of which all passes may go through
        self.depth = 0
        self.waiting = 0
        self.queue: set[int] = set()  # threads whose pass waits
        self.turn: set[int] = set()  # those of them that go before the next change

    def enter(self, inside: Iterable[object]) -> None:
        """A pass begins, as soon as no change holds the component: but for one of the blocks that it is made `inside` of.

        Raises:
            ErasureError: waiting for it would last for ever.
        """
        threading.current_thread()  # makes a thread that Python has not started known, so that it counts as alive
        me, waited = threading.get_ident(), 0.0
        with _world:
            self.queue.add(me)
            _waits[me] = self
            try:
                while self._held(me, inside) or (
                    self.waiting and self.thread is None and me not in self.turn and me not in _under_way
                ):
                    self._refuse_for_ever(me)
                    waited = _patiently(waited, "A pass waits for a change of what is loaded in another thread")
            finally:
                del _waits[me]
                self.queue.discard(me)
                self.turn.discard(me)
            if self.thread == me and self.holder is not None and not any(self.holder is each for each in inside):
                raise ErasureError(
                    "Another task of this thread is within `erasures_disabled()`, and erasures that lie in the weights (fused, or with "
                    '`backend="peft"`) are off meanwhile. Draw in another thread (`asyncio.to_thread`), which waits for it.'
                )
            if me not in self.passes:  # a pass that broke off is replaced
                self.passes.add(me)
                _under_way[me] = _under_way.get(me, 0) + 1

    def leave(self) -> None:
        """The calling thread's pass is over; nothing happens where there is none."""
        me = threading.get_ident()
        with _world:
            if me in self.passes:
                self._drop(me)
                _world.notify_all()

    def _refuse_for_ever(self, me: int) -> None:
        """Two threads that each hold what the other one's pass waits for would wait for ever."""
        if self.thread is not None and self.thread in _waits and _waits[self.thread].thread == me:
            raise ErasureError(
                "Two threads are within `erasures_disabled()` of two pipelines with fused erasures, and each draws with the other "
                "one's: both would wait for ever. Unfuse the erasures, or draw outside of the block."
            )

    def _held(self, me: int, inside: Iterable[object]) -> bool:
        return self.thread not in (None, me) and not any(self.holder is each for each in inside)

    def _is_closed(self, me: int, inside: Iterable[object]) -> bool:
        """Whether no request may begin: a change holds the component, or waits for the requests that are under way."""
        return self._held(me, inside) or (self.closing > 0 and me not in self.requests)

    def _busy(self, me: int, waited: float) -> bool:
        """Whether a pass of another thread is under way; one that broke off is not, which takes a while to look for."""
        component = self.component()
        for thread in self.passes - {me} if waited else ():
            if component is None or not compat.is_running(thread, component):
                self._drop(thread)
        return bool(self.passes - {me})

    def _drop(self, thread: int) -> None:
        self.passes.discard(thread)
        _under_way[thread] -= 1
        if not _under_way[thread]:
            del _under_way[thread]


def _patiently(waited: float, what: str) -> float:
    """Wait for a while; gives how long it was so far, and says it once."""
    if _world.wait(1.0):
        return waited
    if waited + 1.0 == PATIENCE:
        logger.warning("%s: %.0f s so far.", what, waited + 1.0)
    return waited + 1.0


_turnstiles: "weakref.WeakKeyDictionary[nn.Module, Turnstile]" = weakref.WeakKeyDictionary()


def of(component: nn.Module) -> Turnstile:
    """The turnstile of a component, which is not compiled or wrapped."""
    with _world:
        found = _turnstiles.get(component)
        if found is None:
            found = _turnstiles[component] = Turnstile(component)
        return found


@contextmanager
def held(
    turnstiles: Iterable[Turnstile], inside: Iterable[object], holder: object = None, *, weights: bool = False
) -> Iterator[None]:
    """Within the block no pass of other threads is under way on some components, and with `weights` no request.

    All of them are taken at once or none, so that two changes do not wait for each other. Blocks may be nested.

    Args:
        turnstiles (iterable of [`Turnstile`]): of the components.
        inside (iterable): the blocks in which the caller is: what one of them holds is the caller's too.
        holder (*optional*): a block of which all passes may go through; by default those of the calling thread.
        weights (`bool`, *optional*): weights are changed, which requests share, so that those under way have to end before.

    Raises:
        ErasureError: with `weights`, within a request, while requests of other threads are under way: they might wait as well.
    """
    turnstiles, inside, me = list(turnstiles), list(inside), threading.get_ident()
    with _world:
        if weights:
            _wait_for_requests(turnstiles, me)
        for each in turnstiles:
            each.waiting += 1
        try:
            waited = 0.0
            while any(each._held(me, inside) or each._busy(me, waited) or each.turn - {me} for each in turnstiles):
                waited = _patiently(waited, "A change of what is loaded waits for passes of other threads")
            for each in turnstiles:
                if not each.depth:
                    each.holder, each.thread = holder, me
                each.depth += 1
        finally:
            for each in turnstiles:
                each.waiting -= 1
            _world.notify_all()
    try:
        yield
    finally:
        with _world:
            for each in turnstiles:
                each.depth -= 1
                if not each.depth:
                    each.holder = each.thread = None
                    each.turn |= each.queue
            _world.notify_all()


def _wait_for_requests(turnstiles: list[Turnstile], me: int) -> None:
    def others() -> bool:
        return any(thread != me for each in turnstiles for thread in each.requests)

    if others() and any(me in each.requests for each in turnstiles):
        raise ErasureError(
            "Erasures cannot be fused or unfused within a call of the pipeline (a callback) while other threads draw with the same "
            "weights: these would have to end first. Do it between two calls."
        )
    waited = 0.0
    for each in turnstiles:
        each.closing += 1
    try:
        while others():
            waited = _patiently(waited, "A change of weights waits for calls of pipelines in other threads")
    finally:
        for each in turnstiles:
            each.closing -= 1


@contextmanager
def quiet(turnstiles: Iterable[Turnstile], inside: Iterable[object]) -> Iterator[None]:
    """Within the block no change begins, and none is under way on some components; it must be short, and wait for nothing."""
    turnstiles, inside, me = list(turnstiles), list(inside), threading.get_ident()
    with _world:
        waited = 0.0
        try:
            while (closed := next((each for each in turnstiles if each._is_closed(me, inside)), None)) is not None:
                _waits[me] = closed
                closed.queue.add(me)
                closed._refuse_for_ever(me)
                waited = _patiently(waited, "A call of a pipeline waits for a change in another thread")
            yield
        finally:
            _waits.pop(me, None)
            for each in turnstiles:
                each.queue.discard(me)
                each.turn.discard(me)
            _world.notify_all()


def begin(turnstiles: Iterable[Turnstile]) -> None:
    """A request of the calling thread begins. It goes within [`quiet`]."""
    for each in turnstiles:
        each.requests[threading.get_ident()] += 1


def end(turnstiles: Iterable[Turnstile]) -> None:
    """A request of the calling thread is over."""
    me = threading.get_ident()
    with _world:
        for each in turnstiles:
            each.requests[me] -= 1
            if each.requests[me] <= 0:
                del each.requests[me]
        _world.notify_all()
