"""The tiny models of other families: found, loaded, called and judged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.drawing import draw as bench_draw
from diffusers_erasure import ErasureInputError, ErasureNotFoundError, demo
from diffusers_erasure.base_model import describe_base
from diffusers_erasure.demo.drawing import STEPS, draw, fast_arguments, fast_pipeline
from diffusers_erasure.demo.worlds import FOLDER_VARIABLE, folder_of, world_of
from diffusers_erasure_cli.completion import TINY
from tests.commands import invoke
from tests.worlds import in_a_checkout


OTHERS = [name for name in demo.WORLDS if name != "sd1"]


@pytest.fixture(scope="module", params=OTHERS)
def world(request):
    """A world with its pipeline."""
    return demo.settings(request.param), demo.load_pipeline(request.param)


@in_a_checkout
def test_each_draws_what_it_is_asked_for(world):
    settings, pipe = world
    pairs = [("cat", "noto"), ("ice cream", "flat"), ("rocket", "ink"), ("penguin", "twemoji")]
    images = pipe(
        [demo.prompt(*pair) for pair in pairs],
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(pairs))],
        **demo.call_arguments(settings.name),
    ).images
    for again in (draw(fast_pipeline(pipe), pairs[:2]), bench_draw(pipe, [demo.prompt(*pairs[0])], [0])):
        # as the demo and the benchmarks draw; channels last rounds differently
        assert max(np.abs(np.subtract(one, other, dtype=float)).max() for one, other in zip(images, again)) < 5
    assert {image.size for image in images} == {(64, 64)}
    assert demo.load_judge().accuracy(images, objects=[name for name, _ in pairs]) == 1.0


@in_a_checkout
def test_each_is_what_the_table_says(world):
    settings, pipe = world
    base = describe_base(pipe)
    assert (base.family, base.repo) == (settings.family, None) and not demo.is_embedded(base)
    assert world_of(pipe) is settings is demo.WORLDS[settings.name]
    assert {component.dtype for component in pipe.components.values() if hasattr(component, "dtype")} == {
        torch.float32
    }
    folder = folder_of(settings)
    assert {path.name for path in folder.iterdir()} == {"model_index.json", *(
        name for name, part in pipe.components.items() if part is not None
    )}  # fmt: skip
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6


def test_how_each_is_called():
    size = {"height": 64, "width": 64}
    assert demo.call_arguments("sd1") == {
        **size,
        "num_inference_steps": demo.NUM_INFERENCE_STEPS,
        "guidance_scale": demo.GUIDANCE_SCALE,
    }
    assert demo.call_arguments("sdxl") == {**size, "num_inference_steps": 8, "guidance_scale": 3.0}
    assert demo.call_arguments("sd3") == {
        **size,
        "num_inference_steps": 10,
        "guidance_scale": 3.0,
        "max_sequence_length": 32,
    }
    assert demo.call_arguments("flux") == {**size, "num_inference_steps": 10, "max_sequence_length": 32}
    demo.call_arguments("flux")["height"] = 1
    assert demo.call_arguments("flux")["height"] == 64


def test_how_the_demo_draws_with_the_embedded_model(demo_pipe):
    assert fast_arguments(demo_pipe) == demo.call_arguments("sd1") | {"num_inference_steps": STEPS}
    assert type(fast_pipeline(demo_pipe).scheduler).__name__ == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("arguments", "options", "device", "dtype"),
    [
        ((), {}, "cpu", torch.float32),
        ((torch.float16,), {}, "cpu", torch.float16),
        ((torch.float16, "meta"), {}, "meta", torch.float16),
        ((None, torch.device("meta")), {}, "meta", torch.float32),
        ((torch.float16,), {"device": "meta"}, "meta", torch.float16),
        ((), {"torch_dtype": torch.bfloat16, "device": "meta"}, "meta", torch.bfloat16),
        (("sd1",), {}, "cpu", torch.float32),
        (("sd1", torch.float16, "meta"), {}, "meta", torch.float16),
    ],
)
def test_the_embedded_model_with_and_without_its_name(arguments, options, device, dtype):
    pipe = demo.load_pipeline(*arguments, **options)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert (pipe.unet.device.type, pipe.unet.dtype) == (device, dtype)


@in_a_checkout
def test_a_dtype_and_a_device():
    pipe = demo.load_pipeline("flux", torch.float16, "meta")
    assert (pipe.transformer.device.type, pipe.transformer.dtype) == ("meta", torch.float16)


def test_names_that_there_are_not():
    for call in (demo.load_pipeline, demo.settings, demo.call_arguments):
        with pytest.raises(ErasureInputError, match="'sd2'.*sd1, sdxl, sd3, flux"):
            call("sd2")
    with pytest.raises(ErasureInputError, match="object is no pipeline of a tiny model; theirs are FluxPipeline"):
        world_of(object())


def test_an_installed_wheel_says_where_the_others_are(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr("diffusers_erasure.demo.worlds.__file__", str(tmp_path / "site" / "demo" / "worlds.py"))
    with pytest.raises(ErasureNotFoundError, match=f"tools/demo_worlds/models of the source.*{FOLDER_VARIABLE}"):
        demo.load_pipeline("flux")
    assert demo.load_pipeline("sd1").unet is not None

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ErasureNotFoundError, match=f"{tmp_path}, which {FOLDER_VARIABLE} names"):
        demo.load_pipeline("flux")
    demo.load_pipeline().save_pretrained(tmp_path / "flux")  # any pipeline: the folder is what counts
    assert type(demo.load_pipeline("flux")).__name__ == "StableDiffusionPipeline"


def test_the_command_line_knows_them_all() -> None:
    assert set(TINY.values()) == set(demo.WORLDS) and TINY["demo"] == "sd1"
    assert all(TINY[f"demo-{name}"] == name for name in OTHERS)
    shown = " ".join(invoke("generate", "--help").output.replace("│", " ").split())
    sdxl, sd3, flux = (demo.settings(name).num_inference_steps for name in ("sdxl", "sd3", "flux"))
    assert sd3 == flux and f"of demo-sdxl {sdxl}, of demo-sd3 and demo-flux {flux}." in shown


@in_a_checkout
@pytest.mark.parametrize("name", OTHERS)
def test_generate_with_a_world(name: str, tmp_path: Path) -> None:
    invoke("generate", "a cat", "--base", f"demo-{name}", "--device", "cpu", "--steps", "1", "-o", str(tmp_path))
    with Image.open(tmp_path / "0000.png") as image:
        told, size = image.text, image.size
    assert (told["base"], told["steps"], size) == (f"demo-{name}", "1", (64, 64))
    assert told.get("guidance_scale") == {"flux": None}.get(name, "3.0")


@pytest.mark.slow
def test_the_command_line_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ErasureNotFoundError, match="'sdxl' .* is not in"):
        invoke("generate", "a cat", "--base", "demo-sdxl", "-o", str(tmp_path / "out"))
    with pytest.raises(ErasureNotFoundError, match="'demo-xl' could not.*demo-sdxl, demo-sd3, demo-flux"):
        invoke("generate", "a cat", "--base", "demo-xl", "-o", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
