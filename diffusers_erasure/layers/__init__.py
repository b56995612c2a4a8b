"""Layer kinds: how an erasure acts while images are made. A new kind is one new file here and its entry in the registry."""

from .base import HookLayer, LiveLayer, Watched
from .changes import WeightChange
from .kind import LayerKind, Summand
from .layer import Layer
from .passing import Pass
from .registry import layer_kind, register_layer_kind
from .sites import Place, SiteEdit, SiteLayer


__all__ = [
    "HookLayer",
    "Layer",
    "LayerKind",
    "LiveLayer",
    "Pass",
    "Place",
    "SiteEdit",
    "SiteLayer",
    "Summand",
    "Watched",
    "WeightChange",
    "layer_kind",
    "register_layer_kind",
]
