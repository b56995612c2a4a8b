"""What is kept by default, and what is told of the rest: `retain` left out, and words that moved."""

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import Erasure, ErasureInputError, combine, demo, erase
from diffusers_erasure.base_model import plain_weight, text_readers
from diffusers_erasure.cards import render_card
from diffusers_erasure.collateral.rows import row_moves
from diffusers_erasure.collateral.telling import told
from diffusers_erasure.encoding import last_rows
from diffusers_erasure.fitting import recipe_of
from diffusers_erasure.lists import Retained, read_list
from diffusers_erasure.lists.defaults import lists_for, task_of, with_lists
from diffusers_erasure.methods.holding import HELD, LEAST, holding, moved
from tests.commands import invoke
from tests.helpers import edits, tiny_sd_pipe, tiny_sdxl_pipe


ROOT = Path(__file__).resolve().parents[1]
BROAD: dict[str, Any] = {"targets": "cat", "anchors": "animal", "retain": ["dog", "rabbit"]}
README: dict[str, Any] = {**BROAD, "anchors": "fox"}  # its example
QUICK: dict[str, Any] = {"method": "esd", "steps": 2, "trajectories": 2, "num_inference_steps": 2, "batch_size": 1}


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = demo.load_pipeline()
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def broad(pipe: Any) -> Erasure:
    return erase(pipe, **BROAD, method="uce")


