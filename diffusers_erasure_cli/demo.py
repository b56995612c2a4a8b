"""The command `demo`: the main job, on the embedded model, from making an erasure to its score."""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from .options import Json, bar, out
from .threads import limit_threads


if TYPE_CHECKING:
    from diffusers_erasure import Erasure

ERASED_IMAGES = 40
KEPT_IMAGES = 160

Pair = tuple[str, str]  # object, style
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Shares of images in which the judge sees what the prompt names."""

    erased_accuracy: float
    kept_accuracy: float


@dataclasses.dataclass(frozen=True)
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
        return json.dumps(dataclasses.asdict(self), indent=2)


def demo(
    concept: Annotated[str, typer.Option(help="Object or style of the embedded model to erase.")] = "dog",
    anchor: Annotated[
        str | None,
        typer.Option(help="What it is mapped to; by default the nearest thing of its kind, of the model's words."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A new folder; by default one in the current directory.")] = None,
    as_json: Json = False,
) -> None:
    """The main job on the embedded model: erase, save, load into a fresh pipeline, compare, score."""
    limit_threads()
    # What the fit warns of in numbers, the demo measures on pictures.
    for module in ("publishing", "gated"):
        logging.getLogger(f"diffusers_erasure.methods.{module}").setLevel(logging.ERROR)
    with bar() as shown:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = shown.add_task(f"drawing {label}", total=total)
            shown.update(tasks[label], completed=done)

        report = run_demo(concept, anchor, output, progress)
    if as_json:
        print(report.to_json())
        return
    _print_report(report)


def _print_report(report: DemoReport) -> None:
    from rich.table import Table

    table = Table("", "before", "after")
    rows = (("the erased concept is drawn", "erased_accuracy"), ("kept concepts are drawn", "kept_accuracy"))
    for label, name in rows:
        table.add_row(label, f"{getattr(report.before, name):.1%}", f"{getattr(report.after, name):.1%}")
    out.print(
        Text(f"Erased {report.concept!r} (mapped to {report.anchor!r}), judged over {report.images} images each:")
    )
    out.print(table)
    out.print(Text(f"erasure       {report.erasure}"))
    out.print(Text(f"before/after  {report.grid}"))
    out.print(Text(f"report        {Path(report.output) / 'report.json'}"))
    out.print(Text(f"{report.seconds:.0f} s"))


def run_demo(concept: str, anchor: str | None, output: Path | None, progress: Progress) -> DemoReport:
    """Erase a concept of the embedded model, save, load into a fresh pipeline, and let the judge score both.

    Args:
        concept (`str`): an object or a style of the embedded model.
        anchor (`str`, *optional*): what it is mapped to; by default what `erase` picks.
        output (`Path`, *optional*): a new or empty folder; by default a new one in the current directory.
        progress: called with a label and how many of how many images are drawn.

    Returns:
        [`DemoReport`]: the judge's accuracies before and after, over 200 images each, and the files.

    Raises:
        ErasureInputError: the model does not know the concept, or the folder is not empty.
    """
    from diffusers_erasure.demo import OBJECTS, STYLES, load_judge
    from diffusers_erasure.demo.drawing import draw, fast_pipeline
    from diffusers_erasure.errors import ErasureInputError
    from diffusers_erasure.schema import GRID_FILE
    from diffusers_erasure.storage import write_file

    started = time.perf_counter()
    if concept not in (*OBJECTS, *STYLES):
        raise ErasureInputError(
            f"The embedded model does not know {concept!r}. Styles: {', '.join(STYLES)}. Objects: {', '.join(OBJECTS)}."
        )
    folder = _new_folder(output)
    erased, kept = _pairs(concept)
    pairs = [*erased, *kept]
    judge = load_judge()

    pipe = fast_pipeline()
    erasure = _erase(pipe, concept, anchor)
    erasure.save_pretrained(folder / "erasure")
    before = draw(pipe, pairs, lambda done: progress("before", done, len(pairs)))

    fresh: Any = fast_pipeline()
    fresh.load_erasure(folder / "erasure", strict_base="error")
    after = draw(fresh, pairs, lambda done: progress("after", done, len(pairs)))

    def accuracy(images: list[Any]) -> Accuracy:
        # Of an erased style the judge must not see the style, of an erased object not the object.
        index = 0 if concept in OBJECTS else 1
        name = ("objects", "styles")[index]
        gone = judge.accuracy(images[: len(erased)], **{name: [pair[index] for pair in erased]})
        stay = judge.accuracy(
            images[len(erased) :], objects=[pair[0] for pair in kept], styles=[pair[1] for pair in kept]
        )
        return Accuracy(round(gone, 4), round(stay, 4))

    scores = accuracy(before), accuracy(after)
    grid = folder / "before_after.png"
    _draw_grid(before, after, pairs, len(erased), grid)
    shutil.copyfile(grid, folder / "erasure" / GRID_FILE)
    with_results(erasure, *scores, len(after)).save_pretrained(folder / "erasure")
    report = DemoReport(
        concept=concept,
        anchor=str(erasure.concepts[0].anchor),
        before=scores[0],
        after=scores[1],
        images=len(after),
        seconds=round(time.perf_counter() - started, 1),
        output=str(folder),
        grid=str(grid),
        erasure=str(folder / "erasure"),
    )
    write_file(folder / "report.json", f"{report.to_json()}\n".encode())
    return report


def _erase(pipe: Any, concept: str, anchor: str | None) -> "Erasure":
    """Erase an object or a style and retain all the other words."""
    from diffusers_erasure import erase
    from diffusers_erasure.demo import HYPERNYMS, OBJECTS, STYLES

    retain = [word for word in (*OBJECTS, *STYLES, *sorted(set(HYPERNYMS.values()))) if word not in (concept, anchor)]
    preset = "style" if concept in STYLES else "object"
    anchors = "auto" if anchor is None else [anchor]
    return erase(pipe, concept, anchors=anchors, retain=retain, method="gated", preset=preset)


def _pairs(concept: str) -> tuple[list[Pair], list[Pair]]:
    """(object, style) pairs that name the concept, and pairs that do not: spread over all the others."""
    from diffusers_erasure.demo import OBJECTS, STYLES

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


def with_results(erasure: "Erasure", before: Accuracy, after: Accuracy, images: int) -> "Erasure":
    """The erasure with what the judge measured, for its card; no times, so that the same inputs give the same bytes."""
    from diffusers_erasure.demo.drawing import GUIDANCE_SCALE, STEPS

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


def _draw_grid(before: list[Any], after: list[Any], pairs: list[Pair], num_erased: int, path: Path) -> None:
    """A picture of five erased and eight kept pairs, before and after."""
    from diffusers_erasure.pictures import as_png, contact_sheet
    from diffusers_erasure.storage import write_file

    indices = [*[*range(0, num_erased, 8)][:5], *[*range(num_erased, len(pairs), 16)][:8]]
    sheet = contact_sheet(
        [("before", [before[i] for i in indices]), ("after", [after[i] for i in indices])],
        columns=[pairs[i][0] for i in indices],
        scale=2,
    )
    write_file(path, as_png(sheet))


def _new_folder(output: Path | None) -> Path:
    """The given folder, which must be new or empty, or a fresh one in the current directory."""
    from diffusers_erasure.errors import ErasureInputError

    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ErasureInputError(f"{output} exists already and is not an empty folder; give another `--output`.")
        output.mkdir(parents=True, exist_ok=True)
        return output
    number = 1
    while True:
        folder = Path(f"erasure-demo-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
