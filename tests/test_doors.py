"""Maps at the doors of transformers: what is refused, and what they do beside offload, graphs, copies, LoRAs and batches."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import FluxPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureFileError,
    ErasureInactiveError,
    ErasureInputError,
    combine,
    load_erasure,
    with_stock_lora,
)
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.schema import BaseModel, Concept
from tests.helpers import TOKENIZER
from tests.test_families import EXACT, SCHEDULE, apart, assert_close, erasure_of
from tests.tiny_families import (
    DOOR,
    FAMILIES,
    POOLED,
    ROWS,
    Maps,
    base,
    edit,
    edited,
    linears,
    maps_of,
    rows,
    texts,
)


FLUX, SD3, QWEN, Z = "FLUX.1 dev", "SD3", "Qwen-Image", "Z-Image"
KINDS = FLUX, SD3, QWEN  # with rows and a pooled vector, and with a norm before the door


@cache
def arguments(name: str, batch: int = 2) -> dict[str, Any]:
    """What the pipeline gives its denoiser in the first step."""
    tiny, found = FAMILIES[name], list[dict[str, Any]]()
    pipe = tiny.make()
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: found.append(kwargs), with_kwargs=True)
    more = {} if tiny.family == "qwen-image" else {"guidance_scale": 1.0}
    tiny.draw(pipe, **{**texts(tiny, batch), **more})
    handle.remove()
    return found[0]


def predict(name: str, model: Any, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments(name, batch))[0]


def loaded(name: str, *maps: Maps, schedule: torch.Tensor | None = None) -> Any:
    """A pipeline with an erasure of each of some maps, by default of the first: "0", "1" and so on."""
    tiny = FAMILIES[name]
    pipe = tiny.make()
    for number, each in enumerate(maps or (maps_of(tiny),)):
        pipe.load_erasure(erasure_of(tiny, pipe, each, schedule), str(number))
    return pipe


def oracle(name: str, batch: int = 2, strength: float = 1.0) -> torch.Tensor:
    tiny = FAMILIES[name]
    return predict(name, edit(tiny, tiny.make(), maps_of(tiny), strength).transformer, batch)


def plain(name: str, batch: int = 2) -> torch.Tensor:
    return predict(name, FAMILIES[name].make().transformer, batch)


# -------------------------------------------------------------------------------------------------- what is refused


def alone(source: str, width: int, component: str = "transformer", family: str = "flux") -> Erasure:
    tensors = {"A": rows(width, 1)[0, :2], "D": rows(width, 2)[0, :2]}
    layer = Layer("text_map", (source,), tensors, component)
    return Erasure.from_layers([layer], base=BaseModel(family), concepts="zebra")


@pytest.mark.parametrize(
    ("name", "source", "width"),
    [
        (FLUX, DOOR, 20),
        ("Chroma", POOLED, 12),
        (QWEN, POOLED, 12),
        ("SD 2", "text_embeds", 12),
        ("SD 2", DOOR, 20),
        (SD3, "text_embeds", 12),
        (FLUX, ROWS, 21),
        (FLUX, POOLED, 20),
        (QWEN, DOOR, 21),
        (QWEN, ROWS, 21),
        (Z, DOOR, 12),
        ("SDXL refiner", "text_embeds", 5),
        ("PixArt-Σ", ROWS, 16),
    ],
)
def test_made_for_another_architecture(name: str, source: str, width: int) -> None:
    tiny = FAMILIES[name]
    pipe = tiny.make()
    with pytest.raises(ErasureCompatibilityError, match="another architecture"):
        pipe.load_erasure(alone(source, width, tiny.component))
    assert torch.equal(tiny.draw(pipe), base(name)) and pipe.list_erasures() == []


def test_a_denoiser_that_was_built_without_its_door() -> None:
    tiny = FAMILIES["PixArt-Σ"]
    pipe = dataclasses.replace(tiny, config={**tiny.config, "caption_channels": None}).make()
    with pytest.raises(ErasureCompatibilityError, match=r"no 'caption_projection.linear_1'.*another architecture"):
        pipe.load_erasure(alone(ROWS, 16))


def test_no_module_is_an_input() -> None:
    for source in ("txt_in", "context_embedder", "prompt_embeds"):
        with pytest.raises(ErasureFileError, match="one site, one of"):
            alone(source, 20)


def test_another_family() -> None:
    flux, sd3 = FAMILIES[FLUX], FAMILIES[SD3].make()
    with pytest.raises(ErasureCompatibilityError, match="made for flux"):
        sd3.load_erasure(erasure_of(flux, flux.make(), maps_of(flux)))


def test_two_transformers_that_take_turns() -> None:
    """Wan 2.2: the second one would read the concept."""
    tiny = FAMILIES["Wan"]
    pipe = tiny.make()
    erasure = erasure_of(tiny, pipe, maps_of(tiny))
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    with pytest.raises(ErasureCompatibilityError, match="transformer_2"):
        pipe.load_erasure(erasure)
    assert pipe.list_erasures() == []


@pytest.mark.parametrize("name", [QWEN, Z, "Lumina 2"])
def test_before_a_norm_a_map_is_no_change_of_weights(name: str) -> None:
    tiny = FAMILIES[name]
    pipe, maps = tiny.make(), maps_of(tiny, sources=(ROWS,))
    erasure = erasure_of(tiny, pipe, maps)
    pipe.load_erasure(erasure)
    drawn, (a, d) = tiny.draw(pipe), maps[ROWS]
    with pytest.raises(ErasureCompatibilityError, match="known to be linear"):
        pipe.fuse_erasures()
    assert torch.equal(tiny.draw(pipe), drawn)
    pipe.unload_erasure()
    with pytest.raises(ErasureInputError, match="No LoRA"):
        with_stock_lora(erasure, pipe)
    mapped = {
        key: [each + each @ a.T @ d for each in text] if isinstance(text, list) else text + text @ a.T @ d
        for key, text in texts(tiny).items()
        if key.endswith("prompt_embeds")
    }
    assert_close(drawn, tiny.draw(pipe, **mapped), base(name))


# ---------------------------------------------------------------------------------------- a door without its edit


class Bare(nn.Module):
    """Computes with a door's weight and does not call it."""

    def __init__(self, door: nn.Linear) -> None:
        super().__init__()
        self.door = (door,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.door[0].weight, self.door[0].bias)


