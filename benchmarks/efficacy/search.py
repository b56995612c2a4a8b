"""Which settings erase and keep best? A search by successive halving over the development half, on several tiny models.

    python -m benchmarks.efficacy.search METHOD ... [--jobs 2] [--worlds NAME ...] [--json PATH] [--write-docs]

A method's candidates are all combinations of a few settings (below), or so many of them as are drawn with a fixed seed, and the
method as it is among them. In each round they erase some objects one at a time, eight at once and 32 at once, and draw images; the best
quarter goes on to a round of more images. Where a probe decides whether a map acts, the first round asks the gates alone, of all prompts.

A candidate's score is the mean, over models and scenarios, of the harmonic mean of (1 - acc_e over the anchor prompt's own on the same
noise) and (acc_r of the un-erased model's, at most 1). What is finished is kept in `--store`, so a run that was broken off goes on where it
was; the report half is never looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.command import (
    add_store_arguments,
    arguments,
    finish,
    made_by,
    markdown_table,
    print_table,
    start,
    store_of,
    write_page,
)
from benchmarks.drawing import draw
from benchmarks.efficacy.methods import BASELINE, EMBEDDED, ENTRIES, Entry
from benchmarks.efficacy.numbers import Seen, harmonic, is_seen
from benchmarks.efficacy.plan import ONE_OBJECT, ONE_STYLE, Job, find_neighbours, make_jobs
from benchmarks.efficacy.tables import FLOOR
from benchmarks.efficacy.units import steps_of
from benchmarks.store import Store, do_all
from diffusers_erasure import ErasureInputError
from diffusers_erasure.demo import load_judge, load_pipeline
from diffusers_erasure.demo.drawing import BATCH, fast_pipeline
from diffusers_erasure.demo.worlds import WORLDS
from diffusers_erasure.encoding import pooled_source, row_sources
from diffusers_erasure.layers.gated_map import Probes


PAGE = "docs/search.md"
SEED = 0
TARGETS, KEPT = ("erased", "synonyms"), ("kept", "near")  # cells
MOST = 12  # candidates of a method
SINGLES = 3  # objects that are erased one at a time
SHARE = 4  # of the candidates one in so many goes on
# The share of all images of the development half, in each round; GATES draws none.
GATES, ROUNDS = 0.0, (0.1, 0.4)
SPACES: dict[str, dict[str, tuple[Any, ...]]] = {
    "gated": {"share": (0.4, 0.55, 0.7), "probe_ridge": (1e-2, 3e-2, 1e-1)},
    "uce": {
        "rows": ("last", "window"),
        "retain_scale": (1.0, 3.0, 10.0),
        "retain_templates": (False, True),
        "lamb": (1e-3, 1e-2),
        "push": (0.0, 0.3, 0.5),
    },
    "rece": {
        "reg": (1e-4, 1e-3, 1e-2),
        "epochs": (1, 3),
        "lamb": (1e-3, 1e-2),
        "retain_scale": (1.0, 10.0),
        "push": (0.0, 0.5),
    },
    "speed": {
        "threshold": (1e-5, 1e-4, 1e-3),
        "ridge": (1e-4, 1e-3),
        "rows": ("last", "window"),
        "push": (0.0, 0.3, 0.5),
    },
    "dp": {
        "threshold": (1e-4, 1e-3),
        "ridge": (1e-4, 1e-3),
        "retain_scale": (0.3, 1.0, 3.0),
        "retain_templates": (False, True),
        "push": (0.3, 0.6, 1.0),
    },
}
# What the best of the round without images are combined with.
MAPS: dict[str, dict[str, tuple[Any, ...]]] = {"gated": {"push": (0.0, 0.2, 0.4)}}
# Where linear forms are compared: T5 puts a word into every row, and a causal encoder into all rows after it.
LINEAR_WORLDS = (EMBEDDED, "flux")


@dataclass(frozen=True)
class Candidate:
    """A method with some settings, `((name, value), ...)`; none is the method as it is."""

    method: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def entry(self) -> Entry:
        """As a row of the tables of efficacy."""
        known = ENTRIES[self.method]
        if not known.erases:
            return known
        more = {"stock": "none"} if self.method == "gated" else {}  # what stock diffusers gets is not looked at here
        settings = {**known.settings, "compare": False, **more, **dict(self.settings)}
        return dataclasses.replace(known, settings=settings)

    def __str__(self) -> str:
        return ", ".join(f"`{name}={value!r}`".replace("'", '"') for name, value in self.settings) or "as it is"


@dataclass(frozen=True)
class Trial:
    """One erasure of a candidate with its images, or with scale 0 what its gates say of all prompts."""

    candidate: Candidate
    world: str
    job: Job
    scale: float
    strength: float = 1.0  # of loading

    def identity(self) -> dict[str, Any]:
        entry = self.candidate.entry
        return {
            **{"entry": entry.identity(self.job.targets), "world": self.world, "scale": self.scale},
            **{"job": dataclasses.asdict(self.job)},
            **({"strength": self.strength} if self.strength != 1 else {}),
        }


def combinations(of: Candidate, space: Mapping[str, Sequence[Any]]) -> list[Candidate]:
    """A candidate with all combinations of further settings, where `None` leaves one as it is."""
    return [
        Candidate(of.method, (*of.settings, *((n, v) for n, v in zip(space, values, strict=True) if v is not None)))
        for values in itertools.product(*space.values())
    ]


def candidates(method: str) -> list[Candidate]:
    """The method as it is, and all combinations of its space, or some."""
    found = combinations(Candidate(method), SPACES[method])
    return [Candidate(method), *(random.Random(SEED).sample(found, MOST - 1) if len(found) >= MOST else found)]


def rounds_of(method: str) -> tuple[float, ...]:
    """The share of images in each of a method's rounds."""
    return (GATES, *ROUNDS) if method == "gated" else ROUNDS


