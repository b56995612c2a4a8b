"""The layer `skip`: DuMo's network against a stock ControlNet with its weights, alone and beside what else acts on a UNet."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import ControlNetModel, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureInactiveError,
    ErasureInputError,
    with_gate,
    with_schedule,
)
from diffusers_erasure.layers.encoder_copy import channels
from diffusers_erasure.layers.epr import EPR, split
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.layers.skip_hooks import ATTRIBUTE
from diffusers_erasure.schema import Concept
from tests import test_stays_on
from tests.helpers import (
    ROUNDINGS,
    assert_same_weights,
    base_images,
    equal,
    far,
    images,
    random_erasure,
    roundings,
    rows_of,
    style_lora,
    tiny_sd_pipe,
    tiny_sdxl_pipe,
    tree,
    unchanged_by,
    weights,
)


FORMS = ("full", "compact")
ip_adapter, backend = test_stays_on.ip_adapter, test_stays_on.backend  # fixtures
EFFECT = 0.05


def random_tensors(unet: Any, form: str, seed: int = 0, zero_rank: int | None = None) -> dict[str, torch.Tensor]:
    """A network's tensors, so that it has an effect: a changed copy of the encoder, and convolutions that are not zero."""
    tensors = {k: v.detach().clone() for k, v in EPR.fresh(unet, form, 4, zero_rank, seed).named_tensors().items()}
    generator = torch.Generator().manual_seed(seed)
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
        tensors[name] = noise if name.startswith("zero.") else value + 0.3 * noise
    return tensors


def as_erasure(pipe: Any, tensors: dict[str, torch.Tensor], sites: tuple[str, ...] | None = None) -> Erasure:
    skips = len(channels(pipe.unet)) - 1
    sites = sites or (*(f"skips.{index}" for index in range(skips)), "mid_block")
    layer = Layer("skip", sites, tensors)
    return Erasure.from_layers([layer], base=pipe, concepts=Concept("zebra", "horse"), method="random")


@cache  # none changes one
def erasure_of(form: str, seed: int = 0, make: Callable[[], Any] = tiny_sd_pipe, **options: Any) -> Erasure:
    fresh = make()
    return as_erasure(fresh, random_tensors(fresh.unet, form, seed, **options))


def tensors_of(erasure: Erasure) -> dict[str, torch.Tensor]:
    return erasure.layer_tensors(erasure.config.layers[0])


