"""Loading: all or nothing, names and content once, the base recognised, plain LoRAs on request, methods bound."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import diffusers_erasure
from diffusers_erasure import (
    ErasablePipeline,
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInputError,
    ErasureNotFoundError,
    as_erasable,
    install,
    uninstall,
)
from diffusers_erasure.layers.lora import LoraLayer
from diffusers_erasure.layers.text_map import TextMap
from diffusers_erasure.live import attachment
from diffusers_erasure.schema import Concept
from tests.helpers import (
    CONV_SITES,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    base_images,
    dense_edit,
    equal,
    far,
    images,
    only_family,
    random_erasure,
    style_lora,
    tiny_sd_pipe,
    unchanged_by,
)


FILE = "pytorch_lora_weights.safetensors"
TEXT = ("text_encoder", "tokenizer")
BOTH = UNET_SITES[:2] + CONV_SITES[:1] + TEXT_SITES[:1]


def with_tensor(erasure: Erasure, name: str, value: torch.Tensor) -> Erasure:
    ((file, tensors),) = erasure.tensors.items()
    return Erasure(erasure.config, {file: {**tensors, name: value}})


# ------------------------------------------------------------------------------------------------ all or nothing


def wrong_shape(pipe: Any) -> Erasure:
    erasure = random_erasure(pipe, sites=UNET_SITES, base=only_family(pipe))
    return with_tensor(erasure, UNET_SITES[-1] + ".lora_A.weight", torch.ones(3, 33))


def missing_site(pipe: Any) -> Erasure:
    erasure = random_erasure(pipe, sites=BOTH, base=only_family(pipe))
    layer = erasure.config.layers[0]
    sites = (*layer.sites[:-1], "conv_nowhere")
    tensors = {
        name.replace(layer.sites[-1], "conv_nowhere"): value for name, value in erasure.tensors[layer.file].items()
    }
    config = dataclasses.replace(
        erasure.config, layers=(dataclasses.replace(layer, sites=sites), *erasure.config.layers[1:])
    )
    return Erasure(config, {layer.file: tensors})


def other_architecture(pipe: Any) -> Erasure:
    return random_erasure(tiny_sd_pipe(cross_attention_dim=48), sites=UNET_SITES)


def wide_text_map(pipe: Any) -> Erasure:
    other = tiny_sd_pipe(cross_attention_dim=48)
    return random_erasure(other, "text_map", base=only_family(other))


def other_family(pipe: Any) -> Erasure:
    erasure = random_erasure(pipe)
    base = dataclasses.replace(erasure.config.base_model, family="flux")
    return Erasure(dataclasses.replace(erasure.config, base_model=base), erasure.tensors)


def not_a_linear(pipe: Any) -> Erasure:
    erasure = random_erasure(pipe, sites=("unet.conv_in",), base=only_family(pipe))
    layer = dataclasses.replace(erasure.config.layers[0], sites=("conv_norm_out",))
    tensors = {name.replace("conv_in", "conv_norm_out"): value for name, value in erasure.tensors[layer.file].items()}
    return Erasure(dataclasses.replace(erasure.config, layers=(layer,)), {layer.file: tensors})


def other_text_encoder(pipe: Any) -> Erasure:
    return random_erasure(tiny_sd_pipe(text_seed=9), "text_map", derived_from=TEXT)


def missing_component(pipe: Any) -> Erasure:
    erasure = random_erasure(pipe, sites=BOTH, base=only_family(pipe))
    layer = dataclasses.replace(erasure.config.layers[1], component="text_encoder_2")
    return Erasure(dataclasses.replace(erasure.config, layers=(erasure.config.layers[0], layer)), erasure.tensors)


FAILURES: dict[str, tuple[Callable[[Any], Erasure], str]] = {
    "wrong shape": (wrong_shape, r"to_v.*33"),
    "missing site": (missing_site, "conv_nowhere"),
    "another architecture": (other_architecture, "unet.*another architecture"),
    "rows of another width": (wide_text_map, "width 32.*width 48"),
    "another family": (other_family, "flux"),
    "a module of another type": (not_a_linear, "conv_norm_out.*GroupNorm"),
    "another text encoder": (other_text_encoder, "text_encoder has other weights"),
    "a missing component": (missing_component, "text_encoder_2"),
}


@pytest.mark.parametrize("first_loaded", [False, True], ids=["fresh", "beside another"])
@pytest.mark.parametrize("case", list(FAILURES))
def test_a_failure_leaves_the_pipeline_as_it_was(pipe: Any, case: str, first_loaded: bool) -> None:
    make, message = FAILURES[case]
    erasure = make(pipe)
    if first_loaded:
        pipe.load_erasure(random_erasure(tiny_sd_pipe(), sites=UNET_SITES, seed=5), "first")

    def load() -> None:
        with pytest.raises(ErasureCompatibilityError, match=message):
            pipe.load_erasure(erasure, "second", strict_base="ignore")

    unchanged_by(pipe, load)
    assert [info.name for info in pipe.list_erasures()] == ["first"] * first_loaded


def test_nan_never_comes_near_a_pipeline(pipe: Any, tmp_path: Path) -> None:
    erasure = random_erasure(pipe)
    name = UNET_SITES[0] + ".lora_B.weight"
    spoilt = {**erasure.tensors[FILE], name: erasure.tensors[FILE][name] * float("nan")}
    with pytest.raises(ErasureFileError, match=f"{name}.*not finite"):
        Erasure(erasure.config, {FILE: spoilt})
    save_file({key: value.contiguous() for key, value in spoilt.items()}, tmp_path / FILE)

    def load() -> None:
        with pytest.raises(ErasureFileError, match="not finite"):
            pipe.load_erasure(tmp_path, method="lora", weight_name=FILE)

    unchanged_by(pipe, load)


@pytest.mark.parametrize("first_loaded", [False, True], ids=["fresh", "beside another"])
@pytest.mark.parametrize("place", ["placement", "build", "hook", "second component", "text map", "guard"])
def test_a_failure_in_the_middle_of_attaching(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, place: str, first_loaded: bool
) -> None:
    """Out of memory at the third site, at the last fold, at the second component: all is taken away again."""
    if first_loaded:
        pipe.load_erasure(random_erasure(tiny_sd_pipe(), sites=BOTH, seed=5), "first")
        pipe.load_erasure(random_erasure(tiny_sd_pipe(), "text_map", seed=6), "map")
    kind = "text_map" if place == "text map" else "lora"
    erasure = random_erasure(pipe, kind, (*UNET_SITES, *BOTH[2:]), concepts=(Concept("lynx"),))  # of no loaded one
    calls = [0]

    def fail_at(number: int, original: Any, *, once: bool = True) -> Any:
        def failing(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                raise MemoryError("injected")
            return original(*args, **kwargs)

        return failing

    def load() -> None:
        with monkeypatch.context() as patched:
            if place == "placement":
                from diffusers_erasure.layers import sites

                patched.setattr(sites, "placement", fail_at(3, sites.placement))
            elif place == "build":
                patched.setattr(LoraLayer, "build", fail_at(2, LoraLayer.build))
            elif place == "hook":
                patched.setattr(nn.Linear, "register_forward_hook", fail_at(3, nn.Linear.register_forward_hook))
            elif place == "second component":
                patched.setattr(LoraLayer, "attach", fail_at(2, LoraLayer.attach))
            elif place == "text map":
                patched.setattr(TextMap, "__init__", fail_at(1, TextMap.__init__))
            else:
                patched.setattr(attachment, "Guard", fail_at(1 + 0, attachment.Guard))
                if first_loaded:  # its guards stand already: fail where the next thing is looked up
                    patched.setattr(attachment, "layer_kind", fail_at(1, attachment.layer_kind))
            with pytest.raises(MemoryError, match="injected"):
                pipe.load_erasure(erasure, "second")

    unchanged_by(pipe, load)
    assert [info.name for info in pipe.list_erasures()] == ["first", "map"] * first_loaded
    # Nothing half-made is left that the next attempt would trust.
    pipe.unload_erasure()
    pipe.load_erasure(erasure, "second")
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base_images())


# -------------------------------------------------------------------------------------------- names and content


def test_the_same_name_twice(pipe: Any, tmp_path: Path) -> None:
    pipe.load_erasure(random_erasure(pipe, seed=1), "mine")
    other = random_erasure(pipe, seed=2)

    def load() -> None:
        with pytest.raises(ErasureInputError, match=r"mine.*adapter_name"):
            pipe.load_erasure(other, "mine")

    unchanged_by(pipe, load)
    pipe.load_erasure(other, "other")
    assert [info.name for info in pipe.list_erasures()] == ["mine", "other"]


def test_the_same_content_twice(pipe: Any, tmp_path: Path) -> None:
    erasure = random_erasure(pipe)
    erasure.save_pretrained(tmp_path / "copy")
    pipe.load_erasure(erasure, "mine")
    for twin in (erasure, tmp_path / "copy"):

        def load(twin: Any = twin) -> None:
            with pytest.raises(ErasureInputError, match="loaded already, as 'mine'"):
                pipe.load_erasure(twin, "yours")

        unchanged_by(pipe, load)
    pipe.unload_erasure("mine")
    assert pipe.load_erasure(tmp_path / "copy").name == "copy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1}, "-1"),
        ({"strength": float("nan")}, "nan"),
        ({"strength": float("inf")}, "inf"),
        ({"strength": True}, "True"),
        ({"strength": "1"}, "'1'"),
        ({"strict_base": True}, "strict_base"),
        ({"method": "uce"}, "method"),
        ({"weight_name": "x.safetensors"}, "weight_name"),
        ({"adapter_name": ""}, "''"),
        ({"adapter_name": "a.b"}, "a.b"),
        ({"adapter_name": 3}, "3"),
    ],
)
def test_wrong_arguments(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        pipe.load_erasure(random_erasure(pipe), **arguments)
    assert pipe.list_erasures() == []


def test_names_by_default(pipe: Any, tmp_path: Path) -> None:
    for seed in (1, 2):
        assert pipe.load_erasure(random_erasure(pipe, seed=seed)).name == ("random" if seed == 1 else "random_2")
    random_erasure(pipe, seed=3).save_pretrained(tmp_path / "no more.zebras")
    assert pipe.load_erasure(tmp_path / "no more.zebras").name == "no_more_zebras"


def test_what_is_listed(pipe: Any, tmp_path: Path) -> None:
    random_erasure(pipe, sites=BOTH).save_pretrained(tmp_path / "here")
    info = pipe.load_erasure(tmp_path / "here", strength=0.5)
    assert info == pipe.list_erasures()[0]
    assert (info.name, info.method, info.strength, info.source) == ("here", "random", 0.5, str(tmp_path / "here"))
    assert [concept.target for concept in info.concepts] == ["zebra"]
    assert info.layers == ("lora on unet (3 sites)", f"lora on text_encoder ({TEXT_SITES[0][13:]})")
    assert info.base_match == {"unet": "same", "text_encoder": "same", "tokenizer": "same"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.strength = 1.0
    info.base_match["unet"] = "different weights"
    assert pipe.list_erasures()[0].base_match["unet"] == "same", "a copy"
    pipe.set_erasures("here", 1.0)
    assert info.strength == 0.5, "a snapshot"


# --------------------------------------------------------------------------------------------------- set, unload


def test_set_erasures(pipe: Any) -> None:
    for seed, name in enumerate("cab"):
        pipe.load_erasure(random_erasure(pipe, seed=seed), name)

    def strengths() -> dict[str, float]:
        return {info.name: info.strength for info in pipe.list_erasures()}

    assert list(strengths()) == ["c", "a", "b"], "the order of loading"
    pipe.set_erasures("a", 0.5)
    assert strengths() == {"c": 1.0, "a": 0.5, "b": 1.0}, "others keep theirs"
    pipe.set_erasures(["a", "b"], 0.25)
    assert strengths() == {"c": 1.0, "a": 0.25, "b": 0.25}
    pipe.set_erasures(["b", "c"], [2, 0])
    assert strengths() == {"c": 0.0, "a": 0.25, "b": 2.0}
    pipe.set_erasures({"a": 0.75, "c": 1.5})
    assert strengths() == {"c": 1.5, "a": 0.75, "b": 2.0}
    pipe.set_erasures(["a", "b", "c"])
    assert strengths() == {"c": 1.0, "a": 1.0, "b": 1.0}
    pipe.set_erasures([])
    assert strengths() == {"c": 1.0, "a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("names", "strengths", "kind", "message"),
    [
        (["a", "nobody"], [0.1, 0.2], ErasureNotFoundError, "nobody"),
        (["a", "b"], [0.1, -0.2], ErasureInputError, "-0.2"),
        (["a", "b"], [0.1, float("nan")], ErasureInputError, "nan"),
        (["a", "b"], [0.1], ErasureInputError, "2 names and 1"),
        (["a"], [0.1, 0.2], ErasureInputError, "1 names and 2"),
        (["a", "a"], [0.1, 0.2], ErasureInputError, "once"),
        ({"a": 0.1, "b": True}, None, ErasureInputError, "True"),
        ({"a": 0.1}, 0.2, ErasureInputError, "not both"),
    ],
)
def test_set_erasures_refuses_all_or_nothing(
    pipe: Any, names: Any, strengths: Any, kind: type[Exception], message: str
) -> None:
    pipe.load_erasure(random_erasure(pipe, seed=1), "a")
    pipe.load_erasure(random_erasure(pipe, seed=2), "b")
    before = pipe.list_erasures()

    def change() -> None:
        with pytest.raises(kind, match=message):
            pipe.set_erasures(names, strengths)

    unchanged_by(pipe, change)
    assert pipe.list_erasures() == before


def test_unloading_what_is_not_loaded(pipe: Any) -> None:
    pipe.unload_erasure()
    with pytest.raises(ErasureNotFoundError, match="zebra"):
        pipe.unload_erasure("zebra")
    pipe.load_erasure(random_erasure(pipe), "horse")
    with pytest.raises(ErasureNotFoundError, match=r"zebra.*horse"):
        pipe.unload_erasure("zebra")
    assert [info.name for info in pipe.list_erasures()] == ["horse"]


# ---------------------------------------------------------------------------------------------------- plain LoRAs


@pytest.fixture
def stock_lora(tmp_path: Path) -> Path:
    """A LoRA of the UNet and the text encoder with alpha = 3 x rank, saved by diffusers itself with its metadata."""
    pipe = tiny_sd_pipe()
    torch.manual_seed(0)
    states = {}
    for name, targets in (("unet", ["to_k", "to_q", "conv1"]), ("text_encoder", ["q_proj", "v_proj"])):
        model = getattr(pipe, name)
        config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        model.add_adapter(config, adapter_name="default")
        states[name] = get_peft_model_state_dict(model, adapter_name="default")
        states[name + "_metadata"] = config.to_dict()
    for name in ("unet", "text_encoder"):
        states[name] = {key: value * 0.2 if "lora_B" in key else value for key, value in states[name].items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "stock",
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        unet_lora_adapter_metadata=states["unet_metadata"],
        text_encoder_lora_adapter_metadata=states["text_encoder_metadata"],
    )
    return tmp_path / "stock"


def stock_images(folder: Path, name: str = FILE) -> Any:
    pipe = tiny_sd_pipe()
    pipe.load_lora_weights(str(folder), weight_name=name)
    return images(pipe)


def test_plain_lora_with_metadata(pipe: Any, stock_lora: Path) -> None:
    """The same image as stock diffusers with the same file; alpha / rank = 3 is in the metadata."""
    base = images(pipe)
    info = pipe.load_erasure(stock_lora, method="lora", weight_name=FILE)
    assert_like(images(pipe), stock_images(stock_lora), base)
    assert (info.name, info.method, info.base_match, info.concepts) == ("stock", "lora", {}, ())
    pipe.unload_erasure()
    assert equal(images(pipe), base)


def test_plain_lora_as_a_string_and_without_a_file_name(pipe: Any, stock_lora: Path) -> None:
    pipe.load_erasure(str(stock_lora), method="lora")
    assert_like(images(pipe), stock_images(stock_lora), base_images())


def test_plain_lora_survives_saving(pipe: Any, stock_lora: Path, tmp_path: Path) -> None:
    pipe.load_erasure(stock_lora, method="lora", weight_name=FILE)
    drawn = images(pipe)
    pipe.save_erasure(tmp_path / "published")
    fresh = tiny_sd_pipe()
    fresh.load_erasure(tmp_path / "published")
    assert equal(images(fresh), drawn)


def test_plain_lora_of_kohya(pipe: Any, tmp_path: Path) -> None:
    """One alpha for all, in tensors of their own."""
    tensors = {}
    for name, value in style_lora(pipe, endings=("attn1.to_q", "attn2.to_k", "ff.net.2")).items():
        if not name.startswith("unet."):
            continue
        site, half = name.removeprefix("unet.").removesuffix(".weight").rsplit(".", 1)
        flat = "lora_unet_" + site.replace(".", "_")
        tensors[f"{flat}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
        tensors[f"{flat}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    pipe.load_erasure(tmp_path, "kohya", method="lora", weight_name="kohya.safetensors")
    assert_like(images(pipe), stock_images(tmp_path, "kohya.safetensors"), base_images())


def test_plain_lora_only_when_asked_for(pipe: Any, stock_lora: Path) -> None:
    def load() -> None:
        with pytest.raises(ErasureNotFoundError, match='method="lora"'):
            pipe.load_erasure(stock_lora)

    unchanged_by(pipe, load)


def test_a_stock_file_of_an_erasure_is_a_lora(pipe: Any, tmp_path: Path) -> None:
    """What `stock` promises: diffusers alone loads the LoRA file of an erasure to the same images."""
    erasure = random_erasure(pipe, sites=UNET_SITES + CONV_SITES + TEXT_SITES[1:], size=0.5)
    erasure.save_pretrained(tmp_path / "e")
    pipe.load_erasure(tmp_path / "e")
    assert_like(images(pipe), stock_images(tmp_path / "e"), base_images())


# ------------------------------------------------------------------------------------------------ the base model


def finetuned() -> Any:
    pipe = tiny_sd_pipe()
    pipe.unet.conv_in.weight.data += 1e-3
    return pipe


def test_fine_tuned_denoiser(caplog: pytest.LogCaptureFixture) -> None:
    erasure = random_erasure(tiny_sd_pipe(), "text_map", derived_from=TEXT)
    with caplog.at_level("WARNING", logger="diffusers_erasure"):
        info = finetuned().load_erasure(erasure)
    assert info.base_match == {"unet": "different weights", "text_encoder": "same", "tokenizer": "same"}
    assert "unet" in caplog.text
    assert "strict_base" in caplog.text
    caplog.clear()
    pipe = finetuned()
    with pytest.raises(ErasureCompatibilityError, match="unet"):
        pipe.load_erasure(erasure, strict_base="error")
    assert pipe.list_erasures() == []
    assert not hasattr(pipe.unet, "erasure_modules")
    with caplog.at_level("WARNING", logger="diffusers_erasure"):
        pipe.load_erasure(erasure, strict_base="ignore")
        tiny_sd_pipe().load_erasure(erasure, strict_base="error")
    assert caplog.text == ""


@pytest.mark.parametrize("strict_base", ["warn", "error", "ignore"])
def test_another_text_encoder(strict_base: str) -> None:
    """Always an error under a layer that was derived from text; otherwise decided like other weights."""
    derived = random_erasure(tiny_sd_pipe(), "text_map", derived_from=TEXT)
    free = random_erasure(tiny_sd_pipe(), "text_map", seed=1)
    pipe = tiny_sd_pipe(text_seed=9)
    with pytest.raises(ErasureCompatibilityError, match="text_encoder has other weights"):
        pipe.load_erasure(derived, strict_base=strict_base)
    if strict_base == "error":
        with pytest.raises(ErasureCompatibilityError, match="text_encoder"):
            pipe.load_erasure(free, strict_base=strict_base)
    else:
        assert pipe.load_erasure(free, strict_base=strict_base).base_match["text_encoder"] == "different weights"


def test_another_vocabulary(pipe: Any, tmp_path: Path) -> None:
    derived = random_erasure(pipe, "text_map", derived_from=TEXT)
    pipe.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["apple</w>"], vocabulary["red</w>"] = vocabulary["red</w>"], vocabulary["apple</w>"]
    path.write_text(json.dumps(content))
    pipe.tokenizer = type(pipe.tokenizer).from_pretrained(tmp_path)
    with pytest.raises(ErasureCompatibilityError, match="tokenizer.*vocabulary"):
        pipe.load_erasure(derived)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("live", DTYPES)
@pytest.mark.parametrize("made", DTYPES)
def test_copies_in_other_dtypes_are_the_same(made: torch.dtype, live: torch.dtype) -> None:
    """Recognised within their rounding; and a change of the weights that is larger than it is noticed."""
    erasure = random_erasure(tiny_sd_pipe().to(made), "text_map", derived_from=TEXT)
    pipe = tiny_sd_pipe().to(live)
    assert set(pipe.load_erasure(erasure, strict_base="error").base_match.values()) == {"same"}
    changed = tiny_sd_pipe()
    changed.unet.mid_block.attentions[0].proj_in.weight.data *= 1.05
    assert changed.to(live).load_erasure(erasure, strict_base="ignore").base_match["unet"] == "different weights"


@pytest.mark.parametrize("half", DTYPES[1:])
def test_half_precision_copies_read_as_float32(half: torch.dtype) -> None:
    """`from_pretrained(variant="fp16")` without a dtype: what the values are tells how they were rounded."""
    exact, rounded = tiny_sd_pipe(), tiny_sd_pipe().to(half).to(torch.float32)
    for made, live in ((exact, rounded), (rounded, exact)):
        erasure = random_erasure(made, "text_map", derived_from=TEXT)
        assert set(copy.deepcopy(live).load_erasure(erasure, strict_base="ignore").base_match.values()) == {"same"}


def lora_on(pipe: Any) -> None:
    pipe.load_lora_weights(style_lora(pipe, endings=("attn1.to_q", "attn2.to_k", "conv_in")))


def offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    images(pipe)


def textual_inversion(pipe: Any) -> None:
    pipe.load_textual_inversion({"<new>": torch.ones(32)}, token="<new>")


def compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def other_erasure(pipe: Any) -> None:
    pipe.load_erasure(random_erasure(pipe, sites=UNET_SITES + TEXT_SITES, seed=9), "another")


@pytest.mark.parametrize("prepare", [lora_on, offload, textual_inversion, compiled, other_erasure])
def test_the_base_is_recognised_behind(pipe: Any, prepare: Callable[[Any], None]) -> None:
    erasure = random_erasure(pipe, "text_map", derived_from=TEXT)
    prepare(pipe)
    assert set(pipe.load_erasure(erasure, "map", strict_base="error").base_match.values()) == {"same"}


@pytest.mark.parametrize("prepare", [lora_on, offload, textual_inversion, other_erasure])
def test_the_fingerprint_is_made_behind(pipe: Any, prepare: Callable[[Any], None]) -> None:
    prepare(pipe)
    erasure = random_erasure(pipe, "text_map", derived_from=TEXT)
    assert set(tiny_sd_pipe().load_erasure(erasure, strict_base="error").base_match.values()) == {"same"}


def test_what_cannot_be_compared(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    erasure = random_erasure(pipe, "text_map", derived_from=TEXT)
    pipe.tokenizer = None
    with pytest.raises(ErasureCompatibilityError, match="tokenizer"):
        pipe.load_erasure(erasure, strict_base="error")
    with caplog.at_level("WARNING", logger="diffusers_erasure"):
        assert pipe.load_erasure(erasure).base_match["tokenizer"] == "unverified"
    assert "tokenizer" in caplog.text


# ------------------------------------------------------------------------------------------------ bound methods


BASES = (DiffusionPipeline, ModularPipeline)
# In a process where nothing is bound yet: the bases' attributes as diffusers has them, bound, and unbound again.
BIND = """
import diffusers_erasure, json
from diffusers import DiffusionPipeline, ModularPipeline
names = lambda: [sorted(vars(base)) for base in (DiffusionPipeline, ModularPipeline)]
before = names()
diffusers_erasure.install()
bound = names()
diffusers_erasure.uninstall()
print(json.dumps([before, bound, names()]))
"""


@pytest.fixture(scope="module")
def bound() -> tuple[str, ...]:
    """The names that installing adds to both bases, and uninstalling takes away, by the bases' own account."""
    environment = {**os.environ, "DIFFUSERS_ERASURE_NO_PATCH": "1"}
    done = subprocess.run([sys.executable, "-c", BIND], env=environment, capture_output=True, text=True, check=True)
    before, there, after = json.loads(done.stdout)
    assert after == before, "a method survives `uninstall`"
    # `push_to_hub` was there, by inheritance.
    added = [sorted(set(new) - set(old) - {"push_to_hub"}) for new, old in zip(there, before, strict=True)]
    assert added[0] == added[1]
    return tuple(added[0])


