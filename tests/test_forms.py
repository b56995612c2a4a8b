"""How closed forms are published by default: a map that acts here, and the same edit as a LoRA for stock diffusers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import (
    Erasure,
    ErasureInputError,
    combine,
    demo,
    erase,
    with_schedule,
    with_stock_lora,
    without_gate,
    without_schedule,
    without_stock_lora,
)
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import CARD_FILE, CONFIG_FILE, LORA_FILE, TENSOR_FILE
from tests.helpers import ROUNDINGS, assert_like, images, random_erasure, roundings, tiny_sd_pipe, tiny_sdxl_pipe


DEFAULTS: dict[str, dict[str, Any]] = {
    "uce": {"method": "uce"},
    "rece": {"method": "rece"},
    "dp": {"method": "dp"},
    "speed": {"method": "speed", "params": "KV", "filter": False, "augment": 0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_by_default_a_map_acts_and_stock_diffusers_has_its_lora(name: str, tmp_path: Path) -> None:
    """Also as a peft adapter, in float16, and added up; in float64, where only the factors' rounding is left."""
    pipe = demo.load_pipeline()
    erasure = erase(pipe, "cat", anchors="animal", retain=["dog"], **DEFAULTS[name])
    assert [layer.kind for layer in erasure.config.layers] == ["text_map"]
    assert erasure.config.method.settings["layer"] == "both"
    rank = len(erasure.tensors[TENSOR_FILE]["text_map.A"])
    ranks = {value.shape[0] for key, value in erasure.tensors[LORA_FILE].items() if key.endswith(DOWN)}
    assert ranks == {rank} and rank <= 128
    erasure.save_pretrained(tmp_path / "it")
    assert {path.name for path in (tmp_path / "it").iterdir()} == {CARD_FILE, CONFIG_FILE, LORA_FILE, TENSOR_FILE}
    card = (tmp_path / "it" / CARD_FILE).read_text()
    assert "acts by a map of the text" in card and "- lora\n" in card and "same edit, by the LoRA" in repr(erasure)

    def drawn(load: Any) -> Any:
        fresh = demo.load_pipeline().to(torch.float64)
        load(fresh)
        return images(fresh, prompt="a cat in ink style")

    base, ours = drawn(lambda fresh: None), drawn(lambda fresh: fresh.load_erasure(tmp_path / "it"))
    assert_like(drawn(lambda fresh: fresh.load_lora_weights(tmp_path / "it", weight_name=LORA_FILE)), ours, base)
    assert_like(drawn(lambda fresh: fresh.load_erasure(tmp_path / "it", backend="peft")), ours, base)
    assert_like(drawn(lambda fresh: fresh.load_erasure(tmp_path / "it", backend="merge")), ours, base)

    erasure.save_pretrained(tmp_path / "half", dtype="float16")
    half = drawn(lambda fresh: fresh.load_erasure(tmp_path / "half"))
    stock = drawn(lambda fresh: fresh.load_lora_weights(tmp_path / "half", weight_name=LORA_FILE))
    assert_like(stock, half, base, tolerance=0.02)


def test_published_presets_may_pin_a_form() -> None:
    """RECE's windows of rows have a map of high rank, whose LoRA would be larger than the weights."""
    pipe = demo.load_pipeline()
    published = erase(pipe, "cat", method="rece", published=True)
    assert published.config.stock is None and published.config.method.settings["layer"] == "text_map"
    assert erase(pipe, "cat", published=True).config.stock is not None


def test_speed_without_one_map_for_all_layers_is_a_lora(caplog: pytest.LogCaptureFixture) -> None:
    pipe = demo.load_pipeline()
    caplog.set_level(logging.INFO, "diffusers_erasure")
    for given, level in (({}, logging.INFO), ({"layer": "both"}, logging.WARNING), ({"params": "KV"}, logging.INFO)):
        caplog.clear()
        erasure = erase(pipe, "cat", retain=["dog"], method="speed", **given)
        assert [layer.kind for layer in erasure.config.layers] == ["lora"]
        assert erasure.config.method.settings["layer"] == "lora" and erasure.config.stock is not None
        (record,) = [each for each in caplog.records if "from layer to layer" in each.getMessage()]
        assert record.levelno == level
    caplog.clear()
    erase(pipe, "cat", retain=["dog"], method="speed", layer="lora")
    assert "from layer to layer" not in caplog.text


