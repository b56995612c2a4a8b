"""What stays of the image? Methods at equal erasure, by the distance to the un-erased image in low and high frequencies.

    python -m benchmarks.structure [--methods esd dumo] [--concepts dog fish] [--images 40] [--json PATH]

DuMo claims to keep an image's structure where it removes the concept. Both methods erase the same objects of the embedded
model with the settings of `benchmarks.efficacy`; each erasure is drawn at several strengths, so that the methods can be compared
where they erase equally much. Images of the same prompt and seed are compared with the un-erased ones: the difference is
divided by a Gaussian filter (sigma of two pixels) into low frequencies, that is structure, and high ones, that is detail,
and each part is a root mean square over pixels from 0 to 1.

Made erasures are kept in `--store`; they do not notice changes of the library's code: give `--fresh` after one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.command import add_store_arguments, arguments, finish, print_table, start, store_of
from benchmarks.drawing import draw_shots
from benchmarks.efficacy.methods import ENTRIES, Fit, make_fit
from benchmarks.efficacy.plan import find_neighbours, make_jobs
from benchmarks.store import do_all
from diffusers_erasure.demo import load_judge
from diffusers_erasure.demo.drawing import fast_pipeline
from diffusers_erasure.pictures import contact_sheet


STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
SIGMA = 2.0  # pixels of 64


def parts_of(image: Image.Image, base: Image.Image) -> tuple[float, float]:
    """Distance in low and in high frequencies."""

    def pixels(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.convert("RGB"), dtype=np.float64) / 255

    def low(picture: Image.Image) -> np.ndarray:
        return pixels(picture.filter(ImageFilter.GaussianBlur(SIGMA)))

    difference, blurred = pixels(image) - pixels(base), low(image) - low(base)
    return float(np.sqrt(np.mean(blurred**2))), float(np.sqrt(np.mean((difference - blurred) ** 2)))


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method, concept and strength."""
    store = store_of(options)
    fits = [Fit(method, concept) for concept in options.concepts for method in options.methods]
    do_all(fits, make_fit, store, label="erasures")
    judge, plain = load_judge(), fast_pipeline()
    jobs = {job.targets[0]: job for job in make_jobs("report", find_neighbours(plain)) if len(job.targets) == 1}
    rows, sheet = [], []
    for concept in options.concepts:
        shots, others = (
            [shot for shot in jobs[concept].shots if shot.cell == cell][: options.images]
            for cell in ("erased", "kept")
        )
        base = draw_shots(plain, shots)
        sheet.append((f"{concept}, un-erased", base[:8]))
        for method in options.methods:
            pipe = fast_pipeline()
            pipe.load_erasure(store.files_of(Fit(method, concept)), "erasure")
            for strength in options.strengths:
                pipe.set_erasures("erasure", strength)
                images = draw_shots(pipe, shots)
                seen = judge.predict(images).objects
                distances = [parts_of(image, before) for image, before in zip(images, base, strict=True)]
                low, high = (float(np.mean(part)) for part in zip(*distances, strict=True))
                acc_e, acc_r = sum(name == concept for name in seen) / len(seen), None
                if strength == 1:
                    kept = judge.predict(draw_shots(pipe, others)).objects
                    acc_r = sum(shot.concept == name for shot, name in zip(others, kept, strict=True)) / len(others)
                    sheet.append((f"{concept}, {method}", images[:8]))
                found = {"method": method, "concept": concept, "strength": strength, "acc_e": acc_e, "acc_r": acc_r}
                rows.append({**found, "low": low, "high": high})
    if options.grid:
        contact_sheet(sheet, scale=1).save(options.grid)
    return rows


def at_equal(rows: Sequence[dict[str, Any]], methods: Sequence[str], concept: str) -> dict[str, Any] | None:
    """Distances of all methods at the least share drawn that all of them reach, between two strengths by a line."""
    own = {method: [row for row in rows if (row["method"], row["concept"]) == (method, concept)] for method in methods}
    level = max(min(row["acc_e"] for row in each) for each in own.values())
    if level > 0.5:
        return None
    found: dict[str, Any] = {"concept": concept, "acc_e": level}
    for method, each in own.items():
        first = next(i for i, row in enumerate(each) if row["acc_e"] <= level)
        after, before = each[first], each[max(0, first - 1)]
        gap = before["acc_e"] - after["acc_e"]
        share = (before["acc_e"] - level) / gap if gap else 1.0
        found[method] = {part: before[part] + share * (after[part] - before[part]) for part in ("low", "high")}
    return found


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, smoke="uce, one concept, two images: to see that it runs")
    add_store_arguments(parser, "structure")
    known = sorted(name for name, entry in ENTRIES.items() if entry.erases)
    parser.add_argument("--methods", nargs="+", default=["esd", "dumo"], choices=known, metavar="METHOD")
    parser.add_argument("--concepts", nargs="+", default=["dog", "fish", "cherry"], metavar="OBJECT")
    parser.add_argument("--images", type=int, default=40, help="of each concept, method and strength")
    parser.add_argument("--grid", type=Path, help="write a picture of some images")
    options = parser.parse_args()
    start(options)
    options.strengths = (1.0,) if options.smoke else STRENGTHS
    if options.smoke:
        options.images, options.concepts, options.methods = 2, options.concepts[:1], ["uce"]
    rows = measured(options)
    print_table(
        f"{options.images} images each; distance to the un-erased image (root mean square, pixels 0 to 1)",
        ["concept", "method", "strength", "acc_e", "acc_r", "low", "high"],
        [
            [row["concept"], row["method"], f"{row['strength']:g}", f"{row['acc_e']:.0%}",
             "" if row["acc_r"] is None else f"{row['acc_r']:.0%}", f"{row['low']:.3f}", f"{row['high']:.3f}"]
            for row in rows
        ],
    )  # fmt: skip
    equal = [found for name in options.concepts if (found := at_equal(rows, options.methods, name)) is not None]
    print_table(
        "At equal acc_e (the least that all methods reach; concepts of which one method draws over half are left out)",
        ["concept", "acc_e", *(f"{method}, {part}" for method in options.methods for part in ("low", "high"))],
        [
            [each["concept"], f"{each['acc_e']:.0%}",
             *(f"{each[method][part]:.3f}" for method in options.methods for part in ("low", "high"))]
            for each in equal
        ],
    )  # fmt: skip
    finish(options, "structure", {"rows": rows, "equal": equal})


if __name__ == "__main__":
    main()
