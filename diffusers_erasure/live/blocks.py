"""Blocks of code in which requests are made with other strengths, with erasures off, or with weights trained through them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..errors import ErasureInputError
from .attachment import changing_alone
from .fusing import changing, fused_names
from .loaded import components, known, loaded, states
from .plans import Strength
from .requests import Block, within


@contextmanager
def erasures_disabled(pipe: Any) -> Iterator[None]:
    """Within the block the pipeline is the base model, bit for bit. The only way to switch erasures off unlisted.

    It holds where it stands: for requests that are made within the block, in tasks, threads and jobs that are started there
    too. Other threads draw with the erasures on. Fused erasures and those with `backend="peft"`, which lie in the weights
    that all threads share, are taken out at the start, once other threads' requests have ended, and put back at the end;
    other threads wait meanwhile.

    The strengths come back at the end, after an exception too. Blocks may be nested.

    Raises:
        ErasureError: an erasure is fused, and its weights were changed since; see [`unfuse_erasures`].
    """
    block = Block(pipe, exact={})
    shared = any(
        state.merged or any(item.backend == "peft" for item in state.loaded.values()) for state in _states(pipe)
    )
    with ExitStack() as stack:
        if shared:
            stack.enter_context(changing_alone(components(pipe).values(), block, weights=True))
        stack.enter_context(changing(pipe))
        stack.callback(_fold, pipe)  # after the block has ended
        stack.enter_context(within(block))
        _fold(pipe)
        yield


@contextmanager
def erasure_strengths(pipe: Any, strengths: Mapping[str, float | Sequence[float]]) -> Iterator[None]:
    """Within the block requests are made with other strengths of some erasures. The others keep theirs, as they are set.

    It holds where it stands: for requests that are made within the block, in tasks, threads and jobs that are started there
    too. Nothing is attached or compiled anew.

    Args:
        pipe ([`DiffusionPipeline`] or [`ModularPipeline`]): the pipeline.
        strengths (`dict`): by name, a finite number of at least 0; or a sequence of them, one for each picture of the batch
            (prompts times `num_images_per_prompt`).

    Raises:
        ErasureNotFoundError: a name is not loaded.
        ErasureInputError: a strength is negative or not finite, a sequence is empty; or an erasure lies in the weights, as it
            is fused or was loaded with `backend="peft"`. A request raises it where the sequence does not fit its batch.

    Examples:

    ```py
    >>> with pipe.erasure_strengths({"no-cat": [0, 1, 1, 0]}):
    ...     images = pipe(["a cat"] * 4).images
    ```
    """
    if not isinstance(strengths, Mapping):
        raise ErasureInputError(f"`strengths` must be a dict by name of the erasure, not {type(strengths).__name__}.")
    for name in strengths:
        known(pipe, name)
    values = {name: _strength(name, value) for name, value in strengths.items()}
    fused = set(fused_names(pipe))
    fixed = [name for name in strengths if name in fused or loaded(pipe)[name].backend == "peft"]
    if fixed:
        raise ErasureInputError(
            f'The erasures {fixed} lie in weights that all requests share (fused, or `backend="peft"`), so one request cannot '
            "have other strengths than another. Call `pipe.unfuse_erasures()`, or load them with the default backend; "
            "`set_erasures` changes them for all."
        )
    with within(Block(pipe, strengths=values)):
        yield


@contextmanager
def training_through_erasures(pipe: Any) -> Iterator[None]:
    """Within the block weights may be trained while erasures are on, which otherwise raises [`ErasureTrainingError`].

    What is trained this way may learn to undo the erasure.
    """
    with within(Block(pipe, training=True)):
        yield


def valid_strength(value: Any) -> float:
    """A strength as a number.

    Raises:
        ErasureInputError: it is none, or negative or not finite.
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not 0 <= value < float("inf"):
        raise ErasureInputError(f"A strength must be a finite number of at least 0, not {value!r}.")
    return float(value)


def _strength(name: str, value: Any) -> Strength:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return valid_strength(value)
    if not value:
        raise ErasureInputError(
            f"The strengths of {name!r} are an empty sequence; give one for each picture of the batch."
        )
    return tuple(map(valid_strength, value))


def _states(pipe: Any) -> list[Any]:
    return list(states(pipe).values())


def _fold(pipe: Any) -> None:
    for state in _states(pipe):
        state.fold()
