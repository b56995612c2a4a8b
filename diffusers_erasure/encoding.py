"""Text rows: what the text encoders of a base model make of prompts, as its pipeline would feed them to the denoiser."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from . import cache, compat
from .base_model import component, family_of
from .errors import ErasureCompatibilityError, ErasureInputError
from .fingerprints import checksum, describe_model, describe_tokenizer, named_weights


BATCH = 64  # prompts in one pass
PADDED_BATCH = 16  # of prompts with their padding: as fast, and a quarter of the memory
CACHED_FROM = 8  # shorter lists are encoded about as fast as they are read
# What a text encoder's configuration says of its rows beside the shapes of its weights.
BEHAVIOUR = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id", "use_attention_mask")


def _readers(pipe: Any) -> list[tuple[Any, Any]]:
    """The pipeline's (text encoder, tokenizer) pairs whose rows its cross-attention reads, side by side."""
    family = family_of(pipe)
    if family.name not in ("stable-diffusion", "stable-diffusion-xl"):
        raise ErasureCompatibilityError(
            f"Text rows can be fitted for Stable Diffusion 1.x, 2.x and XL; this pipeline is {family.name}."
        )
    pairs = [
        (component(pipe, encoder), component(pipe, tokenizer))
        for encoder, tokenizer in zip(family.text_encoders, family.tokenizers, strict=True)
    ]
    # A refiner has the second encoder alone.
    pairs = pairs[1:] if len(pairs) > 1 and pairs[0] == (None, None) else pairs
    if any(encoder is None or tokenizer is None for encoder, tokenizer in pairs):
        raise ErasureCompatibilityError(
            f"Fitting needs the pipeline's {' and '.join((*family.text_encoders, *family.tokenizers))}; load them."
        )
    for encoder, _ in pairs:
        _refuse_adapters(encoder)
    return pairs


def _refuse_adapters(encoder: nn.Module) -> None:
    adapters = compat.active_adapters(encoder)
    if adapters:
        raise ErasureInputError(
            f"The text encoder carries active LoRAs ({adapters}), but an erasure is fitted on the clean base model. "
            "Call `pipe.unload_lora_weights()` (or `pipe.disable_lora()`) first."
        )


def _limits(pipe: Any, length: int) -> list[tuple[Any, int]]:
    """The tokenizers that must read a prompt whole, and their most tokens.

    Of transformers this is the last text encoder's, T5's, for which `length` is the most; without it, those of the others: all of
    them are given what it is given, and cut it.
    """
    family = family_of(pipe)
    if family.denoiser == "unet":
        return [(tokenizer, tokenizer.model_max_length) for _, tokenizer in _readers(pipe)]
    names = zip(family.text_encoders, family.tokenizers, strict=True)
    pairs = [(component(pipe, encoder), component(pipe, tokenizer)) for encoder, tokenizer in names]
    loaded = [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None and tokenizer is not None]
    if not loaded:
        raise ErasureCompatibilityError(f"The pipeline has none of {', '.join(family.text_encoders)} loaded.")
    for encoder, _ in loaded:
        _refuse_adapters(encoder)
    last = loaded[-1][1]
    if last is not pairs[-1][1]:
        return [(tokenizer, tokenizer.model_max_length) for _, tokenizer in loaded]
    return [(last, min(length or last.model_max_length, last.model_max_length))]


