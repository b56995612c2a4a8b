"""Concept erasure for diffusers: erasures are made, saved, published, loaded, composed and removed like any adapter."""

from ._binding import install, install_unless_opted_out, uninstall
from ._version import __version__
from .artifact import Erasure
from .errors import (
    ErasureCompatibilityError,
    ErasureConfigError,
    ErasureError,
    ErasureFileError,
    ErasureInactiveError,
    ErasureInputError,
    ErasureNotFoundError,
    ErasureTrainingError,
)
from .fitting import erase
from .pipeline import (
    ErasablePipeline,
    ErasureInfo,
    as_erasable,
    erasures_disabled,
    list_erasures,
    load_erasure,
    save_erasure,
    set_erasures,
    training_through_erasures,
    unload_erasure,
)
from .prompt_guard import prompt_embeds_are_erased


__all__ = [
    "ErasablePipeline",
    "Erasure",
    "ErasureCompatibilityError",
    "ErasureConfigError",
    "ErasureError",
    "ErasureFileError",
    "ErasureInactiveError",
    "ErasureInfo",
    "ErasureInputError",
    "ErasureNotFoundError",
    "ErasureTrainingError",
    "__version__",
    "as_erasable",
    "erase",
    "erasures_disabled",
    "install",
    "list_erasures",
    "load_erasure",
    "prompt_embeds_are_erased",
    "save_erasure",
    "set_erasures",
    "training_through_erasures",
    "uninstall",
    "unload_erasure",
]


install_unless_opted_out()
