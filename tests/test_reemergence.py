"""The benchmark of re-emergence: its pictures, its training, its numbers on hand-made values, a run, its store and page."""

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import command as commands
from benchmarks.efficacy.methods import Fit
from benchmarks.reemergence import __main__ as reemergence
from benchmarks.reemergence import cases, lora, new_objects, parts, plan, tables
from benchmarks.reemergence.lora import Recipe
from benchmarks.reemergence.plan import ERASED, KEPT, LEARNT, NEAR, NEW, Counts
from benchmarks.reemergence.tables import Share
from benchmarks.store import Store
from diffusers_erasure import demo, erase
from diffusers_erasure.demo import HYPERNYMS, OBJECTS, STYLES, SYNONYMS
from diffusers_erasure.low_rank import DOWN, UP
from tests.helpers import ROUNDINGS, roundings


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def neighbours() -> Any:
    return parts.neighbours()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With the erasure and the fine-tunings of the smoke run in it, once one test has run it."""
    return Store(tmp_path_factory.mktemp("store"))


# ------------------------------------------------------------------------------------------------------- pictures


def test_unseen_images_are_twelve_other_objects_in_the_same_styles() -> None:
    unseen = demo.load_unseen_images()
    assert unseen.images.shape == (12, 5, 64, 64, 3) and unseen.images.dtype == np.uint8
    assert unseen.styles == STYLES
    known = {*OBJECTS, *HYPERNYMS.values(), *(name for names in SYNONYMS.values() for name in names)}
    assert len(unseen.objects) == 12 and not set(unseen.objects) & known
    # a picture each, of something on white, and none of the 320
    pictures = {picture.tobytes() for picture in unseen.images.reshape(60, -1)}
    seen = {picture.tobytes() for picture in demo.load_images().images.reshape(320, -1)}
    assert len(pictures) == 60 and not pictures & seen
    assert all(picture[0, 0].min() > 240 and picture.min() < 128 for picture in unseen.images[:, 4])


def test_unseen_images_are_packaged_with_their_notice() -> None:
    folder = Path(str(demo.assets()))
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for name in ("emoji64_unseen.npz", "emoji64_unseen.json"):
        assert name in notice and name.partition(".")[0] in (ROOT / "docs" / "demo_model.md").read_text(
            encoding="utf-8"
        )
    with zipfile.ZipFile(folder / "emoji64_unseen.npz") as archive:
        assert archive.namelist() == ["images.npy"]
    assert (folder / "emoji64_unseen.npz").stat().st_size < 200_000


# ------------------------------------------------------------------------------------------------------- plan


def test_related_objects_go_from_the_hypernym_outwards(neighbours: Any) -> None:
    assert plan.related("pizza", neighbours)[0] == "hamburger"  # its one sibling, though others are nearer
    assert all(HYPERNYMS[name] == "animal" for name in plan.related("cat", neighbours))
    assert set(plan.related("rocket", neighbours)) == {"car", "airplane", "sailboat", "bicycle", "bus"}
    assert plan.related("rose", neighbours)[:2] in (("tulip", "sunflower"), ("sunflower", "tulip"))
    for name in OBJECTS:
        found = plan.related(name, neighbours)
        assert len(set(found)) == plan.RELATED and name not in found


@pytest.mark.parametrize("data", [NEW, NEAR])
@pytest.mark.parametrize("concept", plan.CONCEPTS)
def test_the_erased_concept_is_never_trained_on(data: str, concept: str, neighbours: Any) -> None:
    pictures = plan.training_set(data, concept, neighbours)
    assert len(pictures.images) == len(pictures.objects) == len(pictures.styles) == (60 if data == NEW else 25)
    source = demo.load_unseen_images() if data == NEW else demo.load_images()
    for picture, name, style in zip(pictures.images, pictures.objects, pictures.styles, strict=True):
        place = source.objects.index(name), source.styles.index(style)
        assert np.array_equal(picture, source.images[place])
    rng = random.Random(0)
    captions = [pictures.caption(i % len(pictures.images), rng) for i in range(600)]
    names = {*plan.never_trained_on(concept), HYPERNYMS[concept]}
    assert not [caption for caption in captions if names & set(caption.replace(",", "").split())]
    assert set(captions) <= plan.fine_tuning_captions(tuple(dict.fromkeys(pictures.objects)))
    tokenizer = demo.load_pipeline().tokenizer
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= tokenizer.model_max_length


def test_shots_cover_wordings_and_styles_and_keep_the_groups_apart(neighbours: Any) -> None:
    erased = plan.shots_for(ERASED, "cat", "", neighbours, Counts(), 0)
    assert len(erased) == 40 and len({shot.wording for shot in erased}) == 5
    assert {shot.style for shot in erased} == set(STYLES)
    assert all("cat" in shot.prompt for shot in erased) and len({shot.seed for shot in erased}) == 40
    kept = plan.shots_for(KEPT, "cat", "", neighbours, Counts(), 0)
    assert not {shot.object for shot in kept} & {"cat", *plan.related("cat", neighbours)}
    near = plan.shots_for(LEARNT, "cat", NEAR, neighbours, Counts(), 0)
    assert {shot.object for shot in near} == set(plan.related("cat", neighbours))
    new = plan.shots_for(LEARNT, "", NEW, neighbours, Counts(), 0)
    assert {shot.object for shot in new} == set(demo.load_unseen_images().objects)
    other = plan.shots_for(ERASED, "cat", "", neighbours, Counts(), 1)
    assert [shot.prompt for shot in other] == [shot.prompt for shot in erased]
    assert not {shot.seed for shot in other} & {shot.seed for shot in erased}


# ------------------------------------------------------------------------------------------------------- training


def test_train_lora_trains_the_attention_alone_and_repeats(tmp_path: Path, neighbours: Any) -> None:
    recipe = Recipe(rank=2, batch_size=2)
    pictures = plan.training_set(NEAR, "cat", neighbours)
    files = []
    for name in ("once", "again"):
        pipe = demo.load_pipeline()
        before = {key: value.clone() for key, value in pipe.unet.named_parameters()}
        losses = lora.train_lora(pipe, pictures, (1, 3), tmp_path / name, recipe, seed=7)
        assert len(losses) == 3 and np.isfinite(losses).all()
        files.append(load_file(tmp_path / name / "3" / "pytorch_lora_weights.safetensors"))
    assert set(files[0]) == set(files[1]) and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    after = {key.replace(".base_layer", ""): value for key, value in pipe.unet.named_parameters()}
    assert all(torch.equal(value, after[key]) for key, value in before.items())

    fresh: Any = demo.load_pipeline()
    fresh.load_lora_weights(tmp_path / "once" / "3")
    deltas = lora.lora_deltas(fresh)
    attention = {
        name.removesuffix(".base_layer")
        for name, module in pipe.unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in name and ".lora_" not in name
    }
    assert set(deltas) == attention and len(attention) % 8 == 0
    for delta in deltas.values():
        largest, *_, third = torch.linalg.svdvals(delta)[:3]
        assert third < 1e-5 * largest
    first: Any = demo.load_pipeline()
    first.load_lora_weights(tmp_path / "once" / "1")
    assert max(d.norm() for d in lora.lora_deltas(first).values()) < max(d.norm() for d in deltas.values())


def test_training_lowers_the_loss(tmp_path: Path, neighbours: Any) -> None:
    pictures = plan.training_set(NEW, "", neighbours)
    pipe = demo.load_pipeline()
    before = lora.noise_loss(pipe, pictures)
    assert before == lora.noise_loss(pipe, pictures)
    lora.train_lora(pipe, pictures, (6,), tmp_path, Recipe(learning_rate=2e-3), seed=0)
    assert lora.noise_loss(pipe, pictures) < 0.98 * before


# ------------------------------------------------------------------------------------------------------- weights


def test_undoing_of_hand_made_weights() -> None:
    safe = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.0, 2.0]])}
    assert lora.undoing({name: -0.5 * value for name, value in safe.items()}, safe) == pytest.approx((1, 0.5))
    assert lora.undoing(safe, safe) == pytest.approx((-1, -1))
    assert lora.undoing({"a": torch.tensor([[0.0, 3.0]])}, safe) == pytest.approx((0, 0))
    # only what both change counts, and the whole as one vector: (-1, 0 | 0, 0) on (1, 0 | 0, 2)
    mixed = {"a": -safe["a"], "b": 0 * safe["b"], "c": torch.ones(9, 9)}
    assert lora.undoing(mixed, safe) == pytest.approx((1 / 5**0.5, 1 / 5))
    assert np.isnan(lora.undoing({"c": torch.ones(1)}, safe)).all()


def test_undoing_of_an_erasure_against_its_own_export(tmp_path: Path) -> None:
    fit = Fit("uce", "cat")
    store = Store(tmp_path)
    base = demo.load_pipeline()
    erasure = erase(base, "cat", anchors="animal", retain=["dog"], layer="lora")
    erasure.save_pretrained(store.files_of(fit))
    changes = lora.weight_changes(parts.exported(fit, store), base)
    assert changes and all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in changes)
    (layer,) = erasure.config.layers
    stored = erasure.layer_tensors(layer)
    for name, change in changes.items():
        down, up = (stored[f"{name}{ending}"] for ending in (DOWN, UP))
        # What float32 weights, as they were exported, can hold of it.
        weight = base.unet.get_submodule(name).weight
        rounding = torch.finfo(torch.float32).eps * float((weight.abs() + change.abs()).max())
        assert float((change - up.double() @ down.double()).abs().max()) <= rounding
    assert lora.undoing({name: -change for name, change in changes.items()}, changes) == pytest.approx((1, 1))


def test_exported_and_loaded_draw_the_same_before_fine_tuning(tmp_path: Path) -> None:
    fit, store = Fit("uce", "cat"), Store(tmp_path)
    parts.run_all([fit], store, 1, "")
    drawn = []
    for way in (parts.SEQUENTIAL, parts.MODULAR, parts.NONE):
        pipe = parts.load_model(parts.Model(way, None if way == parts.NONE else fit, None, 0), store)
        assert len(pipe.list_erasures()) == (way == parts.MODULAR)
        generator = torch.Generator().manual_seed(0)
        drawn.append(
            pipe("a cat", num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np").images
        )
    # The embedded model is deeper, and what is exported is rounded to float32 once more.
    assert roundings(drawn[0], drawn[1]) <= 10 * ROUNDINGS < 1e-2 * roundings(drawn[2], drawn[1])


# ------------------------------------------------------------------------------------------------------- new objects


def test_nearest_centroid_knows_the_real_pictures_and_nothing_else() -> None:
    objects = parts.new_objects()
    right, total = objects.validate(demo.load_pipeline().vae, draws=1)
    assert total == 60 and right >= 57
    unseen = objects.dataset
    pixels = new_objects.to_pixels(unseen.images.reshape(-1, 64, 64, 3))
    assert objects.predict(pixels) == list(objects.names)
    # the features are what the judge's own head reads
    logits = objects.judge.net(pixels)[0]
    assert roundings(objects.judge.net.object_head(objects.features(pixels)), logits) <= ROUNDINGS
    shuffled = [unseen.objects[(i + 1) % 12] for i in range(12)]
    images = demo.load_pipeline().image_processor.numpy_to_pil(unseen.images[:, 0] / 255)
    assert objects.right(images, shuffled) == [False] * 12
    assert objects.right(images, unseen.objects) == [True] * 12


# ------------------------------------------------------------------------------------------------------- numbers


def test_wilson_interval() -> None:
    assert Share(0, 40).interval == pytest.approx((0, 0.0876), abs=1e-4)
    assert Share(8, 40).interval == pytest.approx((0.1050, 0.3476), abs=1e-4)
    assert Share(40, 40).interval == pytest.approx((0.9124, 1), abs=1e-4)
    assert str(Share(8, 40)) == "20.0 [10–35]"


def test_shares_and_pairs() -> None:
    assert tables.share([[1, 0, 1], [0, 0]]) == Share(2, 5)
    assert tables.discordant([[1, 1, 0], [0, 1]], [[1, 0, 1], [0, 0]]) == (2, 1)
    with pytest.raises(ValueError):
        tables.discordant([[1]], [[1, 0]])


def test_cases_share_what_is_the_same() -> None:
    settings = parts.Settings()

    def case(way: str, method: str = "uce", concept: str = "cat", data: str = NEW) -> cases.Case:
        return cases.Case(method, concept, data, way, 0, settings)

    assert case("modular").training == case("none").training == case("modular", "esd", "rocket").training
    assert case("sequential").training != case("sequential", concept="rocket").training
    assert case("none", data=NEAR).training != case("none", concept="rocket", data=NEAR).training
    assert case("sequential").views()[ERASED, 0] == case("modular").views()[ERASED, 0]
    assert case("none").views() == case("none", "esd").views()
    assert [step for cell, step in case("modular").views() if cell == ERASED] == [0, 50, 100, 300]
    # the same prompts and noise in every way
    views = [case(way).views()[ERASED, 300] for way in cases.WAYS]
    assert len({parts.shots_of(view) for view in views}) == 1 and len({view.model for view in views}) == 3
    # neither another method's settings nor other counts take a stored result
    store = Store(Path())
    keys = {store.key(view) for view in views}
    fewer = parts.Settings(counts=Counts(erased=1))
    other = cases.Case("uce", "cat", NEW, "modular", 0, fewer).views()[ERASED, 300]
    assert len(keys) == 3 and store.key(other) not in keys
    # but a LoRA is not trained again for other images
    assert cases.Case("uce", "cat", NEW, "modular", 0, fewer).training == case("modular").training


# ------------------------------------------------------------------------------------------------------- the run


@pytest.mark.slow
def test_smoke_run_and_its_store(store: Store, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    path = tmp_path / "numbers.json"
    command = ["--smoke", "--steps", "1", "--data", NEAR, "--store", str(store.folder), "--json", str(path)]
    reemergence.main(command)
    numbers = json.loads(path.read_text(encoding="utf-8"))
    assert (numbers["benchmark"], numbers["smoke"], numbers["steps"]) == ("reemergence", True, [1])
    assert numbers["concepts"] == ["cat"] and numbers["new_objects"]["validation"][1] == 60
    rows = numbers["methods"]["uce"]["rows"]
    assert [(row["data"], row["way"]) for row in rows] == [(NEAR, way) for way in cases.WAYS]
    for row in rows:
        assert set(row["shares"]) == {f"{cell}, {step}" for cell in (ERASED, KEPT, LEARNT) for step in (0, 1)}
        assert all(each["images"] == 2 for each in row["shares"].values())
        assert ("against" in row) == (row["way"] != "none")
        assert row["loss"][0] != row["loss"][1]
    by = {row["way"]: row for row in rows}
    assert by["modular"]["loss"] == by["none"]["loss"] != by["sequential"]["loss"]  # trained on another base
    out = capsys.readouterr().out
    assert "Erased by uce" in out and "These numbers say nothing" in out

    def refuse(*args: Any) -> Any:
        raise AssertionError("a stored part was done again")

    monkeypatch.setattr(parts, "run_part", refuse)
    reemergence.main(command)
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again == numbers
    with pytest.raises(AssertionError, match="done again"):
        reemergence.main([*command, "--fresh"])
    for file in store.folder.glob("*.json"):  # what was cut off in writing does not count
        file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(AssertionError, match="done again"):
        reemergence.main(command)


def test_page(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "modular.md").read_text(encoding="utf-8")
    page = commands.replace_between(text, "reemergence", "| a |")
    assert page.count("| a |") == 1 and commands.replace_between(page, "reemergence", "| b |").count("| a |") == 0
    assert page.split("<!-- reemergence: begin -->")[0] == text.split("<!-- reemergence: begin -->")[0]
    assert page.split("<!-- reemergence: end -->")[1] == text.split("<!-- reemergence: end -->")[1]
    with pytest.raises(ValueError):
        commands.replace_between("no markers", "reemergence", "x")
    assert "- modular.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_markdown_of_hand_made_numbers() -> None:
    rows = [
        {
            "data": NEW,
            "way": way,
            "by_concept": {"cat": (0, hits, 40)},
            "shares": {(ERASED, 0): Share(0, 40), (ERASED, 9): Share(hits, 40), (KEPT, 9): Share(3, 4)},
            "loss": [0.5, 0.25],
            **({"against": {"cosine": 0.125, "undone": 0.5}} if way != "none" else {}),
        }
        for way, hits in (("sequential", 8), ("none", 40))
    ]
    numbers = {
        "concepts": ["cat"],
        "seeds": [0],
        "steps": [9],
        "related": {"cat": ["dog", "fox"]},
        "new_objects": {"objects": 12, "validation": (59, 60)},
        "methods": {"uce": {"rows": rows, "discordant": {NEW: (8, 1)}}},
    }
    text = tables.markdown(numbers, "python -m benchmarks.reemergence")
    assert "| new objects | sequential | 0.0 [0–9] | 20.0 [10–35] | – | 75.0 [30–95] |" in text
    assert "| 0.500 → 0.250 | +0.125 | +50.0 |" in text and "| 0.500 → 0.250 | – | – |" in text
    assert "only with `sequential` in 8 images, only with `modular` in 1" in text
    assert "0 → 8 of 40" in text and "59 of 60" in text and "cat: dog, fox" in text


@pytest.mark.parametrize(
    "wrong", [["--smoke", "--write-docs"], ["--jobs", "0"], ["--steps", "0"], ["--concepts", "x"]]
)
def test_wrong_options(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        reemergence.parse(wrong)
