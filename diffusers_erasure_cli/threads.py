"""How many threads the command line computes with: as many as there are free cores.

Threads of one operation wait for each other. With more of them than free cores each wait lasts until the scheduler
comes round, so that two threads beside one busy process are several times slower than one.
"""

import os
import sys
from pathlib import Path

import typer


VARIABLE = "DIFFUSERS_ERASURE_THREADS"
CHOSEN = (VARIABLE, "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # whoever sets one of these has chosen
INTERVAL = 0.2  # seconds over which the load is measured


def allowed_cores() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def quota() -> float:
    """Cores' worth of time that a container grants this process; infinite where it states none."""
    try:
        granted, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float("inf") if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError):
        return float("inf")


def free_cores() -> int:
    """Whole cores, of those allowed, that nobody used in the last moments; at least one."""
    import psutil

    cores = allowed_cores()
    busy = psutil.cpu_percent(interval=INTERVAL, percpu=True)
    idle = sum(1 - share / 100 for core, share in enumerate(busy) if core in cores)
    return max(1, int(min(idle, quota()) + 0.5))


def limit_threads(threads: int | None = None) -> None:
    """Compute with this many threads; by default with one a free core, unless the environment says how many."""
    own = os.environ.get(VARIABLE)
    if threads is not None:
        os.environ[VARIABLE] = os.environ["MKL_NUM_THREADS"] = str(threads)  # whatever they said before
    elif own:
        if not own.isdigit() or int(own) < 1:
            raise typer.BadParameter(f"${VARIABLE} must be a number of threads, not {own!r}.")
        threads = int(own)
    if threads is None:
        if any(os.environ.get(name) for name in CHOSEN):
            return
        threads = free_cores()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # also for the processes that this one starts
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
