"""What is trained on and drawn: pictures with captions, and every prompt with its seed. Nothing runs here."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.efficacy.plan import Neighbours, Shot, members, spread
from diffusers_erasure.demo import load_images, load_unseen_images
from diffusers_erasure.demo.words import HYPERNYMS, OBJECTS, PLAIN_TEMPLATES, STYLED_TEMPLATES, STYLES, SYNONYMS


CONCEPTS = ("cat", "pizza", "rocket")
RELATED = 5  # objects to fine-tune on next to each concept
NEW, NEAR = "new objects", "related objects"
DATA = {
    NEW: "pictures of the 12 objects that the model has never seen",
    NEAR: f"pictures of the {RELATED} objects that are nearest to the erased one, of its own family",
}
ERASED, KEPT, LEARNT = "erased", "kept", "learnt"


@dataclass(frozen=True)
class Counts:
    """Images of one model: whose prompt names the erased concept, other objects, or what was trained on."""

    erased: int = 40
    kept: int = 25
    learnt: int = 24


@dataclass(frozen=True)
class TrainingSet:
    """
    Pictures and how captions call them.

    Args:
        images (`np.ndarray`): uint8 [n, size, size, 3].
        objects (`tuple[str, ...]`): The object in each picture.
        styles (`tuple[str, ...]`): The style of each picture.
    """

    images: np.ndarray
    objects: tuple[str, ...]
    styles: tuple[str, ...]

    def caption(self, index: int, rng: random.Random) -> str:
        """One of the wordings that the model itself was trained with; one in six does not say the style."""
        templates = PLAIN_TEMPLATES if rng.random() < 1 / 6 else STYLED_TEMPLATES
        return rng.choice(templates).format(object=self.objects[index], style=self.styles[index])


def related(concept: str, neighbours: Neighbours, count: int = RELATED) -> tuple[str, ...]:
    """
    The objects next to a concept.

    First those of its hypernym ("pizza": food, so the hamburger), then those that the model's captions also call by it
    (a banana is fruit and food), then any others; in each group the nearest by the text encoder's rows first.
    """
    hypernym = HYPERNYMS[concept]

    def distance(name: str) -> int:
        return 0 if HYPERNYMS[name] == hypernym else 1 if name in members(hypernym) else 2

    return tuple(sorted(neighbours[concept], key=distance)[:count])  # sorting keeps the order within a group


def training_set(data: str, concept: str, neighbours: Neighbours) -> TrainingSet:
    """The pictures of a kind of fine-tuning; those of related objects depend on the concept, which is in none of them."""
    dataset = load_unseen_images() if data == NEW else load_images()
    names = dataset.objects if data == NEW else related(concept, neighbours)
    rows = [dataset.objects.index(name) for name in names]
    size = dataset.size
    return TrainingSet(
        images=dataset.images[rows].reshape(-1, size, size, 3),
        objects=tuple(name for name in names for _ in dataset.styles),
        styles=dataset.styles * len(names),
    )


def never_trained_on(concept: str) -> set[str]:
    """The names of a concept, none of which a caption may hold."""
    return {concept, *SYNONYMS.get(concept, ())}


def shots_for(
    cell: str, concept: str, data: str, neighbours: Neighbours, counts: Counts, seed: int
) -> tuple[Shot, ...]:
    """
    The prompts and first noises of a cell: the same ones for every method, way and number of steps.

    Args:
        cell (`str`): [`ERASED`], [`KEPT`] or [`LEARNT`].
        concept (`str`): The erased concept.
        data (`str`): What is trained on.
        neighbours (`Mapping`): See [`~benchmarks.efficacy.plan.find_neighbours`].
        counts ([`Counts`]): How many.
        seed (`int`): Other noises and other kept objects.
    """
    if cell == ERASED:
        shots = spread(ERASED, (concept,), counts.erased)
    elif cell == LEARNT:
        names = training_set(data, concept, neighbours).objects
        shots = spread(LEARNT, tuple(dict.fromkeys(names)), counts.learnt)
    else:
        # In strides, so that a few in a row are not all animals; 11 shares no factor with 63 less the related ones.
        others = [name for name in OBJECTS if name != concept and name not in related(concept, neighbours)]
        others = [others[11 * i % len(others)] for i in range(len(others))]
        shots = spread(KEPT, others, counts.kept, start=seed * counts.kept)
    return tuple(replace(shot, seed=zlib.crc32(f"{seed}: {shot.seed}".encode())) for shot in shots)


def fine_tuning_captions(objects: Sequence[str]) -> set[str]:
    """Every caption that fine-tuning on these objects may use."""
    templates = (*PLAIN_TEMPLATES, *STYLED_TEMPLATES)
    return {t.format(object=name, style=style) for t in templates for name in objects for style in STYLES}
