"""Erasures of a researcher's own tensors, what stock diffusers gets of them, and artefacts of the older schema."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from diffusers_erasure import (
    Erasure,
    ErasureConfigError,
    ErasureError,
    ErasureFileError,
    ErasureInputError,
    combine,
    demo,
    with_schedule,
    with_stock_lora,
)
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.schema import CONFIG_FILE, LORA_FILE, SCHEMA, TENSOR_FILE, BaseModel, Method, Stock
from tests.helpers import UNET_SITES, assert_like, dense_edit, images, random_erasure, tiny_sd_pipe


OLD = Path(__file__).parent / "data" / "schema_1_0"
HASHES = {  # as the version that wrote them gave them
    "lora": "3026c6342a41ce86c9651fdb4d550a4fe07ff30d4e776865870315b337d6e052",
    "text_map": "f524530b522adc7204eef984a10a2abb8b8189baee4c8e22023ae7e8bfc99312",
}
SITE = UNET_SITES[0].removeprefix("unet.")


def trained_lora(pipe: Any) -> dict[str, torch.Tensor]:
    """What a user's own training script holds: peft's factors of a UNet, alpha as large as the rank."""
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_k", "to_v"], init_lora_weights=False))
    factors = {f"unet.{name}": value.clone() for name, value in get_peft_model_state_dict(pipe.unet).items()}
    pipe.unet.delete_adapters("default")
    return factors


def test_the_tensors_of_a_training_script_become_an_erasure(pipe: Any, tmp_path: Path) -> None:
    factors = trained_lora(tiny_sd_pipe())
    base = images(pipe)
    erasure = Erasure.from_lora(
        factors,
        base=pipe,
        concepts=["zebra", "lion"],
        anchors="horse",
        method=Method("mine", settings={"steps": 7}, seed=3),
        derived_from=("text_encoder", "tokenizer"),
        results={"acc_e": 0.1},
    )
    erasure.save_pretrained(tmp_path / "mine")
    read = Erasure.from_pretrained(tmp_path / "mine")
    assert [(c.target, c.anchor) for c in read.concepts] == [("zebra", "horse"), ("lion", "horse")]
    assert (read.config.method.name, read.config.method.settings, read.config.method.seed) == ("mine", {"steps": 7}, 3)
    assert read.config.stock == Stock(LORA_FILE, 0.0) and read.config.results == {"acc_e": 0.1}
    assert read.config.base_model.components.keys() >= {"unet", "text_encoder", "tokenizer"}
    pipe.load_erasure(tmp_path / "mine")
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base)
    stock = tiny_sd_pipe()
    stock.load_lora_weights(tmp_path / "mine", weight_name=LORA_FILE)
    assert_like(images(stock), images(pipe), base)
    assert "mine" in (tmp_path / "mine" / "README.md").read_text()


def test_alphas_and_unequal_ranks(pipe: Any) -> None:
    """peft's metadata scales the factors; what has less rank is padded, which changes nothing."""
    factors = random_erasure(pipe).tensors[LORA_FILE]
    halved = Erasure.from_lora(factors, base=pipe, concepts="zebra", metadata={"unet.lora_alpha": 1.5})
    name = f"unet.{SITE}.lora_B.weight"
    plain = Erasure.from_lora(factors, base=pipe, concepts="zebra", metadata={"r": 3, "lora_alpha": 1.5})
    assert torch.equal(plain.tensors[LORA_FILE][name], factors[name] * 0.5)
    with pytest.raises(ErasureFileError, match="alpha"):
        Erasure.from_lora(factors, base=pipe, concepts="zebra", metadata={"transformer.lora_alpha": 1.5})
    assert torch.equal(halved.tensors[LORA_FILE][name], factors[name] * 0.5)
    short = {**factors, f"unet.{SITE}.lora_A.weight": factors[f"unet.{SITE}.lora_A.weight"][:1]}
    short[name] = factors[name][:, :1]
    made = Erasure.from_lora(short, base=pipe, concepts="zebra").tensors[LORA_FILE]
    assert made[name].shape == factors[name].shape and torch.equal(made[name][:, :1], factors[name][:, :1])
    assert not made[name][:, 1:].any()


