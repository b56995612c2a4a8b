"""Many prompts around a few words, as far as their rows differ: what the gated edit looks at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .. import cache
from .known import listing
from .sources import Source


FIRST = 16  # rows of a prompt where the encoder is causal, or as many as it has words
PADDING, SPREAD = 32, 8  # where it is not: so many rows of padding behind the words, and so many of all others
BATCH = 64  # prompts in one pass


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


def read(
    source: Source, prompts: Sequence[str], *, behind: int | None = None, whole: bool = False, keep: bool = False
) -> dict[str, Text]:
    """Encode prompts.

    Args:
        behind: so many rows behind the words are enough.
        whole: all rows of causal encoders too, not the first ones.
        keep: keep the rows on disk.
    """
    prompts = list(dict.fromkeys(prompts))
    ids = source.ids(prompts)

    def places(own: Sequence[int], length: int) -> list[int]:
        most = length if behind is None else min(length, len(own) + behind)
        if source.causal:
            return list(range(most if whole or behind is not None else min(most, max(FIRST, len(own)))))
        return [place for place in _spread(len(own)) if place < most]

    def make() -> dict[str, torch.Tensor]:
        rows: dict[int, torch.Tensor] = {}
        order = sorted(
            range(len(prompts)), key=lambda i: len(ids[i])
        )  # what is encoded together is as long as the longest
        starts = range(0, len(prompts), BATCH)
        for start in tqdm(starts, desc="encoding contexts", leave=False, disable=len(starts) < 8):
            some = order[start : start + BATCH]
            first = FIRST if behind is None else len(ids[some[-1]]) + behind
            found, _ = source.all([prompts[i] for i in some], None if whole else first)
            rows.update((i, each[places(ids[i], len(each))].float()) for i, each in zip(some, found, strict=True))
        parts = [rows[i] for i in range(len(prompts))]
        counts = torch.tensor([len(each) for each in parts])
        return {"rows": torch.cat(parts) if parts else torch.zeros(0, source.width), "counts": counts}

    key = (*source.key, f"{FIRST} {behind} {whole}")
    held = cache.fetch("contexts", listing(key, prompts, source.pipe), make) if keep and prompts else make()
    parts = held["rows"].float().split(held["counts"].long().tolist()) if prompts else ()
    texts = {}
    for prompt, own, rows in zip(prompts, ids, parts, strict=True):
        where = range(len(rows)) if source.causal else _spread(len(own))[: len(rows)]
        texts[prompt] = Text(rows, tuple(where), tuple(own), source.last_place(own))
    return texts


def _spread(words: int) -> list[int]:
    """Places of a prompt of so many tokens where all rows depend on all of it: those of the padding lie alike behind all prompts."""
    return [*range(words + PADDING), *(words + PADDING + (2 << i) for i in range(SPREAD))]
