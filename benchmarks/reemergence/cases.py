"""One user each, by what was erased, what is fine-tuned on, and how the two come together; and the numbers over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.efficacy.methods import Fit
from benchmarks.reemergence.parts import (
    MODULAR,
    NONE,
    SEQUENTIAL,
    Comparison,
    Model,
    Part,
    Settings,
    Training,
    View,
    neighbours,
    run_all,
)
from benchmarks.reemergence.plan import ERASED, KEPT, LEARNT, NEAR, NEW, related
from benchmarks.reemergence.tables import discordant, share
from benchmarks.store import Store


WAYS = (SEQUENTIAL, MODULAR, NONE)


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
            model=Model(way, None if way == NONE else self.fit, self.training if step else None, step),
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
    rounds: dict[str, list[Part]] = {
        "erasures": [case.fit for case in cases],
        "fine-tuning": [case.training for case in cases],
        "drawing": [*views, *comparisons],
    }
    for label, parts in rounds.items():
        results |= run_all(parts, store, jobs, label)
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
                row: dict[str, Any] = {"data": data, "way": way, "by_concept": by_concept}
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
