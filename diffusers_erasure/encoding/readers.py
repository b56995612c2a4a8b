"""One text encoder with its tokenizer: what it makes of prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .. import compat
from ..base_model import component, refuse_loras
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..families import Family


BATCH = 64  # prompts in one pass
PADDED_BATCH = 16  # of prompts with their padding: as fast, and a quarter of the memory
PADDED_ROWS = 2048  # in one pass at most: a prompt of FLUX.1 has 512
# Rows that the pipelines of T5 encoders pad to, unless the call says otherwise.
USUAL_LENGTH, LENGTH_OF_GUIDED = 256, 512
Prompt = TypeVar("Prompt")


@dataclass(frozen=True)
class Reader:
    """A text encoder of a pipeline.

    Attributes:
        name: the pipeline's attribute.
        encoder: the encoder.
        tokenizer: its tokenizer.
        pipe: the pipeline, which writes out textual inversions.
        length: positions of a prompt with its padding.
        penultimate: whether its rows are those of the last layer but one.
        causal: whether a row depends on what stands before it alone. In the others padding is read like words.
    """

    name: str
    encoder: Any
    tokenizer: Any
    pipe: Any
    length: int
    penultimate: bool
    causal: bool

    @property
    def width(self) -> int:
        """Of its rows."""
        return int(self.encoder.config.hidden_size)

    def fed(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the pipeline gives them to the tokenizer: a textual inversion of several vectors is written out."""
        added = self.tokenizer.get_added_vocab()
        if not any(f"{token}_1" in added for token in added) or not hasattr(self.pipe, "maybe_convert_prompt"):
            return list(prompts)
        return self.pipe.maybe_convert_prompt(list(prompts), self.tokenizer)

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens with the special ones, unpadded.

        Raises:
            ErasureInputError: a prompt is longer than the encoder reads.
        """
        return token_ids(self.tokenizer, self.fed(prompts), self.length)

    def too_long(self, prompts: Sequence[str]) -> set[str]:
        """Those of some prompts that it does not read whole."""
        rows = self.tokenizer(self.fed(prompts), verbose=False).input_ids if prompts else []
        return {prompt for prompt, row in zip(prompts, rows, strict=True) if len(row) > self.length}

    @torch.no_grad()
    def last(self, prompts: Sequence[str], pooled: bool = False) -> torch.Tensor:
        """Rows of the prompts' last word pieces [N, c], or their pooled vectors [N, p]: float64 on the CPU.

        CLIP's text encoder is causal: a row depends on what stands before it alone, so that neither padding nor (for the
        last piece) the end token is needed, and a name of three pieces costs four positions instead of 77.
        """
        if not self.causal and not pooled:
            parts = []
            for some in _batches(prompts, self.length):
                rows, last = self.all(some)
                parts.append(rows[torch.arange(len(some)), torch.tensor(last)])
            return torch.cat(parts)
        ids = self.ids(prompts)
        clip = type(self.encoder).__name__.startswith("CLIPText")
        ids = ids if pooled or not clip else [row[:-1] for row in ids]
        found: dict[int, torch.Tensor] = {}
        for indices in _by_length(ids):
            rows, vectors = self._forward([ids[i] for i in indices], None)
            place = -1 if clip else -2
            # Not a view, which would hold all rows; and read in the end, as each read waits for an accelerator.
            found.update(zip(indices, vectors if pooled else rows[:, place].clone(), strict=True))
        return torch.stack([found[i] for i in range(len(prompts))]).to("cpu", torch.float64)

    @torch.no_grad()
    def ends(self, prompts: Sequence[str]) -> torch.Tensor:
        """Rows of the prompts' first end tokens [N, c]: float64 on the CPU."""
        ids = self.ids(prompts)
        if not self.causal:
            batches = _batches(range(len(prompts)), self.length)
            parts = [(self.all([prompts[i] for i in some])[0], some) for some in batches]
            return torch.cat([rows[range(len(some)), [len(ids[i]) - 1 for i in some]] for rows, some in parts])
        found: dict[int, torch.Tensor] = {}
        for indices in _by_length(ids):  # what stands before them is all that they depend on
            rows = self._forward([ids[i] for i in indices], None)[0]
            found.update(zip(indices, rows[:, -1].clone(), strict=True))
        return torch.stack([found[i] for i in range(len(prompts))]).to("cpu", torch.float64)

    @torch.no_grad()
    def all(self, prompts: Sequence[str], first: int | None = None) -> tuple[torch.Tensor, list[int]]:
        """All rows [N, L, c], padded as the pipeline pads, and the place of each prompt's last word piece.

        Args:
            first: so many rows are enough, or what the longest prompt has: those of a causal encoder are then the first ones, which
                do not depend on the others.
        """
        fed = self.fed(prompts)
        ids = token_ids(self.tokenizer, fed, self.length)
        padded = self.tokenizer(fed, padding="max_length", max_length=self.length, return_tensors="pt")
        mask = padded.attention_mask if getattr(self.encoder.config, "use_attention_mask", False) else None
        tokens = padded.input_ids
        if first is not None and self.causal and mask is None:
            tokens = tokens[:, : max(first, *map(len, ids))]
        rows = self._forward(tokens.tolist(), mask)[0].to("cpu", torch.float64)
        return rows, [max(0, len(row) - 2) for row in ids]

    def _forward(self, ids: list[list[int]], mask: torch.Tensor | None) -> Any:
        """One pass: rows [B, L, c] and the pooled vector [B, p] (`None` where the encoder has none), where the encoder is."""
        device = compat.execution_device(self.encoder)
        tokens = torch.tensor(ids, device=device)
        mask = None if mask is None else mask.to(device)
        result = self.encoder(tokens, attention_mask=mask, output_hidden_states=self.penultimate)
        rows = result.hidden_states[-2] if self.penultimate else result[0]
        projected = getattr(result, "text_embeds", None)
        return rows, getattr(result, "pooler_output", None) if projected is None else projected


