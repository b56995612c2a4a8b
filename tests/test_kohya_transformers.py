"""kohya's form of LoRAs for FLUX.1 and Stable Diffusion 3, against diffusers' converters of LoRAs and of original checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInputError,
    Layer,
    save_kohya,
    to_kohya,
)
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import LORA_FILE, BaseModel
from tests.helpers import assert_like, dense_edit, images, random_erasure, tiny_sd_pipe, tiny_sdxl_pipe
from tests.tiny_transformers import PIPES, SITES, drawn, sites_of, tiny_flux_pipe, tiny_sd3_pipe


TEXT = "text_encoder.text_model.encoder.layers.1.self_attn.v_proj"
WIDTH = {"flux": 3072, "sd3": 64}  # of FLUX.1's single blocks diffusers' reader knows the real width alone


def random_lora(kind: str, sites: tuple[str, ...], heights: dict[str, int], width: int, rank: int = 2) -> Erasure:
    """On modules of a width, without a pipeline."""
    generator, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for site in sites:
        factor = heights.get(site.split(".", 2)[-1], 1)
        tensors[site + DOWN] = torch.randn(rank, width, generator=generator)
        tensors[site + UP] = torch.randn(width * factor, rank, generator=generator)
    family = {"flux": "flux", "sd3": "stable-diffusion-3"}[kind]
    return Erasure.from_layers(
        [Layer("lora", sites, tensors, "transformer")], base=BaseModel(family), concepts="zebra"
    )


def products(state_dict: dict[str, torch.Tensor], every: int = 1) -> dict[str, torch.Tensor]:
    """B A of each module of peft's names, in float64; of its columns each that many."""
    names = [key.removesuffix(DOWN) for key in state_dict if key.endswith(DOWN)]
    return {name: state_dict[name + UP].double() @ state_dict[name + DOWN][:, ::every].double() for name in names}


