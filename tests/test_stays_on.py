"""An erasure stays on whatever else is done to the pipeline: each test compares with densely edited weights.

The oracle (`dense_edit`) is a copy of the base whose weights were edited by W + B A (or W T), and to which the same is
done. It knows nothing of hooks, so wherever a hook were lost, bypassed or fired twice, the two would differ by the whole
effect of the erasure, which `assert_like` requires to be at least 5,000 times the tolerance.
"""

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import save_file

from diffusers_erasure import Erasure
from tests.helpers import (
    CONV_SITES,
    STYLE_SITES,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    base_images,
    cast_to_float8,
    dense_edit,
    equal,
    images,
    load_style,
    noise,
    random_erasure,
    style_lora,
    tiny_sd_pipe,
)


KINDS = ("lora", "text_map")
Step = Callable[[Any], Any]


@pytest.fixture(params=KINDS)
def erasure(request: pytest.FixtureRequest) -> Erasure:
    """A `lora` on Linears and convolutions of the UNet and on the text encoder; or a `text_map`."""
    if request.param == "text_map":
        return random_erasure(tiny_sd_pipe(), "text_map")
    return random_erasure(tiny_sd_pipe(), "lora", UNET_SITES + CONV_SITES[:2] + TEXT_SITES[:1], size=0.5)


def both(erasure: Erasure, prepare: Step, *, load_first: bool) -> tuple[Any, Any, Any]:
    """`prepare` done to a pipeline with the erasure (before or after loading it), to the oracle, and to the base."""
    pipe = tiny_sd_pipe()
    if load_first:
        pipe.load_erasure(erasure)
    pipe = prepare(pipe) or pipe
    if not load_first:
        pipe.load_erasure(erasure, strict_base="ignore")
    base, oracle = tiny_sd_pipe(), dense_edit(tiny_sd_pipe(), erasure)
    return pipe, prepare(oracle) or oracle, prepare(base) or base


# ------------------------------------------------------------------------------------------------ other LoRAs


def load_second(pipe: Any) -> None:
    pipe.load_lora_weights(
        style_lora(tiny_sd_pipe(), seed=8, endings=("attn1.to_v", "ff.net.0.proj", "conv1")), adapter_name="second"
    )


STEPS: dict[str, Step] = {
    "load a LoRA": load_style,
    "load another": load_second,
    "activate the first": lambda pipe: pipe.set_adapters("style"),
    "weight both": lambda pipe: pipe.set_adapters(["style", "second"], [0.3, 1.5]),
    "weight 0": lambda pipe: pipe.set_adapters(["style", "second"], [0.0, 0.0]),
    "weight 1": lambda pipe: pipe.set_adapters(["style", "second"], [1.0, 1.0]),
    "disable": lambda pipe: pipe.disable_lora(),
    "enable": lambda pipe: pipe.enable_lora(),
    "fuse": lambda pipe: pipe.fuse_lora(lora_scale=0.7),
    "unfuse": lambda pipe: pipe.unfuse_lora(),
    "delete one": lambda pipe: pipe.delete_adapters("second"),
    "fuse again": lambda pipe: pipe.fuse_lora(),
    "unload with the LoRA fused in": lambda pipe: pipe.unload_lora_weights(),
}


def load_style_on_the_same_sites(pipe: Any) -> None:
    endings = (*STYLE_SITES, "attn2.to_k", "conv_in")
    pipe.load_lora_weights(style_lora(tiny_sd_pipe(), seed=7, endings=endings), adapter_name="style")


def steps_for(kind: str) -> dict[str, Step]:
    """With a text map, a LoRA on what reads the text gives (W + U) T, which is no sum: tested by itself below."""
    return {**STEPS, "load a LoRA": load_style_on_the_same_sites if kind == "lora" else load_style}


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, str], np.ndarray]:
    """Images of the oracle and of the base after each step, shared by the tests below."""
    return {}


