"""Write the table of doors in docs/families.md from the library's own, between `<!-- table: families -->` and `<!-- end -->`.

python tools/family_table.py
"""

import re
from pathlib import Path

from diffusers_erasure.families import FAMILIES, Family


PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
PLACE = re.compile(r"(<!-- table: families -->\n).*?(<!-- end -->)", re.DOTALL)


def code(*names: str) -> str:
    """Names as code, one after another."""
    return ", ".join(f"`{name}`" for name in names)


def encoders(family: Family) -> str:
    """What makes the rows; `*` is an encoder in whose rows a word is everywhere."""
    blocks = [
        " beside ".join(f"`{name}`" + ("" if name in family.causal else r"\*") for name in block)
        for block in family.rows
    ]
    return ", then ".join(blocks)


def door(family: Family) -> str:
    """What reads the rows first."""
    if family.door is None:
        return f"keys and values: {code(*(f'…{site}' for site in family.text_sites))}"
    return code(family.door) if family.norm is None else f"`{family.door}`, behind the norm `{family.norm}`"


def clock(family: Family) -> str:
    """How the scheduler's timestep follows from what the denoiser is given."""
    factor, offset = family.clock
    given = f"`{family.timestep}`"
    if family.clock_scale is not None:
        return f"{given} / `config.{family.clock_scale}`"
    if offset:
        return f"{offset:,.0f} − {-factor:,.0f} · {given}"
    return given if factor == 1 else f"{factor:,.0f} · {given}"


def row(family: Family) -> str:
    """A family's line."""
    pooled = "none" if family.pooled is None else f"`{family.pooled.reader}`, of {code(*family.pooled.encoders)}"
    where = code(*family.inputs[1:]) if family.norm is not None else code(*family.inputs)
    cells = (
        family.title,
        code(*family.classes),
        encoders(family),
        door(family),
        pooled,
        where,
        clock(family),
        "trained models" if family.judged else "algebra",
    )
    return f"| {' | '.join(cells)} |\n"


HEAD = (
    "family",
    "denoiser",
    "encoders of the rows",
    "door",
    "pooled door",
    "maps act on",
    "scheduler's timestep",
    "tested",
)


def table() -> str:
    """The whole table."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (HEAD, ["---"] * len(HEAD))]
    return "".join([*lines, *map(row, FAMILIES.values())])


def written(page: str) -> str:
    """The page with its table as it should be."""
    return PLACE.sub(lambda place: f"{place[1]}{table()}{place[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