def seen(pipe: Any, prompts: list[str]) -> tuple[str, ...]:
    """What the judge sees in pictures of some prompts, each from the noise of its number."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=12, guidance_scale=3.0, generator=noise).images
    return demo.load_judge().predict(images).objects


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "moved by more than" in record.getMessage()]


# -------------------------------------------------------------------------------------------------- what is kept


def test_the_example_of_the_readme_keeps_the_others(pipe: Any) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'erase(pipe, "cat", anchors="fox", retain=["dog", "rabbit"])' in page
    others = [name for name in demo.OBJECTS if name != "cat"]
    pipe.load_erasure(erase(pipe, **README, method="uce"), "no-cat")
    found = seen(pipe, [demo.prompt(name, demo.STYLES[i % 5]) for i, name in enumerate(others)])
    cats = seen(pipe, [demo.prompt("cat", style) for style in demo.STYLES])
    pipe.unload_erasure("no-cat")
    assert sum(a == b for a, b in zip(found, others, strict=True)) >= 60
    assert "cat" not in cats


def test_little_means_a_default_list_and_nothing_means_nothing(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "diffusers_erasure")
    left_out = erase(pipe, "cat", anchors="animal", method="uce").config.method.settings
    assert left_out["retain_default"] == ["list:things"] and left_out["retain_prompts"] == 0
    assert "Retained by default: list:things (193 entries)" in caplog.text
    nothing = erase(pipe, "cat", anchors="animal", retain=(), method="uce")
    assert nothing.config.method.settings["retain_prompts"] == 0
    assert "retain_default" not in nothing.config.method.settings
    many = erase(pipe, "cat", anchors="animal", retain=[name for name in demo.OBJECTS if name != "cat"], method="uce")
    assert "retain_default" not in many.config.method.settings
    published = erase(pipe, "cat", anchors="animal", published=True)
    assert "retain_default" not in published.config.method.settings
    chosen = erase(pipe, "cat", anchors="animal", retain_default=["list:styles", "list:styles"], method="uce")
    assert chosen.config.method.settings["retain_default"] == ["list:styles"]
    plain = erase(pipe, "cat", anchors="animal", retain_default="none", method="uce")
    assert plain.content_hash == nothing.content_hash


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "dp", "oce"])
def test_closed_forms_keep_it(pipe: Any, method: str) -> None:
    """The named two of the 193 are no more than an example: measured is every word of the list."""
    bare = erase(pipe, **BROAD, method=method, retain_default="none").config.diagnostics["collateral"]
    held = erase(pipe, **BROAD, method=method).config.diagnostics["collateral"]
    most = {"uce": 0.4, "rece": 0.5, "speed": 0.75, "dp": 0.5, "oce": 0.5}[method]
    assert held["quantiles"]["0.9"] < most * bare["quantiles"]["0.9"]


def test_methods_that_take_none_have_none(pipe: Any) -> None:
    for default in ("object", "list:things"):
        with pytest.raises(ErasureInputError, match="takes no retained prompts"):
            erase(pipe, "cat", method="acterase", retain_default=default)


def test_no_single_word_is_given_up(pipe: Any) -> None:
    """Against weights that are alike: the farthest moves less far, and the sum of the weights is the same."""
    generator = torch.Generator().manual_seed(0)
    rows, targets = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (40, 2))
    way = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    eye = 1e-3 * torch.eye(16, dtype=torch.float64)

    def solved(more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.linalg.solve(eye + targets.T @ targets + more, targets.T).T, way

    factors, sums = holding(rows, HELD, solved)
    alike = solved(rows.T @ rows * HELD / len(rows))
    assert moved(rows, factors).max() < 0.7 * moved(rows, alike).max()
    weights = torch.linalg.lstsq(
        torch.einsum("ni,nj->ijn", rows, rows).flatten(0, 1), sums.flatten()[:, None], driver="gelsd"
    )
    assert LEAST > 0 and (weights.solution.sum() - HELD).abs() < 1e-6


def test_a_word_for_the_target_is_not_held_against_it(pipe: Any) -> None:
    """The list has "cat" for whoever erases "kitten": kept, nothing would be erased."""
    erasure = erase(pipe, "kitten", anchors="animal", method="uce")
    assert erasure.config.diagnostics["completeness"]["kitten"] > 0.75
    change = row_moves(pipe, erasure, ["cat", "dog", "rocket"])
    assert change is not None and change[0] > 2 * change[1:].max()


# ------------------------------------------------------------------------------------------------- which lists


@pytest.mark.parametrize(
    ("targets", "settings", "task"),
    [
        (["cat"], {}, "object"),
        (["Van Gogh"], {}, "style"),
        (["Monet", "watercolor"], {}, "style"),
        (["Monet", "cat"], {}, "object"),
        (["Abraham Lincoln"], {}, "person"),
        (["rose"], {}, "object"),
        (["🐱"], {}, "object"),
        (["noto"], {"templates": "style"}, "style"),
        (["somebody"], {"preset": "celebrity"}, "person"),
        (["cat"], {"preset": "artist"}, "style"),
        (["Van Gogh"], {"preset": "object", "templates": ("{}",)}, "style"),  # as a recipe repeats it
    ],
)
def test_the_kind_of_concept(targets: list[str], settings: dict[str, Any], task: str) -> None:
    assert task_of(targets, settings) == task


def test_lists_that_are_meant() -> None:
    assert lists_for("auto", 31, "object") == ("list:things",) and lists_for("auto", 32, "object") == ()
    assert lists_for("none", 0, "style") == lists_for((), 0, "style") == ()
    assert lists_for("person", 99, "object") == ("list:public_figures", "list:things")
    for wrong, message in (
        ("cats", "must be"),
        (["things"], "must be"),
        ("list:cats", "There is no list"),
        (3, "must be"),
    ):
        with pytest.raises(ErasureInputError, match=message):
            lists_for(wrong, 0, "object")  # type: ignore[arg-type]


def test_targets_and_anchors_are_left_out() -> None:
    given = Retained(("dog",), ("dog",), ())
    found = with_lists(given, ("list:things",), ["cat", "Ice-Cream", "bird", ""])
    assert not {"cat", "ice cream", "bird", "dog"} & set(found.held)
    assert len(found.held) == len(read_list("things")) - 4 and found.prompts == ("dog",)
    assert with_lists(None, (), ["cat"]) == Retained((), (), ())


def test_words_that_an_encoder_cannot_read_are_passed_over(pipe: Any) -> None:
    """One of `list:artists` has more word pieces than the embedded model's 24 positions."""
    erasure = erase(pipe, "ink", anchors="", preset="style", method="uce")
    assert erasure.config.method.settings["retain_default"] == ["list:styles", "list:artists", "list:things"]
    assert erasure.config.diagnostics["collateral"]["words"] < sum(
        len(read_list(name)) for name in ("styles", "artists", "things")
    )


# ---------------------------------------------------------------------------------------------- what is told


