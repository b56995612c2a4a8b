"""SPEED, RECE and UCE: time, memory and file size, in Stable Diffusion 1.5's (or SDXL's) shapes with random weights.

    python benchmarks/closed_form.py [--only speed erase rece combine memory files] [--model sdxl] [--cpu-time]

`speed`    SPEED (V only, 16 layers) from 1,734 rows to retain that are known to the LoRA's float32 factors, against the
           published way (per-layer SVDs, mini-batches of 8, batched outer products, float32; `tests/dense_closed_form.py`)
           on the same rows and draws. The published way is timed on one layer of each width, weighted by how many there
           are (`--whole-baseline`: on all); it needs up to 3.3 GB, and twice that for the float64 oracle of one layer.
`erase`    `erase(pipe, 100 targets, retain=100 names, method="speed", preset="celebrity", published=True)`, whole: with
           an empty cache, and with what the first call leaves there.
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
import resource
import runpy
import subprocess
import sys
import tempfile
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from common import (
    UNetOnly,
    arguments,
    clock,
    finish,
    interleave,
    made_up_names,
    make_pipeline,
    make_sdxl_text_readers,
    make_unet,
    name_tokenizer,
    print_table,
    ratios,
    seconds,
    spread,
    start,
    summary,
)

from diffusers_erasure import Erasure, base_model, cache, combine, combining, encoding, erase
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.methods import base_sums, publishing, rece, speed, uce
from diffusers_erasure.methods.rows import POOLED, ROWS, KeptRows, TargetRows
from diffusers_erasure.schema import LORA_FILE, Concept


TABLES = {"sd15": ("speed", "erase", "rece", "combine", "memory", "files"), "sdxl": ("speed", "rece")}
SQUARED_NORM, DECADES = 750.0, 4.5
SETTINGS: dict[str, dict[str, Any]] = {
    "speed": {"method": "speed", "preset": "celebrity", "published": True},
    "rece": {"method": "rece", "preset": "nudity"},
    "rece, published": {"method": "rece", "preset": "nudity", "published": True},
    "uce": {"method": "uce"},
}
AIMS_S = {"empty cache": 5.0, "warm cache": 2.0, "rece": 1.0, "combine speed": 1.0}
AIM_BYTES = 200e6
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


# --------------------------------------------------------------------------------------------- the parts of a call


# What a part names counts without those parts that it calls itself.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "reading files": [(Erasure, "from_pretrained")],
    "encoding": [(encoding, "_short"), (encoding, "_full")],
    "checksum of the text encoder": [(encoding, "fingerprint")],
    "checksum of the projections": [(base_sums, "checksum")],
    "fingerprint of the base": [(publishing, "describe_base"), (combining, "compare_base")],
    "reading and writing the cache": [(cache, "_read"), (cache, "_write")],
    "least directions": [(base_sums, "least_direction")],
    "sum of W^T W": [(base_sums, "weight_gram")],
    "setting up": [(speed, "Problem"), (combining, "_joined_rows"), (rece, "target_rows"), (uce, "target_rows")],
    "W times rows": [(speed, "weight_times"), (uce, "weight_times")],
    "filter and augmentation": [(speed, "refine")],
    "null space": [(speed, "kept_directions")],
    "edit": [(speed, "edit"), (rece, "solve"), (uce, "solve_all")],
    "solving, else": [(speed, "solve_sites")],
    "publishing": [(speed, "as_lora"), (rece, "publish"), (uce, "publish"), (combining, "_sum")],
    "report": [(speed, "report"), (rece, "report"), (uce, "report")],
    "checks of the erasure": [(speed, "make_erasure"), (rece, "make_erasure"), (uce, "make_erasure")],
}
ELSE = "all else"


def parts_of(call: Callable[[], Any]) -> dict[str, float]:
    """Run a call and return the seconds that it spends in each part."""
    spent = dict.fromkeys([*PARTS, ELSE], 0.0)
    within = [ELSE]
    last = clock()

    def switch() -> None:
        nonlocal last
        now = clock()
        spent[within[-1]] += now - last
        last = now

    def timed(part: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def inner(*args: Any, **kwargs: Any) -> Any:
            switch()
            within.append(part)
            try:
                return original(*args, **kwargs)
            finally:
                switch()
                within.pop()

        return inner

    with contextlib.ExitStack() as patches:
        for part, places in PARTS.items():
            for owner, name in places:
                if name == "Problem":  # a class, made by its `of`
                    owner, name = speed.Problem, "of"
                patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        last = clock()
        call()
        switch()
    return spent


@dataclass(frozen=True)
class Call:
    """A call that is timed, from an empty cache or from a warm one."""

    name: str
    function: Callable[[], Any]
    fresh: bool = False
    aim: float | None = None

    def run(self) -> dict[str, float]:
        """The seconds of its parts."""
        if not self.fresh:
            return parts_of(self.function)
        with empty_cache():
            base_model._vocabularies.clear()  # as in a new process
            return parts_of(self.function)


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """An empty folder for the library's cache."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {cache.VARIABLE: folder}):
        yield


