"""What the gated edit looks at: names in contexts, what is kept in contexts, and the rows of their prompts."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..encoding import check_prompts, short_enough
from ..encoding.contexts import Text, read
from ..encoding.sources import Source
from ..errors import ErasureInputError
from ..lists import read_list
from ..schema import Concept
from ..settings.texts import without_concept
from .gated_settings import Settings
from .holding import SAME
from .rows import aligned


BEHIND = 4  # rows of a kept prompt behind its words that are told apart from a name's
SETTING, TESTING = 2, 3  # of four contexts the one that sets thresholds, and the one that tests them
VARIANTS = 6  # contexts of a plural, or of a name in other letters, at most
MOST = 2400  # kept prompts, about
FEW = 3  # contexts of a kept word
WHOLE = 24  # of each kind that are looked at with all their rows, long ones apart
LONG = (20, 10, 5)  # kept words in a row that make a long prompt
# Of two kept words: things, and what is said of them.
PAIRS = (
    *("a {} and a {}", "{}, {}", "{} on {}", "a {} {}", "a {} with a {}", "a picture of {}, {}", "the {} of a {}"),
    *("{} {}", "{} or {}", "my {}, made of {}", "a {} near the {}", "{}: {}", "a {} like a {}"),
)


@dataclass(frozen=True)
class Split:
    """Contexts by what they are for; few do everything."""

    fitting: tuple[str, ...]
    setting: tuple[str, ...]
    testing: tuple[str, ...]

    @classmethod
    def of(cls, contexts: Sequence[str]) -> "Split":
        if len(contexts) < 4:
            return cls(*(tuple(contexts),) * 3)
        setting, testing = tuple(contexts[SETTING::4]), tuple(contexts[TESTING::4])
        held_out = {*setting, *testing}
        return cls(tuple(each for each in contexts if each not in held_out), setting, testing)

    def without(self, contexts: Collection[str]) -> "Split":
        """Without some contexts; a kind of which none would be left takes what is left of the others."""
        kinds = [
            tuple(each for each in kind if each not in contexts) for kind in (self.fitting, self.setting, self.testing)
        ]
        left = tuple(each for kind in kinds for each in kind)
        return Split(
            *(kind or left or own for kind, own in zip(kinds, (self.fitting, self.setting, self.testing), strict=True))
        )

    def first(self, count: int) -> "Split":
        """Fewer, of each kind one at least."""
        kinds = self.fitting[: max(1, count - 2)], self.setting[:1], self.testing[:1]
        return Split(*kinds)

    @property
    def mapped(self) -> tuple[str, ...]:
        """Those that maps are fitted in."""
        return tuple(dict.fromkeys((*self.fitting, *self.setting)))


@dataclass(frozen=True)
class Name:
    """One name of a concept, with a probe of its own."""

    concept: int
    text: str
    split: Split
    made: bool = False  # a plural, or the name in other letters

    def within(self, contexts: Sequence[str]) -> list[str]:
        return [context.format(self.text) for context in contexts]


def names_of(concepts: Sequence[Concept], settings: Settings, reading: "Reading") -> list[Name]:
    """The names that probes look for: the targets, their synonyms, and of both the plural and other letters where tokens differ.

    Each has the contexts in which all encoders read it, and its anchor, whole.
    """
    whole = Split.of(settings.template_list)
    variants = max(3, min(VARIANTS, len(settings.template_list) // 3))
    unknown = sorted(set(settings.synonyms) - {str(concept.target) for concept in concepts})
    if unknown:
        raise ErasureInputError(f"`synonyms` names {unknown[0]!r}, which is no target.")
    found: list[Name] = []
    known: set[str] = set()
    for index, concept in enumerate(concepts):
        target = str(concept.target)
        for given in (target, *settings.synonyms.get(target, ())):
            made = [(given, False), *((each, True) for each in _variants(given, settings.preset == "object"))]
            for text, is_made in made:
                tokens = str([source.ids([text])[0] for source in reading.sources])
                if tokens not in known:
                    known.add(tokens)
                    split = whole.first(variants) if is_made else whole
                    pairs = {
                        context: {context.format(text), anchored(context, concept.anchor)}
                        for context in (*split.mapped, *split.testing)
                    }
                    long = reading.too_long([prompt for pair in pairs.values() for prompt in pair])
                    split = split.without({context for context, pair in pairs.items() if pair & long})
                    found.append(Name(index, text, split, is_made))
    return found


def _variants(name: str, counted: bool) -> list[str]:
    """The plural of what is counted, and other letters."""
    letters = [name.lower(), name[:1].upper() + name[1:], name.title()]
    if not counted or (name.endswith("s") and not name.endswith("ss")):
        return letters
    stem = name[:-1] + "ie" if name.endswith("y") and name[-2:-1] not in "aeiou" else name
    return [stem + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s"), *letters]


class Reading:
    """Rows of prompts from all sources of an input, as far as they were asked for.

    Args:
        apart: whether the pooled vector is made by other encoders than the rows.
    """

    def __init__(self, sources: Sequence[Source], pooled: Source | None, apart: bool = False) -> None:
        self.sources, self.pooled, self.apart = sources, pooled, apart and pooled is not None
        self.texts: list[dict[str, Text]] = [{} for _ in sources]
        self.vectors: dict[str, torch.Tensor] = {}

    def too_long(self, prompts: Sequence[str]) -> set[str]:
        """Those of some prompts that an encoder does not read whole."""
        sources = [*self.sources, *([] if self.pooled is None else [self.pooled])]
        return set().union(*(source.too_long(prompts) for source in sources))

    def readable(self, prompts: Sequence[str]) -> list[str]:
        """The others."""
        long = self.too_long(prompts)
        return [prompt for prompt in prompts if prompt not in long]

    def read(self, prompts: Sequence[str], *, pooled: bool = True, behind: int | None = None) -> None:
        """Encode prompts that were not yet, pooled vectors only where they are wanted; `behind` as [`read`] has it."""
        for source, known in zip(self.sources, self.texts, strict=True):
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
            if new:
                known.update(read(source, new, behind=behind, keep=source.causal))  # T5's rows are many
        if pooled and self.pooled is not None:
            self.vectors_of(prompts)

    def vectors_of(self, prompts: Sequence[str]) -> torch.Tensor:
        """Pooled vectors [N, c], of which there must be some."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.vectors]
        if new:
            assert self.pooled is not None
            self.vectors.update(zip(new, self.pooled.last(new).float(), strict=True))
        return torch.stack([self.vectors[prompt] for prompt in prompts])

    def of_kept(self, short: Sequence[str], whole: Sequence[str]) -> dict[str, torch.Tensor]:
        """The rows of kept prompts that a gate reads, of all sources; of some all rows. Both lists are cached on disk."""
        found: dict[str, torch.Tensor] = {}
        for some, how in ((short, {"behind": BEHIND}), (whole, {"whole": True})):
            parts = [read(source, some, keep=True, **how) for source in self.sources]
            found.update((prompt, torch.cat([part[prompt].rows for part in parts])) for prompt in parts[0])
        return found

    def of(self, prompt: str) -> list[Text]:
        return [texts[prompt] for texts in self.texts]

    def words(self, prompt: str) -> torch.Tensor:
        """The rows of the last word piece, one from each source."""
        return torch.stack([text.word for text in self.of(prompt)])

    def rows(self, prompt: str) -> torch.Tensor:
        """The rows that a gate reads, of all sources."""
        return torch.cat([text.rows[: len(text.ids) + BEHIND] for text in self.of(prompt)])