def test_a_door_that_is_not_called_is_an_error() -> None:
    pipe = loaded(QWEN)
    model, forward = pipe.transformer, pipe.transformer.forward

    def bypassing(*args: Any, **kwargs: Any) -> Any:
        door = model.txt_in
        model.txt_in = Bare(door)
        try:
            return forward(*args, **kwargs)
        finally:
            model.txt_in = door

    model.forward = bypassing
    with pytest.raises(ErasureInactiveError, match="'txt_in'"):
        FAMILIES[QWEN].draw(pipe)
    del model.forward
    model.txt_in = copy.deepcopy(model.txt_in)
    with pytest.raises(ErasureInactiveError, match="another module took its place"):
        FAMILIES[QWEN].draw(pipe)


# ------------------------------------------------------------------------------------------- offload, graphs, copies


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": lambda pipe: cpu_offload(pipe.transformer, "cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", KINDS)
def test_it_stays_on(name: str, setting: str) -> None:
    tiny, pipe = FAMILIES[name], loaded(name)
    made = SETTINGS[setting](pipe)
    made = pipe if made is None or made is pipe.transformer else made
    assert_close(tiny.draw(made), edited(name), base(name))
    if made is not pipe:  # each has its own
        made.unload_erasure()
        assert torch.equal(tiny.draw(made), base(name))
        assert_close(tiny.draw(pipe), edited(name), base(name))


@pytest.mark.parametrize("setting", ["model offload", "sequential offload"])
@pytest.mark.parametrize("name", KINDS)
def test_it_is_loaded_under_offload(name: str, setting: str) -> None:
    tiny = FAMILIES[name]
    pipe = tiny.make()
    erasure = erasure_of(tiny, pipe, maps_of(tiny))
    SETTINGS[setting](pipe)
    pipe.load_erasure(erasure)
    assert_close(tiny.draw(pipe), edited(name), base(name))
    pipe.unload_erasure()
    assert torch.equal(tiny.draw(pipe), base(name))


@pytest.mark.parametrize("name", [FLUX, pytest.param(SD3, marks=pytest.mark.slow), QWEN])
def test_in_one_graph(name: str) -> None:
    """One graph for all strengths, by picture too."""
    torch.compiler.reset()
    pipe, graphs = loaded(name), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    pipe.transformer.compile(backend=backend, fullgraph=True)
    assert_close(predict(name, pipe.transformer), oracle(name), plain(name))
    pipe.set_erasures("0", 0.5)
    assert_close(predict(name, pipe.transformer), oracle(name, strength=0.5), plain(name))
    count = len(graphs)
    pipe.set_erasures("0", 0.0)
    assert apart(predict(name, pipe.transformer), plain(name)) < EXACT
    with pipe.erasure_strengths({"0": [1.0, 0.5]}):
        drawn = predict(name, pipe.transformer)
    assert apart(drawn[0], oracle(name)[0]) < EXACT and apart(drawn[1], oracle(name, strength=0.5)[1]) < EXACT
    assert len(graphs) == count
    torch.compiler.reset()


