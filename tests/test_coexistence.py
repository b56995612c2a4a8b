"""The coexistence matrix: each form of an erasure beside each thing that people do to a pipeline.

A cell draws with the erasure and the neighbour, and compares with the plain pipeline: one without hooks, adapters or anything
of this library, to which the same neighbour was done. Where the edit is one of weights, the plain pipeline has the edited weights
(W + B A, W T); else a plain function is in the place of the layer (`tests/coexistence.py`).

**Tolerance**: three times the difference that the un-erased pipeline with the same neighbour makes when every matrix product,
convolution and attention in it is summed in the opposite order; ten roundings at least, should the two orders agree by chance. Of a
pipeline that was cast to float16 and back it is three times the difference between drawing in float16 and in float32.

Every cell first shows that the erasure changes the picture: plain and un-erased pipeline differ by more than `EFFECT`, and by more
than twice the tolerance. What then is neither equal nor a typed error that `tests/coexistence.py` lists with its reason, fails.

The erasure is loaded before the neighbour comes, where that can be; the slow half loads it after. The table in docs/composing.md is
written by the run:

    UPDATE_MATRIX=1 python -m pytest tests/test_coexistence.py
"""

import gc
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_erasure import ErasureError
from tests.coexistence import (
    AFTER,
    BEFORE,
    FORMS,
    GPU,
    NAME,
    NEIGHBOURS,
    NOT_RESTORABLE,
    ONLY_ON_GPU,
    Neighbour,
    Refused,
    ReversedSums,
    base,
    erased,
)
from tests.helpers import EFFECT, equal, far
from tests.tables import EQUAL, NOT_RUN, check_table


PAGE = Path(__file__).resolve().parents[1] / "docs" / "composing.md"
PLACE = re.compile(r"(<!-- matrix -->\n).*?(<!-- end -->)", re.DOTALL)
UPDATE = "UPDATE_MATRIX" in os.environ
FOUND: dict[tuple[str, str, bool], str] = {}  # by neighbour, form, and whether the erasure was loaded after