def jobs_of(scale: float, neighbours: Any, half: str = "dev") -> list[Job]:
    """The erasures of a round: some objects alone, eight and 32 at once, with the images of targets and of what is kept."""
    found, alone = [], 0
    for job in make_jobs(half, neighbours, scale or 1.0):
        alone += job.scenario == ONE_OBJECT
        if job.scenario == ONE_STYLE or (job.scenario == ONE_OBJECT and alone > SINGLES):
            continue
        shots = tuple(shot for shot in job.shots if shot.cell in ("erased", "kept") or not scale)
        found.append(Job(job.scenario, job.targets, job.near, shots))
    return found


# ---------------------------------------------------------------------------------------------------- one trial


def run_trial(trial: Trial, store: Store) -> dict[str, Any]:
    """Make the erasure, and draw, or ask its gates."""
    entry, job = trial.candidate.entry, trial.job
    try:
        erasure = entry.make(job.targets, trial.world)
    except ErasureInputError:  # such settings leave nothing to erase there: the worst there is
        return {"right": [shot.cell in TARGETS for shot in job.shots]}
    pipe = fast_pipeline(load_pipeline(trial.world))
    if not trial.scale:
        return {"right": gates_right(erasure, pipe, job)}
    if erasure is not None:
        pipe.load_erasure(erasure, strength=trial.strength)
    prompts = [entry.prompt(shot, job.targets) for shot in job.shots]
    images = draw(pipe, prompts, [shot.seed for shot in job.shots], steps_of(trial.world), BATCH)
    looked = load_judge().predict(images, BATCH)
    seen = [Seen(name, style, 0.0, 0.0) for name, style in zip(looked.objects, looked.styles, strict=True)]
    return {"right": [bool(is_seen(job, shot, each)) for shot, each in zip(job.shots, seen, strict=True)]}


def gates_right(erasure: Any, pipe: Any, job: Job) -> list[bool]:
    """For each shot what the judge would see if maps were perfect: the named thing where no gate opens, and else not."""
    layer = next(each for each in erasure.config.layers if each.kind == "gated_map")
    tensors = erasure.layer_tensors(layer)
    sources, device, count = row_sources(pipe, before_norm=True), torch.device("cpu"), len(job.targets)
    names = ("probes", "thresholds", "probe_counts")

    def probes(prefix: str) -> Probes:
        w, t, n = (tensors[prefix + name].float() for name in names)
        return Probes([(w, t, n, 0)], count, device)

    of_rows = probes("")
    vectors = pooled_source(pipe) if "pooled_probes" in tensors else None
    of_vectors = None if vectors is None else probes("pooled_")
    prompts = list(dict.fromkeys(shot.prompt for shot in job.shots))
    rows = [torch.cat(parts).float() for parts in zip(*(source.all(prompts)[0] for source in sources), strict=True)]
    is_open = torch.cat([of_rows(each[None]).any(1) for each in rows])
    if of_vectors is not None and vectors is not None:
        is_open |= of_vectors(vectors.last(prompts).float()[:, None]).any(1)
    known = dict(zip(prompts, (~is_open).tolist(), strict=True))
    return [known[shot.prompt] for shot in job.shots]


# -------------------------------------------------------------------------------------------------- the halving


@dataclass(frozen=True)
class Score:
    """What a candidate reached in a round: the score, and by (world, scenario) acc_e, its floor, and acc_r of the un-erased."""

    value: float
    cells: Mapping[tuple[str, str], tuple[float, float, float]]


