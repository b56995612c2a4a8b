"""The captions that the embedded model is trained on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from diffusers_erasure.demo.dataset import Dataset
from diffusers_erasure.demo.words import BROADER, HYPERNYMS, PLAIN_TEMPLATES, STYLED_TEMPLATES, SYNONYMS


SYNONYM_SHARE = 0.15
HYPERNYM_SHARE = 0.10
PLAIN_SHARE = 0.15
EMPTY_SHARE = 0.10

# Words that no caption has but a prompt may: the tokenizer should not fall to single letters on them.
EXTRA_WORDS = ("object", "person", "photo", "painting", "drawing", "sketch", "artwork", "art")


@dataclass(frozen=True)
class ObjectWords:
    """
    How captions may call an object.

    Args:
        name (`str`): Its own word.
        synonyms (`tuple[str, ...]`): Other words that mean this object alone.
        hypernyms (`tuple[str, ...]`): More general words, which other objects share.
    """

    name: str
    synonyms: tuple[str, ...]
    hypernyms: tuple[str, ...]


class Captions:
    """
    Draws captions.

    Args:
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]):
            Its objects and styles. For objects of the embedded model the lists in `words.py` are used; for others, the
            keywords in the json which no second object has.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.styles = dataset.styles
        shared = Counter(keyword for keywords in dataset.keywords for keyword in set(keywords))
        taken = {*dataset.objects, *dataset.styles, *HYPERNYMS.values(), *BROADER.values()}
        self.words = []
        for name, keywords in zip(dataset.objects, dataset.keywords, strict=True):
            own = tuple(keyword for keyword in keywords if shared[keyword] == 1 and keyword not in taken)
            hypernym = HYPERNYMS.get(name) or _known_hypernym(keywords)
            hypernyms = (hypernym, BROADER[hypernym]) if hypernym in BROADER else (hypernym,)
            synonyms = SYNONYMS.get(name, ()) if name in HYPERNYMS else own
            self.words.append(ObjectWords(name, synonyms, hypernyms))

    def draw(self, object_index: int, style_index: int, rng: random.Random) -> str:
        """One caption of a picture: mostly its own words, at times more general ones, at times none."""
        words = self.words[object_index]
        kind = rng.random()
        name = words.name
        if kind < HYPERNYM_SHARE:
            name = rng.choice(words.hypernyms)
        elif kind < HYPERNYM_SHARE + SYNONYM_SHARE and words.synonyms:
            name = rng.choice(words.synonyms)
        kind = rng.random()
        if kind < EMPTY_SHARE:
            return ""
        templates = PLAIN_TEMPLATES if kind < EMPTY_SHARE + PLAIN_SHARE else STYLED_TEMPLATES
        return rng.choice(templates).format(object=name, style=self.styles[style_index])

    def corpus(self) -> Iterator[str]:
        """All captions with each object's words, the common ones first and most often: what the tokenizer learns from."""
        for words in self.words:
            for name in (words.name, *words.synonyms, *words.hypernyms):
                for template in PLAIN_TEMPLATES:
                    yield template.format(object=name)
                for template in STYLED_TEMPLATES:
                    for style in self.styles:
                        yield template.format(object=name, style=style)
        yield from EXTRA_WORDS


def _known_hypernym(keywords: tuple[str, ...]) -> str:
    known = {*HYPERNYMS.values(), *BROADER.values()}
    return next((keyword for keyword in keywords if keyword in known), "thing")
