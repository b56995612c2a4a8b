"""The benchmark of efficacy: its split, its prompts, its numbers on hand-made predictions, its store and its page."""

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import command as commands
from benchmarks.efficacy import __main__ as efficacy
from benchmarks.efficacy import methods, numbers, plan, tables, units
from benchmarks.efficacy.numbers import Bootstrap, Samples, Seen
from benchmarks.efficacy.plan import Job, Shot
from benchmarks.efficacy.units import Unit
from benchmarks.store import Store, do_all
from diffusers_erasure.demo import HYPERNYMS, OBJECTS, STYLES, SYNONYMS
from diffusers_erasure.registry import BUILT_IN
from diffusers_erasure.schema import Concept


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def neighbours() -> plan.Neighbours:
    return plan.find_neighbours(efficacy.fast_pipeline())


@pytest.fixture(scope="module", params=plan.HALVES)
def jobs(request: pytest.FixtureRequest, neighbours: plan.Neighbours) -> list[Job]:
    return plan.make_jobs(request.param, neighbours)


def make_shot(cell: str, concept: str, style: str = "ink", object: str | None = None) -> Shot:
    return Shot(cell, concept, object or concept, style, "{object}", f"{concept} {style}", 0)


def sees(object: str, style: str = "ink", confidence: float = 0.9) -> Seen:
    return Seen(object, style, confidence, confidence)


# ------------------------------------------------------------------------------------------------------- plan


def test_split_is_a_partition_with_every_hypernym_in_both_halves() -> None:
    halves = plan.split()
    assert sorted(halves["dev"] + halves["report"]) == sorted(OBJECTS)
    assert len(halves["dev"]) == len(halves["report"]) == 32
    counts = {half: Counter(HYPERNYMS[name] for name in names) for half, names in halves.items()}
    for hypernym in set(HYPERNYMS.values()):
        assert abs(counts["dev"][hypernym] - counts["report"][hypernym]) <= 1
        assert min(counts[half][hypernym] for half in halves) >= 1
    assert sorted(plan.STYLE_HALVES["dev"] + plan.STYLE_HALVES["report"]) == sorted(STYLES)
    assert plan.STYLE_HALVES["report"] == ("flat", "ink")


@pytest.mark.parametrize("half", plan.HALVES)
def test_single_objects_are_spread_over_the_half(half: str) -> None:
    names = plan.SINGLES[half]
    assert len(names) == len({HYPERNYMS[name] for name in names}) == 8
    assert set(names) <= set(plan.split()[half]) & set(SYNONYMS)


def test_every_cell_has_enough_images(jobs: list[Job]) -> None:
    scenarios = dict.fromkeys(job.scenario for job in jobs)
    for scenario in scenarios:
        cells = tables.images_in([job for job in jobs if job.scenario == scenario])
        assert min(cells.values()) >= tables.ENOUGH, (scenario, cells)
    if "ink" in {job.targets[0] for job in jobs}:
        assert sum(len(job.shots) for job in jobs) == 2648  # as the docs say


def test_cells_hold_what_they_should(jobs: list[Job]) -> None:
    for job in jobs:
        assert not set(job.near) & set(job.targets)
        for name, shots in {
            c: [job.shots[i] for i in job.cell(c)] for c in ("erased", "synonyms", "kept", "near")
        }.items():
            concepts = {shot.concept for shot in shots}
            assert concepts <= set(job.targets) if name in ("erased", "synonyms") else not concepts & set(job.targets)
            assert len({(shot.prompt, shot.seed) for shot in shots}) == len(shots)
            if name in ("erased", "kept"):
                assert {shot.wording for shot in shots} == set(plan.WORDINGS)
                assert job.of_styles or {shot.style for shot in shots} == set(STYLES)
    singles = [job for job in jobs if job.scenario == plan.ONE_OBJECT]
    assert {job.shots[i].concept for job in singles for i in job.cell("kept")} >= set(OBJECTS) - set(
        singles[0].targets
    )
    assert all(len(job.near) == plan.NEAREST for job in singles)


def test_the_same_prompts_start_from_the_same_noise(jobs: list[Job]) -> None:
    def erased(scenario: str) -> set[tuple[str, int]]:
        return {
            (s.prompt, s.seed) for job in jobs if job.scenario == scenario for s in job.shots if s.cell == "erased"
        }

    assert erased(plan.ONE_OBJECT) == erased(plan.EIGHT)


