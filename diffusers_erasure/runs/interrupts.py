"""Ctrl-C and SIGTERM between two steps, so that what is saved is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def stop(self) -> None:
        """Raise what the signal would have raised: `KeyboardInterrupt`, or `SystemExit` after SIGTERM."""
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


@contextmanager
def noted() -> Iterator[Interrupt]:
    """Within the block the first SIGINT or SIGTERM is noted instead of raised; a second one is raised at once.

    Outside of the main thread signals cannot be caught, and nothing changes.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.signal is not None:
            interrupt.signal = number
            interrupt.stop()
        interrupt.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