def oracle_images(drawn: dict[tuple[str, str], np.ndarray], erasure: Erasure) -> dict[tuple[str, str], np.ndarray]:
    kind = erasure.config.layers[0].kind
    if (kind, "start") not in drawn:
        oracle = dense_edit(tiny_sd_pipe(), erasure)
        drawn[kind, "start"] = images(oracle)
        for name, step in steps_for(kind).items():
            step(oracle)
            drawn[kind, name] = images(oracle)
        base = tiny_sd_pipe()
        drawn[kind + " base", "start"] = images(base)
        for name, step in steps_for(kind).items():
            step(base)
            drawn[kind + " base", name] = images(base)
    return drawn


@pytest.mark.parametrize("loaded_after", ["start", "load a LoRA", "weight 0", "disable", "fuse", "fuse again"])
def test_other_loras(erasure: Erasure, drawn: dict[tuple[str, str], np.ndarray], loaded_after: str) -> None:
    """Loading, activating, weighting, disabling, fusing, unfusing, deleting and unloading LoRAs, before and after."""
    drawn = oracle_images(drawn, erasure)
    kind, pipe = erasure.config.layers[0].kind, tiny_sd_pipe()
    loaded = False
    for name, step in [("start", lambda pipe: None), *steps_for(kind).items()]:
        step(pipe)
        if name == loaded_after:
            pipe.load_erasure(erasure, strict_base="ignore")
            loaded = True
        if loaded:
            assert_like(images(pipe), drawn[kind, name], drawn[kind + " base", name])
    # What was compared are different images, or the LoRAs did nothing.
    assert np.abs(drawn[kind, "start"] - drawn[kind, "load a LoRA"]).max() > 0.05
    assert np.abs(drawn[kind, "start"] - drawn[kind, "unload with the LoRA fused in"]).max() > 0.05


def test_unload_all_loras(erasure: Erasure, pipe: Any) -> None:
    """Afterwards the images are exactly those of a pipeline that never had a LoRA."""
    pipe.load_erasure(erasure)
    before = images(pipe)
    load_style(pipe)
    assert not equal(images(pipe), before)
    pipe.unload_lora_weights()
    assert equal(images(pipe), before)


@pytest.mark.parametrize("scale", [0, 0.0, 0.4])
def test_cross_attention_scale(erasure: Erasure, scale: float) -> None:
    """`cross_attention_kwargs={"scale": s}` scales a user's LoRAs, and never the erasure."""
    pipe, oracle, base = both(erasure, load_style, load_first=True)
    arguments = {"cross_attention_kwargs": {"scale": scale}}
    drawn = images(pipe, **arguments)
    assert_like(drawn, images(oracle, **arguments), images(base, **arguments))
    if scale == 0:
        without = dense_edit(tiny_sd_pipe(), erasure)
        assert_like(drawn, images(without), base_images())


def test_lora_on_the_same_linear_as_a_text_map() -> None:
    """There the map gives (W + U) T: the user's LoRA reads the mapped rows too."""
    erasure = random_erasure(tiny_sd_pipe(), "text_map")
    lora = style_lora(tiny_sd_pipe(), endings=("attn2.to_k", "attn2.to_v"))
    fused = tiny_sd_pipe()
    fused.load_lora_weights(dict(lora), adapter_name="style")
    fused.fuse_lora()
    fused.unload_lora_weights()
    pipe = tiny_sd_pipe()
    pipe.load_erasure(erasure)
    pipe.load_lora_weights(dict(lora), adapter_name="style")
    assert_like(images(pipe), images(dense_edit(fused, erasure)), images(fused))


def test_lora_on_the_same_linear_as_a_lora_layer() -> None:
    """There the two add: W + BA + U."""
    erasure = random_erasure(tiny_sd_pipe())
    lora = style_lora(tiny_sd_pipe(), endings=("attn2.to_k", "attn2.to_v", "conv_in"))
    for load_first in (True, False):
        pipe, oracle, base = both(erasure, lambda p: p.load_lora_weights(dict(lora)), load_first=load_first)
        assert_like(images(pipe), images(oracle), images(base))


# ------------------------------------------------------------------------------------------- other pipelines


