"""Does it erase? Every method on the embedded model, before its judge, against the un-erased model.

    python benchmarks/efficacy.py [--methods METHOD ...] [--half dev|report] [--jobs 2] [--json PATH] [--write-docs]

Eight objects and the styles of a half are erased one at a time, the eight objects at once, and all 32 of the half at
once; how it is measured stands in docs/efficacy.md. A method is 12 erasures and 2,648 images in the report half, 6 to
8 minutes of one thread besides the fitting. What is finished is kept in `--store`, so a run that was broken off goes on
where it was, and a new method (see efficacy_methods.py) draws only its own images.

Stored results do not notice changes of the library's code: give `--fresh` after one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; the workers inherit it

import torch  # noqa: E402
from common import finished, machine, print_table  # noqa: E402
from efficacy_methods import BASELINE, ENTRIES  # noqa: E402
from efficacy_plan import HALVES, Job, find_neighbours, make_jobs, retained  # noqa: E402
from efficacy_report import (  # noqa: E402
    ENOUGH,
    Bootstrap,
    Seen,
    images_in,
    markdown,
    measure,
    replace_between,
    shares_by,
    table,
)
from PIL import Image  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from diffusers_erasure import __version__  # noqa: E402
from diffusers_erasure.demo.command import BATCH, GUIDANCE_SCALE, STEPS, fast_pipeline  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "build" / "efficacy"
DOCS = ROOT / "docs" / "efficacy.md"
FORMAT = 1  # of the stored results


# ------------------------------------------------------------------------------------------------------- units


@dataclass(frozen=True)
class Unit:
    """One erasure by one method, with its images: what is run, and stored, as a whole."""

    method: str
    job: Job
    half: str
    steps: int

    @property
    def key(self) -> str:
        """A hash of everything that the result depends on, but the library's code and the model."""
        entry, targets = ENTRIES[self.method], self.job.targets
        anchors = entry.anchors(targets)
        parts = {
            "format": FORMAT,
            "version": __version__,
            "entry": entry.identity(targets),
            "anchors": anchors,
            "retain": retained(targets, anchors),
            "half": self.half,
            "drawing": [self.steps, GUIDANCE_SCALE, BATCH],
            "job": dataclasses.asdict(self.job),
        }
        text = json.dumps(parts, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Result:
    """What came out of a unit: what the judge saw in each shot, processor seconds, and the images for a contact sheet."""

    seen: tuple[Seen, ...]
    fit_seconds: float
    draw_seconds: float
    shown: Image.Image | None = None


def run_unit(unit: Unit) -> Result:
    """Make the erasure, draw the images with a fresh pipeline, and have the judge look."""
    from diffusers_erasure.demo import load_judge, load_pipeline

    entry, targets = ENTRIES[unit.method], unit.job.targets
    anchors = entry.anchors(targets)
    started = time.process_time()
    # Backward passes through channels-last weights are slow in small batches, and torch 2.13 crashes in some on a CPU.
    base = load_pipeline() if entry.trains else fast_pipeline()
    erasure = entry.make(base, targets, anchors, retained(targets, anchors))
    fitted = time.process_time()
    pipe = fast_pipeline()
    if erasure is not None:
        pipe.load_erasure(erasure)
    images = draw(pipe, unit, entry.drawing_for(targets))
    looked = load_judge().predict(images)
    confidences = looked.object_probabilities.max(1).tolist(), looked.style_probabilities.max(1).tolist()
    seen = tuple(Seen(*each) for each in zip(looked.objects, looked.styles, *confidences, strict=True))
    shown = side_by_side([images[i] for i in unit.job.shown]) if unit.job.shown else None
    return Result(seen, fitted - started if erasure is not None else 0.0, time.process_time() - fitted, shown)


def draw(pipe: Any, unit: Unit, drawing: Mapping[str, Any]) -> list[Image.Image]:
    """The job's images. An argument that is a text is given once for each prompt, as pipelines want it."""
    images: list[Image.Image] = []
    for start in range(0, len(unit.job.shots), BATCH):
        chunk = unit.job.shots[start : start + BATCH]
        further = {key: [value] * len(chunk) if isinstance(value, str) else value for key, value in drawing.items()}
        images += pipe(
            [ENTRIES[unit.method].prompt(shot, unit.job.targets) for shot in chunk],
            num_inference_steps=unit.steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(shot.seed) for shot in chunk],
            **further,
        ).images
    return images


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for place, image in enumerate(images):
        strip.paste(image, (place * width, 0))
    return strip


