"""SPEED, RECE and UCE: time, memory and file size, in Stable Diffusion 1.5's (or SDXL's) shapes with random weights.

    python -m benchmarks.closed_form [--only speed erase gated rece combine memory files] [--model sdxl] [--cpu-time]

`speed`    SPEED (V only, 16 layers) from 1,734 rows to retain that are known to the LoRA's float32 factors, against the
           published way (per-layer SVDs, mini-batches of 8, batched outer products, float32; `benchmarks/dense_closed_form.py`)
           on the same rows and draws. The published way is timed on one layer of each width, weighted by how many there
           are (`--whole-baseline`: on all); it needs up to 3.3 GB, and twice that for the float64 oracle of one layer.
`erase`    `erase(pipe, 100 targets, retain=100 names, method="speed", preset="celebrity", published=True)`, whole: with
           an empty cache, and with what the first call leaves there.
`gated`    `erase(pipe, 100 targets)` by the gated edit with the shipped list retained, likewise; bytes in float16.
`rece`     `erase` by RECE (`preset="nudity"`, 3 epochs) and UCE, with 100 names retained, whole, from a warm cache.
`combine`  `combine` of a saved erasure of 100 targets with one more, from a warm cache, reading the folder included.
`memory`   peak memory of `erase` above the loaded pipeline, in a process of its own after a first pass of the encoder.
`files`    bytes of SPEED's files in float16.

The text encoder has CLIP-L's shape and random weights, too, and the names are made-up words of three pieces.

The rows of `speed` are made up: normal numbers with a spectrum that falls by a constant factor from direction to
direction, 4.5 decades in all, and |x|^2 = 750 as in Stable Diffusion 1.x, so that the threshold of 0.1 of the published
`style` settings cuts through the spectrum. Real rows fall otherwise; what the null space is decides about the edit, not
about the time.

`--model sdxl` has `speed` (relative units, as the absolute ones were published for other rows) and `rece`, on made-up rows
as above and on a UNet of which only the Linears that read text have weights: 70 cross-attentions and the pooled vector's.
It leaves out encoding and fingerprints, and has no baseline: batched outer products of 2,048 x 2,048 need 24 GB.
"""

import contextlib
import functools
import json
import logging
import os
import tempfile
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.builders import (
    UNetOnly,
    forget_vocabulary,
    made_up_names,
    make_pipeline,
    make_sdxl_text_readers,
    make_unet,
)
from benchmarks.command import finish, in_process, print_table, start, timed_arguments
from benchmarks.dense_closed_form import dense_speed
from benchmarks.timing import interleave, peak_bytes, profiled, ratios, seconds, spread, summary
from diffusers_erasure import Erasure, base_model, cache, combine, encoding, erase
from diffusers_erasure.families.doors import ROWS
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.methods import base_sums, rece, speed, uce
from diffusers_erasure.methods.rows import KeptRows, TargetRows
from diffusers_erasure.settings import resolve


TABLES = {"sd15": ("speed", "erase", "gated", "rece", "combine", "memory", "files"), "sdxl": ("speed", "rece")}
SQUARED_NORM, DECADES = 750.0, 4.5
SETTINGS: dict[str, dict[str, Any]] = {
    "speed": {"method": "speed", "preset": "celebrity", "published": True},
    "rece": {"method": "rece", "preset": "nudity", "layer": "text_map"},
    "rece, published": {"method": "rece", "preset": "nudity", "published": True},
    "uce": {"method": "uce", "layer": "lora"},
    "gated": {"method": "gated", "retain": None, "retain_default": "auto"},
}
AIMS_S = {"empty cache": 5.0, "warm cache": 2.0, "rece": 1.0, "combine speed": 1.0}
AIMS_MB = {1: 0.06, 100: 5.0}


@dataclass(frozen=True)
class Size:
    """How many of what; less with `--smoke`."""

    counts: tuple[int, ...]
    retain_rows: int
    many: int
    some: int

    @classmethod
    def of(cls, smoke: bool, counts: Sequence[int] | None) -> "Size":
        few = cls((1, 4), 100, 20, 3) if smoke else cls((1, 10, 100), 1734, 100, 10)
        return cls(tuple(counts or few.counts), few.retain_rows, few.many, few.some)