def source_image() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda pipe: StableDiffusionImg2ImgPipeline.from_pipe(pipe), id="from_pipe"),
        pytest.param(lambda pipe: AutoPipelineForImage2Image.from_pipe(pipe), id="AutoPipeline.from_pipe"),
        pytest.param(
            lambda pipe: StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False),
            id="components",
        ),
    ],
)
@pytest.mark.parametrize("load_first", [True, False])
def test_image_to_image(erasure: Erasure, convert: Step, load_first: bool) -> None:
    """A pipeline of another class over the same components has the erasures; loaded there, the first has them too."""
    first, oracle, base = tiny_sd_pipe(), dense_edit(tiny_sd_pipe(), erasure), tiny_sd_pipe()
    second = convert(first)
    if load_first:
        first = tiny_sd_pipe()
        first.load_erasure(erasure)
        second = convert(first)
    else:
        second.load_erasure(erasure)
    arguments = {"image": source_image(), "strength": 1.0, "num_inference_steps": 3}
    for pipe in (second, oracle, base):
        pipe.set_progress_bar_config(disable=True)
    assert_like(images(second, **arguments), images(convert(oracle), **arguments), images(convert(base), **arguments))
    assert_like(images(first), images(oracle), images(base))
    assert (
        [info.name for info in first.list_erasures()] == [info.name for info in second.list_erasures()] == ["random"]
    )
    second.unload_erasure()
    assert equal(images(first), images(base))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "pickle"]
)
def test_copies(erasure: Erasure, pipe: Any, duplicate: Step) -> None:
    """A copy has the erasure, bit for bit, and from then on the two are independent."""
    base = images(pipe)
    pipe.load_erasure(erasure, "one")
    erased = images(pipe)
    twin = duplicate(pipe)
    assert equal(images(twin), erased)
    assert_like(images(twin), images(dense_edit(tiny_sd_pipe(), erasure)), base)

    twin.set_erasures("one", 0.5)
    assert_like(images(twin), images(dense_edit(tiny_sd_pipe(), (erasure, 0.5))), base)
    assert equal(images(pipe), erased)

    pipe.unload_erasure()
    assert equal(images(pipe), base)
    assert_like(images(twin), images(dense_edit(tiny_sd_pipe(), (erasure, 0.5))), base)
    assert [info.strength for info in twin.list_erasures()] == [0.5]

    twin.unload_erasure()
    assert equal(images(twin), base)
    twin.load_erasure(erasure)
    assert equal(images(twin), erased)


# ------------------------------------------------------------------------------------------ placement, casting


@pytest.mark.parametrize("load_first", [True, False])
def test_model_offload(erasure: Erasure, load_first: bool) -> None:
    """Model offload takes all of accelerate's hooks off and on again after every call."""
    pipe, oracle, base = both(erasure, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), load_first=load_first)
    drawn = images(pipe)
    assert_like(drawn, images(oracle), images(base))
    for _ in range(2):
        assert equal(images(pipe), drawn)
    pipe.set_erasures("random", 0.5)
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), (erasure, 0.5))), images(base))
    pipe.unload_erasure()
    assert equal(images(pipe), images(base))
    pipe.remove_all_hooks()
    assert equal(images(pipe), base_images())


@pytest.mark.parametrize("load_first", [True, False])
def test_sequential_offload(erasure: Erasure, load_first: bool) -> None:
    """Weights are on the meta device but for the moment in which they are used.

    This is what `enable_sequential_cpu_offload` does to the UNet; for a whole pipeline accelerate cannot do it on a CPU.
    """
    pipe, _, base = both(erasure, lambda pipe: cpu_offload(pipe.unet, "cpu") and None, load_first=load_first)
    assert pipe.unet.conv_in.weight.device.type == "meta"
    assert pipe.list_erasures()[0].base_match["unet"] == "same"
    drawn = noise(pipe).numpy()
    assert_like(drawn, noise(dense_edit(tiny_sd_pipe(), erasure)).numpy(), noise(base).numpy())
    assert equal(noise(pipe).numpy(), drawn)
    pipe.unload_erasure()
    assert equal(noise(pipe).numpy(), noise(base).numpy())


