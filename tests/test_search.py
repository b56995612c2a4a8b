"""The search for presets: what it tries, how it scores, and that a run that was broken off goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.efficacy import curve, default, search
from benchmarks.efficacy.plan import Job, Shot
from benchmarks.efficacy.search import FLOOR, SPACES, Candidate, Trial, candidates, rows_of, scored
from benchmarks.store import Store
from diffusers_erasure.methods import DEFAULTS, default_method, get_method
from tests.test_benchmarks import run


@pytest.mark.parametrize("method", SPACES)
def test_candidates(method: str) -> None:
    """Each once and as many as are drawn, the method as it is first; settings that there are."""
    found = candidates(method)
    assert found[0] == Candidate(method) and len(set(found)) == len(found) <= search.MOST
    assert found == candidates(method)
    known = {item.name for item in dataclasses.fields(get_method(method).config)}
    for each in found:
        assert {name for name, _ in each.settings} <= known and each.entry.settings["compare"] is False
    assert str(found[0]) == "as it is" and "`" in str(found[1])


def shots(*cells: str) -> tuple[Shot, ...]:
    return tuple(Shot(cell, "cat", "cat", "noto", "{}", f"{cell} {i}", i) for i, cell in enumerate(cells))


def test_scores() -> None:
    """Over the floor, of the un-erased model's, and the harmonic mean of the two."""
    job = Job("one object", ("cat",), (), shots(*["erased"] * 4, *["kept"] * 4))
    who = Candidate("uce")
    trials = [Trial(who, "sd1", job, 0.1)]
    right = {
        who: [True, True, False, False, True, True, True, False],
        Candidate(FLOOR): [True, False, False, False, *[True] * 4],
        Candidate("none"): [*[True] * 8],
    }
    results = {dataclasses.replace(trials[0], candidate=each): {"right": seen} for each, seen in right.items()}
    score = scored(results, who, trials)
    assert score.cells == {("sd1", "one object"): (0.5, 0.25, 0.75)} and score.value == pytest.approx(0.75)
    assert rows_of([(who, score)]) == [("as it is", "75.0", "+25.0 / 75.0")]
    # Gates alone have no floor, and are to open for none of what is kept.
    gates = Trial(who, "sd1", job, search.GATES)
    score = scored({gates: {"right": right[who]}}, who, [gates])
    assert score.cells == {("sd1", "one object"): (0.5, 0.0, 0.75)}


def test_the_best_go_on_to_more_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round has a quarter of the candidates and the method as it is; what was done is not done again."""
    done: list[Trial] = []
    good = Candidate("uce", (("lamb", 0.5),))

    def trial(item: Trial, store: Store) -> dict[str, Any]:
        done.append(item)
        keeps = item.candidate in (good, Candidate("none"))
        erased = item.candidate == Candidate("none")
        return {"right": [erased if shot.cell == "erased" else keeps for shot in item.job.shots]}

    some = [Candidate("uce"), *(Candidate("uce", (("lamb", value),)) for value in (0.1, 0.2, 0.3, 0.4, 0.5))]
    monkeypatch.setattr(search, "candidates", lambda method: some)
    monkeypatch.setattr(search, "run_trial", trial)
    monkeypatch.setattr(
        search, "jobs_of", lambda scale, neighbours: [Job("one object", ("cat",), (), shots("erased", "kept"))]
    )
    rounds = search.search("uce", ["sd1"], Store(tmp_path), 1)
    assert [scale for scale, _ in rounds] == list(search.ROUNDS)
    assert [len(scores) for _, scores in rounds] == [6, 2] and all(scores[0][0] == good for _, scores in rounds)
    count = len(done)
    assert search.search("uce", ["sd1"], Store(tmp_path), 1) == rounds and len(done) == count


def test_settings_that_erase_nothing_are_the_worst(tmp_path: Path) -> None:
    """What is retained may span all directions of a model's text rows."""
    who = Candidate("dp", (("retain_templates", False), ("ridge", 0.0), ("threshold", 0.0)))
    trial = Trial(who, "sd1", Job("one object", ("cat",), (), shots("erased", "kept")), 0.1)
    assert search.run_trial(trial, Store(tmp_path)) == {"right": [True, False]}


def test_smoke(tmp_path: Path) -> None:
    """The gates of real erasures are asked."""
    numbers = run("efficacy.search", tmp_path, "gated", "--worlds", "sd1", "--store", str(tmp_path / "store"))
    (only,) = numbers["gated"]
    assert only["images"] == 0 and len(only["candidates"]) == 2
    for each in only["candidates"]:
        missed, floor, kept = each["cells"]["sd1 one object"]
        assert missed <= 0.2 and floor == 0 and kept >= 0.9 and each["score"] > 0.85


# ------------------------------------------------------------------------------------------------------- the curve


