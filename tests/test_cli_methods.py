"""Every method through the command line, with its default flags and few steps. A new one joins by being registered."""

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusers_erasure import Erasure
from diffusers_erasure.methods import get_method, method_names
from diffusers_erasure.registry import declaration
from diffusers_erasure.schema import CONFIG_FILE, TENSOR_FILES
from diffusers_erasure_cli.options import FILES
from tests.commands import invoke


# What makes a run short, where a method has the setting.
FEW = {
    "steps": 2,
    "schedule_steps": 2,
    "trajectories": 1,
    "num_inference_steps": 2,
    "timesteps": 2,
    "num_pairs": 2,
    "batch_size": 1,
}


def colours(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("bare")
    invoke("generate", "a cat", "--steps", "2", "-o", str(folder))
    return colours(folder / "0000.png")


ON_DEMO = [name for name in method_names() if "stable-diffusion" in declaration(name).families]


@pytest.mark.parametrize("method", ON_DEMO)
def test_erase_and_generate(method: str, bare: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = get_method(method).config.__dataclass_fields__
    few = [f"--set={name}={value}" for name, value in FEW.items() if name in settings]
    invoke("erase", "cat", "--method", method, *few, "-o", "no-cat")
    assert Erasure.from_pretrained("no-cat").config.method.name == method
    assert [path.name for path in tmp_path.iterdir()] == ["no-cat"]  # no checkpoints are left
    invoke("generate", "a cat", "-e", "no-cat=1.5", "--steps", "2", "-o", "pictures")
    assert colours(tmp_path / "pictures" / "0000.png") != bare
    with Image.open(tmp_path / "pictures" / "0000.png") as image:
        told = image.text
    assert (told["prompt"], told["seed"], told["steps"], told["base"]) == ("a cat", "0", "2", "demo")
    (erasure,) = json.loads(told["erasures"])
    assert (erasure["name"], erasure["strength"], erasure["source"]) == ("no-cat", 1.5, "no-cat")


def test_the_files_that_are_looked_for_are_the_schemas() -> None:
    assert set(FILES) == {CONFIG_FILE, *TENSOR_FILES} and FILES[0] == CONFIG_FILE


def test_switches_are_read_as_they_are_written(tmp_path: Path) -> None:
    for value in ("true", "True", "false"):
        invoke("erase", "cat", "--set", f"absolute={value}", "-o", str(tmp_path / value))
        settings = Erasure.from_pretrained(tmp_path / value).config.method.settings
        assert settings["absolute"] is (value != "false")


def test_what_a_method_has_instead_of_retained_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers_erasure import ErasureInputError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ErasureInputError, match="takes no retained prompts.*`tau`"):
        invoke("erase", "cat", "--method", "acterase", "--retain", "dog", "-o", "no-cat")


def test_nothing_is_overwritten_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    erase, draw = (
        ("erase", "cat", "--anchor", "animal", "-o", "out"),
        ("generate", "a cat", "--steps", "1", "-o", "out"),
    )
    invoke(*erase)
    invoke(*draw)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for command, message in ((erase, "holds an erasure already"), (draw, "0000.png exists already")):
        refused = invoke(*command, code=2)
        assert message in refused.output and "--overwrite" in refused.output
    for command in (("combine", "out", "out"), ("convert", "dumo", "out", "--base", "demo")):
        invoke(*command, "-o", "out", code=2)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    Path("mine").mkdir()
    Path("mine/pytorch_lora_weights.safetensors").write_bytes(b"mine")
    Path("file").write_text("mine")
    for place, message in (
        ("mine", "holds a file pytorch_lora_weights"),
        ("file", "is a file"),
        (".", "current folder"),
    ):
        assert message in invoke("erase", "cat", "-o", place, code=2).output
    assert Path("mine/pytorch_lora_weights.safetensors").read_bytes() == b"mine"
    invoke("erase", "dog", "--anchor", "animal", "-o", "out", "--overwrite")
    invoke("generate", "a dog", "--steps", "1", "-o", "out", "--overwrite")
    assert Erasure.from_pretrained("out").concepts[0].target == "dog"
    assert Path("out/0000.png").read_bytes() != before["0000.png"]
