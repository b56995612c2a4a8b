"""The second prompt of SDXL and SD3: what was fitted to rows whose halves are of one prompt is refused where they are of two.

A text row of SDXL, and one of CLIP's of Stable Diffusion 3, is what two text encoders make of a token, side by side, and a call may
give each its own prompt. An erasure that maps each half by itself acts on it whatever the other is; one that maps both together, or
was trained on both, was made for rows that such a call does not feed. T5's rows stand by themselves, of whatever prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import compat
from ..artifact import Erasure
from ..base_model import component, family_of
from ..errors import ErasureCompatibilityError, ErasureInactiveError
from ..families import ROWS, Family
from ..layers import layer_kind
from ..logging import get_logger
from ..low_rank import blocks
from ..schema import LayerSpec
from .loaded import states


logger = get_logger(__name__)

_ENCODERS = ("text_encoder", "text_encoder_2")
_READERS = (".attn2.to_k", ".attn2.to_v")


def acting_together(pipe: Any) -> list[str]:
    """Names of the erasures on a pipeline's denoiser that act now and need both halves of the rows to be of one prompt."""
    found = []
    for denoiser in ("unet", "transformer"):
        state = states(pipe).get(denoiser)
        view = None if state is None else state.view()
        found += [] if view is None else [name for name in view.acting if view.plan.items[name].one_prompt is not None]
    return found


def needs_guard(pipe: Any, erasure: Erasure) -> bool:
    """Whether calls of `encode_prompt` have to be looked at because of an erasure."""
    if not maps_together(pipe, erasure):
        return False
    if not compat.encodes_prompts(type(pipe)):
        logger.warning(
            "The erasure was made for rows whose halves are of one prompt. %s has no `encode_prompt`, so a call with another "
            "`prompt_2`, on which it may not act, is not noticed there.",
            type(pipe).__name__,
        )
    return True


def maps_together(pipe: Any, erasure: Erasure) -> bool:
    """Whether an erasure was made with both text encoders and acts on the halves of their rows together.

    That it acts on each by itself shows in a UNet's factors: every row of `A` has exact zeros in one half. At a door, which reads
    T5's rows in the same columns, it does not, and what the method recorded of itself counts.
    """
    try:
        family = family_of(pipe)
    except ErasureCompatibilityError:
        return False
    if _ENCODERS not in family.rows:
        return False
    if family.door is not None:
        apart = erasure.config.method.settings.get("per_encoder") is True
        return any(_at_door(layer, family) and not (apart and layer.gate is None) for layer in erasure.config.layers)
    first = component(pipe, _ENCODERS[0])
    width = None if first is None else int(first.config.hidden_size)
    layers = [layer for layer in erasure.config.layers if set(_ENCODERS) <= set(layer.derived_from)]
    return any(layer.gate is not None or _mixes(erasure, layer, width) for layer in layers)


def _at_door(layer: LayerSpec, family: Family) -> bool:
    """Whether a layer was made with both encoders, and maps the rows or is a LoRA on what reads them."""
    return set(_ENCODERS) <= set(layer.derived_from) and bool({ROWS, family.door} & set(layer.sites))


def _mixes(erasure: Erasure, layer: LayerSpec, width: int | None) -> bool:
    if layer.kind == "gated_map":  # a probe sees whole rows
        return True
    tensors = erasure.layer_tensors(layer)
    if layer.kind == "text_map":
        return layer.sites[0] == ROWS and (_spans(tensors["A"], width) or _spans(tensors["D"], width))
    factors = layer_kind(layer.kind).lora(layer, tensors) or {}
    return any(_spans(a, width) for site, (a, _) in factors.items() if site.endswith(_READERS))


def _spans(rows: torch.Tensor, width: int | None) -> bool:
    """Whether a row has values in both halves; where the first half's width is not known, whether all rows share columns."""
    if width is None:
        return len(blocks(rows)) < 2
    first, second = (rows[:, :width] != 0).any(1), (rows[:, width:] != 0).any(1)
    return bool((first & second).any())


def refuse(pipe: Any, names: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Refuse a call of `encode_prompt` that gives the encoders different prompts, where erasures need one.

    Args:
        pipe: the pipeline.
        names (sequence of `str`): the erasures, as [`acting_together`] gives them.
        arguments (`dict`): those of the call, by name.

    Raises:
        ErasureInactiveError: it does.
    """
    # Without classifier-free guidance no negative prompt is encoded.
    looked = ("prompt", "negative_prompt") if arguments.get("do_classifier_free_guidance", True) else ("prompt",)
    other = [name for name in looked if names and _differs(pipe, arguments, name)]
    if other:
        raise ErasureInactiveError(
            f"`{other[0]}_2` is another text than `{other[0]}`, so the halves of each text row are of two prompts. The erasures "
            f"{list(names)} were made for rows of one prompt, both halves together, and may not act on such rows. Leave "
            f"`{other[0]}_2` out; or make the erasure again by a method that maps each encoder's half by itself "
            '(`erase(..., method="uce")`, `"rece"`, `"speed"`, `"dp"` or `"oce"` do, `per_encoder=True`).'
        )


def _differs(pipe: Any, arguments: Mapping[str, Any], name: str) -> bool:
    first, second = arguments.get(name), arguments.get(f"{name}_2")
    if not second or arguments.get(f"{name}_embeds") is not None:
        return False
    if first is None:
        if name == "prompt" or getattr(pipe.config, "force_zeros_for_empty_prompt", False):
            return False  # then nothing is encoded
        first = ""
    one, other = ([each] if isinstance(each, str) else list(each) for each in (first, second))
    length = max(len(one), len(other))
    one, other = (each * length if len(each) == 1 else each for each in (one, other))
    return one != other
