"""From what was seen to tables: counts, Wilson intervals, Markdown for docs/modular.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.command import markdown_table, print_table
from benchmarks.reemergence.plan import ERASED, KEPT, LEARNT


Z = 1.959963984540054  # 95 %


@dataclass(frozen=True)
class Share:
    """How many of how many images, with the 95 % Wilson interval of the share."""

    hits: int
    images: int

    @property
    def value(self) -> float:
        return self.hits / self.images

    @property
    def interval(self) -> tuple[float, float]:
        n, share = self.images, self.value
        middle = share + Z**2 / (2 * n)
        half = Z * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
        return max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} [{100 * low:.0f}–{100 * high:.0f}]"

    def numbers(self) -> dict[str, float]:
        low, high = self.interval
        return {"hits": self.hits, "images": self.images, "share": self.value, "low": low, "high": high}


def share(hits: Sequence[Sequence[bool]]) -> Share:
    """All images of several concepts and seeds together."""
    return Share(sum(map(sum, hits)), sum(map(len, hits)))


def discordant(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> tuple[int, int]:
    """Images of the same prompt and noise in which only the first, and only the second, shows it."""
    pairs = [pair for a, b in zip(first, second, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def headings(steps: Sequence[int]) -> list[str]:
    """The columns: the erased concept after each number of steps; the rest before and after all of them."""
    last = steps[-1]
    return [
        "fine-tuned on",
        "way",
        *(f"acc_e, {step} steps" for step in (0, *steps)),
        "acc_r, 0",
        f"acc_r, {last}",
        "trained on, 0",
        f"trained on, {last}",
        f"loss, 0 → {last}",
        "cos(ΔW_ft, −ΔW_safe)",
        "undone",
    ]


def row_cells(row: Mapping[str, Any], steps: Sequence[int]) -> list[str]:
    """One row of a table."""
    last = steps[-1]

    def cell(name: str, step: int) -> str:
        found = row["shares"].get((name, step))
        return "–" if found is None else str(found)

    against = row.get("against")
    return [
        row["data"],
        row["way"],
        *(cell(ERASED, step) for step in (0, *steps)),
        *(cell(name, step) for name in (KEPT, LEARNT) for step in (0, last)),
        " → ".join(f"{value:.3f}" for value in row["loss"]),
        *(["–", "–"] if against is None else [f"{against['cosine']:+.3f}", f"{100 * against['undone']:+.1f}"]),
    ]


def tables(report: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """For each method the header and the rows."""
    steps = report["steps"]
    return {
        method: [headings(steps), *(row_cells(row, steps) for row in part["rows"])]
        for method, part in report["methods"].items()
    }


def concept_tables(report: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """For each method acc_e after the last step by erased concept, in counts."""
    result = {}
    for method, part in report["methods"].items():
        header = ["fine-tuned on", "way", *(f"{name}: 0 → {report['steps'][-1]}" for name in report["concepts"])]
        body = [
            [row["data"], row["way"], *(f"{a} → {b} of {n}" for a, b, n in row["by_concept"].values())]
            for row in part["rows"]
        ]
        result[method] = [header, *body]
    return result


def print_report(report: Mapping[str, Any]) -> None:
    by_concept = concept_tables(report)
    for method, (header, *rows) in tables(report).items():
        print_table(f"Erased by {method}; in %, [95 %]", header, rows)
        for data, (first, second) in report["methods"][method]["discordant"].items():
            print(f"{data}, last step: seen only with sequential {first}, only with modular {second}")
        header, *rows = by_concept[method]
        print_table("acc_e by concept, images", header, rows)
    right, total = report["new_objects"]["validation"]
    print(f"\nNearest centroid on real pictures, augmented: {right} of {total} right.")
    print(f"{report['cpu_seconds']:.0f} CPU-seconds in all, stored parts included.")


def as_json(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with plain keys and values."""
    methods = {}
    for method, part in report["methods"].items():
        rows = [
            {**row, "shares": {f"{cell}, {step}": each.numbers() for (cell, step), each in row["shares"].items()}}
            for row in part["rows"]
        ]
        methods[method] = {**part, "rows": rows}
    return {**report, "methods": methods}


def markdown(report: Mapping[str, Any], command: str) -> str:
    """The tables of a run, for the docs."""
    right, total = report["new_objects"]["validation"]
    lines = [
        f"Made by `{command}`. In %, 95 % Wilson intervals in brackets.",
        f"Erased, one at a time: {', '.join(report['concepts'])}. Seeds: {', '.join(map(str, report['seeds']))}. "
        f"Related objects: {'; '.join(f'{name}: ' + ', '.join(near) for name, near in report['related'].items())}.",
        f"Nearest centroid on real pictures, augmented: {right} of {total} right; chance is "
        f"{100 / report['new_objects']['objects']:.1f} %.",
    ]
    by_concept = concept_tables(report)
    for method, (header, *body) in tables(report).items():
        lines += ["", f"### Erased by {method}", "", *markdown_table(header, body)]
        for data, (only_sequential, only_modular) in report["methods"][method]["discordant"].items():
            lines += [
                "",
                f"{data[0].upper()}{data[1:]}, same prompts and noise after the last step: the erased concept is seen "
                f"only with `sequential` in {only_sequential} images, only with `modular` in {only_modular}.",
            ]
        header, *body = by_concept[method]
        lines += ["", "acc_e by concept, images:", "", *markdown_table(header, body)]
    return "\n".join(lines)
