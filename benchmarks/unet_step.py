"""What a loaded erasure adds to one step of the UNet, against the bare UNet and against a stock LoRA of the same rank.

    python -m benchmarks.unet_step [--size 64] [--ranks 1 4 64] [--counts 1 10]
    python -m benchmarks.unet_step --device cuda --compile

Kernels (dispatched operations but for views) and FLOPs are counted exactly, on the meta device and always at `--size`; kernels
in the first step of a run and in a later one. Times are medians of ratios round by round, of runs of `--steps`. The erasure is
random: a `lora` on the 32 `to_k` and `to_v` of the cross-attentions, a `text_map`, or an `activation` (5 % of the units of the
16 feed-forwards, 50 timesteps); the stock LoRA is the same file, loaded by `unet.load_lora_adapter`. The work of the first two
is on the 77 text rows and does not depend on `--size`, so a ratio at a small size is an upper bound of that at a larger one.

"host" is a run on the meta device, where nothing is computed: what Python does, by which a GPU's queue is filled.
"""

import statistics
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.builders import UNetOnly, make_unet, random_activation, random_erasure, share_weights
from benchmarks.command import add_unet_arguments, finish, print_table, start, timed_arguments, unet_settings
from benchmarks.timing import interleave_calls, ratios, spread, summary
from diffusers_erasure import load_erasure
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.schema import LORA_FILE


BATCH, TOKENS = 2, 77
STEPS = 3  # of a run whose kernels are counted
TIMESTEPS = 50  # of an `activation`
RANKED, UNRANKED = ("lora", "text_map", "stock"), ("activation",)


