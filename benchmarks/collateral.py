"""What an erasure does to everything else, on the embedded model, and whether the words that it is told of are the right ones.

    python -m benchmarks.collateral [--methods uce rece speed] [--targets cat …] [--write-docs]

Each object is erased with two others retained: with nothing else, and with the list that is retained by default. Then each of
the 63 others is drawn once, and the target in all styles. How far the text rows moved is compared with what vanished: the area
under the curve (AUC) is the chance that a word which vanished moved farther than one which did not: of all erasures together,
and the mean within each of those that lost five or more. The threshold of the
warning is chosen on the development half of the objects, and judged on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.command import arguments, finish, made_by, markdown_table, print_table, start, write_page
from benchmarks.drawing import draw
from benchmarks.efficacy.plan import SINGLES
from diffusers_erasure import demo, erase
from diffusers_erasure.collateral.predictions import Predictions
from diffusers_erasure.collateral.rows import row_moves
from diffusers_erasure.registry import declaration
from diffusers_erasure.training import TrainingRun


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
PAGE = "docs/lists.md"
STEPS = 12
FEW_LOST = 5  # with fewer the AUC of one erasure says little
README = ("cat", ("dog", "rabbit"))
CONTEXTS = {"row alone": "{}", "row behind an article": "a {}"}


def pair(target: str) -> tuple[str, ...]:
    """Two objects that a user might name: those behind the target in the list."""
    if target == README[0]:
        return README[1]
    place = demo.OBJECTS.index(target)
    return tuple(demo.OBJECTS[(place + i) % len(demo.OBJECTS)] for i in (1, 2))


def seen(pipe: Any, judge: Any, target: str, few: int | None) -> tuple[list[bool], int]:
    """For each other object whether the judge sees it, and in how many of five pictures of the target it sees that."""
    others = [name for name in demo.OBJECTS if name != target][:few]
    prompts = [demo.prompt(name, demo.STYLES[i % len(demo.STYLES)]) for i, name in enumerate(others)]
    prompts += [demo.prompt(target, style) for style in demo.STYLES]
    seeds = [*range(len(others)), *range(len(demo.STYLES))]
    found = judge.predict(draw(pipe, prompts, seeds, STEPS, 68)).objects
    kept = [a == b for a, b in zip(found, others, strict=False)]
    return kept, sum(name == target for name in found[len(others) :])


def auc(moves: Sequence[float], lost: Sequence[bool]) -> float:
    """The chance that a lost one moved farther than a kept one; 0.5 says nothing."""
    gone = [m for m, gone in zip(moves, lost, strict=True) if gone]
    there = [m for m, gone in zip(moves, lost, strict=True) if not gone]
    wins = sum((a > b) + 0.5 * (a == b) for a in gone for b in there)
    return wins / (len(gone) * len(there)) if gone and there else float("nan")


def best_threshold(moves: Sequence[float], lost: Sequence[bool]) -> float:
    """The one with the largest sum of the shares that are told rightly (lost above, kept below), to one per cent."""
    total = max(1, sum(lost)), max(1, len(lost) - sum(lost))

    def right(at: float) -> float:
        above = sum(gone and m > at for m, gone in zip(moves, lost, strict=True))
        below = sum(not gone and m <= at for m, gone in zip(moves, lost, strict=True))
        return above / total[0] + below / total[1]

    return max((i / 100 for i in range(1, 100)), key=right)


def one(pipe: Any, judge: Any, target: str, method: str, default: bool, few: int | None) -> dict[str, Any]:
    """Erase, draw and measure."""
    others = [name for name in demo.OBJECTS if name != target][:few]
    how: dict[str, Any] = {"retain_default": "object" if default else "none"}
    if declaration(method).resumable:
        how["training"] = TrainingRun(progress=False)
    erasure = erase(pipe, target, anchors=demo.HYPERNYMS[target], retain=list(pair(target)), method=method, **how)
    moves: dict[str, list[float | None]] = {}
    for name, context in CONTEXTS.items():
        found = row_moves(pipe, erasure, others, context)
        if found is not None:
            moves[name] = found.tolist()
    if not moves:
        predictions = Predictions(pipe, others, [target])
        by_word = dict(zip(predictions.words, predictions.moves(erasure).tolist(), strict=True))
        moves["predictions"] = [by_word.get(name) for name in others]
    pipe.load_erasure(erasure, "erased")
    kept, left = seen(pipe, judge, target, few)
    pipe.unload_erasure("erased")
    return {"kept": kept, "left": left, "moves": moves, "told": erasure.config.diagnostics.get("collateral", {})}


def curve(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[bool]]:
    """All words of some runs: how far each moved, and whether it was lost though the un-erased model draws it."""
    moves, lost = [], []
    for run in runs:
        for move, there, before in zip(run["moves"].get(name, ()), run["kept"], run["base"], strict=False):
            if before and move is not None:
                moves.append(move)
                lost.append(not there)
    return moves, lost


def counts(runs: Sequence[Mapping[str, Any]]) -> Table:
    """What each erasure left."""
    rows = []
    for before, after in zip(runs[::2], runs[1::2], strict=True):
        kept = (str(sum(flags)) for flags in (before["base"], before["kept"], after["kept"]))
        rows.append(
            (before["target"], before["half"], before["method"], *kept, f"{before['left']}", f"{after['left']}")
        )
    others = len(runs[0]["kept"])
    return (
        f"Others that the judge sees, of {others}, and pictures of the target in which it sees it, of {len(demo.STYLES)}",
        ("target", "half", "method", "un-erased", "two named", "and a list", "left, two named", "left, and a list"),
        rows,
    )


def measured(runs: Sequence[Mapping[str, Any]]) -> tuple[list[Table], dict[str, Any]]:
    """How well the measures tell what vanished."""
    numbers: dict[str, Any] = {}
    for name in dict.fromkeys(name for run in runs for name in run["moves"]):
        at = best_threshold(*curve([run for run in runs if run["half"] == "dev"], name))
        for half in dict.fromkeys(run["half"] for run in runs):
            of_half = [run for run in runs if run["half"] == half]
            moves, lost = curve(of_half, name)
            own = [auc(*each) for run in of_half if sum((each := curve([run], name))[1]) >= FEW_LOST]
            above = [gone for move, gone in zip(moves, lost, strict=True) if move > at]
            numbers[f"{name}, {half}"] = {
                **{"words": len(lost), "lost": sum(lost), "auc": auc(moves, lost), "threshold": at},
                "auc_within": sum(own) / len(own) if own else float("nan"),
                "lost_above": sum(above) / max(1, sum(lost)),
                "kept_below": 1 - (len(above) - sum(above)) / max(1, len(lost) - sum(lost)),
            }
    order = (
        "Does the measure order words as the damage does?",
        ("measure, half", "words", "lost", "AUC", "AUC within an erasure"),
        [
            (name, str(row["words"]), str(row["lost"]), f"{row['auc']:.2f}", f"{row['auc_within']:.2f}")
            for name, row in numbers.items()
        ],
    )
    cut = (
        "Threshold, chosen on the development half",
        ("measure, half", "threshold", "lost ones above it", "kept ones below it"),
        [
            (name, f"{row['threshold']:.2f}", f"{row['lost_above']:.0%}", f"{row['kept_below']:.0%}")
            for name, row in numbers.items()
        ],
    )
    return [order, cut], numbers


def markdown(tables: Sequence[Table], command: str) -> str:
    """The tables for the page."""
    parts = [f"Made by `{command}`."]
    for title, header, rows in tables:
        parts.append("\n".join([title if title.endswith("?") else f"{title}:", "", *markdown_table(header, rows)]))
    return "\n\n".join(parts)


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = arguments(__doc__, smoke="one object, and six others")
    parser.add_argument("--methods", nargs="+", default=["uce"], metavar="METHOD")
    parser.add_argument("--targets", nargs="+", choices=demo.OBJECTS, metavar="OBJECT")
    parser.add_argument("--write-docs", action="store_true", help=f"put the tables into {PAGE}")
    options = parser.parse_args(given)
    start(options)
    few = 6 if options.smoke else None
    halves = {"cat": "dev"} if options.smoke else {name: half for half in ("dev", "report") for name in SINGLES[half]}
    halves = {name: halves.get(name, "neither") for name in options.targets or halves}
    pipe, judge = demo.load_pipeline(), demo.load_judge()
    pipe.set_progress_bar_config(disable=True)
    runs = []
    for target, half in halves.items():
        base, _ = seen(pipe, judge, target, few)
        for method in options.methods:
            for default in (False, True):
                run = one(pipe, judge, target, method, default, few)
                run |= {"target": target, "half": half, "method": method, "default": default, "base": base}
                runs.append(run)
                how = "and a list" if default else "two named"
                print(f"{method} {target}, {how}: {sum(run['kept'])} kept", flush=True)
    more, numbers = measured(runs)
    tables = [counts(runs), *more]
    for table in tables:
        print_table(*table)
    finish(options, "collateral", {"runs": runs, "measures": numbers})
    if options.write_docs:
        write_page(PAGE, "collateral", markdown(tables, made_by("collateral", given)))


if __name__ == "__main__":
    main()
