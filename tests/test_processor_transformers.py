"""`ActEraseAttnProcessor` on the joint attentions of FLUX.1 and Stable Diffusion 3: the same as the hooks, bit for bit."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from diffusers_erasure import (
    ActEraseAttnProcessor,
    Erasure,
    ErasureCompatibilityError,
    ErasureError,
    ErasureInactiveError,
    ErasureInputError,
    Layer,
    demo,
    erase,
)
from diffusers_erasure.layers.activation import BLEND, MASK, MEANS, TIMESTEPS, pack
from diffusers_erasure.schema import MODIFIER_PREFIX, TENSOR_FILE, GateSpec
from tests.coexistence_transformers import load_ip_adapter, with_image
from tests.helpers import EFFECT, equal, far, is_mark, random_erasure, roundings, tiny_sd_pipe, tree, unchanged_by
from tests.test_activation import ATTENTION, as_erasure, make_plan
from tests.tiny_transformers import PIPES, drawn
from tests.worlds import in_a_checkout


KINDS = list(PIPES)
STOCK: dict[str, type] = {"flux": FluxAttnProcessor, "sd3": JointAttnProcessor2_0}
# Of both streams; the last block of SD3 has none of the text, and its first one an attention of the image alone.
SITES = {
    "flux": tuple(f"transformer_blocks.{i}.attn.{end}" for i in (0, 1) for end in ("to_out.0", "to_add_out")),
    "sd3": (
        *(f"transformer_blocks.{i}.attn.{end}" for i in (0, 1) for end in ("to_out.0", "to_add_out")),
        *("transformer_blocks.2.attn.to_out.0", "transformer_blocks.0.attn2.to_out.0"),
    ),
}
TIMES = (1000.0, 600.0, 200.0)


def made(
    kind: str, sites: Sequence[str] = (), seed: int = 0, schedule: torch.Tensor | None = None, pipe: Any = None
) -> Erasure:
    """Random masks and means at some of a kind's sites; by default at all."""
    generator, pipe = torch.Generator().manual_seed(seed), pipe or PIPES[kind]()
    sites = tuple(sites) or SITES[kind]
    tensors = {TIMESTEPS: torch.tensor(TIMES), BLEND: torch.ones(1)}
    for site in sites:
        shape = len(TIMES), pipe.transformer.get_submodule(site).in_features
        mask = torch.rand(shape, generator=generator) < 0.4
        tensors[site + MASK], tensors[site + MEANS] = pack(mask), torch.randn(shape, generator=generator)[mask]
    layer = Layer("activation", sites, tensors, "transformer", schedule=schedule)
    return Erasure.from_layers([layer], base=pipe, concepts="zebra", method="random")


def patch(pipe: Any, erasure: Erasure, strength: float = 0.8, name: str | None = None) -> None:
    processors = ActEraseAttnProcessor.for_transformer(pipe.transformer, erasure, strength, name)
    pipe.transformer.set_attn_processor(processors)


def patching(pipe: Any) -> list[str]:
    """The attentions that have an `ActEraseAttnProcessor`."""
    processors = pipe.transformer.attn_processors
    return [name for name, each in processors.items() if type(each) is ActEraseAttnProcessor]


def of(sites: Sequence[str]) -> set[str]:
    return {site.rpartition(".to_")[0] + ".processor" for site in sites}


def hooked_with(kind: str, *erasures: Erasure, strength: float = 0.8) -> Any:
    pipe = PIPES[kind]()
    for number, erasure in enumerate(erasures):
        pipe.load_erasure(erasure, f"e{number}", strength=strength)
    return pipe


# ------------------------------------------------------------------------------------------------ the hooks' own edit