def read_names(reading: Reading, names: Sequence[Name], concepts: Sequence[Concept]) -> None:
    """Encode names and anchors in their contexts: as many rows as maps are fitted on, and fewer where they only test a gate."""
    long: list[str] = []
    short: list[str] = []
    made: list[str] = []
    for name in names:
        mapped, testing = name.split.mapped, name.split.testing
        anchor = concepts[name.concept].anchor
        long += [anchored(context, anchor) for context in mapped]
        short += [anchored(context, anchor) for context in testing]
        (made if name.made else long).extend(name.within(mapped))
        (made if name.made else short).extend(name.within(testing))
    reading.read(long)
    reading.read(short, behind=BEHIND)
    reading.read(made, pooled=False, behind=BEHIND)


def named_rows(reading: Reading, name: Name, contexts: Sequence[str]) -> torch.Tensor:
    """The rows of a name's last word piece in some contexts, from each source."""
    found = []
    for context in contexts:
        behind = context.partition("{}")[2]
        for source, text in zip(reading.sources, reading.of(context.format(name.text)), strict=True):
            found.append(text.at(_place_of_name(source, context, name.text, text, behind)))
    return torch.stack(found)


def _place_of_name(source: Source, context: str, name: str, text: Text, behind: str) -> int:
    """The place of a name's last word piece: the last one of the prompt that ends with the name."""
    if not behind:
        return text.last
    ids = source.ids([context.partition("{}")[0] + name])[0]
    return min(source.last_place(ids), text.last)


