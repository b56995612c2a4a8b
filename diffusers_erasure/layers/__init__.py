"""Layer kinds: how an erasure acts while images are made. A new kind is one new file here and one line below."""

from ..errors import ErasureConfigError
from .activation import ActivationLayer
from .base import Layer
from .lora import LoraLayer
from .skip import SkipLayer
from .text_map import TextMapLayer


LAYERS: dict[str, type[Layer]] = {layer.kind: layer for layer in (LoraLayer, TextMapLayer, ActivationLayer, SkipLayer)}


def layer_kind(kind: str) -> type[Layer]:
    """Return the class of a layer kind.

    Raises:
        ErasureConfigError: this version does not know the kind.
    """
    if kind not in LAYERS:
        raise ErasureConfigError(
            f"The erasure has a layer of the kind {kind[:64]!r}; this version of diffusers-erasure knows "
            f"{sorted(LAYERS)}. Upgrade diffusers-erasure."
        )
    return LAYERS[kind]


__all__ = ["LAYERS", "ActivationLayer", "Layer", "LoraLayer", "SkipLayer", "TextMapLayer", "layer_kind"]