@pytest.mark.parametrize("kind", KINDS)
def test_the_very_values_of_the_hooks(kind: str) -> None:
    pipe, hooked = PIPES[kind](), hooked_with(kind, made(kind))
    base, before, found = drawn(pipe), tree(pipe), pipe.transformer.attn_processors
    processors = ActEraseAttnProcessor.for_transformer(pipe.transformer, made(kind), strength=0.8)
    assert processors.keys() == found.keys()
    with pytest.raises(ErasureInactiveError, match="they were not set"):
        drawn(pipe)
    pipe.transformer.set_attn_processor(processors)
    assert set(patching(pipe)) == of(SITES[kind])
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.processor, STOCK[kind])
    oracle = drawn(hooked)
    assert equal(drawn(pipe), oracle) and far(oracle, base) > EFFECT
    plain = PIPES[kind]().transformer
    assert [name for name in pipe.transformer.state_dict() if not is_mark(name)] == list(plain.state_dict())
    copied, pickled = copy.deepcopy(pipe), PIPES[kind]()
    pickled.register_modules(transformer=pickle.loads(pickle.dumps(pipe.transformer)))
    for twin in (copied, pickled):
        assert equal(drawn(twin), oracle)
        ActEraseAttnProcessor.remove(twin.transformer)
        assert equal(drawn(twin), base)
    assert equal(drawn(pipe), oracle)
    pipe.unload_erasure()
    assert all(each is found[name] for name, each in pipe.transformer.attn_processors.items())
    assert tree(pipe) == before
    assert equal(drawn(pipe), base)


@pytest.mark.parametrize(
    ("kind", "sites"),
    [
        ("flux", ("transformer_blocks.0.attn.to_out.0",)),
        ("flux", ("transformer_blocks.0.attn.to_add_out",)),
        ("sd3", ("transformer_blocks.1.attn.to_out.0",)),
        ("sd3", ("transformer_blocks.1.attn.to_add_out",)),
        ("sd3", ("transformer_blocks.0.attn2.to_out.0",)),
    ],
)
def test_one_stream_alone(kind: str, sites: tuple[str, ...]) -> None:
    pipe, erasure = PIPES[kind](), made(kind, sites)
    base, oracle = drawn(pipe), drawn(hooked_with(kind, erasure))
    patch(pipe, erasure)
    assert set(patching(pipe)) == of(sites)
    assert equal(drawn(pipe), oracle) and far(oracle, base) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_an_erasure_like_others(kind: str) -> None:
    """Listed, set, disabled, at strengths by picture, and not loaded twice; off it is the base bit for bit."""
    pipe, hooked, erasure = PIPES[kind](), hooked_with(kind, made(kind)), made(kind)
    base = drawn(pipe)
    patch(pipe, erasure)
    (info,) = pipe.list_erasures()
    assert (info.name, info.strength, info.backend) == ("random", 0.8, "processor")
    with pytest.raises(ErasureInputError, match="loaded already, as 'random'"):
        pipe.load_erasure(erasure, "again")
    with pytest.raises(ErasureInputError, match="not fused"):
        pipe.fuse_erasures()
    pipe.set_erasures("random", 0.3)
    hooked.set_erasures("e0", 0.3)
    assert equal(drawn(pipe), drawn(hooked))
    two: dict[str, Any] = {"prompt": ["a photo of a red apple", "a green zebra"]}
    with pipe.erasure_strengths({"random": [0.0, 1.0]}), hooked.erasure_strengths({"e0": [0.0, 1.0]}):
        assert equal(drawn(pipe, **two), drawn(hooked, **two))
    with pipe.erasures_disabled():
        assert equal(drawn(pipe), base)
    pipe.set_erasures("random", 0.0)
    assert equal(drawn(pipe), base)
    assert set(patching(pipe)) == of(SITES[kind])


def test_threads_with_strengths_of_their_own() -> None:
    pipe, hooked = PIPES["flux"](), hooked_with("flux", made("flux"))
    patch(pipe, made("flux"))
    generator, wanted = torch.Generator().manual_seed(0), [0.0, 0.8, 1.0]
    given = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 40, generator=generator),
        "pooled_projections": torch.randn(1, 24, generator=generator),
        "timestep": torch.tensor([0.6]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }

    def call(on: Any, name: str, strength: float) -> torch.Tensor:
        with torch.no_grad(), on.erasure_strengths({name: strength}):
            return on.transformer(**given).sample

    oracle = [call(hooked, "e0", each) for each in wanted]
    assert not torch.equal(oracle[0], oracle[1])
    with ThreadPoolExecutor(len(wanted)) as pool:
        for _ in range(4):
            for job, own in zip([pool.submit(call, pipe, "random", each) for each in wanted], oracle, strict=True):
                assert torch.equal(job.result(), own)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule(kind: str) -> None:
    """By timestep, and at each site another one."""
    schedule = torch.rand(8, len(SITES[kind]), generator=torch.Generator().manual_seed(2))
    pipe, erasure = PIPES[kind](), made(kind, schedule=schedule)
    oracle, always = drawn(hooked_with(kind, erasure)), drawn(hooked_with(kind, made(kind)))
    patch(pipe, erasure)
    assert equal(drawn(pipe), oracle) and far(oracle, always) > 1e-3


