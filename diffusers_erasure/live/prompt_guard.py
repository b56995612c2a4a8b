"""Layers on a text encoder act only where that encoder encodes the prompt: `prompt_embeds` from outside are refused.

The check stands before the `encode_prompt` of all pipeline classes, so that whichever pipeline shares an encoder or a
denoiser with an erasure has it, also one that is made later. Each erasure remembers rows that were encoded without it.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureInactiveError
from ..layers.locks import Lock
from . import second_prompt
from .loaded import states
from .requests import Block, trusts_prompts, within
from .state import Loaded, state_of
from .wrapping import wrap_pipelines


SEEN, SAMPLES = 256, 96  # texts that are remembered, and values of each by which it is known again
_within: ContextVar[bool] = ContextVar("within encode_prompt", default=False)
_Key = tuple[int, bytes]


class PromptRecord:
    """What one erasure with layers on text encoders knows of rows: which were encoded without it."""

    def __init__(self) -> None:
        self.rows: OrderedDict[_Key, None] = OrderedDict()  # by what they are known again, the oldest first
        self.lock = Lock()
        guard_all()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        guard_all()  # in a process that has unpickled the pipeline no erasure was loaded

    def note(self, rows: Iterable[_Key]) -> None:
        """Remember rows that were encoded without the erasure."""
        with self.lock.held():
            for row in rows:
                self.rows[row] = None
                self.rows.move_to_end(row)
            while len(self.rows) > SEEN * len(_DTYPES):
                self.rows.popitem(last=False)

    def forget(self, rows: Iterable[_Key]) -> None:
        """Drop rows that the erased encoder gives too."""
        with self.lock.held():
            for row in rows:
                self.rows.pop(row, None)

    def knows(self, rows: Iterable[_Key]) -> bool:
        """Whether any of these rows was encoded without the erasure."""
        with self.lock.held():
            return any(row in self.rows for row in rows)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # to which rows may be cast before they are given back


def _keys(values: Any, dtypes: tuple[torch.dtype, ...]) -> dict[_Key, None]:
    """By what the rows of tensors are known again after a cast to some dtypes; those that are constant say nothing."""
    if isinstance(values, tuple | list):
        return {key: None for value in values for key in _keys(value, dtypes)}
    if not isinstance(values, torch.Tensor) or values.ndim < 2 or not values.is_floating_point() or values.is_meta:
        return {}
    flat = values.detach().flatten(1)
    places = torch.linspace(0, flat.shape[1] - 1, SAMPLES).round().long().to(flat.device)
    samples = flat.index_select(1, places).cpu().float()
    return {
        (flat.shape[1], sample.to(dtype).float().numpy().tobytes()): None
        for sample in samples
        if sample.amin() != sample.amax()
        for dtype in dtypes
    }


def _on_text(pipe: Any) -> tuple[list[Loaded], list[Loaded]]:
    """The erasures of a pipeline that have layers on text encoders: those that act now, and those that do not."""
    found: dict[str, tuple[Loaded, bool]] = {}
    # A denoiser tells of those whose encoder is not there; it may have been copied alone, with items of its own.
    for component, state in sorted(states(pipe).items(), key=lambda each: not each[0].startswith("text_encoder")):
        view = state.view()
        for name, item in view.plan.items.items():
            if isinstance(item.prompts, PromptRecord) and (name not in found or component.startswith("text_encoder")):
                former, acting = found.get(name, (item, True))
                found[name] = former, acting and name in view.acting
    on = [item for item, acting in found.values() if acting]
    return on, [item for item, acting in found.values() if not acting]


def _for_some_pictures(pipe: Any) -> set[str]:
    """Erasures that are off for some pictures of a batch: whose rows they are cannot be told from outside."""
    views = [state.view() for state in states(pipe).values()]
    found = ((name, value) for view in views for name, value in view.strengths.items())
    return {name for name, value in found if isinstance(value, tuple) and not all(value)}


def _encoders(item: Loaded) -> list[str]:
    names = (layer.component for layer in item.erasure.config.layers)
    return sorted({name for name in names if name.startswith("text_encoder")})


def _holds_rows(name: str) -> bool:
    """Whether an argument is rows, by its name: `negative_prompt_embeds`, `editing_prompt_embeddings`."""
    return name.endswith("prompt_embeds") or "prompt_embeddings" in name


def _guarded(encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline class's `encode_prompt` with the check before it. A closure, for classes are not pickled."""

    @functools.wraps(encode_prompt)
    def guarded_encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _within.get():  # a subclass's own function, or one of its former name, has called this one
            return encode_prompt(self, *args, **kwargs)
        needing = second_prompt.acting_together(self)
        acting, off = _on_text(self)
        if not acting and not off and not needing:
            return encode_prompt(self, *args, **kwargs)
        arguments = {**inspect.signature(encode_prompt).bind(self, *args, **kwargs).arguments, **kwargs}
        given = {name: value for name, value in arguments.items() if value is not None and _holds_rows(name)}
        second_prompt.refuse(self, needing, arguments)
        for item in acting:
            _check(self, item, given)
        token = _within.set(True)
        try:
            rows = encode_prompt(self, *args, **kwargs)
        finally:
            _within.reset(token)
        partly = _for_some_pictures(self)
        if off or partly or any(item.prompts.rows for item in acting):
            mine = _keys(list(given.values()), _DTYPES)
            new = [key for key in _keys(rows, _DTYPES) if key not in mine]
            for item in (*off, *(item for item in acting if item.name in partly)):
                item.prompts.note(new)
            for item in (item for item in acting if item.name not in partly):
                item.prompts.forget(new)
        return rows

    return guarded_encode_prompt


