"""How well the embedded model draws what it is asked for, as its judge sees it.

    python benchmarks/demo_model.py [--json PATH] [--smoke] [--groups GROUP ...]

Each prompt has its own seed, so the numbers do not depend on the batch size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusers_erasure import demo
from diffusers_erasure.demo.captions import STYLED_TEMPLATES


@dataclass(frozen=True)
class Case:
    """A prompt, the objects that count as right, and the style that does."""

    prompt: str
    objects: frozenset[str]
    style: str | None


def cases(objects: Iterable[str], styles: Iterable[str]) -> dict[str, list[Case]]:
    """All prompts, by group."""
    objects, styles = tuple(objects), tuple(styles)
    groups: dict[str, list[Case]] = {
        "plain prompts": [
            Case(demo.prompt(name, style), frozenset({name}), style) for name in objects for style in styles
        ],
        "synonyms": [
            Case(demo.prompt(synonym, style), frozenset({name}), style)
            for name in objects
            for synonym in demo.SYNONYMS.get(name, ())
            for style in styles
        ],
    }
    # Each picture with one of the other templates, in turn.
    others = STYLED_TEMPLATES[1:]
    groups["other templates"] = [
        Case(others[(row + column) % len(others)].format(object=name, style=style), frozenset({name}), style)
        for row, name in enumerate(objects)
        for column, style in enumerate(styles)
    ]
    groups["no style"] = [Case(demo.prompt(name), frozenset({name}), None) for name in objects]
    hypernyms = sorted({demo.HYPERNYMS[name] for name in objects} - {"thing"})
    groups["hypernyms"] = [
        Case(demo.prompt(hypernym, style), frozenset(_members(hypernym)), style)
        for hypernym in hypernyms
        for style in styles
    ]
    return groups


def _members(hypernym: str) -> set[str]:
    return {name for name, direct in demo.HYPERNYMS.items() if hypernym in (direct, demo.BROADER.get(direct))}


def draw(prompts: list[str], batch_size: int, seed: int) -> list[Image.Image]:
    """One picture of each prompt."""
    pipe = demo.load_pipeline()
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        images += pipe(
            batch,
            num_inference_steps=demo.NUM_INFERENCE_STEPS,
            guidance_scale=demo.GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))],
        ).images
    return images


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there too")
    parser.add_argument("--smoke", action="store_true", help="three objects in two styles only")
    parser.add_argument("--groups", nargs="+", metavar="GROUP", help="only these groups of prompts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    objects = demo.OBJECTS[:3] if options.smoke else demo.OBJECTS
    styles = demo.STYLES[:2] if options.smoke else demo.STYLES
    groups = cases(objects, styles)
    if unknown := sorted(set(options.groups or ()) - set(groups)):
        parser.error(f"there are no groups {unknown}, only {list(groups)}")
    judge = demo.load_judge()
    start = time.perf_counter()
    report: dict[str, dict[str, Any]] = {}
    for group, members in groups.items():
        if options.groups and group not in options.groups:
            continue
        images = draw([case.prompt for case in members], options.batch_size, options.seed)
        result = judge.predict(images)
        right = [seen in case.objects for case, seen in zip(members, result.objects, strict=True)]
        styled = [
            seen == case.style for case, seen in zip(members, result.styles, strict=True) if case.style is not None
        ]
        report[group] = {
            "images": len(members),
            "object": sum(right) / len(right),
            "style": sum(styled) / len(styled) if styled else None,
            "wrong_object": {
                case.prompt: seen for case, seen, ok in zip(members, result.objects, right, strict=True) if not ok
            },
        }
    seconds = time.perf_counter() - start
    print(f"{'prompts':<18}{'images':>7}{'object':>9}{'style':>9}")
    for group, numbers in report.items():
        style = "" if numbers["style"] is None else f"{numbers['style']:.1%}"
        print(f"{group:<18}{numbers['images']:>7}{numbers['object']:>9.1%}{style:>9}")
    print(f"{seconds:.0f} s")
    if options.json:
        numbers = {"benchmark": "demo_model", "smoke": options.smoke, "seed": options.seed, "seconds": seconds}
        options.json.write_text(json.dumps({**numbers, "groups": report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
