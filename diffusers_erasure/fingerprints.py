"""Fingerprints: by what the weights of a model and the vocabulary of a tokenizer are recognised again."""

import base64
import hashlib
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from . import compat
from .errors import ErasureCompatibilityError
from .originals import originals
from .schema import Component


SAMPLES = 4096
Match = Literal["same", "different weights", "unverified"]
_READS_THE_SAMPLE = ("conv_in.weight", "x_embedder.weight")  # of UNets and of Flux: [width, input channels, ...]
_INPUT_CHANNELS = (*range(1, 65), 96, 128, 192, 256, 320, 384)  # UNets: 4 to 16; Flux, by patches of four: 64 to 384


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


Parameters = list[tuple[str, nn.Module, str, nn.Parameter]]


class StoredWeights(Protocol):
    """The weights of a model that lie in files."""

    def sample(self, wanted: Sequence[tuple[str, Sequence[int]]]) -> list[torch.Tensor | None]:
        """Values at places of flattened tensors, each by its name; `None` for one that cannot be read."""


_stored: weakref.WeakKeyDictionary[nn.Module, StoredWeights] = weakref.WeakKeyDictionary()


def keep_stored(model: nn.Module, weights: StoredWeights) -> None:
    """Have the values of a model without weights, all of it on the meta device, read from its files."""
    _stored[model] = weights


def _by_name(model: nn.Module) -> Parameters:
    return sorted(compat.base_parameters(model), key=lambda item: item[0])