@dataclass(frozen=True)
class Wording:
    """A kept prompt, and the kept words in it."""

    prompt: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, context: str, *words: str) -> "Wording":
        return cls(context.format(*words), words)


def kept_prompts(words: Sequence[str], split: Split, count: int) -> tuple[list[Wording], list[Wording], list[Wording]]:
    """Prompts of what is kept, in which contexts take turns: those to fit probes, to set thresholds, and to test them.

    Each word stands in about so many; where these are few, or would be more than `MOST` prompts, alone and in one more.
    """
    kinds: tuple[list[Wording], list[Wording], list[Wording]] = [Wording(word, (word,)) for word in words], [], []
    contexts = split.fitting, split.setting, split.testing
    if count < FEW or len(words) * (count + 2) > MOST:
        for i, word in enumerate(words):
            turn = min(2, i % 4)
            kinds[turn].append(Wording.of(contexts[turn][i % len(contexts[turn])], word))
        return kinds
    shares = max(1, count // 2 - 1), max(1, count // 4), 1
    for i, word in enumerate(words):
        for kind, own, share in zip(kinds, contexts, shares, strict=True):
            kind += [Wording.of(own[(i + j) % len(own)], word) for j in range(share)]
        for j, kind in enumerate((kinds[0], kinds[0], kinds[1], kinds[2])):
            kind.append(Wording.of(PAIRS[(i + j) % len(PAIRS)], word, words[(i * (j + 2) + 7) % len(words)]))
    return kinds


def long_prompts(words: Sequence[str]) -> tuple[list[Wording], list[Wording], list[Wording]]:
    """Kept words in rows, which reach places that short prompts leave to padding: to fit probes, to set thresholds, and to test them."""
    kinds: tuple[list[Wording], list[Wording], list[Wording]] = [], [], []
    for i in range(WHOLE if words else 0):
        row = random.Random(i).sample(list(words), min(LONG[i % len(LONG)], len(words)))
        kinds[i // len(LONG) % 3].append(Wording.of(", ".join(["{}"] * len(row)), *row))
    return kinds


def evenly(prompts: Sequence[Any], count: int) -> list[Any]:
    """So many of a list, or all, from all parts of it."""
    return [prompts[len(prompts) * i // count] for i in range(count)] if count < len(prompts) else list(prompts)


def kept_words(
    pipe: Any, settings: Settings, concepts: Sequence[Concept], first: Source
) -> tuple[tuple[list[str], list[str]], ...]:
    """What must not open a gate, list by list, each with what prompts are made of: shipped lists whole, so that their prompts are the
    same for all targets and need be encoded once, without those of the entries that say the same as a target."""
    given = list(settings.retain.prompts)
    check_prompts(pipe, given, settings.max_sequence_length)
    shipped = list(dict.fromkeys(word for name in settings.retain.default for word in read_list(name)))
    held = short_enough(pipe, list(settings.retain.held), settings.max_sequence_length)
    if held:
        rows, named = first.last(held), first.last([str(concept.target) for concept in concepts])
        rows, named = rows - rows.mean(0), named - rows.mean(0)
        cosines = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(named, dim=1).T
        held = [word for word, alike in zip(held, cosines.amax(1).tolist(), strict=True) if alike < SAME]
    return (given, given), (held, shipped)


def paired_prompts(concept: Concept, names: Sequence[Name]) -> list[tuple[str, str]]:
    """A concept's prompts, each with its anchor's in the same context."""
    return [
        (context.format(name.text), anchored(context, concept.anchor))
        for name in names
        for context in name.split.mapped
    ]


def paired_rows(reading: Reading, pairs: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of prompts and those that stand in their places in others: twice [n, C]."""
    left, right = [], []
    for one, other in pairs:
        for own, its in zip(reading.of(one), reading.of(other), strict=True):
            lengths = max(own.places) + 1, max(its.places) + 1
            for a, b in zip(*aligned(own.ids, its.ids, lengths), strict=True):
                if a in own.places and b in its.places:
                    left.append(own.at(a))
                    right.append(its.at(b))
    return torch.stack(left), torch.stack(right)


def anchored(context: str, anchor: str | None) -> str:
    """The anchor in a context; without an anchor what is left of the context."""
    return context.format(anchor) if (anchor or "").strip() else without_concept(context)
