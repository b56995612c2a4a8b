"""Does an erasure hold beside a user's LoRAs? The share of images that still show the target, without and with two of them.

    python -m benchmarks.beside_loras [--device cuda] [--images 1000] [--methods METHOD ...] [--jobs 2] [--write-docs]

The eight objects of the report half of `benchmarks.efficacy` are erased one at a time on the embedded model. Two LoRAs are
trained here as users train them, on neither a picture nor a name of these objects: a style, learnt from the objects of the other
half in brown ink, and new objects, learnt from twelve that the model has never seen. Both are active, at weights with which the
un-erased model still draws the objects, and at their full weights, with which it draws fewer. The same prompts are drawn from the
same first noise without and with them.

A finished erasure or LoRA is kept in `--store`, and does not notice changes of the library's code: give `--fresh` after one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.command import (
    add_drawing_arguments,
    arguments,
    drawing_settings,
    finish,
    made_on,
    markdown_table,
    measured_or_read,
    print_table,
    start,
    store_of,
    write_page,
)
from benchmarks.drawing import draw
from benchmarks.efficacy.methods import ENTRIES
from benchmarks.efficacy.numbers import Bootstrap, Number
from benchmarks.efficacy.plan import SINGLES, split
from benchmarks.erased_objects import DEFAULT_METHODS, METHODS, embedded, erased, make_all, samples, shots_of
from benchmarks.reemergence.lora import Recipe, noise_loss, train_lora
from benchmarks.reemergence.parts import quiet
from benchmarks.reemergence.plan import TrainingSet
from benchmarks.store import Store, do_all
from diffusers_erasure.demo import load_images, load_judge, load_unseen_images
from diffusers_erasure.demo.drawing import STEPS


PAGE = "docs/efficacy.md"
AIM = 2.0  # points that acc_e may rise by
WEIGHTS = (0.7, 1.0)  # of both LoRAs
TARGETS = SINGLES["report"]
STYLE, OBJECTS = "brown ink", "new objects"
BROWN = np.array([90, 45, 15])
NONE, ANCHOR = "none", "anchor prompt"


# ------------------------------------------------------------------------------------------------------- LoRAs


def pictures_of(lora: str) -> TrainingSet:
    """What a LoRA is trained on."""
    known = load_images()
    rows = [known.objects.index(name) for name in split()["dev"]]
    images = known.images[rows]
    if (
        lora == STYLE
    ):  # black becomes brown, white stays white; captions do not say it, so that it acts in every picture
        grey = images @ np.array([0.299, 0.587, 0.114]) / 255
        names, images = split()["dev"], (BROWN + grey[..., None] * (255 - BROWN)).round().astype(np.uint8)
    else:  # with as many of the model's own, which users call prior preservation
        unseen = load_unseen_images()
        own = slice(None, None, len(rows) // len(unseen.objects))
        names = (*unseen.objects, *split()["dev"][own])
        images = np.concatenate([unseen.images, images[own]])
    size = known.size
    return TrainingSet(
        images=images.reshape(-1, size, size, 3),
        objects=tuple(name for name in names for _ in known.styles),
        styles=known.styles * len(names),
    )


@dataclass(frozen=True)
class Tuning:
    """A LoRA to train."""

    lora: str
    steps: int
    recipe: Recipe
    seed: int
    device: str

    def identity(self) -> dict[str, Any]:
        return asdict(self)


def train(item: Tuning, store: Store) -> dict[str, Any]:
    """Train it on the un-erased model, and put it into the store."""
    pipe, pictures = embedded(item.device), pictures_of(item.lora)
    before = noise_loss(pipe, pictures)
    train_lora(pipe, pictures, [item.steps], store.new_files(item), item.recipe, item.seed)
    return {"pictures": len(pictures.images), "loss": [before, noise_loss(pipe, pictures)]}


# ------------------------------------------------------------------------------------------------------- images


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers."""
    store = store_of(options)
    make_all(options.methods, options.targets, store, options.jobs)
    tunings = [Tuning(lora, options.lora_steps, Recipe(), options.seed, options.device) for lora in (STYLE, OBJECTS)]
    learnt = do_all(tunings, train, store, label="LoRAs")
    without, beside, judge = embedded(options.device), embedded(options.device), load_judge(options.device)
    names = [tuning.lora.replace(" ", "_") for tuning in tunings]
    with quiet():
        for name, tuning in zip(names, tunings, strict=True):
            beside.load_lora_weights(store.files_of(tuning) / str(tuning.steps), adapter_name=name)
    began, rows = time.perf_counter(), {}
    changed: dict[float, list[float]] = {weight: [] for weight in WEIGHTS}
    each = options.images // len(options.targets)
    for method in (NONE, ANCHOR, *options.methods):
        by = None if method in (NONE, ANCHOR) else method
        hits: dict[float, dict[str, list[bool]]] = {weight: {} for weight in (0.0, *WEIGHTS)}
        for target in options.targets:
            shots = shots_of(target, each, options.seed)
            prompts = [ENTRIES[ANCHOR].prompt(shot, [target]) if method == ANCHOR else shot.prompt for shot in shots]
            drawn = {}
            for weight, seen in hits.items():
                pipe = beside if weight else without
                with erased(pipe, by, target, store):
                    if weight:
                        pipe.set_adapters(names, [weight] * len(names))
                    images = draw(pipe, prompts, [shot.seed for shot in shots], options.steps, options.batch)
                seen[target] = [name == target for name in judge.predict(images).objects]
                drawn[weight] = np.stack([np.asarray(image, float) for image in images])
            if method == NONE:
                for weight in WEIGHTS:
                    changed[weight].append(float(np.sqrt(np.mean((drawn[weight] - drawn[0.0]) ** 2))) / 255)
        rows[method] = row_of(hits)
    return {
        "targets": list(options.targets),
        "images": each * len(options.targets),
        "seed": options.seed,
        "loras": [{"lora": tuning.lora, "steps": tuning.steps, **learnt[tuning]} for tuning in tunings],
        "changed": {f"{weight:g}": float(np.mean(parts)) for weight, parts in changed.items()},
        "seconds": time.perf_counter() - began,
        "rows": rows,
    }


