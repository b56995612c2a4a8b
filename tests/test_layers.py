"""Layers and their attachment: exact when off, exact when gone, summed when there are several, guarded in training."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureInactiveError,
    ErasureTrainingError,
    prompt_embeds_are_erased,
    training_through_erasures,
)
from tests.helpers import (
    CONV_SITES,
    ROUNDINGS,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    assert_same_weights,
    base_images,
    dense_edit,
    equal,
    far,
    images,
    models,
    noise,
    only_family,
    random_erasure,
    roundings,
    rows_of,
    tiny_sd_pipe,
    tree,
    weights,
)


@cache  # none changes one
def erasure_of(kind: str, seed: int = 0, size: float = 0.7) -> Erasure:
    sites = {
        "lora": UNET_SITES,
        "conv": CONV_SITES,
        "text": TEXT_SITES,
        "text_map": (),
        "all": UNET_SITES + TEXT_SITES,
    }
    layer = "text_map" if kind == "text_map" else "lora"
    return random_erasure(tiny_sd_pipe(), layer, sites[kind], seed=seed, size=size)


KINDS = ("lora", "conv", "text", "text_map")


# ----------------------------------------------------------------------------------------------- acting, exactly


@pytest.mark.parametrize("kind", KINDS)
def test_acts_like_the_dense_edit(pipe: Any, kind: str) -> None:
    base, erasure = images(pipe), erasure_of(kind)
    pipe.load_erasure(erasure)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base)


@pytest.mark.parametrize("kind", KINDS)
def test_off_and_gone_is_the_base_bit_for_bit(pipe: Any, kind: str) -> None:
    base = images(pipe)  # first, as a call leaves attributes on the pipeline
    before, values = tree(pipe), weights(pipe)
    pipe.load_erasure(erasure_of(kind), strength=0)
    assert equal(images(pipe), base)
    pipe.set_erasures("random", 1.0)
    assert far(images(pipe), base) > 0.05
    pipe.set_erasures("random", 0)
    assert equal(images(pipe), base)
    pipe.set_erasures("random", 1.0)
    pipe.unload_erasure()
    assert tree(pipe) == before
    assert_same_weights(values, weights(pipe))
    assert equal(images(pipe), base)


@pytest.mark.parametrize("strided", [False, True])
def test_convolutions(strided: bool) -> None:
    """Stride, padding and dilation are those of the convolution; exact for one module alone, against its dense form."""
    pipe = tiny_sd_pipe()
    site = CONV_SITES[1] if strided else "unet.conv_out"
    module = pipe.unet.get_submodule(site.removeprefix("unet."))
    assert module.stride == ((2, 2) if strided else (1, 1))
    assert module.padding == (1, 1)
    erasure = random_erasure(pipe, "lora", (site,), rank=5)
    edited = dense_edit(pipe, erasure).unet.get_submodule(site.removeprefix("unet."))
    values = torch.randn(2, module.in_channels, 9, 7, generator=torch.Generator().manual_seed(0))
    pipe.unet.requires_grad_(False)
    base = module(values)
    pipe.load_erasure(erasure)
    assert_like(module(values).numpy(), edited(values).detach().numpy(), base.numpy())


def test_one_by_one_convolutions_of_any_form() -> None:
    """Dilated, unevenly padded and padded by name."""
    for arguments in ({"dilation": 2, "padding": (0, 2)}, {"padding": "same"}, {"padding": "valid", "kernel_size": 1}):
        pipe = tiny_sd_pipe()
        pipe.unet.conv_in = nn.Conv2d(**{"in_channels": 4, "out_channels": 32, "kernel_size": 3, **arguments})
        pipe.unet.requires_grad_(False)
        erasure = random_erasure(pipe, "lora", ("unet.conv_in",))
        edited = dense_edit(pipe, erasure)
        values = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
        base = pipe.unet.conv_in(values)
        pipe.load_erasure(erasure)
        assert_like(pipe.unet.conv_in(values).numpy(), edited.unet.conv_in(values).numpy(), base.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("load_first", [True, False])
def test_half_precision(dtype: torch.dtype, load_first: bool) -> None:
    """Loaded into a half-precision model, or converted with it.

    Against the exact edit in float32 it is as good as a half-precision model with edited weights, within a factor of 3:
    the same number of roundings, at other places.
    """
    for kind in ("lora", "conv", "text_map"):
        pipe, erasure = tiny_sd_pipe(), erasure_of(kind, size=1.5)
        exact, base = noise(dense_edit(pipe, erasure)).numpy(), noise(pipe).numpy()
        rounding = far(noise(dense_edit(pipe, erasure).to(dtype)).float().numpy(), exact)
        if load_first:
            pipe.load_erasure(erasure)
        pipe = pipe.to(dtype)
        if not load_first:
            pipe.load_erasure(erasure)
        drawn = noise(pipe)
        assert drawn.dtype == dtype
        assert_like(drawn.float().numpy(), exact, base, tolerance=3 * rounding, ratio=2)
        pipe.set_erasures("random", 0)
        assert equal(noise(pipe).float().numpy(), noise(tiny_sd_pipe().to(dtype)).float().numpy())


def test_half_precision_and_back(pipe: Any) -> None:
    """The exact factors are kept, so strengths set or neighbours unloaded later are not those of rounded ones."""
    erasure, other = erasure_of("lora"), erasure_of("lora", seed=1)
    pipe.load_erasure(erasure, "one")
    pipe.load_erasure(other, "two")
    pipe.unet.to(torch.bfloat16).to(torch.float32)
    pipe.unload_erasure("two")
    rounded = tiny_sd_pipe()
    rounded.unet.to(torch.bfloat16).to(torch.float32)
    assert_like(images(pipe), images(dense_edit(rounded, erasure)), images(rounded))


# ------------------------------------------------------------------------------------------------------ several


def test_several_erasures_add(pipe: Any) -> None:
    base = images(pipe)
    parts = [erasure_of("lora", seed=1, size=0.4), erasure_of("conv", seed=2, size=0.4), erasure_of("all", 3, 0.4)]
    for i, part in enumerate(parts):
        pipe.load_erasure(part, f"e{i}", strength=0.5 + i / 4)
    pairs = [(part, 0.5 + i / 4) for i, part in enumerate(parts)]
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), *pairs)), base)

    pipe.set_erasures({"e0": 1.5, "e2": 0.25})
    pairs = [(parts[0], 1.5), (parts[1], 0.75), (parts[2], 0.25)]
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), *pairs)), base)
    assert [(info.name, info.strength) for info in pipe.list_erasures()] == [("e0", 1.5), ("e1", 0.75), ("e2", 0.25)]

    pipe.set_erasures("e1", 0)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), pairs[0], pairs[2])), base)


def test_several_text_maps_add_from_the_unmapped_rows(pipe: Any) -> None:
    base = images(pipe)
    first, second = erasure_of("text_map", 1, 0.5), erasure_of("text_map", 2, 0.5)
    pipe.load_erasure(first, "a")
    pipe.load_erasure(second, "b", strength=0.5)
    forwards = images(pipe)
    assert_like(forwards, images(dense_edit(tiny_sd_pipe(), first, (second, 0.5))), base)
    other = tiny_sd_pipe()
    other.load_erasure(second, "b", strength=0.5)
    other.load_erasure(first, "a")
    assert roundings(images(other), forwards) <= ROUNDINGS


def test_unloading_one_leaves_the_others_exact(pipe: Any) -> None:
    """Bit for bit as on a pipeline that only ever had the others: nothing is subtracted again."""
    kinds = {"a": "all", "b": "lora", "c": "text_map", "d": "conv", "e": "text_map"}
    parts = {name: erasure_of(kind, seed, 0.4) for seed, (name, kind) in enumerate(kinds.items())}
    for name, part in parts.items():
        pipe.load_erasure(part, name)
    for gone in ("a", "c"):
        pipe.unload_erasure(gone)
        del parts[gone]
        fresh = tiny_sd_pipe()
        for name, part in parts.items():
            fresh.load_erasure(part, name)
        assert equal(images(pipe), images(fresh))
        assert [info.name for info in pipe.list_erasures()] == list(parts)
    assert not hasattr(pipe.text_encoder, "erasure_modules")


def test_loading_again_gives_the_same_bits(pipe: Any) -> None:
    erasure = erasure_of("all")
    pipe.load_erasure(erasure)
    first = images(pipe)
    pipe.unload_erasure()
    pipe.load_erasure(erasure)
    assert equal(images(pipe), first)


# ------------------------------------------------------------------------------- nothing of ours in the model


def test_nothing_enters_the_base_model(pipe: Any, tmp_path: Path) -> None:
    parameters = {name: [n for n, _ in model.named_parameters()] for name, model in models(pipe).items()}
    clean = weights(pipe)
    pipe.load_erasure(erasure_of("all"), "a")
    pipe.load_erasure(erasure_of("text_map"), "b")
    assert_same_weights(clean, weights(pipe))
    assert {name: [n for n, _ in m.named_parameters()] for name, m in models(pipe).items()} == parameters
    assert "erasure" not in str(pipe.config)

    with pipe.erasures_disabled():
        pipe.save_pretrained(tmp_path, safe_serialization=True)
    for file in tmp_path.rglob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            assert [key for key in handle.keys() if "erasure" in key or "delta" in key] == []  # noqa: SIM118
    for file in tmp_path.rglob("*.json"):
        assert b"erasure" not in file.read_bytes()
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    assert_same_weights(clean, weights(again))
    assert again.list_erasures() == []


def test_an_optimizer_takes_none_of_our_tensors(pipe: Any) -> None:
    before = {id(parameter) for parameter in pipe.unet.parameters()}
    pipe.load_erasure(erasure_of("all"), "a")
    pipe.load_erasure(erasure_of("text_map"), "b")
    pipe.unet.requires_grad_(True)
    optimizer = torch.optim.SGD(pipe.unet.parameters(), lr=0.1)
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == before
    buffers = [buffer for name, buffer in pipe.unet.named_buffers() if "erasure_modules" in name]
    assert len(buffers) >= 2 * len(UNET_SITES) + 2
    assert [buffer for buffer in buffers if buffer.requires_grad] == []


def test_an_all_linear_lora_wraps_none_of_our_modules(pipe: Any) -> None:
    pipe.load_erasure(erasure_of("all"), "a")
    pipe.load_erasure(erasure_of("text_map"), "b")
    ours = {name: id(module) for name, module in pipe.unet.erasure_modules.named_modules()}
    erased = images(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=True))
    assert {name: id(module) for name, module in pipe.unet.erasure_modules.named_modules()} == ours
    assert [name for name, _ in pipe.unet.named_modules() if "erasure_modules" in name and "lora_A" in name] == []
    pipe.unet.requires_grad_(False)
    assert roundings(images(pipe), erased) <= ROUNDINGS


# --------------------------------------------------------------------------------------------------- text encoder


def test_text_encoder_layers_act(pipe: Any) -> None:
    erasure = erasure_of("text", size=1.0)
    base = rows_of(pipe).numpy()
    pipe.load_erasure(erasure)
    assert_like(rows_of(pipe).numpy(), rows_of(dense_edit(tiny_sd_pipe(), erasure)).numpy(), base)


def test_text_encoder_layers_need_their_encoder(pipe: Any) -> None:
    erasure = erasure_of("all")
    pipe.text_encoder = None
    with pytest.raises(ErasureCompatibilityError, match="text_encoder"):
        pipe.load_erasure(erasure)
    assert pipe.list_erasures() == []
    assert not hasattr(pipe.unet, "erasure_modules")


def test_prompt_embeds_are_refused_unless_they_are_erased(pipe: Any) -> None:
    embeds = rows_of(pipe)
    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}
    base = images(pipe, **arguments)
    pipe.load_erasure(erasure_of("text"))
    for given in ({"prompt_embeds": embeds}, {"negative_prompt_embeds": embeds, "prompt": "a dog"}, arguments):
        with pytest.raises(ErasureInactiveError, match="prompt_embeds_are_erased"):
            images(pipe, **given)
    with prompt_embeds_are_erased(pipe):
        assert equal(images(pipe, **arguments), base)
    with pytest.raises(ErasureInactiveError):
        images(pipe, **arguments)
    with pipe.erasures_disabled():
        assert equal(images(pipe, **arguments), base)
    pipe.set_erasures("random", 0)
    assert equal(images(pipe, **arguments), base)
    pipe.set_erasures("random", 1)
    with pytest.raises(ErasureInactiveError):
        images(copy.deepcopy(pipe), **arguments)
    pipe.unload_erasure()
    assert equal(images(pipe, **arguments), base)


def test_prompt_embeds_are_accepted_without_text_encoder_layers(pipe: Any) -> None:
    embeds = rows_of(pipe)
    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds * 0}
    base, erasure = images(pipe, **arguments), erasure_of("text_map")
    pipe.load_erasure(erasure)
    assert_like(images(pipe, **arguments), images(dense_edit(tiny_sd_pipe(), erasure), **arguments), base)


@pytest.mark.parametrize("how", ["strength 0", "disabled"])
def test_the_prompt_guard_outlives_unloading_a_neighbour(pipe: Any, how: str) -> None:
    """An erasure at strength 0, or disabled at that moment, is still loaded, and guarded when it acts again."""
    pipe.load_erasure(erasure_of("text"), "kept")
    pipe.load_erasure(erasure_of("text", seed=1), "gone")
    if how == "strength 0":
        pipe.set_erasures("kept", 0)
        pipe.unload_erasure("gone")
        pipe.set_erasures("kept", 1)
    else:
        with pipe.erasures_disabled():
            pipe.unload_erasure("gone")
    with pytest.raises(ErasureInactiveError):
        images(pipe, prompt_embeds=rows_of(tiny_sd_pipe()))


def test_strengths_reach_components_that_were_copied_alone(pipe: Any) -> None:
    """A pipeline with a copy of the UNet and the original text encoder is one pipeline with one strength."""
    erasure = erasure_of("all")
    pipe.load_erasure(erasure)
    mixed = StableDiffusionPipeline(
        **{**pipe.components, "unet": copy.deepcopy(pipe.unet)}, requires_safety_checker=False
    )
    mixed.set_progress_bar_config(disable=True)
    mixed.set_erasures("random", 0.5)
    assert_like(images(mixed), images(dense_edit(tiny_sd_pipe(), (erasure, 0.5))), base_images())


# ------------------------------------------------------------------------------------------------------ switching off


def test_disabled_blocks_nest_and_survive_exceptions(pipe: Any) -> None:
    base = images(pipe)
    pipe.load_erasure(erasure_of("all"), "a")
    pipe.load_erasure(erasure_of("text_map"), "b", strength=0.5)
    erased = images(pipe)
    with pipe.erasures_disabled():
        assert equal(images(pipe), base)
        with pytest.raises(KeyError, match="from within"), pipe.erasures_disabled():
            assert equal(images(pipe), base)
            raise KeyError("from within")
        assert equal(images(pipe), base)
        assert [info.strength for info in pipe.list_erasures()] == [1.0, 0.5]
        pipe.set_erasures("b", 0.25)  # is remembered, and does not switch on
        assert equal(images(pipe), base)
    assert not equal(images(pipe), erased)
    pipe.set_erasures("b", 0.5)
    assert equal(images(pipe), erased)


def test_loading_within_a_disabled_block(pipe: Any) -> None:
    """The block promises the base bit for bit; what is loaded within acts after it."""
    base, first, second = images(pipe), erasure_of("lora", 1, 0.4), erasure_of("all", 2, 0.4)
    pipe.load_erasure(first, "first")
    with pipe.erasures_disabled():
        pipe.load_erasure(second, "second")
        assert equal(images(pipe), base)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), first, second)), base)


# -------------------------------------------------------------------------------------------------- training guard


def predict(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents, rows = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 24, 32, generator=generator)
    return pipe.unet(latents, torch.tensor(10), encoder_hidden_states=rows).sample


@pytest.mark.parametrize("kind", ["lora", "text_map", "text"])
def test_training_guard(pipe: Any, kind: str) -> None:
    pipe.load_erasure(erasure_of(kind))
    with pytest.raises(ErasureTrainingError, match=r"erasures_disabled[\s\S]*training_through_erasures"):
        predict(pipe)
    with torch.no_grad():
        predict(pipe)
    with torch.inference_mode():
        predict(pipe)
    with pipe.erasures_disabled():
        predict(pipe).sum().backward()
    with training_through_erasures(pipe):
        predict(pipe).sum().backward()
    with pytest.raises(ErasureTrainingError):
        predict(pipe)
    pipe.unet.requires_grad_(False)
    predict(pipe)
    rows = torch.randn(1, 24, 32, requires_grad=True)  # textual inversion, or a text encoder in training
    with pytest.raises(ErasureTrainingError, match="text rows"):
        pipe.unet(torch.randn(1, 4, 8, 8), torch.tensor(10), encoder_hidden_states=rows)
    guided = torch.randn(1, 4, 8, 8, requires_grad=True)  # guidance by a gradient on the latents trains nothing
    pipe.unet(guided, torch.tensor(10), rows.detach()).sample.sum().backward()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ErasureTrainingError, match="random"):
        predict(pipe)
    pipe.unload_erasure()
    predict(pipe)


def test_training_guard_on_the_text_encoder(pipe: Any) -> None:
    pipe.load_erasure(erasure_of("text"))
    ids = torch.ones(1, 24, dtype=torch.long)
    with pytest.raises(ErasureTrainingError, match="CLIPTextModel"):
        pipe.text_encoder(ids)
    pipe.text_encoder.requires_grad_(False)
    pipe.text_encoder(ids)


def test_a_lora_trained_with_erasures_disabled_shows_no_trace(pipe: Any) -> None:
    """Gradients, and the LoRA after one step of a stock peft training, are those of a pipeline without erasure."""

    def step(pipe: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        pipe.unet.requires_grad_(False)
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
        trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        predict(pipe).square().sum().backward()
        optimizer.step()
        return [parameter.grad for parameter in trained], get_peft_model_state_dict(pipe.unet)

    gradients, lora = step(tiny_sd_pipe())
    pipe.load_erasure(erasure_of("lora"), "a")
    pipe.load_erasure(erasure_of("text_map"), "b")
    with pipe.erasures_disabled():
        found, trained = step(pipe)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
    assert len(found) == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    assert_same_weights(trained, lora)


# ------------------------------------------------------------------------------- fused projections, hook order


def test_fused_projections(pipe: Any) -> None:
    """Fused, `to_k` is never called: refused when loading, and at the forward pass when fused later."""
    erasure, base = erasure_of("lora"), images(pipe)
    pipe.fuse_qkv_projections(vae=False)
    free = random_erasure(tiny_sd_pipe(), base=only_family(pipe))
    with pytest.raises(ErasureCompatibilityError, match="unfuse_qkv_projections"):
        pipe.load_erasure(free)
    with pytest.raises(ErasureCompatibilityError, match="unfuse_qkv_projections"):
        pipe.load_erasure(erasure)
    assert pipe.list_erasures() == []
    pipe.unfuse_qkv_projections(vae=False)
    pipe.load_erasure(erasure)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ErasureInactiveError, match="unfuse_qkv_projections"):
        images(pipe)
    with pipe.erasures_disabled():
        assert roundings(images(pipe), base) <= ROUNDINGS
    pipe.unfuse_qkv_projections(vae=False)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base)


def test_fused_projections_do_not_matter_to_a_text_map(pipe: Any) -> None:
    erasure, base = erasure_of("text_map"), images(pipe)
    pipe.load_erasure(erasure)
    pipe.fuse_qkv_projections(vae=False)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base)


def test_hooks_on_the_denoiser_fire_before_offload_brings_it_over(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map's own tensors may still be elsewhere then, so it moves them to its input's device itself."""
    from accelerate.hooks import CpuOffload

    from diffusers_erasure.layers.lora import LowRankDelta
    from diffusers_erasure.layers.text_map import TextMap
    from diffusers_erasure.live.attachment import Guard

    events: list[str] = []

    def record(owner: type, method: str, event: str) -> None:
        original = getattr(owner, method)

        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            module = args[0] if event == "onload" else pipe.unet
            if module is pipe.unet:
                events.append(event)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, recorded)

    record(Guard, "__call__", "guard")
    record(TextMap, "forward", "map")
    record(CpuOffload, "pre_forward", "onload")
    record(LowRankDelta, "forward", "delta")
    text_map, lora = erasure_of("text_map"), random_erasure(tiny_sd_pipe(), "lora", ("unet.conv_in",))
    pipe.load_erasure(text_map, "map")
    pipe.load_erasure(lora, "lora")
    pipe.enable_model_cpu_offload(device="cpu")
    drawn = images(pipe, num_inference_steps=2)
    assert events == ["guard", "map", "onload", "delta", "guard", "onload", "delta"]  # the rows are mapped once a run
    oracle = dense_edit(tiny_sd_pipe(), text_map, lora)
    assert_like(drawn, images(oracle, num_inference_steps=2), images(tiny_sd_pipe(), num_inference_steps=2))


def test_a_text_map_leaves_arguments_where_they_were(pipe: Any) -> None:
    """Positional stays positional (DeepCache reads `args[1]`), and the caller's own dict and rows stay as they were."""
    pipe.load_erasure(erasure_of("text_map"))
    seen: list[tuple[int, list[str]]] = []

    def spy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((len(args), sorted(kwargs)))

    pipe.unet.register_forward_pre_hook(spy, with_kwargs=True)
    latents, rows, time = torch.ones(1, 4, 8, 8), torch.ones(1, 24, 32), torch.tensor(5)
    with torch.no_grad():
        by_position = pipe.unet(latents, time, rows).sample
        by_name = pipe.unet(latents, time, encoder_hidden_states=rows, return_dict=False)[0]
    assert seen == [(3, []), (2, ["encoder_hidden_states", "return_dict"])]
    assert torch.equal(by_position, by_name)
    assert torch.equal(rows, torch.ones(1, 24, 32))