@pytest.mark.parametrize("load_first", [True, False])
def test_layerwise_casting(erasure: Erasure, load_first: bool) -> None:
    """Weights stored as float8 and computed with in float32: the erasure's factors are not rounded to float8.

    The oracle adds B A to the weights after they were rounded, and stays in float32.
    """

    pipe, _, rounded = both(erasure, cast_to_float8, load_first=load_first)
    plain = tiny_sd_pipe()
    for name, value in plain.unet.state_dict().items():
        value.copy_(rounded.unet.state_dict()[name].float())
    assert_like(images(pipe), images(dense_edit(plain, erasure)), images(rounded))


# -------------------------------------------------------------------------------- attention processors, FreeU


def chunk_feed_forward(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(1, 0)


PREPARATIONS: dict[str, Step] = {
    "AttnProcessor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "AttnProcessor2_0": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    "default processor": lambda pipe: pipe.unet.set_default_attn_processor(),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "VAE slicing and tiling": lambda pipe: (pipe.vae.enable_slicing(), pipe.vae.enable_tiling())[2:],
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last) and None,
    "chunked feed forward": chunk_feed_forward,
}


@pytest.mark.parametrize("load_first", [True, False])
@pytest.mark.parametrize("preparation", list(PREPARATIONS))
def test_processors_and_modes(erasure: Erasure, preparation: str, load_first: bool) -> None:
    pipe, oracle, base = both(erasure, PREPARATIONS[preparation], load_first=load_first)
    assert_like(images(pipe), images(oracle), images(base))