@pytest.mark.parametrize(
    "change",
    ["no factor", "half a pair", "shapes", "no LoRA", "not finite", "nothing"],
)
def test_what_is_no_lora_is_refused(pipe: Any, change: str) -> None:
    factors = dict(random_erasure(pipe).tensors[LORA_FILE])
    down = f"unet.{SITE}.lora_A.weight"
    if change == "no factor":
        factors["unet.conv_in.weight"] = torch.ones(2, 2)
    elif change == "half a pair":
        del factors[down]
    elif change == "shapes":
        factors[down] = torch.ones(5, 4)
    elif change == "no LoRA":
        factors = {"weight": torch.ones(2)}
    elif change == "not finite":
        factors[down] = factors[down] * torch.inf
    else:
        factors = {}
    with pytest.raises(ErasureFileError):
        Erasure.from_lora(factors, base=pipe, concepts="zebra")


def test_layers_of_several_kinds_in_one_call(pipe: Any, tmp_path: Path) -> None:
    """Tensors in float64, on gradients and not contiguous are written as they have to be."""
    generator = torch.Generator().manual_seed(0)
    width = pipe.unet.config.cross_attention_dim
    a, d = (torch.randn(width, 2, generator=generator, dtype=torch.float64).T.requires_grad_() for _ in range(2))
    lora = random_erasure(pipe, sites=("text_encoder.text_model.encoder.layers.0.self_attn.q_proj",))
    own = Layer("lora", lora.config.layers[0].sites, lora.layer_tensors(lora.config.layers[0]), "text_encoder")
    text_map = Layer("text_map", ("encoder_hidden_states",), {"A": a, "D": d}, schedule=torch.tensor([[1.0], [0.5]]))
    erasure = Erasure.from_layers([own, text_map], base=pipe, concepts="zebra", method="mine")
    erasure.save_pretrained(tmp_path)
    read = Erasure.from_pretrained(tmp_path)
    assert read.content_hash == erasure.content_hash and read.config.stock is None
    assert [(spec.file, spec.prefix) for spec in read.config.layers] == [
        (LORA_FILE, "text_encoder."),
        (TENSOR_FILE, "text_map."),
    ]
    assert read.config.layers[1].schedule is not None and read.config.layers[1].schedule.bins == 2
    assert torch.equal(read.tensors[TENSOR_FILE]["text_map.A"], a.detach().float())
    pipe.load_erasure(erasure)


def test_two_layers_of_one_kind_do_not_share_names(pipe: Any) -> None:
    width = pipe.unet.config.cross_attention_dim
    maps = [
        Layer("text_map", ("encoder_hidden_states",), {"A": torch.ones(n, width), "D": torch.ones(n, width)})
        for n in (1, 2)
    ]
    made = Erasure.from_layers(maps, base=pipe, concepts="zebra")
    assert [len(made.layer_tensors(spec)["A"]) for spec in made.config.layers] == [1, 2]
    lora = random_erasure(pipe)
    twice = [Layer("lora", spec.sites, lora.layer_tensors(spec)) for spec in lora.config.layers] * 2
    with pytest.raises(ErasureInputError, match="combine"):
        Erasure.from_layers(twice, base=pipe, concepts="zebra")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"layers": []}, ErasureInputError, "at least one layer"),
        ({"anchors": ["a", "b"]}, ErasureInputError, "1 targets and 2 anchors"),
        ({"kind": "gravity"}, ErasureConfigError, "gravity"),
        ({"sites": ("..",)}, ErasureConfigError, "cannot be the name"),
        ({"component": "vae"}, ErasureConfigError, "vae"),
        ({"tensors": {"A": torch.ones(1, 4)}}, ErasureFileError, "'A' and 'D'"),
        ({"schedule": torch.ones(2, 3)}, ErasureFileError, "schedule"),
    ],
)
def test_layers_that_cannot_be_are_refused(changes: dict[str, Any], error: type[ErasureError], says: str) -> None:
    pair = {"A": torch.ones(1, 4), "D": torch.ones(1, 4)}
    fields = {"kind": "text_map", "sites": ("encoder_hidden_states",), "tensors": pair}
    own = {name: value for name, value in changes.items() if name not in ("layers", "anchors")}
    rest = {"layers": [Layer(**{**fields, **own})], **{k: v for k, v in changes.items() if k not in own}}
    with pytest.raises(error, match=says):
        Erasure.from_layers(base=BaseModel("stable-diffusion"), concepts="zebra", **rest)


