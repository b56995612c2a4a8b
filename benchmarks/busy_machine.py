"""What one busy process beside it costs `diffusers-erasure demo`, on two cores.

    python -m benchmarks.busy_machine [--repeats 3] [--threads 2]

Everything is bound to two cores. The demo runs alone, and beside a process that never waits; by default the command line
chooses its threads by what is free, with `--threads` it takes so many.
"""

import os
import subprocess
import sys
import tempfile
import time

from benchmarks.command import finish, print_table, start, timed_arguments
from benchmarks.timing import spread, summary


BUSY = "while True: pass"


def demo(threads: int | None) -> float:
    """Seconds of a whole demo."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_THREADS")}
    chosen = [] if threads is None else ["--threads", str(threads)]
    command = [sys.executable, "-m", "diffusers_erasure.cli", *chosen, "demo", "--json"]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run([*command, "--output", folder], env=environment, check=True, capture_output=True)
        return time.perf_counter() - begin


def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # also for the processes that are started
    threads = options.threads
    options.threads = None
    start(options)
    alone, beside = [], []
    for _ in range(options.repeats or (1 if options.smoke else 3)):
        alone.append(demo(threads))
        with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
            try:
                beside.append(demo(threads))
            finally:
                busy.kill()
    ratio = summary([b / a for a, b in zip(alone, beside, strict=True)])
    rows = [
        ("alone", spread(summary(alone), 1), "1"),
        ("beside one busy process", spread(summary(beside), 1), spread(ratio, 2)),
    ]
    print_table("diffusers-erasure demo on two cores", ("", "seconds", "times the free time"), rows)
    finish(options, "busy_machine", {"alone_s": summary(alone), "beside_s": summary(beside), "ratio": ratio})


if __name__ == "__main__":
    main()