def test_no_wording_of_the_test_is_fitted_on(jobs: list[Job]) -> None:
    synonyms = {word for words in SYNONYMS.values() for word in words}
    for job in jobs:
        anchors = methods.ENTRIES["uce"].anchors(job.targets)
        retain = plan.retained(job.targets, anchors)
        assert not {*retain, *job.targets, *anchors} & synonyms
        assert not set(retain) & {*job.targets, *anchors}
        assert not plan.fitting_prompts(job.targets, anchors) & {shot.prompt for shot in job.shots}


def test_no_entry_brings_a_wording_of_the_test() -> None:
    for entry in methods.ENTRIES.values():
        for target in ("dog", "ink"):
            own = entry.settings_for((target,)).get("templates", ())
            tested = {word.format(object="{}", style=style) for word in plan.WORDINGS for style in STYLES}
            assert isinstance(own, str) or not set(own) & tested, entry.name


def test_a_fitted_wording_is_noticed() -> None:
    fitted = dataclasses.replace(make_shot("erased", "dog"), prompt="a picture of a dog")
    with pytest.raises(AssertionError, match="a picture of a dog"):
        plan.check_unseen([Job("one object", ("dog",), (), (fitted,))])


def test_neighbours_are_the_models(neighbours: plan.Neighbours) -> None:
    assert all(sorted([name, *others]) == sorted(OBJECTS) for name, others in neighbours.items())
    assert neighbours["cherry"][:2] == ["strawberry", "carrot"]


def test_shown_images_are_target_neighbour_and_others(jobs: list[Job]) -> None:
    (job,) = [job for job in jobs if job.shown]
    assert [job.shots[i].concept for i in job.shown[:6]] == [*job.targets * 3, *job.near[:1] * 3]
    family = {HYPERNYMS[name] for name in (*job.targets, job.near[0])}
    assert len(job.shown) == 8 and not family & {HYPERNYMS[job.shots[i].object] for i in job.shown[6:]}


# ------------------------------------------------------------------------------------------------------- numbers


DOG = Job(
    plan.ONE_OBJECT,
    ("dog",),
    ("fox",),
    (
        *[make_shot("erased", "dog")] * 4,
        *[make_shot("synonyms", "dog")] * 2,
        *[make_shot("kept", name) for name in ("car", "rose", "bus", "corn")],
        *[make_shot("near", "fox")] * 2,
    ),
)
BEFORE = [
    *[sees("dog")] * 4,
    *[sees("dog")] * 2,
    *[sees("car"), sees("rose"), sees("bus"), sees("cat")],  # three of four
    *[sees("fox")] * 2,
]
AFTER = [
    *[sees("dog"), sees("cat", confidence=0.5), sees("parrot"), sees("car")],  # a parrot is an animal too
    *[sees("dog"), sees("cat")],
    *[sees("car"), sees("rose", "flat"), sees("cat"), sees("cat")],  # two of four
    *[sees("fox"), sees("cat")],
]


def test_numbers_of_an_object() -> None:
    found = numbers.measure([DOG], [AFTER], [BEFORE], {"dog": "animal"}, Bootstrap(resamples=50))
    expected = {
        "acc_e": 1 / 4,
        "acc_e_synonyms": 1 / 2,
        "acc_r": 2 / 4,
        "acc_r_ratio": (2 / 4) / (3 / 4),
        "acc_r_near": 1 / 2,
        "acc_r_near_ratio": 1 / 2,
        "h_o": 2 / (1 / 0.75 + 1 / 0.5),
        "anchor": 2 / 4,
        "confidence": (0.9 * 3 + 0.5) / 4,
        "other": 3 / 4,
    }
    assert {name: number.value for name, number in found.items()} == pytest.approx(expected)
    # With what the anchor's prompts showed on the same noise the difference to these stands beside it.
    floor = [sees("cat"), sees("dog"), sees("dog"), *AFTER[3:]]
    over = numbers.measure([DOG], [AFTER], [BEFORE], {"dog": "animal"}, Bootstrap(resamples=50), [floor])
    assert list(over) == list(tables.COLUMNS) and set(over) - set(found) == {"over"}
    assert over["over"].value == pytest.approx(-1 / 4) and over["over"].low <= -1 / 4 <= over["over"].high
    assert found["acc_e"].images == found["acc_r"].images == 4


