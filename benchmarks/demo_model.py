"""How well the embedded model, or another tiny model, draws what it is asked for, as the judge sees it.

    python -m benchmarks.demo_model [--json PATH] [--smoke] [--groups GROUP ...] [--world NAME] [--steps N]

Each prompt has its own seed, so the numbers do not depend on the batch size.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.command import arguments, finish, print_table, start
from benchmarks.drawing import draw
from benchmarks.efficacy.plan import members
from diffusers_erasure import demo
from diffusers_erasure.demo.words import STYLED_TEMPLATES


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
        Case(demo.prompt(hypernym, style), frozenset(members(hypernym)), style)
        for hypernym in hypernyms
        for style in styles
    ]
    return groups


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, smoke="three objects in two styles only")
    parser.add_argument("--groups", nargs="+", metavar="GROUP", help="only these groups of prompts")
    parser.add_argument("--world", choices=demo.WORLDS, default="sd1", help="the embedded model (sd1) by default")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of the model's own scheduler; what it is called with by default"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start(options)
    objects = demo.OBJECTS[:3] if options.smoke else demo.OBJECTS
    styles = demo.STYLES[:2] if options.smoke else demo.STYLES
    groups = cases(objects, styles)
    if unknown := sorted(set(options.groups or ()) - set(groups)):
        parser.error(f"there are no groups {unknown}, only {list(groups)}")
    steps = options.steps or demo.settings(options.world).num_inference_steps
    pipe, judge = demo.load_pipeline(options.world), demo.load_judge()
    began = time.perf_counter()
    report: dict[str, dict[str, Any]] = {}
    for group, asked in groups.items():
        if options.groups and group not in options.groups:
            continue
        seeds = range(options.seed, options.seed + len(asked))
        prompts = [case.prompt for case in asked]
        images = draw(pipe, prompts, seeds, steps, options.batch_size)
        result = judge.predict(images)
        right = [seen in case.objects for case, seen in zip(asked, result.objects, strict=True)]
        styled = [
            seen == case.style for case, seen in zip(asked, result.styles, strict=True) if case.style is not None
        ]
        report[group] = {
            "images": len(asked),
            "object": sum(right) / len(right),
            "style": sum(styled) / len(styled) if styled else None,
            "wrong_object": {
                case.prompt: seen for case, seen, ok in zip(asked, result.objects, right, strict=True) if not ok
            },
        }
    seconds = time.perf_counter() - began
    print_table(
        f"Shares in which the judge sees what the prompt names; {options.world}, {steps} steps; {seconds:.0f} s",
        ("prompts", "images", "object", "style"),
        (
            (group, row["images"], f"{row['object']:.1%}", "" if row["style"] is None else f"{row['style']:.1%}")
            for group, row in report.items()
        ),
    )
    finish(
        options,
        "demo_model",
        {"world": options.world, "steps": steps, "seed": options.seed, "seconds": seconds, "groups": report},
    )


if __name__ == "__main__":
    main()
