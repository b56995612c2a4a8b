"""Anchors that are picked automatically, and targets that are pushed farther than to their anchors."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffusers_erasure import Erasure, ErasureCompatibilityError, ErasureInputError, cards, combine, demo, erase
from diffusers_erasure import anchors as auto
from diffusers_erasure.anchors import ClipPicker, pick_anchors
from diffusers_erasure.demo import HYPERNYMS, OBJECTS, STYLES, SYNONYMS
from diffusers_erasure.encoding import last_rows
from diffusers_erasure.fitting import recipe_of
from diffusers_erasure.lists import _plain_words, kinds, list_names, read_list
from diffusers_erasure.methods import get_method, uce
from diffusers_erasure.methods.gated import fit_map
from diffusers_erasure.methods.holding import SAME
from diffusers_erasure.methods.rows import pushed, target_rows
from diffusers_erasure.schema import Concept
from diffusers_erasure.settings import resolve
from tests.commands import invoke
from tests.helpers import TOKENIZER, tiny_sd_pipe, tiny_sdxl_pipe


DEVELOPMENT = ("cat", "duck", "octopus", "bee", "grapes", "pizza", "airplane", "umbrella")
# Words of the lists that this model was never told, each of the kind of one of its hypernyms.
UNTOLD = {"beetle": "insect", "puppy": "animal", "sea lion": "sea animal", "yacht": "vehicle", "macaw": "bird"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


def others(*targets: str) -> list[str]:
    """What the model knows besides, its hypernyms among it."""
    return [word for word in (*OBJECTS, *STYLES, *sorted(set(HYPERNYMS.values()))) if word not in targets]


# ---------------------------------------------------------------------------------------------------------- kinds


def test_each_entry_of_the_lists_of_things_has_a_kind() -> None:
    entries = [words for text in kinds._ENTRIES.values() for words in text.replace("/", ", ").split(", ")]
    assert [word for word, count in Counter(entries).items() if count > 1] == []
    listed = [word for name in ("things", "objects") for word in read_list(name)]
    assert [word for word in listed if kinds.kind_of(word) is None and not kinds.is_broad(word)] == []
    assert set(map(_plain_words, entries)) <= set(map(_plain_words, listed)) | {("piglet",), ("hen",)}
    assert {kind for group in kinds._WIDER for kind in group} <= set(kinds._ENTRIES)
    assert "kinds" not in list_names()


def test_kinds_agree_with_the_embedded_models_hypernyms() -> None:
    by_kind: dict[str, set[str]] = {}
    for name, hypernym in HYPERNYMS.items():
        kind = kinds.kind_of(name)
        assert kind in kinds._ENTRIES, name
        by_kind.setdefault(kind, set()).add(hypernym)
    mixed = {kind: found for kind, found in by_kind.items() if len(found) > 1}
    # A tomato is a fruit or a vegetable, a cookie a snack or food, by whom you ask.
    assert all(len(found) == 1 for kind, found in by_kind.items() if kind in ("mammal", "bird", "insect", "fruit")), (
        mixed
    )


def test_names_are_looked_up_as_people_write_them() -> None:
    assert kinds.kind_of("a Cat") == kinds.kind_of("tabby cat") == kinds.kind_of("cats") == "mammal"
    assert kinds.kind_of("teddy bear") == "toy" and kinds.kind_of("Mickey Mouse") is None
    assert kinds.kind_of("qwerty") is None and kinds.kind_of("") is None
    assert kinds.are_the_same("kitten", "cat") and kinds.are_the_same("poodle", "Dogs")
    assert not kinds.are_the_same("cat", "dog") and not kinds.are_the_same("qwerty", "qwerty")
    assert kinds.is_broad("animal") and kinds.is_broad("Sea animals") and not kinds.is_broad("cat")
    assert "bird" in kinds.wider_kinds("mammal") and kinds.wider_kinds("instrument") == {"instrument"}


# ---------------------------------------------------------------------------------------------------------- picks


def hypernym(word: str) -> str | None:
    return HYPERNYMS.get(word) or UNTOLD.get(word)


@pytest.mark.parametrize("world", ["sd1", pytest.param("flux", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", DEVELOPMENT)
def test_an_object_gets_another_of_its_hypernym(world: str, target: str, pipe: Any) -> None:
    base = pipe if world == "sd1" else demo.load_pipeline(world)
    found = pick_anchors(base, [target], "object", others(target))
    (anchor,) = found.anchors
    assert hypernym(anchor) == HYPERNYMS[target]
    assert anchor != target and anchor not in SYNONYMS[target]
    assert found.candidates > 900 and found.images == 0 and -1 <= found.cosines[0] < SAME


def test_several_objects_never_get_each_other(pipe: Any) -> None:
    found = pick_anchors(pipe, OBJECTS[:8], "object", others())
    assert not set(found.anchors) & set(OBJECTS[:8])
    assert {hypernym(each) for each in found.anchors} == {"animal"}
    assert not any(kinds.are_the_same(anchor, target) for anchor in found.anchors for target in OBJECTS[:8])


def test_it_needs_nothing_to_be_retained(pipe: Any) -> None:
    (anchor,) = pick_anchors(pipe, ["cat"], "object").anchors
    assert hypernym(anchor) == "animal"


def test_what_is_broader_or_names_a_target_is_none(pipe: Any) -> None:
    given = ["big cat", "animal", "cat", "Cats"]
    assert not {"big cat", "animal", "cat"} & set(pick_anchors(pipe, ["cat"], "object", given).anchors)
    assert pick_anchors(pipe, ["polar bear"], "object", given).anchors != ("bear",)


def test_what_means_the_same_is_told_by_the_rows(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No table says that a "kitty" is a cat; the model's rows do."""
    monkeypatch.setattr(auto, "are_the_same", lambda one, other: False)
    assert kinds.kind_of("kitty") is None
    assert pick_anchors(pipe, ["kitty"], "object", others()).anchors[0] not in ("cat", "kitten")
    monkeypatch.setattr(auto, "SAME", 2.0)
    assert pick_anchors(pipe, ["kitty"], "object", others()).anchors[0] in ("cat", "kitten")


