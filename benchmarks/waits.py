"""How often a fit makes the CPU wait for the accelerator, or the accelerator for the CPU.

    python -m benchmarks.waits [--only esd fresh uce] [--steps 20] [--device cuda]

Each read of a tensor's value (`.item()`, `float`, `bool`, `.tolist()`, `.cpu()`), each search for entries (`nonzero`, a mask as an
index) and each copy from ordinary memory waits until everything queued before is done.

`esd`      ESD with this library's settings, for each optimiser step: a run of `--steps` more steps over a shorter one.
`fresh`    the same with every noisy latent denoised anew, as published.
`uce`      one fit of UCE, whole, with a list to retain.

On a CPU the models are taken for ones on an accelerator: a mode of torch's follows what is computed from their weights, and counts
where Python reads it, or gives it something that was not. What optimisers and the backward pass do in C++ it does not see. With
`--device cuda` torch itself tells where it synchronised (`torch.cuda.set_sync_debug_mode`).
"""

import inspect
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from benchmarks.builders import made_up_names, make_pipeline, make_unet
from benchmarks.command import arguments, finish, print_table, start
from diffusers_erasure import erase
from diffusers_erasure.training import TrainingRun
from diffusers_erasure.training.loop import READ_EVERY


DEVICE = torch.device("cpu", 0)  # which is taken for an accelerator; the host is a plain "cpu"
READS = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "equal", "allclose")
SEARCHES = ("nonzero", "masked_select", "unique", "argwhere")
COPIES = ("to", "cpu", "copy_", "tensor", "as_tensor", "__getitem__", "__setitem__")


class Pretended(TorchFunctionMode):
    """Counts what would wait if the models were on an accelerator.

    Args:
        models: what is there: their parameters and buffers, and whatever is computed from them.

    Attributes:
        counts: waits by the name of the operation, with `"blocking copy"` for copies from ordinary memory.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.there: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        for model in models:
            for value in itertools.chain(model.parameters(), model.buffers()):
                self.there[id(value)] = value

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = (
            (resolve_name(function) or getattr(function, "__name__", "")).removesuffix(".__get__").rpartition(".")[2]
        )
        tensors = list(_tensors((args, kwargs)))
        away = [self._is_there(each) for each in tensors]
        if name == "device" and tensors:
            real = function(*args, **kwargs)
            return DEVICE if away[0] and real.type == "cpu" else real
        if name in ("to", "cpu"):
            return self._moved(function, name, args, kwargs)
        if name in (*READS, *SEARCHES) and any(away):
            self.counts[name] += 1
        if name in ("tensor", "as_tensor") and _device_of(args, kwargs) == DEVICE and not any(away):
            self.counts["blocking copy"] += 1
        if name in ("__getitem__", "__setitem__") and away[0]:
            self._index(args[1])
        if name == "copy_" and away[0] != away[1]:
            self.counts["blocking copy" if away[0] else "read"] += 1
        found = function(*args, **kwargs)
        if any(away) or _device_of((), kwargs) == DEVICE:
            for value in _tensors(found):
                self.there[id(value)] = value
        return found

    def _is_there(self, value: torch.Tensor) -> bool:
        return isinstance(value, nn.Parameter) or self.there.get(id(value)) is value

    def _index(self, index: Any) -> None:
        for each in index if isinstance(index, tuple) else (index,):
            if isinstance(each, torch.Tensor) and self._is_there(each):
                if each.dtype == torch.bool:
                    self.counts["mask"] += 1
            elif isinstance(each, list) or (isinstance(each, torch.Tensor) and each.ndim):
                self.counts["blocking copy"] += 1

    def _moved(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        here = self._is_there(args[0])
        wanted = torch.device("cpu") if name == "cpu" else _device_of(args[1:], kwargs)
        found = function(*args, **kwargs)
        caller = inspect.currentframe()
        asked = caller and caller.f_back and caller.f_back.f_back
        if asked is not None and asked.f_globals["__name__"].startswith("torch.nn.utils"):
            wanted = None  # a device that C++ has told, which is not pretended
        if wanted is None or (wanted == DEVICE) == here:  # no move
            if here:
                self.there[id(found)] = found
            return found
        found = found.view_as(found) if found is args[0] else found
        if here:
            self.counts["read"] += 1
            self.there.pop(id(found), None)
        else:
            self.counts["copy" if kwargs.get("non_blocking") else "blocking copy"] += 1
            self.there[id(found)] = found
        return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _device_of(args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call names."""
    for each in (*args, kwargs.get("device")):
        if isinstance(each, torch.device):
            return each
        if isinstance(each, str):
            return torch.device(each)
    return None


