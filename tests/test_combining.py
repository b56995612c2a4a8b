"""`combine`: a joint solve equals fitting all targets at once, a sum equals loading all of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInputError,
    combine,
    demo,
    erase,
)
from diffusers_erasure.fitting import recipe_of
from diffusers_erasure.low_rank import DOWN
from diffusers_erasure.schema import LORA_FILE, TENSOR_FILE
from diffusers_erasure.settings.texts import template_list
from tests.helpers import ROUNDINGS, edits, roundings


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


KEPT = ["dog", "bee", "rose", "bus", "corn", "whale"]
SETTINGS: list[dict[str, Any]] = [
    {"method": "uce"},
    {"method": "uce", "rows": "window", "layer": "text_map"},
    {"method": "rece", "epochs": 2},
    {"method": "dp", "keep": 40},
    {"method": "oce", "max_error": 0.0},
    {"method": "speed", "rows": "last", "threshold": 1e-5},
    {"method": "speed", "rows": "window", "templates": "none", "adversarial": 1},
]


def assert_same_edit(one: Erasure, other: Erasure, tolerance: float) -> None:
    first, second = edits(one), edits(other)
    assert first.keys() == second.keys()
    for name, edit in first.items():
        assert (edit - second[name]).norm() <= tolerance * edit.norm()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_a_joint_solve_is_the_fit_of_all_targets(pipe: Any, settings: dict[str, Any]) -> None:
    whole = erase(pipe, ["cat", "ice cream", "shark"], anchors=["animal", "snack", ""], retain=KEPT, **settings)
    first = erase(pipe, ["cat", "ice cream"], anchors=["animal", "snack"], retain=KEPT, **settings)
    second = erase(pipe, "shark", anchors="", retain=KEPT, **settings)
    joint = combine([first, second], pipe=pipe)
    # The kept rows are the encoder's own float32 values; window rows are rotated and rounded to float32 once more.
    # SPEED's presets truncate the LoRA to 1e-3.
    rough = 2e-3 if settings["method"] == "speed" else 1e-4 if settings != {"method": "uce"} else 1e-5
    # OCE turns a direction or leaves it: near where it changes its mind rounding weighs more.
    rough = 0.05 if settings["method"] == "oce" else rough
    assert_same_edit(whole, joint, rough)
    assert joint.concepts == whole.concepts
    assert joint.config.diagnostics["completeness"].keys() == {"cat", "ice cream", "shark"}
    # and the result can be joined again
    assert joint.config.solve is not None and joint.config.solve.rows.keys() == whole.config.solve.rows.keys()


def as_recorded_before(erasure: Erasure) -> Erasure:
    """What was left out stood as `None` in an earlier version's artefacts; UCE had no presets."""
    method = erasure.config.method
    settings = {**method.settings, "rank": None, "max_error": None}
    if method.name == "uce":
        del settings["preset"], settings["published"]
    method = dataclasses.replace(method, settings=settings)
    return dataclasses.replace(erasure, config=dataclasses.replace(erasure.config, method=method))


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_artefacts_that_record_what_was_left_out_are_joined_and_repeated(pipe: Any, method: str) -> None:
    first, second = (erase(pipe, name, retain=["dog"], method=method) for name in ("cat", "shark"))
    wanted = combine([first, second], pipe=pipe).to_files()[TENSOR_FILE]
    old = as_recorded_before(first)
    assert combine([old, second], pipe=pipe).to_files()[TENSOR_FILE] == wanted
    assert combine([old, as_recorded_before(second)], pipe=pipe).to_files()[TENSOR_FILE] == wanted
    recipe = recipe_of(old)
    settings = recipe.pop("settings")
    again = erase(pipe, **recipe, **settings)
    assert all(
        torch.equal(value, first.tensors[TENSOR_FILE][name]) for name, value in again.tensors[TENSOR_FILE].items()
    )


