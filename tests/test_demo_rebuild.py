"""What trains the embedded model, in tools/."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_erasure import demo
from diffusers_erasure.demo.dataset import load_dataset
from diffusers_erasure.errors import ErasureInputError
from tools.demo_model.captions import Captions


ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    """A valid pair of files, and a function that writes them with changes."""
    images = np.zeros((2, 3, 32, 32, 3), np.uint8)
    labels = {
        "styles": ["a", "b", "c"],
        "objects": [{"object": "cat", "synonyms": ["pet"]}, {"object": "yak", "synonyms": ["animal", "ox", "pet"]}],
    }

    def write(images=images, labels=labels, key="images"):
        np.savez(tmp_path / "x.npz", **{key: images})
        text = labels if isinstance(labels, str) else json.dumps(labels)
        (tmp_path / "x.json").write_text(text)
        return tmp_path / "x.npz", tmp_path / "x.json"

    return images, labels, write


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smoke_rebuild(tmp_path):
    from diffusers import StableDiffusionPipeline

    from diffusers_erasure.demo.judge import Judge

    assets = Path(str(demo.assets()))
    output = tmp_path / "new" / "model64"
    command = [sys.executable, "-m", "tools.demo_model", "--smoke"]
    command += ["--images", str(assets / "emoji64.npz"), "--labels", str(assets / "emoji64.json")]
    subprocess.run([*command, "--output", str(output)], check=True, cwd=ROOT, capture_output=True)
    assert [path.name for path in output.parent.iterdir()] == ["model64"]

    pipe = StableDiffusionPipeline.from_pretrained(output / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a cat in ink style", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
    shipped = demo.load_pipeline()
    for name in ("unet", "vae", "text_encoder"):
        shapes = {key: value.shape for key, value in getattr(pipe, name).state_dict().items()}
        other = {key: value.shape for key, value in getattr(shipped, name).state_dict().items()}
        # Fewer objects have fewer words.
        shapes.pop("embeddings.token_embedding.weight", None), other.pop("embeddings.token_embedding.weight", None)
        assert shapes == other
    assert dict(pipe.scheduler.config).items() <= dict(shipped.scheduler.config).items()
    assert Judge.from_file(output / "judge.safetensors").predict(images).objects[0] in demo.OBJECTS[:8]
    record = json.loads((output / "rebuild.json").read_text())
    assert list(record) == ["vae", "tokenizer", "model", "judge"]

    # One stage on top of the others leaves those as they are, and the same seed gives the same weights.
    unet = (output / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    judge = (output / "judge.safetensors").read_bytes()
    subprocess.run([*command, "--output", str(output), "--stage", "judge"], check=True, cwd=ROOT, capture_output=True)
    assert (output / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == unet
    assert (output / "judge.safetensors").read_bytes() == judge


def test_rebuild_refuses_a_folder_of_others(tmp_path, source):
    from tools.demo_model.rebuild import rebuild

    dataset = load_dataset(*source[2]())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(ErasureInputError, match="other files"):
        rebuild(dataset, tmp_path / "out")
    with pytest.raises(ErasureInputError, match="a file"):
        rebuild(dataset, tmp_path / "out" / "thesis.txt")
    with pytest.raises(ErasureInputError, match="no stages"):
        rebuild(dataset, tmp_path / "other", stages=["unet"])
    with pytest.raises(ErasureInputError, match="needs the vae"):
        rebuild(dataset, tmp_path / "other", stages=["judge"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.json", "x.npz"]


def test_command_refuses_bad_steps(tmp_path, source):
    from tools.demo_model.rebuild import main

    images, labels = source[2]()
    arguments = ["--images", str(images), "--labels", str(labels), "--output", str(tmp_path / "out")]
    with pytest.raises(ErasureInputError, match="steps must be positive"):
        main([*arguments, "--steps-vae", "0"])


def test_dataset(source):
    dataset = load_dataset(*source[2]())
    assert dataset.objects == ("cat", "yak") and dataset.size == 32
    assert dataset.keywords[1] == ("animal", "ox", "pet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images.astype(np.float32), "uint8"),
        (lambda images: images[..., :1], "shape"),
        (lambda images: images[0], "shape"),
        (lambda images: images[:, :, :, :16], "shape"),
        (lambda images: images[:0], "shape"),
        (lambda images: np.zeros((2, 3, 40, 40, 3), np.uint8), "multiple of 32"),
        (lambda images: images[:1], "1 objects in 3 styles"),
        (lambda images: images[:, :2], "2 objects in 2 styles"),
    ],
)
def test_dataset_refuses_bad_images(source, change, message):
    images, _, write = source
    with pytest.raises(ErasureInputError, match=message):
        load_dataset(*write(images=change(images)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ({"styles": None}, "list 'styles'"),
        ({"objects": []}, "list 'objects'"),
        ({"objects": ["cat", "yak"]}, "Each entry"),
        ({"objects": [{"word": "cat"}, {"object": "yak"}]}, "distinct"),
        ({"objects": [{"object": "cat"}, {"object": "cat"}]}, "distinct"),
        ({"styles": ["a", "", "c"]}, "distinct"),
        ({"objects": [{"object": "cat", "synonyms": "pet"}, {"object": "yak"}]}, "synonyms"),
    ],
)
def test_dataset_refuses_bad_labels(source, change, message):
    _, labels, write = source
    with pytest.raises(ErasureInputError, match=message):
        load_dataset(*write(labels=change if isinstance(change, str) else {**labels, **change}))


def test_dataset_refuses_bad_files(source, tmp_path):
    images, labels = source[2](key="pictures")
    with pytest.raises(ErasureInputError, match="no key 'images'"):
        load_dataset(images, labels)
    with pytest.raises(ErasureInputError, match="cannot be read"):
        load_dataset(tmp_path / "missing.npz", labels)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ErasureInputError, match="cannot be read"):
        load_dataset(tmp_path / "text.npz", labels)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ErasureInputError, match="single array"):
        load_dataset(tmp_path / "single.npy", labels)
    np.savez(tmp_path / "pickled.npz", images=np.array([{"code": 1}], dtype=object))
    with pytest.raises(ErasureInputError, match="cannot be read"):
        load_dataset(tmp_path / "pickled.npz", labels)


def test_captions(source):
    captions = Captions(load_dataset(*source[2]()))
    cat, yak = captions.words
    assert cat.synonyms == demo.SYNONYMS["cat"] and cat.hypernyms == ("animal",)
    # "pet" belongs to both, "animal" is a hypernym: neither is a name of the yak.
    assert yak.synonyms == ("ox",) and yak.hypernyms == ("animal",)
    drawn = [captions.draw(1, 2, random.Random(seed)) for seed in range(2000)]
    assert drawn.count("") / 2000 == pytest.approx(0.10, abs=0.03)
    assert sum("animal" in caption for caption in drawn) / 2000 == pytest.approx(0.09, abs=0.03)
    assert sum("ox" in caption for caption in drawn) / 2000 == pytest.approx(0.135, abs=0.03)
    assert "a yak in c style" in drawn and "a yak" in drawn


def test_tokenizer_has_the_form_of_the_shipped_one():
    from tools.demo_model.train_tokenizer import TokenizerSettings, train_tokenizer

    tokenizer = train_tokenizer(Captions(demo.load_images()), TokenizerSettings())
    shipped = demo.load_pipeline().tokenizer
    assert 500 < len(tokenizer) <= len(shipped) == 531
    for text in ("a Cat in ink style", "an emoji of a strawberry, flat style", ""):
        ids = tokenizer(text, padding="max_length").input_ids
        assert len(ids) == 24 and ids[0] == 0 and ids[-1] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == shipped.decode(
            shipped(text).input_ids, skip_special_tokens=True
        )
    # Words of objects are one piece each; a strange word falls into letters and none is lost.
    assert len(tokenizer("cat").input_ids) == 3
    assert 1 not in tokenizer("xylophonist").input_ids[1:-1]


def test_padding_hides_the_words():
    from tools.demo_model.train_model import ModelSettings, hide_padding

    tokens = torch.tensor([[0, 5, 6, 1, 1, 1], [0, 7, 1, 1, 1, 1], [0, 5, 6, 7, 8, 1]])
    rows = torch.arange(18.0).view(3, 6, 1)
    empty = -torch.arange(6.0).view(6, 1)

    def hidden(**shares):
        settings = ModelSettings(**{"empty_share": 0.0, "other_share": 0.0, "masked_share": 0.0, **shares})
        return hide_padding(rows, empty, tokens, 1, settings, torch.rand(3))

    same, mask = hidden()
    assert torch.equal(same, rows) and mask.all()
    changed, mask = hidden(empty_share=1.0)
    assert changed[0, :, 0].tolist() == [0, 1, 2, -3, -4, -5] and mask.all()
    # From the prompt before it, and from that one's end on: its words must not come along.
    changed, _ = hidden(other_share=1.0)
    assert changed[0, :, 0].tolist() == [0, 1, 2, 17, 17, 17]
    assert changed[1, :, 0].tolist() == [6, 7, 3, 3, 4, 5]
    same, mask = hidden(masked_share=1.0)
    assert torch.equal(same, rows) and mask[1].tolist() == [True, True, False, False, False, False]