def scored(results: Mapping[Trial, Any], candidate: Candidate, trials: Sequence[Trial]) -> Score:
    """The score of a candidate from its trials and those of the two baselines."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.world, trial.job.scenario), []).append(trial)
    cells = {}
    for key, own in groups.items():

        def share(who: Candidate, cell: tuple[str, ...], own: Sequence[Trial] = own) -> float:
            hits = [
                results[trial if who == candidate else dataclasses.replace(trial, candidate=who, strength=1.0)][
                    "right"
                ][place]
                for trial in own
                for place, shot in enumerate(trial.job.shots)
                if shot.cell in cell
            ]
            return statistics.mean(hits)

        if own[0].scale:
            floor, base = share(Candidate(FLOOR), TARGETS), share(Candidate(BASELINE), KEPT)
        else:
            floor, base = 0.0, 1.0
        cells[key] = share(candidate, TARGETS), floor, share(candidate, KEPT) / base
    values = [float(harmonic(1 - max(0.0, e - floor), min(1.0, r))) for e, floor, r in cells.values()]
    return Score(statistics.mean(values), cells)


def search(
    method: str, worlds: Sequence[str], store: Store, jobs: int, smoke: bool = False
) -> list[tuple[float, list[tuple[Candidate, Score]]]]:
    """The rounds of a search: the share of images, and the candidates with their scores, the best first."""
    neighbours = find_neighbours(fast_pipeline())
    left, rounds = candidates(method)[: 2 if smoke else None], []
    for scale in rounds_of(method)[: 1 if smoke else None]:
        erasures = jobs_of(scale, neighbours)[: 1 if smoke else None]
        drawn = [*left, Candidate(FLOOR), Candidate(BASELINE)] if scale else left
        trials = {each: [Trial(each, world, job, scale) for world in worlds for job in erasures] for each in drawn}
        wanted = [trial for own in trials.values() for trial in own]
        results = do_all(
            wanted,
            run_trial,
            store,
            jobs,
            label=f"{method}, {len(left)} candidates",
            size=lambda t: 1 + len(t.job.shots),
        )
        scores = [(each, scored(results, each, trials[each])) for each in left]
        scores.sort(key=lambda pair: -pair[1].value)
        rounds.append((scale, scores))
        print_table(title_of(method, scale), head_of(scores), rows_of(scores))
        best = [each for each, _ in scores[: max(2, -(-len(scores) // SHARE))]]
        best = [*best, Candidate(method)]  # as it is too, so that both are seen on the same images
        left = list(dict.fromkeys(each for of in best for each in ([of] if scale else combinations(of, MAPS[method]))))
    return rounds


# ---------------------------------------------------------------------------------------------------- the tables


def rows_of(scores: Sequence[tuple[Candidate, Score]]) -> list[tuple[Any, ...]]:
    """A round as rows of a table, in %."""
    return [
        (
            str(candidate),
            f"{100 * score.value:.1f}",
            *(f"{100 * (e - floor):+.1f} / {100 * kept:.1f}" for e, floor, kept in score.cells.values()),
        )
        for candidate, score in scores
    ]


def head_of(scores: Sequence[tuple[Candidate, Score]]) -> tuple[str, ...]:
    """What stands above it."""
    cells = scores[0][1].cells
    return ("settings", "score", *(f"{world}, {scenario}" for world, scenario in cells))


def title_of(method: str, scale: float) -> str:
    return f"{method}: {'gates alone' if not scale else f'{scale:g} of the images'}"


def page(found: Mapping[str, Any], command: str) -> str:
    """The tables for the docs."""
    parts = [
        f"Made by `{command}`. In %: the score; for each model and scenario acc_e over the floor / acc_r of the un-erased model's."
    ]
    for method, rounds in found.items():
        for scale, scores in rounds:
            parts += [f"### {title_of(method, scale)}", "\n".join(markdown_table(head_of(scores), rows_of(scores)))]
    return "\n\n".join(parts)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, smoke="of the embedded model one round of two candidates: to see that it runs")
    add_store_arguments(parser, "search", PAGE)
    parser.add_argument("methods", nargs="+", choices=list(SPACES), metavar="METHOD", help=", ".join(SPACES))
    parser.add_argument(
        "--worlds", nargs="+", choices=list(WORLDS), metavar="NAME", help="models; those a method has by default"
    )
    options = parser.parse_args(given)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(given)
    start(options)
    store, found = store_of(options), {}
    for method in options.methods:
        worlds = options.worlds or (list(WORLDS) if method == "gated" else LINEAR_WORLDS)
        found[method] = search(method, worlds, store, options.jobs, options.smoke)
    numbers = {
        method: [
            {
                "images": scale,
                "candidates": [
                    {
                        "settings": dict(c.settings),
                        "score": s.value,
                        "cells": {" ".join(k): v for k, v in s.cells.items()},
                    }
                    for c, s in scores
                ],
            }
            for scale, scores in rounds
        ]
        for method, rounds in found.items()
    }
    finish(options, "efficacy.search", numbers)
    if options.write_docs:
        write_page(PAGE, "search", page(found, made_by("efficacy.search", given)))


if __name__ == "__main__":
    main()