@pytest.fixture
def restored() -> Iterator[None]:
    before = [dict(vars(base)) for base in BASES]
    yield
    for base, attributes in zip(BASES, before, strict=True):
        for name in set(vars(base)) - set(attributes):
            delattr(base, name)
        for name, value in attributes.items():
            if vars(base).get(name) is not value:
                setattr(base, name, value)
    install()  # diffusers' builders, which are no attributes of the bases


def test_bound_to_both_bases(bound: tuple[str, ...]) -> None:
    assert set(bound) == {name for name in vars(ErasablePipeline) if not name.startswith("_")}
    for base in BASES:
        for name in bound:
            method, function = vars(base)[name], getattr(diffusers_erasure, name)
            assert method.__doc__ == function.__doc__
            assert method.__wrapped__ is function


def test_modular_pipelines(tmp_path: Path) -> None:
    """`ModularPipeline` is no `DiffusionPipeline`, and works all the same."""

    class Modular(ModularPipeline):
        def __init__(self, unet: nn.Module) -> None:
            self.unet = unet

    whole = tiny_sd_pipe()
    pipe = Modular(whole.unet)
    base, erasure = images(whole), random_erasure(whole)
    info = pipe.load_erasure(erasure, strict_base="ignore")
    assert info.base_match["text_encoder"] == "unverified"
    assert_like(images(whole), images(dense_edit(tiny_sd_pipe(), erasure)), base)
    pipe.unload_erasure()
    assert equal(images(whole), base)