def test_what_goes_too_is_no_anchor_by_whatever_name(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "are_the_same", lambda one, other: False)
    near = pick_anchors(pipe, ["horse"], "object", others()).anchors[0]
    assert near == "puppy"
    assert pick_anchors(pipe, ["horse", "dog"], "object", others()).anchors[0] != "puppy"


@pytest.mark.parametrize("target", ["noto", "twemoji"])
def test_a_style_gets_no_thing(pipe: Any, target: str) -> None:
    (anchor,) = pick_anchors(pipe, [target], "style", others(target)).anchors
    assert anchor in {*STYLES, *read_list("styles")} - {target}


def test_a_person_gets_a_person(pipe: Any) -> None:
    found = pick_anchors(pipe, ["Marilyn Monroe"], "person", ["cat", "ukiyo-e"])
    assert found.anchors[0] in read_list("public_figures") and found.anchors[0] != "Marilyn Monroe"


def test_a_target_of_unknown_kind_needs_a_near_one(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "LEAST", 1.5)
    assert pick_anchors(pipe, ["cat"], "object").anchors  # its kind is known
    with pytest.raises(ErasureInputError, match=r"No anchor was found for 'qwerty'.*`anchors`"):
        pick_anchors(pipe, ["qwerty"], "object")


def test_words_in_pieces_come_last(pipe: Any) -> None:
    words = ["fox", "wolf", "ice cream", "hippopotamus"]
    assert auto.known_words(pipe, words, "a {}") == {"fox", "ice cream"}
    cosines = {"hippopotamus": 0.9, "fox": 0.1, "penguin": 0.5}
    assert auto._ordered("cat", "object", cosines, {"fox", "penguin"}) == ["fox", "penguin", "hippopotamus"]


# ---------------------------------------------------------------------------------------------------------- erase


@pytest.fixture(scope="module")
def made(pipe: Any) -> Erasure:
    return erase(pipe, ["cat", "rocket"], anchors="auto", retain=["dog", "rabbit"], compare=False, method="uce")


def test_an_erasure_records_what_was_picked(made: Erasure, pipe: Any) -> None:
    anchors = [concept.anchor for concept in made.concepts]
    assert [hypernym(str(each)) for each in anchors] == ["animal", "vehicle"]
    told = made.config.method.settings["anchors_picked"]
    assert told["candidates"] > 900 and told["images"] == 0 and len(told["cosines"]) == 2
    by_hand = erase(pipe, ["cat", "rocket"], anchors=anchors, retain=["dog", "rabbit"], compare=False, method="uce")
    for name, tensors in by_hand.tensors.items():
        assert all(torch.equal(value, made.tensors[name][key]) for key, value in tensors.items())
    assert "anchors_picked" not in by_hand.config.method.settings


def test_it_is_told(made: Erasure, pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert "picked automatically from" in repr(made) and "cosines" in repr(made)
    assert "anchors, picked automatically, candidates" in cards.render_card(made.config)
    logger = logging.getLogger("diffusers_erasure")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "diffusers_erasure"):
            pick_anchors(pipe, ["cat"], "object")
    finally:
        logger.removeHandler(caplog.handler)
    assert "Anchors picked from" in caplog.text and "'cat' → '" in caplog.text


