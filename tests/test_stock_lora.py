"""A LoRA for stock diffusers beside layers that are none: computed and exact, or given and measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInputError,
    Layer,
    combine,
    demo,
    erase,
    fuse_erasures,
    save_kohya,
    with_schedule,
    with_stock_lora,
    without_stock_lora,
)
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import CARD_FILE, CONFIG_FILE, LORA_FILE, TENSOR_FILE, Concept
from tests.helpers import (
    ROUNDINGS,
    assert_like,
    dense_edit,
    images,
    random_erasure,
    roundings,
    style_lora,
    tiny_sd_pipe,
    tiny_sdxl_pipe,
)


def same_tensors(one: Erasure, other: Erasure) -> bool:
    files = [
        {(file, name): value for file, items in each.tensors.items() for name, value in items.items()}
        for each in (one, other)
    ]
    return files[0].keys() == files[1].keys() and all(
        torch.equal(files[1][key], value) for key, value in files[0].items()
    )


def stock_images(make: Any, folder: Path) -> Any:
    pipe = make()
    pipe.load_lora_weights(folder, weight_name=LORA_FILE)
    return images(pipe)


def test_a_text_map_and_its_lora_are_one_edit(pipe: Any, tmp_path: Path) -> None:
    """In this library the map acts and the file of the LoRA does not; in stock diffusers it is the other way round."""
    base = images(pipe)
    text_map = random_erasure(pipe, "text_map")
    both = with_stock_lora(text_map, pipe)
    assert both.config.stock is not None and both.config.stock.form == "exact" and both.config.stock.error < 1e-6
    assert [layer.kind for layer in both.config.layers] == ["text_map"] and text_map.config.stock is None
    both.save_pretrained(tmp_path / "both")
    read = Erasure.from_pretrained(tmp_path / "both")
    assert same_tensors(read, both) and read.config.stock == both.config.stock
    assert read.content_hash == text_map.content_hash  # that of what acts here
    drawn = images(dense_edit(tiny_sd_pipe(), text_map))
    assert_like(stock_images(tiny_sd_pipe, tmp_path / "both"), drawn, base)
    pipe.load_erasure(read)
    assert_like(images(pipe), drawn, base)
    assert "same edit" in (tmp_path / "both" / CARD_FILE).read_text()
    assert (
        "Where a LoRA of your own lies on the same modules the two can differ"
        in (tmp_path / "both" / CARD_FILE).read_text()
    )


def test_with_a_lora_of_the_users_the_two_forms_differ(pipe: Any, tmp_path: Path) -> None:
    """(W + U) T here, W T + U there, as the card and the docs say."""
    both = with_stock_lora(random_erasure(pipe, "text_map"), pipe)
    both.save_pretrained(tmp_path / "both")
    ours, stock = tiny_sd_pipe(), tiny_sd_pipe()
    for each in (ours, stock):
        each.load_lora_weights(style_lora(pipe, endings=("attn2.to_k", "attn2.to_v")), adapter_name="style")
    ours.load_erasure(both)
    stock.load_lora_weights(tmp_path / "both", weight_name=LORA_FILE, adapter_name="erasure")
    stock.set_adapters(["style", "erasure"])
    assert roundings(images(stock), images(ours)) > 100 * ROUNDINGS


def test_a_redacted_rescaled_or_half_copy_keeps_the_two_alike(pipe: Any, tmp_path: Path) -> None:
    base, both = images(pipe), with_stock_lora(random_erasure(pipe, "text_map"), pipe, results={"acc_e": 0.25})
    weaker = both.rescaled(0.5).redacted()
    assert weaker.config.stock is not None and weaker.config.stock.results == {}
    weaker.save_pretrained(tmp_path / "weaker")
    pipe.load_erasure(tmp_path / "weaker")
    assert_like(stock_images(tiny_sd_pipe, tmp_path / "weaker"), images(pipe), base)
    half = both.cast("float16")
    assert half.config.stock is not None and 1e-5 < half.config.stock.error < 2e-3


def test_sdxl(tmp_path: Path) -> None:
    """The pooled vector's map too: the Linear that reads it reads the time behind it."""
    pipe = tiny_sdxl_pipe()
    base = images(pipe)
    erasure = erase(pipe, "zebra", anchors="horse", layer="both", lamb=1e-6)
    assert sorted(layer.sites[0] for layer in erasure.config.layers) == ["encoder_hidden_states", "text_embeds"]
    assert erasure.config.stock is not None and erasure.config.stock.form == "exact"
    assert f"unet.add_embedding.linear_1{DOWN}" in erasure.tensors[LORA_FILE]
    erasure.save_pretrained(tmp_path / "sdxl")
    pipe.load_erasure(erasure)
    drawn = images(pipe)
    assert_like(stock_images(tiny_sdxl_pipe, tmp_path / "sdxl"), drawn, base)
    fuse_erasures(pipe)
    assert_like(images(pipe), drawn, base)
    pipe.unload_erasure()
    assert (images(pipe) == base).all()


