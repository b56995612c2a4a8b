"""Does it erase? Every method on the embedded model, or on another tiny one, before its judge, against the un-erased model.

    python -m benchmarks.efficacy [--world NAME] [--methods METHOD ...] [--half dev|report] [--jobs 2] [--json PATH] [--write-docs]

Eight objects and the styles of a half are erased one at a time, the eight objects at once, and all 32 of the half at
once; how it is measured stands in docs/efficacy.md. A method is 12 erasures and 2,648 images in the report half, 6 to
8 minutes of one thread besides the fitting. What is finished is kept in `--store`, so a run that was broken off goes on
where it was, and a new method (a line in benchmarks/efficacy/methods.py) draws only its own images.

With `--world` another tiny model is erased and drawn, with the same objects, prompts and columns; where nothing is trained,
`--images-scale 5` gives a cell a thousand images.

Stored results do not notice changes of the library's code: give `--fresh` after one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import add_store_arguments, arguments, finish, made_by, start, store_of, write_page
from benchmarks.efficacy.methods import BASELINE, EMBEDDED, ENTRIES
from benchmarks.efficacy.plan import COUNTS, HALVES, find_neighbours, make_jobs
from benchmarks.efficacy.tables import markdown, print_report, summarise
from benchmarks.efficacy.units import run_all, steps_of, wanted_units, write_grid
from diffusers_erasure.demo.drawing import fast_pipeline
from diffusers_erasure.demo.worlds import WORLDS
from diffusers_erasure.registry import declaration


PAGE = "docs/efficacy.md"


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, smoke="two methods, one object, two steps: to see that it runs")
    add_store_arguments(parser, "efficacy", PAGE)
    parser.add_argument("--methods", nargs="+", choices=list(ENTRIES), metavar="METHOD", help=", ".join(ENTRIES))
    parser.add_argument(
        "--world", choices=WORLDS, default=EMBEDDED, help="the tiny model; the embedded one by default"
    )
    parser.add_argument("--scenarios", nargs="+", choices=list(COUNTS), metavar="NAME", help=", ".join(COUNTS))
    parser.add_argument(
        "--half", choices=HALVES, default="report", help="settings are tuned on dev; report by default"
    )
    parser.add_argument("--images-scale", type=float, default=1.0, metavar="X", help="share of the images, for a look")
    parser.add_argument("--device", default="cpu", help="where images are drawn: cpu or cuda; all is made on the CPU")
    parser.add_argument("--section", choices=("linear", "probes", "doors", "trained"), help="another part of the page")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="write a contact sheet")
    options = parser.parse_args(given)
    if options.write_docs and (options.smoke or options.images_scale < 1 or options.half != "report"):
        parser.error("--write-docs is for the report half with all images")
    if options.images_scale <= 0 or options.jobs < 1:
        parser.error("--images-scale must be above 0 and --jobs at least 1")
    wanted = options.methods or ([BASELINE, "uce"] if options.smoke else list(ENTRIES))
    strange = [name for name in wanted if not ENTRIES[name].works_on(options.world)]
    if strange and options.methods:
        parser.error(f"{', '.join(strange)}: not on {WORLDS[options.world].title}")
    options.methods = [name for name in wanted if name not in strange]
    return options


def section(options: argparse.Namespace) -> str:
    """The part of the page that holds a run's tables: of a world those of what is trained, of what is not, or of a section."""
    if options.world == EMBEDDED and not options.section:
        return "efficacy"
    erases = [ENTRIES[name] for name in options.methods if ENTRIES[name].erases]
    trained = any(declaration(entry.method).resumable for entry in erases) and not options.section
    return " ".join(["efficacy", options.world, *["trained"] * trained, *[options.section] * bool(options.section)])


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(given)
    start(options)
    store, steps = store_of(options), 2 if options.smoke else steps_of(options.world)
    # Neighbours by the embedded model's rows, so that all worlds are asked for the same.
    jobs = make_jobs(options.half, find_neighbours(fast_pipeline()), options.images_scale, options.smoke)
    jobs = [job for job in jobs if job.scenario in (options.scenarios or COUNTS)]
    methods = dict.fromkeys((BASELINE, *options.methods))  # the shares need the un-erased model
    where = {"world": options.world, "device": options.device}
    units = [unit for method in methods for unit in wanted_units(method, jobs, options.half, steps, **where)]
    results = run_all(units, store, options.jobs)
    report = summarise(jobs, options.methods, results, options.half)
    print_report(report)
    images = sum(len(unit.job.shots) for unit in results)
    seconds = sum(result.draw_seconds for result in results.values()) / images
    print(f"\n{report['images']} images for a method, {seconds:.2f} CPU-seconds each.")
    if options.grid:
        write_grid(options.grid, options.methods, results, store)
    about = {
        "world": options.world,
        "images_scale": options.images_scale,
        "steps": steps,
        "seconds_per_image": seconds,
    }
    finish(options, "efficacy", {**about, **report})
    if options.write_docs:
        write_page(PAGE, section(options), markdown(report, made_by("efficacy", given)))


if __name__ == "__main__":
    main()
