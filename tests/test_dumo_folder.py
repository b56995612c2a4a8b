"""Folders as DuMo's authors publish them, made here with their keys and shapes: read exactly, or refused."""

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureError,
    ErasureFileError,
    ErasureInputError,
    ErasureNotFoundError,
    cli,
)
from diffusers_erasure.formats.dumo import read_dumo
from tests.commands import answer, invoke
from tests.helpers import assert_like, equal, far, images, rows_of, tiny_sd_pipe, tiny_sdxl_pipe, unchanged_by
from tests.test_skip import assert_close, given, predict, random_tensors, stock_residuals


def as_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A full network's tensors under the published names."""
    found = {}
    for name, value in tensors.items():
        if name.startswith("zero."):
            _, place, kind = name.split(".")
            name = f"dumo_mid_block.{kind}" if place == "mid" else f"dumo_down_blocks.{place}.{kind}"
            value = value[:, :, None, None] if kind == "weight" else value
        found[name] = value.contiguous()
    return found


def publish(
    folder: Path,
    pipe: Any,
    tensors: dict[str, torch.Tensor],
    *,
    table: np.ndarray | None = None,
    binary: bool = False,
) -> Path:
    folder.mkdir()
    config = {"_class_name": "DuMo_Stage1", "_diffusers_version": "0.24.0", **json.loads(pipe.unet.to_json_string())}
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "DuMo_Stage1"}))
    if binary:
        torch.save(as_published(tensors), folder / "diffusion_pytorch_model.bin")
    else:
        save_file(as_published(tensors), folder / "diffusion_pytorch_model.safetensors")
    if table is not None:
        np.save(folder / "time_scale.npy", table)
    return folder


@pytest.fixture
def tensors(pipe: Any) -> dict[str, torch.Tensor]:
    return random_tensors(pipe.unet, "full")


def columns(tensors: dict[str, torch.Tensor]) -> int:
    return sum(name.startswith("zero.") and name.endswith("weight") for name in tensors)


def table_for(tensors: dict[str, torch.Tensor], bins: int = 20) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.2, 1.5, (bins, columns(tensors)))


@pytest.mark.parametrize("binary", [False, True])
def test_without_a_schedule_it_is_the_network(
    pipe: Any, tensors: dict[str, torch.Tensor], tmp_path: Path, binary: bool
) -> None:
    """As the authors' script for nudity: no schedule and no gate."""
    erasure = read_dumo(pipe, publish(tmp_path / "nudity", pipe, tensors, binary=binary), "nudity")
    (layer,) = erasure.config.layers
    assert (layer.schedule, layer.gate, len(layer.sites)) == (None, None, columns(tensors))
    assert erasure.concepts[0].target == "nudity"
    stock = tiny_sd_pipe().unet
    pipe.load_erasure(Erasure.from_files(erasure.to_files()))
    assert_close(predict(pipe.unet), predict(stock, **given(stock_residuals(stock, tensors))), predict(stock))