def test_install_and_uninstall(restored: None, bound: tuple[str, ...], pipe: Any) -> None:
    attributes = [dict(vars(base)) for base in BASES]
    install()
    assert [dict(vars(base)) for base in BASES] == attributes, "a second call does nothing"
    pipe.load_erasure(random_erasure(pipe))
    erased = images(pipe)
    for _ in range(2):
        uninstall()
        assert not [name for base in BASES for name in dir(base) if name in bound]
    with pytest.raises(ErasureInputError, match="install"):
        as_erasable(pipe)
    assert equal(images(pipe), erased), "what is loaded stays on"
    assert far(erased, base_images()) > 0.05
    install()
    assert as_erasable(pipe) is pipe
    assert [info.name for info in pipe.list_erasures()] == ["random"]


def test_foreign_attributes_are_left_alone(restored: None, caplog: pytest.LogCaptureFixture) -> None:
    def foreign(self: Any) -> str:
        return "foreign"

    uninstall()
    DiffusionPipeline.set_erasures = foreign
    with caplog.at_level("WARNING", logger="diffusers_erasure"):
        install()
    assert vars(DiffusionPipeline)["set_erasures"] is foreign
    assert "DiffusionPipeline.set_erasures" in caplog.text
    assert hasattr(DiffusionPipeline, "load_erasure")
    uninstall()
    assert vars(DiffusionPipeline)["set_erasures"] is foreign


def test_opting_out() -> None:
    code = (
        "import diffusers_erasure; from diffusers import DiffusionPipeline, ModularPipeline, UNetMotionModel;"
        "print([hasattr(c, 'load_erasure') for c in (DiffusionPipeline, ModularPipeline)],"
        "[hasattr(f, '_diffusers_erasure') for f in (DiffusionPipeline.save_pretrained, UNetMotionModel.from_unet2d)])"
    )
    environment = {**os.environ, "DIFFUSERS_ERASURE_NO_PATCH": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[False, False] [False, False]"
