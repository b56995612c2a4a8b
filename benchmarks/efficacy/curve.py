"""What is erased against what is kept: a linear form along each of its settings and its strength, against another form of it.

    python -m benchmarks.efficacy.curve [--half dev] [--images-scale 1] [--jobs 2] [--json PATH] [--write-docs]

Eight objects and 32 objects at once, of the embedded model. UCE as it was before its presets were searched and as it is are moved along
ridge and strength, Double Projections along these, the weight of what is retained, what is projected out, `push` and `directions`. Of each
point the last column says how much more it keeps than UCE as it was where that erases as much: between two of its points on a straight
line, and beyond the strongest of them nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from benchmarks.efficacy.methods import BASELINE, EMBEDDED
from benchmarks.efficacy.plan import ONE_OBJECT, find_neighbours
from benchmarks.efficacy.search import Candidate, Trial, jobs_of, run_trial, scored
from benchmarks.efficacy.tables import FLOOR
from benchmarks.store import do_all
from diffusers_erasure.demo.drawing import fast_pipeline


PAGE = "docs/search.md"
HEAD = ("form", "along", "acc_e over the floor", "acc_r of un-erased", "kept more than UCE before, at the same acc_e")
BEFORE = (("push", 0.0), ("retain_scale", 1.0), ("retain_templates", False))  # UCE's presets until they were searched
RIDGES, STRENGTHS = (1e-4, 1e-2, 1e-1), (0.5, 0.75)  # the ridges beside the presets'
# What each form is moved along, one setting at a time; `strength` is that of loading.
FORMS: dict[str, tuple[Candidate, dict[str, tuple[Any, ...]]]] = {
    "UCE before": (Candidate("uce", BEFORE), {"lamb": RIDGES, "strength": STRENGTHS}),
    "UCE": (Candidate("uce"), {"lamb": RIDGES, "strength": STRENGTHS}),
    "DP": (
        Candidate("dp"),
        {
            "ridge": RIDGES,
            "retain_scale": (0.1, 0.3, 3.0),
            "threshold": (1e-5, 1e-3),
            "push": (0.0, 0.3, 0.9),
            "directions": (1, 2, 4),
            "strength": STRENGTHS,
        },
    ),
}


@dataclass(frozen=True)
class Point:
    """A form of a method with one thing moved; `strength` is what it is loaded with."""

    form: str
    along: str
    candidate: Candidate
    strength: float = 1.0


def points() -> list[Point]:
    """All of them, each form as it is first."""
    found = []
    for form, (plain, axes) in FORMS.items():
        found.append(Point(form, "as it was" if plain.settings else "as it is", plain))
        for name, value in ((name, value) for name, values in axes.items() for value in values):
            along = f"`{name}={value!r}`"
            if name == "strength":
                found.append(Point(form, along, plain, value))
            else:
                found.append(Point(form, along, Candidate(plain.method, (*plain.settings, (name, value)))))
    return found


def kept_at(erased: float, known: Sequence[tuple[float, float]]) -> float | None:
    """What points `(acc_e, acc_r)` keep where they leave `erased`: on straight lines over the best of them, `None` beyond them.

    A point counts that keeps more than all that leave less.
    """
    best: list[tuple[float, float]] = []
    for point in sorted(known, key=lambda each: (each[0], -each[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    for (e0, r0), (e1, r1) in itertools.pairwise(best):
        if e0 <= erased <= e1:
            return r0 + (r1 - r0) * (erased - e0) / (e1 - e0)
    if best and erased >= best[-1][0]:  # more left than by any of them: as much is kept with less
        return best[-1][1]
    return None


def measure(options: argparse.Namespace) -> dict[str, list[tuple[Point, float, float, float]]]:
    """By scenario: each point with acc_e over the floor, the floor, and acc_r of the un-erased model's."""
    every = points()[: 2 if options.smoke else None]
    jobs = [
        job
        for job in jobs_of(options.images_scale, find_neighbours(fast_pipeline()), options.half)
        if job.scenario != ONE_OBJECT
    ][: 1 if options.smoke else None]

    def trials(candidate: Candidate, strength: float = 1.0) -> list[Trial]:
        return [Trial(candidate, EMBEDDED, job, options.images_scale, strength) for job in jobs]

    of_point = {point: trials(point.candidate, point.strength) for point in every}
    wanted = [trial for own in of_point.values() for trial in own]
    wanted += [trial for name in (FLOOR, BASELINE) for trial in trials(Candidate(name))]
    results = do_all(
        list(dict.fromkeys(wanted)),
        run_trial,
        store_of(options),
        options.jobs,
        label=f"{len(every)} points",
        size=lambda t: 1 + len(t.job.shots),
    )
    found: dict[str, list[tuple[Point, float, float, float]]] = {}
    for point, own in of_point.items():
        for (_, scenario), (erased, floor, kept) in scored(results, point.candidate, own).cells.items():
            found.setdefault(scenario, []).append((point, erased - floor, floor, kept))
    return found


def rows_of(found: Sequence[tuple[Point, float, float, float]]) -> list[tuple[str, ...]]:
    """The points of a scenario as rows of a table, in %."""
    before = [(erased, kept) for point, erased, _, kept in found if point.form == "UCE before"]
    rows: list[tuple[str, ...]] = []
    for point, erased, _, kept in found:
        known = None if point.form == "UCE before" else kept_at(erased, before)
        more = "–" if known is None else f"{100 * (kept - known):+.1f}"
        rows.append((point.form, point.along, f"{100 * erased:+.1f}", f"{100 * kept:.1f}", more))
    return rows


def page(
    found: Mapping[str, Sequence[tuple[Point, float, float, float]]], options: argparse.Namespace, command: str
) -> str:
    """The tables for the docs."""
    parts = [f"Half: {options.half}. Made by `{command}`. In %."]
    for scenario, own in found.items():
        parts += [f"### {scenario}, along each setting", "\n".join(markdown_table(HEAD, rows_of(own)))]
    return "\n\n".join(parts)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, smoke="two points and one scenario: to see that it runs")
    add_store_arguments(parser, "search", PAGE)
    parser.add_argument("--half", choices=("dev", "report"), default="report")
    parser.add_argument("--images-scale", type=float, default=1.0, metavar="SHARE", help="so many times the images")
    options = parser.parse_args(given)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if not options.images_scale > 0:
        parser.error("--images-scale must be above 0")
    return options


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(given)
    start(options)
    found = measure(options)
    for scenario, own in found.items():
        print_table(scenario, HEAD, rows_of(own))
    numbers = {
        scenario: [
            {**dataclasses.asdict(p), "over": e, "floor": floor, "acc_r_ratio": kept} for p, e, floor, kept in own
        ]
        for scenario, own in found.items()
    }
    finish(options, "efficacy.curve", numbers)
    if options.write_docs:
        write_page(PAGE, "curve", page(found, options, made_by("efficacy.curve", given)))


if __name__ == "__main__":
    main()