def test_what_the_warning_names_vanishes(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    erasure = erase(pipe, "octopus", anchors="sea animal", retain=(), method="uce")
    (message,) = warnings(caplog)
    named = re.findall(r"'([\w -]+)' (\d\.\d\d)", message)
    collateral = erasure.config.diagnostics["collateral"]
    assert [name for name, _ in named] == list(collateral["worst"]) and len(named) == 10
    assert all(f"{value:.2f}" == told for (_, told), value in zip(named, collateral["worst"].values(), strict=True))
    assert collateral["above"] > 50 and collateral["lists"] == ["list:things"]
    # The list has many words that the model never drew; of those that it knows the farthest moved.
    others = [name for name in demo.OBJECTS if name != "octopus"]
    moves = row_moves(pipe, erasure, others)
    assert moves is not None
    known = [others[i] for i in moves.argsort(descending=True)[:8].tolist()]
    pipe.load_erasure(erasure, "all")
    found = seen(pipe, [demo.prompt(name, "noto") for name in known])
    pipe.unload_erasure("all")
    assert sum(a != b for a, b in zip(found, known, strict=True)) > len(known) / 2


def test_nothing_is_warned_of_where_nothing_moved_far(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    collateral = erase(pipe, **{**BROAD, "targets": "bee", "anchors": "insect"}, method="uce").config.diagnostics[
        "collateral"
    ]
    assert not warnings(caplog) and collateral["above"] == 0
    assert len(collateral["worst"]) == 10 and max(collateral["worst"].values()) < collateral["threshold"]
    assert not {"bee", "insect"} & set(collateral["worst"])


def test_the_numbers() -> None:
    words = [f"w{i:02}" for i in range(20)]
    moves = torch.arange(20, dtype=torch.float64) / 10
    found = told(words, moves, ["list:x"], "m", 1.05)
    assert (found["above"], found["words"]) == (9, 20)
    assert list(found["worst"].items())[:2] == [("w19", 1.9), ("w18", 1.8)] and len(found["worst"]) == 10
    assert found["quantiles"] == {"0.5": 0.95, "0.9": 1.71, "1": 1.9}
    assert list(told(["b", "a"], torch.ones(2), [], "m", 2.0)["worst"]) == ["a", "b"]


@pytest.mark.parametrize("method", ["uce", "speed"])
def test_rows_are_measured_as_the_projections_read_them(pipe: Any, method: str) -> None:
    common: dict[str, Any] = {"anchors": "animal", "retain": ["dog"], "retain_default": "none"}
    erasure = erase(pipe, "cat", method=method, layer="lora", **common)
    words = ["dog", "crown", "pizza"]
    rows, changes = last_rows(pipe, words), edits(erasure)
    shares: dict[str, list[torch.Tensor]] = {"to_k": [], "to_v": []}
    for site, linear in text_readers(pipe).items():
        weight = plain_weight(linear, site)
        change = changes.get(f"unet.{site}", torch.zeros_like(weight)).double()
        before, after = rows @ weight.T, rows @ (weight + change).T
        shares[site[-4:]].append(1 - (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1))
    expected = torch.stack([torch.stack(each).mean(0) for each in shares.values()]).amax(0)
    found = row_moves(pipe, erasure, words)
    assert found is not None and torch.allclose(found, expected, rtol=1e-5)
    if method == "uce":  # the same edit, written as a map of the rows
        other = erase(pipe, "cat", layer="text_map", **common)
        mapped = row_moves(pipe, other, words)
        assert mapped is not None and torch.allclose(mapped, found, rtol=1e-4)


def test_sdxl_holds_rows_and_pooled_vectors() -> None:
    xl = tiny_sdxl_pipe()
    settings: dict[str, Any] = {"anchors": "", "retain": ["dog", "house"], "layer": "lora"}
    held, bare = (
        erase(xl, "apple", **settings, method="uce"),
        erase(xl, "apple", **settings, retain_default="none", method="uce"),
    )
    assert held.config.method.settings["retain_default"] == ["list:things"]
    collateral = [each.config.diagnostics["collateral"] for each in (held, bare)]
    assert collateral[0]["words"] == collateral[1]["words"] > 150
    assert collateral[0]["quantiles"]["0.5"] < collateral[1]["quantiles"]["0.5"]
    pooled = "unet.add_embedding.linear_1"
    assert (edits(held)[pooled] - edits(bare)[pooled]).norm() > 0.1 * edits(bare)[pooled].norm()


# ------------------------------------------------------------------------------------------------- training


def test_training_is_measured_by_predictions_and_leaves_the_pipeline_alone() -> None:
    tiny = tiny_sd_pipe()
    other = erase(tiny, "dog", retain=(), method="uce")
    plain = erase(tiny, "cat", **QUICK)
    collateral = plain.config.diagnostics["collateral"]
    assert collateral["measure"].startswith("predictions") and 20 < collateral["words"] <= 40
    assert (
        "retain_default" not in plain.config.method.settings
    )  # their own pool takes long: only where it is asked for
    tiny.load_erasure(other, "no-dog", strength=0.5)
    again = erase(tiny, "cat", **QUICK)
    (info,) = tiny.list_erasures()
    assert (info.name, info.strength) == ("no-dog", 0.5)
    assert again.to_files() == plain.to_files()


def test_training_keeps_the_nearest_where_it_is_asked_to() -> None:
    tiny = tiny_sd_pipe()
    plain, held = (erase(tiny, "cat", **QUICK, retain=["dog"], retain_default=each) for each in ("none", "object"))
    assert held.config.method.settings["retain_default"] == ["list:things"]
    assert plain.tensors.keys() == held.tensors.keys()
    assert any(
        not torch.equal(value, held.tensors[file][name])
        for file, items in plain.tensors.items()
        for name, value in items.items()
    )


# ---------------------------------------------------------------------------------- recorded, repeated, redacted


@pytest.mark.parametrize("how", [{}, {"retain": ()}, {"retain": ["dog"]}, {"retain_default": "person"}])
def test_a_recipe_repeats_it(pipe: Any, how: dict[str, Any]) -> None:
    first = erase(pipe, "Van Gogh", anchors="art", **how)
    recipe = recipe_of(first)
    settings = recipe.pop("settings")
    assert erase(pipe, **recipe, **settings).to_files() == first.to_files()


def test_recipes_of_before_have_no_default_list(pipe: Any) -> None:
    """An artefact of an earlier version says nothing of default lists, and had none."""
    old = erase(pipe, **BROAD, retain_default="none", method="uce")
    assert "retain_default" not in old.config.method.settings
    assert recipe_of(old)["retain_default"] == "none" and recipe_of(old)["retain"] == ["dog", "rabbit"]


def test_the_card_tells_and_a_redacted_one_does_not(broad: Erasure) -> None:
    card = render_card(broad.config)
    assert "| retained by default | list\\:things |" in card
    worst = next(iter(broad.config.diagnostics["collateral"]["worst"]))
    assert f"| collateral, worst, {worst} |" in card
    hidden = broad.redacted()
    assert hidden.config.diagnostics == {} and worst not in render_card(hidden.config)
    assert "cat" not in re.findall(r"\w+", json.dumps(dataclasses.asdict(hidden.config.method)))


def test_combining_keeps_the_lists_and_measures_again(
    pipe: Any, broad: Erasure, caplog: pytest.LogCaptureFixture
) -> None:
    shark = erase(pipe, "shark", anchors="animal", retain=["whale"], method="uce")
    joint = combine([broad, shark], pipe=pipe)
    assert joint.config.method.settings["retain_default"] == ["list:things"]
    assert joint.config.diagnostics["collateral"]["words"] == len(read_list("things")) - 2
    whole = erase(pipe, ["cat", "shark"], anchors="animal", retain=["dog", "rabbit", "whale"], method="uce")
    for site, change in edits(whole).items():
        assert (edits(joint)[site] - change).norm() <= 1e-4 * change.norm()
    caplog.clear()
    hidden = combine([broad.redacted(), shark], pipe=pipe, retain=["dog"])
    assert hidden.config.diagnostics == {} and not warnings(caplog)


# -------------------------------------------------------------------------------------------- the command line


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {
        "default": (),
        "none": ("--retain", "none"),
        "chosen": ("--retain", "dog", "--retain-default", "style"),
        "off": ("--retain", "dog", "--retain-default", "none"),
    }
    for name, further in made.items():
        invoke("erase", "cat", "--anchor", "animal", "--method", "uce", "-o", name, *further)
    settings = {name: Erasure.from_pretrained(name).config.method.settings for name in made}
    assert settings["default"]["retain_default"] == ["list:things"]
    assert "retain_default" not in settings["none"] and settings["none"]["retain_prompts"] == 0
    assert settings["chosen"]["retain_default"] == ["list:styles", "list:artists", "list:things"]
    assert "retain_default" not in settings["off"] and settings["off"]["retain"] == ["dog"]
    invoke("erase", "--config", "none", "-o", "again")
    assert (tmp_path / "again" / "erasure_config.json").read_bytes() == (
        tmp_path / "none" / "erasure_config.json"
    ).read_bytes()
    invoke("erase", "--config", "default", "--retain", "none", "-o", "bare")
    assert (tmp_path / "bare" / "erasure_config.json").read_bytes() == (
        tmp_path / "none" / "erasure_config.json"
    ).read_bytes()
    shown = invoke("info", "default").stdout
    assert "of 193 words of list:things moved far" in shown


@pytest.mark.parametrize("settings", [{"method": "uce"}, QUICK])
def test_it_can_be_left_out(pipe: Any, settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The edit is the same, and nothing is measured or told."""
    caplog.set_level(logging.WARNING, "diffusers_erasure")
    bare = {"retain": (), "compare": False, **settings}
    erasure = erase(pipe, "cat", anchors="animal", **bare)
    assert "collateral" not in erasure.config.diagnostics and not warnings(caplog)
    measured = erase(pipe, "cat", anchors="animal", **{**bare, "compare": True})
    assert "collateral" in measured.config.diagnostics
    assert edits(erasure).keys() == edits(measured).keys()
    assert all(torch.equal(value, edits(measured)[site]) for site, value in edits(erasure).items())
