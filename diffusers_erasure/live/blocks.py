"""Blocks of code in which erasures are off, or may be trained through."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .attachment import counted
from .fusing import changing
from .loaded import states


@contextmanager
def erasures_disabled(pipe: Any) -> Iterator[None]:
    """Within the block the pipeline is the base model, bit for bit. The only way to switch erasures off unlisted.

    The strengths come back at the end, after an exception too. Blocks may be nested. Fused erasures are unfused at the
    start, and fused again at the end.

    Raises:
        ErasureError: an erasure is fused, and its weights were changed since; see [`unfuse_erasures`].
    """
    with changing(pipe), counted(lambda: states(pipe).values(), "disabled"):
        yield


@contextmanager
def training_through_erasures(pipe: Any) -> Iterator[None]:
    """Within the block weights may be trained while erasures are on, which otherwise raises [`ErasureTrainingError`].

    What is trained this way may learn to undo the erasure.
    """
    with counted(lambda: states(pipe).values(), "training_allowed"):
        yield
