"""From numbers to the tables: on the screen, as JSON, and in Markdown for docs/efficacy.md."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.command import markdown_table, print_table
from benchmarks.efficacy.methods import BASELINE, ENTRIES
from benchmarks.efficacy.numbers import Bootstrap, Number, measure, shares_by
from benchmarks.efficacy.plan import ONE_OBJECT, ONE_STYLE, Job
from benchmarks.efficacy.units import Result, Unit


FLOOR = "anchor prompt"
ENOUGH = 200  # images behind a number

# Metric -> heading; the order of the columns.
COLUMNS = {
    "acc_e": "acc_e ↓",
    "over": "over the anchor ↓",
    "acc_e_synonyms": "synonyms ↓",
    "acc_r": "acc_r ↑",
    "acc_r_ratio": "of un-erased ↑",
    "acc_r_near": "five nearest ↑",
    "acc_r_near_ratio": "of un-erased ↑",
    "h_o": "H_o ↑",
    "anchor": "anchor seen ↑",
    "confidence": "confidence",
    "other": "other right ↑",
}


def summarise(
    jobs: Sequence[Job], methods: Sequence[str], results: Mapping[Unit, Result], half: str
) -> dict[str, Any]:
    """All numbers, by scenario and method, with the cells of the printed tables."""
    found = {(unit.method, unit.job): result for unit, result in results.items()}
    scenarios: dict[str, Any] = {}
    for scenario in dict.fromkeys(job.scenario for job in jobs):
        members = [job for job in jobs if job.scenario == scenario]
        baseline = [found[BASELINE, job].seen for job in members]
        floor = [found[FLOOR, job].seen for job in members] if (FLOOR, members[0]) in found else None
        rows, details, fit = {}, {}, {}
        for method in methods:
            if (method, members[0]) not in found:
                continue
            done = [found[method, job] for job in members]
            seen = [each.seen for each in done]
            entry = ENTRIES[method]
            anchors = {
                target: anchor
                for job, each in zip(members, done)
                for target, anchor in (each.anchors or zip(job.targets, entry.anchors(job.targets)))
            }
            rows[method] = measure(members, seen, baseline, anchors, Bootstrap(), floor if entry.erases else None)
            if entry.erases:
                fit[method] = statistics.median(each.fit_seconds for each in done)
            details[method] = {
                "fit_seconds": fit.get(method),
                "draw_seconds": sum(each.draw_seconds for each in done),
                **({"anchors": anchors} if entry.auto_anchors else {}),
                "acc_e_by_target": shares_by(members, seen, "erased", "concept"),
                "acc_e_by_wording": shares_by(members, seen, "erased", "wording"),
            }
        scenarios[scenario] = {
            "targets": list(dict.fromkeys(target for job in members for target in job.targets)),
            "images": images_in(members),
            "methods": {
                method: {**{name: dataclasses.asdict(number) for name, number in row.items()}, **details[method]}
                for method, row in rows.items()
            },
            "table": table(rows, fit),
        }
    return {"half": half, "images": sum(len(job.shots) for job in jobs), "scenarios": scenarios}


def images_in(jobs: Sequence[Job]) -> dict[str, int]:
    """Images behind the numbers of each cell."""
    cells = {name: sum(len(job.cell(name)) for job in jobs) for name in ("erased", "synonyms", "kept", "near")}
    return {name: count for name, count in cells.items() if count}


def table(rows: Mapping[str, Mapping[str, Number]], fit: Mapping[str, float]) -> list[list[str]]:
    """Header and rows of a scenario. `fit` are the processor seconds that making an erasure took."""
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    body = [
        [method, *(show(row.get(name)) for name in names), f"{fit[method]:.1f}" if method in fit else "–"]
        for method, row in rows.items()
    ]
    return [["method", *(COLUMNS[name] for name in names), "fit, s"], *body]


def show(number: Number | None) -> str:
    """`3.5 [1-7]`, in per cent."""
    if number is None or not np.isfinite(number.value):
        return "–"
    return f"{100 * number.value:.1f} [{100 * number.low:.0f}–{100 * number.high:.0f}]"


def print_report(report: Mapping[str, Any]) -> None:
    """The tables on the screen."""
    for scenario, part in report["scenarios"].items():
        cells = ", ".join(f"{name} {count}" for name, count in part["images"].items())
        header, *rows = part["table"]
        print_table(f"{scenario}: {', '.join(part['targets'])}\nimages: {cells}; in %, [95 %]", header, rows)
        if min(part["images"].values()) < ENOUGH:
            print(f"Fewer than {ENOUGH} images behind some of these numbers: a look, nothing to report.")


def markdown(report: Mapping[str, Any], command: str) -> str:
    """The tables of a run, for the docs."""
    lines = [
        f"Half: {report['half']}. {report['images']:,} images for a method. Made by `{command}`. "
        "In %, 95 % intervals in brackets."
    ]
    for scenario, part in report["scenarios"].items():
        cells = ", ".join(f"{name} {count}" for name, count in part["images"].items())
        title = scenario if scenario not in (ONE_OBJECT, ONE_STYLE) else f"{scenario}, one erasure each"
        header, *body = part["table"]
        lines += ["", f"### {title[0].upper()}{title[1:]}", "", f"Erased: {', '.join(part['targets'])}."]
        lines += [f"Images in each cell: {cells}.", "", *markdown_table(header, body)]
    methods = dict.fromkeys(row[0] for part in report["scenarios"].values() for row in part["table"][1:])
    return "\n".join([*lines, "", *legend(methods)])


def legend(methods: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """What the rows' labels mean."""
    return [f"- **{name}**: {ENTRIES[name].summary}." for name in methods if name in ENTRIES]
