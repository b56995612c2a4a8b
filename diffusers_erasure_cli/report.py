"""What the commands tell about an erasure: its files, and how far targets and retained prompts moved."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .options import out


if TYPE_CHECKING:
    from diffusers_erasure import Erasure

MOST_SHOWN = 20  # rows of a table about targets


def print_made(erasure: "Erasure", output: Path, files: Sequence[Path], *, redact: bool, as_json: bool) -> None:
    """Tell what was made: its files, and how far targets and retained prompts moved."""
    erasure = erasure.redacted() if redact else erasure
    if as_json:
        report = {
            "output": str(output),
            "files": {path.name: path.stat().st_size for path in files},
            "diagnostics": erasure.config.diagnostics,
            "stock": None if erasure.config.stock is None else dataclasses.asdict(erasure.config.stock),
        }
        print(json.dumps(report, indent=2))
        return
    from diffusers_erasure.showing import size_text

    for path in files:
        out.print(Text(f"{path}  {size_text(path.stat().st_size)}"))
    print_diagnostics(erasure.config.diagnostics)


def print_diagnostics(diagnostics: dict[str, Any], input_name: str = "text rows") -> None:
    """Tell how far the rows of targets and retained prompts moved, or how the loss went."""
    from rich.table import Table

    losses = diagnostics.get("loss")
    if isinstance(losses, list) and losses:
        out.print(Text(f"mean loss of the first steps {losses[0]:.4g}, of the last {losses[-1]:.4g}"))
    moved = diagnostics.get("completeness")
    if isinstance(moved, dict) and moved:
        shown = sorted(moved.items(), key=lambda item: item[1])[:MOST_SHOWN]  # the least moved are those to look at
        table = Table("target", f"moved to its anchor ({input_name})")
        for name, value in shown:
            table.add_row(Text(name), f"{value:.0%}")
        if len(moved) > len(shown):
            table.add_row(Text(f"{len(moved) - len(shown)} others"), f"{shown[-1][1]:.0%} or more")
        out.print(table)
    kept = diagnostics.get("retained_change")
    if isinstance(kept, dict):
        out.print(Text(f"retained {input_name} changed by {kept['median']:.1%} (median), {kept['max']:.1%} (largest)"))
    start, empty = diagnostics.get("start_token_change"), diagnostics.get("empty_prompt_change")
    if isinstance(start, float) and isinstance(empty, float):
        out.print(
            Text(f"the start token's row changed by {start:.1%}, the empty prompt's others by up to {empty:.1%}")
        )
    space = diagnostics.get("null_space")
    if isinstance(space, dict):
        least, largest, width = (space.get(key) for key in ("least", "largest", "width"))
        out.print(Text(f"free of what is retained: {least} to {largest} of {width} dimensions, by layer"))
    moved_too = diagnostics.get("collateral")
    if isinstance(moved_too, dict) and isinstance(moved_too.get("worst"), dict):
        worst = ", ".join(f"{name} {value:.2f}" for name, value in moved_too["worst"].items())
        named = ", ".join(map(str, moved_too.get("lists", ())))
        out.print(
            Text(f"{moved_too['above']} of {moved_too['words']} words of {named} moved far; farthest moved {worst}"),
            soft_wrap=True,
        )
    if isinstance(diagnostics.get("pooled"), dict):
        print_diagnostics(diagnostics["pooled"], "pooled vectors")
