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
from ..fingerprints import checksum, inner_tokenizer


# Arguments of `encode_prompt` that are not those of its call's defaults.
_OWN = ("prompt", "negative_prompt", "num_images_per_prompt", "num_videos_per_prompt", "device", "dtype")
_REMEMBERED = 8  # prompts whose rows are kept: a template's are asked for twice, for their tokens and their rows
_PADDING = 32  # rows of padding that are looked at on each side of a prompt, where it is read


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
class Text:
    """What a denoiser reads of one prompt.

    Attributes:
        rows: float64 [L, C], behind the norm.
        ids: the tokens of the first of them. Behind these stand rows of padding, where the denoiser reads that.
        own: how many rows are of tokens and not of padding.
    """

    rows: torch.Tensor
    ids: list[int]
    own: int


class _Given(BaseException):
    """Ends a pipeline's `encode_prompt` when its encoder is called: what it was given is known then."""


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
    seen: dict[str, Text] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._loaded()
        if "image" in inspect.signature(self.pipe.encode_prompt).parameters:
            raise ErasureCompatibilityError(
                f"{type(self.pipe).__name__} encodes a prompt together with pictures, so that there are no rows of the prompt "
                f"alone to fit on. Fit on a pipeline of {self.family.title} that draws from text, made of the same components, and "
                "load the erasure here."
            )
        refuse_loras(self._encoder, "text encoder")

    def _loaded(self) -> None:
        missing = [name for name in (*self.family.text_encoders, *self.family.tokenizers) if self._part(name) is None]
        if missing:
            raise ErasureCompatibilityError(f"Fitting needs the pipeline's {' and '.join(missing)}; load them.")

    def _part(self, name: str) -> Any:
        return component(self.pipe, name)

    @property
    def _encoder(self) -> nn.Module:
        return self._part(self.family.text_encoders[0])

    @property
    def _tokenizer(self) -> Any:
        return inner_tokenizer(self._part(self.family.tokenizers[0]))

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
        """What the rows depend on besides the encoder: a template or a system prompt, which a pipeline may be given, too."""
        norm = "" if self.norm is None else self.norm.bits
        ids, on = self._tokens("a")
        template = str(ids.tolist()), str(on.tolist())
        return self.pipe.__class__.__name__, repr(sorted(self.arguments.items())), *template, norm

    @property
    def end(self) -> int | None:
        """The tokenizer's end token."""
        return getattr(self._tokenizer, "eos_token_id", None)

    @cached_property
    def suffix(self) -> int:
        """How many tokens stand behind every prompt: the end of a template, or an end token."""
        shorter, longer = (ids[on].tolist()[::-1] for ids, on in map(self._tokens, ("", "a")))
        same = [a == b for a, b in zip(shorter, longer, strict=False)]
        return same.index(False) if False in same else len(same)

    def _tokens(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that the encoder is given for a prompt [L], and which of them are no padding. It is not run."""
        return self._encode(prompt, run=False)[0]

    def _encode(self, prompt: str, run: bool = True) -> tuple[tuple[torch.Tensor, torch.Tensor], Any]:
        """What the encoder is given, see `_tokens`, and what `encode_prompt` makes of it."""
        self._loaded()
        called: list[dict[str, Any]] = []
        bound = inspect.signature(type(self._encoder).forward)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append(bound.bind_partial(module, *args, **kwargs).arguments)
            if not run:
                raise _Given

        handle = self._encoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            result = self.pipe.encode_prompt(prompt, **self.arguments)
        except _Given:
            result = None
        finally:
            handle.remove()
        given = {**called[0], **called[0].get("kwargs", {})}
        ids, mask = given["input_ids"][0].cpu(), given.get("attention_mask")
        on = ids != self._tokenizer.pad_token_id if mask is None else mask[0].cpu().bool()
        return (ids, on), result

    @torch.no_grad()
    def of(self, prompt: str) -> Text:
        """The rows of a prompt that the denoiser reads.

        Raises:
            ErasureCompatibilityError: it cannot be told which token a row is of.
        """
        if prompt in self.seen:
            return self.seen[prompt]
        (ids, on), result = self._encode(prompt)
        first = result[0] if isinstance(result, tuple) else result
        rows = first[0].cpu()  # of a list of [L, C], or of [1, L, C]
        mask = _mask(result, len(rows))
        if mask is None and len(rows) != len(ids):  # padding was cut off
            ids, on = ids[on], on[on]
        if len(rows) > len(ids):
            raise ErasureCompatibilityError(
                f"{type(self.pipe).__name__} makes {len(rows)} text rows of {len(ids)} tokens, so that it cannot be told which "
                "token a row is of."
            )
        ids, on = ids[len(ids) - len(rows) :], on[len(on) - len(rows) :]  # a template's head may be cut off
        read = (rows != 0).any(1)  # of a row of zeros any map makes zeros
        places, words = _places(on, read if mask is None else read & mask)
        if not words:
            raise ErasureCompatibilityError(
                f"{type(self.pipe).__name__} makes no text row of the prompt {prompt[:80]!r}."
            )
        rows = rows[places].to(torch.float64)
        rows = rows if self.norm is None else self.norm(rows)
        before = [int(ids[place]) for place in places if place <= words[-1]]
        found = Text(rows, before, len(words))
        if len(self.seen) < _REMEMBERED:
            self.seen[prompt] = found
        return found

    def too_long(self, prompts: Sequence[str]) -> set[str]:
        """Those of some prompts that are not read whole."""
        most = self.arguments.get("max_sequence_length")
        if most is None or not prompts:
            return set()
        ids = self._tokenizer(list(prompts), add_special_tokens=False).input_ids
        around = self.of("").own  # a template's tokens, and an end token
        return {prompt for prompt, row in zip(prompts, ids, strict=True) if len(row) + around > most}

    def check(self, prompts: Sequence[str]) -> None:
        """See that prompts are read whole.

        Raises:
            ErasureInputError: one is too long.
        """
        for prompt in sorted(self.too_long(prompts)):
            raise ErasureInputError(
                f"The prompt {prompt[:80]!r} is longer than the text encoder reads "
                f"({self.arguments.get('max_sequence_length')} tokens, of which {self.of('').own} are the pipeline's own). Shorten "
                "it, or raise `max_sequence_length`."
            )


def _mask(result: Any, length: int) -> torch.Tensor | None:
    """Which rows the denoiser is told to read [L]: the mask among what `encode_prompt` returns; `None` where it reads all."""
    for each in result[1:] if isinstance(result, tuple) else ():
        if isinstance(each, torch.Tensor) and each.ndim == 2 and len(each) == 1 and each.numel() % length == 0:
            return each.reshape(length, -1)[:, 0].cpu() > 0  # AuraFlow's is as wide as its rows
    return None


def _places(on: torch.Tensor, read: torch.Tensor) -> tuple[list[int], list[int]]:
    """The places of the rows that are looked at, and of those among them that are tokens'.

    Of padding that is read, which is FLUX.2's hundreds of rows, some stand for all.
    """
    words = torch.nonzero(on & read).flatten().tolist()
    if not words:
        return [], []
    places = torch.nonzero(read).flatten().tolist()
    before, behind = [i for i in places if i < words[0]], [i for i in places if i > words[-1]]
    return _spread(before) + words + _spread(behind), words


def _spread(places: list[int]) -> list[int]:
    """Some of many places, evenly, the first and the last among them."""
    steps = _PADDING - 1
    return places if len(places) <= _PADDING else [places[i * (len(places) - 1) // steps] for i in range(_PADDING)]
