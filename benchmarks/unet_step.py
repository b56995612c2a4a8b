"""What a loaded erasure adds to one step of the UNet, against the bare UNet and against a stock LoRA of the same rank.

    python -m benchmarks.unet_step [--size 64] [--ranks 1 4 16] [--counts 1 10]
    python -m benchmarks.unet_step --device cuda --compile

Kernels and FLOPs are counted exactly, on the meta device and always at `--size`; times are medians of ratios round by
round. The erasure is random: a `lora` on the 32 `to_k` and `to_v` of the cross-attentions, or a `text_map`; the stock
LoRA is the same file, loaded by `unet.load_lora_adapter`. An erasure's work is on the 77 text rows and does not depend
on `--size`, so a ratio at a small size is an upper bound of that at a larger one.

"alone" is the time of the 32 projections with what the variant adds to them, less that of the bare ones: on a loaded
machine it tells more than the difference of two long steps.
"""

import statistics
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.builders import UNetOnly, make_unet, random_erasure, share_weights
from benchmarks.command import add_unet_arguments, finish, print_table, start, timed_arguments, unet_settings
from benchmarks.timing import interleave_calls, ratios, spread, summary
from diffusers_erasure import load_erasure
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.layers.text_map import TextMap
from diffusers_erasure.schema import LORA_FILE


BATCH, TOKENS = 2, 77
VARIANTS = ("lora", "text_map", "stock")


class CountKernels(TorchDispatchMode):
    """Counts the operations below autograd, without those that only give a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def attach(unet: Any, like: Any, variant: str, rank: int, count: int) -> None:
    """Load `count` erasures made for a UNet that is not on the meta device, or the LoRAs of their files in the stock way."""
    sites = [f"unet.{name}" for name in text_readers(UNetOnly(like))]
    for index in range(count):
        kind = "text_map" if variant == "text_map" else "lora"
        erasure = random_erasure(UNetOnly(like), kind, sites, rank, seed=index, size=0.01, concepts="a concept")
        if variant != "stock":
            load_erasure(UNetOnly(unet), erasure, f"erasure{index}")
            continue
        with warnings.catch_warnings(action="ignore"):  # a second adapter is meant
            unet.load_lora_adapter(
                dict(erasure.tensors[LORA_FILE]), prefix="unet", adapter_name=f"adapter{index}", low_cpu_mem_usage=True
            )
    if variant == "stock":
        unet.set_adapters([f"adapter{index}" for index in range(count)])


def inputs(unet: Any, size: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Latents, time step and text rows of one step with classifier-free guidance."""
    placed: dict[str, Any] = {"device": device, "dtype": dtype}
    return {
        "sample": torch.randn(BATCH, unet.config.in_channels, size, size, **placed),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": torch.randn(BATCH, TOKENS, unet.config.cross_attention_dim, **placed),
    }


@torch.no_grad()
def count(meta_unet: Any, like: Any, variant: str | None, rank: int, number: int, size: int) -> tuple[int, int]:
    """Kernels and FLOPs of one step, counted on the meta device."""
    unet = share_weights(meta_unet)
    if variant is not None:
        attach(unet, like, variant, rank, number)
        unet.to("meta")
    batch = inputs(unet, size, "meta", torch.float32)
    with FlopCounterMode(display=False) as flops, CountKernels() as kernels:
        unet(**batch)
    return kernels.count, flops.get_total_flops()


def formula(unet: Any, variant: str, rank: int, number: int) -> int:
    """FLOPs that a variant adds by the shapes: two products of each row with factors of rank r."""
    shapes = [(linear.in_features, linear.out_features) for linear in text_readers(UNetOnly(unet)).values()]
    if variant == "text_map":
        shapes = [(unet.config.cross_attention_dim, unet.config.cross_attention_dim)]
    return 2 * BATCH * TOKENS * rank * number * sum(map(sum, shapes))


def compiled(unet: Any) -> Callable[..., Any]:
    """Compile a step. The function has code of its own, as dynamo keeps compiled graphs by code object."""

    def step(**batch: torch.Tensor) -> Any:
        return unet(**batch, return_dict=False)

    own = types.FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
    return torch.compile(own)