@in_a_checkout
@pytest.mark.parametrize("name", KINDS)
def test_on_trained_models(name: str) -> None:
    """An erasure that was fitted, as its pipeline draws."""
    pipe = demo.load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_pairs": 1, "num_inference_steps": 2, "timesteps": 2, "guidance_scale": 3.0}
    blocks = "double" if name == "flux" else "all"
    erasure = erase(pipe, "cat", anchors="animal", method="acterase", sites="attn", blocks=blocks, **steps)
    assert any(site.endswith("to_add_out") for site in erasure.config.layers[0].sites)

    def draw() -> Any:
        generator, given = torch.Generator().manual_seed(0), {**demo.call_arguments(name), "num_inference_steps": 4}
        return pipe(demo.prompt("cat"), generator=generator, **given, output_type="np").images

    base, found = draw(), pipe.transformer.attn_processors
    pipe.load_erasure(erasure)
    oracle = draw()
    pipe.unload_erasure()
    patch(pipe, erasure, 1.0)
    assert equal(draw(), oracle) and far(oracle, base) > 1e-3
    pipe.unload_erasure()
    assert equal(draw(), base)
    assert all(each is found[key] for key, each in pipe.transformer.attn_processors.items())


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    """The whole transformer in one graph, in which strengths are set; and off it is the base."""
    graphs = 0

    def backend(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    pipe = PIPES[kind]()
    base = drawn(pipe)
    patch(pipe, made(kind))
    eager = drawn(pipe)
    torch.compiler.reset()
    try:
        pipe.transformer.compile(fullgraph=True, backend=backend)
        assert roundings(drawn(pipe), eager) <= 50
        made_so_far = graphs
        pipe.set_erasures("random", 0.0)
        assert roundings(drawn(pipe), base) <= 50
        assert graphs == made_so_far > 0
        ActEraseAttnProcessor.remove(pipe.transformer)
        assert roundings(drawn(pipe), base) <= 50
    finally:
        torch.compiler.reset()


# ------------------------------------------------------------------------------------------------- several erasures


@pytest.mark.parametrize("kind", KINDS)
def test_several_join_as_hooks_do(kind: str) -> None:
    """Each unloaded by itself: what no erasure patches any more has its own processor back."""
    first, second = made(kind, SITES[kind][:3]), made(kind, SITES[kind][1:], seed=1)
    pipe, both = PIPES[kind](), drawn(hooked_with(kind, first, second))
    base, found, before = drawn(pipe), pipe.transformer.attn_processors, tree(pipe)
    patch(pipe, first, name="first")
    alone = drawn(pipe)
    assert equal(alone, drawn(hooked_with(kind, first)))
    processors = ActEraseAttnProcessor.for_transformer(pipe.transformer, second, 0.8, "second")
    with pytest.raises(ErasureInactiveError, match="'second'"):
        drawn(pipe)
    pipe.transformer.set_attn_processor(processors)
    assert set(patching(pipe)) == of(SITES[kind]) and [each.name for each in pipe.list_erasures()] == [
        "first",
        "second",
    ]
    assert equal(drawn(pipe), both) and far(both, alone) > 1e-3
    pipe.set_erasures("first", 0.0)
    hooked = hooked_with(kind, first, second)
    hooked.set_erasures("e0", 0.0)
    assert equal(drawn(pipe), drawn(hooked))
    pipe.set_erasures("first", 0.8)
    pipe.unload_erasure("second")
    assert set(patching(pipe)) == of(SITES[kind][:3]) and equal(drawn(pipe), alone)
    patch(pipe, second, name="second")
    assert equal(drawn(pipe), both)
    ActEraseAttnProcessor.remove(pipe.transformer)
    assert all(each is found[name] for name, each in pipe.transformer.attn_processors.items())
    assert tree(pipe) == before and equal(drawn(pipe), base)


def test_one_that_was_never_set_is_not_forgotten() -> None:
    """The processors of the next one have it; by those of the first alone the second does not act, which is told."""
    sites = SITES["flux"]
    first, second = made("flux", sites[:1]), made("flux", sites[2:], seed=1)
    pipe = PIPES["flux"]()
    one = ActEraseAttnProcessor.for_transformer(pipe.transformer, first, 0.8, "first")
    two = ActEraseAttnProcessor.for_transformer(pipe.transformer, second, 0.8, "second")
    pipe.transformer.set_attn_processor(one)
    with pytest.raises(ErasureInactiveError, match="'second'"):
        drawn(pipe)
    pipe.transformer.set_attn_processor(two)
    assert equal(drawn(pipe), drawn(hooked_with("flux", first, second)))


def test_the_same_edit_is_refused() -> None:
    pipe, erasure = PIPES["flux"](), made("flux")
    patch(pipe, erasure)
    same = Erasure(erasure.config, {TENSOR_FILE: {**erasure.tensors[TENSOR_FILE]}})
    for each in (erasure, same, halved(erasure)):
        with pytest.raises(ErasureInputError, match="loaded already, as 'random'"):
            unchanged_by(
                pipe, lambda each=each: ActEraseAttnProcessor.for_transformer(pipe.transformer, each, 1.0, "other")
            )


def halved(erasure: Erasure) -> Erasure:
    """The same edit in half precision."""
    tensors = erasure.tensors[TENSOR_FILE]
    low = {name: value.half() if name.endswith(MEANS) else value for name, value in tensors.items()}
    return Erasure(erasure.config, {TENSOR_FILE: low})


def test_beside_hooks_at_the_same_attentions_it_is_refused() -> None:
    pipe, other = PIPES["sd3"](), made("sd3", SITES["sd3"][:1], seed=1)
    pipe.load_erasure(other, "hooks")
    with pytest.raises(ErasureInputError, match="one form"):
        unchanged_by(pipe, lambda: ActEraseAttnProcessor.for_transformer(pipe.transformer, made("sd3")))
    elsewhere = made("sd3", SITES["sd3"][1:])
    patch(pipe, elsewhere)
    hooked = hooked_with("sd3", other, elsewhere)
    hooked.set_erasures("e0", 1.0)
    assert equal(drawn(pipe), drawn(hooked))
    pipe.unload_erasure("hooks")
    with pytest.raises(ErasureInputError, match="one form"):
        unchanged_by(pipe, lambda: pipe.load_erasure(made("sd3", SITES["sd3"][1:2], seed=2), "late"))


# ----------------------------------------------------------------------------------- over, and under, other processors


@pytest.mark.parametrize("kind", KINDS)
def test_an_ip_adapter_below(kind: str) -> None:
    """Its scale is set, its weights move and keep their names."""
    pipe, hooked, plain, erasure = PIPES[kind](), PIPES[kind](), PIPES[kind](), made(kind)
    for each in (pipe, hooked, plain):
        load_ip_adapter(kind, each)
    hooked.load_erasure(erasure, strength=0.8)
    found = pipe.transformer.attn_processors
    patch(pipe, erasure)
    arguments = with_image(kind)
    for scale in (1.0, 0.3):
        for each in (pipe, hooked, plain):
            each.set_ip_adapter_scale(scale)
        oracle = drawn(hooked, **arguments)
        assert equal(drawn(pipe, **arguments), oracle)
        assert far(oracle, drawn(plain, **arguments)) > EFFECT
    names = [name for name in pipe.transformer.state_dict() if not is_mark(name)]
    assert sorted(names) == sorted(plain.transformer.state_dict()) and any("to_k_ip" in name for name in names)
    ActEraseAttnProcessor.remove(pipe.transformer)
    assert all(each is found[name] for name, each in pipe.transformer.attn_processors.items())
    assert equal(drawn(pipe, **arguments), drawn(plain, **arguments))


def set_stock(kind: str, pipe: Any) -> None:
    pipe.transformer.set_attn_processor({name: STOCK[kind]() for name in pipe.transformer.attn_processors})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [load_ip_adapter, set_stock])
