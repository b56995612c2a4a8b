"""Maps at the doors of transformers: what is refused, doors that are not called, LoRAs, whole models and quantised doors."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInactiveError,
    ErasureInputError,
    combine,
    load_erasure,
    with_stock_lora,
)
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.schema import BaseModel, Concept
from tests.tiny_families import (
    DOOR,
    EXACT,
    FAMILIES,
    FLUX,
    KINDS,
    POOLED,
    QWEN,
    ROWS,
    SD3,
    Z,
    apart,
    assert_close,
    base,
    edit,
    edited,
    erasure_of,
    linears,
    loaded,
    maps_of,
    plain,
    predict,
    rows,
    summed,
    texts,
)


# -------------------------------------------------------------------------------------------------- what is refused


def alone(source: str, width: int, component: str = "transformer", family: str = "flux") -> Erasure:
    tensors = {"A": rows(width, 1)[0, :2], "D": rows(width, 2)[0, :2]}
    layer = Layer("text_map", (source,), tensors, component)
    return Erasure.from_layers([layer], base=BaseModel(family), concepts="zebra")


@pytest.mark.parametrize(
    ("name", "source", "width"),
    [
        (FLUX, DOOR, 20),
        ("Chroma", POOLED, 12),
        (QWEN, POOLED, 12),
        ("SD 2", "text_embeds", 12),
        ("SD 2", DOOR, 20),
        (SD3, "text_embeds", 12),
        (FLUX, ROWS, 21),
        (FLUX, POOLED, 20),
        (QWEN, DOOR, 21),
        (QWEN, ROWS, 21),
        (Z, DOOR, 12),
        ("SDXL refiner", "text_embeds", 5),
        ("PixArt-Σ", ROWS, 16),
    ],
)
def test_made_for_another_architecture(name: str, source: str, width: int) -> None:
    tiny = FAMILIES[name]
    pipe = tiny.make()
    with pytest.raises(ErasureCompatibilityError, match="another architecture"):
        pipe.load_erasure(alone(source, width, tiny.component))
    assert torch.equal(tiny.draw(pipe), base(name)) and pipe.list_erasures() == []


def test_a_denoiser_that_was_built_without_its_door() -> None:
    tiny = FAMILIES["PixArt-Σ"]
    pipe = dataclasses.replace(tiny, config={**tiny.config, "caption_channels": None}).make()
    with pytest.raises(ErasureCompatibilityError, match=r"no 'caption_projection.linear_1'.*another architecture"):
        pipe.load_erasure(alone(ROWS, 16))


def test_no_module_is_an_input() -> None:
    for source in ("txt_in", "context_embedder", "prompt_embeds"):
        with pytest.raises(ErasureFileError, match="one site, one of"):
            alone(source, 20)


def test_another_family() -> None:
    flux, sd3 = FAMILIES[FLUX], FAMILIES[SD3].make()
    with pytest.raises(ErasureCompatibilityError, match="made for flux"):
        sd3.load_erasure(erasure_of(flux, flux.make(), maps_of(flux)))


def test_two_transformers_that_take_turns() -> None:
    """Wan 2.2: the second one would read the concept."""
    tiny = FAMILIES["Wan"]
    pipe = tiny.make()
    erasure = erasure_of(tiny, pipe, maps_of(tiny))
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    with pytest.raises(ErasureCompatibilityError, match="transformer_2"):
        pipe.load_erasure(erasure)
    assert pipe.list_erasures() == []


@pytest.mark.parametrize("name", [QWEN, Z, "Lumina 2"])
def test_before_a_norm_a_map_is_no_change_of_weights(name: str) -> None:
    tiny = FAMILIES[name]
    pipe, maps = tiny.make(), maps_of(tiny, sources=(ROWS,))
    erasure = erasure_of(tiny, pipe, maps)
    pipe.load_erasure(erasure)
    drawn, (a, d) = tiny.draw(pipe), maps[ROWS]
    with pytest.raises(ErasureCompatibilityError, match="known to be linear"):
        pipe.fuse_erasures()
    assert torch.equal(tiny.draw(pipe), drawn)
    pipe.unload_erasure()
    with pytest.raises(ErasureInputError, match="No LoRA"):
        with_stock_lora(erasure, pipe)
    mapped = {
        key: [each + each @ a.T @ d for each in text] if isinstance(text, list) else text + text @ a.T @ d
        for key, text in texts(tiny).items()
        if key.endswith("prompt_embeds")
    }
    assert_close(drawn, tiny.draw(pipe, **mapped), base(name))


# ---------------------------------------------------------------------------------------- a door without its edit


class Bare(nn.Module):
    """Computes with a door's weight and does not call it."""

    def __init__(self, door: nn.Linear) -> None:
        super().__init__()
        self.door = (door,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.door[0].weight, self.door[0].bias)


def test_a_door_that_is_not_called_is_an_error() -> None:
    pipe = loaded(QWEN)
    model, forward = pipe.transformer, pipe.transformer.forward

    def bypassing(*args: Any, **kwargs: Any) -> Any:
        door = model.txt_in
        model.txt_in = Bare(door)
        try:
            return forward(*args, **kwargs)
        finally:
            model.txt_in = door

    model.forward = bypassing
    with pytest.raises(ErasureInactiveError, match="'txt_in'"):
        FAMILIES[QWEN].draw(pipe)
    del model.forward
    model.txt_in = copy.deepcopy(model.txt_in)
    with pytest.raises(ErasureInactiveError, match="another module took its place"):
        FAMILIES[QWEN].draw(pipe)