def row_of(hits: Mapping[float, Mapping[str, Sequence[bool]]]) -> dict[str, Any]:
    """All shares, and how many points more those beside LoRAs are: intervals resample targets and then images, in pairs."""
    bootstrap, without = Bootstrap(), hits[0.0]
    row: dict[str, Any] = {"without": asdict(bootstrap.mean(samples(without))), "beside": {}}
    for weight, beside in hits.items():
        if weight:
            paired = samples(beside, without)
            values, baseline = bootstrap.means(paired)
            low, high = 100 * np.quantile(values - baseline, (0.025, 0.975))
            more = 100 * float(paired.values.mean() - paired.baseline.mean())
            row["beside"][f"{weight:g}"] = {
                "share": asdict(bootstrap.mean(samples(beside))),
                "points": asdict(Number(more, float(low), float(high), len(paired.values))),
            }
    row["by_target"] = {name: {f"{w:g}": float(np.mean(each[name])) for w, each in hits.items()} for name in without}
    return row


# -------------------------------------------------------------------------------------------------------- tables


def header(numbers: Mapping[str, Any]) -> list[str]:
    weights = numbers["rows"][NONE]["beside"]
    beside = [text for weight in weights for text in (f"both LoRAs at {weight}", "points more")]
    return ["method", "acc_e without", *beside, f"at most {AIM:g}"]


def body(numbers: Mapping[str, Any]) -> list[list[str]]:
    """A row for each method; the aim is for erasures."""

    def show(share: Mapping[str, float]) -> str:
        return f"{100 * share['value']:.1f} [{100 * share['low']:.1f} to {100 * share['high']:.1f}]"

    rows = []
    for method, row in numbers["rows"].items():
        cells, most = [method, show(row["without"])], -100.0
        for each in row["beside"].values():
            points = each["points"]
            cells += [show(each["share"]), f"{points['value']:+.1f} [{points['low']:+.1f} to {points['high']:+.1f}]"]
            most = max(most, points["value"])
        rows.append([*cells, "" if method in (NONE, ANCHOR) else "yes" if most <= AIM else "no"])
    return rows


def about(numbers: Mapping[str, Any]) -> str:
    """What was erased, and the LoRAs."""
    learnt = "; ".join(
        f"{each['lora']}, {each['pictures']} pictures, {each['steps']} steps, loss {each['loss'][0]:.3f} → {each['loss'][1]:.3f}"
        for each in numbers["loras"]
    )
    changed = " and ".join(f"{100 * part:.1f} % at {weight}" for weight, part in numbers["changed"].items())
    return (
        f"Erased, one at a time: {', '.join(numbers['targets'])}. LoRAs: {learnt}. They change the un-erased model's images by "
        f"{changed} of a pixel's range (root mean square)."
    )


def markdown(numbers: Mapping[str, Any]) -> str:
    """The table for the docs."""
    first = f"{made_on(numbers)} {numbers['images']:,} images behind each share, in %; 95 % intervals in brackets."
    return "\n".join([first, about(numbers), "", *markdown_table(header(numbers), body(numbers))])


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, smoke="uce, one object, two images, two steps: to see that it runs")
    add_drawing_arguments(parser, "erased_objects", PAGE, images=1000)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--lora-steps", type=int, default=300, metavar="N", help="of each LoRA's training")
    options = drawing_settings(parser, given, TARGETS, STEPS)
    options.methods = options.methods or (["uce"] if options.smoke else list(DEFAULT_METHODS))
    options.lora_steps = 2 if options.smoke else options.lora_steps
    return options


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(given)
    start(options)
    numbers = measured_or_read(options, "beside_loras", lambda: measured(options))
    print_table(f"{numbers['images']} images behind each share; in %, [95 %]", header(numbers), body(numbers))
    print(f"\n{numbers['seconds']:.0f} s of wall time to draw. " + about(numbers))
    if options.numbers:
        print(made_on(numbers))
    else:
        finish(options, "beside_loras", numbers, options.device)
    if options.write_docs:
        write_page(PAGE, "beside_loras", markdown(numbers))


if __name__ == "__main__":
    main()