@pytest.mark.parametrize("method", ["uce", "rece", "dp"])
def test_where_not_all_that_reads_the_rows_is_linear_it_is_a_lora(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = demo.load_pipeline()
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as a loaded IP-Adapter leaves it
    erasure = erase(pipe, "cat", anchors="animal", retain=["dog"], method=method)
    assert [layer.kind for layer in erasure.config.layers] == ["lora"]
    assert erasure.config.method.settings["layer"] == "lora" and "known to be linear" in caplog.text


def test_a_large_lora_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = demo.load_pipeline()
    erase(pipe, "cat", anchors="animal", retain=["dog"], rows="window")
    assert "more numbers" in caplog.text
    caplog.clear()
    erase(pipe, "cat", anchors="animal", retain=["dog"], method="uce")
    assert "more numbers" not in caplog.text


@pytest.mark.parametrize("limit", [{}, {"rank": 3}, {"max_error": 0.05}], ids=str)
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_a_sum_of_maps_has_the_sum_of_their_loras(limit: dict[str, Any], xl: bool) -> None:
    """The same that `with_stock_lora` computes from the weights, also where the maps were truncated together."""
    pipe = tiny_sdxl_pipe() if xl else tiny_sd_pipe()
    parts = [erase(pipe, name, anchors="animal", lamb=1e-4) for name in ("zebra", "house")]
    summed = combine([parts[0], parts[1].rescaled(0.5)], mode="sum", **limit)
    assert summed.config.stock is not None and summed.config.stock.is_exact and summed.config.stock.error < 1e-5
    exact = with_stock_lora(summed, pipe).lora_for_others()
    found = summed.lora_for_others()
    assert found.keys() == exact.keys()
    for name in (each.removesuffix(DOWN) for each in exact if each.endswith(DOWN)):
        products = [each[name + UP].double() @ each[name + DOWN].double() for each in (found, exact)]
        assert roundings(*products) <= ROUNDINGS


def test_a_sum_that_stock_diffusers_cannot_load_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = demo.load_pipeline()
    one, two = (erase(pipe, name, anchors="animal", retain=["dog"], method="uce") for name in ("cat", "shark"))
    lora = erase(pipe, "corn", anchors="food", retain=["dog"], layer="lora")
    assert combine([one, without_stock_lora(two)], mode="sum").config.stock is None
    assert "not all parts carry a LoRA" in caplog.text
    caplog.clear()
    assert combine([one, lora], mode="sum").config.stock is None
    assert "maps and LoRAs" in caplog.text


def test_forms_do_not_hinder_a_joint_solve() -> None:
    """Erasures of earlier versions were LoRAs by default."""
    pipe = demo.load_pipeline()
    one = erase(pipe, "cat", anchors="animal", retain=["dog"], layer="lora")
    two = erase(pipe, "shark", anchors="animal", retain=["dog"], method="uce")
    assert combine([one, two], pipe=pipe).config.method.settings["layer"] == "both"
    loras = [one, erase(pipe, "shark", anchors="animal", retain=["dog"], layer="lora")]
    assert combine(loras, pipe=pipe).config.method.settings["layer"] == "lora"


def test_a_schedule_or_a_gate_leaves_the_lora_out_and_says_so(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    both = with_stock_lora(random_erasure(pipe, "text_map"), pipe)
    late = with_schedule(both, [1.0, 0.5])
    assert late.config.stock is None and "LoRA for stock diffusers is left out" in caplog.text
    assert without_gate(both).lora_for_others() and without_schedule(both).config.stock == both.config.stock
    assert without_schedule(late).content_hash == both.content_hash


def test_as_an_adapter_it_is_saved_and_recognised(pipe: Any, tmp_path: Path) -> None:
    both = with_stock_lora(random_erasure(pipe, "text_map"), pipe)
    pipe.load_erasure(both, "it", strength=0.5, backend="peft")
    assert pipe.get_active_adapters() == ["it"] and pipe.list_erasures()[0].backend == "peft"
    half = images(pipe)
    pipe.save_erasure(tmp_path / "half")
    with pytest.raises(ErasureInputError, match="loaded already"):
        pipe.load_erasure(without_stock_lora(both), "map")
    pipe.unload_erasure()
    base = images(pipe)
    pipe.load_erasure(tmp_path / "half")
    assert [layer.kind for layer in Erasure.from_pretrained(tmp_path / "half").config.layers] == ["text_map"]
    assert_like(images(pipe), half, base)
    pipe.unload_erasure()
    near = with_stock_lora(both, pipe, {name: 1.1 * value for name, value in both.lora_for_others().items()})
    with pytest.raises(ErasureInputError, match="same edit"):
        pipe.load_erasure(near, backend="peft")


def test_one_after_another_into_the_weights(pipe: Any) -> None:
    """A map adds to the fused ones as it adds to unfused ones, where it is fused with them."""
    one, two = (with_stock_lora(random_erasure(pipe, "text_map", seed=seed), pipe) for seed in (0, 1))
    base, fused = images(pipe), tiny_sd_pipe()
    pipe.load_erasure(one, "one")
    pipe.load_erasure(two, "two")
    fused.load_erasure(one, "one", backend="merge")
    fused.load_erasure(two, "two", backend="merge")
    assert [item.backend for item in fused.list_erasures()] == ["merge", "merge"]
    assert_like(images(fused), images(pipe), base)
