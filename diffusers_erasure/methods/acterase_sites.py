"""Where ActErase observes and patches: the last Linears of feed-forwards and attentions."""

from typing import TYPE_CHECKING

from torch import nn

from .. import compat
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..families import DENOISERS
from ..layers.activation import ATTENTIONS, FEED_FORWARD, JOINT_ATTENTIONS, JOINT_FEED_FORWARDS, is_single
from ..layers.sites import find_site


if TYPE_CHECKING:
    from .acterase import Settings

SITES = {
    "ff": (FEED_FORWARD,),
    "attn1": ATTENTIONS[:1],
    "attn2": ATTENTIONS[1:],
    "attn": ATTENTIONS,
    "ff+attn2": (FEED_FORWARD, *ATTENTIONS[1:]),
    "all": (FEED_FORWARD, *ATTENTIONS),
}
# In transformers text and image attend together, so there are no two sorts of attention.
JOINT_SITES = {
    "ff": JOINT_FEED_FORWARDS,
    "attn": JOINT_ATTENTIONS,
    "all": (*JOINT_FEED_FORWARDS, *JOINT_ATTENTIONS),
}
BLOCKS = {"all": "", "up": "up_blocks.", "mid": "mid_block.", "down": "down_blocks."}
# FLUX.1 has blocks of two streams, and then of one.
STREAMS = {"all": "", "double": "transformer_blocks.", "single": "single_transformer_blocks."}


def find_sites(model: nn.Module, settings: "Settings") -> dict[str, nn.Linear]:
    """The Linears whose input is patched, by name, in model order.

    Raises:
        ErasureInputError: the settings name what there is in other denoisers alone.
        ErasureCompatibilityError: there are none, or a feed-forward is built in another way.
    """
    family = DENOISERS[type(compat.unwrap_compiled(model)).__name__][0]
    joint = family.denoiser != "unet"
    names = [name for name, _ in model.named_modules()]
    sites = JOINT_SITES if joint else SITES
    blocks = (STREAMS if any(map(is_single, names)) else {"all": ""}) if joint else BLOCKS
    if settings.sites not in sites or settings.blocks not in blocks:
        raise ErasureInputError(
            f"`sites={settings.sites!r}` and `blocks={settings.blocks!r}` are not both parts of this denoiser. For {family.title} "
            f"`sites` may be {', '.join(map(repr, sites))}, and `blocks` {', '.join(map(repr, blocks))}."
        )
    endings, start = sites[settings.sites], blocks[settings.blocks]
    found: dict[str, nn.Linear] = {}
    for name in names:
        if name.startswith(start) and (f".{name}".endswith(endings) or (joint and is_single(name))):
            module = find_site(model, name)
            if not isinstance(module, nn.Linear):
                raise ErasureCompatibilityError(f"{name!r} is a {type(module).__name__}; expected a Linear.")
            found[name] = module
    if not found:
        raise ErasureCompatibilityError(
            f"{type(model).__name__} has none of the sites {settings.sites!r} in its blocks {settings.blocks!r}."
        )
    return found