@pytest.mark.parametrize("width", [30, 32, 96])
def test_a_map_of_another_pooled_width_is_refused(width: int) -> None:
    pipe = tiny_sdxl_pipe()
    tensors = {"A": torch.ones(1, width), "D": torch.ones(1, width)}
    erasure = Erasure.from_layers([Layer("text_map", ("text_embeds",), tensors)], base=pipe, concepts="zebra")
    with pytest.raises(ErasureCompatibilityError, match=f"width {width}"):
        pipe.load_erasure(erasure)
    assert not pipe.list_erasures()


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_methods_publish_both_on_the_embedded_model(method: str, tmp_path: Path) -> None:
    pipe = demo.load_pipeline()
    settings: dict[str, Any] = {"epochs": 1} if method == "rece" else {}
    both = erase(pipe, "cat", anchors="animal", method=method, layer="both", **settings)
    alone = erase(pipe, "cat", anchors="animal", method=method, layer="text_map", **settings)
    as_lora = erase(pipe, "cat", anchors="animal", method=method, layer="lora", **settings)
    assert both.config.stock is not None and both.config.stock.is_exact
    for name, value in alone.tensors[TENSOR_FILE].items():
        assert torch.equal(both.tensors[TENSOR_FILE][name], value)
    for name in (each for each in as_lora.tensors[LORA_FILE] if each.endswith(DOWN)):
        partner = name.removesuffix(DOWN) + UP
        products = [
            each.tensors[LORA_FILE][partner].double() @ each.tensors[LORA_FILE][name].double()
            for each in (both, as_lora)
        ]
        assert roundings(*products) <= ROUNDINGS
    path = save_kohya(both, tmp_path / "kohya.safetensors")
    stock = demo.load_pipeline()
    stock.load_lora_weights(path)
    assert stock.get_active_adapters()


def test_a_lora_that_comes_near_is_measured(pipe: Any, tmp_path: Path) -> None:
    """An approximation: the exact LoRA, disturbed, so that its distance is known."""
    both = with_stock_lora(random_erasure(pipe, "text_map"), pipe)
    factors = {name: value.clone() for name, value in both.lora_for_others().items()}
    for name, value in factors.items():
        if name.endswith(UP):
            value *= 1.1
    near = with_stock_lora(both, pipe, factors, results={"erased share": 0.2})
    assert near.config.stock is not None
    assert (near.config.stock.form, near.config.stock.results) == ("approximate", {"erased share": 0.2})
    assert near.config.stock.error == pytest.approx(0.1, rel=1e-2)
    near.save_pretrained(tmp_path)
    card = (tmp_path / CARD_FILE).read_text()
    assert "approximation" in card and "10 % away" in card and "erased share" in card
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["stock"]["form"] == "approximate"
    one_site = {
        name: value for name, value in factors.items() if name.startswith(next(iter(factors)).rpartition(".lora")[0])
    }
    assert 0.5 < with_stock_lora(both, pipe, one_site).config.stock.error < 1.1  # type: ignore[union-attr]
    exact = with_stock_lora(both, pipe, both.lora_for_others())
    assert exact.config.stock is not None and exact.config.stock.is_exact


def test_layers_that_no_lora_equals(pipe: Any) -> None:
    """Then the caller has measured how far the LoRA is, or there is none."""
    late = with_schedule(with_stock_lora(random_erasure(pipe, "text_map"), pipe), [1.0, 0.5])
    assert late.config.stock is None and LORA_FILE not in late.tensors
    with pytest.raises(ErasureInputError, match="No LoRA does what"):
        with_stock_lora(late, pipe)
    factors = random_erasure(pipe, sites=("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",)).tensors[
        LORA_FILE
    ]
    for bad in (None, -1.0, float("inf"), float("nan")):
        with pytest.raises(ErasureInputError, match="measure it|`error` must be"):
            with_stock_lora(late, pipe, factors, error=bad)
    stated = with_stock_lora(late, pipe, factors, error=0.3)
    assert stated.config.stock is not None and (stated.config.stock.form, stated.config.stock.error) == (
        "approximate",
        0.3,
    )
    assert same_tensors(without_stock_lora(stated), late)


