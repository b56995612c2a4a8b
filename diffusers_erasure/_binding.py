"""Binds the pipeline functions as methods onto diffusers' two pipeline base classes."""

import functools
import os
from collections.abc import Callable
from typing import Any

from . import pipeline
from .live import copies, saving
from .live.attachment import guard_requests
from .live.loaded import states
from .logging import get_logger


logger = get_logger(__name__)

NAMES = (
    "load_erasure",
    "list_erasures",
    "set_erasures",
    "unload_erasure",
    "erasure_strengths",
    "erasures_disabled",
    "fuse_erasures",
    "unfuse_erasures",
    "export_erased",
    "push_erased_model",
    "save_erasure",
    "push_erasure_to_hub",
)


def _forwarder(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # help() and IDEs show the function's own signature and documentation
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method._diffusers_erasure = True  # type: ignore[attr-defined]
    return method


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = [name for state in states(self).values() for name in state.marks.ledger.acting]
        saving.refuse(type(self).__name__, list(dict.fromkeys(names)))
        return function(self, *args, **kwargs)

    method._diffusers_erasure = True  # type: ignore[attr-defined]
    return method


def _ours(attribute: Any) -> bool:
    return getattr(attribute, "_diffusers_erasure", False) is True


def _bases() -> list[type]:
    import diffusers

    names = ("DiffusionPipeline", "ModularPipeline")
    return [getattr(diffusers, name) for name in names if hasattr(diffusers, name)]


def install() -> None:
    """Bind the erasure methods to `DiffusionPipeline` and `ModularPipeline`, and so to every pipeline.

    Importing the package does this, unless the environment variable `DIFFUSERS_ERASURE_NO_PATCH=1` is set. A second
    call does nothing, and an attribute that somebody else has put there is left alone, with a warning.

    Their `save_pretrained` and `push_to_hub` refuse a pipeline on which erasures act beside the weights, and where diffusers
    builds a denoiser from another one, erasures are carried over.
    """
    copies.watch_builders()
    guard_requests()
    for base in _bases():
        for name in saving.METHODS:
            if not _ours(getattr(base, name)):
                setattr(base, name, _guarded(getattr(base, name)))
        for name in NAMES:
            present = getattr(base, name, None)
            if present is None:
                setattr(base, name, _forwarder(getattr(pipeline, name)))
            elif not _ours(present):
                logger.warning(
                    "%s.%s exists and is not ours; it is left alone. Use `diffusers_erasure.%s(pipe, ...)`.",
                    base.__name__,
                    name,
                    name,
                )


def uninstall() -> None:
    """Remove what [`install`] has bound, and put back what it has replaced. Erasures that are loaded stay on."""
    copies.unwatch_builders()
    for base in _bases():
        for name in saving.METHODS:
            present: Any = vars(base).get(name)
            if _ours(present):
                delattr(base, name)
                if getattr(base, name, None) is not present.__wrapped__:  # it was not inherited
                    setattr(base, name, present.__wrapped__)
        for name in NAMES:
            if _ours(vars(base).get(name)):
                delattr(base, name)


def install_unless_opted_out() -> None:
    """What importing the package does."""
    if os.environ.get("DIFFUSERS_ERASURE_NO_PATCH", "0") not in ("1", "true", "yes"):
        install()