def test_whoever_sets_processors_later_is_noticed(kind: str, step: Callable[[str, Any], None]) -> None:
    """A pass raises; and `remove` leaves the later ones, and nothing else."""
    pipe, plain = PIPES[kind](), PIPES[kind]()
    arguments = with_image(kind) if step is load_ip_adapter else {}
    patch(pipe, made(kind))
    for each in (pipe, plain):
        step(kind, each)
    assert patching(pipe) == []
    with pytest.raises(ErasureInactiveError, match="set others over"):
        drawn(pipe, **arguments)
    with pipe.erasures_disabled():
        assert equal(drawn(pipe, **arguments), drawn(plain, **arguments))
    replaced = pipe.transformer.attn_processors
    ActEraseAttnProcessor.remove(pipe.transformer)
    assert all(each is replaced[name] for name, each in pipe.transformer.attn_processors.items())
    assert equal(drawn(pipe, **arguments), drawn(plain, **arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_unloading_an_ip_adapter_is_noticed(kind: str) -> None:
    pipe = PIPES[kind]()
    load_ip_adapter(kind, pipe)
    patch(pipe, made(kind))
    pipe.unload_ip_adapter() if kind == "flux" else set_stock(kind, pipe)  # SD3's wants a whole pipeline
    assert patching(pipe) == []
    with pytest.raises(ErasureInactiveError, match=STOCK[kind].__name__):
        drawn(pipe)
    pipe.unload_erasure()
    assert equal(drawn(pipe), drawn(PIPES[kind]()))


def test_fused_projections_of_flux_go_on_below() -> None:
    """Fusing sets no other processors there."""
    pipe, hooked = PIPES["flux"](), hooked_with("flux", made("flux"))
    patch(pipe, made("flux"))
    alone = drawn(pipe)
    for each in (pipe, hooked):
        each.transformer.fuse_qkv_projections()
    assert set(patching(pipe)) == of(SITES["flux"])
    assert equal(drawn(pipe), drawn(hooked)) and far(drawn(pipe), alone) < 1e-4
    pipe.transformer.unfuse_qkv_projections()
    assert equal(drawn(pipe), alone)


def single_attention_pipe() -> Any:
    """An SD3 without second attentions and norms, which diffusers' fused processor leaves out."""
    pipe = PIPES["sd3"]()
    config = {**pipe.transformer.config, "dual_attention_layers": (), "qk_norm": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel.from_config(config).eval()
        for module in transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.3 * module.in_features**-0.5)
    pipe.register_modules(transformer=transformer)
    return pipe


def test_fused_projections_of_sd3() -> None:
    """Fusing before: the fused ones attend. Afterwards: noticed, and undoing it brings the patches back."""
    pipe, hooked = single_attention_pipe(), single_attention_pipe()
    erasure = made("sd3", SITES["sd3"][:5], pipe=pipe)
    hooked.load_erasure(erasure, strength=0.8)
    patch(pipe, erasure)
    alone = drawn(pipe)
    assert equal(alone, drawn(hooked))
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ErasureInactiveError, match="is FusedJointAttnProcessor2_0"):
        drawn(pipe)
    pipe.transformer.unfuse_qkv_projections()
    assert set(patching(pipe)) == of(SITES["sd3"][:5]) and equal(drawn(pipe), alone)
    pipe.unload_erasure()
    for each in (pipe, hooked):
        each.transformer.fuse_qkv_projections()
    patch(pipe, erasure)
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.processor, FusedJointAttnProcessor2_0)
    assert equal(drawn(pipe), drawn(hooked))


