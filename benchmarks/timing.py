"""Times: of alternatives in turn, their spread, the functions in which a call spends it; and peak memory."""

import cProfile
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import diffusers_erasure


Measured = TypeVar("Measured")
PACKAGE = Path(diffusers_erasure.__file__).parent
_clock: Callable[[], float] = time.perf_counter


def use_processor_time() -> None:
    """Measure this process's own processor time from now on, instead of wall time."""
    global _clock
    _clock = time.process_time


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    """How long one call takes; on a GPU by its own events."""
    if not device.startswith("cuda"):
        begin = _clock()
        function()
        return _clock() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def interleave(
    functions: Mapping[str, Callable[[], Measured]], repeats: int, warmup: int = 1
) -> dict[str, list[Measured]]:
    """Run functions that return what they measured in turn, A B C, C B A, …, so that drift falls on all of them."""
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()
    times: dict[str, list[Measured]] = {name: [] for name in names}
    for index in range(repeats):
        for name in names if index % 2 == 0 else reversed(names):
            times[name].append(functions[name]())
    return times


def interleave_calls(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """The same for functions that are timed as a whole."""
    return interleave({name: partial(seconds, call, device) for name, call in calls.items()}, repeats)


def profiled(call: Callable[[], Any]) -> dict[str, float]:
    """
    The seconds of a call by function, each without those that it calls.

    Functions of the package stand alone, with the torch operations that they call themselves; those of other libraries
    are added up under the library's name.
    """
    profile = cProfile.Profile(_clock, builtins=False)
    profile.runcall(call)
    spent: defaultdict[str, float] = defaultdict(float)
    for entry in profile.getstats():
        spent[_owner(entry.code)] += entry.inlinetime
    return dict(spent)


def _owner(code: Any) -> str:
    file = Path(code.co_filename)
    if file.is_relative_to(PACKAGE):
        function = code.co_qualname.partition(".<")[0]  # with its own inner functions and comprehensions
        return ".".join([*file.relative_to(PACKAGE).with_suffix("").parts, function])
    for folder, library in zip(file.parts, file.parts[1:], strict=False):
        if folder.endswith("-packages"):
            return library.removesuffix(".py")
    return "Python"


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and largest of measured values."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "q1": quarters[0],
        "q3": quarters[2],
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def ratios(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios round by round: neighbours in time share the machine's state."""
    return summary([value / base for value, base in zip(values, baseline, strict=True)])


def spread(item: Mapping[str, float], digits: int = 3, scale: float = 1.0) -> str:
    """`median [q1 to q3]`."""
    middle, low, high = (f"{item[key] * scale:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{middle} [{low} to {high}]"


def peak_bytes() -> int:
    """The most memory that this process has held."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else 1024 * value