# ------------------------------------------------------------------------------------- LoRAs, whole models, quantised


@pytest.mark.parametrize("name", KINDS)
def test_beside_a_users_lora_on_the_door(name: str) -> None:
    """Rows that are mapped as they are given reach the LoRA too, (W + U) T; behind a norm the door alone reads them, W T + U."""
    tiny, pipe = FAMILIES[name], loaded(name)
    maps, style = maps_of(tiny), maps_of(tiny, 5)
    lora = with_stock_lora(erasure_of(tiny, tiny.make(), style), tiny.make()).lora_for_others()
    pipe.load_lora_weights(lora)
    if name == QWEN:
        expected = edit(tiny, tiny.make(), summed((maps, 1.0), (style, 1.0)))
    else:
        expected = edit(tiny, edit(tiny, tiny.make(), style), maps)
    assert_close(tiny.draw(pipe), tiny.draw(expected), edited(name))


@pytest.mark.parametrize("name", KINDS)
def test_a_sum_carries_the_sum_of_their_loras(name: str) -> None:
    tiny = FAMILIES[name]
    pipe = tiny.make()
    parts = [
        dataclasses.replace(each, config=dataclasses.replace(each.config, concepts=(Concept(concept, "horse"),)))
        for concept, seed in (("zebra", 0), ("lion", 1))
        for each in [with_stock_lora(erasure_of(tiny, pipe, maps_of(tiny, seed)), pipe)]
    ]
    whole = combine(parts, mode="sum")
    assert whole.config.stock is not None and whole.config.stock.is_exact
    pipe.load_lora_weights(whole.lora_for_others())
    maps = summed((maps_of(tiny), 1.0), (maps_of(tiny, 1), 1.0))
    assert_close(tiny.draw(pipe), tiny.draw(edit(tiny, tiny.make(), maps)), base(name))


def test_a_whole_erased_model(tmp_path: Path) -> None:
    pipe = loaded(FLUX)
    pipe.export_erased(tmp_path / "erased")
    missing = dict.fromkeys(FAMILIES[FLUX].parts)
    made = FluxPipeline.from_pretrained(tmp_path / "erased", **missing)
    made.set_progress_bar_config(disable=True)
    assert_close(FAMILIES[FLUX].draw(made), edited(FLUX), base(FLUX))


def test_a_quantised_door() -> None:
    """A map acts on it, its LoRA is computed from it, and it cannot be fused into it."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    flux = FAMILIES[FLUX]
    tiny = dataclasses.replace(flux, config={**flux.config, "joint_attention_dim": 32}, widths={ROWS: 32, POOLED: 12})

    def made(packed: bool) -> Any:
        pipe = tiny.make()
        door, kind = pipe.transformer.context_embedder, gguf.GGMLQuantizationType.Q8_0
        data = torch.from_numpy(gguf.quants.quantize(door.weight.numpy(), kind))
        weight = GGUFParameter(data, quant_type=kind)
        if packed:
            small = GGUFLinear(32, len(door.weight), bias=True, compute_dtype=torch.float32)
            small.weight, small.bias = weight, door.bias
            pipe.transformer.context_embedder = small
        else:
            door.weight.data = dequantize_gguf_tensor(weight).float()
        return pipe

    pipe, maps = made(packed=True), maps_of(tiny)
    erasure = dataclasses.replace(erasure_of(tiny, made(packed=False), maps))
    pipe.load_erasure(erasure, strict_base="ignore")
    expected = tiny.draw(edit(tiny, made(packed=False), maps))
    assert_close(tiny.draw(pipe), expected, tiny.draw(made(packed=False)))
    with pytest.raises(ErasureCompatibilityError, match="quantised"):
        pipe.fuse_erasures()
    pipe.unload_erasure()
    stock = with_stock_lora(erasure, pipe).lora_for_others()
    exact = with_stock_lora(erasure, made(packed=False)).lora_for_others()
    for site in ("context_embedder", "time_text_embed.text_embedder.linear_1"):
        products = [
            each[f"transformer.{site}.lora_B.weight"] @ each[f"transformer.{site}.lora_A.weight"]
            for each in (stock, exact)
        ]
        assert apart(*products) < EXACT


def test_by_function_on_something_with_no_more_than_a_transformer() -> None:
    """As benchmarks have it: no pipeline, no encoders."""

    class Only:
        transformer = FAMILIES[FLUX].make().transformer

    load_erasure(Only, alone(ROWS, 20), "one")
    tensors = {"A": rows(20, 1)[0, :2], "D": rows(20, 2)[0, :2]}
    expected = FAMILIES[FLUX].make()
    for linear in linears(FAMILIES[FLUX], expected, ROWS).values():
        linear.weight.data += linear.weight @ tensors["D"].T @ tensors["A"]
    assert_close(predict(FLUX, Only.transformer), predict(FLUX, expected.transformer), plain(FLUX))