class WithoutText(FluxAttnProcessor):
    """Attends, and computes with the text projection's weight itself."""

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(ByWeight(attn), *args, **kwargs)


class ByWeight:
    def __init__(self, attn: Any) -> None:
        self.attn = attn

    def __getattr__(self, name: str) -> Any:
        part = getattr(self.attn, name)
        if name != "to_add_out":
            return part
        return lambda x: nn.functional.linear(x, part.weight, part.bias)


def test_a_processor_that_leaves_the_text_out() -> None:
    pipe = PIPES["flux"]()
    pipe.transformer.transformer_blocks[0].attn.set_processor(WithoutText())
    patch(pipe, made("flux"))
    with pytest.raises(ErasureInactiveError, match="WithoutText does not call the attention's `to_add_out`"):
        drawn(pipe)
    pipe.unload_erasure()
    patch(pipe, made("flux", SITES["flux"][:1]))  # of the image alone
    assert far(drawn(pipe), drawn(PIPES["flux"]())) > 1e-3


def test_fitting_another_one_sees_the_base() -> None:
    """The copy on which a method works has neither the patches nor the processors."""
    pipe, plain = PIPES["flux"](), PIPES["flux"]()
    patch(pipe, made("flux"))
    quick: dict[str, Any] = {"method": "acterase", "num_pairs": 1, "num_inference_steps": 2, "top": 0.5}
    found, expected = (erase(each, "zebra", anchors="horse", **quick) for each in (pipe, plain))
    assert found.content_hash == expected.content_hash
    assert equal(drawn(pipe), drawn(hooked_with("flux", made("flux"))))


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        *(("flux", "transformer_blocks.0.ff.net.2"), ("flux", "single_transformer_blocks.1.proj_out")),
        *(("sd3", "transformer_blocks.0.ff.net.2"), ("sd3", "transformer_blocks.1.ff_context.net.2")),
    ],
)
def test_other_sites_are_refused(kind: str, site: str) -> None:
    """The hooks act there, which the error says."""
    pipe, erasure = PIPES[kind](), made(kind, (*SITES[kind], site))
    with pytest.raises(ErasureInputError, match=f"'{site}' is none.*pipe.load_erasure"):
        unchanged_by(pipe, lambda: ActEraseAttnProcessor.for_transformer(pipe.transformer, erasure))
    pipe.load_erasure(erasure)