def _check(pipe: Any, item: Loaded, given: dict[str, Any]) -> None:
    """Refuse rows that did not go through an erasure, and encoders that it is not on."""
    encoders = _encoders(item)
    for name in encoders:
        encoder = getattr(pipe, name, None)
        state = state_of(encoder)
        if encoder is not None and (state is None or item.name not in state.view().plan.items):
            raise ErasureInactiveError(
                f"The pipeline's {name!r} is another one than that on which the erasure {item.name!r} acts. Call "
                f"`pipe.unload_erasure({item.name!r})` and load it again."
            )
    if not given:
        return
    if item.prompts.knows(_keys(list(given.values()), (torch.float32,))):
        raise ErasureInactiveError(
            f"{list(given)} hold rows that were encoded while the erasure {item.name!r} was disabled or at strength 0. Encode "
            "them again with it on, or give `prompt`."
        )
    if not trusts_prompts(pipe):
        raise ErasureInactiveError(
            f"{list(given)} were given, so {encoders} will not run, and the erasure {item.name!r} on them would not act. Give "
            "`prompt`; or, where the embeddings were encoded with the erasure on, call the pipeline within "
            "`with diffusers_erasure.prompt_embeds_are_erased(pipe):`."
        )


def guard_all() -> None:
    """Put the check before the `encode_prompt` of every pipeline class; done twice it does nothing.

    It stays: where no erasure with layers on a text encoder is on a pipeline, it lets everything through.
    """
    wrap_pipelines(compat.PROMPT_ENCODERS, _guarded)


class OnePrompt:
    """On an erasure that needs both of SDXL's prompts to be one: the check is there wherever this is, unpickled too."""

    def __init__(self) -> None:
        guard_all()

    def __reduce__(self) -> tuple[type["OnePrompt"], tuple[()]]:
        return OnePrompt, ()


def check(pipe: Any) -> None:
    """Refuse pipelines for which the guard cannot be set up.

    Raises:
        ErasureCompatibilityError: the pipeline has no `encode_prompt` (modular pipelines).
    """
    if not compat.encodes_prompts(type(pipe)):
        raise ErasureCompatibilityError(
            f"{type(pipe).__name__} has no `encode_prompt`, so prompts that bypass its text encoder could not be noticed; "
            "an erasure with layers on a text encoder is refused there. Use the standard pipeline."
        )


@contextmanager
def prompt_embeds_are_erased(pipe: Any) -> Iterator[None]:
    """Within the block `prompt_embeds` are accepted: the caller says that they were encoded with the erasure on.

    Rows that a pipeline is known to have encoded without it are refused all the same.
    """
    with within(Block(pipe, trusted=True)):
        yield