# ------------------------------------------------------------------------------------------------------- calls


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """An empty folder for the library's cache."""
    before = os.environ.get(cache.VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[cache.VARIABLE] = folder
        try:
            yield
        finally:
            os.environ.pop(cache.VARIABLE)
            os.environ.update({} if before is None else {cache.VARIABLE: before})


@dataclass(frozen=True)
class Call:
    """A call that is timed: from a warm cache, or with `fresh` from an empty one, as in a new process."""

    name: str
    function: Callable[[], Any]
    fresh: bool = False
    aim: float | None = None
    pipe: Any = None

    def run(self, measure: Callable[[Callable[[], Any]], Any] = seconds) -> Any:
        """What is measured of it: its seconds, or those of its parts."""
        if self.fresh and self.pipe is not None:
            forget_vocabulary(self.pipe)
        with empty_cache() if self.fresh else contextlib.nullcontext():
            return measure(self.function)


def time_calls(title: str, calls: Sequence[Call], repeats: int) -> list[dict[str, Any]]:
    """Time calls in turn, and print them with their parts; those from a warm cache run once before, which fills it."""
    for call in calls:
        if not call.fresh:
            call.run()
    times = interleave({call.name: call.run for call in calls}, repeats, warmup=0)
    rows = [
        {"call": call.name, "s": summary(times[call.name]), "aim_s": call.aim, "parts_s": call.run(profiled)}
        for call in calls
    ]
    print_table(
        f"{title}, seconds: median [quartiles]",
        ("", "seconds", "aim"),
        ((row["call"], spread(row["s"], 2), "" if row["aim_s"] is None else f"<= {row['aim_s']:g}") for row in rows),
    )
    print_parts(rows, [row["call"] for row in rows])
    return rows


def print_parts(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """The functions in which any of the rows spends three hundredths of its time, the largest first."""
    shares = [{part: spent / sum(row["parts_s"].values()) for part, spent in row["parts_s"].items()} for row in rows]
    shown = {
        part: max(each.get(part, 0) for each in shares) for part in dict.fromkeys(p for each in shares for p in each)
    }
    print_table(
        "Of it by function, without what it calls, milliseconds (one further call, in the profiler)",
        ("", *names),
        (
            (part, *(f"{row['parts_s'].get(part, 0) * 1e3:.0f}" for row in rows))
            for part in sorted(shown, key=lambda part: -shown[part])
            if shown[part] >= 0.03
        ),
    )


# ------------------------------------------------------------------------------------------------- made-up rows


def falling(*counts: int, width: int, seed: int) -> list[torch.Tensor]:
    """Some sets of rows [count, width] of one falling spectrum; float32 values, as encoders give them."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    scale = torch.logspace(0, -DECADES / 2, width)
    axes = axes * (scale * (SQUARED_NORM / scale.square().sum()).sqrt())[:, None]
    return [(torch.randn(count, width, generator=generator) @ axes).double() for count in counts]


def problem_rows(
    count: int, retain: int, width: int, empty: int = 77, with_gram: bool = False
) -> tuple[TargetRows, KeptRows]:
    """The rows of some targets, all with one anchor, and those that must not change."""
    targets, anchor, kept, null = falling(count, 1, retain, empty, width=width, seed=count)
    anchors = anchor.expand(count, -1)
    found = TargetRows(
        targets, anchors, (targets, anchors), float(targets.square().sum(1).mean()), count, prompts=count
    )
    gram = kept.T @ kept + null.T @ null if with_gram else None
    return found, KeptRows(kept, null, gram, retain + with_gram, retain + empty)


# -------------------------------------------------------------------------------------------------------- speed


def from_rows(kind: str, pipe: Any, found: Mapping[str, tuple[TargetRows, KeptRows]], settings: Any) -> Any:
    """What a method makes of known rows, up to the layers' tensors: without encoding, report and fingerprints."""
    if kind == "speed":
        problems = speed.problems_of(found, settings)
        columns = {name: problem.columns for name, problem in problems.items()}
        sites = speed.sites_of(pipe, settings.params, columns)
        factors, _ = speed.solve_sites(pipe, problems, sites, settings)
        return speed.as_lora(speed.lazy_factors(factors, sites), settings)
    if kind == "uce":
        return uce.publish(pipe, uce.solve_all(found, settings), settings)
    maps = {}
    for name, (rows, kept) in found.items():
        weights = base_sums.weight_gram(rece.readers_of(pipe, name), rows.targets.shape[1])
        scales = rece.Scales.of(settings, rows, rows, kept, weights)
        maps[name] = rece.solve(rows, rows, kept, weights, scales, settings.epochs, settings.keep_erased)
    return uce.publish(pipe, maps, settings)


def speed_against_the_published_way(options: Any, size: Size, repeats: int) -> list[dict[str, Any]]:
    """The table `speed` of Stable Diffusion 1.5."""
    pipe = UNetOnly(make_unet(options.smoke))
    width = pipe.unet.config.cross_attention_dim
    settings = resolve(speed.Config(preset="style", published=True), speed.Settings)
    sites = {name: linear for name, linear in base_model.text_readers(pipe).items() if name.endswith("to_v")}
    groups: dict[int, list[str]] = {}
    for name, linear in sites.items():
        groups.setdefault(linear.out_features, []).append(name)
    table = []
    for count in size.counts:
        rows, kept = problem_rows(count, size.retain_rows, width)
        problem = speed.Problem.of(
            slice(0, width), rows, kept, settings
        )  # the baseline shares its shuffle and its centres

        def draws(name: str, problem: Any = problem) -> torch.Tensor:
            """What the library draws for a layer."""
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + list(sites).index(name))
            return torch.randn(settings.augment, len(problem.retain), generator=generator, dtype=torch.float64)

        def dense(name: str, dtype: torch.dtype, rows: Any = rows, problem: Any = problem) -> torch.Tensor:
            return dense_speed(
                {name: sites[name].weight},
                *(rows.targets, rows.anchors, rows.concepts, problem.retain, problem.invariants),
                **{key: getattr(settings, key) for key in ("threshold", "ridge", "lamb", "filter", "chunk")},
                draws={name: draws(name)},
                dtype=dtype,
            )[name]

        found: dict[str, torch.Tensor] = {}

        def keep(name: str, found: Any = found, dense: Any = dense) -> None:
            found[name] = dense(name, torch.float32)

        def published_way() -> float:
            """One layer of each width stands for all of them."""
            total = 0.0
            for names in groups.values():
                for name in names if options.whole_baseline else names[:1]:
                    taken = seconds(functools.partial(keep, name))
                    total += taken if options.whole_baseline else taken * len(names)
            return total

        ours = functools.partial(from_rows, "speed", pipe, {ROWS: (rows, kept)}, settings)
        warm, cold = Call("warm", ours), Call("cold", ours, fresh=True)
        warm.run()  # fills the cache
        functions = {"ours": warm.run, "first": cold.run, "baseline": published_way}
        times = interleave(functions, repeats, warmup=0)

        lora = ours().layers[0].tensors
        edits = {n: lora[n + UP].double() @ lora[n + DOWN].double() for n in found}
        apart = {n: float((edits[n] - dw.double()).norm() / dw.double().norm()) for n, dw in found.items()}
        name = groups[min(groups)][0]
        exact = dense(name, torch.float64)
        error = {
            "ours": float((edits[name] - exact).norm() / exact.norm()),
            "baseline": float((found[name].double() - exact).norm() / exact.norm()),
        }
        table.append(
            {
                "targets": count,
                "retain": size.retain_rows,
                "layers": len(sites),
                "ours_s": summary(times["ours"]),
                "first_s": summary(times["first"]),
                "baseline_s": summary(times["baseline"]),
                "speedup": ratios(times["baseline"], times["ours"]),
                "speedup_first": ratios(times["baseline"], times["first"]),
                "parts_s": warm.run(profiled),
                "apart": apart,
                "error": error,
            }
        )
    print_table(
        f"SPEED with {size.retain_rows} known rows to retain, {len(sites)} layers, seconds: median [quartiles]",
        ("targets", "ours", "directions not cached", "published way", "times faster (aim 10)", "not cached"),
        (
            (
                row["targets"],
                spread(row["ours_s"], 2),
                spread(row["first_s"], 2),
                spread(row["baseline_s"], 1),
                spread(row["speedup"], 1),
                spread(row["speedup_first"], 1),
            )
            for row in table
        ),
    )
    if not options.whole_baseline:
        print("The published way: one layer of each width, times their number.")
    print_parts(table, [f"{row['targets']} targets" for row in table])
    print_table(
        "Errors of the edit, |dW - other| / |other|; against the float64 oracle on one layer",
        ("targets", "ours - published way", "ours - oracle", "published way - oracle"),
        (
            (
                row["targets"],
                f"{max(row['apart'].values()):.1e}",
                *(f"{row['error'][key]:.1e}" for key in ("ours", "baseline")),
            )
            for row in table
        ),
    )
    return table


# ------------------------------------------------------------------------------------------- whole calls, SD 1.5


def fitter(pipe: Any, size: Size, smoke: bool) -> Callable[..., Erasure]:
    """`fit(kind, start, stop)` erases those targets."""
    names = made_up_names(2 * size.many + 1, smoke)
    targets, retain = names[: size.many + 1], names[size.many + 1 :]

    def fit(kind: str, start: int, stop: int) -> Erasure:
        return erase(pipe, targets[start:stop], **{"retain": retain, "retain_default": "none", **SETTINGS[kind]})

    return fit


def combinations(pipe: Any, fit: Callable[..., Erasure], size: Size, folder: Path) -> list[Call]:
    """The calls of the table `combine`; makes their parts."""
    calls = []
    for kind in ("speed", "rece", "uce"):
        place = folder / kind
        fit(kind, 0, size.many).save_pretrained(place)
        more = fit(kind, size.many, size.many + 1)
        joint = functools.partial(combine, [place, more], pipe=pipe)
        calls.append(Call(f"{kind}, joint", joint, aim=AIMS_S.get(f"combine {kind}")))
        calls.append(Call(f"{kind}, sum", functools.partial(combine, [place, more], mode="sum")))
    return calls


# ------------------------------------------------------------------------------------------------ memory, files


def measure_in_child(kind: str, smoke: bool, size: Size) -> None:
    """In a process of its own: load, encode once, then erase; print how much the peak rose."""
    pipe = make_pipeline(smoke)
    fit = fitter(pipe, size, smoke)
    encoding.all_rows(pipe, ["a photo"])
    with contextlib.suppress(OSError):  # Linux: forget the peak of loading
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    fit(kind, 0, size.many)
    print(json.dumps({"before": before, "after": peak_bytes()}))


def measure_memory(options: Any, size: Size) -> list[dict[str, Any]]:
    """The table `memory`."""
    rows = []
    for kind in ("speed", "rece", "uce"):
        with empty_cache():
            for cached in (False, True):
                command = ["-m", "benchmarks.closed_form", "--child", kind, "--threads", str(torch.get_num_threads())]
                numbers = in_process(*command, *["--smoke"] * options.smoke)
                rows.append({"method": kind, "cached": cached, "bytes": numbers["after"] - numbers["before"]})
    print_table(
        f"Peak memory above the loaded pipeline, {size.many} targets and as many names retained, MB (aim <= 200)",
        ("", "MB"),
        (
            (f"{row['method']}, {'warm' if row['cached'] else 'empty'} cache", f"{row['bytes'] / 1e6:.0f}")
            for row in rows
        ),
    )
    return rows


def measure_files(fit: Callable[..., Erasure], size: Size) -> list[dict[str, Any]]:
    """The table `files`."""
    rows: list[dict[str, Any]] = []
    for count in (1, size.many):
        files = fit("speed", 0, count).to_files(dtype=torch.float16)
        rows.append({"concepts": count, "files": {name: len(data) for name, data in files.items()}})
    names = list(dict.fromkeys(name for row in rows for name in row["files"]))
    print_table(
        "SPEED's files in float16, one row a concept, MB",
        ("concepts", *names, "all", "aim for the LoRA"),
        (
            (
                row["concepts"],
                *(f"{row['files'].get(name, 0) / 1e6:.3f}" for name in names),
                f"{sum(row['files'].values()) / 1e6:.3f}",
                f"<= {AIMS_MB[row['concepts']]:g}" if row["concepts"] in AIMS_MB else "",
            )
            for row in rows
        ),
    )
    return rows


# --------------------------------------------------------------------------------------------------------- SDXL


def known_rows_calls(kind: str, pipe: Any, size: Size, settings: Any) -> list[Call]:
    """A method on made-up rows of both inputs of SDXL's UNet; where it uses the cache, first from an empty one."""
    pooled = pipe.unet.add_embedding.linear_1.in_features - 6 * pipe.unet.config.addition_time_embed_dim
    calls = []
    for count, fresh in [(size.counts[0], True)] * (kind != "uce") + [(count, False) for count in size.counts]:
        gram = kind != "speed"
        found = {
            ROWS: problem_rows(count, size.retain_rows, pipe.unet.config.cross_attention_dim, with_gram=gram),
            "text_embeds": problem_rows(count, size.retain_rows, pooled, empty=1, with_gram=gram),
        }
        name = f"{kind}, {count}" + ", empty cache" * fresh
        calls.append(Call(name, functools.partial(from_rows, kind, pipe, found, settings), fresh))
    return calls


def sdxl(options: Any, size: Size, repeats: int, only: Sequence[str]) -> dict[str, Any]:
    """The tables of SDXL."""
    pipe = UNetOnly(make_sdxl_text_readers(options.smoke))
    numbers: dict[str, Any] = {}
    if "speed" in only:
        relative = {name: speed.PUBLISHED["style"][name] / SQUARED_NORM for name in ("threshold", "ridge")}
        config = speed.Config(preset="style", published=True, units="relative", **relative)
        title = f"SDXL: SPEED with {size.retain_rows} known rows to retain"
        numbers["speed"] = time_calls(
            title, known_rows_calls("speed", pipe, size, resolve(config, speed.Settings)), repeats
        )
    if "rece" in only:
        calls = known_rows_calls("rece", pipe, size, resolve(rece.Config(preset="nudity"), rece.Settings))
        calls += known_rows_calls("uce", pipe, size, resolve(uce.Config(), uce.Settings))
        numbers["rece"] = time_calls("SDXL: RECE (3 epochs) and UCE on known rows", calls, repeats)
    return numbers


# ------------------------------------------------------------------------------------------------- command line


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    parser.add_argument("--model", choices=sorted(TABLES), default="sd15", help="whose shapes; sd15 by default")
    parser.add_argument("--only", nargs="+", choices=TABLES["sd15"], help="some of the tables; all by default")
    parser.add_argument("--targets", type=int, nargs="+", help="numbers of targets of `speed`; 1 10 100 by default")
    parser.add_argument("--whole-baseline", action="store_true", help="time the published way on all layers")
    parser.add_argument("--child", help=SUPPRESS)
    options = parser.parse_args()
    start(options)
    logging.getLogger("diffusers_erasure").setLevel(logging.ERROR)  # random rows are often told to hardly move
    size = Size.of(options.smoke, options.targets)
    if options.child:
        measure_in_child(options.child, options.smoke, size)
        return
    repeats = options.repeats or (1 if options.smoke or options.model == "sdxl" else 5)
    only = options.only or TABLES[options.model]
    numbers: dict[str, Any] = {"model": options.model}
    with empty_cache():
        numbers |= (sdxl if options.model == "sdxl" else sd15)(options, size, repeats, only)
    finish(options, "closed_form", numbers)


def sd15(options: Any, size: Size, repeats: int, only: Sequence[str]) -> dict[str, Any]:
    """The tables of Stable Diffusion 1.5."""
    numbers: dict[str, Any] = {}
    if "speed" in only:
        numbers["speed"] = speed_against_the_published_way(options, size, repeats)
    if "memory" in only:
        numbers["memory"] = measure_memory(options, size)  # before this process holds a pipeline, too
    if set(only) <= {"speed", "memory"}:
        return numbers
    fit = fitter(pipe := make_pipeline(options.smoke), size, options.smoke)
    if "erase" in only:
        whole = functools.partial(fit, "speed", 0, size.many)
        calls = [
            Call(name, whole, name == "empty cache", AIMS_S[name], pipe) for name in ("empty cache", "warm cache")
        ]
        numbers["erase"] = time_calls(f"erase: SPEED, {size.many} targets, {size.many} retained", calls, repeats)
    if "gated" in only:
        whole = functools.partial(fit, "gated", 0, size.many)
        calls = [Call("empty cache", whole, True, 30.0, pipe), Call("warm cache", whole, False, 10.0, pipe)]
        numbers["gated"] = time_calls(f"erase: gated, {size.many} targets", calls, repeats)
        files = whole().to_files(dtype=torch.float16)
        print({name: f"{len(data) / size.many / 1e3:.1f} kB a concept" for name, data in files.items()})
    if "rece" in only:
        calls = [
            Call(f"{kind}, {n}", functools.partial(fit, kind, 0, n), aim=AIMS_S.get(kind.partition(",")[0]))
            for kind in ("rece", "rece, published", "uce")
            for n in (1, size.some)
        ]
        numbers["rece"] = time_calls(f"erase: RECE (3 epochs) and UCE, {size.many} retained", calls, repeats)
    if "combine" in only:
        with tempfile.TemporaryDirectory() as folder:
            calls = combinations(pipe, fit, size, Path(folder))
            numbers["combine"] = time_calls(f"combine: {size.many} targets and one more", calls, repeats)
    if "files" in only:
        numbers["files"] = measure_files(fit, size)
    return numbers


if __name__ == "__main__":
    main()