def gated() -> Erasure:
    erasure = made("flux")
    (spec,) = erasure.config.layers
    spec = dataclasses.replace(spec, gate=GateSpec(f"{MODIFIER_PREFIX}0.gate", layout="row"))
    (name,) = (each for each in spec.modifier_names if each.endswith("gate"))
    tensors = {**erasure.tensors[TENSOR_FILE], name: torch.randn(1, 4, 40)}
    return Erasure(dataclasses.replace(erasure.config, layers=(spec,)), {TENSOR_FILE: tensors})


def test_what_no_processor_does() -> None:
    pipe = PIPES["flux"]()
    lora = random_erasure(pipe, "lora", ("transformer.transformer_blocks.0.attn.to_out.0",))
    unet = as_erasure(make_plan(ATTENTION))
    wrong: list[tuple[Any, type[ErasureError], str]] = [
        (gated(), ErasureInputError, "gate"),
        (lora, ErasureInputError, "kind 'lora'.*pipe.load_erasure"),
        (unet, ErasureCompatibilityError, "another architecture"),
        (made("sd3"), ErasureCompatibilityError, "has no module"),
        ("no erasure", ErasureInputError, "read it first"),
    ]
    for each, error, message in wrong:
        with pytest.raises(error, match=message):
            unchanged_by(pipe, lambda each=each: ActEraseAttnProcessor.for_transformer(pipe.transformer, each))


def test_each_model_has_its_method() -> None:
    erasure, unet = made("flux"), tiny_sd_pipe().unet
    for kind in KINDS:
        transformer = PIPES[kind]().transformer
        with pytest.raises(ErasureInputError, match="for_transformer"):
            ActEraseAttnProcessor.for_unet(transformer, erasure)
    with pytest.raises(ErasureInputError, match="for_unet"):
        ActEraseAttnProcessor.for_transformer(unet, erasure)
    with pytest.raises(ErasureInputError, match="pipe.load_erasure"):
        ActEraseAttnProcessor.for_transformer(nn.Linear(1, 1), erasure)