def inputs(unet: Any, time: float = 500.0, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    arguments: dict[str, Any] = {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(time),
        "encoder_hidden_states": torch.randn(batch, 24, unet.config.cross_attention_dim, generator=generator),
    }
    if unet.config.addition_embed_type == "text_time":
        ids = torch.randint(0, 16, (batch, 6), generator=generator)
        pooled = torch.randn(batch, 40, generator=generator)
        arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    return arguments


@torch.no_grad()
def predict(unet: Any, time: float = 500.0, **extra: Any) -> torch.Tensor:
    return unet(**inputs(unet, time), **extra).sample


def as_full(unet: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's tensors in the full form: W + up down."""
    zeros, encoder = split(tensors)
    if "conv_in.weight" in encoder:
        return tensors
    whole = {name: value for name, value in EPR.fresh(unet, "full").named_tensors().items() if "zero." not in name}
    for name in [name.removesuffix(".down") for name in encoder if name.endswith(".down")]:
        down, up = encoder[name + ".down"].double(), encoder[name + ".up"].double()
        weight = whole[name + ".weight"].detach()
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        whole[name + ".weight"] = (weight.double() + delta).float()
    return {**whole, **{name: value for name, value in tensors.items() if name.startswith("zero.")}}


@torch.no_grad()
def stock_network(unet: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A stock `ControlNetModel` with a network's tensors. Its hint has no effect, as its hint's last layer is zero."""
    network = ControlNetModel.from_unet(unet, load_weights_from_unet=False).eval()
    zeros, encoder = split(as_full(unet, tensors))
    for name, parameter in network.named_parameters():
        top, _, rest = name.partition(".")
        if top.startswith("controlnet_") and top != "controlnet_cond_embedding":
            place, kind = ("mid", rest) if top == "controlnet_mid_block" else rest.split(".")
            own = zeros[place]
            value = own["up"] @ own["down"] if kind == "weight" and "up" in own else own[kind]
            parameter.copy_(value.reshape(parameter.shape))
        elif top != "controlnet_cond_embedding":
            parameter.copy_(encoder[name])
    return network


@torch.no_grad()
def stock_residuals(unet: Any, tensors: dict[str, torch.Tensor], time: float = 500.0) -> list[torch.Tensor]:
    """What a stock ControlNet with a network's tensors gives."""
    hint = torch.zeros(2, 3, 64, 64)
    network = stock_network(unet, tensors)
    down, mid = network(**inputs(unet, time), controlnet_cond=hint, return_dict=False)
    return [*down, mid]


def given(residuals: list[torch.Tensor]) -> dict[str, Any]:
    """Residuals as the arguments that a UNet takes a ControlNet's by."""
    return {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}


def assert_close(actual: torch.Tensor, oracle: torch.Tensor, base: torch.Tensor) -> None:
    assert float((oracle - base).abs().max()) > EFFECT * float(oracle.abs().max())
    assert roundings(actual, oracle) <= ROUNDINGS


# ------------------------------------------------------------------------------------------------ acting, exactly


@pytest.mark.parametrize("make", [tiny_sd_pipe, tiny_sdxl_pipe])
@pytest.mark.parametrize(("form", "zero_rank"), [("full", None), ("compact", None), ("full", 3), ("compact", 3)])
def test_is_a_controlnet_without_a_hint(make: Callable[[], Any], form: str, zero_rank: int | None) -> None:
    pipe, stock = make(), make().unet
    erasure = erasure_of(form, make=make, zero_rank=zero_rank)
    residuals, base = stock_residuals(stock, tensors_of(erasure)), predict(stock)
    pipe.load_erasure(erasure)
    assert_close(predict(pipe.unet), predict(stock, **given(residuals)), base)
    pipe.set_erasures("random", 0.5)
    assert_close(predict(pipe.unet), predict(stock, **given([0.5 * part for part in residuals])), base)


@pytest.mark.parametrize("form", FORMS)
def test_off_and_gone_is_the_base_bit_for_bit(pipe: Any, form: str) -> None:
    erasure = erasure_of(form)
    base = images(pipe)

    def load_and_unload() -> None:
        pipe.load_erasure(erasure, strength=0)
        assert equal(images(pipe), base)
        pipe.set_erasures("random", 1.0)
        assert far(images(pipe), base) > EFFECT
        with pipe.erasures_disabled():
            assert equal(images(pipe), base)
        pipe.unload_erasure()

    unchanged_by(pipe, load_and_unload)


@pytest.mark.parametrize("forms", [("full", "full"), ("compact", "compact"), ("compact", "full")])
def test_several_erasures_add(pipe: Any, forms: tuple[str, str]) -> None:
    first, second = (erasure_of(form, seed) for seed, form in enumerate(forms))
    stock = tiny_sd_pipe().unet
    residuals = [stock_residuals(stock, tensors_of(erasure)) for erasure in (first, second)]
    pipe.load_erasure(first, "first")
    alone = predict(pipe.unet)
    pipe.load_erasure(second, "second", strength=0.5)
    total = [a + 0.5 * b for a, b in zip(*residuals, strict=True)]
    assert_close(predict(pipe.unet), predict(stock, **given(total)), alone)
    pipe.unload_erasure("second")
    assert torch.equal(predict(pipe.unet), alone)
    pipe.load_erasure(second, "second")
    pipe.unload_erasure("first")
    assert_close(predict(pipe.unet), predict(stock, **given(residuals[1])), predict(stock))


@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_has_a_column_for_each_skip(pipe: Any, form: str) -> None:
    erasure, stock = erasure_of(form), tiny_sd_pipe().unet
    columns = len(erasure.config.layers[0].sites)
    table = torch.rand(4, columns, generator=torch.Generator().manual_seed(3)) * 2
    pipe.load_erasure(with_schedule(erasure, table))
    for time, row in ((10.0, 0), (499.0, 1), (999.0, 3)):
        residuals = stock_residuals(stock, tensors_of(erasure), time)
        scaled = [factor * part for factor, part in zip(table[row], residuals, strict=True)]
        assert_close(predict(pipe.unet, time), predict(stock, time, **given(scaled)), predict(stock, time))


def test_a_gate_multiplies_the_residuals_of_its_row(pipe: Any) -> None:
    erasure, stock = erasure_of("compact"), tiny_sd_pipe().unet
    gated = with_gate(erasure, pipe, "a zebra")
    pipe.load_erasure(gated)
    arguments = inputs(stock)
    rows = torch.cat([rows_of(tiny_sd_pipe(), "a zebra"), rows_of(tiny_sd_pipe(), "a teapot on the moon")])
    arguments["encoder_hidden_states"] = rows
    with torch.no_grad():
        drawn = pipe.unet(**arguments).sample
        pipe.unload_erasure()
        pipe.load_erasure(erasure)
        full = pipe.unet(**arguments).sample
        base = stock(**arguments).sample
    assert float((drawn[0] - full[0]).abs().max()) < 1e-2 * float((drawn[0] - base[0]).abs().max())
    assert float((drawn[1] - full[1]).abs().max()) > 1e-2 * float((full[1] - base[1]).abs().max())


def test_published_strength(pipe: Any) -> None:
    for form, zero_rank in (("full", None), ("compact", 3)):
        erasure = erasure_of(form, zero_rank=zero_rank)
        pipe.load_erasure(erasure, "a", strength=0.5)
        half = predict(pipe.unet)
        pipe.unload_erasure()
        pipe.load_erasure(erasure.rescaled(0.5), "a")
        assert torch.equal(predict(pipe.unet), half)
        pipe.unload_erasure()


# --------------------------------------------------------------------------------- beside what else acts on a UNet


@pytest.mark.parametrize("form", FORMS)
def test_with_a_controlnet_and_freeu(pipe: Any, form: str) -> None:
    """Residuals that the caller gives add up with ours, and FreeU filters the sum."""
    erasure, stock = erasure_of(form), tiny_sd_pipe().unet
    ours, theirs = (stock_residuals(stock, tensors_of(each)) for each in (erasure, erasure_of("full", 9)))
    pipe.load_erasure(erasure)
    total = [a + b for a, b in zip(ours, theirs, strict=True)]
    assert_close(predict(pipe.unet, **given(theirs)), predict(stock, **given(total)), predict(stock, **given(theirs)))
    for unet in (pipe.unet, stock):
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert_close(predict(pipe.unet), predict(stock, **given(ours)), predict(stock))


def test_with_a_t2i_adapter(pipe: Any) -> None:
    """Its residuals change the base's features, and in neither form those of the erasure."""
    adapter = [torch.full((2, 32, 4, 4), 0.5), torch.full((2, 64, 4, 4), 0.5)]
    for form in FORMS:
        stock, erasure = tiny_sd_pipe().unet, erasure_of(form)
        base = predict(stock, down_intrablock_additional_residuals=[part.clone() for part in adapter])
        ours = stock_residuals(stock, tensors_of(erasure))
        both = [part.clone() for part in adapter]
        oracle = predict(stock, down_intrablock_additional_residuals=both, **given(ours))
        pipe.load_erasure(erasure)
        drawn = predict(pipe.unet, down_intrablock_additional_residuals=[part.clone() for part in adapter])
        assert_close(drawn, oracle, base)
        pipe.unload_erasure()


@pytest.mark.parametrize("form", FORMS)
def test_masked_text_rows(pipe: Any, form: str) -> None:
    """As if they were not there."""
    erasure, stock = erasure_of(form), tiny_sd_pipe().unet
    pipe.load_erasure(erasure)
    mask = torch.ones(2, 24)
    mask[:, 9:] = 0
    drawn = predict(pipe.unet, encoder_attention_mask=mask)
    short = inputs(stock)
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :9]
    with torch.no_grad():
        oracle = pipe.unet(**short).sample
    assert roundings(drawn, oracle) <= ROUNDINGS
    assert roundings(predict(pipe.unet), oracle) > 500 * ROUNDINGS


@pytest.mark.parametrize("load_first", [True, False])
def test_an_image_prompt_enters_the_second_pass_and_no_copy(ip_adapter: dict[str, Any], load_first: bool) -> None:
    """An IP-Adapter replaces every attention processor and adds image tokens beside the text's."""
    image = {
        "added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(6))]}
    }
    stock = tiny_sd_pipe()
    pipes = {form: tiny_sd_pipe() for form in FORMS}
    for form, pipe in pipes.items():
        if load_first:
            pipe.load_erasure(erasure_of(form))
    for pipe in (stock, *pipes.values()):
        pipe.load_ip_adapter(
            str(ip_adapter["folder"]), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None
        )
    for form, pipe in pipes.items():
        if not load_first:
            pipe.load_erasure(erasure_of(form), strict_base="ignore")
    alone = {form: stock_residuals(tiny_sd_pipe().unet, tensors_of(erasure_of(form))) for form in FORMS}
    base = predict(stock.unet, **image)
    assert_close(predict(pipes["full"].unet, **image), predict(stock.unet, **image, **given(alone["full"])), base)
    drawn = predict(pipes["compact"].unet, **image)
    without = predict(stock.unet, **image, **given(alone["compact"]))
    assert roundings(drawn, without) > 10 * ROUNDINGS
    for pipe in (stock, pipes["compact"]):
        pipe.set_ip_adapter_scale(0)
    without = predict(stock.unet, **image, **given(alone["compact"]))
    assert_close(predict(pipes["compact"].unet, **image), without, predict(stock.unet, **image))


@pytest.mark.parametrize("load_first", [True, False])
def test_a_users_lora_does_not_enter_the_copy(pipe: Any, load_first: bool) -> None:
    erasure, stock = erasure_of("full"), tiny_sd_pipe()
    if load_first:
        pipe.load_erasure(erasure)
    for each in (pipe, stock):
        each.load_lora_weights(style_lora(tiny_sd_pipe(), endings=("to_q", "conv1", "conv_in", "linear_1")), "style")
    if not load_first:
        pipe.load_erasure(erasure, strict_base="ignore")
    residuals = stock_residuals(tiny_sd_pipe().unet, tensors_of(erasure))
    assert_close(predict(pipe.unet), predict(stock.unet, **given(residuals)), predict(stock.unet))


@pytest.mark.parametrize("load_first", [True, False])
def test_a_users_lora_acts_in_the_second_pass(pipe: Any, load_first: bool) -> None:
    """As with weights that hold the user's delta and the erasure's."""
    erasure, fused = erasure_of("compact"), tiny_sd_pipe()
    lora = style_lora(tiny_sd_pipe(), endings=("to_q", "conv1", "conv_in", "linear_1"))
    fused.load_lora_weights(dict(lora), "style")
    fused.fuse_lora()
    fused.unload_lora_weights()
    if load_first:
        pipe.load_erasure(erasure)
    pipe.load_lora_weights(dict(lora), "style")
    if not load_first:
        pipe.load_erasure(erasure, strict_base="ignore")
    residuals = stock_residuals(fused.unet, tensors_of(erasure))
    assert_close(predict(pipe.unet), predict(fused.unet, **given(residuals)), predict(fused.unet))


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_wraps_nothing_of_ours(pipe: Any, form: str) -> None:
    pipe.load_erasure(erasure_of(form))
    erased = images(pipe)
    names = [name for name, _ in tiny_sd_pipe().unet.named_modules() if name.endswith("to_q")]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "narrow")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules="all-linear"), "wide")
    wrapped = [name for name, part in pipe.unet.named_modules() if hasattr(part, "base_layer")]
    assert set(names) <= set(wrapped) and not [name for name in wrapped if "erasure_modules" in name]
    pipe.unet.requires_grad_(False)
    assert roundings(images(pipe), erased) <= ROUNDINGS