def test_lists_arrays_and_generators_are_taken(tmp_path: Path) -> None:
    """What is natural to give is given back as the configuration reads it; the caller's memory stays the caller's."""
    shared = np.ones((1, 4), dtype=np.float32)
    layer = Layer("text_map", ["encoder_hidden_states"], {"A": shared, "D": shared}, schedule=[1.0, 0.5])  # type: ignore[arg-type]
    made = Erasure.from_layers(
        (each for each in [layer]),  # type: ignore[arg-type]
        base=BaseModel("stable-diffusion"),
        concepts="zebra",
        method=Method("mine", {"betas": (0.9, 0.99)}),
        diagnostics={"sizes": (1, 2)},
    )
    made.save_pretrained(tmp_path)
    before = made.content_hash
    shared[:] = 0
    assert made.content_hash == before == Erasure.from_pretrained(tmp_path).content_hash
    assert made.config.method.settings == {"betas": [0.9, 0.99]} and made.config.diagnostics == {"sizes": [1, 2]}
    for name in ("diagnostics", "results"):
        for odd in ({"x": float("nan")}, {"x": torch.ones(1)}):
            with pytest.raises(ErasureInputError, match=name):
                Erasure.from_layers([layer], base=BaseModel("stable-diffusion"), concepts="zebra", **{name: odd})


# ------------------------------------------------------------------------------------------------- the older schema


@pytest.mark.parametrize("name", list(HASHES))
def test_an_artefact_of_schema_1_0_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    """Written by the version before schema 1.1, but for what it says of the base and the picture: the embedded model is another."""
    shutil.copytree(OLD / name, tmp_path / name)
    erasure = Erasure.from_pretrained(tmp_path / name)
    assert erasure.content_hash == HASHES[name]
    stated = json.loads((OLD / name / CONFIG_FILE).read_text())
    assert stated["schema"] == "1.0" and erasure.config.schema == SCHEMA
    if name == "lora":
        assert erasure.config.stock == Stock(LORA_FILE, stated["stock"]["max_error"], "exact", {})
    else:
        assert erasure.config.stock is None and erasure.config.layers[0].schedule is not None
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe("a photo of a cat", num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]

    base = np.asarray(draw(), dtype=int)
    pipe.load_erasure(tmp_path / name, adapter_name="old", strict_base="error")
    drawn = np.asarray(draw(), dtype=int)
    then = np.asarray(Image.open(OLD / f"{name}.png"), dtype=int)
    assert abs(drawn - then).max() <= 2 < abs(base - then).max()  # 8 bits, another processor's rounding
    again = Erasure.from_files(erasure.to_files())
    assert again.config.schema == SCHEMA and again.content_hash == HASHES[name]


def test_the_older_schema_is_read_strictly(tmp_path: Path) -> None:
    shutil.copytree(OLD / "lora", tmp_path / "lora")
    path = tmp_path / "lora" / CONFIG_FILE
    config = json.loads(path.read_text())
    for stock in ({"file": LORA_FILE, "error": 0.0}, {"file": LORA_FILE}, "exact"):
        path.write_text(json.dumps({**config, "stock": stock}))
        with pytest.raises(ErasureConfigError, match="schema 1.0"):
            Erasure.from_pretrained(tmp_path / "lora")


def test_the_older_schema_had_no_other_form(pipe: Any, tmp_path: Path) -> None:
    """There `stock` said that the LoRA file is the whole erasure."""
    with_stock_lora(random_erasure(pipe, "text_map"), pipe).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "schema": "1.0", "stock": {"file": LORA_FILE, "max_error": 0.0}}))
    with pytest.raises(ErasureConfigError, match="lies outside the LoRA file"):
        Erasure.from_pretrained(tmp_path)


def test_parts_of_the_older_schema_are_combined(tmp_path: Path) -> None:
    old = Erasure.from_pretrained(OLD / "lora")
    other = random_erasure(
        demo.load_pipeline(), sites=("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",)
    )
    summed = combine([old, other], mode="sum")
    assert summed.config.stock is not None and summed.config.stock.is_exact
    assert summed.config.stock.error == pytest.approx(old.config.stock.error, rel=0.5)  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------- exact, approximate


def test_a_modified_layer_is_no_exact_lora(pipe: Any) -> None:
    erasure = random_erasure(pipe)
    assert erasure.config.stock is not None
    late = with_schedule(erasure, [1.0, 0.5])
    assert late.config.stock is None
    with pytest.raises(ErasureConfigError, match="no LoRA has"):
        dataclasses.replace(late.config, stock=Stock(LORA_FILE, 0.0))
    dataclasses.replace(late.config, stock=Stock(LORA_FILE, 0.5, "approximate"))
