"""The names that kohya's scripts and ComfyUI give the modules of FLUX.1 and Stable Diffusion 3.

They are those of the original code, with `_` for dots, where a block's query, key and value are one matrix, and in FLUX.1's
single blocks the first matrix of the feed-forward too. Read and written by the same table.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import ErasureFileError, ErasureInputError
from ..low_rank import DOWN, UP, Factors


PREFIX = "lora_unet_"
_EMBEDDERS = (("linear_1", "in_layer"), ("linear_2", "out_layer"))
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class Names:
    """Modules of one family.

    Attributes:
        blocks: by diffusers' name of the list of blocks the original one.
        whole: within a block, or outside of all, by diffusers' name the original one.
        fused: within a list of blocks, by the original name the parts of diffusers, in order, each with its height over the width.
    """

    blocks: Mapping[str, str]
    whole: Mapping[str, Mapping[str, str]]
    fused: Mapping[str, Mapping[str, tuple[tuple[str, int], ...]]]


def _parts(prefix: str, names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((f"{prefix}.{name}", 1) for name in names)


NAMES = {
    "flux": Names(
        {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"},
        {
            "transformer_blocks": {
                "attn.to_out.0": "img_attn_proj",
                "attn.to_add_out": "txt_attn_proj",
                "ff.net.0.proj": "img_mlp_0",
                "ff.net.2": "img_mlp_2",
                "ff_context.net.0.proj": "txt_mlp_0",
                "ff_context.net.2": "txt_mlp_2",
                "norm1.linear": "img_mod_lin",
                "norm1_context.linear": "txt_mod_lin",
            },
            "single_transformer_blocks": {"proj_out": "linear2", "norm.linear": "modulation_lin"},
            "": {
                "context_embedder": "txt_in",
                "x_embedder": "img_in",
                **{f"time_text_embed.timestep_embedder.{ours}": f"time_in_{name}" for ours, name in _EMBEDDERS},
                **{f"time_text_embed.text_embedder.{ours}": f"vector_in_{name}" for ours, name in _EMBEDDERS},
                **{f"time_text_embed.guidance_embedder.{ours}": f"guidance_in_{name}" for ours, name in _EMBEDDERS},
            },
        },
        {
            "transformer_blocks": {"img_attn_qkv": _parts("attn", _QKV), "txt_attn_qkv": _parts("attn", _ADDED)},
            "single_transformer_blocks": {"linear1": (*_parts("attn", _QKV), ("proj_mlp", 4))},
        },
    ),
    "stable-diffusion-3": Names(
        {"transformer_blocks": "joint_blocks"},
        {
            "transformer_blocks": {
                "attn.to_out.0": "x_block_attn_proj",
                "attn2.to_out.0": "x_block_attn2_proj",
                "attn.to_add_out": "context_block_attn_proj",
                "ff.net.0.proj": "x_block_mlp_fc1",
                "ff.net.2": "x_block_mlp_fc2",
                "ff_context.net.0.proj": "context_block_mlp_fc1",
                "ff_context.net.2": "context_block_mlp_fc2",
                "norm1.linear": "x_block_adaLN_modulation_1",
            },
            "": {
                "context_embedder": "context_embedder",
                **{f"time_text_embed.text_embedder.linear_{i + 1}": f"y_embedder_mlp_{2 * i}" for i in range(2)},
                **{f"time_text_embed.timestep_embedder.linear_{i + 1}": f"t_embedder_mlp_{2 * i}" for i in range(2)},
            },
        },
        {
            "transformer_blocks": {
                "x_block_attn_qkv": _parts("attn", _QKV),
                "x_block_attn2_qkv": _parts("attn2", _QKV),
                "context_block_attn_qkv": _parts("attn", _ADDED),
            }
        },
    ),
}


def fused_modules(factors: Mapping[str, Factors], family: str) -> dict[str, Factors]:
    """The factors of a transformer by kohya's names, those of one matrix joined: B A stays the same.

    Args:
        factors (`dict`): by diffusers' names.
        family (`str`): a key of `NAMES`.

    Raises:
        ErasureInputError: a module has no such name, or one that is a part of a matrix has other widths than it would.
    """
    names, found = NAMES[family], dict[str, Factors]()
    parts: dict[tuple[str, str], dict[str, Factors]] = {}
    for site, own in factors.items():
        blocks, place, rest = _split(site, names)
        if rest in names.whole.get(blocks, {}):
            found[place + names.whole[blocks][rest]] = own
            continue
        fused = next((name for name, of in names.fused.get(blocks, {}).items() if rest in dict(of)), None)
        if fused is None:
            raise ErasureInputError(
                f"kohya's files have no name for {site!r}. Stock diffusers and ComfyUI read the erasure's own LoRA file instead."
            )
        parts.setdefault((blocks, place + fused), {})[rest] = own
    for (blocks, name), given in parts.items():
        order = names.fused[blocks][name.removeprefix(_place_of(name, names))]
        found[name] = _joined(name, given, order)
    return found


def _joined(name: str, given: Mapping[str, Factors], order: tuple[tuple[str, int], ...]) -> Factors:
    """One matrix of its parts: `down` one below the other, each part's `up` in its own rows and columns."""
    width = next(iter(given.values()))[0].shape[1]
    rank = sum(len(down) for down, _ in given.values())
    downs, ups, first = [], [], 0
    for part, height in order:
        down, up = given.get(part, (torch.zeros(0, width), torch.zeros(height * width, 0)))
        if down.shape[1] != width or len(up) != height * width:
            raise ErasureInputError(
                f"{part!r} maps {down.shape[1]} to {len(up)}; as a part of {name!r} it would map {width} to {height * width}, so "
                "kohya's files cannot hold it."
            )
        downs.append(down)
        ups.append(torch.nn.functional.pad(up, (first, rank - first - up.shape[1])))
        first += len(down)
    return torch.cat(downs), torch.cat(ups)


