"""Fused erasures: the weights are the dense edit's, undoing is exact, and nothing is ever half done or on twice."""

import copy
import logging
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureError,
    ErasureInputError,
    ErasureNotFoundError,
)
from tests.helpers import (
    CONV_SITES,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    assert_merged_weights,
    assert_same_weights,
    base_images,
    cast_to_float8,
    dense_edit,
    equal,
    images,
    random_erasure,
    style_lora,
    tiny_sd_pipe,
    unchanged_by,
    weights,
)


LORA_SITES = UNET_SITES + CONV_SITES[:2] + TEXT_SITES[:1]


@cache  # none changes one
def make(kind: str, seed: int = 0) -> Erasure:
    if kind == "text_map":
        return random_erasure(tiny_sd_pipe(), "text_map", seed=seed)
    return random_erasure(tiny_sd_pipe(), "lora", LORA_SITES, size=0.5, seed=seed)


@pytest.fixture(params=["lora", "text_map"])
def erasure(request: pytest.FixtureRequest) -> Erasure:
    return make(request.param)


def hooks(pipe: Any) -> int:
    """Forward hooks on the modules within the UNet, and pre-hooks on it."""
    inner = sum(len(module._forward_hooks) for module in pipe.unet.modules())
    return inner + len(pipe.unet._forward_pre_hooks)


@pytest.mark.parametrize("how", ["fuse", "backend"])
def test_fused_is_the_dense_edit_and_back(erasure: Erasure, pipe: Any, how: str) -> None:
    base, before = images(pipe), weights(pipe)
    if how == "fuse":
        pipe.load_erasure(erasure, "one", strength=0.8)
        hooked = images(pipe)
        kept = pipe.fuse_erasures()
    else:
        hooked = None
        info = pipe.load_erasure(erasure, "one", strength=0.8, backend="merge")
        kept = info.kept_bytes
    oracle = dense_edit(tiny_sd_pipe(), (erasure, 0.8))
    assert_merged_weights(weights(pipe), weights(oracle))
    assert_like(images(pipe), images(oracle), base)
    if hooked is not None:
        assert_like(images(pipe), hooked, base)
    assert hooks(pipe) == 2, "only the guard before a pass and the one after it"
    (info,) = pipe.list_erasures()
    after = weights(pipe)
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert info.backend == "merge" and info.strength == 0.8
    assert kept == info.kept_bytes == sum(before[name].nbytes for name in changed) > 0

    pipe.unfuse_erasures()
    assert_same_weights(weights(pipe), before)
    (info,) = pipe.list_erasures()
    assert info.backend == "hook" and info.kept_bytes == 0
    assert_like(images(pipe), images(oracle), base)
    pipe.unload_erasure()
    assert equal(images(pipe), base)


def test_a_lora_under_a_text_map(pipe: Any) -> None:
    """Fused together they are (W + BA) T, which is what the hooks give."""
    pipe.load_erasure(make("text_map"), "map")
    pipe.load_erasure(make("lora"), "lora")
    base, hooked = base_images(), images(pipe)
    for names in ("map", ["map"]):
        with pytest.raises(ErasureInputError, match=r"fuse_erasures\(\['map', 'lora'\]\)"):
            unchanged_by(pipe, lambda names=names: pipe.fuse_erasures(names))
    pipe.fuse_erasures(["lora"])  # below a map that is a hook it is exact
    assert_like(images(pipe), hooked, base)
    pipe.fuse_erasures()
    assert [info.backend for info in pipe.list_erasures()] == ["merge", "merge"]
    assert_like(images(pipe), hooked, base)
    pipe.unload_erasure("lora")
    assert_merged_weights(weights(pipe), weights(dense_edit(tiny_sd_pipe(), make("text_map"))))
    for other in (make("lora", 3), make("text_map", 3)):
        with pytest.raises(ErasureInputError, match="unfuse_erasures"):
            unchanged_by(pipe, lambda other=other: pipe.load_erasure(other, "other"))
    conv = random_erasure(tiny_sd_pipe(), "lora", CONV_SITES[:1])
    pipe.load_erasure(conv, "conv", strict_base="error")
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), make("text_map"), conv)), base)