@pytest.mark.parametrize("form", FORMS)
def test_nothing_enters_the_base_model(pipe: Any, form: str, tmp_path: Path) -> None:
    states, processors = weights(pipe), list(pipe.unet.attn_processors)
    parameters = [name for name, _ in pipe.unet.named_parameters()]
    pipe.load_erasure(erasure_of(form))
    assert_same_weights(weights(pipe), states)
    assert [name for name, _ in pipe.unet.named_parameters()] == parameters
    assert list(pipe.unet.attn_processors) == processors
    with pipe.erasures_disabled():
        pipe.unet.save_pretrained(tmp_path)
    assert_same_weights(UNet2DConditionModel.from_pretrained(tmp_path).state_dict(), tiny_sd_pipe().unet.state_dict())


def test_other_erasures_beside_it(pipe: Any) -> None:
    """A `lora` erasure acts on the base and, as a part of it, in the second pass; in no copy."""
    lora = random_erasure(tiny_sd_pipe(), "lora", ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",))
    for form in FORMS:
        erasure, edited = erasure_of(form), tiny_sd_pipe()
        edited.load_erasure(lora)
        edited.fuse_erasures()
        encoder = edited.unet if form == "compact" else tiny_sd_pipe().unet
        residuals = stock_residuals(encoder, tensors_of(erasure))
        pipe.load_erasure(lora, "lora")
        pipe.load_erasure(erasure, "skip")
        assert_close(predict(pipe.unet), predict(edited.unet, **given(residuals)), predict(edited.unet))
        pipe.unload_erasure()


def test_it_has_no_form_as_a_change_of_weights(pipe: Any) -> None:
    pipe.load_erasure(erasure_of("compact"))
    with pytest.raises(ErasureCompatibilityError, match="network beside the UNet"):
        pipe.fuse_erasures()


def test_fused_projections(pipe: Any) -> None:
    """A compact erasure on modules that are not called is refused; a full one has modules of its own."""
    pipe.load_erasure(erasure_of("full"), "full")
    before = predict(pipe.unet)
    pipe.fuse_qkv_projections(vae=False)
    assert roundings(predict(pipe.unet), before) <= ROUNDINGS
    with pytest.raises(ErasureCompatibilityError, match="unfuse_qkv_projections"):
        pipe.load_erasure(erasure_of("compact"), "compact")
    pipe.unfuse_qkv_projections(vae=False)
    pipe.load_erasure(erasure_of("compact"), "compact")
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ErasureInactiveError, match="unfuse_qkv_projections"):
        predict(pipe.unet)


