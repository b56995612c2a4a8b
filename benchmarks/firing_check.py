"""What the firing check adds to a step of the UNet: kernels, synchronisations, time.

    python -m benchmarks.firing_check [--size 64] [--device cuda]

One `lora` erasure on the 32 `to_k` and `to_v` of the cross-attentions, with the check and with its hooks taken off. On a GPU
kernels and synchronisations are those that the profiler sees; on a CPU operations are counted, and nothing synchronises. "host"
is a step on the meta device, where nothing is computed: what Python does, by which a GPU's queue is filled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.builders import make_unet, share_weights
from benchmarks.command import add_unet_arguments, finish, print_table, start, timed_arguments, unet_settings
from benchmarks.timing import interleave_calls, ratios, spread, summary
from benchmarks.unet_step import attach, inputs
from diffusers_erasure.live.attachment import state_of


def erased(base: Any, like: Any, check: bool) -> Any:
    """A copy of a UNet with an erasure, and the check on it or not."""
    unet = share_weights(base)
    attach(unet, like, "lora", 4, 1)
    state = state_of(unet)
    assert state is not None and len(state.firing.owners) == 16
    if not check:
        state.firing.close()
    return unet


def counts(step: Callable[[], Any], device: str) -> dict[str, int]:
    """Kernels (on a CPU: operations) and synchronisations of one step."""
    gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    step()
    with profile(activities=activities) as seen:
        step()
    names = [event.name for event in seen.events()]
    launches = "cudaLaunchKernel" if gpu else "aten::"
    waits = sum("Synchronize" in name or "Memcpy DtoH" in name for name in names)
    return {"kernels": sum(name.startswith(launches) for name in names), "synchronisations": waits}


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    add_unet_arguments(parser)
    options = parser.parse_args()
    start(options)
    smoke, device, dtype, size, repeats = unet_settings(options)
    base, meta = make_unet(smoke, device, dtype), make_unet(smoke, device="meta")
    batch, empty = inputs(base, size, device, dtype), inputs(meta, size, "meta", torch.float32)
    variants = {"with the check": True, "without": False}
    steps = {name: partial(erased(base, base, check), **batch) for name, check in variants.items()}
    hosts: dict[str, Callable[[], Any]] = {}
    for name, check in variants.items():
        hosts[name] = partial(erased(meta, base, check).to("meta"), **empty)
    numbers: dict[str, Any] = {name: counts(step, device) for name, step in steps.items()}
    measured = {
        "step": interleave_calls(steps, repeats, device),
        "host": interleave_calls(hosts, 5 * repeats),
    }
    for what, times in measured.items():
        for name in variants:
            numbers[name][f"{what}_s"] = summary(times[name])
        numbers[f"{what} ratio"] = ratios(times["with the check"], times["without"])
    print_table(
        f"One step, 2x{size}x{size}, {dtype}",
        ("", "kernels", "synchronisations", "step, ms", "host, ms"),
        (
            (
                name,
                numbers[name]["kernels"],
                numbers[name]["synchronisations"],
                *(spread(numbers[name][f"{what}_s"], 2, 1e3) for what in measured),
            )
            for name in variants
        ),
    )
    print(", ".join(f"{what}: {spread(numbers[f'{what} ratio'])} times" for what in measured))
    finish(options, "firing_check", numbers, device)


if __name__ == "__main__":
    main()