class CountKernels(TorchDispatchMode):
    """Counts the operations below autograd, without those that only give a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Run(DiffusionPipeline):
    """What a request is to erasures, the call of a pipeline; of this one nothing but steps."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.register_modules(**{"unet" if "UNet" in type(denoiser).__name__ else "transformer": denoiser})

    @torch.no_grad()
    def __call__(self, step: Callable[[], Any], steps: int = 1, after: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            step()
            after()


def attach(unet: Any, like: Any, variant: str, rank: int | None, count: int) -> None:
    """Load `count` erasures made for a UNet that is not on the meta device, or the LoRAs of their files in the stock way."""
    sites = [f"unet.{name}" for name in text_readers(UNetOnly(like))]
    for index in range(count):
        if variant == "activation":
            load_erasure(UNetOnly(unet), random_activation(like, TIMESTEPS, seed=index), f"erasure{index}")
            continue
        assert rank is not None
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


def on_meta(meta_unet: Any, like: Any, variant: str, rank: int | None, number: int) -> Any:
    """A UNet on the meta device with what a variant adds."""
    unet = share_weights(meta_unet)
    attach(unet, like, variant, rank, number)
    return unet.to("meta")


def count(unet: Any, size: int) -> tuple[int, int, int]:
    """See [`counted`]."""
    return counted(unet, partial(unet, **inputs(unet, size, "meta", torch.float32)))


@torch.no_grad()
def counted(denoiser: Any, step: Callable[[], Any]) -> tuple[int, int, int]:
    """Kernels of the first and of a later step of a run, and FLOPs of the first, on the meta device."""
    with FlopCounterMode(display=False) as flops:
        Run(denoiser)(step)  # and what is made once for all runs
    seen = [0]
    with CountKernels() as kernels:
        Run(denoiser)(step, STEPS, lambda: seen.append(kernels.count))
    first, *later = (after - before for before, after in zip(seen, seen[1:], strict=False))
    if len(set(later)) != 1:
        raise AssertionError(f"Steps after the first have {later} kernels.")
    return first, later[0], flops.get_total_flops()


def formula(unet: Any, variant: str, rank: int | None, number: int) -> int:
    """FLOPs that a variant adds by the shapes: two products of each row with factors of rank r; an `activation` has no products."""
    if rank is None:
        return 0
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


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    add_unet_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks of an erasure; 1 4 64 by default")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of erasures loaded; 1 10 by default")
    parser.add_argument("--compile", action="store_true", help="time compiled steps too; minutes each on a CPU")
    parser.add_argument("--no-steps", action="store_true", help="count, and time the host alone")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of the runs that are timed (2)")
    options = parser.parse_args()
    start(options)
    smoke, device, dtype, size, repeats = unet_settings(options)
    ranks = options.ranks or ([4] if smoke else [1, 4, 64])
    counts = options.counts or ([1, 2] if smoke else [1, 10])
    meta, base = make_unet(smoke, device="meta"), make_unet(smoke, device, dtype)
    bare_first, bare_later, bare_flops = count(meta, size)
    rows: list[dict[str, Any]] = []
    batch = inputs(base, size, device, dtype)
    empty = inputs(meta, size, "meta", torch.float32)
    steps: dict[str, Callable[[], Any]] = {"bare": partial(Run(base), partial(base, **batch), options.steps)}
    hosts: dict[str, Callable[[], Any]] = {"bare": partial(Run(meta), partial(meta, **empty), options.steps)}
    compiled_steps: dict[str, Callable[[], Any]] = {}
    if options.compile:
        compiled_steps["bare"] = partial(Run(base), partial(compiled(share_weights(base)), **batch), options.steps)
    cases: list[tuple[str, int | None, int]] = [
        *((variant, rank, number) for rank in ranks for number in counts for variant in RANKED),
        *((variant, None, number) for number in counts for variant in UNRANKED),
    ]
    for variant, rank, number in cases:
        name = f"{variant} x{number}" if rank is None else f"{variant} r{rank} x{number}"
        counted = on_meta(meta, base, variant, rank, number)
        first, later, flops = count(counted, size)
        hosts[name] = partial(Run(counted), partial(counted, **empty), options.steps)
        rows.append(
            {
                "name": name,
                "variant": variant,
                "rank": rank,
                "erasures": number,
                "added_kernels_first": first - bare_first,
                "added_kernels": later - bare_later,
                "added_flops": flops - bare_flops,
                "formula_flops": formula(meta, variant, rank, number),
            }
        )
        if options.no_steps:
            continue
        unet = share_weights(base)
        attach(unet, base, variant, rank, number)
        steps[name] = partial(Run(unet), partial(unet, **batch), options.steps)
        if options.compile:
            compiled_steps[name] = partial(Run(unet), partial(compiled(unet), **batch), options.steps)

    numbers: dict[str, Any] = {
        "settings": {
            "size": size,
            "batch": BATCH,
            "tokens": TOKENS,
            "dtype": str(dtype),
            "repeats": repeats,
            "steps": options.steps,
        },
        "bare": {"kernels_first": bare_first, "kernels": bare_later, "flops": bare_flops},
        "rows": rows,
    }
    for key, functions in (("host", hosts), ("step", steps), ("compiled", compiled_steps)):
        if (options.no_steps and key != "host") or not functions:
            continue
        host = key == "host"
        times = interleave_calls(functions, 5 * repeats if host else repeats, "cpu" if host else device)
        numbers["bare"][f"{key}_s"] = summary(times["bare"])
        for row in rows:
            own = times[row["name"]]
            row[key] = {"seconds": summary(own), "ratio": ratios(own, times["bare"])}
            stock = times.get(f"stock r{row['rank']} x{row['erasures']}")
            if stock is not None:
                row[key]["over_stock"] = ratios(own, stock)

    print(f"\nBare step, {BATCH}x{size}x{size}, {dtype}: {bare_later} kernels, {bare_flops / 1e12:.4g} TFLOPs")
    for key in ("host_s", "step_s", "compiled_s"):
        if key in numbers["bare"]:
            print(f"  {key.removesuffix('_s')}: {spread(numbers['bare'][key], 2, 1e3)} ms")
    print_table(
        "Added to a step",
        ("variant, rank, loaded", "kernels, first step", "later", "MFLOPs, first", "of the step"),
        (
            (
                row["name"],
                f"+{row['added_kernels_first']}",
                f"+{row['added_kernels']}",
                f"+{row['added_flops'] / 1e6:.1f}",
                f"{row['added_flops'] / bare_flops:.5%}",
            )
            for row in rows
        ),
    )
    titles = {"host": "{} steps on the meta device", "step": "{} steps", "compiled": "{} compiled steps"}
    for key, title in titles.items():
        timed_rows = [row for row in rows if key in row]
        if timed_rows:
            print_table(
                f"Time of a run of {title.format(options.steps)} as a ratio: median [quartiles]",
                ("variant, rank, loaded", "to the bare run", "to the stock LoRA"),
                (
                    (
                        row["name"],
                        spread(row[key]["ratio"]),
                        spread(row[key]["over_stock"]) if "over_stock" in row[key] else "",
                    )
                    for row in timed_rows
                ),
            )
            worst = statistics.median([r[key]["ratio"]["median"] for r in timed_rows if r["variant"] != "stock"])
            print(f"Median over the erasures' variants: {worst:.3f}")
    finish(options, "unet_step", numbers, device)


if __name__ == "__main__":
    main()
