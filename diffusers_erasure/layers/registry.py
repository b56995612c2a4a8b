"""The registry of layer kinds."""

import re

from torch import nn

from ..errors import ErasureConfigError, ErasureInputError
from .activation import ActivationKind
from .adapter import AdapterKind
from .gated_map import GatedMapKind
from .kind import LayerKind
from .lora import LoraKind
from .skip import SkipKind
from .text_map import TextMapKind


_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_kinds: dict[str, LayerKind] = {}


def register_layer_kind(kind: LayerKind) -> None:
    """Make a layer kind known: artefacts that hold such layers can be read and loaded from then on.

    Raises:
        ErasureInputError: there is a kind of that name, it cannot be a name, or `kind` is a class and no instance.
    """
    if not isinstance(kind, LayerKind):
        raise ErasureInputError(f"A layer kind is an instance of a `LayerKind`, not {kind!r}.")
    # live layers are a `ModuleDict`'s entries
    if not isinstance(kind.name, str) or not _NAME.fullmatch(kind.name) or hasattr(nn.ModuleDict(), kind.name):
        raise ErasureInputError(
            f"{str(kind.name)[:80]!r} cannot be the name of a layer kind; expected up to 64 of a-z, 0-9 and _, beginning with a letter."
        )
    if kind.name in _kinds:
        raise ErasureInputError(f"There is a layer kind {kind.name!r} already ({type(_kinds[kind.name]).__name__}).")
    _kinds[kind.name] = kind


def layer_kind(name: str) -> LayerKind:
    """Return the layer kind of that name.

    Raises:
        ErasureConfigError: this version does not know the kind.
    """
    if name not in _kinds:
        raise ErasureConfigError(
            f"The erasure has a layer of the kind {name[:64]!r}; this version of diffusers-erasure knows "
            f"{sorted(_kinds)}. Upgrade diffusers-erasure."
        )
    return _kinds[name]


for _kind in (LoraKind(), TextMapKind(), ActivationKind(), SkipKind(), GatedMapKind(), AdapterKind()):
    register_layer_kind(_kind)
