"""How many threads the command line takes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from diffusers_erasure_cli import threads


@pytest.fixture(autouse=True)
def nobody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.CHOSEN:
        monkeypatch.setenv(name, "")


def measured(monkeypatch: pytest.MonkeyPatch, allowed: set[int], busy: list[float], quota: float) -> int:
    monkeypatch.setattr(threads, "allowed_cores", lambda: allowed)
    monkeypatch.setattr(threads, "quota", lambda: quota)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval, percpu: busy)
    return threads.free_cores()


@pytest.mark.parametrize(
    ("allowed", "busy", "quota", "expected"),
    [
        ({0, 1}, [0.0, 4.0], float("inf"), 2),
        ({0, 1}, [100.0, 4.0], float("inf"), 1),
        ({0, 1}, [55.0, 60.0], float("inf"), 1),  # one busy process that moves between the cores
        ({0, 1}, [100.0, 100.0], float("inf"), 1),  # never none
        ({2, 3}, [100.0, 100.0, 0.0, 0.0], float("inf"), 2),  # others' cores do not count
        ({0, 1, 2, 3}, [0.0] * 4, 1.5, 2),  # a container's share
    ],
)
def test_free_cores(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], busy: list[float], quota: float, expected: int
) -> None:
    assert measured(monkeypatch, allowed, busy, quota) == expected


def test_a_busy_process_is_seen() -> None:
    """Really: on one core, with a process that keeps it busy, that core is not free."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("cores cannot be chosen here")
    cores = sorted(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{cores[0]}}})\nprint(flush=True)\nwhile True: pass"
    import psutil

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.05)
            before = psutil.Process(process.pid).cpu_times().user
            assert threads.free_cores() <= max(1, len(cores) - 1)
            used = psutil.Process(process.pid).cpu_times().user - before
            assert used > 0.2 * threads.INTERVAL  # it was busy meanwhile, so that this says something
        finally:
            process.kill()


def test_whoever_chooses_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: 7)
    set_to: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", set_to.append)
    threads.limit_threads()
    threads.limit_threads(3)
    threads.limit_threads()  # as each command does: what was chosen holds, whatever the environment says
    monkeypatch.setenv(threads.VARIABLE, "5")
    threads.limit_threads()
    assert set_to == [7, 3, 3, 5] and os.environ["OMP_NUM_THREADS"] == "5"
    monkeypatch.setenv(threads.VARIABLE, "all")
    with pytest.raises(typer.BadParameter, match="not 'all'"):
        threads.limit_threads()
    monkeypatch.setenv(threads.VARIABLE, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.limit_threads()
    assert set_to == [7, 3, 3, 5]
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    threads.limit_threads(1)
    assert os.environ["MKL_NUM_THREADS"] == "1"


def test_a_containers_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("150000 100000\n", 1.5), ("max 100000\n", float("inf")), ("odd", float("inf"))):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert threads.quota() == expected