# ----------------------------------------------------------------------------------------------- several, and batches


def summed(*maps: tuple[Maps, float]) -> Maps:
    """Maps at their strengths as one."""
    sources = maps[0][0]
    return {
        source: (
            torch.cat([strength * each[source][0] for each, strength in maps]),
            torch.cat([each[source][1] for each, _ in maps]),
        )
        for source in sources
    }


@pytest.mark.parametrize("name", [*KINDS, Z, "Wan"])
def test_several_erasures(name: str) -> None:
    """They add from the unmapped rows, fused or not, whatever the order."""
    tiny = FAMILIES[name]
    first, second = maps_of(tiny), maps_of(tiny, 1)
    both = tiny.draw(edit(tiny, tiny.make(), summed((first, 1.0), (second, 0.5))))
    pipe = loaded(name, first, second)
    pipe.set_erasures({"0": 1.0, "1": 0.5})
    assert_close(tiny.draw(pipe), both, edited(name))
    pipe.fuse_erasures()
    assert_close(tiny.draw(pipe), both, edited(name))
    pipe.unload_erasure("1")
    assert_close(tiny.draw(pipe), edited(name), base(name))
    with pytest.raises(ErasureInputError, match="fuse"):  # beside one that is fused it would not add
        pipe.load_erasure(erasure_of(tiny, pipe, second))


@pytest.mark.parametrize("name", KINDS)
def test_strengths_by_picture(name: str) -> None:
    tiny, pipe = FAMILIES[name], loaded(name, maps_of(FAMILIES[name]), maps_of(FAMILIES[name], 1))
    strengths = {"0": [1.0, 0.0, 0.5], "1": [0.0, 0.0, 2.0]}
    with pipe.erasure_strengths(strengths):
        drawn = predict(name, pipe.transformer, 3)
    for picture in range(3):
        maps = summed(*((maps_of(tiny, number), strengths[str(number)][picture]) for number in (0, 1)))
        expected = predict(name, edit(tiny, tiny.make(), maps).transformer, 3)
        assert apart(drawn[picture], expected[picture]) < EXACT
    assert apart(drawn, plain(name, 3)) > 100 * EXACT


