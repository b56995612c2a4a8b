"""Blocks of code in which erasures are off, or may be trained through."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..artifact import Erasure
from ..base_model import denoiser_name
from .attachment import Loaded, attach, counted, detach
from .fusing import changing
from .loaded import components, states


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


@contextmanager
def alone(pipe: Any, erasure: Erasure) -> Iterator[None]:
    """Within the block an erasure acts on the denoiser and no other does. Goes within [`erasures_disabled`]."""
    parts = components(pipe)
    name = "being measured"
    attach(parts, [denoiser_name(pipe)], Loaded(name, erasure, 1.0, {}, ""))
    own = list(states(pipe).values())
    disabled = [state.disabled for state in own]
    others = {id(item): item for state in own for key, item in state.loaded.items() if key != name}
    strengths = {key: item.strength for key, item in others.items()}
    try:
        for item in others.values():
            item.strength = 0.0
        for state in own:
            state.disabled = 0
            state.fold()
        yield
    finally:
        for key, item in others.items():
            item.strength = strengths[key]
        for state, count in zip(own, disabled, strict=True):
            state.disabled = count
            state.fold()
        detach(parts.values(), name)