def _split(site: str, names: Names) -> tuple[str, str, str]:
    """(list of blocks in diffusers, the place's prefix in kohya's names, what follows) of a diffusers name."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", site)
    if match is not None and match[1] in names.blocks:
        return match[1], f"{names.blocks[match[1]]}_{match[2]}_", match[3]
    return "", "", site


def _place_of(name: str, names: Names) -> str:
    match = re.match(rf"(?:{'|'.join(names.blocks.values())})_\d+_", name)
    return "" if match is None else match[0]


def by_component(state_dict: Mapping[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """What diffusers' `lora_state_dict` gave, with kohya's names of a transformer's modules turned into diffusers'.

    diffusers reads none of those of Stable Diffusion 3, and of FLUX.1 it gives modules outside of the blocks names without
    their component, which it then drops when it loads them.

    Raises:
        ErasureFileError: a name is none of the family's.
    """
    names = NAMES.get(family)
    if names is None:
        return dict(state_dict)
    outside = names.whole[""]
    found: dict[str, torch.Tensor] = {}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state_dict.items():
        module, _, part = key.partition(".")
        if module.startswith(PREFIX):
            modules.setdefault(module.removeprefix(PREFIX), {})[part] = value
        else:
            bare = key.removesuffix(DOWN).removesuffix(UP)
            found[f"transformer.{key}" if bare in outside else key] = value
    for module, tensors in modules.items():
        for site, (down, up) in _read(module, tensors, names).items():
            found[f"transformer.{site}{DOWN}"], found[f"transformer.{site}{UP}"] = down, up
    return found


def _read(module: str, tensors: Mapping[str, torch.Tensor], names: Names) -> dict[str, Factors]:
    """The factors of one of kohya's modules by diffusers' names, times alpha / rank."""
    down, up = tensors.get("lora_down.weight"), tensors.get("lora_up.weight")
    if down is None or up is None or set(tensors) - {"lora_down.weight", "lora_up.weight", "alpha"} or down.ndim != 2:
        raise ErasureFileError(
            f"{PREFIX}{module[:100]} has {sorted(tensors)[:4]}, which is no plain LoRA of a matrix."
        )
    if up.ndim != 2 or len(down) != up.shape[1] or not len(down):
        shapes = tuple(down.shape), tuple(up.shape)
        raise ErasureFileError(
            f"The factors of {PREFIX}{module[:100]} have shapes {shapes}, which are none of a LoRA."
        )
    up = up.float() * (float(tensors["alpha"]) / len(down) if "alpha" in tensors else 1.0)
    place = _place_of(module, names)
    original = place.rstrip("_").rpartition("_")
    blocks = next((ours for ours, theirs in names.blocks.items() if theirs == original[0]), "")
    prefix, rest = f"{blocks}.{original[2]}." if place else "", module.removeprefix(place)
    whole = next((ours for ours, theirs in names.whole.get(blocks, {}).items() if theirs == rest), None)
    if whole is not None:
        return {prefix + whole: (down, up)}
    order = names.fused.get(blocks, {}).get(rest)
    heights = [height * down.shape[1] for _, height in order or ()]
    if order is None or sum(heights) != len(up):
        raise ErasureFileError(f"{PREFIX}{module[:100]} is no module of this family, or has other widths.")
    return {
        prefix + part: _without_zeros(down, own)
        for (part, _), own in zip(order, up.split(heights), strict=True)
        if bool(own.any())
    }


def _without_zeros(down: torch.Tensor, up: torch.Tensor) -> Factors:
    """Without the ranks that another part of the matrix has for itself."""
    used = up.any(0)
    return down[used], up[:, used]


def common_rank(components: Iterable[Mapping[str, Factors]], *, joined: bool) -> int:
    """The rank to which all modules are padded.

    Where matrices were `joined` it is none at which diffusers would take them apart again by rank, which gives their parts less
    than others, and with it another scale.
    """
    rank = max(len(down) for factors in components for down, _ in factors.values())
    while joined and (rank % 3 == 0 or rank % 4 == 0):
        rank += 1
    return rank
