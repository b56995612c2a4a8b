"""A lock for what threads share in modules, which are copied and pickled."""

import threading
from contextlib import AbstractContextManager, nullcontext

import torch


class Lock:
    """A lock of which a copy, or a pickle, is another one. A graph, which has no locks, goes without."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()

    def held(self) -> AbstractContextManager[object]:
        """Within the block no other thread has it."""
        return nullcontext() if torch.compiler.is_compiling() else self.lock
