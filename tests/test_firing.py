"""The firing check: where the module around a site computes and the site is not called, the pass fails; else nothing does."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxTransformer2DModel,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import (
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_layer_skip,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor2_0
from peft import inject_adapter_in_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffusers_erasure import Erasure, ErasureInactiveError, compat, demo, erase, load_erasure
from diffusers_erasure.live.attachment import state_of
from tests.helpers import (
    CONV_SITES,
    UNET_SITES,
    assert_like,
    dense_edit,
    equal,
    far,
    images,
    noise,
    only_family,
    random_erasure,
    style_lora,
    tiny_sd_pipe,
    unchanged_by,
)
from tests.test_skip import erasure_of as skip_erasure
from tests.test_stays_on import CountingBackend


BLOCK = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def erased(pipe: Any) -> Any:
    pipe.load_erasure(random_erasure(pipe), "no-zebra")
    return pipe


def own_weights(unet: Any) -> dict[str, Any]:
    """Processors of a Custom Diffusion fine-tune: keys and values of their own, here copies of the base's."""
    weights, processors = unet.state_dict(), {}
    for name in unet.attn_processors:
        site = name.removesuffix(".processor")
        cross = site.endswith("attn2")
        width = unet.get_submodule(site).to_q.in_features
        own = CustomDiffusionAttnProcessor2_0(cross, False, width, unet.config.cross_attention_dim if cross else None)
        if cross:
            own.load_state_dict({f"to_{x}_custom_diffusion.weight": weights[f"{site}.to_{x}.weight"] for x in "kv"})
        processors[name] = own
    return processors


# ------------------------------------------------------------------------------------------- a site is not called


def test_adapters_are_left_out_likewise(pipe: Any) -> None:
    pipe.load_erasure(random_erasure(pipe), "no_zebra", backend="peft")
    noise(pipe)
    pipe.unet.set_attn_processor(own_weights(tiny_sd_pipe().unet))
    with pytest.raises(ErasureInactiveError, match=r"no_zebra.*to_k.*CustomDiffusionAttnProcessor2_0"):
        noise(pipe)


def test_processors_with_weights_of_their_own(erased: Any) -> None:
    plain = erased.unet.attn_processors
    erased.unet.set_attn_processor(own_weights(erased.unet))
    with pytest.raises(ErasureInactiveError, match=r"no-zebra.*to_k.*CustomDiffusionAttnProcessor2_0.*text_map"):
        images(erased)
    with erased.erasures_disabled():
        base = images(erased)
    assert equal(base, images_of(tiny_sd_pipe(), own_weights))
    erased.set_erasures("no-zebra", 0.0)
    assert equal(images(erased), base)
    erased.set_erasures("no-zebra", 1.0)
    erased.unet.set_attn_processor(plain)
    oracle = images(dense_edit(tiny_sd_pipe(), random_erasure(tiny_sd_pipe())))
    assert_like(images(erased), oracle, images(tiny_sd_pipe()))


def images_of(pipe: Any, processors: Callable[[Any], dict[str, Any]]) -> Any:
    pipe.unet.set_attn_processor(processors(pipe.unet))
    return images(pipe)


def test_what_the_error_names_helps(pipe: Any) -> None:
    """A text map acts whatever computes behind it."""
    erasure = random_erasure(pipe, "text_map", ())
    pipe.load_erasure(erasure)
    pipe.unet.set_attn_processor(own_weights(pipe.unet))
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), images(tiny_sd_pipe()))