def projections(unet: Any, rows: torch.Tensor) -> Callable[[], None]:
    """The 32 projections of the text rows alone, with the text map before them where there is one."""
    sites = [unet.get_submodule(site) for site in text_readers(UNetOnly(unet))]
    maps = [module for module in unet.modules() if isinstance(module, TextMap)]

    def run() -> None:
        mapped = maps[0](rows) if maps else rows
        for site in sites:
            site(mapped)

    return run


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    add_unet_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks of an erasure; 1 4 16 by default")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of erasures loaded; 1 10 by default")
    parser.add_argument("--compile", action="store_true", help="time compiled steps too; minutes each on a CPU")
    parser.add_argument("--no-steps", action="store_true", help="count, and time the projections alone")
    options = parser.parse_args()
    start(options)
    smoke, device, dtype, size, repeats = unet_settings(options)
    ranks = options.ranks or ([4] if smoke else [1, 4, 16])
    counts = options.counts or ([1, 2] if smoke else [1, 10])
    meta, base = make_unet(smoke, device="meta"), make_unet(smoke, device, dtype)
    bare_kernels, bare_flops = count(meta, base, None, 0, 0, size)
    rows: list[dict[str, Any]] = []
    batch = inputs(base, size, device, dtype)
    steps: dict[str, Callable[[], Any]] = {"bare": partial(base, **batch)}
    alone: dict[str, Callable[[], Any]] = {"bare": projections(base, batch["encoder_hidden_states"])}
    compiled_steps: dict[str, Callable[[], Any]] = {}
    if options.compile:
        compiled_steps["bare"] = partial(compiled(share_weights(base)), **batch)
    for rank in ranks:
        for number in counts:
            for variant in VARIANTS:
                name = f"{variant} r{rank} x{number}"
                kernels, flops = count(meta, base, variant, rank, number, size)
                rows.append(
                    {
                        "name": name,
                        "variant": variant,
                        "rank": rank,
                        "erasures": number,
                        "added_kernels": kernels - bare_kernels,
                        "added_flops": flops - bare_flops,
                        "formula_flops": formula(meta, variant, rank, number),
                    }
                )
                unet = share_weights(base)
                attach(unet, base, variant, rank, number)
                alone[name] = projections(unet, batch["encoder_hidden_states"])
                steps[name] = partial(unet, **batch)
                if options.compile:
                    compiled_steps[name] = partial(compiled(unet), **batch)

    numbers: dict[str, Any] = {
        "settings": {"size": size, "batch": BATCH, "tokens": TOKENS, "dtype": str(dtype), "repeats": repeats},
        "bare": {"kernels": bare_kernels, "flops": bare_flops},
        "rows": rows,
    }
    times = interleave_calls(alone, 5 * repeats, device)
    numbers["bare"]["projections_s"] = summary(times["bare"])
    for row in rows:
        own = [a - b for a, b in zip(times[row["name"]], times["bare"], strict=True)]
        row["alone_s"] = summary(own)
    for key, functions in (("step", steps), ("compiled", compiled_steps)):
        if options.no_steps or not functions:
            continue
        times = interleave_calls(functions, repeats, device)
        numbers["bare"][f"{key}_s"] = summary(times["bare"])
        for row in rows:
            own = times[row["name"]]
            stock = times[f"stock r{row['rank']} x{row['erasures']}"]
            row[key] = {"seconds": summary(own), "ratio": ratios(own, times["bare"])}
            row[key]["over_stock"] = ratios(own, stock)

    print(f"\nBare step, {BATCH}x{size}x{size}, {dtype}: {bare_kernels} kernels, {bare_flops / 1e12:.4g} TFLOPs")
    for key in ("step_s", "compiled_s", "projections_s"):
        if key in numbers["bare"]:
            print(f"  {key.removesuffix('_s')}: {spread(numbers['bare'][key], 2, 1e3)} ms")
    print_table(
        "Added to a step (alone: median [quartiles])",
        ("variant, rank, loaded", "kernels", "MFLOPs", "of the step", "alone, ms"),
        (
            (
                row["name"],
                f"+{row['added_kernels']}",
                f"+{row['added_flops'] / 1e6:.1f}",
                f"{row['added_flops'] / bare_flops:.5%}",
                spread(row["alone_s"], 2, 1e3),
            )
            for row in rows
        ),
    )
    for key in ("step", "compiled"):
        timed_rows = [row for row in rows if key in row]
        if timed_rows:
            print_table(
                f"Time of a {'compiled ' if key == 'compiled' else ''}step as a ratio: median [quartiles]",
                ("variant, rank, loaded", "to the bare step", "to the stock LoRA"),
                ((row["name"], spread(row[key]["ratio"]), spread(row[key]["over_stock"])) for row in timed_rows),
            )
            worst = statistics.median([r[key]["ratio"]["median"] for r in timed_rows if r["variant"] != "stock"])
            print(f"Median over the erasures' variants: {worst:.3f}")
    finish(options, "unet_step", numbers, device)


if __name__ == "__main__":
    main()
