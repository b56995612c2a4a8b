"""One erasure by one method with its images: what is done, and stored, as a whole."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.drawing import draw
from benchmarks.efficacy.methods import EMBEDDED, ENTRIES
from benchmarks.efficacy.numbers import Seen
from benchmarks.efficacy.plan import Job
from benchmarks.store import Store, do_all
from diffusers_erasure.demo import load_judge, load_pipeline
from diffusers_erasure.demo.drawing import BATCH, GUIDANCE_SCALE, STEPS, fast_pipeline
from diffusers_erasure.demo.worlds import WORLDS
from diffusers_erasure.pictures import contact_sheet


GPU_BATCH = 250


@dataclass(frozen=True)
class Unit:
    """One erasure by one method, with its images."""

    method: str
    job: Job
    half: str
    steps: int
    world: str = EMBEDDED
    device: str = "cpu"  # where images are drawn; erasures are made on the CPU

    def identity(self) -> dict[str, Any]:
        """All that the result depends on, but the library's code and the model; a device changes roundings alone."""
        return {
            "entry": ENTRIES[self.method].identity(self.job.targets),
            "half": self.half,
            "drawing": [self.steps, GUIDANCE_SCALE, BATCH],
            "job": dataclasses.asdict(self.job),
            **({} if self.world == EMBEDDED else {"world": self.world}),
        }


@dataclass(frozen=True)
class Result:
    """What came out of a unit: what the judge saw in each shot, processor seconds, and anchors by target where they were picked."""

    seen: tuple[Seen, ...]
    fit_seconds: float
    draw_seconds: float
    anchors: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Result:
        """From what the store keeps."""
        seconds, picked = (stored["fit_seconds"], stored["draw_seconds"]), stored.get("anchors", {})
        return cls(tuple(Seen(*each) for each in stored["seen"]), *seconds, tuple(picked.items()))


def steps_of(world: str) -> int:
    """Sampler steps with which a tiny model is drawn."""
    return STEPS if world == EMBEDDED else WORLDS[world].num_inference_steps


def wanted_units(method: str, jobs: Iterable[Job], half: str, steps: int, **where: str) -> list[Unit]:
    """The units of a method, of a `world` on a `device`: all erasures that it can make."""
    most = ENTRIES[method].max_targets
    return [Unit(method, job, half, steps, **where) for job in jobs if most is None or len(job.targets) <= most]


def run_all(units: Iterable[Unit], store: Store, jobs: int = 1) -> dict[Unit, Result]:
    """The results of units: the stored ones and, in `jobs` processes, the others."""
    stored = do_all(units, run_unit, store, jobs, label="images", size=lambda unit: len(unit.job.shots))
    return {unit: Result.of(result) for unit, result in stored.items()}


def run_unit(unit: Unit, store: Store) -> dict[str, Any]:
    """Make the erasure, draw the images with a fresh pipeline, and have the judge look; keep those that are to be shown."""
    entry, job = ENTRIES[unit.method], unit.job
    torch.backends.cudnn.allow_tf32 = False  # on a GPU the images are those of a CPU, but for roundings
    started = time.process_time()
    erasure = entry.make(job.targets, unit.world)
    fitted = time.process_time()
    pipe = fast_pipeline(load_pipeline(unit.world)).to(unit.device)
    if erasure is not None:
        pipe.load_erasure(erasure)
    prompts = [entry.prompt(shot, job.targets) for shot in job.shots]
    seeds, batch = [shot.seed for shot in job.shots], BATCH if unit.device == "cpu" else GPU_BATCH
    images = draw(pipe, prompts, seeds, unit.steps, batch, **entry.drawing_for(job.targets))
    looked = load_judge(unit.device).predict(images, batch)
    confidences = looked.object_probabilities.max(1).tolist(), looked.style_probabilities.max(1).tolist()
    if job.shown:
        folder = store.new_files(unit)
        for place in job.shown:
            images[place].save(folder / f"{place}.png")
    return {
        "seen": [
            [name, style, round(sure, 4), round(of_style, 4)]
            for name, style, sure, of_style in zip(looked.objects, looked.styles, *confidences, strict=True)
        ],
        "fit_seconds": round(fitted - started, 2) if erasure is not None else 0.0,
        "draw_seconds": round(time.process_time() - fitted, 2),
        **({"anchors": dict(zip(job.targets, entry.anchors(job.targets, erasure)))} if entry.auto_anchors else {}),
    }


def write_grid(file: Path, methods: Sequence[str], units: Iterable[Unit], store: Store) -> None:
    """A contact sheet: the same images by each method in a row."""
    shown = {unit.method: unit for unit in units if unit.job.shown}
    job = shown[methods[0]].job
    rows = [
        (method, [Image.open(store.files_of(shown[method]) / f"{place}.png").convert("RGB") for place in job.shown])
        for method in methods
    ]
    columns = [job.shots[place].object for place in job.shown]
    contact_sheet(rows, columns=columns, scale=2).save(file)
    print(f"The first {columns.count(columns[0])} columns of {file} name what is erased, the others do not.")