def z_step(pipe: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    latents = [each.reshape(4, 1, 8, 8) for each in rows(64, 9, len(prompts), 4)]
    with torch.no_grad():
        return pipe.transformer(latents, torch.full((len(prompts),), 0.5), prompts, return_dict=False)[0]


def test_z_image_has_prompts_of_all_lengths_in_one_list() -> None:
    """As they are given each picture has its strength; at the door, where they are joined, all have one or it is an error."""
    tiny = FAMILIES[Z]
    prompts = [rows(20, 11, 1, 6)[0], rows(20, 12, 1, 40)[0]]  # padded to 32 and to 64, which halves would not part
    for source in (ROWS, DOOR):
        maps = maps_of(tiny, sources=(source,))
        pipe = loaded(Z, maps)
        off, on = z_step(tiny.make(), prompts), z_step(pipe, prompts)
        if source == DOOR:
            for actual, expected in zip(on, z_step(edit(tiny, tiny.make(), maps), prompts), strict=True):
                assert_close(actual, expected, off[0] if actual is on[0] else off[1])
        with pipe.erasure_strengths({"0": [1.0, 0.0]}):
            if source == DOOR:
                with pytest.raises(ErasureInputError, match="one strength"):
                    z_step(pipe, prompts)
            else:
                drawn = z_step(pipe, prompts)
                assert torch.equal(drawn[0], on[0]) and apart(drawn[1], off[1]) < EXACT
                assert apart(off[0], on[0]) > 100 * EXACT
        with pipe.erasure_strengths({"0": [0.5, 0.5]}):
            half = z_step(pipe, prompts)
        pipe.set_erasures("0", 0.5)
        assert all(torch.equal(a, b) for a, b in zip(half, z_step(pipe, prompts), strict=True))
        pipe.unload_erasure()
        assert all(torch.equal(a, b) for a, b in zip(off, z_step(pipe, prompts), strict=True))


def test_z_image_has_loras_where_rows_are_joined() -> None:
    """On the door, whose rows are no pictures', strengths that differ are an error; in the blocks each picture has its own."""
    tiny, prompts = FAMILIES[Z], [rows(20, 11, 1, 6)[0], rows(20, 12, 1, 40)[0]]
    for site, joined in (("cap_embedder.1", True), ("layers.1.attention.to_k", False)):
        pipe = tiny.make()
        width = pipe.transformer.get_submodule(site).in_features
        factors = {f"transformer.{site}.lora_A.weight": rows(width, 1)[0, :2] / width**0.5}
        factors[f"transformer.{site}.lora_B.weight"] = rows(32, 2)[0, :2].T
        off = z_step(pipe, prompts)
        pipe.load_erasure(Erasure.from_lora(factors, base=pipe, concepts="zebra"), "0")
        on = z_step(pipe, prompts)
        with pipe.erasure_strengths({"0": [1.0, 0.0]}):
            if joined:
                with pytest.raises(ErasureInputError, match="one strength"):
                    z_step(pipe, prompts)
                continue
            drawn = z_step(pipe, prompts)
        assert apart(drawn[0], on[0]) < EXACT and apart(drawn[1], off[1]) < EXACT
        assert apart(off[0], on[0]) > 100 * EXACT


def test_z_image_by_timestep_in_a_batch() -> None:
    """All pictures of a batch have one timestep; where they have not, a door whose rows are joined is an error."""
    pipe = loaded(Z, schedule=SCHEDULE)
    latents = [each.reshape(4, 1, 8, 8) for each in rows(64, 9, 2, 4)]
    prompts = list(rows(20, 11, 2))
    with torch.no_grad():
        pipe.transformer(latents, torch.tensor([0.9, 0.9]), prompts)
        with pytest.raises(ErasureInputError, match="timestep"):
            pipe.transformer(latents, torch.tensor([0.1, 0.9]), prompts)


def test_a_timestep_for_each_token() -> None:
    """Videos from a picture give its tokens the timestep 0: the schedule goes by the others."""
    tiny = FAMILIES["LTX-Video"]
    pipe, maps = tiny.make(), maps_of(tiny)
    pipe.load_erasure(erasure_of(tiny, pipe, maps, SCHEDULE))
    shapes: dict[str, Any] = {"num_frames": 2, "height": 2, "width": 2, "return_dict": False}
    given = rows(4, 1, 1, 8), rows(20, 2)

    def step(pipe: Any, time: float) -> torch.Tensor:
        times = torch.tensor([[0.0] * 4 + [time] * 4])
        with torch.no_grad():
            return pipe.transformer(*given, times, torch.ones(1, 6), **shapes)[0]

    assert torch.equal(step(pipe, 900.0), step(tiny.make(), 900.0))
    assert_close(step(pipe, 400.0), step(edit(tiny, tiny.make(), maps), 400.0), step(tiny.make(), 400.0))


def test_sd3_without_t5() -> None:
    """From a prompt: the rows of the two CLIP encoders, and zeros in place of T5's, which a map leaves as they are."""
    tiny = dataclasses.replace(FAMILIES[SD3], config={**FAMILIES[SD3].config, "joint_attention_dim": 40})
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    sizes = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "num_hidden_layers": 2,
    }
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "num_attention_heads": 2,
    }

    def made() -> Any:
        pipe = tiny.make()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoders = [
                CLIPTextModelWithProjection(
                    CLIPTextConfig(hidden_size=width, intermediate_size=16, projection_dim=pooled, **own)
                )
                for width, pooled in ((12, 4), (16, 8))
                for own in [{**sizes, **special}]
            ]
        pipe.register_modules(
            text_encoder=encoders[0].eval(),
            text_encoder_2=encoders[1].eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
        )
        pipe.tokenizer_max_length = tokenizer.model_max_length
        return pipe

    def draw(pipe: Any) -> torch.Tensor:
        given = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False, "max_sequence_length": 5}
        with torch.no_grad():
            return pipe("a zebra", generator=torch.Generator().manual_seed(1), **given, **tiny.call)[0]

    pipe, seen = made(), list[torch.Tensor]()
    tiny = dataclasses.replace(tiny, widths={ROWS: 40, POOLED: 12})
    erasure = erasure_of(tiny, pipe, maps_of(tiny))
    assert set(erasure.config.base_model.text_components) >= {"text_encoder", "text_encoder_2"}
    pipe.load_erasure(erasure)
    pipe.transformer.context_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert_close(draw(pipe), draw(edit(tiny, made(), maps_of(tiny))), draw(made()))
    assert seen[0].shape[1] == tokenizer.model_max_length + 5 and not seen[0][:, -5:].any() and seen[0][:, :-5].any()


# ------------------------------------------------------------------------------------- LoRAs, whole models, quantised


