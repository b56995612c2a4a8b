"""kohya files: stock diffusers loads them, and draws what `load_erasure` draws."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusers_erasure import Erasure, ErasureInputError, save_kohya, to_kohya
from tests.commands import invoke
from tests.helpers import (
    CONV_SITES,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    dense_edit,
    images,
    random_erasure,
    tiny_sd_pipe,
)


SITES = UNET_SITES + CONV_SITES + TEXT_SITES


def every_site(pipe: Any) -> tuple[str, ...]:
    names = [f"unet.{n}" for n, m in pipe.unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    text = [n for n, m in pipe.text_encoder.named_modules() if isinstance(m, torch.nn.Linear)]
    return (*names, *(f"text_encoder.text_model.{n.removeprefix('text_model.')}" for n in text))


@pytest.mark.parametrize("which", ["some", "text", "mlp", "values", "all"])
def test_stock_diffusers_draws_the_same(tmp_path: Path, which: str) -> None:
    pipe = tiny_sd_pipe()
    sites = {
        "some": SITES,
        "text": TEXT_SITES,
        "mlp": TEXT_SITES[:1],
        "values": TEXT_SITES[1:],
        "all": every_site(pipe),
    }[which]
    erasure = random_erasure(pipe, "lora", sites, size={"all": 0.1, "some": 0.5}.get(which, 2.0))
    path = save_kohya(erasure, tmp_path / "kohya.safetensors")
    base = images(pipe)
    ours = tiny_sd_pipe()
    ours.load_erasure(erasure)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert_like(images(pipe), images(ours), base)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base)
    read = tiny_sd_pipe()
    read.load_erasure(path, method="lora")
    assert_like(images(read), images(ours), base)
    tensors = load_file(path)
    assert len(tensors) == 3 * (
        len(sites) + (which not in ("mlp", "all"))
    )  # one of zeros, without which diffusers drops some
    alphas = {float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    ranks = {value.shape[0] for key, value in tensors.items() if key.endswith(".lora_down.weight")}
    assert alphas == ranks == {3}
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in tensors)


def test_ranks_that_differ_between_layers_are_padded() -> None:
    pipe = tiny_sd_pipe()
    unet = random_erasure(pipe, "lora", UNET_SITES, rank=2)
    text = random_erasure(pipe, "lora", TEXT_SITES, rank=4)
    file = next(iter(unet.tensors))
    config = unet.config.__class__(
        **{**vars(unet.config), "layers": (*unet.config.layers, *text.config.layers), "stock": None}
    )
    erasure = Erasure(config, {file: {**unet.tensors[file], **text.tensors[file]}})
    base = images(pipe)
    pipe.load_lora_weights(to_kohya(erasure))
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base)


def test_refused(tmp_path: Path) -> None:
    pipe = tiny_sd_pipe()
    with pytest.raises(ErasureInputError, match="text_map"):
        to_kohya(random_erasure(pipe, "text_map"))
    erasure = random_erasure(pipe, "lora")
    with pytest.raises(ErasureInputError, match="too large"):
        to_kohya(erasure.rescaled(1e8), dtype=torch.float16)
    (tmp_path / "there.safetensors").write_text("mine")
    for name in ("there.safetensors", "lora.bin"):
        with pytest.raises(ErasureInputError, match="new file"):
            save_kohya(erasure, tmp_path / name)
    assert (tmp_path / "there.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_dtype_may_be_named(tmp_path: Path, name: str) -> None:
    """In kohya's files and in our own, with `torch.` before the name or without."""
    erasure, dtype = random_erasure(tiny_sd_pipe(), "lora"), getattr(torch, name)
    files = erasure.to_files(dtype=dtype)
    assert erasure.to_files(dtype=name) == files == erasure.to_files(dtype=f"torch.{name}")
    erasure.save_pretrained(tmp_path / "e", dtype=name)
    assert Erasure.from_pretrained(tmp_path / "e").to_files() == files
    assert {tensor.dtype for items in erasure.cast(name).tensors.values() for tensor in items.values()} == {dtype}
    saved = load_file(save_kohya(erasure, tmp_path / "kohya.safetensors", dtype=name))
    assert {tensor.dtype for key, tensor in saved.items() if not key.endswith(".alpha")} == {dtype}


@pytest.mark.parametrize("dtype", ["half", "float64", "torch.uint8", "", torch.float64, 16])
def test_another_dtype_is_told(dtype: Any) -> None:
    erasure = random_erasure(tiny_sd_pipe(), "lora")
    for save in (erasure.to_files, erasure.cast, lambda dtype: to_kohya(erasure, dtype=dtype)):
        with pytest.raises(ErasureInputError, match=f"bfloat16, not as {dtype}"):
            save(dtype=dtype)


def test_command_line(tmp_path: Path, demo_pipe: Any) -> None:
    sites = ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",)
    erasure = random_erasure(demo_pipe, "lora", sites)
    erasure.save_pretrained(tmp_path / "erasure")

    erased = ("-e", str(tmp_path / "erasure"))
    invoke("export", *erased, str(tmp_path / "lora.safetensors"), "--format", "kohya")
    assert set(load_file(tmp_path / "lora.safetensors")) == set(to_kohya(erasure))
    invoke("export", *erased, str(tmp_path / "model"), "--json")
    back = type(demo_pipe).from_pretrained(tmp_path / "model")
    with pytest.raises(ErasureInputError, match="already contained"):
        back.load_erasure(tmp_path / "erasure")
    for arguments in (["x", "--format", "other"], [str(tmp_path / "new"), "--half"]):
        invoke("export", *erased, *arguments, code=2)