def test_one_more_joins_a_published_hundred_without_its_prompts(pipe: Any, tmp_path: Path) -> None:
    """Read back from disk, redacted, in half precision: the names are gone, the rows are enough."""
    settings: dict[str, Any] = {"method": "speed", "rows": "last", "templates": "none", "retain": "list:objects"}
    settings.update(retain_rows="last", retain_templates=False, retain_default="none")
    words = [word for word in demo.OBJECTS if word not in ("cat", "rose")][:30]
    published = erase(pipe, words, anchors="", **settings)
    published.save_pretrained(tmp_path / "hundred", dtype=torch.float16, redact_concepts=True)
    assert "retain" in Erasure.from_pretrained(tmp_path / "hundred").config.method.settings  # a shipped list's name
    new = erase(pipe, "cat", anchors="", **settings)
    joint = combine([tmp_path / "hundred", new], pipe=pipe, retain=KEPT)
    assert joint.config.redacted and len(joint.concepts) == 31
    assert "cat" not in joint.config.to_json()
    whole = erase(
        pipe, [*words, "cat"], anchors="", **{**settings, "retain": [w for w in KEPT if w not in words] or "x"}
    )
    again = combine(
        [erase(pipe, words, anchors="", **settings), new], pipe=pipe, retain=whole.config.method.settings["retain"]
    )
    assert_same_edit(whole, again, 1e-4)


def test_a_redacted_part_whose_list_named_its_target_needs_another(pipe: Any, tmp_path: Path) -> None:
    """What was left out of the list is redacted, and must not come back as retained."""
    file = tmp_path / "kept.txt"
    settings: dict[str, Any] = {"anchors": "", "retain": "list:objects"}
    named = erase(pipe, "airplane", **settings, method="uce")
    assert named.config.method.settings["retain_excluded"]
    other = erase(pipe, "cat", **settings, method="uce")
    with pytest.raises(ErasureInputError, match="no longer says"):
        combine([named.redacted(), other], pipe=pipe)
    file.write_text("dog\nrose\n", encoding="utf-8")
    joint = combine([named.redacted(), other], pipe=pipe, retain=file)
    assert joint.config.redacted and joint.config.diagnostics == {}


