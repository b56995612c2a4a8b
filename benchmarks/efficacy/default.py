"""Which method does `erase` take where none is named? The figures of the tables, weighed as docs/methods/index.md says.

    python -m benchmarks.efficacy.default REPORT.json ... [--write-docs]

The reports are what `python -m benchmarks.efficacy --json` wrote of the report half, one or more for each tiny model; a method is taken from
the first of a model that has it. Candidates are the methods that work on every family and read text encoders alone, with the settings that
they have by default.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import arguments, finish, markdown_table, print_table, start, write_page
from benchmarks.efficacy.plan import ONE_STYLE
from benchmarks.efficacy.tables import FLOOR
from diffusers_erasure.families import FAMILIES
from diffusers_erasure.methods import get_method
from diffusers_erasure.registry import declaration, method_names


PAGE = "docs/methods/index.md"
WEIGHTS = {"erases": 0.4, "keeps": 0.4, "robust": 0.1, "stock": 0.1}
HEAD = ("method", "score", "erases", "keeps", "robust", "stock")


def candidates() -> list[str]:
    """The methods that are made in seconds, of text encoders alone, for every family."""
    found = [declaration(name) for name in method_names()]
    return [each.name for each in found if each.needs == "text encoders" and set(each.families) == set(FAMILIES)]


def shares_of(method: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The first three shares of a method, means over models and scenarios of objects; None where a model has no report with it."""
    cells: dict[str, list[float]] = {"erases": [], "keeps": [], "robust": []}
    of_world: dict[str, Mapping[str, Any]] = {}
    for report in reports:
        parts = {name: part["methods"] for name, part in report["scenarios"].items() if name != ONE_STYLE}
        if all({method, FLOOR} <= set(rows) for rows in parts.values()):
            of_world.setdefault(report["world"], parts)
    if len(of_world) < len({report["world"] for report in reports}):
        return None
    for known in of_world.values():
        for rows in known.values():
            row, floor = rows[method], rows[FLOOR]

            def over(name: str, row: Any = row, floor: Any = floor) -> float:
                return 1 - max(0.0, row[name]["value"] - floor[name]["value"])

            cells["erases"].append(over("acc_e"))
            cells["robust"].append(over("acc_e_synonyms"))
            cells["keeps"].append(min(1.0, row["acc_r_ratio"]["value"]))
    return {k: statistics.mean(v) for k, v in cells.items()}


def stock_method(method: str) -> str:
    """The method whose edit stock diffusers loads: its own where that is a LoRA, else the one that stands in for it by default."""
    return method if "lora" in declaration(method).makes else str(get_method(method).config().stock)


def ranking(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, dict[str, float]]]:
    """Methods with their scores and shares, the best first."""
    found = {method: shares for method in candidates() if (shares := shares_of(method, reports)) is not None}
    good = {method: (shares["erases"] + shares["keeps"]) / 2 for method, shares in found.items()}
    found = {method: {**shares, "stock": good.get(stock_method(method), 0.0)} for method, shares in found.items()}
    scores = [(m, sum(WEIGHTS[name] * value for name, value in shares.items()), shares) for m, shares in found.items()]
    return sorted(scores, key=lambda each: -each[1])


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {PAGE}")
    options = parser.parse_args(given)
    start(options)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.reports]
    wrong = [path for path, each in zip(options.reports, reports) if each.get("half") != "report"]
    if wrong:
        parser.error(f"{wrong[0]} is no report of the report half")
    ranked = ranking(reports)
    rows = [
        (name, f"{100 * score:.1f}", *(f"{100 * shares[key]:.1f}" for key in HEAD[2:]))
        for name, score, shares in ranked
    ]
    print_table("What the default is picked by", HEAD, rows)
    finish(options, "efficacy.default", {"ranking": [[name, score, shares] for name, score, shares in ranked]})
    if options.write_docs:
        worlds = ", ".join(dict.fromkeys(each["world"] for each in reports))
        about = f"Means over one object, eight and 32 at once of the tiny models {worlds}, in %; by `python -m benchmarks.efficacy.default`."
        write_page(PAGE, "default", "\n".join([*markdown_table(HEAD, rows), "", about]))


if __name__ == "__main__":
    main()
