"""Rows as a pipeline's own `encode_prompt` makes them: of families whose prompts stand in chat templates, behind masks."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .. import compat
from ..base_model import component, refuse_loras
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..families import Family
from ..fingerprints import checksum
from .known import inner_tokenizer


# Arguments of `encode_prompt` that are not those of its call's defaults.
_OWN = ("prompt", "negative_prompt", "num_images_per_prompt", "num_videos_per_prompt", "device", "dtype")


@dataclass(frozen=True)
class Norm:
    """The norm that stands before a denoiser's door, by itself and in float64."""

    module: nn.Module
    bits: str

    @classmethod
    def of(cls, denoiser: nn.Module, name: str) -> "Norm":
        """That of a denoiser, whose weights may lie elsewhere.

        Raises:
            ErasureInputError: they cannot be read.
        """
        original = denoiser.get_submodule(name)
        values = {}
        for local, parameter in original.named_parameters(recurse=False):
            stored = compat.offloaded_tensor(original, local) if parameter.device.type == "meta" else parameter
            if stored is None:
                raise ErasureInputError(f"The weight of {name!r} cannot be read; load the denoiser.")
            values[local] = stored.detach().to("cpu", torch.float64)
        found = compat.with_values(original, values)
        return cls(found, checksum((local, value) for local, value in values.items()) or "")

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.module(rows)


@dataclass(frozen=True)
class Fed:
    """What a pipeline's `encode_prompt` makes of one prompt at a time.

    Attributes:
        pipe: the pipeline.
        family: its family.
        length: `max_sequence_length`; 0 for that of the pipeline's call.
        norm: what stands before the door, `None` where nothing does.
    """

    pipe: Any
    family: Family
    length: int
    norm: Norm | None
    seen: dict[str, tuple[torch.Tensor, list[int]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        missing = [name for name in (*self.family.text_encoders, *self.family.tokenizers) if self._part(name) is None]
        if missing:
            raise ErasureCompatibilityError(f"Fitting needs the pipeline's {' and '.join(missing)}; load them.")
        refuse_loras(self._encoder, "text encoder")

    def _part(self, name: str) -> Any:
        return component(self.pipe, name)

    @property
    def _encoder(self) -> nn.Module:
        return self._part(self.family.text_encoders[0])

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `encode_prompt` as a call of the pipeline has them by default."""
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        called = inspect.signature(self.pipe.__class__.__call__).parameters
        found = {
            name: called[name].default
            for name in taken
            if name in called and name not in _OWN and called[name].default not in (None, inspect.Parameter.empty)
        }
        if self.length and "max_sequence_length" in taken:
            found["max_sequence_length"] = self.length
        if "do_classifier_free_guidance" in taken:
            found["do_classifier_free_guidance"] = False
        return found

    @property
    def key(self) -> tuple[str, ...]:
        """What the rows depend on besides the encoder."""
        norm = "" if self.norm is None else self.norm.bits
        return self.pipe.__class__.__name__, repr(sorted(self.arguments.items())), norm

    @cached_property
    def suffix(self) -> int:
        """How many tokens stand behind every prompt: the end of a template, or an end token."""
        shorter, longer = (self.of(prompt)[1][::-1] for prompt in ("", "a"))
        same = [a == b for a, b in zip(shorter, longer, strict=False)]
        return same.index(False) if False in same else len(same)

    @torch.no_grad()
    def of(self, prompt: str) -> tuple[torch.Tensor, list[int]]:
        """The rows that the denoiser reads, behind the norm, float64 [L, C], and their tokens."""
        if prompt in self.seen:
            return self.seen[prompt]
        called: list[dict[str, Any]] = []
        bound = inspect.signature(type(self._encoder).forward)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append(bound.bind_partial(module, *args, **kwargs).arguments)

        handle = self._encoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            result = self.pipe.encode_prompt(prompt, **self.arguments)
        finally:
            handle.remove()
        given = called[0]
        given = {**given, **given.get("kwargs", {})}
        ids, mask = given["input_ids"][0].cpu(), given.get("attention_mask")
        on = torch.ones_like(ids) if mask is None else mask[0].cpu()
        rows = result[0] if isinstance(result, tuple) else result
        rows = rows[0].to("cpu", torch.float64)  # a list of [L, C], or [1, L, C]
        # A template's head may be cut off, and padding too; else there is a row for each token.
        kept = ids[on.bool()]
        if len(rows) == len(ids):
            rows = rows[on.bool()]
        elif len(rows) > len(kept):
            rows = rows[: len(kept)]
        kept = kept[len(kept) - len(rows) :]
        rows = rows if self.norm is None else self.norm(rows)
        found = rows, kept.tolist()
        if len(self.seen) < 64:  # a template's prompts are asked for twice, for their tokens and their rows
            self.seen[prompt] = found
        return found

    def too_long(self, prompts: Sequence[str]) -> set[str]:
        """Those of some prompts that are not read whole."""
        most = self.arguments.get("max_sequence_length")
        tokenizer = inner_tokenizer(self._part(self.family.tokenizers[0]))
        ids = tokenizer(list(prompts), add_special_tokens=False).input_ids if prompts else []
        return {prompt for prompt, row in zip(prompts, ids, strict=True) if most is not None and len(row) > most}

    def check(self, prompts: Sequence[str]) -> None:
        """See that prompts are read whole.

        Raises:
            ErasureInputError: one is too long.
        """
        for prompt in sorted(self.too_long(prompts)):
            raise ErasureInputError(
                f"The prompt {prompt[:80]!r} is longer than the text encoder reads "
                f"({self.arguments.get('max_sequence_length')} tokens). Shorten it, or raise `max_sequence_length`."
            )
