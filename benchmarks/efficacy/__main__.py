"""Does it erase? Every method on the embedded model, before its judge, against the un-erased model.

    python -m benchmarks.efficacy [--methods METHOD ...] [--half dev|report] [--jobs 2] [--json PATH] [--write-docs]

Eight objects and the styles of a half are erased one at a time, the eight objects at once, and all 32 of the half at
once; how it is measured stands in docs/efficacy.md. A method is 12 erasures and 2,648 images in the report half, 6 to
8 minutes of one thread besides the fitting. What is finished is kept in `--store`, so a run that was broken off goes on
where it was, and a new method (a line in benchmarks/efficacy/methods.py) draws only its own images.

Stored results do not notice changes of the library's code: give `--fresh` after one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import add_store_arguments, arguments, finish, made_by, start, store_of, write_page
from benchmarks.efficacy.methods import BASELINE, ENTRIES
from benchmarks.efficacy.plan import HALVES, find_neighbours, make_jobs
from benchmarks.efficacy.tables import markdown, print_report, summarise
from benchmarks.efficacy.units import run_all, wanted_units, write_grid
from diffusers_erasure.demo.drawing import STEPS, fast_pipeline


PAGE = "docs/efficacy.md"


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, smoke="two methods, one object, two steps: to see that it runs")
    add_store_arguments(parser, "efficacy", PAGE)
    parser.add_argument("--methods", nargs="+", choices=list(ENTRIES), metavar="METHOD", help=", ".join(ENTRIES))
    parser.add_argument(
        "--half", choices=HALVES, default="report", help="settings are tuned on dev; report by default"
    )
    parser.add_argument("--images-scale", type=float, default=1.0, metavar="X", help="share of the images, for a look")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="write a contact sheet")
    options = parser.parse_args(given)
    if options.write_docs and (options.smoke or options.images_scale < 1 or options.half != "report"):
        parser.error("--write-docs is for the report half with all images")
    if options.images_scale <= 0 or options.jobs < 1:
        parser.error("--images-scale must be above 0 and --jobs at least 1")
    options.methods = options.methods or ([BASELINE, "uce"] if options.smoke else list(ENTRIES))
    return options


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(given)
    start(options)
    store, steps = store_of(options), 2 if options.smoke else STEPS
    jobs = make_jobs(options.half, find_neighbours(fast_pipeline()), options.images_scale, options.smoke)
    methods = dict.fromkeys((BASELINE, *options.methods))  # the shares need the un-erased model
    units = [unit for method in methods for unit in wanted_units(method, jobs, options.half, steps)]
    results = run_all(units, store, options.jobs)
    report = summarise(jobs, options.methods, results, options.half)
    print_report(report)
    images = sum(len(unit.job.shots) for unit in results)
    seconds = sum(result.draw_seconds for result in results.values()) / images
    print(f"\n{report['images']} images for a method, {seconds:.2f} CPU-seconds each.")
    if options.grid:
        write_grid(options.grid, options.methods, results, store)
    about = {"images_scale": options.images_scale, "steps": steps, "seconds_per_image": seconds}
    finish(options, "efficacy", {**about, **report})
    if options.write_docs:
        write_page(PAGE, "efficacy", markdown(report, made_by("efficacy", given)))


if __name__ == "__main__":
    main()
