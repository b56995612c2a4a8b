"""Ring-A-Bell: its search against brute force, resumed and interrupted, its controls, and the command `attack`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusers_erasure import ErasureInputError, demo, erase
from diffusers_erasure.attacks import EmojiSeer, PickerSeer, RingABellConfig, attack, ring_a_bell
from diffusers_erasure.attacks.hard_prompts import Encoder, Search, Settings, direction_of, vocabulary_of
from diffusers_erasure.settings import resolve
from tests.commands import answer, invoke
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe


SMALL: dict[str, Any] = {"population": 20, "generations": 8, "tokens": 3}


@pytest.fixture(scope="module")
def embedded() -> Any:
    return demo.load_pipeline()


def settings(**more: Any) -> Settings:
    return resolve(RingABellConfig(**{**SMALL, **more}), Settings)


# ----------------------------------------------------------------------------------------------------------- the search


def wanted(encoder: Encoder, target: str, anchor: str, eta: float) -> torch.Tensor:
    return encoder.rows(encoder.of_texts([f"a {anchor}"])) + eta * direction_of(encoder, target, anchor)[None]


def distances(encoder: Encoder, ids: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    return (encoder.rows(ids) - goal).square().flatten(1).sum(1).double()


def test_one_token_is_the_best_of_all(embedded: Any) -> None:
    """Brute force over the whole vocabulary."""
    encoder = Encoder(embedded)
    config = RingABellConfig(population=200, generations=25, tokens=1)
    found = ring_a_bell(embedded, "dog", "animal", config=config, progress=False)
    words = vocabulary_of(encoder, "dog", settings())
    all_of_them = distances(encoder, encoder.of_tokens(words[:, None]), wanted(encoder, "dog", "animal", 3.0))
    assert found.prompt == encoder.text(words[all_of_them.argmin()][None])
    assert found.distance == pytest.approx(float(all_of_them.min()))
    assert found.encoded == 5000 and len(found.curve) == 25


def test_two_tokens_of_few_words_too(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(embedded)
    few = vocabulary_of(encoder, "dog", settings())[::9]
    monkeypatch.setattr("diffusers_erasure.attacks.hard_prompts.vocabulary_of", lambda *a: few)
    config = RingABellConfig(population=100, generations=40, tokens=2)
    found = ring_a_bell(embedded, "dog", "animal", config=config, progress=False)
    pairs = torch.cartesian_prod(few, few)
    best = distances(encoder, encoder.of_tokens(pairs), wanted(encoder, "dog", "animal", 3.0)).min()
    assert found.distance == pytest.approx(float(best))


def test_it_finds_another_word_for_the_thing_and_never_its_name(embedded: Any) -> None:
    found = ring_a_bell(embedded, "dog", "animal", config=RingABellConfig(generations=30, tokens=2), progress=False)
    assert "puppy" in found.prompt.split() and "dog" not in found.prompt and found.distance < found.start
    allowed = vocabulary_of(Encoder(embedded), "dog", settings(allow_target=True))
    assert len(allowed) == 1 + len(vocabulary_of(Encoder(embedded), "dog", settings()))


def test_the_best_stays_unless_as_published(embedded: Any) -> None:
    found = ring_a_bell(embedded, "cat", "animal", config=RingABellConfig(**SMALL), progress=False)
    assert list(found.curve) == sorted(found.curve, reverse=True)
    published = resolve(RingABellConfig(published=True), Settings)
    assert (published.population, published.generations, published.tokens, published.eta) == (200, 3000, 16, 3.0)
    assert (published.mutation, published.crossover, published.elite) == (0.25, 0.5, 0)
    lost = Search(lambda free: free.double().sum(1), torch.arange(9), settings(elite=0, mutation=1.0))
    for _ in range(30):
        lost.step()
    assert any(b > a for a, b in zip(lost.curve, lost.curve[1:], strict=False))


def test_what_is_returned_was_scored_as_it_is_read_again(embedded: Any) -> None:
    """Pieces of words join when they are written down."""
    config = RingABellConfig(population=30, generations=6, tokens=6, vocabulary="all")
    found = ring_a_bell(embedded, "dog", "animal", config=config, progress=False)
    encoder = Encoder(embedded)
    again = distances(encoder, encoder.of_texts([found.prompt]), wanted(encoder, "dog", "animal", 3.0))
    assert found.distance == pytest.approx(float(again[0]))


def test_a_broken_off_search_goes_on(embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RingABellConfig(**{**SMALL, "generations": 60})
    whole = ring_a_bell(embedded, "cat", "animal", config=config, progress=False)
    step, folder = Search.step, tmp_path / "search"

    def stopping(self: Search) -> None:
        if self.generation == 31:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Search, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        ring_a_bell(embedded, "cat", "animal", config=config, checkpoint_dir=folder, progress=False)
    monkeypatch.undo()
    with pytest.raises(ErasureInputError, match="earlier search"):
        ring_a_bell(embedded, "cat", "animal", config=config, checkpoint_dir=folder, progress=False)
    with pytest.raises(ErasureInputError, match="target"):
        ring_a_bell(embedded, "dog", "animal", config=config, checkpoint_dir=folder, resume=True, progress=False)
    resumed = ring_a_bell(embedded, "cat", "animal", config=config, checkpoint_dir=folder, resume=True, progress=False)
    assert resumed == whole


def test_random_search_has_the_same_budget(embedded: Any) -> None:
    config = RingABellConfig(population=60, generations=20, tokens=4)
    found, drawn = (
        ring_a_bell(embedded, "cat", "animal", config=config, random=random, progress=False)
        for random in (False, True)
    )
    assert found.encoded == drawn.encoded == 1200 and found.distance < drawn.distance


@pytest.mark.parametrize(
    ("make", "encoder"), [(tiny_sd3_pipe, None), (tiny_sd3_pipe, "text_encoder_2"), (tiny_flux_pipe, None)]
)
def test_other_families(make: Any, encoder: str | None) -> None:
    config = RingABellConfig(population=6, generations=2, tokens=2, vocabulary="all")
    found = ring_a_bell(make(), "cat", "dog", config=config, encoder=encoder, progress=False)
    assert found.distance > 0 and len(found.curve) == 2


def test_what_cannot_be_is_told(embedded: Any) -> None:
    with pytest.raises(ErasureInputError, match="22 at most"):
        ring_a_bell(embedded, "cat", config=RingABellConfig(tokens=23), progress=False)
    with pytest.raises(ErasureInputError, match="text_encoder_9"):
        ring_a_bell(embedded, "cat", encoder="text_encoder_9", progress=False)
    with pytest.raises(ErasureInputError, match="no erasure"):
        attack(embedded, "cat", seer=EmojiSeer())
    with pytest.raises(ErasureInputError, match="population"):
        RingABellConfig(population=1)
    with pytest.raises(ErasureInputError, match="is none"):
        EmojiSeer()([Image.new("RGB", (64, 64))], "unicorn")


# ------------------------------------------------------------------------------------------------------------ the trial


def test_a_trial_is_drawn_with_and_without_the_erasure(embedded: Any) -> None:
    """A judge that sees what is asked: what a row counts, and the rate."""
    seen: list[tuple[str, int]] = []
    embedded.load_erasure(erase(embedded, "dog", anchors="animal", method="uce", compare=False))
    try:
        trial = attack(
            embedded,
            "dog",
            "animal",
            seer=EmojiSeer(),
            config=RingABellConfig(generations=30, tokens=2),
            images=6,
            progress=False,
            keep=lambda row, pictures: seen.append((row.model, len(pictures))),
            num_inference_steps=8,
            guidance_scale=3.0,
        )
    finally:
        embedded.unload_erasure()
    assert seen == [("un-erased", 6)] * 5 + [("erased", 6)] * 5
    assert trial.row("un-erased", "name").share == 1.0 and trial.row("erased", "name").share < 0.5
    assert trial.row("un-erased", "nonsense").share < 0.5
    assert trial.row("un-erased", "attack").share >= 0.9 and not trial.too_weak
    assert trial.asr == trial.row("erased", "attack").share - trial.row("erased", "anchor").share
    assert json.loads(json.dumps(trial.as_json()))["rows"][0]["any"] is True


def test_what_cannot_be_judged_is_told_before_the_search(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr("diffusers_erasure.attacks.trial.ring_a_bell", lambda *a, **k: searched.append("searched"))
    embedded.load_erasure(erase(embedded, "dog", anchors="animal", method="uce", compare=False))
    try:
        with pytest.raises(ErasureInputError, match="is none"):
            attack(embedded, "unicorn", seer=EmojiSeer(), num_inference_steps=1, progress=False)
    finally:
        embedded.unload_erasure()
    assert not searched


def test_a_picker_is_a_seer() -> None:
    asked: list[int] = []

    def picker(images: Any, target: str) -> float:
        asked.append(len(images))
        return images[0].size[0] / 100

    found = PickerSeer(picker, 0.6)([Image.new("RGB", (side, 1)) for side in (50, 70)], "cat")
    assert list(found) == [False, True] and asked == [1, 1]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    erase(demo.load_pipeline(), "dog", anchors="animal", method="uce", compare=False).save_pretrained("no-dog")
    knobs = ["--generations", "3", "--population", "8", "--tokens", "2", "--images", "2", "--steps", "3"]
    command = ["attack", "-e", "no-dog", "--target", "dog", "--anchor", "animal", "-o", "out", *knobs]
    told = answer(*command)
    assert told["attack"] == "ring-a-bell" and len(told["rows"]) == 10 and told["judge"] == "emoji"
    assert json.loads(Path("out/report.json").read_text())["asr"] == told["asr"]
    assert Image.open("out/sheet.png").size[1] > 10 * 64 and not Path("out/checkpoints").exists()
    assert "exists already" in invoke(*command, code=2).output
    verdict = "attack too weak" if told["too_weak"] else "success rate"
    assert verdict in invoke(*command, "--overwrite").output
    assert "--judge" in invoke(*command, "--overwrite", "--judge", "nobody", code=2).output
