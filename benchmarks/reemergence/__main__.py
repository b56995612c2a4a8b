"""Does an erased concept come back when users fine-tune? Two ways to ship an erasure, on the embedded model.

    python -m benchmarks.reemergence [--methods esd uce] [--concepts cat pizza rocket] [--jobs 2] [--write-docs]

Users train a LoRA, on new objects and on objects related to the erased one: `sequential`, on an exported erased model;
`modular`, on the clean base, with the erasure loaded beside the LoRA when drawing; `none`, the same LoRA without an
erasure. How it is measured stands in docs/modular.md. Finished parts are kept in `--store`, so a run that was broken
off goes on where it was, and what methods share is done once.

Stored results do not notice changes of the library's code: give `--fresh` after one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.command import add_store_arguments, arguments, finish, made_by, start, store_of, write_page
from benchmarks.reemergence.cases import WAYS, Case, run_cases, summarise
from benchmarks.reemergence.lora import Recipe
from benchmarks.reemergence.parts import CHECKPOINTS, Settings, new_objects
from benchmarks.reemergence.plan import CONCEPTS, DATA, Counts
from benchmarks.reemergence.tables import as_json, markdown, print_report
from diffusers_erasure.demo import load_pipeline
from diffusers_erasure.demo.words import OBJECTS


PAGE = "docs/modular.md"
METHODS = ("esd", "uce")


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, smoke="uce, one concept, two steps: to see that it runs")
    add_store_arguments(parser, "reemergence", PAGE)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"by default {' '.join(METHODS)}")
    parser.add_argument("--concepts", nargs="+", metavar="WORD", choices=OBJECTS, help=" ".join(CONCEPTS))
    parser.add_argument(
        "--data", nargs="+", choices=DATA, metavar="DATA", help=f"fine-tune on: {', '.join(DATA)} (all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of training and drawing (0)")
    parser.add_argument("--steps", nargs="+", type=int, metavar="N", help="of fine-tuning, to look after (50 100 300)")
    options = parser.parse_args(given)
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


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(given)
    start(options)
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
    results = run_cases(cases, store_of(options), options.jobs)
    report = summarise(cases, results, options.concepts, options.seeds)
    objects = new_objects()
    report["new_objects"] = {
        "objects": len(objects.dataset.objects),
        "validation": objects.validate(load_pipeline().vae, draws=1 if options.smoke else 4),
    }
    print_report(report)
    finish(options, "reemergence", as_json(report))
    if options.write_docs:
        write_page(PAGE, "reemergence", markdown(report, made_by("reemergence", given)))


if __name__ == "__main__":
    main()
