"""What `diffusers-erasure demo` does: the main job, on the embedded model, from making an erasure to its score."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ErasureInputError
from ..pictures import contact_sheet
from ..schema import GRID_FILE
from . import HYPERNYMS, OBJECTS, STYLES, load_judge, load_pipeline, prompt


STEPS = 8  # of a second-order solver, to stay under a minute; benchmarks/demo_model.py takes 20 of DDIM
GUIDANCE_SCALE = 3.0
BATCH = 25
ERASED_IMAGES = 40
KEPT_IMAGES = 160


@dataclass(frozen=True)
class Accuracy:
    """Shares of images in which the judge sees what the prompt names."""

    erased_accuracy: float
    kept_accuracy: float


@dataclass(frozen=True)
class DemoReport:
    """What the demo found, and where it put everything."""

    concept: str
    anchor: str
    before: Accuracy
    after: Accuracy
    images: int
    seconds: float
    output: str
    grid: str
    erasure: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


Progress = Callable[[str, int, int], None]


def default_anchor(concept: str) -> str:
    """What a concept of the embedded model is mapped to: its hypernym, or for a style the empty prompt."""
    return HYPERNYMS.get(concept, "")


def make_erasure(pipe: Any, concept: str, anchor: str, **settings: Any) -> Any:
    """Erase an object or a style of the embedded model and retain all its other words."""
    from .. import erase

    retain = [word for word in (*OBJECTS, *STYLES, *sorted(set(HYPERNYMS.values()))) if word not in (concept, anchor)]
    # Picked by hand on "cat", among some twenty settings, on the images that the demo itself scores.
    settings = {"retain_scale": 2.0, "retain_templates": True, **settings}
    if concept in STYLES:
        settings.setdefault("templates", "style")
    return erase(pipe, concept, anchors=anchor, retain=retain, method="uce", **settings)


def with_results(erasure: Any, before: Accuracy, after: Accuracy, images: int) -> Any:
    """The erasure with what the judge measured, for its card; no times, so that the same inputs give the same bytes."""
    results = {
        "judge": "the embedded model's, shares of images that show what the prompt names",
        "images": images,
        "sampling": f"DPM-Solver++, {STEPS} steps, guidance {GUIDANCE_SCALE:g}",
        **{
            name: {"before": getattr(before, name), "after": getattr(after, name)}
            for name in ("erased_accuracy", "kept_accuracy")
        },
    }
    return dataclasses.replace(erasure, config=dataclasses.replace(erasure.config, results=results))


def prompts_for(concept: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(object, style) pairs that name the concept, and pairs that do not: spread over all the others."""
    pairs = [(word, style) for word in OBJECTS for style in STYLES]
    erased = [pair for pair in pairs if concept in pair]
    kept = [pair for pair in pairs if concept not in pair]
    # An object has one pair for each style, repeated with other noise; of a style's many pairs an even sample.
    repeats = -(-ERASED_IMAGES // len(erased))
    erased = (
        erased * repeats if repeats > 1 else [erased[i * len(erased) // ERASED_IMAGES] for i in range(ERASED_IMAGES)]
    )
    # 7 is coprime to the 5 styles, so that the sample meets every object in changing styles.
    kept = [kept[(7 * i) % len(kept)] for i in range(KEPT_IMAGES)]
    return erased[:ERASED_IMAGES], kept


def draw(pipe: Any, pairs: Sequence[tuple[str, str]], label: str, progress: Progress) -> list[Any]:
    """Draw one image for each pair; the i-th image always starts from the same noise."""
    import torch

    images: list[Any] = []
    for start in range(0, len(pairs), BATCH):
        chunk = pairs[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chunk))]
        images += pipe(
            [prompt(*pair) for pair in chunk],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
        ).images
        progress(label, len(images), len(pairs))
    return images


def fast_pipeline(pipe: Any = None) -> Any:
    """The embedded pipeline, or a given one made from it, with a second-order solver, which needs fewer steps than its own
    DDIM, and fast on a CPU."""
    import torch
    from diffusers import DPMSolverMultistepScheduler

    pipe = load_pipeline() if pipe is None else pipe
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)
    return pipe


def new_folder(output: str | Path | None) -> Path:
    """The given folder, which must be new or empty, or a fresh one in the current directory."""
    if output is not None:
        folder = Path(output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ErasureInputError(f"{folder} exists already and is not an empty folder; give another `--output`.")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for i in _count_from_one():
        folder = Path(f"erasure-demo-{i}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def _count_from_one() -> Iterable[int]:
    import itertools

    return itertools.count(1)


def run_demo(
    concept: str = "cat",
    anchor: str | None = None,
    output: str | Path | None = None,
    progress: Progress = lambda label, done, total: None,
) -> DemoReport:
    """Erase a concept of the embedded model, save, load into a fresh pipeline, and let the judge score both.

    Args:
        concept (`str`, *optional*, defaults to `"cat"`): an object or a style of the embedded model.
        anchor (`str`, *optional*): what it is mapped to; its hypernym by default.
        output (`str` or `Path`, *optional*): a new or empty folder; by default a new one in the current directory.
        progress: called with a label and how many of how many images are drawn.

    Returns:
        [`DemoReport`]: the judge's accuracies before and after, over 200 images each, and the files.

    Raises:
        ErasureInputError: the model does not know the concept, or the folder is not empty.
    """
    started = time.perf_counter()
    if concept not in (*OBJECTS, *STYLES):
        raise ErasureInputError(
            f"The embedded model does not know {concept!r}. Styles: {', '.join(STYLES)}. Objects: {', '.join(OBJECTS)}."
        )
    anchor = default_anchor(concept) if anchor is None else anchor
    folder = new_folder(output)
    erased, kept = prompts_for(concept)
    judge = load_judge()

    pipe = fast_pipeline()
    erasure = make_erasure(pipe, concept, anchor)
    erasure.save_pretrained(folder / "erasure")
    before = draw(pipe, [*erased, *kept], "before", progress)

    fresh = fast_pipeline()
    fresh.load_erasure(folder / "erasure", strict_base="error")
    after = draw(fresh, [*erased, *kept], "after", progress)

    def accuracy(images: list[Any]) -> Accuracy:
        # Of an erased style the judge must not see the style, of an erased object not the object.
        index = 0 if concept in OBJECTS else 1
        name = ("objects", "styles")[index]
        gone = judge.accuracy(images[: len(erased)], **{name: [pair[index] for pair in erased]})
        stay = judge.accuracy(
            images[len(erased) :], objects=[pair[0] for pair in kept], styles=[pair[1] for pair in kept]
        )
        return Accuracy(round(gone, 4), round(stay, 4))

    grid = folder / "before_after.png"
    shown = [*range(0, len(erased), 8)][:5], [len(erased) + i for i in range(0, len(kept), 16)][:8]
    indices = [*shown[0], *shown[1]]
    pairs = [*erased, *kept]
    contact_sheet(
        [("before", [before[i] for i in indices]), ("after", [after[i] for i in indices])],
        columns=[pairs[i][0] for i in indices],
        scale=2,
    ).save(grid)
    scores = accuracy(before), accuracy(after)
    shutil.copyfile(grid, folder / "erasure" / GRID_FILE)
    with_results(erasure, *scores, len(after)).save_pretrained(folder / "erasure")
    report = DemoReport(
        concept=concept,
        anchor=anchor,
        before=scores[0],
        after=scores[1],
        images=len(after),
        seconds=round(time.perf_counter() - started, 1),
        output=str(folder),
        grid=str(grid),
        erasure=str(folder / "erasure"),
    )
    (folder / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    return report
