"""Many prompts around a few words, as far as their rows differ: what the gated edit looks at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .. import cache
from .known import listing
from .sources import Source


FIRST = 16  # rows of a prompt where the encoder is causal, or as many as it has words; those behind are like the last
PADDING, SPREAD = 32, 8  # where it is not: so many rows of padding behind the words, and so many of all others


@dataclass(frozen=True)
class Text:
    """What one source makes of a prompt.

    Attributes:
        rows: float32 [n, C].
        places: of each its place in the prompt.
        ids: the tokens, special ones too, without padding.
        last: the place of the last word piece.
    """

    rows: torch.Tensor
    places: tuple[int, ...]
    ids: tuple[int, ...]
    last: int

    @property
    def word(self) -> torch.Tensor:
        """The row of the last word piece, [C]."""
        return self.rows[self.places.index(self.last)]

    def at(self, place: int) -> torch.Tensor:
        """The row at a place, [C]."""
        return self.rows[self.places.index(place)]


def read(source: Source, prompts: Sequence[str], *, behind: int | None = None) -> dict[str, Text]:
    """Encode prompts.

    Args:
        behind: so many rows behind the words are enough; what is looked at is then kept on disk.
    """
    prompts = list(dict.fromkeys(prompts))
    ids = source.ids(prompts)

    def places(own: Sequence[int], length: int) -> list[int]:
        return _places(source, own, length if behind is None else min(length, len(own) + behind))

    def make() -> dict[str, torch.Tensor]:
        rows, starts = [], range(0, len(prompts), 64)
        for start in tqdm(starts, desc="encoding contexts", leave=False, disable=len(starts) < 8):
            some = ids[start : start + 64]
            found, _ = source.all(prompts[start : start + 64], FIRST)
            rows += [each[places(own, len(each))].float() for each, own in zip(found, some, strict=True)]
        counts = torch.tensor([len(each) for each in rows])
        return {"rows": torch.cat(rows) if rows else torch.zeros(0, source.width), "counts": counts}

    key = (*source.key, f"{FIRST} {behind}")
    held = (
        cache.fetch("contexts", listing(key, prompts, source.pipe), make) if behind is not None and prompts else make()
    )
    parts = held["rows"].float().split(held["counts"].long().tolist()) if prompts else ()
    texts = {}
    for prompt, own, rows in zip(prompts, ids, parts, strict=True):
        texts[prompt] = Text(rows, tuple(places(own, 1 << 20))[: len(rows)], tuple(own), source.last_place(own))
    return texts


def _places(source: Source, ids: Sequence[int], length: int) -> list[int]:
    """Which rows of a prompt are looked at; those of the padding lie alike behind all prompts."""
    words = len(ids)
    if source.causal:
        return list(range(min(length, max(FIRST, words))))
    near = range(words + PADDING)
    far = [words + PADDING + (2 << i) for i in range(SPREAD)]
    return [place for place in (*near, *far) if place < length]