@pytest.mark.parametrize(
    ("erased", "expected"), [(0.1, None), (0.2, 0.8), (0.25, 0.85), (0.3, 0.9), (0.4, 0.95), (0.5, 1.0), (0.7, 1.0)]
)
def test_what_is_kept_at_the_same_erasing(erased: float, expected: float | None) -> None:
    """On straight lines over the points that keep more than all which erase more; beyond the strongest nothing is known."""
    known = [(0.3, 0.9), (0.5, 1.0), (0.2, 0.8), (0.4, 0.7), (0.3, 0.5), (0.6, 0.99)]
    assert curve.kept_at(erased, known) == (expected if expected is None else pytest.approx(expected))


def test_points_of_the_curve() -> None:
    """Each once, each form as it is first, and settings that there are."""
    found = curve.points()
    assert len(set(found)) == len(found)
    assert [each.along for each in found if not each.along.startswith("`")] == ["as it was", "as it is", "as it is"]
    known = {item.name for method in ("uce", "dp") for item in dataclasses.fields(get_method(method).config)}
    assert {name for each in found for name, _ in each.candidate.settings} <= known
    assert {each.strength for each in found if "strength" in each.along} == set(curve.STRENGTHS)


def test_a_strength_is_drawn_and_compared_with_the_same_baselines() -> None:
    """The un-erased model and the anchor prompt have none of their own."""
    job = Job("8 objects at once", ("cat",), (), shots("erased", "kept"))
    who = Candidate("dp")
    half = Trial(who, "sd1", job, 0.1, 0.5)
    others = {Trial(Candidate(name), "sd1", job, 0.1): {"right": [False, True]} for name in (FLOOR, "none")}
    assert scored({half: {"right": [True, True]}, **others}, who, [half]).cells == {
        ("sd1", "8 objects at once"): (1.0, 0.0, 1.0)
    }
    assert half.identity() != dataclasses.replace(half, strength=1.0).identity()
    assert "strength" not in dataclasses.replace(half, strength=1.0).identity()


def test_smoke_of_the_curve(tmp_path: Path) -> None:
    numbers = run("efficacy.curve", tmp_path, "--images-scale", "0.02", "--store", str(tmp_path / "store"))
    ((_, points),) = [each for each in numbers.items() if each[0].endswith("at once")]
    assert [each["form"] for each in points] == ["UCE before"] * 2 and all(0 <= p["acc_r_ratio"] <= 1 for p in points)


# ------------------------------------------------------------------------------------------------------- the default


def report(**rows: tuple[float, float, float]) -> dict[str, Any]:
    """What `benchmarks.efficacy --json` writes of acc_e, synonyms and what is kept."""
    names = ("acc_e", "acc_e_synonyms", "acc_r_ratio")
    methods = {
        method.replace("_", " "): {name: {"value": value} for name, value in zip(names, values, strict=True)}
        for method, values in rows.items()
    }
    return {"half": "report", "world": "sd1", "scenarios": {"one object": {"methods": methods}}}


def test_the_default_is_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What erases and keeps counts four times what is robust and what stock diffusers loads; below the floor is no merit."""
    one = report(
        anchor_prompt=(0.2, 0.1, 0.0),
        uce=(0.4, 0.3, 0.9),
        dp=(0.3, 0.4, 0.7),
        gated=(0.1, 0.2, 1.1),
        rece=(0.3, 0.1, 0.5),
    )
    ranked = default.ranking([one])
    assert [name for name, *_ in ranked] == ["gated", "uce", "dp", "rece"]
    # what stock diffusers gets of a gated edit is DP's
    assert ranked[0][2] == pytest.approx({"erases": 1.0, "keeps": 1.0, "robust": 0.9, "stock": 0.8})
    assert ranked[1][1] == pytest.approx(0.4 * 0.8 + 0.4 * 0.9 + 0.1 * 0.8 + 0.1 * 0.85)
    # a method is taken from the first report of a model that has it, and left out where a model has none
    other = report(anchor_prompt=(0.0, 0.0, 0.0), uce=(1.0, 1.0, 0.0), oce=(0.0, 0.0, 1.0))
    assert [(name, score) for name, score, _ in default.ranking([one, other]) if name != "oce"] == [
        (name, score) for name, score, _ in ranked
    ]
    assert [name for name, *_ in default.ranking([one, {**other, "world": "flux"}])] == ["uce"]
    file = tmp_path / "report.json"
    file.write_text(json.dumps(one), encoding="utf-8")
    default.main([str(file), "--smoke"])
    assert "gated" in capsys.readouterr().out
    file.write_text(json.dumps({**one, "half": "dev"}), encoding="utf-8")
    with pytest.raises(SystemExit):
        default.main([str(file)])


def test_the_docs_table_says_what_erase_takes() -> None:
    text = (Path(__file__).parent.parent / default.PAGE).read_text(encoding="utf-8")
    table = text.partition("<!-- default: begin -->")[2].partition("<!-- default: end -->")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert rows[0] == DEFAULTS[0] and set(DEFAULTS) <= set(rows) <= set(default.candidates())


@pytest.mark.parametrize(
    ("names", "expected"), [((), "gated"), (("share",), "gated"), (("lamb",), "uce"), (("nothing",), "gated")]
)
def test_what_erase_takes_by_its_settings(names: tuple[str, ...], expected: str) -> None:
    assert default_method(names) == expected
