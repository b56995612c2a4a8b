"""Layers on a text encoder act only where that encoder encodes the prompt: `prompt_embeds` from outside are refused."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ErasureCompatibilityError, ErasureInactiveError
from . import attachment


_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def text_encoders_with_layers(pipe: Any) -> list[str]:
    """Names of the text encoders on which erasures of a pipeline act now (strength above 0, not disabled)."""
    states = {name: attachment.state_of(getattr(pipe, name, None)) for name in _ENCODERS}
    return [name for name, state in states.items() if state is not None and state.acts()]


class GuardedEncodePrompt:
    """Stands before a pipeline's `encode_prompt`. A class and no closure, so that pipelines stay picklable."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.trusted = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encode_prompt = type(self.pipe).encode_prompt
        arguments = inspect.signature(encode_prompt).bind(self.pipe, *args, **kwargs).arguments
        given = [name for name, value in arguments.items() if name.endswith("prompt_embeds") and value is not None]
        encoders = text_encoders_with_layers(self.pipe)
        if given and encoders and not self.trusted:
            raise ErasureInactiveError(
                f"{given} were given, so {encoders} will not run, and the erasure on them would not act. Give `prompt`; "
                "or, where the embeddings were encoded by this pipeline with the erasure on, call it within "
                "`with diffusers_erasure.prompt_embeds_are_erased(pipe):`."
            )
        return encode_prompt(self.pipe, *args, **kwargs)


def check(pipe: Any) -> None:
    """Refuse pipelines for which the guard cannot be set up.

    Raises:
        ErasureCompatibilityError: the pipeline has no `encode_prompt` (modular pipelines).
    """
    if not hasattr(type(pipe), "encode_prompt"):
        raise ErasureCompatibilityError(
            f"{type(pipe).__name__} has no `encode_prompt`, so prompts that bypass its text encoder could not be noticed; "
            "an erasure with layers on a text encoder is refused there. Use the standard pipeline."
        )


def install(pipe: Any) -> None:
    """Put the guard before the pipeline's `encode_prompt`; a second call does nothing."""
    if not isinstance(vars(pipe).get("encode_prompt"), GuardedEncodePrompt):
        pipe.encode_prompt = GuardedEncodePrompt(pipe)


def remove(pipe: Any) -> None:
    """Take the guard away."""
    if isinstance(vars(pipe).get("encode_prompt"), GuardedEncodePrompt):
        del pipe.encode_prompt


@contextmanager
def prompt_embeds_are_erased(pipe: Any) -> Iterator[None]:
    """Within the block `prompt_embeds` are accepted: the caller says that they were encoded with the erasure on."""
    guard = vars(pipe).get("encode_prompt")
    if not isinstance(guard, GuardedEncodePrompt):
        yield
        return
    guard.trusted += 1
    try:
        yield
    finally:
        guard.trusted -= 1
