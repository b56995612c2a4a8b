"""What feeds an input of the denoiser: text encoders side by side, one block of rows after another, and the pooled vector."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .. import cache
from ..base_model import component, door_module, family_of
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..families import Family
from ..logging import get_logger
from .fed import Fed, Norm, Text
from .known import listing, once
from .readers import BATCH, Reader, padded_batch, readers_of


logger = get_logger(__name__)

CACHED_FROM = 8  # shorter lists are encoded about as fast as they are read


@dataclass(frozen=True)
class Source(ABC):
    """Rows of prompts, as one input of the denoiser is given them.

    Attributes:
        name: by which its rows are told apart from those of other sources of the same input.
        pipe: the pipeline.
        width: of the denoiser's input.
        causal: whether a row depends on what stands before it alone; in the others a word is in every row.
        starts: how many rows are the start token's, which say nothing of the prompt: 1 or 0.
        key: what its rows depend on besides the text encoders.
    """

    name: str
    pipe: Any = field(repr=False)
    width: int
    causal: bool
    starts: int
    key: tuple[str, ...]

    @abstractmethod
    def _last(self, prompts: Sequence[str]) -> torch.Tensor: ...

    @abstractmethod
    def _all(self, prompts: Sequence[str], first: int | None = None) -> tuple[Sequence[torch.Tensor], list[int]]: ...

    @abstractmethod
    def _ends(self, prompts: Sequence[str]) -> torch.Tensor: ...

    @abstractmethod
    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of each prompt, with the special ones, unpadded; a row stands where its token does."""

    def last_place(self, ids: Sequence[int]) -> int:
        """The place of the last word piece of a prompt of such tokens; for the empty prompt of the first token."""
        return max(0, len(ids) - 2)

    @abstractmethod
    def too_long(self, prompts: Sequence[str]) -> set[str]:
        """Those of some prompts that are not read whole."""

    def placed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as the denoiser's input has them."""
        return rows

    @property
    def batch(self) -> int:
        """Prompts in one pass, with their padding."""
        return 1

    def last(self, prompts: Sequence[str]) -> torch.Tensor:
        """The row of each prompt's last word piece (for the empty prompt, of the first token): float64 [N, C] on the CPU.

        Lists of 8 and more are cached on disk.
        """
        return self.placed(self._listed("rows", prompts, lambda: _finite(self._last(prompts))))

    def ends(self, prompts: Sequence[str]) -> torch.Tensor:
        """The row of each prompt's first end token: float64 [N, C] on the CPU. Lists of 8 and more are cached on disk.

        Raises:
            ErasureInputError: what the denoiser reads of a prompt ends in no such token.
        """
        return self.placed(self._listed("ends", prompts, lambda: _finite(self._ends(prompts))))

    def all(self, prompts: Sequence[str], first: int | None = None) -> tuple[list[torch.Tensor], list[int]]:
        """All rows of each prompt that the denoiser reads, float64 [L, C], and the place of its last word piece.

        Args:
            first: of causal encoders so many rows are enough, or what the longest prompt has.
        """
        found: list[torch.Tensor] = []
        places: list[int] = []
        batch = self.batch if first is None or not self.causal else BATCH
        for start in range(0, len(prompts), batch):
            rows, last = self._all(prompts[start : start + batch], first)
            found += [self.placed(_finite(each)) for each in rows]
            places += last
        return found, places

    def null(self) -> torch.Tensor:
        """The empty prompt's rows, a start token's first: float64 [L, C]. Cached on disk."""

        def make() -> dict[str, torch.Tensor]:
            return {"rows": _finite(self._all([""])[0][0])}

        return self.placed(cache.fetch("null", listing(self.key, (), self.pipe), make)["rows"])

    def gram(self, prompts: Sequence[str]) -> torch.Tensor:
        """`sum x x^T` over all rows, padding included, of some prompts: float64 [C, C]. Lists of 8 and more are cached."""

        def make() -> torch.Tensor:
            total: torch.Tensor | float = 0.0
            starts = range(0, len(prompts), self.batch)
            for start in tqdm(starts, desc="encoding what is retained", leave=False, disable=len(starts) < 16):
                rows = torch.cat([_finite(each) for each in self._all(prompts[start : start + self.batch])[0]])
                total = total + rows.T @ rows
            assert isinstance(total, torch.Tensor)
            return total

        found = self._listed("gram", prompts, make)
        return self.placed(self.placed(found).T).T

    def _listed(self, kind: str, prompts: Sequence[str], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`make()`, from the cache on disk where the list is worth it."""
        if len(prompts) < CACHED_FROM:
            return make()
        found = cache.fetch(kind, listing(self.key, prompts, self.pipe), lambda: {"rows": make()})
        return found["rows"]


@dataclass(frozen=True)
class SideBySide(Source):
    """What text encoders make of a token, side by side, with zeros around where the input is wider.

    Attributes:
        readers: the encoders.
        start: the first of their columns in the denoiser's input.
    """

    readers: tuple[Reader, ...]
    start: int = 0

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return self._checked_ids(prompts)

    def too_long(self, prompts: Sequence[str]) -> set[str]:
        return set().union(*(reader.too_long(prompts) for reader in self.readers))

    def placed(self, rows: torch.Tensor) -> torch.Tensor:
        behind = self.width - self.start - rows.shape[-1]
        return F.pad(rows, (self.start, behind)) if self.start or behind else rows

    @property
    def batch(self) -> int:
        return padded_batch(max(reader.length for reader in self.readers))

    def _last(self, prompts: Sequence[str]) -> torch.Tensor:
        self._checked_ids(prompts)
        return torch.cat([reader.last(prompts) for reader in self.readers], dim=1)

    def _ends(self, prompts: Sequence[str]) -> torch.Tensor:
        self._checked_ids(prompts)
        return torch.cat([reader.ends(prompts) for reader in self.readers], dim=1)

    def _all(self, prompts: Sequence[str], first: int | None = None) -> tuple[Sequence[torch.Tensor], list[int]]:
        self._checked_ids(prompts)
        parts = [reader.all(prompts, first) for reader in self.readers]
        return list(torch.cat([rows for rows, _ in parts], dim=2)), parts[0][1]

    def _checked_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of each prompt, with the special ones.

        Raises:
            ErasureCompatibilityError: two tokenizers cut a prompt into different numbers of pieces. Its last pieces then stand
                at two places, and no row that a pipeline makes holds both.
        """
        ids = [reader.ids(prompts) for reader in self.readers]
        for index, rows in enumerate(zip(*ids, strict=True)):
            if len({len(row) for row in rows}) > 1:
                raise ErasureCompatibilityError(
                    f"The pipeline's tokenizers cut a prompt into different numbers of pieces: {prompts[index][:80]!r} into "
                    f"{' and '.join(str(len(row) - 2) for row in rows)}, so that its parts stand at different places of the "
                    "text rows. Where a textual inversion was loaded into one tokenizer and text encoder, load it into the "
                    "other too."
                )
        return ids[0]


@dataclass(frozen=True)
class PooledVectors(SideBySide):
    """The pooled vectors of text encoders, side by side: one row a prompt."""

    def _checked_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [reader.ids(prompts) for reader in self.readers][0]

    def last(self, prompts: Sequence[str]) -> torch.Tensor:
        return self._listed("pooled", prompts, lambda: _finite(self._last(prompts)))

    def null(self) -> torch.Tensor:
        return self.last([""])

    def gram(self, prompts: Sequence[str]) -> torch.Tensor:
        rows = self.last(prompts)
        return rows.T @ rows

    def _last(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.cat([reader.last(prompts, pooled=True) for reader in self.readers], dim=1)

    def _all(self, prompts: Sequence[str], first: int | None = None) -> tuple[Sequence[torch.Tensor], list[int]]:
        return list(self._last(prompts)[:, None]), [0] * len(prompts)


@dataclass(frozen=True)
class AsFed(Source):
    """Rows as the pipeline's own function makes them: of families with chat templates and masks."""

    fed: Fed

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.fed.of(prompt).ids for prompt in prompts]

    def too_long(self, prompts: Sequence[str]) -> set[str]:
        return self.fed.too_long(prompts)

    def _last(self, prompts: Sequence[str]) -> torch.Tensor:
        self.fed.check(prompts)
        texts = map(self.fed.of, prompts)  # one at a time: all rows of a list do not fit into memory
        return torch.stack([text.rows[self._place(text)].clone() for text in texts])

    def _ends(self, prompts: Sequence[str]) -> torch.Tensor:
        self.fed.check(prompts)
        found = []
        for text in map(self.fed.of, prompts):
            if text.ids[-1] != self.fed.end:
                raise ErasureInputError(
                    f"`eot` maps the row of the end token, and what {type(self.pipe).__name__} makes of a prompt ends in none. "
                    'Leave `eot` out; `rows="window"` maps all rows behind the word.'
                )
            found.append(text.rows[len(text.ids) - 1].clone())
        return torch.stack(found)

    def _all(self, prompts: Sequence[str], first: int | None = None) -> tuple[Sequence[torch.Tensor], list[int]]:
        self.fed.check(prompts)
        texts = [self.fed.of(prompt) for prompt in prompts]
        return [text.rows for text in texts], [self._place(text) for text in texts]

    def last_place(self, ids: Sequence[int]) -> int:
        return max(0, len(ids) - self.fed.suffix - 1)

    def _place(self, text: Text) -> int:
        return self.last_place(text.ids)


def _finite(rows: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise ErasureInputError("The text encoder gives values that are not finite; the base model is damaged.")
    return rows


def reads_directly(family: Family) -> bool:
    """Whether a family's encoders are CLIP's and T5's, called with tokens alone; the others have templates and masks."""
    return family.denoiser == "unet" or family.pooled is not None


def row_sources(
    pipe: Any, *, per_encoder: bool = False, length: int = 0, before_norm: bool = False
) -> tuple[Source, ...]:
    """What feeds the text rows: one source a block of rows.

    Args:
        pipe: the pipeline; the denoiser is not called.
        per_encoder (`bool`, *optional*, defaults to `False`): where rows of other encoders stand in the same columns (Stable
            Diffusion 3), make a source of each encoder, its rows with zeros where another's would stand. What is mapped right
            for each of these alone is mapped right, as a map is linear, for any sum of them: of whatever two prompts.
        length (`int`, *optional*, defaults to 0): rows of a prompt where a call can say so; 0 for the pipeline's own.

    Raises:
        ErasureCompatibilityError: no text encoder is loaded, or not all of those whose rows stand side by side.
        ErasureInputError: a LoRA is active on one.
    """
    family = family_of(pipe)
    denoiser = component(pipe, family.denoiser)
    if not reads_directly(family):
        return (_as_fed(pipe, family, denoiser, length, before_norm),)
    readers = readers_of(pipe, family, denoiser, length)
    found: list[Source] = []
    for block in family.rows:
        present = [readers[name] for name in block if name in readers]
        # A refiner has the second encoder alone.
        refiner = (
            denoiser.__class__.__name__ == "UNet2DConditionModel" and component(pipe, family.tokenizers[0]) is None
        )
        if present and len(present) < len(block) and not refiner:
            found = []
            break
        widths = [reader.width for reader in present]
        width = sum(widths) if family.door is None else _linear(denoiser, family.door).in_features
        if present and per_encoder and family.door is not None:
            starts = [sum(widths[:i]) for i in range(len(widths))]
            found += [_side_by_side((each,), width, start) for each, start in zip(present, starts, strict=True)]
        elif present:
            found.append(_side_by_side(tuple(present), width, 0))
    if not found:
        raise ErasureCompatibilityError(
            f"Fitting needs the pipeline's {' and '.join((*family.text_encoders, *family.tokenizers))}; load them."
        )
    if len(found) < len(family.rows):
        missing = [name for block in family.rows for name in block if name not in readers]
        logger.warning(
            "%s is not loaded: its rows are not mapped, so the erasure does not act on prompts that it reads.",
            " and ".join(missing),
        )
    return tuple(found)


def _side_by_side(readers: tuple[Reader, ...], width: int, start: int) -> SideBySide:
    causal = all(reader.causal for reader in readers)
    own = sum(reader.width for reader in readers)
    plain = causal and not start and own == width  # its rows depend on the encoders alone
    key = () if plain else ("+".join(reader.name for reader in readers), *(str(reader.length) for reader in readers))
    name = "+".join(reader.name for reader in readers)
    return SideBySide(name, readers[0].pipe, width, causal, int(causal), key, readers, start)


def pooled_source(pipe: Any) -> Source | None:
    """What feeds the pooled vector; `None` where the denoiser reads none, or what makes it is not loaded."""
    family = family_of(pipe)
    if family.door is None:
        row_sources(pipe)  # which raises where an encoder is missing
    if family.pooled is None:
        return None
    readers = readers_of(pipe, family, component(pipe, family.denoiser))
    own = tuple(readers[name] for name in family.pooled.encoders if name in readers)
    if len(own) < len(family.pooled.encoders):
        return None
    return PooledVectors("pooled", pipe, 0, False, 1, (), own)


def _as_fed(pipe: Any, family: Family, denoiser: nn.Module, length: int, before_norm: bool = False) -> AsFed:
    assert family.door is not None
    norm = None if before_norm else family.norm
    fed = once(
        ("fed", id(pipe), length, norm),
        lambda: Fed(pipe, family, length, None if norm is None else Norm.of(denoiser, norm)),
    )
    width = _linear(denoiser, family.door).in_features
    causal = set(family.rows[0]) <= set(family.causal)
    return AsFed("text_encoder", pipe, width, causal, 0, fed.key, fed)


def _linear(denoiser: nn.Module, name: str) -> nn.Linear:
    linear = door_module(denoiser, name)
    if not isinstance(linear, nn.Linear):
        raise ErasureCompatibilityError(f"{name!r} of {type(denoiser).__name__} is no Linear; load it unquantised.")
    return linear


def _sources(pipe: Any, length: int) -> list[Source]:
    pooled = pooled_source(pipe)
    return [*row_sources(pipe, length=length), *([] if pooled is None else [pooled])]


def check_prompts(pipe: Any, prompts: Sequence[str], length: int = 0) -> None:
    """See that a pipeline can encode prompts, whole; where T5 reads them, it is enough that this does: CLIP is given the same, and
    cuts it.

    Raises:
        ErasureInputError: a prompt is longer than an encoder reads, or a LoRA is active on one.
        ErasureCompatibilityError: another family, or a text encoder or tokenizer is missing.
    """
    sources = _sources(pipe, length)
    for source in [each for each in sources if not each.causal and each.width] or sources:
        if isinstance(source, SideBySide):
            for reader in source.readers:
                reader.ids(prompts)
        elif isinstance(source, AsFed):
            source.fed.check(prompts)


def short_enough(pipe: Any, prompts: Sequence[str], length: int = 0) -> list[str]:
    """Those of some prompts that all of a pipeline's text encoders read whole."""
    long: set[str] = set().union(*(source.too_long(prompts) for source in _sources(pipe, length)))
    return [prompt for prompt in prompts if prompt not in long]


def part_widths(pipe: Any) -> tuple[int, ...]:
    """How wide each text encoder's part of a row is where rows are cut into parts; of most families one makes all of it.

    Raises:
        ErasureCompatibilityError, ErasureInputError: see [`row_sources`].
    """
    first = row_sources(pipe)[0]
    if isinstance(first, SideBySide) and family_of(pipe).door is None:
        return tuple(reader.width for reader in first.readers)
    return (first.width,)