BLOCKS = {
    "flux": tuple(
        f"transformer_blocks.3.{name}"
        for name in "attn.to_q attn.to_v attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_out.0 attn.to_add_out "
        "norm1.linear".split()
    )
    + ("single_transformer_blocks.37.attn.to_k", "single_transformer_blocks.37.proj_mlp"),
    "sd3": tuple(
        f"transformer_blocks.1.{name}"
        for name in "attn.to_q attn.to_k attn.to_v attn.add_k_proj attn.to_out.0 attn.to_add_out attn2.to_k attn2.to_out.0 "
        "ff.net.0.proj ff_context.net.0.proj norm1.linear".split()
    )
    + ("context_embedder", "time_text_embed.text_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
}
HEIGHTS = {"proj_mlp": 4, "norm1.linear": 6, "ff.net.0.proj": 4, "ff_context.net.0.proj": 4}


@pytest.mark.parametrize("rank", [2, 3])
def test_diffusers_reader_gives_the_same_edit_of_flux(rank: int) -> None:
    """At the real width: parts of one matrix come back as they were, those that are not edited as zeros."""
    erasure = random_lora("flux", BLOCKS["flux"], HEIGHTS, WIDTH["flux"], rank)
    file = to_kohya(erasure)
    assert {key.split(".")[0] for key in file} == {
        *(f"lora_unet_double_blocks_3_{name}" for name in ("img_attn_qkv", "txt_attn_qkv", "img_attn_proj")),
        *(f"lora_unet_double_blocks_3_{name}" for name in ("txt_attn_proj", "img_mod_lin")),
        "lora_unet_single_blocks_37_linear1",
    }
    read = FluxPipeline.lora_state_dict(dict(file))
    assert len({value.shape[0] for key, value in read.items() if key.endswith(DOWN)}) == 1
    expected, found = products(erasure.tensors[LORA_FILE], 601), products(read, 601)
    assert expected.keys() <= found.keys()
    for name, edit in found.items():
        assert_close(edit, expected.get(name, torch.zeros_like(edit)), rtol=1e-12, atol=1e-12)


def original_checkpoint(file: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """The edits of a kohya file as the weights of a checkpoint with the original names."""
    known = {name.removesuffix(".weight").replace(".", "_"): name for name in names}
    found = {}
    for key in (key.removesuffix(".lora_down.weight") for key in file if key.endswith(".lora_down.weight")):
        down, up = file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"]
        assert float(file[f"{key}.alpha"]) == len(down)
        found[known[key.removeprefix("lora_unet_")]] = up.double() @ down.double()
    return found


FLUX_BLOCK = (
    *(f"{part}_attn.{name}" for part in ("img", "txt") for name in ("qkv", "proj")),
    *(f"{part}_m{name}" for part in ("img", "txt") for name in ("lp.0", "lp.2", "od.lin")),
)
SD3_BLOCK = (
    *(f"{part}_block.{name}" for part in ("x", "context") for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    *("x_block.attn2.qkv", "x_block.attn2.proj", "x_block.adaLN_modulation.1"),
    "context_block.adaLN_modulation.1",
)
ORIGINAL = {
    "flux": [
        *(f"double_blocks.0.{name}" for name in FLUX_BLOCK),
        *(f"single_blocks.0.{name}" for name in ("linear1", "linear2", "modulation.lin")),
        *(f"{name}_in.{layer}_layer" for name in ("time", "vector", "guidance") for layer in ("in", "out")),
        *("txt_in", "img_in", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    ],
    "sd3": [
        *(f"joint_blocks.{i}.{name}" for i in range(2) for name in SD3_BLOCK),
        *(f"{name}_embedder.mlp.{i}" for name in ("t", "y") for i in (0, 2)),
        *("context_embedder", "x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    ],
}


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_the_names_are_those_of_the_original_code(kind: str) -> None:
    """diffusers' converter of whole checkpoints puts each edit where the erasure has it. ComfyUI goes by these names."""
    first = "transformer_blocks.0."
    sites = {
        "flux": [
            *(first + name for name in "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.to_add_out".split()),
            *(first + name for name in "attn.add_q_proj attn.add_k_proj attn.add_v_proj norm1.linear".split()),
            *(first + name for name in "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()),
            first + "norm1_context.linear",
            *("single_transformer_blocks.0." + name for name in ("proj_out", "norm.linear")),
            *("context_embedder", "x_embedder"),
            *(
                f"time_text_embed.{name}_embedder.linear_{i}"
                for name in ("text", "timestep", "guidance")
                for i in (1, 2)
            ),
        ],
        "sd3": [
            *(first + name for name in "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.to_add_out".split()),
            *(first + name for name in "attn.add_q_proj attn.add_k_proj attn.add_v_proj norm1.linear".split()),
            *(first + name for name in "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()),
            *(first + name for name in "attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0".split()),
            "context_embedder",
            *(f"time_text_embed.{name}_embedder.linear_{i}" for name in ("text", "timestep") for i in (1, 2)),
        ],
    }[kind]
    erasure = random_lora(kind, tuple(sites), {}, 8)
    expected = products(erasure.tensors[LORA_FILE])
    checkpoint = original_checkpoint(to_kohya(erasure), ORIGINAL[kind])
    if kind == "flux":
        whole = {f"{name}.weight": torch.zeros(8, 8) for name in ORIGINAL["flux"]}
        whole |= {f"{name}.bias": torch.zeros(8) for name in ORIGINAL["flux"]}
        whole |= {f"{name}.bias": torch.zeros(24) for name in ORIGINAL["flux"] if name.endswith("qkv")}
        whole |= {f"single_blocks.0.linear1.{part}": torch.zeros(21504, 1) for part in ("weight", "bias")}
        for name in ("img_attn.norm", "txt_attn.norm"):
            whole |= {f"double_blocks.0.{name}.{q}_norm.scale": torch.zeros(8) for q in ("query", "key")}
        whole |= {f"single_blocks.0.norm.{q}_norm.scale": torch.zeros(8) for q in ("query", "key")}
        whole |= {f"{name}.weight": value for name, value in checkpoint.items()}
        found = convert_flux_transformer_checkpoint_to_diffusers(whole)
    else:
        whole = {
            f"{name}.weight": torch.zeros(24 if name.endswith("qkv") else 8, 8)
            for name in ORIGINAL["sd3"]
            if not name.startswith("joint_blocks.1.context_block.attn.proj")
        }
        whole |= {f"{name}.bias": torch.zeros(24 if name.endswith("qkv") else 8) for name in ORIGINAL["sd3"]}
        whole |= {f"{name}.weight": value for name, value in checkpoint.items()}
        whole["pos_embed"] = torch.zeros(1)
        found = convert_sd3_transformer_checkpoint_to_diffusers(whole)
    edited = {name.removesuffix(".weight") for name, value in found.items() if value.any()}
    assert edited == {name.removeprefix("transformer.") for name in expected}
    for name, edit in expected.items():
        assert_close(found[name.removeprefix("transformer.") + ".weight"], edit, rtol=1e-12, atol=1e-12)


def test_stock_diffusers_draws_the_same_of_flux(tmp_path: Path) -> None:
    sites = tuple(f"transformer.{site}" for site in SITES["flux"] if site.startswith("transformer_blocks"))
    pipe = tiny_flux_pipe()
    erasure, base = random_erasure(pipe, "lora", (*sites, TEXT), size=0.7), drawn(pipe)
    save_kohya(erasure, tmp_path / "kohya.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    oracle = drawn(dense_edit(tiny_flux_pipe(), erasure))
    assert_like(drawn(pipe), oracle, base)
    again = tiny_flux_pipe()
    again.load_erasure(tmp_path / "kohya.safetensors", method="lora")
    assert_like(drawn(again), oracle, base)


def test_stock_diffusers_drops_what_lies_outside_of_blocks() -> None:
    """As the docs say; it reads the erasure's own file (`test_transformers.py`)."""
    pipe = tiny_flux_pipe()
    erasure = random_erasure(
        pipe, "lora", ("transformer.context_embedder", "transformer.transformer_blocks.0.attn.to_q")
    )
    pipe.load_lora_weights(to_kohya(erasure))
    found = {name for name, module in pipe.transformer.named_modules() if hasattr(module, "base_layer")}
    assert "transformer_blocks.0.attn.to_q" in found and "context_embedder" not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sd3_files_are_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """By `load_erasure`, as stock diffusers reads none of it; with an alpha other than the rank too."""
    pipe = tiny_sd3_pipe()
    erasure, base = random_erasure(pipe, "lora", sites_of("sd3"), size=0.7), drawn(pipe)
    file = to_kohya(erasure, dtype=dtype)
    for key in [key for key in file if key.endswith(".alpha")]:
        file[key] *= 2
        file[key.replace(".alpha", ".lora_up.weight")] /= 2
    save_file(file, tmp_path / "kohya.safetensors")
    pipe.load_erasure(tmp_path / "kohya.safetensors", method="lora")
    oracle = dense_edit(tiny_sd3_pipe(), erasure if dtype == torch.float32 else erasure.cast(dtype).cast("float32"))
    assert_like(drawn(pipe), drawn(oracle), base)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_damaged_files_are_refused(tmp_path: Path, kind: str) -> None:
    pipe = PIPES[kind]()
    block = {"flux": "double_blocks_0_img_attn", "sd3": "joint_blocks_0_x_block_attn"}[kind]
    plain = {
        f"lora_unet_{block}_proj.lora_down.weight": torch.ones(2, 32),
        f"lora_unet_{block}_proj.lora_up.weight": torch.ones(32, 2),
    }
    damaged: list[dict[str, torch.Tensor]] = [
        {f"lora_unet_{block}_qkv.lora_down.weight": torch.ones(2, 32)},
        {**plain, f"lora_unet_{block}_other.lora_down.weight": torch.ones(2, 32)},
        {key.replace("_proj", "_qkv"): value for key, value in plain.items()} | {"lora_unet_x.alpha": torch.ones(2)},
    ]
    for number, tensors in enumerate(damaged):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        with pytest.raises(ErasureFileError):
            pipe.load_erasure(tmp_path / f"{number}.safetensors", method="lora")
    save_file(plain, tmp_path / "plain.safetensors")
    pipe.load_erasure(tmp_path / "plain.safetensors", method="lora")
    assert pipe.list_erasures()[0].layers == ("lora on transformer (transformer_blocks.0.attn.to_out.0)",)


def test_what_has_no_name_is_refused() -> None:
    for kind, site in (("flux", "norm_out.linear"), ("sd3", "transformer_blocks.0.norm1_context.linear")):
        with pytest.raises(ErasureInputError, match=f"no name for '{site}'"):
            to_kohya(random_lora(kind, (site,), {}, 8))
    with pytest.raises(ErasureInputError, match="would map 8 to 32"):
        to_kohya(random_lora("flux", ("single_transformer_blocks.0.proj_mlp",), {"proj_mlp": 3}, 8))
    sd3 = tiny_sd3_pipe()
    with pytest.raises(ErasureInputError, match="no place for 'text_encoder'"):
        to_kohya(random_erasure(sd3, "lora", (TEXT,), base=BaseModel("stable-diffusion-3")))


def test_sdxl_pooled_site(tmp_path: Path) -> None:
    pipe = tiny_sdxl_pipe()
    sites = ("unet.add_embedding.linear_1", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v")
    erasure, base = random_erasure(pipe, "lora", sites, size=2.0), images(pipe)
    path = save_kohya(erasure, tmp_path / "kohya.safetensors")
    assert "lora_unet_label_emb_0_0.lora_down.weight" in load_file(path)
    pipe.load_lora_weights(path)
    oracle = images(dense_edit(tiny_sdxl_pipe(), erasure))
    assert_like(images(pipe), oracle, base)
    again = tiny_sdxl_pipe()
    again.load_erasure(path, method="lora")
    assert_like(images(again), oracle, base)


def published_grammar(width: int = 3072, blocks: int = 19) -> dict[str, Any]:
    """The grammar of a published erasure of FLUX.1 (EraseAnything's): rank 8, bfloat16, no alpha."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name in (f"{i}.attn.add_{part}_proj" for i in range(blocks) for part in "qk"):
        key = f"transformer.transformer_blocks.{name}"
        found[key + DOWN] = torch.randn(8, width, generator=generator).bfloat16()
        found[key + UP] = (torch.randn(width, 8, generator=generator) * 0.5).bfloat16()
    return found


@pytest.mark.parametrize("backend", ["hook", "peft", "merge"])
def test_a_published_flux_lora(tmp_path: Path, backend: str) -> None:
    """It acts as in stock diffusers."""
    save_file(published_grammar(32, 2), tmp_path / "lora.safetensors", {"format": "pt"})
    stock, pipe = tiny_flux_pipe(), tiny_flux_pipe()
    base = drawn(pipe)
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    info = pipe.load_erasure(tmp_path / "lora.safetensors", method="lora", backend=backend)
    assert info.layers == ("lora on transformer (4 sites)",)
    assert_like(drawn(pipe), drawn(stock), base)
    pipe.unload_erasure()
    assert (drawn(pipe) == base).all()


@pytest.mark.parametrize(
    ("make", "own", "why"),
    [
        (tiny_sd_pipe, "Stable Diffusion 1.x and 2.x", "acts on 'transformer'"),
        (tiny_sdxl_pipe, "Stable Diffusion XL", "acts on 'transformer'"),
        (tiny_sd3_pipe, "Stable Diffusion 3 and 3.5", r"maps \(32,\) to 32|has no module"),
    ],
)
def test_on_another_family_the_error_says_for_which_it_was_made(tmp_path: Path, make: Any, own: str, why: str) -> None:
    save_file(published_grammar(), tmp_path / "lora.safetensors")
    pipe = make()
    with pytest.raises(ErasureCompatibilityError, match=f"made for FLUX.1, and this pipeline is {own}: .*({why})"):
        pipe.load_erasure(tmp_path / "lora.safetensors", method="lora")
    assert not pipe.list_erasures()


def test_a_unets_lora_on_a_transformer(tmp_path: Path) -> None:
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, title in ((2048, "Stable Diffusion XL"), (768, "Stable Diffusion 1.x and 2.x"), (5, "another model")):
        save_file({site + DOWN: torch.ones(1, width), site + UP: torch.ones(4, 1)}, tmp_path / f"{width}.safetensors")
        with pytest.raises(ErasureCompatibilityError, match=f"made for {title}, and this pipeline is FLUX.1"):
            tiny_flux_pipe().load_erasure(tmp_path / f"{width}.safetensors", method="lora")
