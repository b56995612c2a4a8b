"""What is loaded already: the same edit in another dtype, form or scale is refused, another one of the same target is told."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from benchmarks.builders import UNetOnly
from diffusers_erasure import (
    Erasure,
    ErasureInputError,
    compat,
    demo,
    erase,
    erasures_disabled,
    with_gate,
    with_schedule,
)
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.encoding import last_rows
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.layers.lora import LoraLayer
from diffusers_erasure.live import twins
from diffusers_erasure.live.loaded import states
from diffusers_erasure.live.twins import overshoot, same_edit, same_recipe
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import LORA_FILE, Concept
from tests.helpers import TEXT_SITES, UNET_SITES, normal, random_erasure, tiny_sd_pipe
from tests.test_activation import as_erasure as activations
from tests.test_activation import make_plan
from tests.test_closed_form_bases import quantise


COMMON: dict[str, Any] = {"push": 0.0, "anchors": "animal", "retain": ["dog", "rabbit"]}
Change = Callable[[Erasure], Erasure]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


@pytest.fixture(autouse=True)
def nothing_stays_loaded(request: pytest.FixtureRequest) -> Any:
    yield
    if "pipe" in request.fixturenames:
        request.getfixturevalue("pipe").unload_erasure()


@pytest.fixture(scope="module")
def made(pipe: Any) -> dict[str, Erasure]:
    return {
        "lora": erase(pipe, "cat", **COMMON, layer="lora"),
        "map": erase(pipe, "cat", **COMMON, layer="text_map"),
        "both": erase(pipe, "cat", **COMMON, layer="both"),
        "small": erase(pipe, " Cat", **COMMON, layer="lora", rank=3),
        "rece": erase(pipe, "cat", **COMMON, method="rece"),
        "other": erase(pipe, "cat", anchors="animal", retain=["dog", "rabbit", "fox"], method="uce"),
    }


def unnamed(erasure: Erasure) -> Erasure:
    """The same layers without what they were made by."""
    layers = [
        Layer(each.kind, each.sites, erasure.layer_tensors(each), each.component, each.derived_from)
        for each in erasure.config.layers
    ]
    return Erasure.from_layers(layers, base=erasure.config.base_model, concepts="something")


def stock_of(erasure: Erasure, pipe: Any) -> Erasure:
    """The LoRA that lies beside a map, as an erasure of its own."""
    return Erasure.from_lora(erasure.tensors[LORA_FILE], base=pipe, concepts="something")


SAME: dict[str, tuple[str, Callable[[dict[str, Erasure], Any], Erasure]]] = {
    "half": ("lora", lambda made, _: made["lora"].cast("float16")),
    "bfloat16": ("lora", lambda made, _: unnamed(made["lora"].cast("bfloat16"))),
    "bfloat16 read as float32": ("lora", lambda made, _: unnamed(made["lora"].cast("bfloat16").cast("float32"))),
    "scaled": ("lora", lambda made, _: unnamed(made["lora"].rescaled(0.3))),
    "a scaled map": ("map", lambda made, _: unnamed(made["map"].cast("float16").rescaled(3.0))),
    "scaled, of a recipe": ("map", lambda made, _: made["lora"].rescaled(2.0).cast("bfloat16")),
    "its LoRA": ("map", lambda made, pipe: stock_of(made["both"], pipe)),
    "its half-precision LoRA, scaled": (
        "map",
        lambda made, pipe: stock_of(made["both"], pipe).cast("float16").rescaled(0.5),
    ),
    "its map": ("lora", lambda made, _: unnamed(made["map"])),
    "truncated": ("lora", lambda made, _: made["small"]),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_edit_is_refused(pipe: Any, made: dict[str, Erasure], case: str) -> None:
    first, second = SAME[case]
    pipe.load_erasure(made[first], "first")
    twin = second(made, pipe)
    with pytest.raises(ErasureInputError, match="loaded already, as 'first' in another dtype, form or scale"):
        pipe.load_erasure(twin, "second")
    assert [item.name for item in pipe.list_erasures()] == ["first"]
    pipe.unload_erasure()
    pipe.load_erasure(twin, "second")
    with pytest.raises(ErasureInputError, match="loaded already, as 'second'"):
        pipe.load_erasure(made[first], "first")


@pytest.mark.parametrize("backend", ["merge", "peft"])
def test_however_the_first_acts(pipe: Any, made: dict[str, Erasure], tmp_path: Path, backend: str) -> None:
    pipe.load_erasure(made["lora"], "first", backend=backend)
    made["lora"].save_pretrained(tmp_path / "half", dtype=torch.float16)
    for twin in (tmp_path / "half", unnamed(made["lora"].rescaled(2.0)), made["map"]):
        with pytest.raises(ErasureInputError, match="loaded already"):
            pipe.load_erasure(twin, "second")
    if backend == "merge":  # a map is a change of the weights as they were before anything was fused into them
        assert same_edit(pipe, unnamed(made["map"]), made["lora"])


def test_other_edits_are_not_the_same(pipe: Any, made: dict[str, Erasure]) -> None:
    """However coarse the dtype: these are as near to one another as two erasures of one target come."""
    for name in ("rece", "other"):
        for form in ("lora", "map"):
            for dtype in ("float32", "bfloat16"):
                pair = made[form].cast(dtype), made[name].cast(dtype)
                assert not same_edit(pipe, *pair) and not same_edit(pipe, *pair[::-1])
                assert not same_recipe(*pair)
    negative = unnamed(made["lora"])
    for name in negative.tensors[LORA_FILE]:
        negative.tensors[LORA_FILE][name] *= -1 if name.endswith(UP) else 1
    assert not same_edit(pipe, made["lora"], negative)
    fewer = unnamed(made["lora"])
    site = fewer.config.layers[0].sites[3]
    fewer.tensors[LORA_FILE][f"unet.{site}{UP}"] *= 1.01  # of one site of 22
    assert not same_edit(pipe, made["lora"], fewer)


def test_layers_with_another_schedule_or_gate_are_another_edit(pipe: Any, made: dict[str, Erasure]) -> None:
    plain, late = made["map"], with_schedule(made["map"], [1.0, 0.0])
    gated = with_gate(made["map"], pipe, ["cat"])
    pipe.load_erasure(late, "late")
    for other in (plain, with_schedule(plain, [1.0, 0.5]), gated):
        assert not same_edit(pipe, late, other) and not same_recipe(late, other)
    for twin in (late.cast("bfloat16"), unscaled(late)):
        with pytest.raises(ErasureInputError, match="loaded already, as 'late'"):
            pipe.load_erasure(twin, "again")
    pipe.load_erasure(plain, "plain")
    assert same_edit(pipe, gated, gated.cast("float16"))
    assert not same_edit(pipe, gated, with_gate(plain, pipe, ["dog"]))


def unscaled(erasure: Erasure) -> Erasure:
    """Published at another strength."""
    return erasure.rescaled(0.25)


def test_layers_that_change_no_weights_are_compared_by_their_tensors() -> None:
    pipe = tiny_sd_pipe()
    one = activations(make_plan(seed=0), pipe=pipe)
    pipe.load_erasure(one, "one")
    for twin in (one.rescaled(0.5), one.cast("float16"), one.rescaled(3.0).cast("float16")):
        with pytest.raises(ErasureInputError, match="loaded already, as 'one'"):
            pipe.load_erasure(twin, "two")
    other = activations(make_plan(seed=1), pipe=pipe)
    assert not same_edit(pipe, one, other)
    assert overshoot(pipe, "zebra", [(one, 1.0), (other, 1.0)]) is None
    pipe.load_erasure(other, "two")


def test_a_map_from_a_fine_tune_of_the_denoiser_is_the_same_edit(made: dict[str, Erasure]) -> None:
    pipe = demo.load_pipeline()
    with torch.no_grad():
        pipe.unet.conv_in.weight += 0.01
    other = erase(pipe, "cat", **COMMON, layer="text_map", rank=2)
    assert same_recipe(other, made["map"]) and not same_edit(pipe, other, made["map"])
    assert not same_recipe(erase(pipe, "cat", **COMMON, layer="lora"), made["lora"])  # W is in these
    assert not same_recipe(other.redacted(), made["map"].redacted())


def test_what_is_not_told_is_no_recipe(pipe: Any, made: dict[str, Erasure]) -> None:
    assert same_recipe(made["lora"], made["map"])
    assert not same_recipe(made["lora"].redacted(), made["map"].redacted())
    made_up = unnamed(made["lora"])
    assert not same_recipe(made_up, made_up)


def test_where_weights_are_offloaded_or_packed(made: dict[str, Erasure]) -> None:
    for away in (lambda unet: cpu_offload(unet, "cpu"), quantise):
        pipe = demo.load_pipeline()
        away(pipe.unet)
        pipe.load_erasure(made["lora"], "first", strict_base="ignore")
        assert not same_edit(pipe, made["rece"], made["lora"])
        if away is not quantise:  # eight bits are another base
            assert same_edit(pipe, unnamed(made["map"]), made["lora"])
        pipe.load_erasure(made["rece"], "second", strict_base="ignore")
        with pytest.raises(ErasureInputError, match="loaded already"):
            pipe.load_erasure(made["map"], "third", strict_base="ignore")


@pytest.mark.parametrize("error", [RuntimeError, ImportError])
def test_where_weights_cannot_be_read_recipes_and_tensors_tell(
    made: dict[str, Erasure], error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = demo.load_pipeline()
    quantise(pipe.unet)

    def unreadable(module: Any) -> None:
        raise error("no kernel here")

    monkeypatch.setattr(compat, "dequantized_weight", unreadable)
    pipe.load_erasure(made["lora"], "first", strict_base="ignore")
    pipe.load_erasure(made["rece"], "second", strict_base="ignore")
    assert "cannot be told" in caplog.text
    for twin in (made["map"], unnamed(made["lora"].cast("float16"))):
        with pytest.raises(ErasureInputError, match="loaded already, as 'first'"):
            pipe.load_erasure(twin, "third", strict_base="ignore")
    pipe.load_erasure(unnamed(made["map"]), "third", strict_base="ignore")  # which says nothing of itself


@pytest.mark.parametrize("layer", ["lora", "text_map"])
def test_another_inversion_of_one_token_is_another_erasure(layer: str) -> None:
    pipe = demo.load_pipeline()
    erasures = []
    embeddings = pipe.text_encoder.get_input_embeddings().weight
    for word in ("cat", "house"):
        vector = embeddings[pipe.tokenizer(word).input_ids[1]].detach().clone()
        if word == "house":
            pipe.unload_textual_inversion()
        pipe.load_textual_inversion({"<x>": vector})
        erasures.append(erase(pipe, "<x>", **COMMON, layer=layer))
    assert same_recipe(*erasures)
    pipe.load_erasure(with_schedule(erasures[0], [1.0, 0.5]), "late")
    pipe.load_erasure(with_schedule(erasures[1], [1.0, 0.5]), "other, late")
    pipe.unload_erasure()
    pipe.load_erasure(erasures[0], "first")
    pipe.load_erasure(erasures[1], "second")
    with pytest.raises(ErasureInputError, match="loaded already, as 'second'"):
        pipe.load_erasure(erase(pipe, "<x>", **COMMON, layer=layer, rank=2), "third")


def test_the_refusal_says_how_to_exchange_them(pipe: Any, made: dict[str, Erasure]) -> None:
    pipe.load_erasure(made["lora"], "first")
    for twin in (made["lora"], made["map"]):
        with pytest.raises(ErasureInputError, match=r"twice the strength.*unload_erasure\('first'\)` first"):
            pipe.load_erasure(twin, "second")
    pipe.set_erasures("first", 0.0)
    for twin in (made["lora"], made["map"]):
        with pytest.raises(
            ErasureInputError, match=r"it is at strength 0.*unload_erasure\('first'\)` first"
        ) as refused:
            pipe.load_erasure(twin, "second")
        assert "twice the" not in str(refused.value)


# --------------------------------------------------------------------------------------------- one target, removed twice


def test_two_erasures_of_one_target_are_told(
    pipe: Any, made: dict[str, Erasure], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "diffusers_erasure")
    pipe.load_erasure(made["lora"], "first")
    caplog.clear()
    pipe.load_erasure(made["rece"], "second", strength=0.5)
    (record,) = [each for each in caplog.records if "removed already" in each.getMessage()]
    text = record.getMessage()
    assert record.levelno == logging.WARNING and "'cat'" in text and "'first'" in text and "`combine`" in text
    times = overshoot(pipe, "cat", [(made["lora"], 1.0), (made["rece"], 0.5)])
    assert times is not None and f"{times:.2f} times" in text
    # Against the dense matrices: what both add for the row of "cat", on the direction of what moves it farther.
    (row,) = last_rows(pipe, ["cat"])
    tensors = made["rece"].layer_tensors(made["rece"].config.layers[0])
    own, other = [], []
    for site, linear in text_readers(pipe).items():
        factors = made["lora"].tensors[LORA_FILE]
        own.append(factors[f"unet.{site}{UP}"].double() @ factors[f"unet.{site}{DOWN}"].double() @ row)
        change = linear.weight.detach().double() @ tensors["D"].double().T @ tensors["A"].double()
        other.append(0.5 * change @ row)
    one, two = torch.cat(own), torch.cat(other)
    assert one.norm() > two.norm()
    assert times == pytest.approx(float((one + two) @ one / (one @ one)), rel=1e-6)
    assert 1.3 < times < 1.7
    both = overshoot(pipe, "cat", [(made["lora"], 1.0), (made["rece"], 1.0)])
    assert both is not None and 1.8 < both < 2.2
    three = overshoot(pipe, "cat", [(made[name], 1.0) for name in ("lora", "rece", "map")])
    assert three is not None and 2.8 < three < 3.2
    maps = overshoot(pipe, "cat", [(made["map"], 1.0), (made["rece"], 1.0)])
    assert maps is not None and 1.8 < maps < 2.2


def test_what_set_adapters_gives_counts(pipe: Any, made: dict[str, Erasure], caplog: pytest.LogCaptureFixture) -> None:
    pipe.load_erasure(made["lora"], "first", backend="peft")
    pipe.set_adapters("first", 0.25)
    pipe.load_erasure(made["rece"], "second")
    times = overshoot(pipe, "cat", [(made["lora"], 0.25), (made["rece"], 1.0)])
    assert times is not None and times < 1.4 and f"{times:.2f} times" in caplog.text


@pytest.mark.parametrize("on_text", [False, True])
@pytest.mark.parametrize(
    ("place", "error"),
    [("last_rows", RuntimeError("out of memory")), ("overshoot", ErasureInputError("not finite"))],
    ids=["encoder", "weights"],
)
def test_what_fails_while_it_is_told_is_no_failure(
    place: str, error: Exception, on_text: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_sd_pipe(levels=1)
    sites = TEXT_SITES if on_text else tuple(f"unet.{site}" for site in text_readers(pipe))
    one, two = (random_erasure(pipe, sites=sites, seed=seed, concepts=(Concept("zebra"),)) for seed in (0, 1))
    pipe.load_erasure(one, "one")
    seen = []

    def fail(*args: Any, **kwargs: Any) -> None:
        seen.append(list(states(pipe)["unet"].loaded))
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(twins, place, fail)
        assert pipe.load_erasure(two, "two").name == "two"
    assert seen == [["one"]]  # nothing of the other is there yet
    assert "cannot be told" in caplog.text
    assert [item.name for item in pipe.list_erasures()] == ["one", "two"]
    assert not any(state.view().disabled for state in states(pipe).values())


def test_a_block_that_fails_at_its_start_leaves_erasures_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd_pipe(levels=1)
    sites = (*TEXT_SITES, *(f"unet.{site}" for site in text_readers(pipe)))
    pipe.load_erasure(random_erasure(pipe, sites=sites))
    for number in (1, 2):
        calls = []

        def fold(self: Any, strengths: Any, number: int = number, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == number:
                raise RuntimeError("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(LoraLayer, "fold", fold)
            with pytest.raises(RuntimeError), erasures_disabled(pipe):
                pass
        assert [state.view().disabled for state in states(pipe).values()] == [False, False]


def test_what_moves_a_target_elsewhere_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "diffusers_erasure")
    pipe = tiny_sd_pipe(levels=1)
    (row,) = last_rows(pipe, ["zebra"])
    ways = torch.linalg.qr(normal(len(row), 3, seed=0)).Q.T
    layers = [
        Layer("text_map", ("encoder_hidden_states",), {"A": row[None] / (row @ row), "D": way[None]}) for way in ways
    ]
    one, two, third = (Erasure.from_layers([layer], base=pipe, concepts="Zebra ") for layer in layers)
    times = overshoot(pipe, "zebra", [(one, 1.0), (two, 1.0)])
    assert times == pytest.approx(1, abs=1e-6)
    pipe.load_erasure(one, "one")
    pipe.load_erasure(two, "two")
    pipe.load_erasure(third, "three", strength=0.0)
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []
    assert "1.00 times as far as one" in caplog.text


def test_other_targets_and_redacted_ones_are_not_told(pipe: Any, made: dict[str, Erasure], caplog: Any) -> None:
    caplog.set_level(logging.INFO, "diffusers_erasure")
    pipe.load_erasure(made["lora"], "first")
    pipe.load_erasure(erase(pipe, "dog", anchors="animal", method="uce"), "dog")
    pipe.load_erasure(made["rece"].redacted(), "secret")
    assert "removed" not in caplog.text


def test_without_a_text_encoder_the_factors_stand_for_the_moves(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_sd_pipe()
    one, two = (random_erasure(pipe, sites=UNET_SITES, seed=seed, concepts=(Concept("zebra"),)) for seed in (0, 1))
    bare = UNetOnly(pipe.unet)
    assert overshoot(bare, "zebra", [(one, 1.0), (one, 0.5)]) == pytest.approx(1.5)
    assert overshoot(bare, "zebra", [(one, 2.0), (one.rescaled(3.0), 1.0)]) == pytest.approx(5 / 3)
    times = overshoot(bare, "zebra", [(one, 1.0), (two, 1.0)])
    assert times is not None and 0.7 < times < 1.3
    elsewhere = random_erasure(pipe, sites=("unet.conv_in",), seed=3)
    assert overshoot(bare, "zebra", [(one, 1.0), (elsewhere, 1.0)]) is None
