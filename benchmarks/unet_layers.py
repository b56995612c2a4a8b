"""What erasures in the UNet's activations and skip connections add to one step of it: the layers `activation` and `skip`.

    python -m benchmarks.unet_layers --cpu-time [--size 32]
    python -m benchmarks.unet_layers --device cuda

Steps of the bare UNet, with an `activation` erasure (made-up masks of 5 % of the units, 50 timesteps, the 16 feed-forwards),
with one that is the same at all timesteps and fused, with DuMo's network in its full and its compact form, and with a stock
`ControlNetModel` of the same size, in turn. FLOPs are counted on the meta device, at 64 x 64. Graphs and recompilations over
50 timesteps are counted on a UNet of one block, whose graphs have the same parts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.builders import SMALL_UNET, UNetOnly, make_unet, random_activation, share_weights
from benchmarks.command import add_unet_arguments, finish, print_table, start, timed_arguments, unet_settings
from benchmarks.timing import interleave_calls, ratios, spread, summary
from benchmarks.unet_step import BATCH, TOKENS, inputs
from diffusers_erasure import Erasure, fuse_erasures, load_erasure
from diffusers_erasure.layers.activation import FEED_FORWARD
from diffusers_erasure.layers.encoder_copy import channels, empty_copy
from diffusers_erasure.layers.epr import fresh_tensors, skip_sites
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.schema import BaseModel


VARIANTS = ("activation", "folded", "full", "controlnet", "compact")
STEPS = 50
FULL_SIZE = 64


@torch.no_grad()
def skip(unet: Any, form: str) -> Erasure:
    """A network with random tensors; the copy has the UNet's own weights."""
    weights = dict(unet.named_parameters())
    tensors = fresh_tensors(unet, "compact", 8, None, 0)
    if form == "full":
        zeros = {name: value for name, value in tensors.items() if name.startswith("zero.")}
        tensors = {**zeros, **{name: weights[name].data for name, _ in empty_copy(unet).named_parameters()}}
    else:
        for name, value in tensors.items():
            if name.endswith(".up"):
                value.fill_(1e-3)
    for name, value in tensors.items():
        if name.startswith("zero."):
            value.fill_(1e-4)
    layer = Layer("skip", tuple(skip_sites(len(channels(unet)) - 1)), tensors)
    return Erasure.from_layers([layer], base=BaseModel("stable-diffusion"), concepts="a concept")


@torch.no_grad()
def made(base: Any, variant: str) -> Any:
    """A UNet that shares the base's weights, with what the variant adds; `"controlnet"` alone comes from outside."""
    unet = share_weights(base)
    if variant in ("bare", "controlnet"):
        return unet
    if variant == "folded":
        for name, part in unet.named_modules():
            if f".{name}".endswith(FEED_FORWARD):  # these are changed in place
                part.weight, part.bias = (
                    nn.Parameter(p.clone(), requires_grad=False) for p in (part.weight, part.bias)
                )
        load_erasure(UNetOnly(unet), random_activation(unet, 1))
        fuse_erasures(UNetOnly(unet))
        return unet
    load_erasure(UNetOnly(unet), random_activation(unet, STEPS) if variant == "activation" else skip(unet, variant))
    return unet