def test_strengths_unloading_disabling_and_more(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    one, two = make("lora"), make("lora", 1)
    base, before = images(pipe), weights(pipe)
    pipe.load_erasure(one, "one", backend="merge")
    caplog.set_level(logging.WARNING, "diffusers_erasure")
    info = pipe.load_erasure(two, "two", strict_base="error")  # our own merge is no other base
    assert set(info.base_match.values()) == {"same"}
    both = dense_edit(tiny_sd_pipe(), one, two)
    assert_like(images(pipe), images(both), base)

    pipe.fuse_erasures("two")
    pipe.set_erasures({"two": 0.5})
    half = dense_edit(tiny_sd_pipe(), one, (two, 0.5))
    assert_merged_weights(weights(pipe), weights(half))
    merged = weights(pipe)
    with pytest.raises(RuntimeError, match="mine"):
        with pipe.erasures_disabled():
            assert equal(images(pipe), base)
            with pipe.erasures_disabled():
                assert_same_weights(weights(pipe), before)
            with pytest.raises(ErasureInputError, match="disabled"):
                pipe.fuse_erasures()
            raise RuntimeError("mine")
    assert_same_weights(weights(pipe), merged)
    pipe.set_erasures("one", 0.0)
    assert_merged_weights(weights(pipe), weights(dense_edit(tiny_sd_pipe(), (two, 0.5))))
    pipe.unload_erasure("two")
    assert_same_weights(weights(pipe), before)
    assert [info.backend for info in pipe.list_erasures()] == ["merge"]
    pipe.set_erasures("one", 1.0)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), one)), base)
    pipe.unload_erasure()
    assert_same_weights(weights(pipe), before)
    assert equal(images(pipe), base)
    assert caplog.records == []


def test_saving_a_fused_one(pipe: Any, tmp_path: Any) -> None:
    erasure = make("lora")
    pipe.load_erasure(erasure, "one", backend="merge")
    pipe.save_erasure(tmp_path / "one")
    assert Erasure.from_pretrained(tmp_path / "one").content_hash == erasure.content_hash


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_originals(erasure: Erasure, pipe: Any, duplicate: Any) -> None:
    before = weights(pipe)
    pipe.load_erasure(erasure, "one", backend="merge")
    merged, keys = weights(pipe), list(pipe.unet.state_dict())
    assert keys == list(tiny_sd_pipe().unet.state_dict())
    twin = duplicate(pipe)
    assert_same_weights(weights(twin), merged)
    twin.unfuse_erasures()
    assert_same_weights(weights(twin), before)
    assert_same_weights(weights(pipe), merged)
    assert [info.backend for info in pipe.list_erasures()] == ["merge"]
    assert [info.backend for info in twin.list_erasures()] == ["hook"]
    pipe.unload_erasure()
    assert_same_weights(weights(pipe), before)
    assert_like(images(twin), images(dense_edit(pipe, erasure)), images(pipe))


def test_saved_models_hold_the_fused_weights_alone(pipe: Any, tmp_path: Any) -> None:
    erasure = make("lora")
    pipe.load_erasure(erasure, backend="merge")
    pipe.save_pretrained(tmp_path)
    back = type(pipe).from_pretrained(tmp_path)
    assert_same_weights(weights(back), weights(pipe))
    assert_merged_weights(weights(back), weights(dense_edit(tiny_sd_pipe(), erasure)))


def test_a_lora_fused_after_must_go_first(pipe: Any) -> None:
    erasure = make("lora")
    before = weights(pipe)
    pipe.load_erasure(erasure, backend="merge")
    merged = weights(pipe)
    pipe.load_lora_weights(style_lora(tiny_sd_pipe(), endings=("attn2.to_k",)), adapter_name="style")
    pipe.fuse_lora()
    for action in (
        pipe.unfuse_erasures,
        pipe.unload_erasure,
        lambda: pipe.set_erasures("random", 0.5),
        lambda: pipe.erasures_disabled().__enter__(),
        lambda: pipe.load_erasure(make("lora", 1), backend="merge", strict_base="ignore"),
    ):
        with pytest.raises(ErasureError, match=r"unfuse_lora\(\)"):
            unchanged_by(pipe, action)
    assert [(info.strength, info.backend) for info in pipe.list_erasures()] == [(1.0, "merge")]
    for component in ("unet", "text_encoder"):  # `unfuse_lora` rounds; here as if it had been exact
        for name, module in getattr(pipe, component).named_modules():
            if name.endswith(".base_layer"):
                module.weight.data.copy_(merged[f"{component}.{name.removesuffix('.base_layer')}.weight"])
    pipe.unload_lora_weights()
    pipe.unfuse_erasures()
    assert_same_weights(weights(pipe), before)


def test_a_user_lora_beside(pipe: Any) -> None:
    """A LoRA that was fused before is part of what is kept; one that is not fused adds to the fused weights."""
    erasure = make("lora")
    pipe.load_lora_weights(style_lora(tiny_sd_pipe()), adapter_name="style")
    base = images(pipe)
    pipe.load_erasure(erasure)
    hooked = images(pipe)
    pipe.fuse_erasures()
    assert_like(images(pipe), hooked, base)
    pipe.unload_lora_weights()
    assert_merged_weights(weights(pipe), weights(dense_edit(tiny_sd_pipe(), erasure)))