def test_numbers_of_a_style() -> None:
    shots = (
        *[make_shot("erased", "ink", object="dog")] * 4,
        *[make_shot("kept", "flat", "flat", "dog"), make_shot("kept", "noto", "noto", "cat")],
    )
    seen = [sees("dog", "ink"), sees("dog", "flat"), sees("car", "flat"), sees("dog", "noto")]
    seen += [sees("dog", "flat"), sees("car", "ink")]
    job = Job(plan.ONE_STYLE, ("ink",), ("flat", "noto"), shots)
    found = numbers.measure([job], [seen], [seen], {"ink": ""}, Bootstrap(resamples=50))
    values = {name: number.value for name, number in found.items()}
    # The car in flat style is no success: the prompt's object is gone too.
    assert values == pytest.approx(
        {
            "acc_e": 1 / 4,
            "acc_r": 1 / 2,
            "acc_r_ratio": 1,
            "h_o": 0.6,
            "anchor": 2 / 4,
            "confidence": 0.9,
            "other": 1 / 2,
        }
    )
    assert job.cell("near") == job.cell("kept")


def test_anchor() -> None:
    both = dataclasses.replace(DOG, targets=("dog", "cat"))
    shot = DOG.shots[0]
    assert numbers.is_anchor(DOG, shot, sees("cat"), "animal") and not numbers.is_anchor(
        both, shot, sees("cat"), "animal"
    )
    assert not numbers.is_anchor(DOG, shot, sees("dog"), "animal")
    assert numbers.is_anchor(DOG, shot, sees("rose"), "rose") and not numbers.is_anchor(DOG, shot, sees("cat"), "rose")
    # What picks give besides: another name of an object, and a word of the kind that the judge does not know.
    assert numbers.is_anchor(DOG, shot, sees("lion"), "big cat with mane")
    assert numbers.is_anchor(DOG, shot, sees("cat"), "wolf") and not numbers.is_anchor(DOG, shot, sees("dog"), "wolf")
    assert not numbers.is_anchor(DOG, shot, sees("rose"), "wolf")
    assert numbers.has_measured_anchor(DOG, "wolf", "dog") and not numbers.has_measured_anchor(DOG, "hammer", "dog")
    assert not numbers.has_measured_anchor(DOG, "") and not numbers.has_measured_anchor(DOG, "a blur")
    found = numbers.measure([DOG], [AFTER], [BEFORE], {"dog": ""}, Bootstrap(resamples=5))
    assert "anchor" not in found and found["acc_e"].value == 0.25
    ink = Job(plan.ONE_STYLE, ("ink",), (), ())
    drawn = make_shot("erased", "ink", object="dog")
    assert numbers.is_anchor(ink, drawn, sees("dog", "flat"), "flat")
    assert not numbers.is_anchor(ink, drawn, sees("dog", "noto"), "flat")


def test_harmonic() -> None:
    assert numbers.harmonic(1 - 0.0587, 0.8554) == pytest.approx(0.8963, abs=5e-5)  # SPEED's published row
    assert numbers.harmonic(0.0, 0.9) == numbers.harmonic(0.9, 0.0) == numbers.harmonic(0.0, 0.0) == 0.0


def test_bootstrap_is_seeded_and_contains_the_mean() -> None:
    rng = np.random.default_rng(3)
    clusters = tuple(f"c{i // 25}" for i in range(200))
    values = (rng.random(200) < np.repeat(rng.random(8), 25)).astype(float)
    samples = Samples(clusters, values, np.ones(200))
    first = Bootstrap().mean(samples)
    assert first.low < first.value < first.high and first.value == values.mean()
    assert Bootstrap().mean(samples) == first != Bootstrap(seed=1).mean(samples)
    # Concepts that differ among themselves make it wider than images alone would.
    alone = Bootstrap().mean(Samples(tuple(map(str, range(200))), values, values))
    assert first.high - first.low > 1.5 * (alone.high - alone.low)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(200), rel=0.1)


def test_ratio_is_paired_and_clusters_may_differ_in_size() -> None:
    values = np.array([1.0, 0, 1, 1, 0, 1, 1])
    same = Bootstrap().ratio(Samples(("a",) * 5 + ("b",) * 2, values, values))
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    nothing = Bootstrap().ratio(Samples(("a", "b"), np.zeros(2), np.zeros(2)))
    assert math.isnan(nothing.value) and tables.show(nothing) == "–"


def test_resampled_means_by_hand() -> None:
    samples = Samples(("a", "b", "b"), np.array([1.0, 0, 0]), np.array([0.0, 1, 1]))
    picks = np.array([[0, 0], [1, 1], [0, 1]])
    values, baseline = numbers.resampled_means(samples, picks, np.random.default_rng(0))
    assert values.tolist() == [1, 0, 1 / 3] and baseline.tolist() == [0, 1, 2 / 3]


