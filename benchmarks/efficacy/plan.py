"""What is erased and drawn: the halves, the scenarios, and every prompt with its seed. Nothing runs here."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from diffusers_erasure.demo.words import BROADER, HYPERNYMS, OBJECTS, STYLES, SYNONYMS
from tools.demo_model.captions import STYLED_TEMPLATES


HALVES = ("dev", "report")
STYLE_HALVES = {"dev": ("noto", "twemoji", "fluent"), "report": ("flat", "ink")}
# One of each of eight hypernyms, each with a synonym.
SINGLES = {
    "dev": ("cat", "duck", "octopus", "bee", "grapes", "pizza", "airplane", "umbrella"),
    "report": ("dog", "penguin", "fish", "butterfly", "cherry", "hamburger", "rocket", "crown"),
}
# The captions' wordings but "a picture of a ...", which begins as a template of UCE does.
WORDINGS = tuple(template for template in STYLED_TEMPLATES if not template.startswith("a picture"))
NEAREST = 5

Neighbours = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Shot:
    """
    One image to draw.

    Args:
        cell (`str`): `"erased"`, `"synonyms"`, `"kept"` or `"near"`.
        concept (`str`): The target or the kept concept that the prompt names.
        object (`str`): The object that the prompt names, in its own word.
        style (`str`): The style that the prompt names.
        wording (`str`): The template of the prompt.
        prompt (`str`): The prompt.
        seed (`int`): Of the first noise.
    """

    cell: str
    concept: str
    object: str
    style: str
    wording: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Job:
    """
    One erasure and the images that show what it does.

    Args:
        scenario (`str`): The table that it belongs to.
        targets (`tuple[str, ...]`): What is erased: objects or styles.
        near (`tuple[str, ...]`): The kept concepts that are nearest to a target.
        shots (`tuple[Shot, ...]`): The images.
        shown (`tuple[int, ...]`): Which of the images a contact sheet shows.
    """

    scenario: str
    targets: tuple[str, ...]
    near: tuple[str, ...]
    shots: tuple[Shot, ...]
    shown: tuple[int, ...] = ()

    @property
    def of_styles(self) -> bool:
        return self.targets[0] in STYLES

    def cell(self, name: str) -> list[int]:
        """The places of a cell's shots. Where the nearest concepts have no shots of their own, they share the kept ones."""
        places = [i for i, shot in enumerate(self.shots) if shot.cell == name]
        if name == "near" and not places:
            places = [i for i in self.cell("kept") if self.shots[i].concept in self.near]
        return places


@dataclass(frozen=True)
class Counts:
    """How many images one erasure gets in each cell."""

    erased: int
    kept: int
    near: int = 0
    synonyms: int = 0

    def scaled(self, factor: float) -> Counts:
        return Counts(
            *(max(1, round(n * factor)) if n else 0 for n in (self.erased, self.kept, self.near, self.synonyms))
        )


# Scenario -> images of one erasure; with the report half 2,648 for a method, and at least 200 in each cell of a table.
ONE_OBJECT, ONE_STYLE, EIGHT, HALF = "one object", "one style", "8 objects at once", "32 objects at once"
COUNTS = {
    ONE_OBJECT: Counts(25, 25, 25, 25),  # for each of eight
    ONE_STYLE: Counts(100, 100),  # for each of two
    EIGHT: Counts(200, 200, 200, 200),
    HALF: Counts(224, 224, 0, 200),
}


def split() -> dict[str, tuple[str, ...]]:
    """The objects of each half: every second one, hypernym by hypernym."""
    groups: dict[str, list[str]] = {}
    for name, hypernym in HYPERNYMS.items():
        groups.setdefault(hypernym, []).append(name)
    in_groups = [name for group in groups.values() for name in group]
    halves = {half: set(in_groups[i::2]) for i, half in enumerate(HALVES)}
    return {half: tuple(name for name in OBJECTS if name in names) for half, names in halves.items()}


def retained(targets: Sequence[str], anchors: Sequence[str]) -> list[str]:
    """What every method is told to keep: the model's objects, styles and hypernyms but the targets and anchors."""
    words = dict.fromkeys((*OBJECTS, *STYLES, *sorted(set(HYPERNYMS.values()))))
    return [word for word in words if word not in targets and word not in anchors]


def members(hypernym: str) -> set[str]:
    """The objects that the model's captions call by a hypernym."""
    return {name for name, direct in HYPERNYMS.items() if hypernym in (direct, BROADER.get(direct))}


def find_neighbours(pipe: Any) -> Neighbours:
    """For each object all the others, the nearest first: by cosine of the last word piece's rows less their mean."""
    import torch

    encoded = []
    for name in OBJECTS:
        tokens = pipe.tokenizer(name, return_tensors="pt").input_ids  # the end token last
        with torch.no_grad():
            encoded.append(pipe.text_encoder(tokens)[0][0, -2].double())
    rows = torch.stack(encoded)
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    order = (rows @ rows.T).argsort(dim=1, descending=True, stable=True).tolist()
    return {name: [OBJECTS[j] for j in order[i] if j != i] for i, name in enumerate(OBJECTS)}


