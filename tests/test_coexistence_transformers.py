"""Erasures of FLUX.1 and Stable Diffusion 3 beside what people do to a pipeline: equal to a plain pipeline, or a typed error.

As `tests/test_coexistence.py` for UNets. Each cell first shows that the erasure changes the picture. The table in
docs/composing.md is written by the run:

    UPDATE_MATRIX=1 python -m pytest tests/test_coexistence_transformers.py
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import ErasureError
from diffusers_erasure.fingerprints import describe_model
from tests.coexistence_transformers import (
    AFTER,
    BEFORE,
    FORMS,
    NAME,
    NEIGHBOURS,
    NOT_RESTORABLE,
    ONLY_ON_GPU,
    Refused,
    base,
)
from tests.helpers import EFFECT, ROUNDINGS, equal, far
from tests.tables import EQUAL, NOT_RUN, check_table
from tests.tiny_transformers import PIPES, drawn


PAGE = Path(__file__).resolve().parents[1] / "docs" / "composing.md"
PLACE = re.compile(r"(<!-- matrix of transformers -->\n).*?(<!-- end -->)", re.DOTALL)
UPDATE = "UPDATE_MATRIX" in os.environ
FOUND: dict[tuple[str, str, str, bool], str] = {}  # by kind, neighbour, form, and whether the erasure was loaded after


@pytest.fixture(autouse=True, scope="module")
def no_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


@cache
def beside(kind: str, name: str) -> Any:
    """What the un-erased pipeline draws with a neighbour."""
    neighbour = NEIGHBOURS[name]
    return neighbour.drawn(kind, neighbour.joins(kind, base(kind)))


@cache
def plainly(kind: str, name: str, form: str) -> Any:
    """What the plain pipeline of a form draws with a neighbour."""
    form = "lora by hooks" if form in ("merged", "peft") and form not in NEIGHBOURS[name].plain else form
    return NEIGHBOURS[name].drawn(kind, NEIGHBOURS[name].plainly(kind, form))


def joined(kind: str, name: str, form: str, after: bool) -> Any:
    """A pipeline with the erasure and the neighbour."""
    pipe, neighbour = base(kind), NEIGHBOURS[name]
    if not after and not neighbour.first:
        FORMS[form].load(kind, pipe)
        return neighbour.joins(kind, pipe)
    pipe = neighbour.joins(kind, pipe)
    FORMS[form].load(kind, pipe)
    return pipe


def look(kind: str, name: str, form: str, after: bool) -> None:
    """Try one cell."""
    neighbour = NEIGHBOURS[name]
    missing = neighbour.missing()
    if missing or (after and (name, form) in ONLY_ON_GPU and not torch.cuda.is_available()):
        FOUND[kind, name, form, after] = NOT_RUN
        pytest.skip(f"not run: {missing or 'there is no CUDA device'}")
    alone, plain = beside(kind, name), plainly(kind, name, form)
    tolerance = ROUNDINGS * torch.finfo(torch.float32).eps * float(abs(plain).max())
    effect = far(plain, alone)
    assert effect > max(EFFECT, 20 * tolerance), f"the erasure has too little effect: {effect}"
    refused = (AFTER if after else BEFORE).get((name, form))
    if refused is not None:
        with pytest.raises(refused.error, match=refused.match):
            neighbour.drawn(kind, joined(kind, name, form, after))
        FOUND[kind, name, form, after] = refused.reason
        return
    pipe = joined(kind, name, form, after)
    off = far(neighbour.drawn(kind, pipe), plain)
    assert off <= tolerance, f"{off} off, {tolerance} are allowed; the whole effect is {effect}"
    restored(kind, name, form, after, pipe)
    FOUND[kind, name, form, after] = EQUAL


def restored(kind: str, name: str, form: str, after: bool, pipe: Any) -> None:
    """At strength 0 and unloaded the pipeline is what it is with the neighbour alone, bit for bit."""
    if not after and (name, form) in NOT_RESTORABLE:
        with pytest.raises(ErasureError, match="othing was changed"):
            pipe.unload_erasure()
        return
    neighbour, alone = NEIGHBOURS[name], beside(kind, name)
    pipe.set_erasures(NAME, 0.0)
    assert equal(neighbour.drawn(kind, pipe), alone)
    pipe.unload_erasure()
    assert equal(neighbour.drawn(kind, pipe), alone)


def cells(after: bool) -> list[Any]:
    return [
        pytest.param(
            kind, name, form, id=f"{kind}-{name}-{form}", marks=[pytest.mark.slow] * (after or neighbour.slow)
        )
        for name, neighbour in NEIGHBOURS.items()
        for kind in neighbour.kinds
        for form in FORMS
    ]


@pytest.mark.parametrize(("kind", "name", "form"), cells(after=False))
def test_cell(kind: str, name: str, form: str) -> None:
    look(kind, name, form, after=False)


@pytest.mark.parametrize(("kind", "name", "form"), cells(after=True))
def test_cell_loaded_after(kind: str, name: str, form: str) -> None:
    look(kind, name, form, after=True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] * neighbour.slow)
        for name, neighbour in NEIGHBOURS.items()
        for kind in neighbour.kinds
    ],
)
def test_neighbours_do_something(kind: str, name: str) -> None:
    """Or do nothing to the picture, where they should not."""
    neighbour = NEIGHBOURS[name]
    if missing := neighbour.missing():
        pytest.skip(missing)
    pipe = neighbour.joins(kind, base(kind), plain=True) if not neighbour.changes else base(kind)
    alone, nothing = beside(kind, name), neighbour_free(kind, name, pipe)
    if neighbour.changes:
        assert alone.shape != nothing.shape or far(alone, nothing) > 1e-4
    else:
        assert far(alone, nothing) <= ROUNDINGS * torch.finfo(torch.float32).eps


def neighbour_free(kind: str, name: str, pipe: Any) -> Any:
    """What is drawn with the same number of steps and nothing else."""
    return drawn(pipe, num_inference_steps=NEIGHBOURS[name].arguments.get("num_inference_steps", 3))


@pytest.mark.parametrize("kind", PIPES)
def test_an_ip_adapter_makes_no_other_base(kind: str) -> None:
    """What it adds to the transformer is none of the model's own parameters, so that an erasure is loaded beside it."""
    pipe = base(kind)
    names = set(pipe.transformer.state_dict())
    alone = describe_model(pipe.transformer)
    NEIGHBOURS["IP-Adapter"].joins(kind, pipe)
    assert set(pipe.transformer.state_dict()) > names
    assert describe_model(pipe.transformer) == alone


