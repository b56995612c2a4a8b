"""For which family a file with nothing but module names and widths was made: as a guess, for what an error says."""

import re
from collections.abc import Mapping

from .doors import Family
from .table import FAMILIES


# Blocks of two streams by width: how many there are. Chroma has the names and widths of FLUX.1, and takes its files.
_JOINT = {3072: ("flux", 19), 1536: ("stable-diffusion-3", 24), 2432: ("stable-diffusion-3", 38)}
_CROSS = {768: "stable-diffusion", 1024: "stable-diffusion", 2048: "stable-diffusion-xl"}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.attn\.(?:to_[qkv]|add_[qkv]_proj)")
_SINGLE = re.compile(r"single_transformer_blocks\.\d+\.(?:attn\.to_[qkv]|proj_mlp)")


def recognised(component: str, widths: Mapping[str, int]) -> Family | None:
    """The family whose modules have these names and read these widths, or `None` where that does not tell.

    Args:
        component (`str`): `"unet"` or `"transformer"`.
        widths (`dict`): by module what it reads.
    """
    if component == "unet":
        found = {_CROSS.get(width) for name, width in widths.items() if name.endswith((".attn2.to_k", ".attn2.to_v"))}
    else:
        found = {_joint(name, width) for name, width in widths.items() if name.startswith("transformer_blocks.")}
        found |= {"flux" for name, width in widths.items() if _SINGLE.fullmatch(name) and width == 3072}
    found.discard(None)
    return FAMILIES[str(found.pop())] if len(found) == 1 else None


def _joint(name: str, width: int) -> str | None:
    block = _BLOCK.fullmatch(name)
    family, count = _JOINT.get(width, (None, 0))
    return family if block is not None and int(block[1]) < count else None
