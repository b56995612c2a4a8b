"""Does an erased concept come back when users fine-tune? Two ways to ship an erasure, on the embedded model.

    python benchmarks/reemergence.py [--methods esd uce] [--concepts cat pizza rocket] [--jobs 2] [--write-docs]

Users train a LoRA, on new objects and on objects related to the erased one: `sequential`, on an exported erased model;
`modular`, on the clean base, with the erasure loaded beside the LoRA when drawing; `none`, the same LoRA without an
erasure. How it is measured stands in docs/modular.md. Finished parts are kept in `--store`, so a run that was broken
off goes on where it was, and what methods share is done once.

Stored results do not notice changes of the library's code: give `--fresh` after one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
from reemergence_parts import (
    CHECKPOINTS,
    MODULAR,
    NONE,
    SEQUENTIAL,
    Comparison,
    Fit,
    Part,
    Settings,
    Store,
    Training,
    View,
    neighbours,
    new_objects,
    run_all,
)
from reemergence_plan import CONCEPTS, DATA, ERASED, KEPT, LEARNT, NEAR, NEW, Counts, related
from reemergence_report import concept_tables, discordant, markdown, replace_between, share, tables
from reemergence_train import Recipe

from diffusers_erasure.demo import load_pipeline
from diffusers_erasure.demo.words import OBJECTS


ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "build" / "reemergence"
DOCS = ROOT / "docs" / "modular.md"
METHODS = ("esd", "uce")
WAYS = (SEQUENTIAL, MODULAR, NONE)


# ------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Case:
    """One user: who has this erased concept, fine-tunes on this data, in one of the ways."""

    method: str
    concept: str
    data: str
    way: str
    seed: int
    settings: Settings

    @property
    def fit(self) -> Fit:
        return Fit(self.method, self.concept)

    @property
    def training(self) -> Training:
        return Training(
            fit=self.fit if self.way == SEQUENTIAL else None,
            data=self.data,
            concept=self.concept if self.data == NEAR else "",
            seed=self.seed,
            checkpoints=self.settings.checkpoints,
            recipe=self.settings.recipe,
        )

    @property
    def comparison(self) -> Comparison | None:
        return None if self.way == NONE else Comparison(self.fit, self.training)

    def views(self) -> dict[tuple[str, int], View]:
        """By cell and step. The upper bound is drawn before and after alone, the erased concept at each checkpoint."""
        last = self.settings.checkpoints[-1]
        steps = (0, last) if self.way == NONE else (0, *self.settings.checkpoints)
        cells = [(ERASED, step) for step in steps] + [(cell, step) for cell in (KEPT, LEARNT) for step in (0, last)]
        return {(cell, step): self._view(cell, step) for cell, step in cells}

    def _view(self, cell: str, step: int) -> View:
        # Before fine-tuning an exported model and a base with the erasure loaded are the same.
        way = self.way if step or self.way == NONE else MODULAR
        return View(
            way=way,
            fit=None if way == NONE else self.fit,
            training=self.training if step else None,
            step=step,
            cell=cell,
            concept="" if cell == LEARNT and self.data == NEW else self.concept,
            data=self.data if cell == LEARNT else "",
            seed=self.seed,
            settings=self.settings,
        )


def run_cases(cases: Sequence[Case], store: Store, jobs: int) -> dict[Part, dict[str, Any]]:
    """Everything that the cases need, each part once, in three rounds that build on one another."""
    views = [view for case in cases for view in case.views().values()]
    comparisons = [case.comparison for case in cases if case.comparison]
    results: dict[Part, dict[str, Any]] = {}
    for label, parts in (
        ("erasures", [case.fit for case in cases]),
        ("fine-tuning", [case.training for case in cases]),
        ("drawing", [*views, *comparisons]),
    ):
        results |= run_all(dict.fromkeys(parts), store, jobs, label)
    return results


def summarise(
    cases: Sequence[Case], results: Mapping[Part, Mapping[str, Any]], concepts: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """All numbers, by method, data and way."""
    settings = cases[0].settings
    last = settings.checkpoints[-1]
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(case.method for case in cases):
        rows, pairs = [], {}
        for data in dict.fromkeys(case.data for case in cases):
            ends = {}
            for way in WAYS:
                group = [case for case in cases if (case.method, case.data, case.way) == (method, data, way)]
                hits = {key: [results[case.views()[key]]["hits"] for case in group] for key in group[0].views()}
                by_concept = {}
                for concept in concepts:
                    picked = [i for i, case in enumerate(group) if case.concept == concept]
                    first, end = ([hits[ERASED, step][i] for i in picked] for step in (0, last))
                    by_concept[concept] = (share(first).hits, share(end).hits, share(end).images)
                row = {"data": data, "way": way, "by_concept": by_concept}
                row["shares"] = {key: share(each) for key, each in hits.items()}
                compared = [results[case.comparison] for case in group if case.comparison]
                if compared:
                    row["against"] = {
                        name: sum(each[name] for each in compared) / len(compared) for name in ("cosine", "undone")
                    }
                losses = [results[case.training]["loss"] for case in group]
                row["loss"] = [sum(each) / len(losses) for each in zip(*losses, strict=True)]
                rows.append(row)
                ends[way] = hits[ERASED, last]
            pairs[data] = discordant(ends[SEQUENTIAL], ends[MODULAR])
        methods[method] = {"rows": rows, "discordant": pairs}
    return {
        "concepts": list(concepts),
        "seeds": list(seeds),
        "steps": list(settings.checkpoints),
        "recipe": asdict(settings.recipe),
        "related": {concept: list(related(concept, neighbours())) for concept in concepts},
        "methods": methods,
        "cpu_seconds": sum(each["seconds"] for each in results.values()),
    }


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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"of `erase`; by default {' '.join(METHODS)}")
    parser.add_argument("--concepts", nargs="+", metavar="WORD", choices=OBJECTS, help=" ".join(CONCEPTS))
    parser.add_argument(
        "--data", nargs="+", choices=DATA, metavar="DATA", help=f"fine-tune on: {', '.join(DATA)} (all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of training and drawing (0)")
    parser.add_argument("--steps", nargs="+", type=int, metavar="N", help="of fine-tuning, to look after (50 100 300)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each")
    parser.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="finished parts (build/reemergence)")
    parser.add_argument("--fresh", action="store_true", help="do everything again, even if it is stored")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there too")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/modular.md")
    parser.add_argument("--smoke", action="store_true", help="uce, one concept, two steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.write_docs and options.smoke:
        parser.error("--smoke is nothing for the docs")
    if options.jobs < 1 or min(options.steps or [1]) < 1:
        parser.error("--jobs and --steps must be at least 1")
    options.methods = list(dict.fromkeys(options.methods or (["uce"] if options.smoke else METHODS)))
    options.concepts = list(dict.fromkeys(options.concepts or (CONCEPTS[:1] if options.smoke else CONCEPTS)))
    options.data = [data for data in DATA if data in (options.data or DATA)]
    options.seeds = list(dict.fromkeys(options.seeds))
    options.steps = tuple(sorted(set(options.steps or ((1, 2) if options.smoke else CHECKPOINTS))))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    settings = Settings(checkpoints=options.steps)
    if options.smoke:
        settings = Settings(options.steps, Recipe(batch_size=2), Counts(2, 2, 2), drawing_steps=2)
    cases = [
        Case(method, concept, data, way, seed, settings)
        for method in options.methods
        for data in options.data
        for way in WAYS
        for concept in options.concepts
        for seed in options.seeds
    ]
    store = Store(options.store, since=time.time() if options.fresh else 0.0)
    results = run_cases(cases, store, options.jobs)
    report = summarise(cases, results, options.concepts, options.seeds)
    objects = new_objects()
    report["new_objects"] = {
        "objects": len(objects.dataset.objects),
        "validation": objects.validate(load_pipeline().vae, draws=1 if options.smoke else 4),
    }
    print_report(report)
    if options.smoke:
        print("--smoke: two steps and few images. These numbers say nothing.")
    if options.json:
        about = {"benchmark": "reemergence", "smoke": options.smoke, "machine": machine("cpu", cpu_time=True)}
        options.json.write_text(json.dumps({**about, **as_json(report)}, indent=2) + "\n", encoding="utf-8")
    if options.write_docs:
        command = shlex.join(
            ["python", "benchmarks/reemergence.py", *(sys.argv[1:] if arguments is None else arguments)]
        )
        page = replace_between(DOCS.read_text(encoding="utf-8"), markdown(report, command))
        DOCS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