def test_the_schedule_is_read_by_bins_of_50_timesteps(
    pipe: Any, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    table = table_for(tensors)
    folder = publish(tmp_path / "style", pipe, tensors, table=table)
    pipe.load_erasure(read_dumo(pipe, folder, gate=False))
    stock = tiny_sd_pipe().unet
    for time in (0.0, 49.0, 50.0, 999.0):
        row = table[int(time // 50)]
        residuals = [float(f) * part for f, part in zip(row, stock_residuals(stock, tensors, time), strict=True)]
        assert_close(predict(pipe.unet, time), predict(stock, time, **given(residuals)), predict(stock, time))


def test_the_gate_is_that_of_the_scripts(pipe: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The larger of cosine and share of tokens, one factor for both guidance branches."""
    folder = publish(tmp_path / "style", pipe, tensors, table=np.ones((20, columns(tensors))))
    erasure = read_dumo(pipe, folder, ["van gogh"])
    gate = erasure.config.layers[0].gate
    assert gate is not None and gate.layout == "uncond_first" and gate.tokens is not None
    base, full = images(pipe, prompt="a van gogh"), read_dumo(pipe, folder, gate=False)
    pipe.load_erasure(full, "full")
    drawn = images(pipe, prompt="a van gogh")
    pipe.unload_erasure()
    pipe.load_erasure(erasure, "gated")
    assert_like(images(pipe, prompt="a van gogh"), drawn, base)  # it holds all of its tokens
    other = images(pipe, prompt="zebra")
    pipe.unload_erasure()
    plain = images(pipe, prompt="zebra")
    pipe.load_erasure(full, "full")
    assert far(other, plain) > 0 and not equal(other, images(pipe, prompt="zebra"))
    pipe.unload_erasure()
    concept, prompt = (rows_of(pipe, text).flatten().double() for text in ("van gogh", "zebra"))
    factor = float(torch.nn.functional.cosine_similarity(concept, prompt, dim=0).clamp_min(0))
    pipe.load_erasure(full, "full", strength=factor)
    assert far(images(pipe, prompt="zebra"), other) < 1e-3 * far(other, plain)


def test_a_gate_needs_its_concepts(pipe: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = publish(tmp_path / "style", pipe, tensors, table=table_for(tensors))
    with pytest.raises(ErasureInputError, match="--no-gate"):
        read_dumo(pipe, folder)


def test_half_precision_is_kept(pipe: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    half = {name: value.half() for name, value in tensors.items()}
    erasure = read_dumo(pipe, publish(tmp_path / "a", pipe, half))
    assert {value.dtype for value in erasure.tensors["erasure.safetensors"].values()} == {torch.float16}
    double = {name: value.double() for name, value in tensors.items()}
    erasure = read_dumo(pipe, publish(tmp_path / "b", pipe, double, binary=True))
    assert {value.dtype for value in erasure.tensors["erasure.safetensors"].values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- hostile


class Evil:
    """Runs code where pickles are trusted."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], binary: bool = False) -> None:
    from safetensors.torch import load_file

    path = folder / "diffusion_pytorch_model.safetensors"
    found = load_file(path)
    change(found)
    path.unlink()
    if binary:
        torch.save(found, folder / "diffusion_pytorch_model.bin")
    else:
        save_file(found, path)


def write_bin(folder: Path, data: Any) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    path = folder / "diffusion_pytorch_model.bin"
    path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)


def inflate(folder: Path) -> None:
    """Five gigabytes of zeros in five megabytes."""
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with zipfile.ZipFile(folder / "diffusion_pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(5):
                entry.write(bytes(2**20))
    data = bytearray((folder / "diffusion_pytorch_model.bin").read_bytes())
    place = data.rindex(b"PK\x01\x02") + 24
    data[place : place + 4] = (2**32 - 2).to_bytes(4, "little")
    (folder / "diffusion_pytorch_model.bin").write_bytes(bytes(data))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_table(folder: Path, value: Any, **options: Any) -> None:
    np.save(folder / "time_scale.npy", value, **options)


def huge_table(folder: Path) -> None:
    """A header of 10^15 numbers, and 8 bytes."""
    save_table(folder, np.ones((1, 1)))
    path = folder / "time_scale.npy"
    header = path.read_bytes().replace(b"(1, 1), }" + b" " * 26, b"(1000000000000000, 1), }" + b" " * 11)
    assert b"1000000000000000" in header
    path.write_bytes(header)


WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES: dict[str, tuple[type[ErasureError], Callable[[Path], Any]]] = {
    "no config": (ErasureNotFoundError, lambda f: (f / "config.json").unlink()),
    "no weights": (ErasureNotFoundError, lambda f: (f / WEIGHTS).unlink()),
    "config is no JSON": (ErasureFileError, lambda f: (f / "config.json").write_text("{")),
    "config is a list": (ErasureFileError, lambda f: (f / "config.json").write_text("[]")),
    "config is large": (ErasureFileError, lambda f: (f / "config.json").write_text('"' + "x" * 2**20 + '"')),
    "other heads": (ErasureCompatibilityError, lambda f: set_config(f, attention_head_dim=[2, 2])),
    "other blocks": (ErasureCompatibilityError, lambda f: set_config(f, down_block_types=["DownBlock2D"] * 2)),
    "cut short": (ErasureFileError, lambda f: cut(f / WEIGHTS, 5000)),
    "a stranger": (ErasureFileError, lambda f: edit(f, lambda t: t.update({"up_blocks.0.x": torch.ones(2)}))),
    "no encoder": (ErasureFileError, lambda f: edit(f, lambda t: t.pop("conv_in.weight"))),
    "no mid": (ErasureFileError, lambda f: edit(f, lambda t: t.pop("dumo_mid_block.weight"))),
    "a skip less": (
        ErasureCompatibilityError,
        lambda f: edit(f, lambda t: [t.pop(f"dumo_down_blocks.3.{kind}") for kind in ("weight", "bias")]),
    ),
    "no numbers in the name": (
        ErasureFileError,
        lambda f: edit(f, lambda t: t.update({"dumo_down_blocks.x.bias": t.pop("dumo_down_blocks.0.bias")})),
    ),
    "a 3x3 convolution": (
        ErasureFileError,
        lambda f: edit(f, lambda t: t.update({"dumo_mid_block.weight": torch.ones(64, 64, 3, 3)})),
    ),
    "another shape": (
        ErasureCompatibilityError,
        lambda f: edit(f, lambda t: t.update({"conv_in.bias": torch.ones(16)})),
    ),
    "not finite": (ErasureFileError, lambda f: edit(f, lambda t: t["conv_in.bias"].fill_(torch.nan))),
    "not finite, binary": (ErasureFileError, lambda f: edit(f, lambda t: t["conv_in.bias"].fill_(torch.inf), True)),
    "integers, binary": (
        ErasureFileError,
        lambda f: edit(f, lambda t: t.update({"conv_in.bias": torch.ones(32, dtype=torch.int32)}), True),
    ),
    "a stranger, binary": (ErasureFileError, lambda f: edit(f, lambda t: t.update({"x": torch.ones(2)}), True)),
    "expanded, binary": (
        ErasureFileError,
        lambda f: write_bin(f, {"conv_in.weight": torch.ones(1).expand(10**6, 10**6)}),
    ),
    "no dict, binary": (ErasureFileError, lambda f: write_bin(f, [torch.ones(2)])),
    "no names, binary": (ErasureFileError, lambda f: write_bin(f, {1: torch.ones(2)})),
    "code, binary": (ErasureFileError, lambda f: write_bin(f, {"conv_in.weight": Evil()})),
    "no archive, binary": (ErasureFileError, lambda f: write_bin(f, b"\x80\x02]q\x00.")),
    "inflated, binary": (ErasureFileError, inflate),
    "table of code": (ErasureFileError, lambda f: save_table(f, np.array([[Evil()]]), allow_pickle=True)),
    "table of other columns": (ErasureFileError, lambda f: save_table(f, np.ones((20, 13)))),
    "table of one dimension": (ErasureFileError, lambda f: save_table(f, np.ones(20))),
    "table not finite": (ErasureFileError, lambda f: save_table(f, np.full((20, 5), np.nan))),
    "table of integers": (ErasureFileError, lambda f: save_table(f, np.ones((20, 5), dtype=np.int64))),
    "table of many bins": (ErasureFileError, lambda f: save_table(f, np.ones((2000, 5)))),
    "table of too many bytes": (ErasureFileError, lambda f: save_table(f, np.ones((2000, 500)))),
    "table that is none": (ErasureFileError, lambda f: (f / "time_scale.npy").write_bytes(b"x" * 200)),
    "table that claims much": (ErasureFileError, huge_table),
    "table that is a folder": (ErasureFileError, lambda f: (f / "time_scale.npy").mkdir()),
}


@pytest.mark.parametrize("case", CASES)
def test_broken_folders(
    pipe: Any, tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A typed error each; nothing is run, and the pipeline stays as it is."""
    monkeypatch.chdir(tmp_path)
    folder = publish(tmp_path / "it", pipe, tensors)
    read_dumo(pipe, folder, "cat")
    error, change = CASES[case]
    change(folder)
    with pytest.raises(error) as raised:
        read_dumo(pipe, folder, "cat")
    assert type(raised.value) is error and len(str(raised.value)) < 1000
    assert not (tmp_path / "evil").exists()


def test_other_pipelines(pipe: Any, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = publish(tmp_path / "it", pipe, tensors)
    with pytest.raises(ErasureCompatibilityError):
        read_dumo(tiny_sdxl_pipe(), folder, "cat")
    without = tiny_sd_pipe()
    without.unet = None
    with pytest.raises(ErasureCompatibilityError):
        read_dumo(without, folder, "cat")


# -------------------------------------------------------------------------------------------------- command line


def test_command(
    pipe: Any,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("base")
    publish(tmp_path / "published", pipe, tensors, table=table_for(tensors))
    command = ["convert", "dumo", "published", "--base", "base", "--concept", "van gogh"]
    assert answer(*command, "-o", "made")["files"].keys() >= {"erasure.safetensors", "README.md"}
    made = Erasure.from_pretrained("made")
    assert made.config.method.name == "dumo" and made.config.layers[0].gate is not None
    unchanged_by(pipe, lambda: (pipe.load_erasure("made"), pipe.unload_erasure()))

    invoke(*command, "--no-gate", "--half", "-o", "half")
    half = Erasure.from_pretrained("half")
    assert half.config.layers[0].gate is None and half.config.layers[0].schedule is not None
    sizes = [(tmp_path / name / "erasure.safetensors").stat().st_size for name in ("half", "made")]
    assert sizes[0] < 0.6 * sizes[1]

    monkeypatch.setattr(sys, "argv", ["diffusers-erasure", "convert", "dumo", "base", "--base", "base", "-o", "x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capfd.readouterr()
    assert stopped.value.code == 1 and "holds no network of DuMo" in " ".join(captured.err.split())
    assert not (tmp_path / "x").exists()
