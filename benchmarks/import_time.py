"""What `import diffusers_erasure` costs over `from diffusers import DiffusionPipeline`, which a user has paid already.

    python -m benchmarks.import_time [--repeats 7]

Every import runs in a fresh process. The difference is measured twice: between processes that import the one or the
other, and within a process that imports diffusers first and the library then, which is less noisy.
"""

import statistics
from functools import partial

from benchmarks.command import finish, in_process, print_table, start, timed_arguments
from benchmarks.timing import interleave, spread, summary


CHILD = """
import json, sys, time
times = {}
for statement in sys.argv[1:]:
    begin = time.perf_counter()
    exec(statement)
    times[statement] = time.perf_counter() - begin
modules = sorted(name for name in sys.modules if name.partition(".")[0] == "diffusers_erasure")
print(json.dumps({"seconds": times, "modules": modules}))
"""
DIFFUSERS = "from diffusers import DiffusionPipeline"
LIBRARY = "import diffusers_erasure"
# Importing the library must not pay for these.
LAZY = ("methods.uce", "training", "cli", "demo.drawing", "demo.judge", "formats.dumo", "formats.plain_lora")


def main() -> None:
    """The command line."""
    options = timed_arguments(__doc__).parse_args()
    start(options)
    repeats = options.repeats or (1 if options.smoke else 7)
    cases = {"library": (LIBRARY,), "diffusers": (DIFFUSERS, LIBRARY)}  # diffusers first, so its time is its own
    if not options.smoke:
        in_process("-c", CHILD, DIFFUSERS, LIBRARY)  # the files come into the system's cache, the bytecode is compiled
    runs = interleave(
        {name: partial(in_process, "-c", CHILD, *case) for name, case in cases.items()}, repeats, warmup=0
    )
    diffusers = [run["seconds"][DIFFUSERS] for run in runs["diffusers"]]
    library = [run["seconds"][LIBRARY] for run in runs["library"]]
    over = summary([b - a for a, b in zip(diffusers, library, strict=True)])
    within = summary([run["seconds"][LIBRARY] for run in runs["diffusers"]])
    modules = runs["library"][0]["modules"]
    names = {name.removeprefix("diffusers_erasure.") for name in modules}
    eager = sorted(name for name in names if any(name == lazy or name.startswith(f"{lazy}.") for lazy in LAZY))
    numbers = {
        "diffusers_s": summary(diffusers),
        "library_s": summary(library),
        "over_s": over,
        "within_s": within,
        "ratio": statistics.median(library) / statistics.median(diffusers),
        "modules": modules,
        "imported_but_should_be_lazy": eager,
    }
    print_table(
        "Seconds of an import in a fresh process: median [quartiles]",
        ("import", "seconds"),
        (
            (DIFFUSERS, spread(numbers["diffusers_s"])),
            (LIBRARY, spread(numbers["library_s"])),
            ("the difference, round by round", spread(over)),
            ("the library after diffusers, in one process", spread(within)),
        ),
    )
    print(f"\n{len(modules)} modules of the package: {', '.join(sorted(names))}")
    print(f"Imported, but should be lazy: {', '.join(eager) or 'none'}")
    finish(options, "import_time", numbers)


if __name__ == "__main__":
    main()