# ------------------------------------------------------------------------------------------------------- store


class Store:
    """Finished units as one small JSON file each (and a strip of images for one of them), written in one go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, unit: Unit) -> Result | None:
        """A unit's result; None where there is none, or only a part of one."""
        try:
            data = json.loads(self._file(unit, "json").read_text(encoding="utf-8"))
            seen = tuple(Seen(str(a), str(b), float(c), float(d)) for a, b, c, d in data["seen"])
            if data["key"] != unit.key or len(seen) != len(unit.job.shots):
                return None
            shown = Image.open(self._file(unit, "png")).convert("RGB") if unit.job.shown else None
            return Result(seen, float(data["fit_seconds"]), float(data["draw_seconds"]), shown)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, unit: Unit, result: Result) -> None:
        """Store a result; the JSON last, so that it never stands there without its images."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if result.shown:
            part = self._file(unit, f"{os.getpid()}.part")
            result.shown.save(part, format="png")
            part.replace(self._file(unit, "png"))
        data = {
            "key": unit.key,
            "method": unit.method,
            "scenario": unit.job.scenario,
            "targets": unit.job.targets,
            "fit_seconds": round(result.fit_seconds, 2),
            "draw_seconds": round(result.draw_seconds, 2),
            "seen": [
                [each.object, each.style, round(each.object_confidence, 4), round(each.style_confidence, 4)]
                for each in result.seen
            ],
        }
        part = self._file(unit, f"{os.getpid()}.part")
        part.write_text(json.dumps(data) + "\n", encoding="utf-8")
        part.replace(self._file(unit, "json"))

    def _file(self, unit: Unit, ending: str) -> Path:
        return self.folder / f"{unit.key}.{ending}"


def run_and_store(unit: Unit, folder: Path) -> Result:
    """Run a unit and keep it; reads it back, so that a stored and a fresh result are the same."""
    torch.set_num_threads(1)
    store = Store(folder)
    store.write(unit, run_unit(unit))
    result = store.read(unit)
    assert result is not None
    return result


def run_all(units: Sequence[Unit], folder: Path, jobs: int = 1, fresh: Sequence[str] = ()) -> dict[Unit, Result]:
    """
    The results of units: the stored ones and, in `jobs` processes of one thread each, the others.

    Args:
        units (sequence of [`Unit`]): What is wanted.
        folder (`Path`): Where results are stored.
        jobs (`int`, *optional*, defaults to 1): Processes; with 1 all is done in this one.
        fresh (sequence of `str`, *optional*): Methods whose stored results do not count.
    """
    results = {unit: Store(folder).read(unit) if unit.method not in fresh else None for unit in units}
    missing = [unit for unit, result in results.items() if result is None]
    missing.sort(key=lambda unit: len(unit.job.shots), reverse=True)  # so that none starts a long one last
    with tqdm(total=sum(len(unit.job.shots) for unit in missing), unit="image", disable=not missing) as bar:
        for unit, result in finished(missing, run_and_store, folder, jobs):
            results[unit] = result
            bar.set_postfix_str(f"{unit.method}: {unit.job.scenario}")
            bar.update(len(unit.job.shots))
    return {unit: result for unit, result in results.items() if result is not None}


# ------------------------------------------------------------------------------------------------------- report


def wanted_units(method: str, jobs: Sequence[Job], half: str, steps: int) -> list[Unit]:
    """The units of a method: all erasures that it can make."""
    most = ENTRIES[method].max_targets
    return [Unit(method, job, half, steps) for job in jobs if most is None or len(job.targets) <= most]


def summarise(
    jobs: Sequence[Job], methods: Sequence[str], results: Mapping[Unit, Result], half: str
) -> dict[str, Any]:
    """All numbers, by scenario and method, with the cells of the printed tables."""
    found = {(unit.method, unit.job): result for unit, result in results.items()}
    scenarios: dict[str, Any] = {}
    for scenario in dict.fromkeys(job.scenario for job in jobs):
        members = [job for job in jobs if job.scenario == scenario]
        baseline = [found[BASELINE, job].seen for job in members]
        rows, details, fit = {}, {}, {}
        for method in methods:
            if (method, members[0]) not in found:
                continue
            done = [found[method, job] for job in members]
            seen = [each.seen for each in done]
            anchors = {t: a for job in members for t, a in zip(job.targets, ENTRIES[method].anchors(job.targets))}
            rows[method] = measure(members, seen, baseline, anchors, Bootstrap())
            if ENTRIES[method].method:
                fit[method] = statistics.median(each.fit_seconds for each in done)
            details[method] = {
                "fit_seconds": fit.get(method),
                "draw_seconds": sum(each.draw_seconds for each in done),
                "acc_e_by_target": shares_by(members, seen, "erased", "concept"),
                "acc_e_by_wording": shares_by(members, seen, "erased", "wording"),
            }
        scenarios[scenario] = {
            "targets": list(dict.fromkeys(target for job in members for target in job.targets)),
            "images": images_in(members),
            "methods": {
                method: {**{name: dataclasses.asdict(number) for name, number in row.items()}, **details[method]}
                for method, row in rows.items()
            },
            "table": table(rows, fit),
        }
    return {"half": half, "images": sum(len(job.shots) for job in jobs), "scenarios": scenarios}


def print_report(report: Mapping[str, Any]) -> None:
    for scenario, part in report["scenarios"].items():
        cells = ", ".join(f"{name} {count}" for name, count in part["images"].items())
        header, *rows = part["table"]
        print_table(f"{scenario}: {', '.join(part['targets'])}\nimages: {cells}; in %, [95 %]", header, rows)
        if min(part["images"].values()) < ENOUGH:
            print(f"Fewer than {ENOUGH} images behind some of these numbers: a look, nothing to report.")


def write_grid(file: Path, methods: Sequence[str], results: Mapping[Unit, Result]) -> None:
    """A contact sheet: the same images by each method in a row."""
    from diffusers_erasure.pictures import contact_sheet

    shown = {unit.method: (unit.job, result.shown) for unit, result in results.items() if result.shown}
    rows, columns = [], []
    for method in methods:
        job, strip = shown[method]
        columns = [job.shots[i].object for i in job.shown]
        side = strip.height
        rows.append((method, [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(len(columns))]))
    contact_sheet(rows, columns=columns, scale=2).save(file)
    print(f"The first {columns.count(columns[0])} columns of {file} name what is erased, the others do not.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(ENTRIES), metavar="METHOD", help=", ".join(ENTRIES))
    parser.add_argument(
        "--half", choices=HALVES, default="report", help="settings are tuned on dev; report by default"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each")
    parser.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="finished results (build/efficacy)")
    parser.add_argument("--fresh", action="store_true", help="run the methods again, even if they are stored")
    parser.add_argument("--images-scale", type=float, default=1.0, metavar="X", help="share of the images, for a look")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="write a contact sheet")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there too")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/efficacy.md")
    parser.add_argument("--smoke", action="store_true", help="two methods, one object, two steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.write_docs and (options.smoke or options.images_scale < 1 or options.half != "report"):
        parser.error("--write-docs is for the report half with all images")
    if options.images_scale <= 0 or options.jobs < 1:
        parser.error("--images-scale must be above 0 and --jobs at least 1")
    options.methods = options.methods or ([BASELINE, "uce"] if options.smoke else list(ENTRIES))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    steps = 2 if options.smoke else STEPS
    jobs = make_jobs(options.half, find_neighbours(fast_pipeline()), options.images_scale, options.smoke)
    methods = dict.fromkeys((BASELINE, *options.methods))  # the shares need the un-erased model
    units = [unit for method in methods for unit in wanted_units(method, jobs, options.half, steps)]
    results = run_all(units, options.store, options.jobs, options.methods if options.fresh else ())
    report = summarise(jobs, options.methods, results, options.half)
    print_report(report)
    images = sum(len(unit.job.shots) for unit in results)
    seconds = sum(result.draw_seconds for result in results.values()) / images
    print(f"\n{report['images']} images for a method, {seconds:.2f} CPU-seconds each.")
    if options.smoke:
        print("--smoke: two steps and few images. These numbers say nothing.")
    if options.grid:
        write_grid(options.grid, options.methods, results)
    if options.json:
        about = {"benchmark": "efficacy", "smoke": options.smoke, "machine": machine("cpu", cpu_time=True)}
        about |= {"images_scale": options.images_scale, "steps": steps, "seconds_per_image": seconds}
        options.json.write_text(json.dumps({**about, **report}, indent=2) + "\n", encoding="utf-8")
    if options.write_docs:
        command = shlex.join(["python", "benchmarks/efficacy.py", *(sys.argv[1:] if arguments is None else arguments)])
        page = replace_between(DOCS.read_text(encoding="utf-8"), markdown(report, command))
        DOCS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
