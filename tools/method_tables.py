"""Write the tables of methods and settings in docs/methods/ from the catalogue, between `<!-- table: NAME -->` and `<!-- end -->`.

    python tools/method_tables.py

NAME is a method, for its settings, or `methods`, for all methods.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
CATALOGUE = ROOT / "diffusers_erasure" / "methods" / "catalogue.json"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def plain(text: str) -> str:
    """Text in a table's cell."""
    return text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


def value(given: Any) -> str:
    """A value as it is written in Python; a rule, which is a sentence, as it is."""
    if given in (None, "", []):
        return "none"
    if isinstance(given, str) and " " in given:
        return plain(given)
    return f"`{given!r}`" if not isinstance(given, str) else f'`"{given}"`'


def by_preset(values: Mapping[str, Any], usual: str) -> str:
    """One value where all presets agree, else that of the usual preset, and those of others that differ from it."""
    groups: dict[str, list[str]] = {}
    for preset in sorted(values, key=lambda each: each != usual):
        groups.setdefault(value(values[preset]), []).append(preset)
    first, *others = groups.items()
    return "; ".join([first[0], *(f"{', '.join(presets)}: {text}" for text, presets in others)])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def settings_table(entry: Mapping[str, Any]) -> str:
    """A method's settings: their defaults, those of the authors where there are such presets, ranges and meanings."""
    published = ["published"] if entry["has_published"] else []
    rows, usual = [], entry["settings"]["preset"]["default"]
    for name, told in entry["settings"].items():
        ours = by_preset(told["presets"], usual) if told["presets"] else value(told["default"])
        theirs = [by_preset(told["published"], usual) if told["published"] else "the same"] if published else []
        theirs = ["the same"] if theirs == [ours] else theirs
        rows.append([f"`{name}`", ours, *theirs, plain(told["range"]), plain(told["meaning"])])
    return table(["setting", "default", *published, "values", "meaning"], rows)


def methods_table(catalogue: Mapping[str, Any]) -> str:
    """What all methods say about themselves."""
    rows = [
        [
            f"[{name}]({name}.md)",
            plain(entry["summary"]),
            ", ".join(entry["families"]),
            "yes" if entry["trains"] else "no",
            entry["needs"],
            ", ".join(f"`{kind}`" for kind in entry["makes"]),
            "yes" if entry["retains"] else "no",
            ", ".join(f"`{preset}`" for preset in entry["presets"]),
        ]
        for name, entry in catalogue.items()
    ]
    return table(["method", "", "base models", "trains", "reads", "layers", "`retain`", "presets"], rows)


def written(page: str, catalogue: Mapping[str, Any]) -> str:
    """A page with its tables as they should be."""

    def fill(place: re.Match[str]) -> str:
        own = methods_table(catalogue) if place[2] == "methods" else settings_table(catalogue[place[2]])
        return f"{place[1]}{own}{place[3]}"

    return PLACE.sub(fill, page)


def main() -> None:
    """The command line."""
    catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8"), catalogue), encoding="utf-8")


if __name__ == "__main__":
    main()
