"""Maps at the doors of transformers beside offload, graphs and copies; several at once, and batches."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_erasure import (
    Erasure,
    ErasureInputError,
)
from tests.helpers import TOKENIZER
from tests.tiny_families import (
    DOOR,
    EXACT,
    FAMILIES,
    FLUX,
    KINDS,
    POOLED,
    QWEN,
    ROWS,
    SCHEDULE,
    SD3,
    Z,
    apart,
    assert_close,
    base,
    edit,
    edited,
    erasure_of,
    loaded,
    maps_of,
    oracle,
    plain,
    predict,
    rows,
    summed,
)


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