def controlnet_for(unet: Any, device: str) -> Any:
    """A stock ControlNet of the same size."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        network = ControlNetModel.from_unet(unet, load_weights_from_unet=False).eval().requires_grad_(False)
    if device == "meta":
        return network
    weights = dict(unet.named_parameters())
    network = network.to(unet.dtype).to_empty(device=device)
    for name, parameter in network.named_parameters():
        parameter.copy_(weights[name]) if name in weights else parameter.fill_(1e-4)
    return network


def step_of(unet: Any, variant: str, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """One step of a variant."""
    if variant != "controlnet":
        return lambda: unet(**batch, return_dict=False)
    network = controlnet_for(unet, str(batch["sample"].device))
    height, width = (8 * size for size in batch["sample"].shape[2:])
    hint = batch["sample"].new_zeros(BATCH, 3, height, width)

    def step() -> Any:
        down, mid = network(**batch, controlnet_cond=hint, return_dict=False)
        return unet(
            **batch, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )

    return step


@torch.no_grad()
def flops(base: Any, variant: str, size: int) -> int:
    """FLOPs of one step, counted on the meta device."""
    unet = made(base, "bare" if variant in ("activation", "folded") else variant).to("meta")  # these add no products
    step = step_of(unet, variant, inputs(unet, size, "meta", torch.float32))
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compiled(variant: str) -> dict[str, int]:
    """Graphs after the first timestep, and those that come within 50."""
    from diffusers import UNet2DConditionModel

    graphs = 0

    def backend(module: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    small = {**SMALL_UNET, **blocks, "block_out_channels": (32,), "layers_per_block": 1}
    base = UNet2DConditionModel(**small).eval().requires_grad_(False)
    unet, eager = made(base, variant), made(base, variant)
    batch = inputs(unet, 8, "cpu", torch.float32)
    torch.compiler.reset()
    function = torch.compile(unet, fullgraph=True, backend=backend)
    counts = []
    with torch.no_grad():
        for time in torch.linspace(999, 0, STEPS):
            batch["timestep"] = time
            drawn = function(**batch).sample
            counts.append(graphs)
            if len(counts) in (1, STEPS) and not torch.equal(drawn, eager(**batch).sample):
                raise AssertionError(f"{variant}: the compiled UNet gives something else.")
    torch.compiler.reset()
    return {"graphs": counts[0], "recompilations": counts[-1] - counts[0]}


@torch.no_grad()
def epr_size(unet: Any, form: str, zero_rank: int | None) -> int:
    """Bytes of a network's tensors in float16; `unet` on the meta device."""
    with torch.device("meta"):
        tensors = fresh_tensors(unet, form, 8, zero_rank, 0)
    return sum(2 * value.numel() for value in tensors.values())


def main() -> None:
    """The command line."""
    from diffusers.utils import logging

    parser = timed_arguments(__doc__)
    add_unet_arguments(parser)
    parser.add_argument("--no-compile", action="store_true", help="do not count graphs")
    options = parser.parse_args()
    start(options)
    logging.set_verbosity_error()  # it warns of each change of device
    smoke, device, dtype, size, repeats = unet_settings(options)
    base = make_unet(smoke, device, dtype)
    counted = {name: flops(base, name, 8 if smoke else FULL_SIZE) for name in ("bare", *VARIANTS)}
    batch = inputs(base, size, device, dtype)
    steps = {name: step_of(made(base, name), name, batch) for name in ("bare", *VARIANTS)}
    times = interleave_calls(steps, repeats, device)
    rows: list[dict[str, Any]] = []
    for name in VARIANTS:
        row: dict[str, Any] = {"variant": name, "seconds": summary(times[name])}
        row["ratio"] = ratios(times[name], times["bare"])
        row["flops"] = counted[name]
        row["over_controlnet"] = ratios(times[name], times["controlnet"])
        row["over_full"] = ratios(times[name], times["full"])
        if name != "controlnet" and not options.no_compile:
            row["compiled"] = compiled(name)
        rows.append(row)
    numbers: dict[str, Any] = {
        "settings": {"size": size, "batch": BATCH, "tokens": TOKENS, "dtype": str(dtype), "repeats": repeats},
        "bare": {"seconds": summary(times["bare"]), "flops": counted["bare"]},
        "rows": rows,
    }
    print_table(
        "An EPR as a file in float16, MB, by its shapes",
        ("form", "rank of the 1x1 convolutions", "MB"),
        [
            (form, zero_rank or "whole", f"{epr_size(make_unet(smoke, 'meta'), form, zero_rank) / 1e6:.1f}")
            for form, zero_rank in (("compact", 16), ("compact", None), ("full", None))
        ],
    )
    print(f"\nBare step, {BATCH}x{size}x{size}, {dtype}: {spread(numbers['bare']['seconds'], 2, 1e3)} ms")
    print_table(
        "A step as a ratio to the bare one: median [quartiles]",
        ("variant", "time", "FLOPs", "to the ControlNet's", "to the full network's", "graphs, recompilations"),
        (
            (
                row["variant"],
                spread(row["ratio"]),
                f"{row['flops'] / counted['bare']:.4f}",
                spread(row["over_controlnet"]),
                spread(row["over_full"]),
                " + ".join(map(str, row["compiled"].values())) if "compiled" in row else "",
            )
            for row in rows
        ),
    )
    finish(options, "unet_layers", numbers, device)


if __name__ == "__main__":
    main()
