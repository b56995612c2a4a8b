"""What trains the tiny models of other families, in tools/."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from diffusers_erasure import ErasureInputError, demo
from diffusers_erasure.base_model import family_of
from diffusers_erasure.demo.worlds import folder_of, world_of
from tests.worlds import in_a_checkout
from tools.demo_model.captions import Captions
from tools.demo_model.train_tokenizer import TokenizerSettings, train_tokenizer
from tools.demo_worlds.families import FAMILIES, Batch, packed
from tools.demo_worlds.rebuild import main
from tools.demo_worlds.tokenizing import train_t5_tokenizer
from tools.graph_loop import LoopSettings, train


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("worlds") / "new"
    main([*FAMILIES, "--smoke", "--device", "cpu", "--output", str(output)])
    return output


@pytest.mark.parametrize("name", FAMILIES)
def test_smoke_rebuild(name: str, rebuilt: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(rebuilt / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert world_of(pipe) is demo.settings(name) and family_of(pipe).name == demo.settings(name).family
    call = {**demo.call_arguments(name), "num_inference_steps": 1, "output_type": "np"}
    images = pipe("a cat in ink style", generator=torch.Generator().manual_seed(0), **call).images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
    assert "name_or_path" not in (rebuilt / name / "vae" / "config.json").read_text()
    record = json.loads((rebuilt / "rebuild.json").read_text())
    assert list(record) == list(FAMILIES) and record[name]["measured"]["steps"] == 3


@in_a_checkout
@pytest.mark.parametrize("name", FAMILIES)
def test_the_recipe_has_the_form_of_the_shipped_models(name: str, rebuilt: Path) -> None:
    shipped = folder_of(demo.settings(name))
    written = {path.relative_to(rebuilt / name) for path in (rebuilt / name).rglob("*") if path.is_file()}
    assert written == {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()}
    for file in (each for each in written if each.name in ("config.json", "scheduler_config.json")):
        one, other = (json.loads((folder / file).read_text()) for folder in (shipped, rebuilt / name))
        for config in (one, other):  # fewer objects have fewer words; and versions differ
            for key in [key for key in config if key == "vocab_size" or key.endswith("_version")]:
                del config[key]
        assert one == other, file


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loss_leaves_its_device_alone(name: str) -> None:
    """On no device at all whatever waits for a number, or comes from the CPU, is an error; so it is in a CUDA graph."""
    captions = Captions(demo.load_images().first(1))
    clip = train_tokenizer(captions, TokenizerSettings())
    family = FAMILIES[name](clip, None if name == "sdxl" else train_t5_tokenizer(captions))
    family.to(torch.device("meta"))
    with torch.device("meta"):
        tokens = torch.zeros(5, 24, dtype=torch.long), torch.zeros(5, 32, dtype=torch.long)
        batch = Batch(torch.zeros(4, 8, 8, 8), tokens[0], None if name == "sdxl" else tokens[1], torch.zeros(3, 4))
    family.loss(batch).backward()
    # Through some sample every encoder is trained.
    assert all(any(each.grad is not None for each in module.parameters()) for module in family.modules)


def test_squares_are_packed_as_the_pipeline_does() -> None:
    latents = torch.randn(2, 8, 8, 8)
    assert torch.equal(packed(latents, 2), FluxPipeline._pack_latents(latents, 2, 8, 8, 8))


def test_words_are_whole_and_strange_ones_are_spelt() -> None:
    tokenizer = train_t5_tokenizer(Captions(demo.load_images()))
    assert tokenizer.tokenize("a picture of a pineapple in twemoji style") == [
        "▁a", "▁picture", "▁of", "▁a", "▁pineapple", "▁in", "▁twemoji", "▁style",
    ]  # fmt: skip
    assert tokenizer.tokenize("a zebu, flat") == ["▁a", "▁", "z", "e", "b", "u", ",", "▁flat"]
    assert tokenizer.unk_token_id not in tokenizer("xylophonist").input_ids
    assert tokenizer("").input_ids == [1] and tokenizer.pad_token_id == 0


def test_the_loop_learns_and_ends_with_its_schedule() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    seen: list[float] = []

    def loss() -> torch.Tensor:
        seen.append(module.weight.item())
        return (module.weight - 0.25).square().sum()

    settings = LoopSettings(seconds=60, steps=400, learning_rate=0.02, decay=0.9)
    measured = train([module], loss, settings)
    assert measured["steps"] == len(seen) == 400
    assert module.weight.item() == pytest.approx(0.25, abs=0.01)
    # Slow, fast, slow: the warm-up, the peak and the end of the cosine.
    moved = np.abs(np.diff(seen))
    assert moved[:10].max() < 0.01 < moved[20:60].max() and moved[-40:].max() < 0.002
    assert train([module], loss, LoopSettings(seconds=0.05, steps=10**9))["seconds"] < 5


def test_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ErasureInputError, match="other files"):
        main(["flux", "--smoke", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(ErasureInputError, match="must be positive"):
        main(["flux", "--steps", "0", "--output", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
