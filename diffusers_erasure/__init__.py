"""Concept erasure for diffusers: erasures are made, saved, published, loaded, composed and removed like any adapter."""

from ._binding import install, install_unless_opted_out, uninstall
from ._version import __version__
from .artifact import Erasure
from .combining import combine
from .errors import (
    ErasureCompatibilityError,
    ErasureConfigError,
    ErasureError,
    ErasureFileError,
    ErasureHubError,
    ErasureInactiveError,
    ErasureInputError,
    ErasureNotFoundError,
    ErasureTrainingError,
)
from .fitting import erase
from .formats.erased_model import export_erased, push_erased_model
from .formats.kohya import save_kohya, to_kohya
from .layers import Layer
from .live.processor import ActEraseAttnProcessor
from .live.prompt_guard import prompt_embeds_are_erased
from .modifying import with_gate, with_schedule, with_stock_lora, without_gate, without_schedule
from .pipeline import (
    ErasablePipeline,
    ErasureInfo,
    as_erasable,
    erasure_strengths,
    erasures_disabled,
    fuse_erasures,
    list_erasures,
    load_erasure,
    push_erasure_to_hub,
    save_erasure,
    set_erasures,
    training_through_erasures,
    unfuse_erasures,
    unload_erasure,
)
from .registry import Citation, MethodDeclaration, register_method
from .stock_lora import without_stock_lora


__all__ = [
    "ActEraseAttnProcessor",
    "Citation",
    "ErasablePipeline",
    "Erasure",
    "ErasureCompatibilityError",
    "ErasureConfigError",
    "ErasureError",
    "ErasureFileError",
    "ErasureHubError",
    "ErasureInactiveError",
    "ErasureInfo",
    "ErasureInputError",
    "ErasureNotFoundError",
    "ErasureTrainingError",
    "Layer",
    "MethodDeclaration",
    "__version__",
    "as_erasable",
    "combine",
    "erase",
    "erasure_strengths",
    "erasures_disabled",
    "export_erased",
    "fuse_erasures",
    "install",
    "list_erasures",
    "load_erasure",
    "prompt_embeds_are_erased",
    "push_erased_model",
    "push_erasure_to_hub",
    "register_method",
    "save_erasure",
    "save_kohya",
    "set_erasures",
    "to_kohya",
    "training_through_erasures",
    "unfuse_erasures",
    "uninstall",
    "unload_erasure",
    "with_gate",
    "with_schedule",
    "with_stock_lora",
    "without_gate",
    "without_schedule",
    "without_stock_lora",
]


install_unless_opted_out()