def _readable(owner: nn.Module, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
    """What is sampled of a parameter, flattened; `None` where it cannot be read."""
    tensor: torch.Tensor | None = parameter.detach()
    if parameter.device.type == "meta":
        tensor = compat.offloaded_tensor(owner, name)
    packed = type(parameter) is not nn.Parameter or not parameter.dtype.is_floating_point
    if tensor is None or (packed and parameter.device.type != "meta"):
        return None
    return _sampled_rows(owner, tensor).reshape(-1)


def sampled_values(model: nn.Module, *, as_fused: bool = False) -> list[Sample]:
    """The values that identify a model, in the order of its parameters' names.

    Args:
        model (`nn.Module`): the model.
        as_fused (`bool`, *optional*, defaults to `False`): read the weights into which this library has fused erasures as
            they are; otherwise their originals are read.
    """
    return _sampled(model, _by_name(model), as_fused)


def _sampled(model: nn.Module, parameters: Parameters, as_fused: bool) -> list[Sample]:
    count = max(1, SAMPLES // max(1, len(parameters)))
    if model in _stored:
        return _from_files(_stored[model], parameters, count)
    before = {} if as_fused else originals(compat.unwrap_compiled(model))
    places: dict[tuple[int, torch.device], tuple[list[int], torch.Tensor]] = {}  # many parameters are of one size
    picked: list[tuple[nn.Module, str, list[int], torch.dtype]] = []
    values: list[torch.Tensor] = []
    for _, owner, local, parameter in _some(parameters):
        if (owner, local) in before:
            parameter = nn.Parameter(before[owner, local], requires_grad=False)
        flat = _readable(owner, local, parameter)
        if flat is None:
            picked.append((owner, local, [], torch.float32))
            values.append(torch.full((count,), torch.nan))
            continue
        size, device = flat.numel(), flat.device
        if (size, device) not in places:
            positions = _spread(size, count)
            places[size, device] = positions, torch.tensor(positions, device=device)
        positions, indices = places[size, device]
        picked.append((owner, local, positions, flat.dtype))
        flat = flat.float() if flat.dtype.itemsize < 2 else flat  # float8 has no indexing
        values.append(flat.index_select(0, indices))
    read = zip(picked, _on_the_cpu(values), strict=True)
    return [Sample(owner, local, where, row, dtype) for (owner, local, where, dtype), row in read]


def _some(parameters: Parameters) -> Parameters:
    """Those of which values are taken: all, but of very many."""
    return parameters[:: max(1, len(parameters) // SAMPLES)]


def _spread(size: int, count: int) -> list[int]:
    """Places of `count` values, evenly over `size`."""
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def _from_files(weights: StoredWeights, parameters: Parameters, count: int) -> list[Sample]:
    """The same values of a model that is not loaded."""
    chosen = _some(parameters)
    sizes = [_sampled_rows(owner, parameter).numel() for _, owner, _, parameter in chosen]
    places = [_spread(size, count) for size in sizes]
    found = weights.sample([(name, where) for (name, *_), where in zip(chosen, places, strict=True)])
    return [
        Sample(owner, local, [], torch.full((count,), torch.nan), torch.float32)
        if values is None
        else Sample(owner, local, where, values.float(), values.dtype)
        for (_, owner, local, _), where, values in zip(chosen, places, found, strict=True)
    ]


def _on_the_cpu(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one size in float32 on the CPU, brought there together: one by one, each would wait for a GPU."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, each in enumerate(values):
        alike.setdefault((each.device, each.dtype), []).append(index)
    brought = list(values)
    for indices in alike.values():
        rows = torch.stack([values[index] for index in indices]).to("cpu", torch.float32)
        for index, row in zip(indices, rows.unbind(), strict=True):
            brought[index] = row
    return brought


def _shapes(parameters: Parameters) -> list[tuple[str, list[int | str]]]:
    """Names and shapes of a model's parameters, in the order of their names."""
    return [(name, _shape(owner, local, tensor)) for name, owner, local, tensor in parameters]


def _architecture(model: nn.Module, shapes: list[tuple[str, list[int | str]]]) -> str:
    lines = [type(model).__name__, *(f"{name} {shape}" for name, shape in shapes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _has_other_input_channels(model: nn.Module, architecture: str) -> bool:
    """Whether a model is of an architecture but for the channels that its first layer reads: inpainting, depth, edits."""
    shapes = _shapes(_by_name(model))
    for shape in (shape for name, shape in shapes if name in _READS_THE_SAMPLE):
        for shape[1] in _INPUT_CHANNELS:
            if _architecture(model, shapes) == architecture:
                return True
    return False


def _read(model: nn.Module, *, as_fused: bool = False) -> tuple[str, np.ndarray, list[torch.dtype]]:
    """Architecture hash, sampled values [n] and their dtypes."""
    parameters = _by_name(model)
    architecture = _architecture(model, _shapes(parameters))
    samples = _sampled(model, parameters, as_fused)
    dtypes = [dtype for sample in samples for dtype in [sample.dtype] * len(sample.values)]
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


def _backend(tokenizer: Any) -> Any:
    """What the library `tokenizers` has of a tokenizer; `None` where that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if type(backend).__module__.startswith("tokenizers") else None


def _hidden(tokenizer: Any, backend: Any) -> list[str]:
    """The tokens of the vocabulary that are among the added ones, and so do not count."""
    model = backend.model
    return sorted(token for token in tokenizer.get_added_vocab() if model.token_to_id(token) is not None)


def _vocabulary(tokenizer: Any) -> str:
    tokens, ids = _in_order(tokenizer)
    joined = " ".join(tokens)
    if joined.count(" ") == len(tokens) - 1:
        written = json.dumps(joined).replace(" ", '", "')  # one string to escape, and not one for each token
    else:
        written = json.dumps(tokens)[1:-1]
    return hashlib.sha256(f"[[{written}], {json.dumps(ids)}]".encode()).hexdigest()


def _in_order(tokenizer: Any) -> tuple[list[str], list[int]]:
    """The vocabulary without added tokens, in the order of the tokens, and their ids."""
    backend = _backend(tokenizer)
    if backend is not None:  # in half the time: a list is made sooner than a dict, and its order is sorted sooner
        model, size = backend.model, backend.get_vocab_size(with_added_tokens=False)
        every = list(map(model.id_to_token, range(size)))
        if len({None, *every}) == size + 1:  # the ids have no gaps, and no token has two
            hidden = set(map(model.token_to_id, _hidden(tokenizer, backend)))
            ids = sorted([index for index in range(size) if index not in hidden], key=every.__getitem__)
            return [every[index] for index in ids], ids
    vocabulary = tokenizer.get_vocab()
    for token in tokenizer.get_added_vocab():
        vocabulary.pop(token, None)
    tokens = sorted(vocabulary)
    return tokens, [vocabulary[token] for token in tokens]


def _serialised(tokenizer: Any) -> str:
    """A hash of that from which `_vocabulary` follows, several times as fast: no token becomes an object. Empty where it cannot be."""
    backend = _backend(tokenizer)
    written = None if backend is None else backend.model.__getstate__()  # always the same bytes by one version
    if not isinstance(written, bytes):
        return ""
    return hashlib.sha256(written + json.dumps(_hidden(tokenizer, backend)).encode()).hexdigest()


# What was computed of a tokenizer, and what it was like then.
_computed: weakref.WeakKeyDictionary[Any, tuple[list[Any], dict[str, str]]] = weakref.WeakKeyDictionary()


def _once(tokenizer: Any, what: str, compute: Callable[[Any], str]) -> str:
    """`compute(tokenizer)`, again only where its vocabulary may be another one.

    A backend that was given another model tells by its size, and by 256 of its tokens.
    """
    backend = _backend(tokenizer)
    if backend is None:
        return compute(tokenizer)
    size = backend.get_vocab_size(with_added_tokens=False)
    tokens = [backend.id_to_token(index) for index in range(0, size, max(1, size // 256))]
    state = [backend, size, tokens, _hidden(tokenizer, backend)]
    known = _computed.get(tokenizer)
    if known is None or known[0] != state:
        known = _computed[tokenizer] = state, {}
    if what not in known[1]:
        known[1][what] = compute(tokenizer)
    return known[1][what]


def inner_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer within a processor of texts and pictures, which FLUX.2 has in its place; itself where it is none."""
    return tokenizer if hasattr(tokenizer, "get_vocab") else tokenizer.tokenizer


def describe_tokenizer(tokenizer: Any) -> Component:
    """Fingerprint a tokenizer: a hash of its vocabulary, without added tokens (textual inversion adds some)."""
    tokenizer = inner_tokenizer(tokenizer)
    return Component(
        class_name=type(tokenizer).__name__.removesuffix("Fast"),
        architecture=_once(tokenizer, "vocabulary", _vocabulary),
        serialised=_once(tokenizer, "serialised", _serialised) or None,
    )


def _effective(values: np.ndarray, dtypes: list[torch.dtype]) -> list[torch.dtype]:
    """`dtypes`, or the one to which the values were rounded before they were stored wider (an fp16 file read as fp32)."""
    tensor = torch.from_numpy(values[~np.isnan(values)].copy())
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(torch.float32), tensor):
            coarser = {live: max(dtype, live, key=lambda each: torch.finfo(each).eps) for live in set(dtypes)}
            return [coarser[live] for live in dtypes]
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
    lives = _effective(values, dtypes)
    infos = {live: torch.finfo(live) for live in set(lives)}
    own = torch.finfo(_effective(reference, [dtype])[0])
    relative = np.array([infos[live].eps for live in lives]) + own.eps
    absolute = np.array([infos[live].tiny * infos[live].eps for live in lives]) + own.tiny * own.eps
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
        live = inner_tokenizer(live)
        if stored.serialised is not None and stored.serialised == _once(live, "serialised", _serialised):
            return "same"
        # Of an older artefact, or written by another version of `tokenizers`.
        if _once(live, "vocabulary", _vocabulary) != stored.architecture:
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


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield names and values of all parameters of a model; `None` for one that is quantised or offloaded to a disk."""
    for name, owner, local, parameter in _by_name(model):
        tensor = compat.offloaded_tensor(owner, local) if parameter.device.type == "meta" else parameter.detach()
        packed = type(parameter) is not nn.Parameter or not parameter.dtype.is_floating_point
        yield name, None if packed else tensor


def checksum(weights: Iterable[tuple[str, torch.Tensor | None]]) -> str | None:
    """A checksum over the bits of some tensors, from the sums of every row and every column; `None` where one of them is."""
    digest, heads, sums = hashlib.sha256(), [], []
    for name, tensor in weights:
        if tensor is None:
            return None
        matrix = tensor.detach().reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1).contiguous()
        matrix = matrix if matrix.data_ptr() % 8 == 0 else matrix.clone()
        # Eight bytes at once where a row can be cut so; a hundred times faster than hashing the bytes themselves.
        bits = matrix.view(torch.uint8)
        bits = bits.view(torch.int64) if bits.shape[1] % 8 == 0 else bits
        heads.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sums += [bits.sum(dimension, dtype=torch.int64) for dimension in (0, 1)]
    read = [each.numpy().tobytes() for each in read_together(sums)]
    for head, columns, rows in zip(heads, read[::2], read[1::2], strict=True):
        digest.update(head + columns + rows)
    return digest.hexdigest()


def read_together(vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Vectors of one dtype on the CPU. Each read waits for an accelerator, so it is one for all that lie on the same one."""
    found: dict[int, torch.Tensor] = {}
    for device in dict.fromkeys(vector.device for vector in vectors):
        own = [i for i, vector in enumerate(vectors) if vector.device == device]
        joined = torch.cat([vectors[i] for i in own]).cpu()
        found.update(zip(own, joined.split([len(vectors[i]) for i in own]), strict=True))
    return [found[i] for i in range(len(vectors))]
