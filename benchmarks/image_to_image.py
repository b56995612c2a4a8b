"""What an erasure does to pictures that already show the concept: how many still show it after img2img and inpainting.

    python -m benchmarks.image_to_image [--device cuda] [--images 200] [--methods METHOD ...] [--jobs 2] [--write-docs]

The un-erased embedded model draws the eight objects of the report half of `benchmarks.efficacy`; of its pictures those are taken in
which the judge sees the object. Each goes through img2img, and through inpainting of its middle (a quarter of it) and of its left
half, at several strengths: with the prompt that it was drawn from, and with one that names no object. The erasures are of one
object each. Inpainting is what diffusers does with a model that has no input channels for a mask, after every step the picture's own
latents outside the mask; written here, as diffusers' pipeline refuses this model, of 8 channels.

A finished erasure is kept in `--store`, and does not notice changes of the library's code: give `--fresh` after one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

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
from benchmarks.efficacy.numbers import Bootstrap
from benchmarks.efficacy.plan import SINGLES, Shot
from benchmarks.erased_objects import METHODS, embedded, erased, make_all, samples, shots_of
from diffusers_erasure.demo import load_judge
from diffusers_erasure.demo.drawing import STEPS


PAGE = "docs/efficacy.md"
TARGETS = SINGLES["report"]
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
SAMPLER_STEPS = 20  # at strength 0.2 four of them are left
NONE = "none"
NAMED, NEUTRAL = "its own", "neutral"
NEUTRAL_PROMPT = "a picture"

Area = tuple[int, int, int, int]  # of the 8 x 8 latents: top, bottom, left, right
# What is drawn anew.
WAYS: dict[str, Area] = {
    "img2img": (0, 8, 0, 8),
    "inpainting, middle": (2, 6, 2, 6),
    "inpainting, left half": (0, 8, 0, 4),
}
CASES = [(way, prompt) for way in WAYS for prompt in (NAMED, NEUTRAL)]


class KeepOutside:
    """
    After each step, the pictures' own latents outside an area, with as much of always the same noise as the step left.

    Args:
        latents (`torch.Tensor`): Of the pictures, [n, channels, 8, 8].
        noise (`torch.Tensor`): The same shape.
        areas (sequence of `Area`): For each picture, what stays as it is drawn.
    """

    def __init__(self, latents: torch.Tensor, noise: torch.Tensor, areas: Sequence[Area]) -> None:
        self.latents, self.noise = latents, noise
        self.drawn = torch.zeros_like(latents[:, :1], dtype=torch.bool)
        for mask, (top, bottom, left, right) in zip(self.drawn, areas, strict=True):
            mask[:, top:bottom, left:right] = True

    def __call__(self, pipe: Any, step: int, timestep: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        later = [t for t in pipe.scheduler.timesteps.tolist() if t < int(timestep)]
        kept = float(pipe.scheduler.alphas_cumprod[later[0]]) if later else 1.0
        outside = kept**0.5 * self.latents + (1 - kept) ** 0.5 * self.noise
        return {"latents": torch.where(self.drawn, state["latents"], outside)}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers."""
    store, each = store_of(options), options.images // len(options.targets)
    make_all(options.methods, options.targets, store, options.jobs)
    pipe, judge = embedded(options.device), load_judge(options.device)
    changing = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    changing.set_progress_bar_config(disable=True)
    began, rows = time.perf_counter(), []
    inputs = {target: showing(target, each, pipe, judge, options) for target in options.targets}
    cells: dict[tuple[str, str, str, float], dict[str, list[bool]]] = {}
    for method in (NONE, *options.methods):
        for target, (shots, pictures) in inputs.items():
            with erased(pipe, None if method == NONE else method, target, store):
                for strength in options.strengths:
                    seen = judge.predict(changed(changing, shots, pictures, strength, options)).objects
                    for place, (way, prompt) in enumerate(CASES):
                        some = seen[place * len(shots) : (place + 1) * len(shots)]
                        cells.setdefault((way, prompt, method, strength), {})[target] = [
                            name == target for name in some
                        ]
    bootstrap = Bootstrap()
    for way, prompt in CASES:
        for method in (NONE, *options.methods):
            shares = [
                {"strength": strength, **asdict(bootstrap.mean(samples(cells[way, prompt, method, strength])))}
                for strength in options.strengths
            ]
            rows.append({"way": way, "prompt": prompt, "method": method, "shares": shares})
    blank = {
        way: {
            target: [
                name == target for name in judge.predict(np.stack([blanked(each, area) for each in pictures])).objects
            ]
            for target, (_, pictures) in inputs.items()
        }
        for way, area in WAYS.items()
        if way != "img2img"
    }
    return {
        "targets": list(options.targets),
        "images": sum(len(shots) for shots, _ in inputs.values()),
        "steps": options.steps,
        "seed": options.seed,
        "seconds": time.perf_counter() - began,
        "rows": rows,
        "blank": {way: asdict(bootstrap.mean(samples(hits))) for way, hits in blank.items()},
    }