# Those that peft computes with the weight and not by a call; the others are right by hooks.
REPLACING = {"HRA", "GLORA", "MISS", "SHIRA"}
TUNERS = {
    "HRA": lambda **k: peft.HRAConfig(r=4, **k),
    "GLORA": lambda **k: peft.GloraConfig(r=4, **k),
    "MISS": lambda **k: peft.MissConfig(r=4, init_weights="bat", **k),
    "SHIRA": lambda **k: peft.ShiraConfig(r=2, **k),
    "LORA": lambda **k: peft.LoraConfig(r=4, **k),
    "LOHA": lambda **k: peft.LoHaConfig(r=4, **k),
    "LOKR": lambda **k: peft.LoKrConfig(r=4, **k),
    "OFT": lambda **k: peft.OFTConfig(r=4, oft_block_size=0, **k),
    "BOFT": lambda **k: peft.BOFTConfig(boft_block_size=4, **k),
    "FOURIERFT": lambda **k: peft.FourierFTConfig(n_frequency=8, init_weights=True, **k),
    "IA3": lambda **k: peft.IA3Config(feedforward_modules=[], **k),
}


@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.parametrize("first", ["erasure", "tuner"])
def test_tuners(pipe: Any, name: str, first: str) -> None:
    """A tuner that does nothing yet: the erasure acts as without it, or the pass fails, and merging is right all the same."""
    erasure, base = random_erasure(pipe), noise(pipe).numpy()
    oracle = noise(dense_edit(tiny_sd_pipe(), erasure)).numpy()

    def inject(pipe: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(TUNERS[name](target_modules=["to_k", "to_v"]), pipe.unet)

    for action in (lambda: pipe.load_erasure(erasure, "one"), lambda: inject(pipe))[
        :: 1 if first == "erasure" else -1
    ]:
        action()
    if name not in REPLACING:
        assert_like(noise(pipe).numpy(), oracle, base)
        return
    with pytest.raises(
        ErasureInactiveError, match="computes with the weight and not with what the module gives.*merge"
    ):
        noise(pipe)
    merged = tiny_sd_pipe()
    merged.load_erasure(erasure, backend="merge")
    inject(merged)
    assert_like(noise(merged).numpy(), oracle, base)


def test_a_replaced_forward(erased: Any) -> None:
    """As some trainers of whole weights leave it; nothing there says that a cache would have skipped it."""
    attention = erased.unet.get_submodule(f"{BLOCK}.attn2")

    def forward(hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        query, rows = attention.to_q(hidden_states), encoder_hidden_states
        key, value = (nn.functional.linear(rows, getattr(attention, part).weight) for part in ("to_k", "to_v"))
        heads = [each.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for each in (query, key, value)]
        joined = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return attention.to_out[0](joined)

    attention.forward = forward
    with pytest.raises(ErasureInactiveError, match=f"{BLOCK}.attn2.to_k"):
        noise(erased)
    del attention.forward
    noise(erased)


@pytest.mark.parametrize("first", ["erasure", "replaced"])
def test_a_module_whose_own_forward_was_replaced(pipe: Any, first: str) -> None:
    """As LyCORIS does, with `full` also taking its weight: the module is called all the same, and the hooks on it fire."""
    erasure = random_erasure(pipe, base=only_family(pipe))
    oracle, base = noise(dense_edit(pipe, erasure)).numpy(), noise(pipe).numpy()

    def replace() -> None:
        for site in UNET_SITES:
            module = pipe.unet.get_submodule(site.removeprefix("unet."))
            weight = module.weight.data
            del module.weight
            module.forward = lambda x, weight=weight: nn.functional.linear(x, weight)

    for action in (lambda: pipe.load_erasure(erasure), replace)[:: 1 if first == "erasure" else -1]:
        action()
    assert_like(noise(pipe).numpy(), oracle, base)


def test_a_text_encoder(pipe: Any) -> None:
    pipe.load_erasure(random_erasure(pipe, "lora", ("text_encoder.text_model.encoder.layers.1.mlp.fc1",)), "one")
    mlp = next(module for name, module in pipe.text_encoder.named_modules() if name.endswith("layers.1.mlp"))
    fc1 = mlp.fc1
    mlp.fc1 = copy.deepcopy(fc1)
    with pytest.raises(ErasureInactiveError, match="another module took its place"):
        images(pipe)
    mlp.fc1 = fc1
    images(pipe)
    mlp.forward = lambda x: mlp.fc2(mlp.activation_fn(nn.functional.linear(x, mlp.fc1.weight, mlp.fc1.bias)))
    with pytest.raises(ErasureInactiveError, match="CLIPMLP around it computed without calling it"):
        images(pipe)


@pytest.mark.parametrize("kind", ["lora", "conv", "skip"])
def test_a_copied_block(pipe: Any, kind: str) -> None:
    """The copy's hooks would follow no strength; they go with the erasure, and loaded again it acts."""
    plain, block = copy.deepcopy(pipe), "mid_block"
    sites = UNET_SITES if kind == "lora" else (*CONV_SITES, "unet.mid_block.resnets.0.conv1")
    erasure = skip_erasure("compact") if kind == "skip" else random_erasure(pipe, "lora", sites)
    pipe.load_erasure(erasure, "one")
    oracle, original = noise(pipe), pipe.unet.mid_block
    pipe.load_erasure(random_erasure(pipe, "text_map", (), seed=3), "two")
    setattr(pipe.unet, block, copy.deepcopy(original))
    assert len(modules_within(pipe.unet.mid_block)) < 100, "the whole UNet came along"
    with pytest.raises(ErasureInactiveError, match="another module took its place"):
        noise(pipe)
    pipe.unload_erasure("two")
    with pytest.raises(ErasureInactiveError, match="another module took its place"):
        noise(pipe)
    pipe.set_erasures("one", 0.0)
    pipe.set_erasures("one", 1.0)
    with pytest.raises(ErasureInactiveError, match="another module took its place"):
        noise(pipe)
    pipe.unload_erasure()
    assert torch.equal(noise(pipe), noise(plain))
    assert pipe.unet.state_dict().keys() == plain.unet.state_dict().keys()
    pipe.load_erasure(erasure, "one")
    assert torch.equal(noise(pipe), oracle)
    pipe.unload_erasure()
    assert torch.equal(noise(pipe), noise(plain))


def modules_within(root: Any) -> list[nn.Module]:
    """All modules that lie in a module, its hooks included."""
    seen, stack, found = set(), [root], []
    while stack:
        here = stack.pop()
        if id(here) in seen or isinstance(here, torch.Tensor | str | int | float | type):
            continue
        seen.add(id(here))
        if isinstance(here, nn.Module):
            found.append(here)
        if isinstance(here, dict):
            stack += here.values()
        elif isinstance(here, list | tuple | set | frozenset):
            stack += here
        else:
            stack += [*getattr(here, "__dict__", {}).values(), getattr(here, "__self__", None)]
    return found


def test_after_an_error_within_a_pass(erased: Any) -> None:
    """A pass that broke off leaves nothing behind by which the next one would seem right."""
    attention = erased.unet.get_submodule(f"{BLOCK}.attn2")
    handle = attention.to_out[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        noise(erased)
    handle.remove()
    attention.set_processor(OwnKey())
    with pytest.raises(ErasureInactiveError, match="OwnKey"):
        noise(erased)


def test_a_block_that_is_copied_before_its_model(erased: Any) -> None:
    _, twin = copy.deepcopy([erased.unet.mid_block, erased.unet])
    assert torch.equal(noise(erased, twin), noise(erased))
    twin.get_submodule(f"{BLOCK}.attn2").set_processor(OwnKey())
    with pytest.raises(ErasureInactiveError, match="OwnKey"):
        noise(erased, twin)
    noise(erased)


def test_a_pickled_block_is_small(erased: Any) -> None:
    plain, own = (len(pickle.dumps(each.unet.mid_block)) for each in (tiny_sd_pipe(), erased))
    assert own < 1.2 * plain


def test_a_block_in_two_models(erased: Any) -> None:
    """What another model does with its erasures leaves this one's hooks where they are."""
    oracle, other = noise(erased), tiny_sd_pipe()
    other.unet.mid_block = erased.unet.mid_block
    other.load_erasure(random_erasure(other, "lora", CONV_SITES, seed=4), "other")
    other.unload_erasure()
    assert torch.equal(noise(erased), oracle)


class Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_a_module_that_another_wraps_and_calls(erased: Any) -> None:
    oracle, attention = noise(erased), erased.unet.get_submodule(f"{BLOCK}.attn2")
    attention.to_k = Around(attention.to_k)
    assert torch.equal(noise(erased), oracle)


def exchanged(unet: Any) -> None:
    """Put another attention in the place of one, with the same parts."""
    block = unet.get_submodule(BLOCK)
    found = block.attn2
    with torch.device("meta"):
        block.attn2 = type(found)(64, 32, heads=found.heads, dim_head=64 // found.heads)
    for name in ("to_q", "to_k", "to_v", "to_out"):
        setattr(block.attn2, name, getattr(found, name))
    block.attn2.set_processor(OwnKey())


def test_an_owner_that_is_exchanged_while_its_parts_stay(erased: Any) -> None:
    exchanged(erased.unet)
    with pytest.raises(ErasureInactiveError, match="OwnKey"):
        noise(erased)


def test_a_peft_model_in_the_models_place(erased: Any) -> None:
    base, oracle = noise(tiny_sd_pipe()), noise(erased)
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    erased.unet = peft.get_peft_model(erased.unet, config).eval()
    assert torch.equal(noise(erased), oracle)
    assert [info.name for info in erased.list_erasures()] == ["no-zebra"]
    with erased.erasures_disabled():
        assert torch.equal(noise(erased), base)
    erased.unload_erasure()
    assert torch.equal(noise(erased), base)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copied_pipeline_is_checked_too(erased: Any, through: Callable[[Any], Any]) -> None:
    copied = through(erased)
    assert torch.equal(noise(copied), noise(erased))
    copied.unet.set_attn_processor(own_weights(copied.unet))
    with pytest.raises(ErasureInactiveError):
        noise(copied)
    noise(erased)
    copied.unload_erasure()
    noise(copied)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_after_a_lora_has_gone(pipe: Any, through: Callable[[Any], Any]) -> None:
    """What was watched of a LoRA under offloading is gone with it."""
    pipe.load_erasure(random_erasure(tiny_sd_pipe(), "lora", CONV_SITES[:1]))
    before = noise(pipe).numpy()
    pipe.load_lora_weights(style_lora(tiny_sd_pipe(), endings=("conv_in",)), adapter_name="style")
    cpu_offload(pipe.unet, "cpu")
    noise(pipe)
    pipe.unload_lora_weights()
    pipe.remove_all_hooks()
    noise(pipe)
    gc.collect()
    assert equal(noise(through(pipe)).numpy(), before)


def test_unloading_takes_all_of_it_off(pipe: Any) -> None:
    unchanged_by(pipe, lambda: (pipe.load_erasure(random_erasure(pipe)), pipe.unload_erasure()))


def hooks_within(module: Any) -> list[tuple[int, Any]]:
    return [each for part in module.modules() for each in compat.forward_hooks(part)]


def test_another_erasure_at_the_same_sites(pipe: Any) -> None:
    """It puts up no hooks, and is named where it does not act."""
    pipe.load_erasure(random_erasure(pipe, seed=1), "one")
    hooks = hooks_within(pipe.unet)
    pipe.load_erasure(random_erasure(pipe, seed=2), "two")
    assert hooks_within(pipe.unet) == hooks
    attention = pipe.unet.get_submodule(BLOCK).attn2
    stock = attention.processor
    attention.set_processor(OwnKey())
    with pytest.raises(ErasureInactiveError, match=r"\['one', 'two'\].*OwnKey"):
        noise(pipe)
    attention.set_processor(stock)
    exchanged(pipe.unet)
    pipe.load_erasure(random_erasure(pipe, seed=3), "three")  # the same modules, and another one around them
    with pytest.raises(ErasureInactiveError, match=r"\['one', 'three', 'two'\].*OwnKey"):
        noise(pipe)
    pipe.unload_erasure()
    assert not hooks_within(pipe.unet)


def test_threads_do_not_mix(erased: Any) -> None:
    """Passes that overlap see each their own calls: nothing is missed, and nothing is said to be."""
    oracle, failures = noise(erased), []

    def draw() -> None:
        try:
            assert all(torch.equal(noise(erased), oracle) for _ in range(10))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# -------------------------------------------------------------------------- what a cache skipped does not count


def tiny_flux() -> Any:
    """A pipeline of no more than a random FLUX transformer with three blocks of each sort."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=4,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
    return SimpleNamespace(transformer=transformer.eval().requires_grad_(False))


NOW = [0.0]  # the timestep, as caches are told it


def flux_step(pipe: Any, timestep: float) -> torch.Tensor:
    NOW[0] = timestep
    generator = torch.Generator().manual_seed(1)
    latents, rows = torch.randn(1, 16, 4, generator=generator), torch.randn(1, 6, 32, generator=generator)
    arguments = {"pooled_projections": rows[:, 0], "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    with torch.no_grad(), pipe.transformer.cache_context("cond"):
        return pipe.transformer(latents, rows, timestep=torch.tensor([timestep]), **arguments).sample


FLUX_SITES = tuple(
    f"transformer.{block}.{part}"
    for block, part in (
        ("transformer_blocks.1", "attn.add_k_proj"),
        ("transformer_blocks.2", "attn.to_v"),
        ("transformer_blocks.2", "ff.net.2"),
        ("single_transformer_blocks.1", "attn.to_k"),
    )
)


def broadcast(transformer: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(transformer, config)


def faster(transformer: Any) -> None:
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 800),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: NOW[0],
    )
    apply_faster_cache(transformer, config)


CACHES: dict[str, Callable[[Any], None]] = {
    "PAB": broadcast,
    "first-block cache": lambda t: apply_first_block_cache(t, FirstBlockCacheConfig(threshold=1e6)),
    "FasterCache": faster,
    "MagCache": lambda t: apply_mag_cache(
        t, MagCacheConfig(threshold=1e6, max_skip_steps=3, num_inference_steps=4, mag_ratios=[1.0] * 4)
    ),
    "TaylorSeer": lambda t: apply_taylorseer_cache(
        t, TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)
    ),
    "layer skip": lambda t: apply_layer_skip(t, LayerSkipConfig(indices=[1], fqn="transformer_blocks")),
}


@pytest.mark.parametrize("order", ["cache first", "erasure first"])
@pytest.mark.parametrize("name", CACHES)
def test_what_a_cache_skips_does_not_count(name: str, order: str) -> None:
    """The same steps as with a cache on weights that were edited; and where it computes, all is checked."""
    pipe, called = tiny_flux(), []
    erasure = random_erasure(pipe, "lora", FLUX_SITES, size=4.0, base=only_family(pipe))
    steps = (900.0, 700.0, 500.0, 300.0)

    def drawn(pipe: Any) -> list[torch.Tensor]:
        return [flux_step(pipe, timestep) for timestep in steps]

    edited = dense_edit(pipe, erasure)
    base = copy.deepcopy(pipe)
    for each in (edited, base):
        CACHES[name](each.transformer)
    if order == "cache first":
        CACHES[name](pipe.transformer)
    load_erasure(pipe, erasure, "one")
    if order == "erasure first":
        CACHES[name](pipe.transformer)
    site = pipe.transformer.get_submodule("transformer_blocks.1.attn.add_k_proj")
    site.register_forward_hook(lambda *_: called.append(1))
    for actual, oracle, without in zip(drawn(pipe), drawn(edited), drawn(base), strict=True):
        assert_like(actual.numpy(), oracle.numpy(), without.numpy())
    assert len(called) < len(steps), "the cache skipped nothing"


SKIPS: dict[str, dict[str, bool]] = {
    "block": {},
    "attention": {"skip_ff": False},
    "feed-forward": {"skip_attention": False},
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
}


@pytest.mark.parametrize("what", SKIPS)
def test_parts_of_a_layer_that_are_skipped(pipe: Any, what: str) -> None:
    """Layer skip knows the attentions of UNets; the first is skipped in each way, the sites of the second act."""
    parts = ("attn1.to_v", "attn1.to_out.0", "ff.net.2", "attn2.to_v")
    blocks = ("down_blocks.1.attentions.0", "up_blocks.0.attentions.0")
    sites = tuple(f"unet.{block}.transformer_blocks.0.{part}" for block in blocks for part in parts)
    erasure = random_erasure(pipe, "lora", sites)
    edited, plain = dense_edit(pipe, erasure), copy.deepcopy(pipe)
    pipe.load_erasure(erasure, "one")
    config = LayerSkipConfig(indices=[0], fqn=f"{blocks[0]}.transformer_blocks", **SKIPS[what])
    for each in (pipe, edited, plain):
        apply_layer_skip(each.unet, config)
    assert_like(noise(pipe).numpy(), noise(edited).numpy(), noise(plain).numpy())


def test_beside_a_cache_what_computes_is_checked(pipe: Any) -> None:
    """Attention that is broadcast, and the same attention with weights of its own."""
    pipe.load_erasure(random_erasure(pipe), "one")
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(-1, 1001),
        cross_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    for _ in range(4):
        noise(pipe)
    pipe.unet.set_attn_processor(own_weights(pipe.unet))
    with pytest.raises(ErasureInactiveError, match="CustomDiffusion"):
        for _ in range(2):
            noise(pipe)


@pytest.mark.parametrize("kind", ["attention", "conv", "skip"])
def test_deepcache(pipe: Any, kind: str) -> None:
    from DeepCache import DeepCacheSDHelper

    sites = UNET_SITES if kind == "attention" else CONV_SITES
    erasure = skip_erasure("full") if kind == "skip" else random_erasure(pipe, "lora", sites)
    edited = pipe if kind == "skip" else dense_edit(pipe, erasure)
    pipe.load_erasure(erasure, "one")
    drawn = []
    for each in (pipe, edited, tiny_sd_pipe()):
        helper = DeepCacheSDHelper(pipe=each)
        helper.set_params(cache_interval=2, cache_branch_id=0)
        helper.enable()
        drawn.append(images(each, num_inference_steps=4))
        helper.disable()
    assert far(drawn[0], drawn[2]) > 0.01
    if kind != "skip":
        assert_like(*drawn)


# -------------------------------------------------------------------------------------------------- it costs nothing


def test_no_operation_more(erased: Any) -> None:
    """The profiler sees the same operations with the check and without it."""

    def operations() -> list[str]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            noise(erased)
        return [event.name for event in seen.events() if event.name.startswith("aten::")]

    noise(erased)  # strengths become a tensor once
    with_check = operations()
    state = state_of(erased.unet)
    assert state.firing.owners
    state.firing.close()
    assert operations() == with_check


@pytest.mark.parametrize("whole", [True, False])
def test_in_one_graph(pipe: Any, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fullgraph=True` stays one graph, and what is missed in it is still an error of ours."""
    torch.compiler.reset()
    pipe = tiny_sd_pipe(levels=1)
    block = "up_blocks.0.attentions.0.transformer_blocks.0"
    sites = tuple(f"unet.{block}.attn2.{part}" for part in ("to_k", "to_v"))
    pipe.load_erasure(random_erasure(pipe, "lora", (*sites, "unet.conv_in")), "one")
    oracle, backend = noise(pipe), CountingBackend()
    target = pipe.unet if whole else pipe.unet.get_submodule(block)
    target.compile(backend=backend, fullgraph=True)
    for _ in range(3):
        assert far(noise(pipe).numpy(), oracle.numpy()) < 1e-5
    assert backend.graphs == 1
    attention = pipe.unet.get_submodule(f"{block}.attn2")
    attention.set_processor(OwnKey())
    for _ in range(2):
        with pytest.raises(ErasureInactiveError, match="OwnKey does not call it"):
            noise(pipe)
    pipe.set_erasures("one", 0.0)
    noise(pipe)
    assert backend.graphs == 2
    attention.set_processor(AttnProcessor2_0())
    pipe.set_erasures("one", 1.0)
    assert far(noise(pipe).numpy(), oracle.numpy()) < 1e-5
    torch.compiler.reset()


class OwnKey:
    """Attention that takes its key from the weight."""

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: Any
    ) -> Any:
        rows = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), nn.functional.linear(rows, attn.to_k.weight), attn.to_v(rows)
        heads = [each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value)]
        joined = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return attn.to_out[0](joined)


@pytest.mark.parametrize("first", ["compiled", "erasure"])
def test_a_block_that_was_compiled_by_hand(first: str) -> None:
    torch.compiler.reset()
    pipe, block = tiny_sd_pipe(), BLOCK.removesuffix(".transformer_blocks.0").removesuffix(".attentions.0")

    def compile_block() -> None:
        setattr(pipe.unet, block, torch.compile(getattr(pipe.unet, block), backend=CountingBackend()))

    def load() -> None:
        pipe.load_erasure(random_erasure(tiny_sd_pipe(), base=only_family(pipe)), "one")

    for action in (compile_block, load)[:: 1 if first == "compiled" else -1]:
        action()
    oracle = noise(dense_edit(tiny_sd_pipe(), random_erasure(tiny_sd_pipe())))
    assert_like(noise(pipe).numpy(), oracle.numpy(), noise(tiny_sd_pipe()).numpy())
    pipe.unet.mid_block.get_submodule(BLOCK.removeprefix("mid_block.") + ".attn2").set_processor(OwnKey())
    with pytest.raises(ErasureInactiveError, match="OwnKey"):
        noise(pipe)
    torch.compiler.reset()


def test_after_a_compiled_model_the_plain_one_is_checked_again(erased: Any) -> None:
    """Also a site that lies in the model itself, whose hooks the graph does not see."""
    torch.compiler.reset()
    erased.load_erasure(random_erasure(erased, "lora", ("unet.conv_in",), seed=2), "two")
    oracle = noise(erased)
    compiled = torch.compile(erased.unet, backend=CountingBackend(), fullgraph=True)
    assert far(noise(erased, compiled).numpy(), oracle.numpy()) < 1e-5
    forward = type(erased.unet).forward

    def without_the_first(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        found = self.conv_in
        vars(self)["_modules"]["conv_in"] = nn.Conv2d(4, 32, 3, padding=1)
        try:
            return forward(self, sample, *args, **kwargs)
        finally:
            vars(self)["_modules"]["conv_in"] = found

    erased.unet.forward = without_the_first.__get__(erased.unet)
    with pytest.raises(ErasureInactiveError, match="conv_in"):
        noise(erased)
    torch.compiler.reset()


def test_the_embedded_model_draws_no_cat_or_nothing() -> None:
    pipe = demo.load_pipeline()
    erasure: Erasure = erase(pipe, "cat", anchors="animal", retain=["dog"], layer="lora")
    pipe.load_erasure(erasure, "no-cat")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(peft.HRAConfig(r=4, target_modules=["to_k", "to_v"]), pipe.unet)
    with pytest.raises(ErasureInactiveError, match="no-cat.*hra"):
        pipe([demo.prompt("cat", style) for style in demo.STYLES], num_inference_steps=1)