def time_calls(title: str, calls: Sequence[Call], repeats: int) -> list[dict[str, Any]]:
    """Time calls in turn, and print them with their parts; those from a warm cache run once before, which fills it."""
    for call in calls:
        if not call.fresh:
            call.run()
    parts: dict[str, list[dict[str, float]]] = {call.name: [] for call in calls}

    def run(call: Call) -> float:
        parts[call.name].append(call.run())
        return sum(parts[call.name][-1].values())

    times = interleave({call.name: functools.partial(run, call) for call in calls}, repeats, warmup=0)
    rows = []
    for call in calls:
        timed = parts[call.name]
        middles = {part: median(one[part] for one in timed) for part in timed[0]}
        rows.append({"call": call.name, "s": summary(times[call.name]), "aim_s": call.aim, "parts_s": middles})
    print_table(
        f"{title}, seconds: median [quartiles]",
        ("", "seconds", "aim"),
        ((row["call"], spread(row["s"], 2), "" if row["aim_s"] is None else f"<= {row['aim_s']:g}") for row in rows),
    )
    print_parts(rows, [row["call"] for row in rows])
    return rows


def print_parts(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """The parts that any of the rows spends time in, largest first."""
    largest = {part: max(row["parts_s"][part] for row in rows) for part in rows[0]["parts_s"]}
    print_table(
        "Of it, milliseconds (medians)",
        ("", *names),
        (
            (part, *(f"{row['parts_s'][part] * 1e3:.0f}" for row in rows))
            for part in sorted(largest, key=lambda part: -largest[part])
            if largest[part] >= 5e-4
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


def speed_factors(pipe: Any, rows: TargetRows, kept: KeptRows, config: speed.Config) -> dict[str, torch.Tensor]:
    """SPEED from rows to float32 factors."""
    problems = {ROWS: speed.Problem.of(rows, kept, config)}
    sites = speed.sites_of(pipe, config, problems)
    factors, _ = speed.solve_sites(pipe, problems, sites, config)
    lazy = {site.name: (lambda site=site: factors[site.name]) for site in sites}
    return speed.as_lora(pipe, lazy, config).tensors[LORA_FILE]


def speed_against_the_published_way(options: Any, size: Size, repeats: int) -> list[dict[str, Any]]:
    """The table `speed` of Stable Diffusion 1.5."""
    dense_speed = runpy.run_path(str(Path(__file__).resolve().parents[1] / "tests" / "dense_closed_form.py"))[
        "dense_speed"
    ]
    pipe = UNetOnly(make_unet(options.smoke))
    width = pipe.unet.config.cross_attention_dim
    config = speed.Config(preset="style", published=True)
    sites = {name: linear for name, linear in base_model.text_readers(pipe).items() if name.endswith("to_v")}
    groups: dict[int, list[str]] = {}
    for name, linear in sites.items():
        groups.setdefault(linear.out_features, []).append(name)
    table = []
    for count in size.counts:
        rows, kept = problem_rows(count, size.retain_rows, width)
        problem = speed.Problem.of(rows, kept, config)  # the baseline shares its shuffle and its centres

        def draws(name: str, problem: Any = problem) -> torch.Tensor:
            """What the library draws for a layer."""
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + list(sites).index(name))
            return torch.randn(config.augment, len(problem.retain), generator=generator, dtype=torch.float64)

        def dense(name: str, dtype: torch.dtype, rows: Any = rows, problem: Any = problem) -> torch.Tensor:
            return dense_speed(
                {name: sites[name].weight},
                *(rows.targets, rows.anchors, rows.concepts, problem.retain, problem.invariants),
                **{key: getattr(config, key) for key in ("threshold", "ridge", "lamb", "filter", "chunk")},
                draws={name: draws(name)},
                dtype=dtype,
            )[name]

        found: dict[str, torch.Tensor] = {}

        def published_way() -> float:
            """One layer of each width stands for all of them."""
            total = 0.0
            for names in groups.values():
                for name in names if options.whole_baseline else names[:1]:
                    taken = seconds(lambda name=name: found.update({name: dense(name, torch.float32)}))
                    total += taken if options.whole_baseline else taken * len(names)
            return total

        ours = functools.partial(speed_factors, pipe, rows, kept, config)
        warm, cold = Call("warm", ours), Call("cold", ours, fresh=True)
        parts: list[dict[str, float]] = []

        def run_warm() -> float:
            parts.append(warm.run())
            return sum(parts[-1].values())

        functions = {"ours": run_warm, "first": lambda: sum(cold.run().values()), "baseline": published_way}
        run_warm()  # fills the cache
        times = interleave(functions, repeats, warmup=0)

        lora = ours()
        edits = {n: lora[f"unet.{n}{UP}"].double() @ lora[f"unet.{n}{DOWN}"].double() for n in found}
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
                "parts_s": {part: median(one[part] for one in parts[1:]) for part in parts[0]},
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


def pipeline(smoke: bool) -> Any:
    """The pipeline, with a tokenizer that knows the names."""
    pipe = make_pipeline(smoke)
    pipe.tokenizer = name_tokenizer(smoke)
    return pipe


def fitter(pipe: Any, size: Size, smoke: bool) -> Callable[..., Erasure]:
    """`fit(kind, start, stop)` erases those targets."""
    names = made_up_names(2 * size.many + 1, smoke)
    targets, retain = names[: size.many + 1], names[size.many + 1 :]

    def fit(kind: str, start: int, stop: int) -> Erasure:
        return erase(pipe, targets[start:stop], retain=retain, **SETTINGS[kind])

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


def peak_bytes() -> int:
    """The most memory that this process has held."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else 1024 * value


def measure_in_child(kind: str, smoke: bool, size: Size) -> None:
    """In a process of its own: load, encode once, then erase; print how much the peak rose."""
    pipe = pipeline(smoke)
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
                command = [sys.executable, __file__, "--child", kind, "--threads", str(torch.get_num_threads())]
                command += ["--smoke"] * options.smoke
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                numbers = json.loads(done.stdout.splitlines()[-1])
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
    rows = []
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


def refit_call(name: str, method: Any, pipe: Any, count: int, retain: int, config: Any, fresh: bool = False) -> Call:
    """`refit` on made-up rows, up to the layers' tensors: without encoding and without fingerprints."""
    pooled = pipe.unet.add_embedding.linear_1.in_features - 6 * pipe.unet.config.addition_time_embed_dim
    gram = method is not speed
    pairs = {
        ROWS: problem_rows(count, retain, pipe.unet.config.cross_attention_dim, with_gram=gram),
        POOLED: problem_rows(count, retain, pooled, empty=1, with_gram=gram),
    }
    kept = {name: pair[1] for name, pair in pairs.items()}
    rows = {"": {name: pair[0] for name, pair in pairs.items()}}
    concepts = [Concept(f"name {i}", "anchor") for i in range(count)]

    def run() -> None:
        stubs = {"kept_rows": lambda *_, **__: kept, "make_erasure": lambda *_, **__: None}
        with mock.patch.multiple(method, **stubs):
            method.refit(pipe, concepts, config, rows)

    return Call(name, run, fresh)


def sdxl(options: Any, size: Size, repeats: int, only: Sequence[str]) -> dict[str, Any]:
    """The tables of SDXL."""
    pipe = UNetOnly(make_sdxl_text_readers(options.smoke))
    numbers: dict[str, Any] = {}
    if "speed" in only:
        style = speed.PUBLISHED["style"]
        relative = {"threshold": style["threshold"] / SQUARED_NORM, "ridge": style["ridge"] / SQUARED_NORM}
        config = speed.Config(preset="style", published=True, units="relative", **relative)
        first = size.counts[0]
        calls = [refit_call(f"{first}, empty cache", speed, pipe, first, size.retain_rows, config, fresh=True)]
        calls += [refit_call(str(n), speed, pipe, n, size.retain_rows, config) for n in size.counts]
        title = f"SDXL: SPEED with {size.retain_rows} known rows to retain"
        numbers["speed"] = time_calls(title, calls, repeats)
    if "rece" in only:
        settings = {"rece": (rece, rece.Config(preset="nudity")), "uce": (uce, uce.Config())}
        calls = []
        for kind, (method, config) in settings.items():
            if kind == "rece":
                name = f"rece, {size.counts[0]}, empty cache"
                calls.append(refit_call(name, method, pipe, size.counts[0], size.retain_rows, config, fresh=True))
            for n in size.counts:
                calls.append(refit_call(f"{kind}, {n}", method, pipe, n, size.retain_rows, config))
        numbers["rece"] = time_calls("SDXL: RECE (3 epochs) and UCE on known rows", calls, repeats)
    return numbers


# ------------------------------------------------------------------------------------------------- command line


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
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
        if options.model == "sdxl":
            numbers |= sdxl(options, size, repeats, only)
        else:
            numbers |= sd15(options, size, repeats, only)
    finish(options, "closed_form", numbers)


def sd15(options: Any, size: Size, repeats: int, only: Sequence[str]) -> dict[str, Any]:
    """The tables of Stable Diffusion 1.5."""
    numbers: dict[str, Any] = {}
    if "speed" in only:
        numbers["speed"] = speed_against_the_published_way(options, size, repeats)
    if "memory" in only:
        numbers["memory"] = measure_memory(options, size)  # before this process holds a pipeline, too
    if not {"erase", "rece", "combine", "files"} & set(only):
        return numbers
    pipe = pipeline(options.smoke)
    fit = fitter(pipe, size, options.smoke)
    if "erase" in only:
        whole = functools.partial(fit, "speed", 0, size.many)
        calls = [Call(name, whole, name == "empty cache", AIMS_S[name]) for name in ("empty cache", "warm cache")]
        numbers["erase"] = time_calls(f"erase: SPEED, {size.many} targets, {size.many} retained", calls, repeats)
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