# ------------------------------------------------------------------------------------- copies, placement, precision


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"])
def test_copies(pipe: Any, form: str, duplicate: Callable[[Any], Any]) -> None:
    base = images(pipe)
    pipe.load_erasure(erasure_of(form), "one")
    erased = images(pipe)
    twin = duplicate(pipe)
    assert equal(images(twin), erased)
    twin.set_erasures("one", 0.5)
    half = images(twin)
    assert not equal(half, erased) and equal(images(pipe), erased)
    pipe.unload_erasure()
    assert equal(images(pipe), base) and equal(images(twin), half)
    twin.unload_erasure()
    assert equal(images(twin), base) and not hasattr(twin.unet, ATTRIBUTE)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision(pipe: Any, form: str) -> None:
    erasure, exact = erasure_of(form), tiny_sd_pipe()
    exact.load_erasure(erasure)
    oracle, base = images(exact), base_images()
    pipe.load_erasure(erasure)
    pipe = pipe.to(torch.bfloat16)
    (network,) = (part for part in pipe.unet.modules() if isinstance(part, EPR))
    assert {value.dtype for value in network.named_tensors().values()} == {torch.bfloat16}
    drawn = images(pipe)
    later = tiny_sd_pipe().to(torch.bfloat16)
    later.load_erasure(erasure)
    assert far(images(later), drawn) < 0.05
    assert far(drawn, oracle) < 0.25 * far(oracle, base)
    pipe.set_erasures("random", 0)
    assert equal(images(pipe), images(tiny_sd_pipe().to(torch.bfloat16)))


