"""Whole erased models: exact, self-contained, known again, and the pipeline as before."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_erasure import Erasure, ErasureConfigError, ErasureError, ErasureInputError, export_erased
from diffusers_erasure.formats.erased_model import render_model_card
from diffusers_erasure.schema import SCHEMA, BaseModel, Concept, Library
from diffusers_erasure.schema.erased_model import Contained, Provenance, contained_config
from tests.helpers import (
    CONV_SITES,
    TEXT_SITES,
    UNET_SITES,
    assert_merged_weights,
    assert_same_weights,
    dense_edit,
    equal,
    images,
    random_erasure,
    style_lora,
    tiny_sd_pipe,
    weights,
)


CONCEPTS = (Concept("cat", "animal"), Concept("Van Gogh", None))
SITES = UNET_SITES + CONV_SITES[:2] + TEXT_SITES[:1]


@cache  # none changes one
def make(kind: str = "lora", seed: int = 0, **arguments: Any) -> Erasure:
    return random_erasure(tiny_sd_pipe(), kind, SITES, size=0.5, seed=seed, **arguments)


def as_before(pipe: Any, action: Callable[[], Any]) -> Any:
    """Run `action`; assert that weights, images and the list of erasures are exactly as before."""
    drawn, values, listed = images(pipe), weights(pipe), pipe.list_erasures()
    result = action()
    assert_same_weights(values, weights(pipe))
    assert equal(images(pipe), drawn)
    assert pipe.list_erasures() == listed
    return result


def open_model(folder: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["lora", "text_map"])
def test_the_model_and_the_pipeline_after(pipe: Any, tmp_path: Path, kind: str) -> None:
    one, two = make(kind), make(kind, 1)
    pipe.load_erasure(one, "one", strength=0.7)
    pipe.load_erasure(two, "two")
    files = as_before(pipe, lambda: pipe.export_erased(tmp_path / "model", "one"))
    assert set(files) == {path for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    back = open_model(tmp_path / "model")
    assert_merged_weights(weights(back), weights(dense_edit(tiny_sd_pipe(), (one, 0.7))))
    assert [(info.backend, info.strength) for info in pipe.list_erasures()] == [("hook", 0.7), ("hook", 1.0)]

    provenance = Provenance.from_json((tmp_path / "model" / "erasure_config.json").read_bytes())
    assert [(e.name, e.strength, e.content_hash) for e in provenance.contains] == [("one", 0.7, one.content_hash)]
    assert provenance.contains[0].config["concepts"] == [{"target": "zebra", "anchor": "horse"}]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "zebra" in card and "An erased model" in card
    with pytest.raises(ErasureConfigError, match="whole erased model"):
        Erasure.from_pretrained(tmp_path / "model")


def test_fused_ones_are_fused_again(pipe: Any, tmp_path: Path) -> None:
    one, two = make(), make(seed=1)
    pipe.load_erasure(one, "one", backend="merge")
    pipe.load_erasure(two, "two")
    as_before(pipe, lambda: export_erased(pipe, tmp_path / "both"))
    as_before(pipe, lambda: export_erased(pipe, tmp_path / "two", ["two"]))
    assert [info.backend for info in pipe.list_erasures()] == ["merge", "hook"]
    both = weights(open_model(tmp_path / "both"))
    assert_merged_weights(both, weights(dense_edit(tiny_sd_pipe(), one, two)))
    assert_merged_weights(weights(open_model(tmp_path / "two")), weights(dense_edit(tiny_sd_pipe(), two)))


@pytest.mark.parametrize("how", ["provenance", "as the Hub downloads it", "weights", "half"])
@pytest.mark.parametrize("kind", ["lora", "text_map"])
def test_already_contained(pipe: Any, tmp_path: Path, how: str, kind: str) -> None:
    erasure = make(kind)
    pipe.load_erasure(erasure, "one", strength=0.8)
    export_erased(pipe, tmp_path / "model")
    folder = tmp_path / "model"
    if how != "provenance":
        (folder / "erasure_config.json").unlink()
    if how in ("weights", "half"):
        (folder / "scheduler" / "erasure_config.json").unlink()
    back = open_model(folder)
    if how == "half":
        back.to(torch.float16)
    before = weights(back)
    with pytest.raises(ErasureInputError, match="already contained"):
        back.load_erasure(erasure, strict_base="ignore")
    assert_same_weights(weights(back), before)
    assert back.list_erasures() == []
    other = back.load_erasure(make(kind, 5), "other", strict_base="ignore")  # another is not taken for it
    assert other.base_match["unet"] == "different weights"


def test_several_contained_and_other_weights(pipe: Any, tmp_path: Path) -> None:
    one, two = make(), make(seed=1)
    pipe.load_erasure(one, "one")
    pipe.load_erasure(two, "two")
    export_erased(pipe, tmp_path / "model")
    back = open_model(tmp_path / "model")
    for erasure in (one, two):
        with pytest.raises(ErasureInputError, match="already contained"):
            back.load_erasure(erasure, strict_base="ignore")
    # The file speaks of the folder's weights alone: with those of the base model put back it does not count.
    back.unet.load_state_dict(tiny_sd_pipe().unet.state_dict())
    back.text_encoder.load_state_dict(tiny_sd_pipe().text_encoder.state_dict())
    back.load_erasure(one, strict_base="error")
    assert equal(images(back), images(_with(one)))


def _with(erasure: Erasure) -> Any:
    pipe = tiny_sd_pipe()
    pipe.load_erasure(erasure)
    return pipe


def test_what_stock_diffusers_has_fused_is_known_too(pipe: Any) -> None:
    erasure = random_erasure(pipe, "lora", UNET_SITES)
    pipe.load_lora_weights({k: v for items in erasure.tensors.values() for k, v in items.items()})
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(ErasureInputError, match="already contained"):
        pipe.load_erasure(erasure)


def test_a_damaged_provenance_file_is_left_aside(pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe.load_erasure(make(), "one")
    export_erased(pipe, tmp_path / "model")
    for text in ('{"kind": "erased-model"}', '{"kind": "erased-model"' + "[" * 100_000):
        for place in ("erasure_config.json", "scheduler/erasure_config.json"):
            (tmp_path / "model" / place).write_text(text)
        back = open_model(tmp_path / "model")
        back.load_erasure(make(seed=4), strict_base="ignore")
        assert "was left aside" in caplog.text
        caplog.clear()


def test_refused(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ErasureInputError, match="No erasure"):
        export_erased(pipe, tmp_path / "model")
    pipe.load_erasure(make(), "one", strength=0)
    with pytest.raises(ErasureInputError, match="off"):
        export_erased(pipe, tmp_path / "model")
    pipe.set_erasures("one", 1.0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ErasureInputError, match="empty folder"):
        export_erased(pipe, tmp_path / "full")
    before = weights(pipe)
    for error in (OSError("disk full"), ValueError("odd")):

        def fail(folder: Path, error: Exception = error) -> None:
            folder.mkdir()
            (folder / "half").touch()
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(pipe, "save_pretrained", fail)
            with pytest.raises((ErasureError, ValueError)):
                export_erased(pipe, tmp_path / "model")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
        assert_same_weights(weights(pipe), before)
        assert pipe.list_erasures()[0].backend == "hook"
    pipe.load_lora_weights(style_lora(tiny_sd_pipe()))
    with pytest.raises(ErasureInputError, match="LoRAs"):
        export_erased(pipe, tmp_path / "model")


def test_hostile_concepts_on_the_card(pipe: Any, tmp_path: Path) -> None:
    text = "a |[x](y)\n<script>"
    pipe.load_erasure(make(concepts=(Concept(text, None),)), "one")
    export_erased(pipe, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "<script>" not in card and "[x](y)" not in card
    assert json.loads((tmp_path / "model" / "erasure_config.json").read_text())["contains"][0]["config"]["concepts"]
    shutil.rmtree(tmp_path / "model")


def test_the_rendered_example_of_the_card() -> None:
    """`hub_cards/example_erased_model.md` is what the template gives; with `UPDATE_CARDS=1` it is written."""
    base = BaseModel("stable-diffusion", "CompVis/stable-diffusion-v1-4")
    erasure = random_erasure(tiny_sd_pipe(), "lora", SITES, size=0.5, base=base, concepts=CONCEPTS)
    config = {**contained_config(erasure.config), "library": {"name": "diffusers_erasure", "version": "0.1.0"}}
    provenance = Provenance(
        schema=SCHEMA,
        kind="erased-model",
        library=Library("diffusers_erasure", "0.1.0"),
        base_model=BaseModel("stable-diffusion", "CompVis/stable-diffusion-v1-4", "0" * 40),
        erased_model={},
        contains=(Contained("no-cat", 1.0, "0" * 64, config),),
    )
    path = Path(__file__).resolve().parents[1] / "hub_cards" / "example_erased_model.md"
    text = render_model_card(provenance)
    if os.environ.get("UPDATE_CARDS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text
    assert ModelCard(text).data.base_model == "CompVis/stable-diffusion-v1-4"
