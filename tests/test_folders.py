"""What a path names: a folder, a file in it, or nothing; and that nobody is asked over the network for a path."""

from pathlib import Path
from typing import Any

import pytest

from diffusers_erasure import Erasure, ErasureNotFoundError
from tests.helpers import random_erasure, tiny_sd_pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd_pipe()


@pytest.fixture
def folder(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("diffusers_erasure.artifact.fetch", asked)
    random_erasure(pipe).save_pretrained(tmp_path / "no-zebra")
    return tmp_path / "no-zebra"


def test_a_file_of_a_folder_is_its_folder(pipe: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Erasure.from_pretrained(folder)
    for name in ("pytorch_lora_weights.safetensors", "erasure_config.json", "README.md"):
        assert Erasure.from_pretrained(folder / name).content_hash == whole.content_hash
    info = pipe.load_erasure(folder / "pytorch_lora_weights.safetensors")
    assert (info.name, info.source) == ("no-zebra", str(folder))
    pipe.unload_erasure()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert Erasure.from_pretrained("~/no-zebra").content_hash == whole.content_hash


def test_paths_that_lead_to_none(pipe: Any, folder: Path) -> None:
    (folder / "other.safetensors").write_bytes(b"")
    for place, message in (
        (folder / "other.safetensors", "is a file, and an erasure is a folder"),
        (folder.parent / "missing", "no folder and no file"),
        ("./missing", "no folder and no file"),
        ("somewhere/pytorch_lora_weights.safetensors", "no folder and no file"),
    ):
        with pytest.raises(ErasureNotFoundError, match=message):
            pipe.load_erasure(place)
    assert pipe.list_erasures() == []