def offload_sequentially(pipe: Any) -> None:
    cpu_offload(pipe.unet, "cpu")


def offload_groups(pipe: Any) -> None:
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def cast_layers(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prepare", [offload_sequentially, offload_groups, offload_models, cast_layers])
def test_offloading(form: str, prepare: Callable[[Any], None]) -> None:
    erasure, plain = erasure_of(form), tiny_sd_pipe()
    plain.load_erasure(erasure)
    oracle = predict(plain.unet)
    for load_first in (True, False):
        pipe = tiny_sd_pipe()
        if load_first:
            pipe.load_erasure(erasure)
        prepare(pipe)
        if not load_first:
            pipe.load_erasure(erasure)
        for _ in range(2):
            assert torch.equal(predict(pipe.unet), oracle)
        pipe.unload_erasure()
        assert torch.equal(predict(pipe.unet), predict(tiny_sd_pipe().unet))


def test_a_part_called_by_itself(pipe: Any) -> None:
    pipe.load_erasure(erasure_of("full"))
    predict(pipe.unet)
    with pytest.raises(ErasureInputError, match="outside of a forward pass"), torch.no_grad():
        pipe.unet.mid_block(torch.zeros(1, 64, 4, 4), torch.zeros(1, 128), torch.zeros(1, 24, 32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"])
def test_an_interrupted_pass_leaves_nothing_behind(pipe: Any, form: str, place: str) -> None:
    pipe.load_erasure(erasure_of(form))
    before = predict(pipe.unet)

    def stop(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.unet.get_submodule(place).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        predict(pipe.unet, 10.0)
    handle.remove()
    assert torch.equal(predict(pipe.unet), before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["down_blocks.0", "up_blocks.1"])
def test_nothing_of_a_pass_outlives_it(pipe: Any, form: str, place: str) -> None:
    pipe.load_erasure(erasure_of(form))
    seen = getattr(pipe.unet, ATTRIBUTE).seen
    nothing, within = dict(vars(seen)), []
    pipe.unet.up_blocks[0].register_forward_pre_hook(lambda module, args: within.append(dict(vars(seen))))
    assert set(nothing.values()) == {None}
    predict(pipe.unet)
    assert len(within[0]["residuals"]) == len(channels(pipe.unet)) - 1 and vars(seen) == nothing

    def stop(module: nn.Module, args: Any) -> None:
        raise ValueError

    pipe.unet.get_submodule(place).register_forward_pre_hook(stop)
    with pytest.raises(ValueError):
        predict(pipe.unet)
    assert vars(seen) == nothing


@pytest.mark.parametrize("form", FORMS)
def test_threads_with_strengths_of_their_own(pipe: Any, form: str) -> None:
    """Each draws what it draws alone; pictures of one batch may have strengths of their own too."""
    pipe.load_erasure(erasure_of(form), "a")
    pipe.load_erasure(erasure_of("compact", 1), "b")
    wanted: list[dict[str, Any]] = [
        {"a": 1.0, "b": 0.0},
        {"a": 0.0, "b": 0.5},
        {"a": 0.3, "b": 1.0},
        {"a": 0.0, "b": 0.0},
        {"a": [0.0, 1.0], "b": [0.5, 0.0]},
    ]

    def draw(number: int, time: float | None = None) -> torch.Tensor:
        with pipe.erasure_strengths(wanted[number]):
            return predict(pipe.unet, 90.0 * number if time is None else time)

    alone = [draw(number) for number in range(len(wanted))]
    assert torch.equal(alone[3], predict(tiny_sd_pipe().unet, 270.0))
    assert roundings(draw(4, 90.0)[0], draw(1)[0]) <= ROUNDINGS
    assert roundings(draw(4, 0.0)[1], draw(0)[1]) <= ROUNDINGS
    with ThreadPoolExecutor(len(wanted)) as pool:
        for _ in range(4):
            for found, own in zip(pool.map(draw, range(len(wanted))), alone, strict=True):
                assert roundings(found, own) <= ROUNDINGS


@pytest.mark.parametrize("form", FORMS)
def test_unloaded_while_a_request_is_under_way(pipe: Any, form: str) -> None:
    """It ends as it began. Its hooks stay until then, and no longer."""
    base, before = images(pipe), tree(pipe)
    pipe.load_erasure(erasure_of(form))
    erased = images(pipe)
    under_way, unloaded = Event(), Event()

    def unload() -> None:
        under_way.wait()
        pipe.unload_erasure()
        unloaded.set()

    def after_a_step(*args: Any) -> dict[str, Any]:
        under_way.set()
        assert unloaded.wait(30) and hasattr(pipe.unet, ATTRIBUTE)
        return {}

    thread = Thread(target=unload)
    thread.start()
    assert equal(images(pipe, callback_on_step_end=after_a_step), erased)
    thread.join()
    assert tree(pipe) == before and equal(images(pipe), base)


# --------------------------------------------------------------------------------------------------- compile


def small_pipe() -> Any:
    """As small as a UNet can be of whose encoder and mid block each part is in the copy too."""
    pipe = tiny_sd_pipe()
    torch.manual_seed(0)
    settings = {"block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipe.unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=32, **settings, **blocks).eval()
    return pipe


@pytest.mark.parametrize("form", FORMS)
def test_compile(form: str, backend: test_stays_on.CountingBackend) -> None:
    """One graph, for all timesteps of a schedule and all strengths."""
    pipe, erasure = small_pipe(), erasure_of(form, make=small_pipe)
    erasure = with_schedule(erasure, torch.rand(20, len(erasure.config.layers[0].sites)))
    eager = copy.deepcopy(pipe)
    for each in (pipe, eager):
        each.load_erasure(erasure)
    unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    for time in torch.linspace(999, 0, 50):
        drawn = predict(unet, float(time))
        if time in (999.0, 0.0):
            assert torch.equal(drawn, predict(eager.unet, float(time)))
    assert backend.graphs == 1
    for each in (pipe, eager):
        each.set_erasures("random", 0.5)
    assert torch.equal(predict(unet), predict(eager.unet))
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiled_blocks(form: str, backend: test_stays_on.CountingBackend) -> None:
    """Blocks that are compiled one by one run both with and without the deltas."""
    pipe = small_pipe()
    base = predict(pipe.unet)
    for block in (*pipe.unet.down_blocks, pipe.unet.mid_block, *pipe.unet.up_blocks):
        block.compile(backend=backend, fullgraph=True)
    assert torch.equal(predict(pipe.unet), base)
    erasure, eager = erasure_of(form, make=small_pipe), small_pipe()
    eager.load_erasure(erasure)
    pipe.load_erasure(erasure)
    for _ in range(2):
        assert torch.equal(predict(pipe.unet), predict(eager.unet))
    pipe.unload_erasure()
    assert torch.equal(predict(pipe.unet), base)