def test_it_is_repeated_with_the_same_anchors(made: Erasure, pipe: Any, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path / "made")
    recipe = recipe_of(Erasure.from_pretrained(tmp_path / "made"))
    assert recipe["anchors"] == [concept.anchor for concept in made.concepts]
    assert "anchors_picked" not in recipe["settings"]
    again = erase(pipe, **{key: value for key, value in recipe.items() if key != "settings"}, **recipe["settings"])
    assert again.concepts == made.concepts


def test_a_redacted_one_names_nothing(made: Erasure, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path, redact_concepts=True)
    text = (tmp_path / "erasure_config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["method"]["settings"]["anchors_picked"]["candidates"] > 900
    assert not any(f'"{word}"' in text for concept in made.concepts for word in (concept.target, concept.anchor))


def test_it_can_be_combined(made: Erasure, pipe: Any) -> None:
    more = erase(pipe, "rose", anchors="tulip", retain=["dog", "rabbit"], compare=False, method="uce")
    joint = combine([made, more], pipe=pipe)
    assert joint.concepts == (*made.concepts, *more.concepts)
    assert "anchors_picked" not in joint.config.method.settings


def test_the_word_itself_is_given_as_a_list(pipe: Any) -> None:
    erasure = erase(pipe, "cat", anchors=["auto"], compare=False, method="uce")
    assert erasure.concepts == (Concept("cat", "auto"),) and "anchors_picked" not in erasure.config.method.settings


def test_default_lists_leave_picked_anchors_out(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fit = uce.fit
    monkeypatch.setattr(uce, "fit", lambda pipe, concepts, config: seen.append(config) or fit(pipe, concepts, config))
    erasure = erase(pipe, "cat", anchors="auto", compare=False, method="uce")
    held = seen[0].retain.held
    assert "dog" in held and erasure.concepts[0].anchor not in held and "cat" not in held


@pytest.mark.parametrize("given", [{"picker": lambda images, target: 0.0}, {"anchor_images": 2}])
def test_pickers_are_for_automatic_anchors(pipe: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ErasureInputError, match='for `anchors="auto"`'):
        erase(pipe, "cat", anchors="dog", **given, method="uce")


def test_a_wrong_setting_is_told_before_anything_is_picked(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers_erasure.fitting.pick_anchors", lambda *given, **more: pytest.fail("picked"))
    with pytest.raises(ErasureInputError, match="`lamb`"):
        erase(pipe, "cat", anchors="auto", lamb=-1.0)


@pytest.mark.parametrize("option", ["--anchor", "--anchors"])
def test_the_command_line_picks_too(tmp_path: Path, option: str) -> None:
    invoke("erase", "cat", option, "auto", "--retain", "dog", "-o", str(tmp_path / "no-cat"))
    (concept,) = Erasure.from_pretrained(tmp_path / "no-cat").concepts
    assert concept.target == "cat" and hypernym(str(concept.anchor)) == "animal"


# ---------------------------------------------------------------------------------------------------------- pictures


def by_turns(*shares: float) -> tuple[Callable[..., float], list[tuple[Sequence[Any], str]]]:
    calls: list[tuple[Sequence[Any], str]] = []

    def picker(images: Sequence[Any], target: str) -> float:
        calls.append((images, target))
        return shares[(len(calls) - 1) % len(shares)]

    return picker, calls


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers_erasure.anchors.pictures.STEPS", 2)


def test_the_first_whose_pictures_do_not_show_the_target(pipe: Any, quick: None) -> None:
    base = pick_anchors(pipe, ["cat"], "object", others("cat")).anchors[0]
    picker, calls = by_turns(0.5, 0.0)
    found = pick_anchors(pipe, ["cat"], "object", others("cat"), picker=picker)
    assert len(calls) == 2 and found.images == 4 and found.anchors[0] != base
    assert hypernym(found.anchors[0]) == "animal"
    assert all(len(images) == 4 and images[0].size == (64, 64) and target == "cat" for images, target in calls)
    picker, calls = by_turns(0.0)
    assert pick_anchors(pipe, ["cat"], "object", others("cat"), picker=picker, images=1).anchors[0] == base
    assert [len(images) for images, _ in calls] == [1]


def test_where_all_show_it_the_least_is_taken(
    pipe: Any, quick: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers_erasure"), "propagate", True)
    picker, calls = by_turns(*([1.0] * 3), 0.25, *([1.0] * 4))
    found = pick_anchors(pipe, ["cat"], "object", others("cat"), picker=picker, images=1)
    assert len(calls) == auto.MOST_LOOKED_AT == 8
    assert f"{found.anchors[0]!r} shows it least, in 25 %" in caplog.text


def test_the_pipeline_is_only_read_and_draws_unerased(pipe: Any, quick: None) -> None:
    mine = demo.load_pipeline()
    scheduler, state = mine.scheduler, str(vars(mine.scheduler))
    picker, plain = by_turns(0.0)
    erase(mine, "cat", anchors="auto", picker=picker, anchor_images=1, compare=False, method="uce")
    assert mine.scheduler is scheduler and str(vars(scheduler)) == state
    mine.load_erasure(erase(mine, "cat", anchors="airplane", compare=False, method="uce"))
    picker, erased = by_turns(0.0)
    erase(mine, "cat", anchors="auto", picker=picker, anchor_images=1, compare=False, method="uce")
    assert plain[0][0][0].tobytes() == erased[0][0][0].tobytes()


@pytest.mark.parametrize("share", [1.5, -0.1, float("nan"), "much", None])
def test_a_picker_that_gives_no_share_is_told(pipe: Any, quick: None, share: Any) -> None:
    with pytest.raises(ErasureInputError, match="share of pictures"):
        pick_anchors(pipe, ["cat"], "object", picker=lambda images, target: share, images=1)


def test_wrong_pickers_and_counts_are_told(pipe: Any) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"images": 2}, "there is none"),
        ({"images": -1}, "at least 0"),
        ({"images": True}, "at least 0"),
        ({"picker": "clip"}, "must be a function"),
    )
    for given, message in wrong:
        with pytest.raises(ErasureInputError, match=message):
            pick_anchors(pipe, ["cat"], "object", **given)
    headless = demo.load_pipeline()
    headless.vae = None
    with pytest.raises(ErasureCompatibilityError, match="vae is not loaded"):
        pick_anchors(headless, ["cat"], "object", picker=by_turns(0.0)[0])


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPProcessor]:
    """A tiny random one: what it says is arbitrary."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**size, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, CLIPProcessor(image_processor=processor, tokenizer=tokenizer)


def test_a_clip_picker_takes_the_best_caption(clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    model, processor = clip
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue", "white", "black")]
    words = ["dog", "car", "rose", "crown"]
    shares = {}
    for target in words:
        rest = [word for word in words if word != target]
        inputs = processor(
            text=[f"a {word}" for word in (target, *rest)], images=images, return_tensors="pt", padding=True
        )
        with torch.no_grad():
            logits = model(**inputs).logits_per_image
        shares[target] = float((logits[:, 0] == logits.amax(1)).float().mean())
        picker = ClipPicker(
            model,
            processor,
            others=[*words, "big dog", "puppy"][: len(words) + 2 * (target == "dog")],
            template="a {}",
        )
        assert picker(images, target) == pytest.approx(shares[target])
    assert sum(shares.values()) == pytest.approx(1) and len(ClipPicker(model, processor).others) > 100
    with pytest.raises(ErasureInputError, match="as `others`"):
        ClipPicker(model, processor, others=["kitten"])(images, "cat")


def test_a_clip_picker_picks_an_anchor(pipe: Any, quick: None, clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    erasure = erase(
        pipe, "cat", anchors="auto", picker=ClipPicker(*clip), anchor_images=1, compare=False, method="uce"
    )
    assert erasure.config.method.settings["anchors_picked"]["images"] == 1
    assert hypernym(str(erasure.concepts[0].anchor)) == HYPERNYMS["cat"]


# ---------------------------------------------------------------------------------------------------------- push

CLOSED = ("uce", "rece", "speed", "dp", "gated")


def test_pushed_rows_are_the_formula() -> None:
    e, g = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(pushed(e, g, 0.75), g + 0.75 * (g - e))
    assert pushed(e, g, 0.0) is g


@pytest.mark.parametrize("rows", ["last", "window", "all"])
@pytest.mark.parametrize("make", [tiny_sd_pipe, tiny_sdxl_pipe])
def test_goals_are_pushed_away_from_targets(make: Any, rows: Any) -> None:
    base = make()
    settings = resolve(uce.Config(rows=rows, templates=("{}", "a {}")), uce.Settings)
    concepts = [Concept("cat", "dog"), Concept("car", "")]
    plain, far = target_rows(base, concepts, settings), target_rows(base, concepts, settings, push=0.5)
    assert set(plain) == set(far) and len(plain) == (1 if make is tiny_sd_pipe else 2)  # SDXL: the pooled vector too
    for name, before in plain.items():
        after = far[name]
        assert torch.equal(after.targets, before.targets) and torch.equal(after.probes[0], before.probes[0])
        assert torch.equal(after.anchors, before.anchors + 0.5 * (before.anchors - before.targets))
        assert torch.equal(after.probes[1], before.probes[1] + 0.5 * (before.probes[1] - before.probes[0]))
    if rows == "last" and make is tiny_sd_pipe:
        e, g = last_rows(base, ["cat", "a cat", "car", "a car"]), last_rows(base, ["dog", "a dog", "", ""])
        (found,) = far.values()
        torch.testing.assert_close(found.anchors, g + 0.5 * (g - e), rtol=0, atol=1e-5)  # float32, in other batches


def test_the_map_behind_a_gate_is_fitted_to_pushed_rows() -> None:
    e, g = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, d = fit_map(e, g, 1e-4, 6, push=0.5)
    wanted = fit_map(e, g + 0.5 * (g - e), 1e-4, 6)
    assert torch.equal(a, wanted[0]) and torch.equal(d, wanted[1])
    assert not torch.allclose(a.T @ d, (lambda x, y: x.T @ y)(*fit_map(e, g, 1e-4, 6)))
    torch.testing.assert_close(e @ a.T @ d, 1.5 * (g - e), rtol=0, atol=1e-2)


@pytest.mark.parametrize("method", CLOSED)
def test_methods_push_where_they_are_told_to(pipe: Any, method: str) -> None:
    more = {"stock": "none"} if method == "gated" else {}  # DP's LoRA, which has a push of its own

    def made(**given: Any) -> Erasure:
        return erase(
            pipe,
            "cat",
            anchors="dog",
            retain=["fox"],
            retain_default="none",
            method=method,
            compare=False,
            **more,
            **given,
        )

    own = {"uce": 0.5, "dp": 0.6, "speed": 0.4, "gated": 0.4}.get(method, 0.0)  # by default
    plain, none, far = made(), made(push=own), made(push=1.0)
    assert plain.config == none.config and plain.config.method.settings["push"] == own
    for name, tensors in plain.tensors.items():
        assert all(torch.equal(value, none.tensors[name][key]) for key, value in tensors.items())
        assert any(
            value.shape != far.tensors[name][key].shape or not torch.equal(value, far.tensors[name][key])
            for key, value in tensors.items()
        )
    done = far.config.diagnostics["completeness"]["cat"]  # of the way that was asked for
    assert done == pytest.approx(plain.config.diagnostics["completeness"]["cat"], abs=0.05)


def test_a_map_goes_farther(pipe: Any) -> None:
    def moved(push: float) -> torch.Tensor:
        erasure = erase(
            pipe,
            "cat",
            anchors="dog",
            templates="none",
            lamb=1e-6,
            layer="text_map",
            retain=(),
            push=push,
            compare=False,
        )
        (layer,) = erasure.config.layers
        tensors = erasure.layer_tensors(layer)
        e, g = last_rows(pipe, ["cat", "dog"])
        return float(((e @ tensors["A"].double().T) @ tensors["D"].double()) @ (g - e) / (g - e).square().sum())

    assert moved(0.0) == pytest.approx(1, abs=0.02) and moved(0.5) == pytest.approx(1.5, abs=0.03)


def test_what_was_pushed_is_not_pushed_again_by_a_joint_solve(pipe: Any) -> None:
    def made(target: str, anchor: str, push: float = 0.5) -> Erasure:
        return erase(
            pipe, target, anchors=anchor, retain=["bee"], retain_default="none", push=push, compare=False, method="uce"
        )

    one, two = made("cat", "dog"), made("rose", "tulip")
    both = combine([one, two], pipe=pipe)
    at_once = erase(
        pipe,
        ["cat", "rose"],
        anchors=["dog", "tulip"],
        retain=["bee"],
        retain_default="none",
        push=0.5,
        compare=False,
        method="uce",
    )
    assert both.config.method.settings["push"] == 0.5
    ways = [each.config.diagnostics["completeness"] for each in (both, at_once)]
    assert ways[0] == pytest.approx(ways[1], abs=1e-3)
    with pytest.raises(ErasureInputError, match="`push`"):
        combine([one, made("rose", "tulip", 0.0)], pipe=pipe)


def test_rotations_have_no_goal_to_push() -> None:
    with pytest.raises(ErasureInputError, match="no setting 'push'"):
        erase(demo.load_pipeline(), "cat", method="oce", push=0.5)
    for method in CLOSED:
        with pytest.raises(ErasureInputError, match="`push`"):
            get_method(method).config(push=-0.1)
