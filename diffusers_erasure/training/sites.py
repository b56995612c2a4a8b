"""Train sets: on which Linears and convolutions of a denoiser a LoRA is trained."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .. import compat
from ..base_model import component, door_readers, family_of
from ..errors import ErasureCompatibilityError, ErasureInputError


# Not trained by ESD-u: what embeds the timestep (and SDXL's sizes) and the last convolution, which serve every prompt.
_NEVER_U = ("time_embedding", "add_embedding", "conv_out")
# The blocks in which text and image have projections of their own; in FLUX's single blocks they share them. `attn2` of SD3.5
# medium sees the image alone.
_DUAL = "transformer_blocks."
_QUERIES_AND_KEYS = (".attn.add_q_proj", ".attn.add_k_proj", ".attn.to_q", ".attn.to_k")
_OF_TEXT = (".attn2.to_k", ".attn2.to_v")


def _dual(name: str) -> bool:
    return name.startswith(_DUAL) and ".attn." in name


# What a set is, in a UNet and in a transformer that reads text and image together; `None` where there is no such thing. The first
# are names of ESD's paper and code; each rule reads a module's name.
Rule = tuple[str, Callable[[str], bool]]
TRAIN_SETS: dict[str, tuple[Rule | None, Rule | None]] = {
    "x": (
        ("cross-attention", lambda name: ".attn2." in name),
        ("what text enters by, and attention of text and image where they have projections of their own", _dual),
    ),
    "x-strict": (
        ("keys and values of cross-attention", lambda name: name.endswith(_OF_TEXT)),
        ("keys and values of text", lambda name: _dual(name) and name.endswith((".add_k_proj", ".add_v_proj"))),
    ),
    "doors": (
        ("what text enters by: keys and values of cross-attention", lambda name: name.endswith(_OF_TEXT)),
        ("what text enters by: the Linears that rows and pooled vector pass first", lambda name: False),
    ),
    "u": (
        (
            "all but cross-attention, time embedding and last convolution (noxattn)",
            lambda name: ".attn2." not in name and name.partition(".")[0] not in _NEVER_U,
        ),
        ("blocks without those attentions", lambda name: "transformer_blocks." in name and not _dual(name)),
    ),
    "selfattn": (("self-attention", lambda name: ".attn1." in name), None),
    "full": (("every Linear and convolution", lambda name: True),) * 2,
    "qk_dual": (
        None,
        ("queries and keys of text and image (GEM)", lambda name: _dual(name) and name.endswith(_QUERIES_AND_KEYS)),
    ),
    "text_kq": (
        None,
        (
            "queries and keys of text (EraseAnything)",
            lambda name: _dual(name) and name.endswith((".add_q_proj", ".add_k_proj")),
        ),
    ),
}
# Of a transformer's, those that the doors belong to too: what attention alone is trained on, the pooled vector still tells.
WITH_DOORS = ("x", "doors")
SAME = {"xattn": "x", "noxattn": "u", "all": "full", "esd-x": "x", "esd-x-strict": "x-strict", "esd-u": "u"}


def train_set_name(train_set: str | Sequence[str]) -> str | tuple[str, ...]:
    """The set by this library's name, or endings of module names.

    Raises:
        ErasureInputError: there is no such set, or an ending is empty.
    """
    if isinstance(train_set, str):
        name = SAME.get(train_set, train_set)
        if name not in TRAIN_SETS:
            raise ErasureInputError(
                f"There is no train set {train_set!r}; sets are {sorted(TRAIN_SETS)}, or give endings of module names, "
                "such as ('attn2.to_v',)."
            )
        return name
    endings = tuple(train_set)
    if not endings or not all(isinstance(ending, str) and ending.strip(".") for ending in endings):
        raise ErasureInputError(f"`train_set` must be a name or a list of endings of module names, not {train_set!r}.")
    return endings


def find_sites(pipe: Any, train_set: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a train set by name, in model order.

    Raises:
        ErasureInputError: this kind of denoiser has no such set.
        ErasureCompatibilityError: the base's attention projections are fused, or no module matches.
    """
    wanted = train_set_name(train_set)
    denoiser = family_of(pipe).denoiser
    rule = TRAIN_SETS[wanted][denoiser != "unet"] if isinstance(wanted, str) else None
    if isinstance(wanted, str) and rule is None:
        there = [name for name, rules in TRAIN_SETS.items() if rules[denoiser != "unet"] is not None]
        raise ErasureInputError(f"There is no train set {wanted!r} for a {denoiser}; it has {there}.")
    model = component(pipe, denoiser)
    doors: set[str] = set()
    if wanted in WITH_DOORS and denoiser != "unet":
        doors = {name for readers in door_readers(model).values() for name in readers}
    sites: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if compat.has_fused_projections(module):
            raise ErasureCompatibilityError(
                f"The attention projections of {name!r} are fused; call `pipe.unfuse_qkv_projections()` first."
            )
        if not isinstance(module, nn.Linear | nn.Conv2d) or "erasure_modules" in name:
            continue
        if rule is not None:
            matches = rule[1](name) or name in doors
        else:
            matches = any(name == ending or name.endswith("." + ending.lstrip(".")) for ending in wanted)
        if matches:
            sites[name] = module
    if not sites:
        example = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        example = example if denoiser == "unet" else "transformer_blocks.0.attn.add_k_proj"
        raise ErasureCompatibilityError(
            f"No Linear or convolution of this pipeline's {type(model).__name__} is in the train set {train_set!r}; its "
            f"modules are named like {example!r}."
        )
    return sites


def check_rank(sites: dict[str, nn.Module], rank: int) -> None:
    """A LoRA of a rank above a layer's own says nothing more than one of that rank, and is larger than the layer.

    Raises:
        ErasureInputError: it is.
    """
    for name, module in sites.items():
        if isinstance(module, nn.Conv2d):
            largest = min(module.out_channels, module.in_channels * module.kernel_size[0] * module.kernel_size[1])
        else:
            assert isinstance(module, nn.Linear)
            largest = min(module.out_features, module.in_features)
        if rank > largest:
            raise ErasureInputError(
                f"`rank` is {rank}, but {name!r} has a matrix of rank {largest}; use at most {largest}, or a train set "
                "without that layer."
            )