def test_what_one_part_retains_and_another_removes_goes(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    one = erase(pipe, "cat", anchors="animal", retain=["dog", "bee"], method="uce")
    other = erase(pipe, "dog", anchors="animal", retain=["cat", "rose"], method="uce")
    joint = combine([one, other], pipe=pipe)
    assert "'dog', 'cat'" in caplog.text or "'cat', 'dog'" in caplog.text
    whole = erase(pipe, ["cat", "dog"], anchors="animal", retain=["bee", "rose"], method="uce")
    assert_same_edit(whole, joint, 1e-5)


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("text_map", "text_map"), ("lora", "text_map")])
def test_a_sum_is_what_loading_all_does(pipe: Any, kinds: tuple[str, str]) -> None:
    parts = [
        erase(pipe, "cat", anchors="animal", retain=KEPT, layer=kinds[0]).rescaled(0.7),
        erase(pipe, ["ice cream", "shark"], anchors="food", retain=KEPT, layer=kinds[1], rank=3),
    ]
    summed = combine(parts, mode="sum")
    assert (summed.config.stock is not None) == (kinds == ("lora", "lora"))
    latents = torch.randn(1, pipe.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = pipe.text_encoder(
        pipe.tokenizer(["a cat and a shark"], padding="max_length", return_tensors="pt").input_ids
    )[0]
    outputs = {}
    with torch.no_grad():
        outputs["bare"] = pipe.unet(latents, 500, rows).sample
        for name, loaded in (("all", parts), ("sum", [summed])):
            for part in loaded:
                pipe.load_erasure(part)
            outputs[name] = pipe.unet(latents, 500, rows).sample
            pipe.unload_erasure()
    assert (outputs["all"] - outputs["bare"]).abs().max() > 0.01
    assert roundings(outputs["sum"], outputs["all"]) <= ROUNDINGS  # sums in another order
    assert [c.target for c in summed.concepts] == ["cat", "ice cream", "shark"]
    Erasure.from_files(summed.to_files())


def test_a_truncated_sum_states_its_error(pipe: Any) -> None:
    parts = [erase(pipe, name, anchors="animal", retain=KEPT, layer="lora") for name in ("cat", "shark")]
    exact, small = combine(parts, mode="sum"), combine(parts, mode="sum", rank=4)
    whole, cut = edits(exact), edits(small)
    worst = max(float((whole[name] - cut[name]).norm() / whole[name].norm()) for name in whole)
    assert small.config.stock is not None and small.config.stock.error == pytest.approx(worst, rel=0.01)
    assert 0.001 < worst
    bounded = combine(parts, mode="sum", max_error=0.05)
    assert bounded.config.stock is not None and bounded.config.stock.error <= 0.0501
    rank = next(v for k, v in bounded.tensors[LORA_FILE].items() if k.endswith(DOWN)).shape[0]
    assert rank < 12


def test_no_limit_is_not_the_presets_limit(pipe: Any) -> None:
    """SPEED's preset truncates to 1e-3; `max_error=0` says that nothing is cut."""
    parts = [erase(pipe, name, anchors="animal", method="speed", max_error=0.0) for name in ("cat", "shark")]
    whole, cut = combine(parts, pipe=pipe, max_error=0.0), combine(parts, pipe=pipe)
    assert whole.config.stock is not None and cut.config.stock is not None
    assert whole.config.stock.error < 1e-5 < 1e-4 < cut.config.stock.error
    assert (whole.config.method.settings["max_error"], cut.config.method.settings["max_error"]) == (0.0, 1e-3)


def test_a_redacted_part_does_not_say_its_templates(pipe: Any) -> None:
    """SPEED encodes what is retained in the templates too; those of a redacted part are not known, whatever the preset's."""
    first = erase(pipe, "cat", anchors="animal", method="speed", retain=KEPT)
    second = erase(pipe, "shark", anchors="animal", method="speed", retain=KEPT, templates=("one {}",)).redacted()
    for parts in ([first, second], [second, first]):
        with pytest.raises(ErasureInputError, match="does not say in which templates"):
            combine(parts, pipe=pipe, retain=KEPT)


def test_parts_in_several_templates_keep_what_is_retained_in_all_of_them(pipe: Any) -> None:
    """The retained prompts stand in the templates of both, whichever of these are named."""
    thing = erase(pipe, "cat", anchors="animal", retain=KEPT, method="uce")
    other = erase(pipe, "whale", anchors="animal", retain=KEPT[:3], templates=("{}", "one {}"), method="uce")
    joint = combine([thing, other], pipe=pipe)
    of = [set(template_list(part.config.method.settings["templates"])) for part in (thing, other, joint)]
    assert of[0] != of[1] and of[2] == of[0] | of[1]
    # in none of them where one part had none, as by default of long lists
    plain = erase(pipe, "shark", anchors="animal", retain=KEPT, retain_templates=False, method="uce")
    assert combine([thing, plain], pipe=pipe).config.method.settings["retain_templates"] is False
    # where all parts agree it is still said by its name
    same = combine([thing, erase(pipe, "shark", anchors="animal", retain=KEPT, method="uce")], pipe=pipe)
    assert same.config.method.settings["templates"] == "object_context"


def test_what_was_made_before_targets_could_be_pushed_was_not_pushed(pipe: Any) -> None:
    """Whatever the preset says now."""
    first, second = (erase(pipe, name, retain=["dog"], push=0.0, method="uce") for name in ("cat", "shark"))
    settings = {name: value for name, value in first.config.method.settings.items() if name != "push"}
    method = dataclasses.replace(first.config.method, settings=settings)
    old = dataclasses.replace(first, config=dataclasses.replace(first.config, method=method))
    assert recipe_of(old)["settings"]["push"] == 0.0
    assert combine([old, second], pipe=pipe).config.method.settings["push"] == 0.0


def test_parts_that_do_not_go_together_are_named(pipe: Any) -> None:
    uce = erase(pipe, "cat", anchors="animal", retain=KEPT, method="uce")
    rece = erase(pipe, "shark", anchors="animal", retain=KEPT, method="rece")
    other = erase(pipe, "shark", anchors="animal", retain=KEPT, lamb=0.5)
    with pytest.raises(ErasureInputError, match="two or more"):
        combine([uce])
    with pytest.raises(ErasureInputError, match="`mode`"):
        combine([uce, other], mode="product")  # type: ignore[arg-type]
    for bad in ({"rank": -1}, {"rank": 1.5}, {"rank": True}, {"max_error": 2.0}, {"max_error": float("nan")}):
        with pytest.raises(ErasureInputError, match=next(iter(bad))):
            combine([uce, other], mode="sum", **bad)
    with pytest.raises(ErasureInputError, match="one method"):
        combine([uce, rece], pipe=pipe)
    with pytest.raises(ErasureInputError, match="`lamb` is 0.001"):
        combine([uce, other], pipe=pipe)
    with pytest.raises(ErasureInputError, match="give the pipeline"):
        combine([uce, erase(pipe, "shark", anchors="animal", retain=KEPT, method="uce")])
    with pytest.raises(ErasureInputError, match="Two of the erasures remove 'cat'"):
        combine([uce, uce], pipe=pipe)
    with pytest.raises(ErasureInputError, match=r"published at 0\.5"):
        combine([uce.rescaled(0.5), erase(pipe, "shark", anchors="animal", retain=KEPT, method="uce")], pipe=pipe)
    summed = combine([uce, other], mode="sum")
    with pytest.raises(ErasureInputError, match="keeps no rows"):
        combine([summed, erase(pipe, "rose", anchors="flower", method="uce")], pipe=pipe)
    with pytest.raises(ErasureInputError, match="redacted or its list too long, and does not say"):
        combine([uce.redacted(), erase(pipe, "shark", anchors="animal", retain=KEPT, method="uce")], pipe=pipe)


def test_another_base_is_refused(pipe: Any) -> None:
    one, other = (erase(pipe, name, anchors="animal", method="uce") for name in ("cat", "shark"))
    foreign = demo.load_pipeline()
    with torch.no_grad():
        foreign.text_encoder.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ErasureCompatibilityError, match="text_encoder"):
        combine([one, other], pipe=foreign)
    moved = erase(foreign, "rose", anchors="flower", method="uce")
    with pytest.raises(ErasureCompatibilityError, match="different text_encoder"):
        combine([one, moved], mode="sum")


def test_kept_rows_are_checked_when_read(pipe: Any) -> None:
    erasure = erase(pipe, "cat", anchors="animal", layer="lora")
    tensors = {file: dict(items) for file, items in erasure.tensors.items()}
    tensors[TENSOR_FILE]["solve.encoder_hidden_states.targets"] = torch.zeros(3, 5)
    with pytest.raises(ErasureFileError, match="do not fit together"):
        Erasure(erasure.config, tensors)
    tensors = {file: dict(items) for file, items in erasure.tensors.items()}
    tensors[TENSOR_FILE]["solve.other.targets"] = torch.zeros(3, 128)
    with pytest.raises(ErasureFileError, match="unknown rows"):
        Erasure(erasure.config, tensors)
    tensors = {LORA_FILE: dict(erasure.tensors[LORA_FILE])}
    with pytest.raises(ErasureFileError, match="tensors lie in"):
        Erasure(erasure.config, tensors)
    assert Erasure(dataclasses.replace(erasure.config, solve=None), tensors).solve_tensors() == {}