def showing(
    target: str, count: int, pipe: Any, judge: Any, options: argparse.Namespace
) -> tuple[list[Shot], list[Image.Image]]:
    """Pictures of the un-erased model in which the judge sees the target; of at most twice as many that were drawn."""
    shots = shots_of(target, 2 * count, options.seed)
    found: list[tuple[Shot, Image.Image]] = []
    for begin in (0, count):
        some = shots[begin : begin + count]
        if len(found) < count:
            images = draw(pipe, [shot.prompt for shot in some], [shot.seed for shot in some], STEPS, options.batch)
            names = judge.predict(images).objects
            found += [(shot, image) for shot, image, name in zip(some, images, names, strict=True) if name == target]
    if len(found) < count:
        raise SystemExit(f"The judge sees {target} in {len(found)} of {2 * count} pictures, and {count} are needed.")
    return [shot for shot, _ in found[:count]], [image for _, image in found[:count]]


@torch.no_grad()
def changed(
    pipe: Any, shots: Sequence[Shot], pictures: Sequence[Image.Image], strength: float, options: argparse.Namespace
) -> list[Image.Image]:
    """All pictures after each of `CASES` in turn, from another noise than they were drawn from."""
    drawn = [
        (shot.prompt if prompt == NAMED else NEUTRAL_PROMPT, WAYS[way], shot.seed + 1, picture)
        for way, prompt in CASES
        for shot, picture in zip(shots, pictures, strict=True)
    ]
    done: list[Image.Image] = []
    for begin in range(0, len(drawn), options.batch):
        prompts, areas, seeds, images = map(list, zip(*drawn[begin : begin + options.batch], strict=True))
        pixels = pipe.image_processor.preprocess(images).to(pipe.device)
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        keep = KeepOutside(latents, torch.stack(noise).to(latents), areas)
        further = {"image": images, "strength": strength, "callback_on_step_end": keep}
        done += draw(pipe, prompts, seeds, options.steps, options.batch, **further)
    return done


def blanked(picture: Image.Image, area: Area) -> np.ndarray:
    """The picture with white where inpainting draws, uint8 [64, 64, 3]."""
    top, bottom, left, right = (8 * edge for edge in area)
    pixels = np.array(picture.convert("RGB"))
    pixels[top:bottom, left:right] = 255
    return pixels


# -------------------------------------------------------------------------------------------------------- tables


def header(numbers: Mapping[str, Any]) -> list[str]:
    return ["", "prompt", "erased by", *(f"strength {each['strength']:g}" for each in numbers["rows"][0]["shares"])]


def body(numbers: Mapping[str, Any]) -> list[list[str]]:
    """A row for each way, prompt and method."""
    return [
        [row["way"], row["prompt"], row["method"]]
        + [f"{100 * each['value']:.0f} [{100 * each['low']:.0f}–{100 * each['high']:.0f}]" for each in row["shares"]]
        for row in numbers["rows"]
    ]


def about(numbers: Mapping[str, Any]) -> str:
    """What the judge sees without any drawing."""
    shares = " and ".join(f"{100 * each['value']:.0f} % ({way})" for way, each in numbers["blank"].items())
    return f"With nothing but white in the area the judge still sees the object in {shares}."


def markdown(numbers: Mapping[str, Any]) -> str:
    """The table for the docs."""
    first = (
        f"{made_on(numbers)} {numbers['images']} pictures behind each share, {numbers['steps']} steps, in %; 95 % intervals in "
        f"brackets. Objects: {', '.join(numbers['targets'])}, erased one at a time. The neutral prompt is “{NEUTRAL_PROMPT}”."
    )
    return "\n".join([first, about(numbers), "", *markdown_table(header(numbers), body(numbers))])


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, smoke="uce, one object, two images, two steps: to see that it runs")
    add_drawing_arguments(parser, "erased_objects", PAGE, images=200)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    options = drawing_settings(parser, given, TARGETS, SAMPLER_STEPS)
    options.methods = options.methods or (["uce"] if options.smoke else ["uce", "esd"])
    options.strengths = (0.5, 1.0) if options.smoke else STRENGTHS
    return options


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(given)
    start(options)
    numbers = measured_or_read(options, "image_to_image", lambda: measured(options))
    print_table(
        f"{numbers['images']} pictures that show the target, and how many still do afterwards; in %, [95 %]",
        header(numbers),
        body(numbers),
    )
    print(
        f"\n{numbers['seconds']:.0f} s of wall time to draw, in {numbers['steps']} steps. Objects: {', '.join(numbers['targets'])}.\n"
        + about(numbers)
    )
    if options.numbers:
        print(made_on(numbers))
    else:
        finish(options, "image_to_image", numbers, options.device)
    if options.write_docs:
        write_page(PAGE, "image_to_image", markdown(numbers))


if __name__ == "__main__":
    main()
