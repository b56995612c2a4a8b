"""The embedded model and its judge, as packaged."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_erasure import demo
from diffusers_erasure.errors import ErasureInputError


PROMPTS = [
    ("cat", "noto"),
    ("dog", "ink"),
    ("penguin", "twemoji"),
    ("octopus", "flat"),
    ("banana", "fluent"),
    ("pizza", "noto"),
    ("rocket", "ink"),
    ("guitar", "flat"),
]


@pytest.fixture(scope="module")
def pipe():
    return demo.load_pipeline()


@pytest.fixture(scope="module")
def judge():
    return demo.load_judge()


def draw(pipe, prompts, seed=0):
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    return pipe(
        prompts,
        num_inference_steps=demo.NUM_INFERENCE_STEPS,
        guidance_scale=demo.GUIDANCE_SCALE,
        generator=generators,
        output_type="np",
    ).images


def test_words_agree_with_images_and_judge(judge):
    dataset = demo.load_images()
    assert dataset.objects == demo.OBJECTS == judge.objects
    assert dataset.styles == demo.STYLES == judge.styles
    assert dataset.images.shape == (64, 5, 64, 64, 3)
    assert set(demo.SYNONYMS) <= set(demo.OBJECTS)
    names = [name for synonyms in demo.SYNONYMS.values() for name in synonyms]
    assert len(set(names)) == len(names)
    assert not set(names) & {*demo.OBJECTS, *demo.STYLES, *demo.HYPERNYMS.values(), *demo.BROADER.values()}


def test_prompt():
    assert demo.prompt("cat") == "a cat"
    assert demo.prompt("ice cream", "ink") == "a ice cream in ink style"


def test_assets_are_small():
    files = [file for file in Path(str(demo.assets())).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert (Path(str(demo.assets())) / "judge.safetensors").stat().st_size <= 2e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]


def test_loads_without_network_and_imports_late():
    # Any attempt to connect ends the process, whatever the libraries make of the offline switch.
    code = (
        "import os, socket, sys\n"
        "def refuse(*args, **kwargs): os._exit(9)\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from diffusers_erasure import demo\n"
        "assert 'diffusers_erasure.demo.judge' not in sys.modules\n"
        "demo.load_pipeline(); demo.load_judge(); demo.load_images()\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[1])


def test_each_load_is_a_fresh_pipeline(pipe):
    other = demo.load_pipeline()
    assert other.unet is not pipe.unet
    assert other.unet.dtype == other.text_encoder.dtype == other.vae.dtype == torch.float32
    assert demo.load_pipeline(torch_dtype=torch.float16).unet.dtype == torch.float16


def test_judge_knows_the_raw_images(judge):
    dataset = demo.load_images()
    images = dataset.images.reshape(-1, 64, 64, 3)
    objects = [word for word in demo.OBJECTS for _ in demo.STYLES]
    assert judge.accuracy(images, objects=objects, styles=list(demo.STYLES) * 64) == 1.0


def test_model_draws_what_it_is_asked_for(pipe, judge):
    images = draw(pipe, [demo.prompt(name, style) for name, style in PROMPTS])
    assert judge.accuracy(images, objects=[name for name, _ in PROMPTS]) >= 7 / 8
    assert judge.accuracy(images, styles=[style for _, style in PROMPTS]) >= 7 / 8


def test_same_seed_same_image(pipe):
    prompts = [demo.prompt("cat", "ink"), demo.prompt("car", "flat")]
    first = draw(pipe, prompts)
    assert np.array_equal(first, draw(demo.load_pipeline(), prompts))
    assert not np.array_equal(first, draw(pipe, prompts, seed=100))


def test_judge_takes_every_form_of_picture(pipe, judge):
    array = demo.load_images().images[demo.OBJECTS.index("whale"), 0]
    images = pipe.image_processor.numpy_to_pil(array[None] / 255)
    for form in (
        array,
        array[None],
        (array / 255).astype(np.float32),
        images,
        images[0],
        images[0].resize((128, 128)),
    ):
        result = judge.predict(form)
        assert (result.objects, result.styles) == (("whale",), ("noto",))
        assert result.object_indices.tolist() == [demo.OBJECTS.index("whale")]
        assert result.object_probabilities.shape == (1, 64)
        assert result.style_probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_judge_accuracy_counts(judge):
    images = demo.load_images().images[:2, 0]
    assert judge.accuracy(images, objects=("cat", "dog")) == 1
    assert judge.accuracy(images, objects="cat") == 0.5
    assert judge.accuracy(images, objects="cat", styles="ink") == 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no picture"),
        (np.zeros((0, 64, 64, 3), np.uint8), "no picture"),
        (np.zeros((64, 64), np.uint8), "shape"),
        (np.zeros((64, 64, 4), np.uint8), "shape"),
        (np.zeros((64, 64, 3), np.int64), "uint8 or floats"),
        (np.full((64, 64, 3), 255.0), "within"),
        (np.full((64, 64, 3), np.nan), "finite"),
        (["cat.png"], "PIL"),
    ],
)
def test_judge_refuses_what_is_no_picture(judge, images, message):
    with pytest.raises(ErasureInputError, match=message):
        judge.predict(images)


def test_judge_accuracy_refuses_wrong_words(judge):
    images = demo.load_images().images[:2, 0]
    with pytest.raises(ErasureInputError, match="Give the expected"):
        judge.accuracy(images)
    with pytest.raises(ErasureInputError, match="does not know"):
        judge.accuracy(images, objects="unicorn")
    with pytest.raises(ErasureInputError, match="3 words"):
        judge.accuracy(images, objects=("cat", "dog", "cow"))


def test_judge_refuses_other_files(tmp_path):
    from diffusers_erasure.demo.judge import Judge

    file = tmp_path / "judge.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(ErasureInputError, match="no judge"):
        Judge.from_file(file)
    with pytest.raises(ErasureInputError, match="no judge"):
        Judge.from_file(Path(str(demo.assets())) / "model" / "unet" / "diffusion_pytorch_model.safetensors")