@pytest.fixture
def ip_adapter(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A local IP-Adapter with random weights: four image tokens, and keys and values for each cross-attention."""
    generator = torch.Generator().manual_seed(5)
    pipe = tiny_sd_pipe()
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * 32, 16, generator=generator) / 4,
        "image_proj.proj.bias": torch.randn(4 * 32, generator=generator) / 4,
        "image_proj.norm.weight": torch.ones(32),
        "image_proj.norm.bias": torch.zeros(32),
    }
    # A key of the file counts the attention processors: 1, 3, 5, ... are the cross-attentions.
    for index, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            module = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k
            for part in ("to_k_ip", "to_v_ip"):
                shape = module.weight.shape
                tensors[f"ip_adapter.{index}.{part}.weight"] = torch.randn(shape, generator=generator) / 4
    save_file(tensors, tmp_path / "ip.safetensors")
    embeds = torch.randn(2, 1, 16, generator=generator)
    yield {"folder": tmp_path, "arguments": {"ip_adapter_image_embeds": [embeds]}}


@pytest.mark.parametrize("load_first", [True, False])
def test_ip_adapter(erasure: Erasure, ip_adapter: dict[str, Any], load_first: bool) -> None:
    """An IP-Adapter replaces every attention processor and adds image tokens beside the text's."""

    def load(pipe: Any) -> None:
        pipe.load_ip_adapter(
            str(ip_adapter["folder"]), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None
        )

    pipe, oracle, base = both(erasure, load, load_first=load_first)
    arguments = ip_adapter["arguments"]
    assert_like(images(pipe, **arguments), images(oracle, **arguments), images(base, **arguments))
    pipe.unload_ip_adapter()
    assert_like(images(pipe), images(dense_edit(tiny_sd_pipe(), erasure)), base_images())


# --------------------------------------------------------------------------------------------------- compile


class CountingBackend:
    """A backend for `torch.compile` that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingBackend]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep all it says
    torch.compiler.reset()
    yield CountingBackend()
    torch.compiler.reset()


def small(erasure_kind: str) -> tuple[Any, Erasure]:
    pipe = tiny_sd_pipe(levels=1)
    sites = tuple(f"unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.{part}" for part in ("to_k", "to_v"))
    return pipe, random_erasure(pipe, erasure_kind, (*sites, "unet.conv_in"))


def compile_outside(pipe: Any, backend: CountingBackend) -> None:
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)


def compile_inside(pipe: Any, backend: CountingBackend) -> None:
    pipe.unet.compile(backend=backend, fullgraph=True)


def compile_blocks(pipe: Any, backend: CountingBackend) -> None:
    for block in (*pipe.unet.down_blocks, *pipe.unet.up_blocks):
        block.compile(backend=backend, fullgraph=True)


@pytest.mark.parametrize("load_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "compile_unet"),
    [
        ("lora", compile_outside),
        pytest.param("lora", compile_inside, marks=pytest.mark.slow),
        pytest.param("text_map", compile_outside, marks=pytest.mark.slow),
    ],
)
def test_compile(
    kind: str, backend: CountingBackend, compile_unet: Callable[[Any, CountingBackend], None], load_first: bool
) -> None:
    """No further graphs, also for other strengths; loaded after the first compiled call, an erasure acts all the same."""
    pipe, erasure = small(kind)
    plain = copy.deepcopy(pipe)
    base = noise(pipe).numpy()
    if load_first:
        pipe.load_erasure(erasure, "one")
    compile_unet(pipe, backend)
    if not load_first:
        assert equal(noise(pipe).numpy(), base)
        assert backend.graphs == 1
        pipe.load_erasure(erasure, "one")
        backend.graphs = 0
    assert_like(noise(pipe).numpy(), noise(dense_edit(plain, erasure)).numpy(), base)
    assert backend.graphs == 1
    for strength in (0.5, 0.0, 2.0):
        pipe.set_erasures("one", strength)
        drawn = noise(pipe).numpy()
        if strength == 0:
            assert equal(drawn, base)
        else:
            assert_like(drawn, noise(dense_edit(plain, (erasure, strength))).numpy(), base)
    assert backend.graphs == 1, "a strength caused a recompilation"


@pytest.mark.slow
def test_compiled_blocks(backend: CountingBackend) -> None:
    """Where single blocks were compiled, a second erasure loaded and unloading are noticed too."""
    pipe, erasure = small("lora")
    plain = copy.deepcopy(pipe)
    base = noise(pipe).numpy()
    compile_blocks(pipe, backend)
    pipe.load_erasure(erasure, "one")
    assert_like(noise(pipe).numpy(), noise(dense_edit(plain, erasure)).numpy(), base)
    second = random_erasure(
        plain, "lora", ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",), seed=5
    )
    pipe.load_erasure(second, "two")
    assert_like(noise(pipe).numpy(), noise(dense_edit(plain, erasure, second)).numpy(), base)
    pipe.unload_erasure()
    assert equal(noise(pipe).numpy(), base)


def test_compiled_after_another_pipeline(backend: CountingBackend) -> None:
    """The graph of a module without hooks does not serve one of its class that has them, loaded before it was compiled."""
    pipe, erasure = small("lora")
    erased = copy.deepcopy(pipe)
    erased.load_erasure(erasure)
    base, wanted = noise(pipe).numpy(), noise(erased).numpy()
    for each in (pipe, erased):
        each.unet.up_blocks[0].attentions[0].transformer_blocks[0].compile(backend=backend, fullgraph=True)
    assert equal(noise(pipe).numpy(), base)
    assert_like(noise(erased).numpy(), wanted, base)
    assert backend.graphs == 2
    assert equal(noise(pipe).numpy(), base)


def test_alike_blocks_share_a_graph(backend: CountingBackend) -> None:
    """Regional compilation: one graph for all blocks with the same sites, and another for one without."""
    pipe = tiny_sd_pipe()
    ends = ("attn2.to_k", "attn2.to_v")
    sites = tuple(f"unet.{name}" for name, _ in pipe.unet.named_modules() if name.endswith(ends))
    for chosen, graphs in ((sites, 1), (sites[2:], 2)):
        torch.compiler.reset()
        backend.graphs, erased = 0, copy.deepcopy(pipe)
        erased.load_erasure(random_erasure(tiny_sd_pipe(), "lora", chosen, size=0.5))
        wanted = noise(erased).numpy()
        erased.unet.compile_repeated_blocks(backend=backend, fullgraph=True)
        assert_like(noise(erased).numpy(), wanted, noise(pipe).numpy())
        assert backend.graphs == graphs