# For these strength 0 and unloading are tried in each run, for all others in the slow half.
RESTORED = ("LoRA", "OFT", "IP-Adapter", "DeepCache", "sequential offload", "bfloat16", "GGUF")


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """What the libraries hold is not looked through again for each cell's copies, which would take half of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.compiler.reset()


@cache
def beside(name: str) -> tuple[np.ndarray, float]:
    """What the un-erased pipeline draws with a neighbour, and the tolerance."""
    neighbour = NEIGHBOURS[name]
    drawn = neighbour.drawn(neighbour.joins(base()))
    if neighbour.coarse is not None:
        one, other = map(neighbour.drawn, neighbour.coarse())
    else:
        one, pipe = drawn, neighbour.joins(base(), plain=not neighbour.changes)
        with ReversedSums():
            other = neighbour.drawn(pipe)
    least = 10 * torch.finfo(torch.float32).eps * float(np.abs(drawn).max())
    return drawn, max(3 * far(one, other), least)


@cache
def plainly(name: str, form: str, after: bool) -> np.ndarray:
    """What the plain pipeline of a form draws with a neighbour."""
    neighbour = NEIGHBOURS[name]
    return neighbour.drawn(neighbour.plainly(form, after))


def look(name: str, form: str, after: bool) -> None:
    """Try one cell."""
    neighbour = NEIGHBOURS[name]
    reason = neighbour.why_not()
    if reason is None and after and GPU is None and (name, form) in ONLY_ON_GPU:
        reason = "there is no CUDA device"
    if reason is not None:
        FOUND[name, form, after] = NOT_RUN
        print(f"{name}, {form}: not run, {reason}")
        pytest.skip(f"not run: {reason}")
    alone, tolerance = beside(name)
    plain = plainly(name, *shared(neighbour, form, after))
    effect = far(plain, alone)
    assert effect > max(EFFECT, 2 * tolerance), f"the erasure has too little effect: {effect}"

    refused = (AFTER if after else BEFORE).get((name, form))
    if refused is not None:
        with pytest.raises(refused.error, match=refused.match):
            neighbour.drawn(joined(name, form, after))
        FOUND[name, form, after] = refused.reason
        return
    pipe = joined(name, form, after)
    off = far(neighbour.drawn(pipe), plain)
    assert off <= tolerance, f"{off} off, {tolerance} are allowed; the whole effect is {effect}"
    if after or name in RESTORED:
        restored(name, form, after, pipe)
    FOUND[name, form, after] = EQUAL


def restored(name: str, form: str, after: bool, pipe: Any) -> None:
    """At strength 0 and unloaded the pipeline is what it is with the neighbour alone, bit for bit."""
    if not after and (name, form) in NOT_RESTORABLE:
        with pytest.raises(ErasureError, match="nothing was changed"):
            pipe.unload_erasure()
        return
    neighbour, (alone, _) = NEIGHBOURS[name], beside(name)
    pipe.set_erasures(NAME, 0.0)
    assert equal(neighbour.drawn(pipe), alone)
    pipe.unload_erasure()
    assert equal(neighbour.drawn(pipe), alone)


def shared(neighbour: Neighbour, form: str, after: bool) -> tuple[str, bool]:
    """What `plainly` is given, so that forms with the same plain pipeline share what it draws."""
    if after and form in neighbour.plain_after:
        return form, True
    twins = [other for other in FORMS if FORMS[other].twin and FORMS[other].twin == FORMS[form].twin]
    return form if form in neighbour.plain else next((t for t in twins if t not in neighbour.plain), form), False


def joined(name: str, form: str, after: bool) -> Any:
    """A pipeline with the erasure and the neighbour."""
    neighbour = NEIGHBOURS[name]
    if not after and not neighbour.first:
        return neighbour.joins(erased(form))
    pipe = neighbour.joins(base())
    FORMS[form].load(pipe)
    return pipe


def cells(after: bool) -> list[Any]:
    """Of one half of the matrix; what can only be loaded after is in the first half."""
    return [
        pytest.param(name, form, id=f"{name}-{form}", marks=[pytest.mark.slow] if after or neighbour.slow else [])
        for name, neighbour in NEIGHBOURS.items()
        for form in FORMS
        if not (after and neighbour.first)
    ]


@pytest.mark.parametrize(("name", "form"), cells(after=False))
def test_cell(name: str, form: str) -> None:
    look(name, form, after=False)


@pytest.mark.parametrize(("name", "form"), cells(after=True))
def test_cell_loaded_after(name: str, form: str) -> None:
    look(name, form, after=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * n.slow) for name, n in NEIGHBOURS.items()]
)
def test_neighbours_do_something(name: str) -> None:
    """Or do nothing to the picture, where they should not."""
    if NEIGHBOURS[name].why_not() is not None:
        pytest.skip("not run")
    alone, tolerance = beside(name)
    nothing = Neighbour().drawn(base())
    if NEIGHBOURS[name].changes:
        assert far(alone, nothing) > max(tolerance / 3, 1e-4)
    else:
        assert far(alone, nothing) <= tolerance


def test_few_are_refused() -> None:
    """At most a tenth of the cells, each with a reason."""
    for half, refused in ((cells(False), BEFORE), (cells(True), AFTER)):
        assert len(refused) <= len(half) / 10
        assert {tuple(cell.values) for cell in half} >= refused.keys()
        assert all(isinstance(each, Refused) and each.reason for each in refused.values())


# ----------------------------------------------------------------------------------------------------- the table


def sign(outcome: str, reasons: list[str]) -> str:
    """As it stands in the table."""
    if outcome in (EQUAL, NOT_RUN):
        return outcome
    if outcome not in reasons:
        reasons.append(outcome)
    return f"error ({reasons.index(outcome) + 1})"


def table() -> str:
    """What was found, in Markdown."""
    reasons: list[str] = []
    lines = ["| | " + " | ".join(FORMS) + " |", "| --- " * (len(FORMS) + 1) + "|"]
    for name in NEIGHBOURS:
        row = []
        for form in FORMS:
            signs = [
                sign(FOUND[name, form, after], reasons) for after in (False, True) if (name, form, after) in FOUND
            ]
            row.append(" / ".join(dict.fromkeys(signs)))
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes, ""])


def test_the_table_is_what_was_found() -> None:
    """Each cell that was tried in this process stands in the table as it came out."""
    page = PAGE.read_text(encoding="utf-8")
    if UPDATE:
        every = {(*cell.values, after) for after in (False, True) for cell in cells(after)}
        assert FOUND.keys() == every, "not all cells were tried, or not all as they should come out"
        page = PLACE.sub(lambda place: place[1] + table() + place[2], page)
        PAGE.write_text(page, encoding="utf-8")
    found = PLACE.search(page)
    assert found is not None
    found_here = ((name, form, after, outcome) for (name, form, after), outcome in FOUND.items())
    check_table(found[0], list(NEIGHBOURS), list(FORMS), found_here)