@contextmanager
def counted(pipe: Any, device: str) -> Iterator[Counter[str]]:
    """Count the waits within a block."""
    if not device.startswith("cuda"):
        models = (model for model in pipe.components.values() if isinstance(model, nn.Module))
        with Pretended(*models) as mode:
            yield mode.counts
        return
    counts: Counter[str] = Counter()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode(before)
    counts["synchronisation"] = sum("synchronizing CUDA operation" in str(each.message) for each in told)


def total(counts: Mapping[str, int]) -> int:
    """All waits: copies from pinned memory are none."""
    return sum(number for name, number in counts.items() if name != "copy")


# ------------------------------------------------------------------------------------------------------ the tables


def waits_of_steps(pipe: Any, device: str, target: str, kept: str, steps: int, **settings: Any) -> dict[str, float]:
    """Waits of one optimiser step of ESD, by name: of so many steps, over so many."""
    first, found = READ_EVERY, []
    for number in (first, first, first + steps):  # the first fills the library's cache
        with counted(pipe, device) as counts:
            erase(
                pipe,
                target,
                method="esd",
                retain=[kept],
                compare=False,
                training=TrainingRun(progress=False),
                steps=number,
                lr_scheduler="constant",
                **settings,
            )
        found.append(counts)
    _, few, more = found
    return {name: (more[name] - few[name]) / steps for name in sorted({*few, *more}) if more[name] != few[name]}


def waits_of_a_fit(pipe: Any, device: str, target: str, kept: str) -> dict[str, float]:
    """Waits of a fit of UCE."""
    with counted(pipe, device) as counts:
        erase(pipe, target, retain=[kept], method="uce", compare=False)
    return dict(counts)


ESD: dict[str, dict[str, Any]] = {
    "esd": {"trajectories": 2, "num_inference_steps": 4},
    "fresh": {"policy": "student", "trajectories": 0, "num_inference_steps": 10, "batch_size": 1},
}


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=[*ESD, "uce"], metavar="TABLE")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps that are counted")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    start(options)
    smoke, device = options.smoke, options.device
    steps = READ_EVERY if smoke else options.steps
    # Shapes of Stable Diffusion 1.5 only on a GPU: the number of waits does not depend on them.
    small = smoke or not device.startswith("cuda")
    pipe = make_pipeline(small, make_unet(small)).to(device)
    target, kept = made_up_names(2, small)
    resolution = 64 if small else 0
    common = {"pipe": pipe, "device": device, "target": target, "kept": kept}
    tables: dict[str, Callable[[], dict[str, float]]] = {
        name: partial(waits_of_steps, **common, steps=steps, resolution=resolution, **settings)
        for name, settings in ESD.items()
    }
    tables["uce"] = partial(waits_of_a_fit, **common)
    numbers: dict[str, Any] = {name: table() for name, table in tables.items() if name in (options.only or tables)}
    print_table(
        "Waits of an optimiser step (esd, fresh) or of a fit (uce)",
        ["", "waits", "of these"],
        [
            (
                name,
                f"{total(counts):.1f}",
                ", ".join(f"{each} {number:.1f}" for each, number in sorted(counts.items())),
            )
            for name, counts in numbers.items()
        ],
    )
    finish(options, "waits", numbers, device)


if __name__ == "__main__":
    main()