def test_what_is_refused(pipe: Any) -> None:
    with pytest.raises(ErasureInputError, match="are a LoRA already"):
        with_stock_lora(random_erasure(pipe), pipe)
    text_map = random_erasure(pipe, "text_map")
    with pytest.raises(ErasureFileError):
        with_stock_lora(text_map, pipe, {"unet.conv_in.weight": torch.ones(2)})
    with pytest.raises(ErasureCompatibilityError):
        with_stock_lora(text_map, tiny_sdxl_pipe())
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    for name, shapes in ((site, (3, 5)), ("unet.nowhere", (3, 5))):
        with pytest.raises(ErasureCompatibilityError, match="another architecture"):
            with_stock_lora(
                text_map, pipe, {name + DOWN: torch.ones(1, shapes[0]), name + UP: torch.ones(shapes[1], 1)}
            )
    with pytest.raises(ErasureInputError, match="which this pipeline has not"):
        with_stock_lora(
            text_map, pipe, {"transformer.x" + DOWN: torch.ones(1, 3), "transformer.x" + UP: torch.ones(3, 1)}
        )
    for limits in (
        {"rank": -1},
        {"rank": 1.5},
        {"max_error": -0.1},
        {"max_error": 2.0},
        {"error": "x"},
        {"error": 0.1},
    ):
        with pytest.raises(ErasureInputError, match=next(iter(limits))):
            with_stock_lora(text_map, pipe, **limits)
    lora = with_stock_lora(text_map, pipe).lora_for_others()
    with pytest.raises(ErasureInputError, match="are for a LoRA that is computed"):
        with_stock_lora(text_map, pipe, lora, rank=2)
    assert with_stock_lora(text_map, pipe, rank=0).config.stock.is_exact  # type: ignore[union-attr]
    summed = combine([random_erasure(pipe, concepts=(Concept("lion", "cat"),)), text_map], mode="sum")
    with pytest.raises(ErasureInputError, match="LoRA layer of its own"):
        with_stock_lora(summed, pipe)


def test_another_base_is_refused() -> None:
    """The LoRA of other weights would be another edit: those of a fine-tune, or with a LoRA fused into them."""
    text_map = random_erasure(tiny_sd_pipe(), "text_map")
    fused = tiny_sd_pipe()
    fused.load_lora_weights(style_lora(tiny_sd_pipe(), endings=("attn2.to_k", "attn2.to_v")))
    fused.fuse_lora()
    for other in (tiny_sd_pipe(seed=1, text_seed=0), fused):
        with pytest.raises(ErasureCompatibilityError, match="another edit"):
            with_stock_lora(text_map, other)


def test_the_same_layers_are_not_loaded_twice(pipe: Any) -> None:
    text_map = random_erasure(pipe, "text_map")
    pipe.load_erasure(text_map, "alone")
    with pytest.raises(ErasureInputError, match="loaded already"):
        pipe.load_erasure(with_stock_lora(text_map, pipe), "with a LoRA")


def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    """The LoRA is that of the clean base, whatever is fused."""
    text_map = random_erasure(pipe, "text_map")
    clean = with_stock_lora(text_map, pipe)
    pipe.load_erasure(random_erasure(pipe, seed=5), adapter_name="other", backend="merge")
    drawn = images(pipe)
    assert same_tensors(with_stock_lora(text_map, pipe), clean)
    assert (images(pipe) == drawn).all() and pipe.list_erasures()[0].backend == "merge"


def test_damaged_factors_are_refused(pipe: Any, tmp_path: Path) -> None:
    both = with_stock_lora(random_erasure(pipe, "text_map"), pipe)
    name = next(each for each in both.tensors[LORA_FILE] if each.endswith(DOWN))
    for change in (
        *("lost", "strange", "not finite", "shape"),
        "another component",
        "a tokenizer's",
        "no site",
        "vectors",
        "none",
    ):
        file = dict(both.tensors[LORA_FILE])
        if change == "lost":
            del file[name]
        elif change == "strange":
            file["unet.conv_in.weight"] = torch.ones(2, 2)
        elif change == "not finite":
            file[name] = file[name] * torch.nan
        elif change == "shape":
            file[name] = file[name][:1]
        elif change == "another component":
            file["vae.x" + DOWN] = file["vae.x" + UP] = torch.ones(1, 1)
        elif change == "a tokenizer's":
            file["tokenizer.x" + DOWN] = file["tokenizer.x" + UP] = torch.ones(1, 1)
        elif change == "no site":
            file["unet" + DOWN] = file["unet" + UP] = torch.ones(1, 1)
        elif change == "vectors":
            file["unet.x" + DOWN] = file["unet.x" + UP] = torch.ones(1)
        else:
            file = {}
        with pytest.raises(ErasureFileError):
            Erasure(both.config, {**both.tensors, LORA_FILE: file})