def make_jobs(half: str, neighbours: Neighbours, scale: float = 1.0, smoke: bool = False) -> list[Job]:
    """
    All erasures of a half with their images, the same ones for every method.

    Args:
        half (`str`): `"dev"` or `"report"`.
        neighbours (`Mapping`): See [`find_neighbours`].
        scale (`float`, *optional*, defaults to 1.0): Share of the images.
        smoke (`bool`, *optional*, defaults to `False`): One object and two images in each cell.
    """
    singles: tuple[str, ...] = SINGLES[half]
    counts = {name: each.scaled(scale) for name, each in COUNTS.items()}
    if smoke:
        singles, counts[ONE_OBJECT] = singles[:1], Counts(2, 2, 2, 2)
    jobs = []
    for index, target in enumerate(singles):
        job = object_job(ONE_OBJECT, (target,), neighbours, counts[ONE_OBJECT], turn=index)
        jobs.append(job if index else with_shown(job))
    if not smoke:
        jobs += [style_job(style, counts[ONE_STYLE]) for style in STYLE_HALVES[half]]
        jobs.append(object_job(EIGHT, singles, neighbours, counts[EIGHT]))
        jobs.append(object_job(HALF, split()[half], neighbours, counts[HALF]))
    check_unseen(jobs)
    return jobs


def object_job(scenario: str, targets: tuple[str, ...], neighbours: Neighbours, counts: Counts, turn: int = 0) -> Job:
    """The erasure of some objects; the `turn`-th of several samples other kept ones than those before."""
    # In strides, so that a few in a row are not all animals; 11 shares no factor with the numbers of kept objects.
    kept = [name for name in OBJECTS if name not in targets]
    kept = [kept[11 * i % len(kept)] for i in range(len(kept))]
    near_each = [[name for name in neighbours[target] if name in kept][:NEAREST] for target in targets]
    synonyms = {name: SYNONYMS[name] for name in targets if name in SYNONYMS}
    shots = [
        *spread("erased", targets, counts.erased),
        *(spread("synonyms", tuple(synonyms), counts.synonyms, words=synonyms) if synonyms else ()),
        *spread("kept", kept, counts.kept, start=turn * counts.kept),
        *spread("near", [name for near in near_each for name in near], counts.near),
    ]
    near = dict.fromkeys(name for names in near_each for name in names)
    return Job(scenario, targets, tuple(near), tuple(shots))


def spread(
    cell: str, concepts: Sequence[str], total: int, start: int = 0, words: Mapping[str, Sequence[str]] | None = None
) -> list[Shot]:
    """Images of objects in turn; each object's go through all styles and wordings, and so do neighbouring objects'."""
    shots, drawn = [], Counter[str]()
    for i in range(start, start + total):
        turn, place = divmod(i, len(concepts))
        name = concepts[place]
        style = STYLES[(turn + place) % len(STYLES)]
        wording = WORDINGS[(turn + turn // len(STYLES) + place + place // len(STYLES)) % len(WORDINGS)]
        word = words[name][turn % len(words[name])] if words else name
        shots.append(shot(cell, name, (name, style), wording, word, drawn))
    return shots


def style_job(target: str, counts: Counts) -> Job:
    """The erasure of a style. Kept are the other styles, which are also its nearest."""
    others = tuple(style for style in STYLES if style != target)
    shots = []
    for cell, styles, total in (("erased", (target,), counts.erased), ("kept", others, counts.kept)):
        pairs, drawn = list(product(OBJECTS, styles)), Counter[str]()
        for i in range(total):
            name, style = pairs[37 * i % len(pairs)]
            shots.append(shot(cell, style, (name, style), WORDINGS[i % len(WORDINGS)], name, drawn))
    return Job(ONE_STYLE, (target,), others, tuple(shots))


def shot(cell: str, concept: str, pair: tuple[str, str], wording: str, word: str, drawn: Counter[str]) -> Shot:
    """One image. Its seed depends on the cell, the prompt and how often that was drawn before, and on nothing else."""
    name, style = pair
    prompt = wording.format(object=word, style=style)
    seed = zlib.crc32(f"{cell}: {prompt}: {drawn[prompt]}".encode())
    drawn[prompt] += 1
    return Shot(cell, concept, name, style, wording, prompt, seed)


def with_shown(job: Job) -> Job:
    """Mark images for the contact sheet: of the target, of its nearest kept neighbour, and of two other objects."""
    nearest = [i for i in job.cell("near") if job.shots[i].concept == job.near[0]]
    family = {HYPERNYMS[name] for name in (*job.targets, job.near[0])}
    others = [i for i in job.cell("kept") if HYPERNYMS[job.shots[i].object] not in family]
    shown = (*job.cell("erased")[:3], *nearest[:3], *others[:2])
    return Job(job.scenario, job.targets, job.near, job.shots, shown)


def fitting_prompts(targets: Sequence[str], anchors: Sequence[str]) -> set[str]:
    """All prompts that a method may have been fitted on: its templates around targets, anchors and retained words."""
    from diffusers_erasure.settings.texts import TEMPLATES

    words = (*targets, *anchors, *retained(targets, anchors))
    templates = {template for group in TEMPLATES.values() for template in group}
    return {template.format(word) for template in templates for word in words}


def check_unseen(jobs: Sequence[Job]) -> None:
    """Assert that no image is drawn from a prompt that was fitted on, and that no synonym was."""
    synonyms = {word for words in SYNONYMS.values() for word in words}
    for job in jobs:
        fitted = fitting_prompts(job.targets, [HYPERNYMS.get(target, "") for target in job.targets])
        seen = sorted(fitted & ({shot.prompt for shot in job.shots} | synonyms))
        assert not seen, f"{seen[:3]} are used in fitting and in testing"