def test_fused_projections(pipe: Any) -> None:
    erasure = make("lora")
    pipe.load_erasure(erasure)
    pipe.fuse_qkv_projections()
    with pytest.raises(ErasureCompatibilityError, match="unfuse_qkv_projections"):
        pipe.fuse_erasures()
    pipe.unfuse_qkv_projections()
    pipe.fuse_erasures()
    drawn, base = images(pipe), base_images()
    pipe.fuse_qkv_projections()  # of the fused weights
    assert_like(images(pipe), drawn, base)
    with pytest.raises(ErasureError, match="unfuse_qkv_projections"):
        pipe.unfuse_erasures()
    pipe.unfuse_qkv_projections()
    pipe.unfuse_erasures()
    pipe.unload_erasure()
    assert equal(images(pipe), base)


class PackedWeight(nn.Parameter):
    """As a quantised weight: a class of its own."""


def offload(pipe: Any) -> None:
    cpu_offload(pipe.unet, "cpu")


def quantise(pipe: Any) -> None:
    linear = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
    linear.weight = PackedWeight(linear.weight.detach())


@pytest.mark.parametrize(
    ("prepare", "message"), [(offload, "offloaded"), (cast_to_float8, "quantised"), (quantise, "quantised")]
)
def test_weights_that_cannot_be_fused(erasure: Erasure, pipe: Any, prepare: Any, message: str) -> None:
    prepare(pipe)
    pipe.load_erasure(erasure, strict_base="ignore")
    for action in (pipe.fuse_erasures, lambda: pipe.load_erasure(make("lora", 1), backend="merge")):
        with pytest.raises((ErasureCompatibilityError, ErasureInputError)):
            action()
        assert [info.backend for info in pipe.list_erasures()] == ["hook"]
    with pytest.raises(ErasureCompatibilityError, match=message):
        pipe.fuse_erasures()
    if prepare is not offload:
        drawn = images(pipe)
        oracle = dense_edit(tiny_sd_pipe(), erasure)
        if prepare is quantise:
            assert_like(drawn, images(oracle), base_images())


def test_offloaded_after_fusing(pipe: Any) -> None:
    pipe.load_erasure(make("lora"), backend="merge")
    offload(pipe)
    with pytest.raises(ErasureError, match="remove_all_hooks"):
        pipe.unfuse_erasures()
    assert [info.backend for info in pipe.list_erasures()] == ["merge"]


def test_half_precision_and_casts(pipe: Any) -> None:
    erasure = make("lora")
    pipe.to(torch.bfloat16)
    before = weights(pipe)
    pipe.load_erasure(erasure, backend="merge")
    plain = tiny_sd_pipe().to(torch.bfloat16)
    assert_merged_weights(weights(pipe), weights(dense_edit(plain, erasure)))
    pipe.unfuse_erasures()
    assert_same_weights(weights(pipe), before)
    pipe.fuse_erasures()
    pipe.to(torch.float32)
    with pytest.raises(ErasureError, match="was cast"):
        pipe.unfuse_erasures()


def test_overflow_changes_nothing(pipe: Any) -> None:
    erasure = random_erasure(tiny_sd_pipe(), "lora", UNET_SITES, size=0.5).rescaled(1e7)
    pipe.to(torch.float16)
    before = weights(pipe)
    pipe.load_erasure(erasure, "huge")
    with pytest.raises(ErasureInputError, match="cannot hold"):
        pipe.fuse_erasures()
    assert_same_weights(weights(pipe), before)
    assert [info.backend for info in pipe.list_erasures()] == ["hook"]
    with pytest.raises(ErasureInputError, match="cannot hold"):
        pipe.load_erasure(make("lora"), "two", backend="merge", strength=1e7)
    assert [info.name for info in pipe.list_erasures()] == ["huge"]
    assert_same_weights(weights(pipe), before)


def test_text_encoder_prompts_are_guarded_when_fused(pipe: Any) -> None:
    pipe.load_erasure(make("lora"), backend="merge")
    embeds = torch.zeros(1, 77, 32)
    with pytest.raises(ErasureError, match="prompt_embeds"):
        images(pipe, prompt_embeds=embeds, negative_prompt_embeds=embeds)


def test_wrong_arguments(pipe: Any) -> None:
    with pytest.raises(ErasureInputError, match="No erasure"):
        pipe.fuse_erasures()
    pipe.unfuse_erasures()
    pipe.load_erasure(make("lora"), "one")
    with pytest.raises(ErasureNotFoundError):
        pipe.fuse_erasures(["one", "two"])
    with pytest.raises(ErasureInputError, match="backend"):
        pipe.load_erasure(make("lora", 1), "two", backend="magic")
    assert [info.backend for info in pipe.list_erasures()] == ["hook"]