def _batches(prompts: Sequence[Prompt], length: int) -> Iterator[Sequence[Prompt]]:
    size = padded_batch(length)
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def padded_batch(length: int) -> int:
    """Prompts in one pass with their padding."""
    return max(1, min(PADDED_BATCH, PADDED_ROWS // max(1, length)))


def _by_length(ids: list[list[int]]) -> Iterator[list[int]]:
    """Indices of sequences of one length, so that a batch needs no padding."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or i - start == BATCH or len(ids[order[i]]) != len(ids[order[start]]):
            yield order[start:i]
            start = i


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> list[list[int]]:
    """Tokenise prompts with their special tokens, unpadded.

    Raises:
        ErasureInputError: a prompt is longer than `length`, or than the encoder.
    """
    most = tokenizer.model_max_length if length is None else length
    ids: list[list[int]] = tokenizer(list(prompts)).input_ids if prompts else []
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > most:
            raise ErasureInputError(
                f"The prompt {prompt[:80]!r} has {len(row)} tokens; the text encoder takes {most}. Shorten it"
                + (", or raise `max_sequence_length`." if most < tokenizer.model_max_length else ".")
            )
    return ids


def usual_length(denoiser: Any) -> int:
    """Rows of T5 that a family's pipeline makes of a prompt by default: 512 for FLUX.1 dev, 256 for schnell and Stable Diffusion 3."""
    return LENGTH_OF_GUIDED if getattr(denoiser.config, "guidance_embeds", False) else USUAL_LENGTH


def readers_of(pipe: Any, family: Family, denoiser: Any, length: int = 0) -> dict[str, Reader]:
    """The text encoders of a pipeline that are loaded, by name.

    Args:
        pipe: the pipeline.
        family ([`Family`]): its family.
        denoiser: its denoiser, loaded or not.
        length (`int`, *optional*, defaults to 0): rows of a prompt where a call can say so; 0 for the pipeline's own.

    Raises:
        ErasureCompatibilityError: an encoder is loaded without its tokenizer.
        ErasureInputError: a LoRA is active on one.
    """
    found: dict[str, Reader] = {}
    for name, tokenizer_name in zip(family.text_encoders, family.tokenizers, strict=True):
        encoder, tokenizer = component(pipe, name), component(pipe, tokenizer_name)
        if encoder is None:
            continue
        if tokenizer is None:
            raise ErasureCompatibilityError(
                f"Fitting needs the pipeline's {' and '.join((*family.text_encoders, *family.tokenizers))}; load them."
            )
        refuse_loras(encoder, "text encoder")
        causal = name in family.causal
        most = int(tokenizer.model_max_length)
        own = most if causal else min(most, length or usual_length(denoiser))
        in_rows = any(name in block for block in family.rows)  # FLUX.1 asks its CLIP for the pooled vector alone
        penultimate = causal and in_rows and family.name != "stable-diffusion"
        found[name] = Reader(name, encoder, tokenizer, pipe, own, penultimate, causal)
    return found