@pytest.mark.parametrize("name", KINDS)
def test_beside_a_users_lora_on_the_door(name: str) -> None:
    """Rows that are mapped as they are given reach the LoRA too, (W + U) T; behind a norm the door alone reads them, W T + U."""
    tiny, pipe = FAMILIES[name], loaded(name)
    maps, style = maps_of(tiny), maps_of(tiny, 5)
    lora = with_stock_lora(erasure_of(tiny, tiny.make(), style), tiny.make()).lora_for_others()
    pipe.load_lora_weights(lora)
    if name == QWEN:
        expected = edit(tiny, tiny.make(), summed((maps, 1.0), (style, 1.0)))
    else:
        expected = edit(tiny, edit(tiny, tiny.make(), style), maps)
    assert_close(tiny.draw(pipe), tiny.draw(expected), edited(name))


@pytest.mark.parametrize("name", KINDS)
def test_a_sum_carries_the_sum_of_their_loras(name: str) -> None:
    tiny = FAMILIES[name]
    pipe = tiny.make()
    parts = [
        dataclasses.replace(each, config=dataclasses.replace(each.config, concepts=(Concept(concept, "horse"),)))
        for concept, seed in (("zebra", 0), ("lion", 1))
        for each in [with_stock_lora(erasure_of(tiny, pipe, maps_of(tiny, seed)), pipe)]
    ]
    whole = combine(parts, mode="sum")
    assert whole.config.stock is not None and whole.config.stock.is_exact
    pipe.load_lora_weights(whole.lora_for_others())
    maps = summed((maps_of(tiny), 1.0), (maps_of(tiny, 1), 1.0))
    assert_close(tiny.draw(pipe), tiny.draw(edit(tiny, tiny.make(), maps)), base(name))


def test_a_whole_erased_model(tmp_path: Path) -> None:
    pipe = loaded(FLUX)
    pipe.export_erased(tmp_path / "erased")
    missing = dict.fromkeys(FAMILIES[FLUX].parts)
    made = FluxPipeline.from_pretrained(tmp_path / "erased", **missing)
    made.set_progress_bar_config(disable=True)
    assert_close(FAMILIES[FLUX].draw(made), edited(FLUX), base(FLUX))


def test_a_quantised_door() -> None:
    """A map acts on it, its LoRA is computed from it, and it cannot be fused into it."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    flux = FAMILIES[FLUX]
    tiny = dataclasses.replace(flux, config={**flux.config, "joint_attention_dim": 32}, widths={ROWS: 32, POOLED: 12})

    def made(packed: bool) -> Any:
        pipe = tiny.make()
        door, kind = pipe.transformer.context_embedder, gguf.GGMLQuantizationType.Q8_0
        data = torch.from_numpy(gguf.quants.quantize(door.weight.numpy(), kind))
        weight = GGUFParameter(data, quant_type=kind)
        if packed:
            small = GGUFLinear(32, len(door.weight), bias=True, compute_dtype=torch.float32)
            small.weight, small.bias = weight, door.bias
            pipe.transformer.context_embedder = small
        else:
            door.weight.data = dequantize_gguf_tensor(weight).float()
        return pipe

    pipe, maps = made(packed=True), maps_of(tiny)
    erasure = dataclasses.replace(erasure_of(tiny, made(packed=False), maps))
    pipe.load_erasure(erasure, strict_base="ignore")
    expected = tiny.draw(edit(tiny, made(packed=False), maps))
    assert_close(tiny.draw(pipe), expected, tiny.draw(made(packed=False)))
    with pytest.raises(ErasureCompatibilityError, match="quantised"):
        pipe.fuse_erasures()
    pipe.unload_erasure()
    stock = with_stock_lora(erasure, pipe).lora_for_others()
    exact = with_stock_lora(erasure, made(packed=False)).lora_for_others()
    for site in ("context_embedder", "time_text_embed.text_embedder.linear_1"):
        products = [
            each[f"transformer.{site}.lora_B.weight"] @ each[f"transformer.{site}.lora_A.weight"]
            for each in (stock, exact)
        ]
        assert apart(*products) < EXACT


def test_by_function_on_something_with_no_more_than_a_transformer() -> None:
    """As benchmarks have it: no pipeline, no encoders."""

    class Only:
        transformer = FAMILIES[FLUX].make().transformer

    load_erasure(Only, alone(ROWS, 20), "one")
    tensors = {"A": rows(20, 1)[0, :2], "D": rows(20, 2)[0, :2]}
    expected = FAMILIES[FLUX].make()
    for linear in linears(FAMILIES[FLUX], expected, ROWS).values():
        linear.weight.data += linear.weight @ tensors["D"].T @ tensors["A"]
    assert_close(predict(FLUX, Only.transformer), predict(FLUX, expected.transformer), plain(FLUX))
