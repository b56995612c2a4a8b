"""The tables of coexistence in docs/composing.md, against what tests found."""

import re
from collections.abc import Iterable, Mapping, Sequence


EQUAL, NOT_RUN = "=", "not run"
Found = tuple[str, str, bool, str]  # a neighbour, a form, whether the erasure was loaded after, and what came out


def check_table(part: str, names: Sequence[str], forms: Sequence[str], found: Iterable[Found]) -> None:
    """Each cell that was tried in this process stands in the table of a page's part as it came out."""
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in part.splitlines() if line.startswith("| ")}
    reasons: Mapping[str, str] = dict(re.findall(r"^(\d+)\. (.+)$", part, re.MULTILINE))
    assert list(rows)[2:] == list(names)
    for name, form, after, outcome in found:
        texts = rows[name].removesuffix(" |").split(" | ")[1 + list(forms).index(form)].split(" / ")
        told = texts[-1 if after else 0]
        note = re.fullmatch(r"error \((\d+)\)", told)
        told = reasons[note[1]] if note else told
        assert outcome == told or NOT_RUN in (outcome, told), f"{name}, {form}: {outcome}, but the table says {told}"
