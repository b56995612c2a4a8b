"""Base models: which family a pipeline belongs to, how its prompts become rows, and how it is recognised again."""

import base64
import hashlib
import json
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from . import compat
from .errors import ErasureCompatibilityError, ErasureInputError
from .logging import get_logger
from .originals import originals
from .schema import BaseModel, Component


logger = get_logger(__name__)

SAMPLES = 4096
Match = Literal["same", "different weights", "unverified"]
_READS_THE_SAMPLE = ("conv_in.weight", "x_embedder.weight")  # of UNets and of Flux: [width, input channels, ...]
_INPUT_CHANNELS = (*range(1, 65), 96, 128, 192, 256, 320, 384)  # UNets: 4 to 16; Flux, by patches of four: 64 to 384


@dataclass(frozen=True)
class Family:
    """A family of base models.

    Attributes:
        name: as it stands in an erasure's config.
        denoiser: the pipeline's attribute that holds the UNet or transformer.
        text_encoders: the attributes that hold text encoders.
        tokenizers: the attributes that hold their tokenizers.
    """

    name: str
    denoiser: str
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]


_SD = Family("stable-diffusion", "unet", ("text_encoder",), ("tokenizer",))
_SDXL = Family("stable-diffusion-xl", "unet", ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2"))
_SD3 = Family(
    "stable-diffusion-3",
    "transformer",
    ("text_encoder", "text_encoder_2", "text_encoder_3"),
    ("tokenizer", "tokenizer_2", "tokenizer_3"),
)
_FLUX = Family("flux", "transformer", ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2"))
FAMILIES = {family.name: family for family in (_SD, _SDXL, _SD3, _FLUX)}
# Denoisers by class, with the families that they may belong to.
DENOISERS = {
    "UNet2DConditionModel": (_SD, _SDXL),
    "SD3Transformer2DModel": (_SD3,),
    "FluxTransformer2DModel": (_FLUX,),
}


def component(pipe: Any, name: str) -> Any:
    """Return a component of a pipeline, taken out of `torch.compile`; `None` where it is missing or not loaded."""
    value = getattr(pipe, name, None)
    return compat.unwrap_compiled(value) if isinstance(value, nn.Module) else value


def denoiser_name(pipe: Any) -> str:
    """Name of the component that denoises: `"unet"` or `"transformer"`.

    Raises:
        ErasureCompatibilityError: the pipeline has neither, or it is not loaded.
    """
    for name in ("unet", "transformer"):
        if isinstance(component(pipe, name), nn.Module):
            return name
    raise ErasureCompatibilityError(
        f"{type(pipe).__name__} has no `unet` and no `transformer` loaded; load the pipeline's components first."
    )


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline, told by the class of its denoiser.

    Raises:
        ErasureCompatibilityError: no family of this library fits.
    """
    name = denoiser_name(pipe)
    model = component(pipe, name)
    kind = type(model).__name__
    if kind not in DENOISERS:
        raise ErasureCompatibilityError(
            f"{kind} belongs to no known family of base models; known are Stable Diffusion 1.x, 2.x, XL, 3 and Flux."
        )
    families = DENOISERS[kind]
    if len(families) == 1:
        return families[0]
    return _SDXL if model.config.get("addition_embed_type") == "text_time" else _SD


def _sampled_rows(owner: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    # Textual inversion appends rows to the token embedding, so only its first rows identify the model.
    return tensor[:256] if isinstance(owner, nn.Embedding) else tensor


def _shape(owner: nn.Module, name: str, parameter: torch.Tensor) -> list[int | str]:
    if isinstance(owner, nn.Embedding):
        return ["*", parameter.shape[1]]
    if name == "weight" and isinstance(owner, nn.Linear):  # a quantised weight is packed
        return [owner.out_features, owner.in_features]
    return list(parameter.shape)


@dataclass(frozen=True)
class Sample:
    """Values spread evenly over one parameter; NaN where they cannot be read."""

    owner: nn.Module
    name: str
    positions: list[int]
    values: torch.Tensor
    dtype: torch.dtype


def _flat(owner: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    """The values of a parameter that are sampled, in a row; `None` where they cannot be read."""
    tensor: torch.Tensor | None = parameter.detach()
    if parameter.device.type == "meta":
        tensor = compat.offloaded_tensor(owner, name)
    packed = type(parameter) is not nn.Parameter or not parameter.dtype.is_floating_point
    if tensor is None or (packed and parameter.device.type != "meta"):
        return None
    return _sampled_rows(owner, tensor).reshape(-1)


def _picked(flats: Sequence[torch.Tensor], count: int) -> list[tuple[list[int], torch.Tensor]]:
    """Positions spread evenly over each of several vectors, and the values there, float32 on the CPU."""
    # Plain numbers: for a handful of samples they are faster than four tensor operations.
    positions = [[(2 * i + 1) * flat.numel() // (2 * count) for i in range(count)] for flat in flats]
    devices = dict.fromkeys(flat.device for flat in flats)  # each is given its positions in one copy
    places = {
        device: iter(
            torch.tensor(
                [p for flat, own in zip(flats, positions, strict=True) if flat.device == device for p in own],
                device=device,
            ).split(count)
        )
        for device in devices
    }
    values = []
    for flat in flats:
        readable = flat.float() if flat.dtype.itemsize < 2 else flat  # float8 has no indexing
        values.append(readable.index_select(0, next(places[flat.device])).to(torch.float32))
    return list(zip(positions, read_together(values), strict=True))


def read_together(vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Vectors of one dtype on the CPU. Each read waits for an accelerator, so it is one for all that lie on the same one."""
    found: dict[int, torch.Tensor] = {}
    for device in dict.fromkeys(vector.device for vector in vectors):
        own = [i for i, vector in enumerate(vectors) if vector.device == device]
        joined = torch.cat([vectors[i] for i in own]).cpu()
        found.update(zip(own, joined.split([len(vectors[i]) for i in own]), strict=True))
    return [found[i] for i in range(len(vectors))]


def sampled_values(model: nn.Module, *, as_fused: bool = False) -> list[Sample]:
    """The values that identify a model, in the order of its parameters' names.

    Args:
        model (`nn.Module`): the model.
        as_fused (`bool`, *optional*, defaults to `False`): read the weights into which this library has fused erasures as
            they are; otherwise their originals are read.
    """
    parameters = sorted(compat.base_parameters(model), key=lambda item: item[0])
    count = max(1, SAMPLES // max(1, len(parameters)))
    before = {} if as_fused else originals(compat.unwrap_compiled(model))
    chosen, flats = parameters[:: max(1, len(parameters) // SAMPLES)], []
    for _, owner, local, tensor in chosen:
        if (owner, local) in before:
            tensor = nn.Parameter(before[owner, local], requires_grad=False)
        flats.append(_flat(owner, local, tensor))
    picked = iter(_picked([flat for flat in flats if flat is not None], count))
    return [
        Sample(owner, local, [], torch.full((count,), torch.nan), torch.float32)
        if flat is None
        else Sample(owner, local, *next(picked), flat.dtype)
        for (_, owner, local, _), flat in zip(chosen, flats, strict=True)
    ]


def _shapes(model: nn.Module) -> list[tuple[str, list[int | str]]]:
    """Names and shapes of a model's parameters, in the order of their names."""
    parameters = sorted(compat.base_parameters(model), key=lambda item: item[0])
    return [(name, _shape(owner, local, tensor)) for name, owner, local, tensor in parameters]


def _architecture(model: nn.Module, shapes: list[tuple[str, list[int | str]]]) -> str:
    lines = [type(model).__name__, *(f"{name} {shape}" for name, shape in shapes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _has_other_input_channels(model: nn.Module, architecture: str) -> bool:
    """Whether a model is of an architecture but for the channels that its first layer reads: inpainting, depth, edits."""
    shapes = _shapes(model)
    for shape in (shape for name, shape in shapes if name in _READS_THE_SAMPLE):
        for shape[1] in _INPUT_CHANNELS:
            if _architecture(model, shapes) == architecture:
                return True
    return False


def _read(model: nn.Module, *, as_fused: bool = False) -> tuple[str, np.ndarray, list[torch.dtype]]:
    """Architecture hash, sampled values [n] and their dtypes."""
    architecture = _architecture(model, _shapes(model))
    samples = sampled_values(model, as_fused=as_fused)
    dtypes = [sample.dtype for sample in samples for _ in sample.values]
    joined = torch.cat([sample.values for sample in samples]) if samples else torch.zeros(0)
    return architecture, joined.numpy(), dtypes


def _coarsest(dtypes: list[torch.dtype]) -> torch.dtype:
    return max(set(dtypes), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def describe_model(model: nn.Module, *, as_fused: bool = False) -> Component:
    """Fingerprint a model: about 4,096 values, evenly over its parameters, and a hash of their names and shapes."""
    architecture, values, dtypes = _read(model, as_fused=as_fused)
    return Component(
        class_name=type(model).__name__,
        architecture=architecture,
        dtype=str(_coarsest(dtypes)).removeprefix("torch."),
        values=base64.b64encode(values.astype("<f4").tobytes()).decode(),
    )


# Sizes and hashes of vocabularies that were read: reading one takes longer than all the rest of loading an erasure.
_vocabularies: weakref.WeakKeyDictionary[Any, tuple[int | None, str]] = weakref.WeakKeyDictionary()


def describe_tokenizer(tokenizer: Any) -> Component:
    """Fingerprint a tokenizer: a hash of its vocabulary, without added tokens (textual inversion adds some)."""
    size, digest = _vocabularies.get(tokenizer, (None, ""))
    if size != tokenizer.vocab_size:
        vocabulary = tokenizer.get_vocab()
        tokens = sorted(vocabulary.keys() - tokenizer.get_added_vocab().keys())
        indices = [vocabulary[token] for token in tokens]
        digest = hashlib.sha256(json.dumps([tokens, indices]).encode()).hexdigest()  # faster than a list of pairs
        _vocabularies[tokenizer] = tokenizer.vocab_size, digest
    return Component(class_name=type(tokenizer).__name__.removesuffix("Fast"), architecture=digest)


def _text_components(pipe: Any, family: Family) -> Iterator[tuple[str, Any]]:
    for name in (*family.text_encoders, *family.tokenizers):
        value = component(pipe, name)
        if value is not None:
            yield name, value


def _repo_and_revision(pipe: Any, denoiser: Any) -> tuple[str | None, str | None]:
    """Repository id and commit, as far as the pipeline remembers them; a local path is no repository."""
    name = compat.name_or_path(pipe)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not os.path.isdir(name)
    repo = name if named else None
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})", compat.name_or_path(denoiser))
    return repo, commit[1] if repo and commit else None


def describe_base(pipe: Any) -> BaseModel:
    """Identify the base model of a pipeline.

    Returns:
        [`BaseModel`]: family, repository and revision where known, and a fingerprint of the denoiser, of each text
        encoder and of each tokenizer that is loaded.
    """
    family = family_of(pipe)
    denoiser = component(pipe, family.denoiser)
    repo, revision = _repo_and_revision(pipe, denoiser)
    components = {family.denoiser: describe_model(denoiser)}
    for name, value in _text_components(pipe, family):
        components[name] = describe_model(value) if isinstance(value, nn.Module) else describe_tokenizer(value)
    return BaseModel(family=family.name, repo=repo, revision=revision, components=components)


def _effective(values: np.ndarray, dtypes: list[torch.dtype]) -> list[torch.dtype]:
    """`dtypes`, or the one to which the values were rounded before they were stored wider (an fp16 file read as fp32)."""
    tensor = torch.from_numpy(values[~np.isnan(values)].copy())
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(torch.float32), tensor):
            return [max(dtype, live, key=lambda each: torch.finfo(each).eps) for live in dtypes]
    return dtypes


def stored_values(stored: Component) -> np.ndarray:
    """The values of a recorded fingerprint [n]; none for a tokenizer."""
    return np.frombuffer(base64.b64decode(stored.values or "", validate=True), "<f4")


def _match_values(stored: Component, values: np.ndarray, dtypes: list[torch.dtype]) -> Match:
    """Compare sampled values within the rounding of the coarser dtype."""
    if stored.values is None or stored.dtype is None:
        return "unverified"
    dtype = getattr(torch, stored.dtype)  # the schema knows only names of floating point dtypes
    reference = stored_values(stored)
    if reference.shape != values.shape or np.isinf(reference).any():  # infinity would be close to everything
        return "unverified"
    readable = ~np.isnan(values) & ~np.isnan(reference)
    if not readable.any():
        return "unverified"
    # Each side is off by at most half an ulp of its dtype; below the normal range ulps are absolute.
    infos = [torch.finfo(live) for live in _effective(values, dtypes)]
    own = torch.finfo(_effective(reference, [dtype])[0])
    relative = np.array([info.eps + own.eps for info in infos])
    absolute = np.array([info.tiny * info.eps + own.tiny * own.eps for info in infos])
    scale = np.maximum(np.abs(values), np.abs(reference)).astype(np.float64)
    difference = np.abs(values.astype(np.float64) - reference)
    close = difference[readable] <= (relative * scale + absolute)[readable]
    return "same" if bool(close.all()) else "different weights"


def compare_component(name: str, stored: Component, live: Any) -> Match:
    """Compare one component with what an erasure recorded of it; other input channels are other weights.

    Raises:
        ErasureCompatibilityError: the architecture (or the tokenizer's vocabulary) is another one.
    """
    if not isinstance(live, nn.Module):
        if describe_tokenizer(live).architecture != stored.architecture:
            raise ErasureCompatibilityError(
                f"The pipeline's {name} ({type(live).__name__}) has another vocabulary than the one that the erasure "
                f"was made with ({stored.class_name})."
            )
        return "same"
    architecture, values, dtypes = _read(live)
    if architecture != stored.architecture and _has_other_input_channels(live, stored.architecture):
        return "different weights"
    if architecture != stored.architecture:
        raise ErasureCompatibilityError(
            f"The pipeline's {name} ({type(live).__name__}) has another architecture than the one that the erasure "
            f"was made for ({stored.class_name}): names or shapes of its parameters differ."
        )
    return _match_values(stored, values, dtypes)


def same_component(one: Component, other: Component) -> Match | Literal["different architecture"]:
    """Compare what two erasures recorded of a component."""
    if one.architecture != other.architecture:
        return "different architecture"
    if one.values is None or other.values is None or other.dtype is None:
        return "same" if one.values is other.values else "unverified"
    values = stored_values(other)
    return _match_values(one, values, [getattr(torch, other.dtype)] * len(values))


def compare_base(base: BaseModel, pipe: Any, *, needed: set[str], derived_from: set[str]) -> dict[str, Match]:
    """Compare a pipeline with the base model of an erasure.

    Args:
        base ([`BaseModel`]): what the erasure recorded.
        pipe: the pipeline.
        needed (`set` of `str`): components on which the erasure acts.
        derived_from (`set` of `str`): components from whose weights the erasure was computed.

    Returns:
        `dict`: for each recorded component `"same"`, `"different weights"` or `"unverified"` (not loaded, or quantised).

    Raises:
        ErasureCompatibilityError: another family, another architecture, a missing component that is acted on, or a
            component with other weights from which the erasure was derived.
    """
    missing = sorted(name for name in needed if not isinstance(component(pipe, name), nn.Module))
    if missing:
        raise ErasureCompatibilityError(
            f"The erasure acts on {missing}, but this pipeline has no such component loaded. Load it, for example with "
            f"`from_pretrained(..., {missing[0]}=...)`."
        )
    if not base.components:
        return {}
    family = family_of(pipe)
    if base.family != family.name:
        raise ErasureCompatibilityError(
            f"The erasure was made for {base.family} ({base.repo or 'a local model'}), this pipeline is {family.name}."
        )
    result: dict[str, Match] = {}
    for name, stored in base.components.items():
        live = component(pipe, name)
        if live is None:
            result[name] = "unverified"
            continue
        try:
            result[name] = compare_component(name, stored, live)
        except ErasureCompatibilityError:
            if name not in needed | derived_from:
                result[name] = "different weights"
                continue
            raise
        if result[name] == "different weights" and name in derived_from:
            raise ErasureCompatibilityError(
                f"The pipeline's {name} has other weights than the one from which the erasure was derived "
                f"({base.repo or base.family}); its text rows differ, so the concept would not be erased. "
                "Use the original text encoder, or make the erasure again for this base model."
            )
    return result


def plain_weight(module: nn.Linear, name: str) -> torch.Tensor:
    """Return a layer's weight for fitting, in float64 on the CPU.

    Raises:
        ErasureInputError: the weight cannot be read or dequantised, or is not finite.
    """
    return _exact(readable_weight(module, name), name)


def weight_times(module: nn.Linear, name: str, right: torch.Tensor) -> torch.Tensor:
    """Return `plain_weight(module, name) @ right`, block by block so that the float64 copies stay in the CPU's cache.

    Raises:
        ErasureInputError: the weight cannot be read or dequantised, or is not finite.
    """
    blocks = readable_weight(module, name).cpu().split(128)
    return torch.cat([_exact(block, name) @ right for block in blocks])


def _exact(weight: torch.Tensor, name: str) -> torch.Tensor:
    result = weight.to("cpu", torch.float64)
    least, largest = torch.aminmax(result)  # NaN where any value is; faster than `isfinite(result).all()`
    if not bool(torch.isfinite(least) & torch.isfinite(largest)):
        raise ErasureInputError(f"The weight of {name!r} has values that are not finite; the base model is damaged.")
    return result


def readable_weight(module: nn.Linear, name: str) -> torch.Tensor:
    """Return a layer's weight as it is stored, dequantised where it is packed.

    Raises:
        ErasureInputError: the weight cannot be read or dequantised.
    """
    weight: torch.Tensor | None = compat.own_parameter(module, "weight")
    if weight is not None and weight.device.type == "meta":
        stored = compat.offloaded_tensor(module, "weight")
        weight = None if stored is None else nn.Parameter(stored, requires_grad=False)
    if weight is not None and (type(weight) is not nn.Parameter or not weight.dtype.is_floating_point):
        weight = compat.dequantized_weight(module)
    if weight is None or tuple(weight.shape) != (module.out_features, module.in_features):
        raise ErasureInputError(
            f"The weight of {name!r} cannot be read or dequantised; fit on a base model in float32, float16 or bfloat16."
        )
    return weight.detach()


def text_readers(pipe: Any) -> dict[str, nn.Linear]:
    """Return the Linears of a pipeline's UNet that read the text rows. See [`readers_of_text`]."""
    return readers_of_text(component(pipe, denoiser_name(pipe)))


def text_attentions(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the cross-attentions of a UNet, by name; those of motion modules have the name and read no text."""
    for name, module in unet.named_modules():
        if name.endswith(".attn2") and not name.startswith("erasure_modules"):
            if getattr(module, "is_cross_attention", True):
                yield name, module


def readers_of_text(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linears of a UNet that read the text rows: each cross-attention's `to_k` and `to_v`, in model order.

    Raises:
        ErasureCompatibilityError: the denoiser has none, or its attention projections are fused.
    """
    readers: dict[str, nn.Linear] = {}
    for name, module in text_attentions(unet):
        if compat.has_fused_projections(module):
            raise ErasureCompatibilityError(
                f"The attention projections of {name!r} are fused; call `pipe.unfuse_qkv_projections()` first."
            )
        for part in ("to_k", "to_v"):
            linear = compat.base_layer(module.get_submodule(part))
            if isinstance(linear, nn.Linear):
                readers[f"{name}.{part}"] = linear
    if not readers:
        raise ErasureCompatibilityError(f"{type(unet).__name__} has no cross-attention that reads text rows.")
    return readers


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield names and values of all parameters of a model; `None` for one that is quantised or offloaded to a disk."""
    for name, owner, local, parameter in sorted(compat.base_parameters(model), key=lambda item: item[0]):
        tensor = compat.offloaded_tensor(owner, local) if parameter.device.type == "meta" else parameter.detach()
        packed = type(parameter) is not nn.Parameter or not parameter.dtype.is_floating_point
        yield name, None if packed else tensor
