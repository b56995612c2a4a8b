"""Fits without the denoiser: it is recognised, and its doors are read, from its files, on a disk or by ranges from the Hub."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate import cpu_offload, disk_offload

from diffusers_erasure import ErasureCompatibilityError, ErasureError, ErasureFileError, combine, erase, fingerprints
from diffusers_erasure.base_model import component, text_readers
from diffusers_erasure.fingerprints import describe_model
from diffusers_erasure.stored import places, weights, with_stored_denoiser
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import tiny_sd_pipe, tiny_sdxl_pipe
from tests.mini_hub import Hub


COMMON: dict[str, Any] = {"anchors": "animal", "retain": ["dog"], "retain_default": "none", "templates": "none"}
PIPES = {"flux": tiny_flux_pipe, "sd3": tiny_sd3_pipe, "sdxl": tiny_sdxl_pipe, "sd": tiny_sd_pipe}


@pytest.fixture(autouse=True)
def nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ERASURE_CACHE", "off")


def name_of(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def without(pipe: Any, where: str | Path) -> Any:
    """A pipeline whose denoiser is not loaded, and that says where it was loaded from."""
    setattr(pipe, name_of(pipe), None)
    pipe.register_to_config(_name_or_path=str(where))
    return pipe


@pytest.fixture(params=PIPES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path]:
    """A pipeline with its denoiser, one without, and the folder of both; the denoiser lies in several files."""
    make = PIPES[request.param]
    pipe = make()
    getattr(pipe, name_of(pipe)).save_pretrained(tmp_path / name_of(pipe), max_shard_size="100KB")
    assert len(list((tmp_path / name_of(pipe)).glob("*.safetensors"))) > 1
    pipe.register_to_config(_name_or_path=str(tmp_path))
    return pipe, without(make(), tmp_path), tmp_path


def test_it_is_recognised_by_its_files(saved: tuple[Any, Any, Path]) -> None:
    whole, bare, _ = saved
    stored = with_stored_denoiser(bare)
    model = component(stored, name_of(bare))
    assert describe_model(model) == describe_model(getattr(whole, name_of(whole)))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert component(bare, name_of(bare)) is None and isinstance(stored, type(bare))
    assert with_stored_denoiser(whole) is whole


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "dp", "oce", "gated"])
def test_an_erasure_has_the_same_bytes_with_it_and_without(saved: tuple[Any, Any, Path], method: str) -> None:
    whole, bare, _ = saved
    # What a gated one moved is told by predictions, with the denoiser.
    more = {"compare": False} if method == "gated" else {}
    one, other = (erase(pipe, "cat", **COMMON, **more, method=method) for pipe in (whole, bare))
    assert one.content_hash == other.content_hash and one.config == other.config
    assert more or one.config.diagnostics["collateral"]["words"] > 100
    assert getattr(bare, name_of(bare)) is None
    if method == "uce":
        whole.load_erasure(other)
        whole.unload_erasure()
        house = erase(bare, "house", **COMMON, method="uce")
        both = [combine([each, house], mode="joint", pipe=pipe) for each, pipe in ((one, whole), (other, bare))]
        assert both[0].content_hash == both[1].content_hash


def test_what_runs_it_still_needs_it(saved: tuple[Any, Any, Path]) -> None:
    with pytest.raises(ErasureCompatibilityError, match="loaded"):
        erase(saved[1], "cat", method="esd", compare=False)


def test_files_that_are_missing_or_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ErasureCompatibilityError, match="does not say where it was loaded from"):
        erase(without(tiny_flux_pipe(), ""), "cat", **COMMON, method="uce")
    with pytest.raises(ErasureCompatibilityError, match=r"transformer/config\.json"):
        erase(without(tiny_flux_pipe(), tmp_path), "cat", **COMMON, method="uce")
    pipe = tiny_flux_pipe()
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer" / places.WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ErasureFileError, match="ends before"):
        erase(without(tiny_flux_pipe(), tmp_path), "cat", **COMMON, method="uce")
    file.write_bytes(b"no tensors here")
    with pytest.raises(ErasureCompatibilityError, match="no safetensors file"):
        erase(without(tiny_flux_pipe(), tmp_path), "cat", **COMMON, method="uce")
    shutil.rmtree(tmp_path / "transformer")
    tiny_sd3_pipe().transformer.save_pretrained(tmp_path / "transformer")
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ErasureCompatibilityError, match="do not fit its configuration"):
        erase(without(tiny_flux_pipe(), tmp_path), "cat", **COMMON, method="uce")
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "Linear"}')
    with pytest.raises(ErasureCompatibilityError, match="no known family"):
        erase(without(tiny_flux_pipe(), tmp_path), "cat", **COMMON, method="uce")


def with_offsets(data: bytes) -> bytes:
    """A safetensors file whose header gives all tensors the same few bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for entry in header.values():
        entry["data_offsets"] = [0, 8]
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data[8 + size :]


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "an index that is a list": (places.INDEX, lambda _: b"[]", "no index of weights"),
    "an index without names": (places.INDEX, lambda _: b"{}", "no index of weights"),
    "an index that is cut off": (places.INDEX, lambda _: b"{", "no index of weights"),
    "a file elsewhere": (places.INDEX, lambda _: b'{"weight_map": {"a": "../secret"}}', "names '../secret'"),
    "no name": (places.INDEX, lambda _: b'{"weight_map": {"a": 1}}', "names 1"),
    "other bytes": (places.WEIGHTS, with_offsets, "other bytes than its shape"),
    "a list as configuration": ("config.json", lambda _: b"[]", "no configuration"),
    "a configuration of another kind": (
        "config.json",
        lambda _: b'{"_class_name": "FluxTransformer2DModel", "num_layers": "two"}',
        "cannot build a FluxTransformer2DModel",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_told(damage: str, tmp_path: Path) -> None:
    name, changed, message = DAMAGES[damage]
    folder = tmp_path / "model" / "transformer"
    tiny_flux_pipe().transformer.save_pretrained(folder)
    (tmp_path / "model" / "secret").write_bytes((folder / places.WEIGHTS).read_bytes())
    file = folder / name
    file.write_bytes(changed(file.read_bytes() if file.exists() else b""))
    with pytest.raises(ErasureCompatibilityError, match=re.escape(message)):
        erase(without(tiny_flux_pipe(), tmp_path / "model"), "cat", **COMMON, method="uce")


@pytest.fixture
def endpoint(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """huggingface_hub speaks to the Hub on loopback; and little is read at once, as what is read is small."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(places, "GAP", 64)
    monkeypatch.setattr(weights, "FIRST", 16_384)
    monkeypatch.setattr(fingerprints, "SAMPLES", 512)
    hub.fault()
    hub.sent()
    yield hub


def test_from_the_hub_only_what_is_asked_for_is_read(endpoint: Hub, tmp_path: Path) -> None:
    pipe = tiny_flux_pipe()
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    files = {f"transformer/{path.name}": path.read_bytes() for path in (tmp_path / "transformer").iterdir()}
    whole = sum(map(len, files.values()))
    endpoint.set("alice/base", files=files)
    bare = without(tiny_flux_pipe(), "alice/base")
    one = erase(pipe, "cat", **COMMON, layer="text_map", compare=False)
    other = erase(bare, "cat", **COMMON, layer="text_map", compare=False)
    read = endpoint.sent()
    assert one.content_hash == other.content_hash
    assert one.config.base_model.components == other.config.base_model.components
    assert read < whole / 8, (read, whole)
    # The LoRA for stock diffusers needs two weights more.
    erase(bare, "cat", **COMMON, compare=False, method="uce")
    doors = sum(linear.weight.nbytes for linear in text_readers(pipe).values())
    doors += pipe.transformer.time_text_embed.text_embedder.linear_1.weight.nbytes
    assert endpoint.sent() == doors


def test_a_hub_that_fails_is_told(endpoint: Hub) -> None:
    endpoint.set("alice/base", files={"README.md": b"nothing"})
    with pytest.raises(ErasureCompatibilityError, match=r"no transformer/config\.json"):
        erase(without(tiny_flux_pipe(), "alice/base"), "cat", **COMMON, method="uce")
    with pytest.raises(ErasureCompatibilityError, match="alice/nothing"):
        erase(without(tiny_flux_pipe(), "alice/nothing"), "cat", **COMMON, method="uce")


def test_a_hub_that_is_not_asked_is_told(endpoint: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that a file is missing: nobody knows that."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ErasureCompatibilityError, match="the Hub was not asked"):
        erase(without(tiny_flux_pipe(), "alice/base"), "cat", **COMMON, method="uce")


def test_a_hub_that_fails_between_two_parts_is_told(endpoint: Hub, tmp_path: Path) -> None:
    pipe = tiny_flux_pipe()
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    files = {f"transformer/{path.name}": path.read_bytes() for path in (tmp_path / "transformer").iterdir()}
    endpoint.set("alice/base", files=files)
    bare = without(tiny_flux_pipe(), "alice/base")
    erase(bare, "cat", **COMMON, layer="text_map", compare=False)
    endpoint.set("alice/base", files={"README.md": b"nothing"})
    with pytest.raises(ErasureError, match="alice/base"):
        erase(bare, "cat", **COMMON, compare=False, method="uce")  # the doors' weights


@pytest.mark.parametrize("how", ["memory", "disk"])
def test_a_text_encoder_that_is_kept_elsewhere_gives_the_same_rows(how: str, tmp_path: Path) -> None:
    """T5-XXL streamed: accelerate brings each layer over as it runs."""
    plain, pipe = tiny_flux_pipe(), tiny_flux_pipe()
    here = torch.device("cpu")
    if how == "disk":
        disk_offload(pipe.text_encoder_2, str(tmp_path), execution_device=here)
    else:
        cpu_offload(pipe.text_encoder_2, execution_device=here)
    assert any(parameter.device.type == "meta" for parameter in pipe.text_encoder_2.parameters())
    maps = [erase(each, "cat", **COMMON, layer="text_map", compare=False) for each in (plain, pipe)]
    for layer in maps[0].config.layers:
        for name, value in maps[0].layer_tensors(layer).items():
            assert torch.equal(value, maps[1].layer_tensors(layer)[name])
