"""Passes of a component and changes to it: a change waits for the passes that are under way, and new passes wait for it.

A pass is short (one step of a request), so nothing waits long. They take turns: before the next change the passes go that waited
for the last one. What a request began with it keeps, see `requests.py`.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..logging import get_logger


logger = get_logger(__name__)

PATIENCE = 30.0  # seconds after which a change says what it waits for
_world = threading.Condition()
_under_way: dict[int, int] = {}  # passes by thread, of all components: one within another is not held up for a change


class Turnstile:
    """Of one component, whether it has erasures or not: also the first one is loaded by one thread at a time."""

    def __init__(self) -> None:
        self.passes: set[int] = set()  # threads whose pass is under way
        self.thread: int | None = None  # that holds it for a change
        self.holder: object = None  # the block, of which all passes may go through
        self.depth = 0
        self.waiting = 0
        self.queue: set[int] = set()  # threads whose pass waits
        self.turn: set[int] = set()  # those of them that go before the next change

    def enter(self, inside: Iterable[object]) -> None:
        """A pass begins, as soon as no change holds the component: but for one of the blocks that it is made `inside` of."""
        me = threading.get_ident()
        with _world:
            self.queue.add(me)
            try:
                while self._held(me, inside) or (self.waiting and me not in self.turn and me not in _under_way):
                    _world.wait()
            finally:
                self.queue.discard(me)
                self.turn.discard(me)
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

    def _held(self, me: int, inside: Iterable[object]) -> bool:
        return self.thread not in (None, me) and not any(self.holder is each for each in inside)

    def _busy(self, me: int) -> bool:
        alive = {thread.ident for thread in threading.enumerate()}
        for ended in self.passes - alive:
            self._drop(ended)
        return bool(self.passes - {me})

    def _drop(self, thread: int) -> None:
        self.passes.discard(thread)
        _under_way[thread] -= 1
        if not _under_way[thread]:
            del _under_way[thread]


_turnstiles: "weakref.WeakKeyDictionary[object, Turnstile]" = weakref.WeakKeyDictionary()


def of(component: object) -> Turnstile:
    """The turnstile of a component, which is not compiled or wrapped."""
    with _world:
        found = _turnstiles.get(component)
        if found is None:
            found = _turnstiles[component] = Turnstile()
        return found


@contextmanager
def held(turnstiles: Iterable[Turnstile], inside: Iterable[object], holder: object = None) -> Iterator[None]:
    """Within the block no pass of other threads is under way on some components.

    All of them are taken at once or none, so that two changes do not wait for each other. Blocks may be nested.

    Args:
        turnstiles (iterable of [`Turnstile`]): of the components.
        inside (iterable): the blocks in which the caller is: what one of them holds is the caller's too.
        holder (*optional*): a block of which all passes may go through; by default those of the calling thread.
    """
    turnstiles, inside, me = list(turnstiles), list(inside), threading.get_ident()
    with _world:
        for each in turnstiles:
            each.waiting += 1
        try:
            waited = 0.0
            while any(each._held(me, inside) or each._busy(me) or each.turn - {me} for each in turnstiles):
                if not _world.wait(1.0):
                    waited += 1.0
                    if waited == PATIENCE:
                        logger.warning(
                            "A change of what is loaded waits for passes of other threads: %.0f s so far.", waited
                        )
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


@contextmanager
def quiet(turnstiles: Iterable[Turnstile], inside: Iterable[object]) -> Iterator[None]:
    """Within the block no change begins, and none is under way on some components; it must be short, and wait for nothing."""
    turnstiles, inside, me = list(turnstiles), list(inside), threading.get_ident()
    with _world:
        while any(each._held(me, inside) for each in turnstiles):
            _world.wait()
        yield
