"""What the shell completes: methods, settings, lists. Read from the library's data files, without importing it."""

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer


# What the tiny models are called here, and in `diffusers_erasure.demo.WORLDS`, which is not imported for it.
TINY = {"demo": "sd1", "demo-sdxl": "sdxl", "demo-sd3": "sd3", "demo-flux": "flux"}


@cache
def _library() -> Path:
    spec = find_spec("diffusers_erasure")  # finds it without running it
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def catalogue() -> dict[str, Any]:
    """The library's methods by name, with their settings; made by `python -m diffusers_erasure.methods.catalogue`."""
    return json.loads((_library() / "methods" / "catalogue.json").read_text(encoding="utf-8"))


@cache
def offered() -> dict[str, str]:
    """The methods of other packages, with a line about each: from what is known of the packages, without importing them."""
    found: dict[str, str] = {}
    for point in sorted(entry_points(group="diffusers_erasure.methods"), key=_rank):
        about = point.dist.metadata if point.dist else None
        summary = about["Summary"] if about is not None and "Summary" in about else "a method"
        if point.name not in catalogue():
            found.setdefault(point.name, f"{summary} (package {point.dist.name if point.dist else point.value})")
    return found


def _rank(point: EntryPoint) -> tuple[str, str]:
    """As the library takes them (`registry`): of one name the first package."""
    return point.name, point.dist.name if point.dist else point.value


def summaries() -> dict[str, str]:
    """All methods by name, with a line about each."""
    return {name: entry["summary"] for name, entry in catalogue().items()} | offered()


def of(*values: str) -> Callable[[str], list[str]]:
    """A completion by fixed values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def methods(incomplete: str) -> Iterator[tuple[str, str]]:
    """The methods' names."""
    for name, summary in summaries().items():
        if name.startswith(incomplete):
            yield name, summary


def lists(incomplete: str) -> list[str]:
    """The names of the lists that the library ships."""
    names = sorted(path.stem for path in (_library() / "lists").glob("*.txt"))
    return [name for name in names if name.startswith(incomplete)]


def retained(incomplete: str) -> list[str]:
    """`list:NAME`, and files."""
    named = [f"list:{name}" for name in lists("")]
    return [name for name in named if name.startswith(incomplete)] + paths(incomplete)


def retained_by_default(incomplete: str) -> list[str]:
    """What `--retain-default` takes."""
    named = ["auto", "none", "object", "style", "person", *(f"list:{name}" for name in lists(""))]
    return [name for name in named if name.startswith(incomplete)]


def paths(incomplete: str) -> list[str]:
    """Files and folders."""
    folder, _ = os.path.split(incomplete)
    try:
        found = sorted(Path(folder or ".").expanduser().iterdir())
    except OSError:
        return []
    names = [os.path.join(folder, f"{path.name}/" if path.is_dir() else path.name) for path in found]
    return [name for name in names if name.startswith(incomplete)]


def _settings(context: typer.Context) -> dict[str, Any]:
    chosen = context.params.get("method")
    methods = [catalogue().get(name, {"settings": {}}) for name in ((chosen,) if chosen else ("uce", "gated"))]
    found = {name: entry for method in methods for name, entry in method["settings"].items()}
    return {name: entry for name, entry in found.items() if name != "retain"}  # an option of its own


def settings(context: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """`name=` of the chosen method's settings; after it, the values that a setting may have."""
    name, equals, _ = incomplete.partition("=")
    for setting, entry in _settings(context).items():
        if not equals and setting.startswith(incomplete):
            yield f"{setting}=", entry["meaning"]
        elif equals and setting == name:
            for choice in entry["choices"]:
                if f"{name}={choice}".startswith(incomplete):
                    yield f"{name}={choice}", ""


def _typed() -> tuple[list[str], int]:
    """Bash's words, and which of them is completed."""
    words = shlex.shlex(os.environ.get("COMP_WORDS", ""), posix=True, punctuation_chars=False)
    words.whitespace_split, words.commenters = True, ""
    found: list[str] = []
    with suppress(ValueError):  # a quotation that has not ended yet
        found.extend(words)
    return found, int(os.environ.get("COMP_CWORD") or 0)


def step_over_marks() -> None:
    """Let bash's word behind a `:` or `=` be the one that is completed: it makes words of these marks themselves."""
    words, index = _typed()
    if words[index:] in ([":"], ["="]):
        os.environ["COMP_CWORD"] = str(index + 1)


def targets(context: typer.Context, incomplete: str) -> list[str]:
    """Files and lists. And bash takes `list:NAME` and `name=value` apart: what stands behind the marks is asked for here."""
    words, index = _typed()
    before = words[:index]
    if before[-2:] == ["list", ":"]:
        return lists(incomplete)
    if before[-1:] == ["="]:
        choices = _settings(context).get(before[-2], {}).get("choices", [])
        return [choice for choice in choices if choice.startswith(incomplete)]
    return retained(incomplete)
