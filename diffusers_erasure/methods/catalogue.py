"""What there is to tell about the methods and their settings, as data: for the command line, the documentation and cards.

It is put together from the registry, the annotations and the docstrings, and lies beside this module as `catalogue.json`,
which is read without importing anything. `python -m diffusers_erasure.methods.catalogue` writes it again.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from ..registry import BUILT_IN
from ..settings import ByFacts, Choice, Rule, Switch, rules_of
from . import MethodEntry, get_method


FILE = Path(__file__).with_suffix(".json")
_HEAD = re.compile(r"(\w+(?:, \w+)*(?: \([^)]*\))?(?:, \w+ \([^)]*\))*): (.*)")


def meanings(kind: type[Any]) -> dict[str, str]:
    """What each setting of a dataclass means, in plain text, by the most derived class whose docstring tells."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        found.update(documented(each.__doc__ or ""))
    return {item.name: found[item.name] for item in dataclasses.fields(kind) if item.name in found}


def documented(docstring: str) -> dict[str, str]:
    """The settings that a docstring tells about, below `Args:`, in plain text."""
    _, _, arguments = inspect.cleandoc(docstring).partition("\nArgs:\n")
    block = re.split(r"\n(?=\S)", arguments, maxsplit=1)[0]
    found = {}
    for entry in re.split(r"\n {4}(?=\w)", "\n" + block):
        match = _HEAD.fullmatch(" ".join(entry.split()))
        if match is not None:
            names = re.sub(r"\([^)]*\)", "", match[1]).split(",")
            found.update({name.strip(): _plain(match[2]) for name in names})
    return found


def _plain(text: str) -> str:
    """Without the marks of a docstring, and without pointing to where a reader of this text is not."""
    return re.sub(r"[,;]? see (\[`\w+`\]|the module)", "", text).replace("`", "").replace("**", "")


def _preset_values(entry: MethodEntry, presets: tuple[str, ...], **more: Any) -> dict[str, dict[str, Any]]:
    """For each preset what it states of the settings that may be left out; what depends on something, in words."""
    open_ones = [item.name for item in dataclasses.fields(entry.config) if item.default is None]
    stated = {preset: entry.config(preset=preset, **more).stated() for preset in presets}
    return {preset: {name: _told(own[name]) for name in open_ones} for preset, own in stated.items()}


def _told(value: Any) -> Any:
    return value.text if isinstance(value, ByFacts) else list(value) if isinstance(value, tuple) else value


def _choices(rule: Rule) -> list[str]:
    """What the command line completes a setting by, as it is typed."""
    if isinstance(rule.range, Switch):
        return ["true", "false"]
    return list(rule.range.values) if isinstance(rule.range, Choice) else []


def describe(entry: MethodEntry) -> dict[str, Any]:
    """A method's entry: what it is, its presets, and its settings."""
    declared, rules, told = entry.declared, rules_of(entry.config), meanings(entry.config)
    choice = rules["preset"].range if "preset" in rules else None
    presets = choice.values if isinstance(choice, Choice) and entry.settings is not None else ()
    stated = _preset_values(entry, presets)
    published = _preset_values(entry, presets, published=True) if "published" in rules else {}
    settings: dict[str, Any] = {}
    for item in dataclasses.fields(entry.config):
        name = item.name
        settings[name] = {
            "meaning": told.get(name, ""),
            "range": rules[name].range.text,
            "choices": _choices(rules[name]),
            "default": None if item.default is dataclasses.MISSING else _told(item.default),
            "presets": {preset: own[name] for preset, own in stated.items() if name in own},
            "published": {preset: own[name] for preset, own in published.items() if name in own},
        }
    return {
        "summary": declared.summary,
        "families": list(declared.families),
        "needs": declared.needs,
        "makes": list(declared.makes),
        "trains": declared.trains,
        "resumable": declared.resumable,
        "retains": declared.retains,
        "instead_of_retain": declared.instead_of_retain,
        "citation": None if declared.citation is None else dataclasses.asdict(declared.citation),
        "presets": list(presets),
        "has_published": "published" in rules,
        "settings": settings,
    }


def catalogue() -> dict[str, Any]:
    """The entries of the library's own methods, by name."""
    return {each.name: describe(get_method(each.name)) for each in BUILT_IN}


def as_json() -> str:
    """The file's content."""
    return json.dumps(catalogue(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_json(), encoding="utf-8")