# ------------------------------------------------------------------------------------------------------- store


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units are not drawn but listed here; the judge sees what the prompt names."""
    listed: list[str] = []

    def run(unit: Unit, store: Store) -> dict[str, Any]:
        listed.append(unit.method)
        seen = [[shot.object, shot.style, 0.9, 0.9] for shot in unit.job.shots]
        return {"seen": seen, "fit_seconds": 1.5, "draw_seconds": 2.0}

    monkeypatch.setattr(units, "run_unit", run)
    return listed


def units_of(*names: str) -> list[Unit]:
    return [Unit(name, DOG, "dev", 8) for name in names]


def test_a_stored_unit_is_reused(tmp_path: Path, runs: list[str]) -> None:
    store = Store(tmp_path)
    first = units.run_all(units_of("none", "uce"), store)
    assert sorted(runs) == ["none", "uce"] and len(list(tmp_path.iterdir())) == 2
    assert len(units.run_all(units_of("none", "uce", "negative prompt"), store)) == 3
    assert runs[2:] == ["negative prompt"]
    assert units.run_all(units_of("none", "uce"), store) == first
    assert units.run_all(units_of("uce"), Store.fresh(tmp_path)) == units.run_all(units_of("uce"), store)
    assert runs[3:] == ["uce"]


@pytest.mark.parametrize("damage", ["cut", "empty", "short", "image"])
def test_a_torn_unit_is_recomputed(tmp_path: Path, runs: list[str], damage: str) -> None:
    (unit,) = units_of("uce")
    store = Store(tmp_path)
    (store.new_files(unit) / "0.png").write_bytes(b"")
    first = units.run_all([unit], store)
    file = tmp_path / f"{store.key(unit)}.json"
    text = file.read_text()
    data = json.loads(text)
    data["result"]["seen"].pop()
    torn = {"cut": text[: len(text) // 2], "empty": "", "short": json.dumps(data), "image": text}
    file.write_text(torn[damage])
    if damage == "image":
        store.files_of(unit).joinpath("0.png").unlink()
    assert units.run_all([unit], store) == first
    assert runs == ["uce", "uce"]
    again = json.loads(file.read_text())
    assert [again[name] for name in ("checksum", "result")] == [
        json.loads(text)[name] for name in ("checksum", "result")
    ]


def test_the_key_knows_what_a_result_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (unit,), store = units_of("uce"), Store(tmp_path)
    others = [
        *units_of("none"),
        dataclasses.replace(unit, half="report"),
        dataclasses.replace(unit, steps=2),
        dataclasses.replace(unit, job=dataclasses.replace(DOG, shots=())),
        methods.Fit("uce", "dog"),
    ]
    keys = {store.key(each) for each in (unit, *others)}
    entry = methods.ENTRIES["uce"]
    for change in (
        {"settings": {"lamb": 0.1}},
        {"object_anchor": "cat"},
        {"version": 99},
        {"gated": True},
        {"says": "anchor"},
    ):
        monkeypatch.setitem(methods.ENTRIES, "uce", dataclasses.replace(entry, **change))
        keys.add(store.key(unit))
    monkeypatch.setitem(methods.ENTRIES, "uce", dataclasses.replace(entry, styles={}, note="other"))
    keys.add(store.key(unit))  # nothing that an object depends on: no new key
    assert len(keys) == 11


def test_a_group_is_done_in_one_go_and_the_largest_comes_first(tmp_path: Path, runs: list[str]) -> None:
    small = Unit("uce", dataclasses.replace(DOG, shots=DOG.shots[:1]), "dev", 8)
    units.run_all([small, *units_of("speed")], Store(tmp_path))
    assert runs == ["speed", "uce"]
    items = [*units_of("none", "uce"), dataclasses.replace(small, method="none")]
    found = do_all(items, units.run_unit, Store(tmp_path / "other"), together=lambda unit: unit.method)
    assert list(found) == items and runs[2:] == ["none", "none", "uce"]


# ------------------------------------------------------------------------------------------------------- registry


def test_entries_pass_everything_to_erase(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("diffusers_erasure.erase", lambda pipe, targets, **given: calls.append((targets, given)))
    entry = methods.Entry("uce-x", {"a": 1, "b": 1}, {"b": 2}, {"b": 3}, style_anchor="art")
    entry.make(("cat", "owl"))
    entry.make(("ink",))
    (objects, of_objects), (styles, of_styles) = calls
    assert (objects, styles) == (["cat", "owl"], ["ink"])
    retain = plan.retained(objects, ["animal", "bird"])
    assert of_objects == {"anchors": ["animal", "bird"], "method": "uce", "a": 1, "b": 2, "retain": retain}
    assert of_styles == {"anchors": ["art"], "method": "uce", "a": 1, "b": 3, "retain": plan.retained(styles, ["art"])}
    methods.Entry("acterase").make(("cat",))  # takes no words to retain, and has a bar of its own
    assert set(calls[2][1]) == {"anchors", "method", "preset", "training"} and not calls[2][1]["training"].progress
    baseline = methods.ENTRIES["negative prompt"]
    assert baseline.make(("cat",)) is None and len(calls) == 3
    assert baseline.drawing_for(("cat", "owl")) == {"negative_prompt": "cat, owl"}
    assert methods.ENTRIES["uce"].anchors(("ink", "cat")) == ["", "animal"]


def test_picked_anchors_are_those_that_the_erasure_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("diffusers_erasure.erase", lambda pipe, targets, **given: calls.append(given))
    entry = methods.Entry("gated (auto anchors)", auto_anchors=True)
    entry.make(("cat", "owl"))
    ((given,),) = [calls]
    assert given["anchors"] == "auto" and given["method"] == "gated"
    assert given["retain"] == plan.retained(["cat", "owl"], []) and "fox" in given["retain"]
    recorded: Any = SimpleNamespace(concepts=(Concept("owl", "eagle"), Concept("cat", "fox")))
    assert entry.anchors(("cat", "owl"), recorded) == ["fox", "eagle"]
    with pytest.raises(ValueError, match="once the erasure is made"):
        entry.anchors(("cat",))
    assert entry.identity(("cat",)) != dataclasses.replace(entry, auto_anchors=False).identity(("cat",))
    assert "anchors picked automatically" in entry.summary and "automatically" not in methods.ENTRIES["gated"].summary


def test_picked_anchors_are_stored_and_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(unit: Unit, store: Store) -> dict[str, Any]:
        picked = {"anchors": {"dog": "fox"}} if unit.method != "none" else {}
        seen = [["fox" if shot.object == "dog" else shot.object, shot.style, 0.9, 0.9] for shot in unit.job.shots]
        return {"seen": seen, "fit_seconds": 1.5, "draw_seconds": 2.0, **picked}

    monkeypatch.setattr(units, "run_unit", run)
    results = units.run_all(units_of("none", "gated (auto anchors)"), Store(tmp_path))
    assert units.run_all(units_of("none", "gated (auto anchors)"), Store(tmp_path)) == results
    found = tables.summarise([DOG], ["none", "gated (auto anchors)"], results, "dev")
    row = found["scenarios"][plan.ONE_OBJECT]["methods"]["gated (auto anchors)"]
    assert row["anchors"] == {"dog": "fox"} and row["anchor"]["value"] == 1 and row["acc_e"]["value"] == 0
    assert "anchors" not in found["scenarios"][plan.ONE_OBJECT]["methods"]["none"]


def test_an_erasure_with_picked_anchors_is_made_and_drawn(tmp_path: Path) -> None:
    job = dataclasses.replace(DOG, shots=DOG.shots[:2], shown=())
    found = units.run_unit(Unit("gated (auto anchors)", job, "dev", 1), Store(tmp_path))
    assert HYPERNYMS[found["anchors"]["dog"]] == "animal" and len(found["seen"]) == 2


def test_an_entry_says_its_settings() -> None:
    assert methods.ENTRIES["sdd"].summary == 'SDD, `preset="object"`, for styles `preset="style"`'
    assert methods.ENTRIES["dumo-full"].summary.startswith('DuMo, `form="full"`, `learning_rate=0.0005`, `preset=')
    assert "at most 8 at once; the guidance" in methods.ENTRIES["acterase"].summary
    assert methods.ENTRIES["none"].summary == "the un-erased model"
    assert {entry.method for entry in methods.ENTRIES.values() if entry.erases} == {each.name for each in BUILT_IN}
    assert methods.entry_of("uce") is methods.ENTRIES["uce"] and methods.entry_of("other").settings_for(["cat"]) == {}


def test_an_entry_may_leave_scenarios_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: list[str]) -> None:
    monkeypatch.setitem(methods.ENTRIES, "few", methods.Entry("few", max_targets=1))
    both = dataclasses.replace(DOG, scenario=plan.EIGHT, targets=("dog", "cat"))
    wanted = [unit for name in ("none", "few") for unit in units.wanted_units(name, [DOG, both], "dev", 8)]
    results = units.run_all(wanted, Store(tmp_path))
    found = tables.summarise([DOG, both], ["none", "few"], results, "dev")
    rows = {name: list(part["methods"]) for name, part in found["scenarios"].items()}
    assert rows == {plan.ONE_OBJECT: ["none", "few"], plan.EIGHT: ["none"]}
    part = found["scenarios"][plan.ONE_OBJECT]
    assert part["methods"]["few"]["acc_e_by_target"] == {"dog": 1} and part["methods"]["few"]["fit_seconds"] == 1.5
    monkeypatch.delitem(methods.ENTRIES, "few")
    text = tables.markdown(found, "python x.py")
    assert "### One object, one erasure each" in text and "| few | 100.0 [100–100] |" in text
    assert "Half: dev." in text and "`python x.py`" in text and "erased 4, synonyms 2, kept 4, near 2" in text


# ------------------------------------------------------------------------------------------------------- page


def test_only_what_is_between_the_markers_is_replaced() -> None:
    begin, end = "<!-- efficacy: begin -->", "<!-- efficacy: end -->"
    page = f"before\n\n{begin}\nold\n{end}\nafter | é\n"
    once = commands.replace_between(page, "efficacy", "new")
    assert once == f"before\n\n{begin}\n\nnew\n\n{end}\nafter | é\n"
    assert commands.replace_between(once, "efficacy", "new") == once
    for wrong in ("", begin, f"{end}{begin}", page + page):
        with pytest.raises(ValueError, match="once each"):
            commands.replace_between(wrong, "efficacy", "new")


def test_the_page_has_the_markers_and_says_what_its_rows_are() -> None:
    text = (ROOT / efficacy.PAGE).read_text(encoding="utf-8")
    found = {}
    worlds = [f" {world}{kind}" for kind in ("", " linear", " trained") for world in ("flux", "sd3", "sdxl")]
    measured = [f"efficacy{of}" for of in ("", " sd1 probes", *worlds)]
    for name in measured:
        assert "new" in commands.replace_between(text, name, "new")
        part = text.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
        rows = [
            line.partition("**: ")[0].removeprefix("- **") for line in part.splitlines() if line.startswith("- **")
        ]
        found[name] = [row for row in rows if row in methods.ENTRIES]
        assert found[name] and "\n".join(tables.legend(found[name])) in part
    assert "speed" in found["efficacy"] and "esd" in found["efficacy flux trained"]


@pytest.mark.parametrize("further", (["--smoke"], ["--half", "dev"], ["--images-scale", "0.5"]))
def test_docs_are_written_from_the_whole_report_half_alone(further: list[str]) -> None:
    with pytest.raises(SystemExit):
        efficacy.parse(["--write-docs", *further])


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    def run(*further: str) -> dict[str, Any]:
        path = tmp_path / "numbers.json"
        command = [sys.executable, "-m", "benchmarks.efficacy", "--smoke", "--json", str(path), *further]
        command += ["--store", str(tmp_path / "store")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Fewer than 200 images" in done.stdout and "--smoke" in done.stdout
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    first = run("--jobs", "2", "--grid", str(tmp_path / "grid.png"))
    (scenario,) = first["scenarios"].values()
    assert first["smoke"] and list(scenario["methods"]) == ["none", "uce"]
    assert (tmp_path / "grid.png").stat().st_size > 1000
    stored = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}
    assert sorted(file.suffix for file in stored) == ["", "", ".json", ".json"]
    assert run()["scenarios"] == first["scenarios"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()} == stored


def test_the_anchor_stands_in_the_prompt_instead_of_the_target() -> None:
    neighbours = {name: [other for other in OBJECTS if other != name] for name in OBJECTS}
    entry = methods.ENTRIES["anchor prompt"]
    job = plan.object_job(plan.ONE_OBJECT, ("penguin",), neighbours, plan.Counts(4, 4))
    for place, shot in enumerate(job.shots):
        said = entry.prompt(shot, job.targets)
        expected = shot.wording.format(object="bird", style=shot.style) if place in job.cell("erased") else shot.prompt
        assert said == expected and methods.ENTRIES["none"].prompt(shot, job.targets) == shot.prompt
    style = plan.style_job("ink", plan.Counts(2, 2))
    assert "ink" not in entry.prompt(style.shots[0], style.targets)
    assert entry.identity(("penguin",)) != methods.ENTRIES["none"].identity(("penguin",))