def test_few_are_refused() -> None:
    """At most a tenth of the cells, each with a reason."""
    for half, refused in ((cells(False), BEFORE), (cells(True), AFTER)):
        assert len(PIPES) * len(refused) <= len(half) / 10
        assert {tuple(cell.values[1:]) for cell in half} >= refused.keys()
        assert all(isinstance(each, Refused) and each.reason for each in refused.values())


def table() -> str:
    """What was found, in Markdown."""
    reasons: list[str] = []

    def sign(outcome: str) -> str:
        if outcome in (EQUAL, NOT_RUN):
            return outcome
        if outcome not in reasons:
            reasons.append(outcome)
        return f"error ({reasons.index(outcome) + 1})"

    lines = ["| | " + " | ".join(FORMS) + " |", "| --- " * (len(FORMS) + 1) + "|"]
    for name in NEIGHBOURS:
        row = []
        for form in FORMS:
            signs = [
                dict.fromkeys(sign(FOUND[kind, name, form, after]) for kind in NEIGHBOURS[name].kinds)
                for after in (False, True)
            ]
            row.append(" / ".join(dict.fromkeys(each for half in signs for each in half)))
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
    found_here = ((name, form, after, outcome) for (_, name, form, after), outcome in FOUND.items())
    check_table(found[0], list(NEIGHBOURS), list(FORMS), found_here)