def _as_fed(pipe: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts as the pipeline gives them to a tokenizer: a textual inversion of several vectors is written out."""
    added = tokenizer.get_added_vocab()
    if not any(f"{token}_1" in added for token in added) or not hasattr(pipe, "maybe_convert_prompt"):
        return list(prompts)
    return pipe.maybe_convert_prompt(list(prompts), tokenizer)


def token_ids(tokenizer: Any, prompts: Sequence[str], most: int | None = None) -> list[list[int]]:
    """Tokenise prompts with their special tokens, unpadded; at most `most`, by default as many as the tokenizer says.

    Raises:
        ErasureInputError: a prompt is longer than the encoder.
    """
    ids: list[list[int]] = tokenizer(list(prompts)).input_ids if prompts else []
    most = tokenizer.model_max_length if most is None else most
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > most:
            raise ErasureInputError(
                f"The prompt {prompt[:80]!r} has {len(row)} tokens; the text encoder takes {most}. Shorten it."
            )
    return ids


def check_prompts(pipe: Any, prompts: Sequence[str], length: int = 0) -> None:
    """See that a pipeline can encode prompts, whole; where T5 reads them, in `length` rows if that is given.

    Raises:
        ErasureInputError: a prompt is longer than an encoder reads, or a LoRA is active on one.
        ErasureCompatibilityError: another family, or a text encoder or tokenizer is missing.
    """
    for tokenizer, most in _limits(pipe, length):
        token_ids(tokenizer, _as_fed(pipe, tokenizer, prompts), most)


def short_enough(pipe: Any, prompts: Sequence[str], length: int = 0) -> list[str]:
    """Those of some prompts that a pipeline's text encoders read whole; see [`check_prompts`]."""
    long: set[str] = set()
    for tokenizer, most in _limits(pipe, length):
        rows = tokenizer(_as_fed(pipe, tokenizer, prompts)).input_ids if prompts else []
        long.update(prompt for prompt, row in zip(prompts, rows, strict=True) if len(row) > most)
    return [prompt for prompt in prompts if prompt not in long]


def part_widths(pipe: Any) -> tuple[int, ...]:
    """How wide each text encoder's part of a row is; of most families one encoder makes all of it.

    Raises:
        ErasureCompatibilityError, ErasureInputError: see [`check_prompts`].
    """
    return tuple(int(encoder.config.hidden_size) for encoder, _ in _readers(pipe))


def _lengths(fed: Sequence[tuple[Any, Sequence[str]]]) -> list[int]:
    """Tokens of each prompt, with the special ones.

    Raises:
        ErasureCompatibilityError: two tokenizers cut a prompt into different numbers of pieces. Its last pieces then stand at
            two places, and no row that a pipeline makes holds both.
    """
    lengths = [[len(row) for row in token_ids(tokenizer, texts)] for tokenizer, texts in fed]
    for index, numbers in enumerate(zip(*lengths, strict=True)):
        if len(set(numbers)) > 1:
            raise ErasureCompatibilityError(
                f"The pipeline's tokenizers cut a prompt into different numbers of pieces: {fed[0][1][index][:80]!r} into "
                f"{' and '.join(str(number - 2) for number in numbers)}, so that its parts stand at different places of the text "
                "rows. Where a textual inversion was loaded into one tokenizer and text encoder, load it into the other too."
            )
    return lengths[0]


def _forward(encoder: nn.Module, ids: list[list[int]], mask: torch.Tensor | None, penultimate: bool) -> Any:
    """One pass: rows [B, L, c] and the projected, pooled vector [B, p] (`None` where the encoder has none), where the encoder is."""
    device = compat.execution_device(encoder)
    tokens = torch.tensor(ids, device=device)
    mask = None if mask is None else mask.to(device)
    result = encoder(tokens, attention_mask=mask, output_hidden_states=penultimate)
    rows = result.hidden_states[-2] if penultimate else result[0]
    pooled = getattr(result, "text_embeds", None)
    return rows, pooled


def _finite(rows: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise ErasureInputError("The text encoder gives values that are not finite; the base model is damaged.")
    return rows


def _by_length(ids: list[list[int]]) -> Iterator[list[int]]:
    """Indices of sequences of one length, so that a batch needs no padding."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or i - start == BATCH or len(ids[order[i]]) != len(ids[order[start]]):
            yield order[start:i]
            start = i


@torch.no_grad()
def _short(
    encoder: nn.Module, tokenizer: Any, prompts: Sequence[str], penultimate: bool, pooled: bool
) -> torch.Tensor:
    """Rows of the prompts' last word pieces [N, c], or their pooled vectors [N, p].

    CLIP's text encoder is causal: a row depends on what stands before it alone, so that neither padding nor (for the
    last piece) the end token is needed, and a name of three pieces costs four positions instead of 77.
    """
    ids = token_ids(tokenizer, prompts)
    causal = type(encoder).__name__.startswith("CLIPText")
    ids = ids if pooled or not causal else [row[:-1] for row in ids]
    found: dict[int, torch.Tensor] = {}
    for indices in _by_length(ids):
        rows, vectors = _forward(encoder, [ids[i] for i in indices], None, penultimate)
        last = -1 if causal else -2
        # Not a view, which would hold all rows; and read in the end, as each read waits for an accelerator.
        found.update(zip(indices, vectors if pooled else rows[:, last].clone(), strict=True))
    return torch.stack([found[i] for i in range(len(prompts))]).to("cpu", torch.float64)


@torch.no_grad()
def _full(encoder: nn.Module, tokenizer: Any, prompts: Sequence[str], penultimate: bool) -> torch.Tensor:
    """All rows [N, L, c], padded as the pipeline pads."""
    token_ids(tokenizer, prompts)
    chunk = tokenizer(list(prompts), padding="max_length", return_tensors="pt")
    mask = chunk.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return _forward(encoder, chunk.input_ids.tolist(), mask, penultimate)[0].to("cpu", torch.float64)


_known: ContextVar[dict[int, str | None] | None] = ContextVar("known fingerprints", default=None)


@contextmanager
def one_fit() -> Iterator[None]:
    """While one erasure is made, recognise its pipeline's text encoders once: nobody changes them meanwhile."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def fingerprint(pipe: Any) -> str | None:
    """Identify the text encoders and tokenizers by all of their weights; `None` where these cannot be read."""
    known = _known.get()
    if known is None:
        return _fingerprint(pipe)
    if id(pipe) not in known:
        known[id(pipe)] = _fingerprint(pipe)
    return known[id(pipe)]


def _fingerprint(pipe: Any) -> str | None:
    parts: list[str] = []
    for encoder, tokenizer in _readers(pipe):
        bits = checksum(named_weights(encoder))
        if bits is None:
            return None
        model = describe_model(encoder)
        device = compat.execution_device(encoder).type
        behaviour = str([getattr(encoder.config, name, None) for name in BEHAVIOUR])
        vocabulary = [describe_tokenizer(tokenizer).architecture, repr(sorted(tokenizer.get_added_vocab().items()))]
        padding = [str(tokenizer.pad_token_id), str(tokenizer.model_max_length)]
        parts += [model.architecture, str(model.values), bits, device, behaviour, *vocabulary, *padding]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _listed(pipe: Any, kind: str, prompts: Sequence[str], make: Any) -> torch.Tensor:
    """`make()`, from the cache on disk where the list is worth it."""
    if len(prompts) < CACHED_FROM:
        return make()
    found = cache.fetch(kind, lambda: [fingerprint(pipe), *prompts], lambda: {"rows": make()})
    return found["rows"]


def last_rows(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Encode prompts, and keep for each the row of its last word piece (for the empty prompt, of the start token).

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline; its text encoders and tokenizers are used.
        prompts (sequence of `str`): the prompts, each once. Lists of 8 and more are cached on disk.

    Returns:
        `torch.Tensor`: float64 [N, C] on the CPU; C = 768 (SD 1.x), 1024 (SD 2.x), 2048 (SDXL).

    Raises:
        ErasureCompatibilityError: another family, or no text encoder is loaded; or two tokenizers cut a prompt into different
            numbers of pieces, so that no row that the pipeline makes is the last piece's of both.
        ErasureInputError: a prompt is too long, a text encoder carries an active LoRA, or its rows are not finite.
    """
    pairs = _readers(pipe)
    penultimate = family_of(pipe).name != "stable-diffusion"

    fed = [(tokenizer, _as_fed(pipe, tokenizer, prompts)) for _, tokenizer in pairs]
    if len(pairs) > 1:
        _lengths(fed)

    def make() -> torch.Tensor:
        parts = [
            _short(encoder, tokenizer, texts, penultimate, pooled=False)
            for (encoder, _), (tokenizer, texts) in zip(pairs, fed, strict=True)
        ]
        return _finite(torch.cat(parts, dim=1))

    return _listed(pipe, "rows", prompts, make)


def pooled_rows(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """The pooled vectors of prompts that SDXL's UNet reads beside the rows: float64 [N, 1280]. Otherwise as `last_rows`."""
    encoder, tokenizer = _readers(pipe)[-1]

    def make() -> torch.Tensor:
        return _finite(_short(encoder, tokenizer, _as_fed(pipe, tokenizer, prompts), True, pooled=True))

    return _listed(pipe, "pooled", prompts, make)


def all_rows(pipe: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
    """Encode prompts with their padding.

    Args:
        pipe, prompts: as in `last_rows`; nothing is cached.

    Returns:
        `tuple`: float64 [N, L, C] on the CPU, with the encoder's length L; and for each prompt the index of its last
        word piece (0, the start token, for the empty prompt).
    """
    pairs = _readers(pipe)
    penultimate = family_of(pipe).name != "stable-diffusion"
    fed = [_as_fed(pipe, tokenizer, prompts) for _, tokenizer in pairs]
    lengths = _lengths([(tokenizer, texts) for (_, tokenizer), texts in zip(pairs, fed, strict=True)])
    parts = []
    for start in range(0, len(prompts), PADDED_BATCH):
        chunks = [texts[start : start + PADDED_BATCH] for texts in fed]
        both = [_full(*pair, chunk, penultimate) for pair, chunk in zip(pairs, chunks, strict=True)]
        parts.append(torch.cat(both, dim=2))
    return _finite(torch.cat(parts)), [length - 2 for length in lengths]


def null_rows(pipe: Any) -> torch.Tensor:
    """The empty prompt's rows, the start token's first: float64 [L, C]. Cached on disk."""

    def make() -> dict[str, torch.Tensor]:
        return {"rows": all_rows(pipe, [""])[0][0]}

    return cache.fetch("null", lambda: [fingerprint(pipe)], make)["rows"]


def gram(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """`sum x x^T` over all rows, padding included, of some prompts: float64 [C, C]. Lists of 8 and more are cached."""

    def make() -> torch.Tensor:
        total: torch.Tensor | float = 0.0
        starts = range(0, len(prompts), PADDED_BATCH)
        for start in tqdm(starts, desc="encoding what is retained", leave=False, disable=len(starts) < 16):
            rows = all_rows(pipe, prompts[start : start + PADDED_BATCH])[0].flatten(0, 1)
            total = total + rows.T @ rows
        assert isinstance(total, torch.Tensor)
        return total

    return _listed(pipe, "gram", prompts, make)
