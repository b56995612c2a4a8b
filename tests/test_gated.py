"""The gated text edit: prompts that no probe sees stay as they were, those that name the concept go to their anchor's."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureError,
    ErasureFileError,
    ErasureInactiveError,
    ErasureInputError,
    cache,
    combine,
    demo,
    erase,
)
from diffusers_erasure.encoding import row_sources
from diffusers_erasure.encoding.contexts import read
from diffusers_erasure.layers.gated_map import COUNTED, in_two
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.live.second_prompt import maps_together
from diffusers_erasure.methods.gated import Config, Settings, fit_map
from diffusers_erasure.methods.gated_probes import Kept, Sums, directions, thresholds
from diffusers_erasure.methods.gated_reading import Reading, Split, kept_prompts, long_prompts
from diffusers_erasure.schema import LORA_FILE, TENSOR_FILE
from diffusers_erasure.settings import USUAL, resolve
from tests.commands import invoke
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import equal, far, normal, tiny_sdxl_pipe
from tests.tiny_families import FAMILIES, FLUX, QWEN, SD3, Z, arguments, predict, rows


KEPT = ["dog", "whale", "bird", "horse", "car", "tree", "house", "rose"]
COMMON: dict[str, Any] = {
    **{"anchors": "animal", "retain": KEPT, "retain_default": "none", "method": "gated", "stock": "none"},
    **{"contexts": 12, "kept_contexts": 4, "push": 0.0, "compare": False},
}
BARE: dict[str, Any] = {**COMMON, "templates": "none", "max_sequence_length": 12, "strict": True}
CAT, DOG = "a cat on a table", "a dog on a table"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


@pytest.fixture(scope="module")
def erasure(pipe: Any) -> Erasure:
    return erase(pipe, "cat", **COMMON)


@pytest.fixture(autouse=True)
def nothing_stays_loaded(pipe: Any) -> Iterator[None]:
    yield
    pipe.unload_erasure()


def drawn(pipe: Any, prompt: Any, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call = {**demo.call_arguments("sd1"), "num_inference_steps": 2, "output_type": "np", **more}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images


def encoded(pipe: Any, *prompts: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]


def mapped(pipe: Any, text: torch.Tensor) -> torch.Tensor:
    """What the first cross-attention reads where the UNet is given these rows."""
    seen: list[torch.Tensor] = []
    reader = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2.to_k"))
    handle = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    config = pipe.unet.config
    latents = torch.zeros(len(text), config.in_channels, config.sample_size, config.sample_size, dtype=text.dtype)
    with torch.no_grad():
        pipe.unet(latents, torch.tensor(500), text)
    handle.remove()
    return seen[0]


def tensors_of(erasure: Erasure) -> dict[str, torch.Tensor]:
    return dict(erasure.layer_tensors(erasure.config.layers[0]))


def opens(text: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of rows [B, L, C] which gate is open [B, concepts], as the format says it."""
    values = (text.float() @ tensors["probes"].float().T).amax(1).double()
    hit = values > tensors["thresholds"].double().sum(1)
    counts = tensors["probe_counts"].int().tolist()
    return torch.stack([part.any(1) for part in hit.split(counts, 1)], 1)


def oracle(text: torch.Tensor, tensors: Mapping[str, torch.Tensor], strength: float = 1.0) -> torch.Tensor:
    """The mapped rows, in float64."""
    gates, x = opens(text, tensors), text.double()
    change = torch.zeros_like(x)
    counts = tensors["counts"].int().tolist()
    for i, (a, d) in enumerate(
        zip(tensors["A"].double().split(counts), tensors["D"].double().split(counts), strict=True)
    ):
        change += gates[:, i, None, None] * ((x @ a.T) @ d)
    return x + strength * change


def close(found: torch.Tensor, expected: torch.Tensor, most: float = 1e-5) -> bool:
    return float((found.double() - expected).abs().max()) <= most * float(expected.abs().max())


def by_hand(pipe: Any, tensors: Mapping[str, torch.Tensor], concepts: Sequence[str] = ("zebra",)) -> Erasure:
    """An erasure of given tensors."""
    component = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    layer = Layer("gated_map", ("encoder_hidden_states",), dict(tensors), component)
    return Erasure.from_layers([layer], base=pipe, concepts=list(concepts), method="random")


def random_gate(
    width: int, example: torch.Tensor, pooled: int = 0, seed: int = 0, probe: int = 0
) -> dict[str, torch.Tensor]:
    """A gate that opens for rows as far along one of their columns as an example's [C]."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.nn.functional.normalize(example.float(), dim=0)
    tensors = {
        "probes": row[None].clone(),
        "thresholds": in_two((0.98 * row @ example.float())[None]),
        "probe_counts": torch.tensor([1.0]),
        "A": torch.randn(2, width, generator=generator) / width**0.5,
        "D": torch.randn(2, width, generator=generator),
        "counts": torch.tensor([2.0]),
    }
    if pooled:
        tensors |= {"pooled_A": torch.randn(2, pooled, generator=generator) / pooled**0.5}
        tensors |= {"pooled_D": torch.randn(2, pooled, generator=generator), "pooled_counts": torch.tensor([2.0])}
    return tensors


# ---------------------------------------------------------------------------------------------------- what it does


def test_prompts_that_no_probe_sees_stay_bit_for_bit(pipe: Any, erasure: Erasure) -> None:
    """Alone, and beside one that opens the gate."""
    alone, both = drawn(pipe, DOG), drawn(pipe, [DOG, CAT, "a car"])
    cat = drawn(pipe, CAT)
    pipe.load_erasure(erasure, "no-cat")
    assert equal(drawn(pipe, DOG), alone)
    mixed = drawn(pipe, [DOG, CAT, "a car"])
    assert equal(mixed[0], both[0]) and equal(mixed[2], both[2]) and far(mixed[1], both[1]) > 0.05
    assert far(drawn(pipe, CAT), cat) > 0.05
    pipe.set_erasures("no-cat", 0.0)
    assert equal(drawn(pipe, CAT), cat)
    pipe.unload_erasure()
    assert equal(drawn(pipe, CAT), cat)


def test_rows_go_to_the_anchors(pipe: Any, erasure: Erasure) -> None:
    """By the formula, in contexts that were not fitted, and half of the way at half the strength."""
    text, tensors = encoded(pipe, CAT, DOG, "my cat at home"), tensors_of(erasure)
    assert opens(text, tensors).tolist() == [[True], [False], [True]]
    pipe.load_erasure(erasure, "no-cat")
    found = mapped(pipe, text)
    assert torch.equal(found[1], text[1]) and close(found, oracle(text, tensors))
    place = len(pipe.tokenizer("a cat").input_ids) - 2
    goal = encoded(pipe, "a animal on a table")
    before, after = ((each[0, place] - goal[0, place]).norm() for each in (text, found))
    assert after < 0.2 * before
    assert erasure.config.diagnostics["completeness"]["cat"] > 0.8
    pipe.set_erasures("no-cat", 0.5)
    assert close(mapped(pipe, text), oracle(text, tensors, 0.5))
    with pipe.erasure_strengths({"no-cat": [0.0, 1.0, 0.5]}):
        found = mapped(pipe, text)
    assert torch.equal(found[:2], text[:2]) and close(found[2:], oracle(text, tensors, 0.5)[2:])


def test_presets_go_beyond_the_anchor(pipe: Any) -> None:
    """A ridge leaves a map short of it, and the anchor's own pictures show the target at times."""
    presets = {"object": (1e-4, 0.4), "style": (0.3, 1.0), "person": (1e-4, 0.0)}
    for preset, expected in presets.items():
        settings = resolve(Config(preset=preset), Settings, USUAL)
        assert (settings.ridge, settings.push) == expected
    made = erase(pipe, "cat", **{key: value for key, value in COMMON.items() if key != "push"})
    text = encoded(pipe, "my cat at home")
    place = len(pipe.tokenizer("my cat").input_ids) - 2
    way = encoded(pipe, "my animal at home")[0, place] - text[0, place]
    pipe.load_erasure(made, "no-cat")
    went = ((mapped(pipe, text) - text)[0, place] @ way) / way.square().sum()
    assert made.config.method.settings["push"] == 0.4 and 1.2 < went < 1.6


def test_negative_prompts_are_mapped_too(pipe: Any, erasure: Erasure) -> None:
    """As swapping the prompts would undo it otherwise; guided in one pass or in two."""
    text = encoded(pipe, CAT, DOG)
    before = drawn(pipe, DOG, negative_prompt=CAT)
    pipe.load_erasure(erasure, "no-cat")
    assert far(drawn(pipe, DOG, negative_prompt=CAT), before) > 0.01
    together = mapped(pipe, text)
    for i in range(2):
        assert close(mapped(pipe, text[i : i + 1]), together[i : i + 1].double())
    assert not torch.equal(together[0], text[0]) and torch.equal(together[1], text[1])


def test_long_prompts_in_chunks(pipe: Any, erasure: Erasure) -> None:
    """The name may stand in any chunk of `prompt_embeds`."""
    dog, cat = encoded(pipe, DOG), encoded(pipe, CAT)
    call = {"prompt_embeds": torch.cat([dog, cat], 1), "negative_prompt_embeds": torch.cat([dog, dog], 1)}
    plain = {"prompt_embeds": torch.cat([dog, dog], 1), "negative_prompt_embeds": torch.cat([dog, dog], 1)}
    before, kept = drawn(pipe, None, **call), drawn(pipe, None, **plain)
    pipe.load_erasure(erasure, "no-cat")
    assert far(drawn(pipe, None, **call), before) > 0.01 and equal(drawn(pipe, None, **plain), kept)


def test_files_keep_it(pipe: Any, erasure: Erasure, tmp_path: Path) -> None:
    text = encoded(pipe, CAT, DOG)
    for dtype in (None, "float16"):
        made = erasure if dtype is None else erasure.cast(dtype)
        made.save_pretrained(tmp_path / str(dtype))
        read_again = Erasure.from_pretrained(tmp_path / str(dtype))
        assert read_again.content_hash == made.content_hash
        pipe.load_erasure(tmp_path / str(dtype), "no-cat")
        found = mapped(pipe, text)
        assert torch.equal(found[1], text[1]) and close(
            found, oracle(text, tensors_of(erasure)), 1e-5 if dtype is None else 1e-2
        )
        pipe.unload_erasure()
    # What is saved in half precision opens for the very same values.
    assert torch.equal(tensors_of(erasure)["probes"], tensors_of(erasure.cast("float16"))["probes"].float())
    half = tensors_of(erasure.cast("float16"))["thresholds"].double().sum(1)
    assert close(half, tensors_of(erasure)["thresholds"].double().sum(1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("after", [False, True])
def test_probes_are_exact_in_any_dtype(dtype: torch.dtype, after: bool) -> None:
    """They are compared in float32, also where the model is cast when the erasure is on."""
    tiny = FAMILIES["SD 2"]
    pipe, text = tiny.make(), rows(20, 7, 512).to(dtype)
    tensors = random_gate(20, rows(20, 8)[0, 0])
    values = (text.float() @ tensors["probes"].T).amax(1)[:, 0]
    rounded = (text @ tensors["probes"].to(dtype).T).amax(1)[:, 0].float()
    worst = int((values - rounded).abs().argmax())
    middle = float(values[worst] + rounded[worst]) / 2  # where rounding decides otherwise
    tensors["thresholds"] = in_two(torch.tensor([middle]))
    expected = opens(text, tensors)[:, 0]
    assert not torch.equal(rounded > middle, expected)
    made = by_hand(pipe, tensors)
    pipe = pipe if after else pipe.to(dtype)
    pipe.load_erasure(made, "one")
    pipe.to(dtype)
    found = mapped(pipe, text)
    assert torch.equal((found != text).flatten(1).any(1), expected) and expected.any() and not expected.all()


def test_lists_of_rows() -> None:
    """Z-Image takes a list with the rows of each picture, which may be of any length."""
    tiny, (one, other) = FAMILIES[Z], (rows(20, 11, 1, 6)[0], rows(20, 12, 1, 40)[0])
    pipe = tiny.make()
    tensors = random_gate(20, one[2])
    assert opens(one[None], tensors).item() and not opens(other[None], tensors).item()

    def step(prompts: list[torch.Tensor]) -> list[torch.Tensor]:
        latents = [each.reshape(4, 1, 8, 8) for each in rows(64, 9, len(prompts), 4)]
        with torch.no_grad():
            return pipe.transformer(latents, torch.full((len(prompts),), 0.5), prompts, return_dict=False)[0]

    off = step([one, other])
    wanted = step([oracle(one[None], tensors)[0].float(), other])
    half = step([oracle(one[None], tensors, 0.5)[0].float(), other])
    pipe.load_erasure(by_hand(pipe, tensors), "one")
    on = step([one, other])
    assert torch.equal(on[1], off[1]) and close(on[0], wanted[0].double()) and not close(on[0], off[0].double(), 1e-3)
    with pipe.erasure_strengths({"one": [0.5, 1.0]}):
        assert close(step([one, other])[0], half[0].double())
    with pipe.erasure_strengths({"one": [0.0, 1.0]}):
        assert torch.equal(step([one, other])[0], off[0])
    pipe.unload_erasure()
    assert torch.equal(step([one, other])[0], off[0])


def test_several_at_once_and_summed(pipe: Any, erasure: Erasure) -> None:
    """Open gates add; `combine` puts them into one file."""
    other = erase(
        pipe, ["horse", "car"], **{**COMMON, "retain": [*KEPT[:3], "cat", "tree"], "anchors": ["animal", "thing"]}
    )
    text = encoded(pipe, CAT, DOG, "a horse", "a cat and a horse")
    one, two = tensors_of(erasure), tensors_of(other)
    changes = oracle(text, one) + oracle(text, two) - text.double()
    assert opens(text, two).tolist() == [[False, False], [False, False], [True, False], [True, False]]
    pipe.load_erasure(erasure, "no-cat")
    pipe.load_erasure(other, "others")
    found = mapped(pipe, text)
    assert torch.equal(found[1], text[1]) and close(found, changes)
    pipe.set_erasures({"no-cat": 1.0, "others": 0.5})
    assert close(mapped(pipe, text), oracle(text, one) + oracle(text, two, 0.5) - text.double())
    pipe.unload_erasure("no-cat")
    pipe.unload_erasure()
    summed = combine([erasure, other], mode="sum")
    assert [concept.target for concept in summed.concepts] == ["cat", "horse", "car"]
    pipe.load_erasure(summed, "all")
    assert close(mapped(pipe, text), changes)
    with pytest.raises(ErasureInputError, match="rank"):
        combine([erasure, other], mode="sum", rank=2)
    with pytest.raises(ErasureInputError, match="mode='sum'"):
        combine([erasure, other], pipe=pipe)


def test_gates_see_what_was_loaded_before_left_of_the_rows() -> None:
    pipe, text = FAMILIES["SD 2"].make(), rows(20, 7, 1)
    tensors = random_gate(20, text[0, 2])
    row = tensors["probes"]
    away = Erasure.from_layers(
        [Layer("text_map", ("encoder_hidden_states",), {"A": row, "D": -row}, "unet")],
        **{"base": pipe, "concepts": "gnu", "method": "random"},
    )
    gated, without = by_hand(pipe, tensors), text - (text @ row.T) @ row
    assert opens(text, tensors).item() and not opens(without, tensors).item()
    pipe.load_erasure(away, "away")
    pipe.load_erasure(gated, "gated")
    assert close(mapped(pipe, text), without.double())
    pipe.unload_erasure()
    pipe.load_erasure(gated, "gated")
    pipe.load_erasure(away, "away")
    moved = oracle(text, tensors)
    assert close(mapped(pipe, text), moved - (moved @ row.double().T) @ row.double())


def test_it_is_no_change_of_weights(pipe: Any, erasure: Erasure) -> None:
    pipe.load_erasure(erasure, "no-cat")
    with pytest.raises(ErasureError, match="cannot be fused"):
        pipe.fuse_erasures()
    pipe.unload_erasure()
    for backend in ("merge", "peft"):
        with pytest.raises(ErasureError):
            pipe.load_erasure(erasure, "no-cat", backend=backend)
    assert not pipe.list_erasures()


@pytest.mark.parametrize("name", [FLUX, SD3, QWEN])
def test_in_one_graph(name: str) -> None:
    """One graph for all strengths, by picture too, and for open and shut gates."""
    torch.compiler.reset()
    tiny, graphs = FAMILIES[name], []
    pipe = tiny.make()
    plain = predict(name, pipe.transformer, 2)
    first = arguments(name)["encoder_hidden_states"][0, 0]
    made = by_hand(pipe, random_gate(len(first), first, 12 if "pooled_projections" in tiny.widths else 0))
    pipe.load_erasure(made, "0")
    eager = predict(name, pipe.transformer, 2)
    assert torch.equal(eager[1], plain[1]) and not close(eager[0], plain[0].double(), 1e-3)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    pipe.transformer.compile(backend=backend, fullgraph=True)
    assert close(predict(name, pipe.transformer, 2), eager.double())
    pipe.set_erasures("0", 0.5)
    predict(name, pipe.transformer, 2)
    count = len(graphs)
    pipe.set_erasures("0", 0.0)
    assert close(predict(name, pipe.transformer, 2), plain.double())
    with pipe.erasure_strengths({"0": [1.0, 0.5]}):
        assert close(predict(name, pipe.transformer, 2)[0], eager[0].double())
    assert len(graphs) == count
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------ what is refused


def damaged(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    good = dict(tensors)
    return {
        "a tensor is missing": {name: value for name, value in good.items() if name != "thresholds"},
        "one too many": {**good, "B": good["A"]},
        "part of the pooled maps": {**good, "pooled_A": good["A"]},
        "part of the pooled probes": {**good, "pooled_probes": good["probes"]},
        "thresholds of another number": {**good, "thresholds": good["thresholds"].repeat(2, 1)},
        "thresholds as they are": {**good, "thresholds": good["thresholds"].sum(1)},
        "probes of another width": {**good, "probes": good["probes"][:, :-1]},
        "D of another rank": {**good, "D": good["D"][:1]},
        "counts that do not add up": {**good, "counts": torch.tensor([1.0])},
        "counts that are no numbers of things": {**good, "counts": torch.tensor([1.5])},
        "counts below zero": {**good, "counts": torch.tensor([3.0, -1.0]), "probe_counts": torch.tensor([1.0, 0.0])},
        "a concept without a probe": {
            **good,
            "counts": torch.tensor([1.0, 1.0]),
            "probe_counts": torch.tensor([1.0, 0.0]),
        },
        "counts of other concepts": {**good, "counts": torch.tensor([1.0, 1.0])},
        "no concepts": {name: value[:0] for name, value in good.items()},
    }


@pytest.mark.parametrize("damage", damaged(random_gate(20, torch.ones(20))))
def test_damaged_tensors_are_refused(damage: str) -> None:
    pipe = FAMILIES["SD 2"].make()
    by_hand(pipe, random_gate(20, torch.ones(20)))
    with pytest.raises(ErasureFileError, match="gated_map"):
        by_hand(pipe, damaged(random_gate(20, torch.ones(20)))[damage])


def test_other_architectures_are_refused() -> None:
    flux, sd = FAMILIES[FLUX].make(), FAMILIES["SD 2"].make()
    with_pooled = by_hand(flux, random_gate(20, torch.ones(20), 12))
    as_unet = Layer("gated_map", ("encoder_hidden_states",), tensors_of(with_pooled), "unet")
    with pytest.raises(ErasureCompatibilityError, match="reads none"):
        sd.load_erasure(Erasure.from_layers([as_unet], base=sd, concepts="zebra", method="random"))
    with pytest.raises(ErasureCompatibilityError, match="width"):
        flux.load_erasure(by_hand(flux, random_gate(24, torch.ones(24))))
    with pytest.raises(ErasureCompatibilityError, match="width"):
        flux.load_erasure(by_hand(flux, random_gate(20, torch.ones(20), 16)))
    with pytest.raises(ErasureFileError, match="acts on"):
        Erasure.from_layers(
            [Layer("gated_map", ("door_input",), random_gate(20, torch.ones(20)), "transformer")],
            **{"base": flux, "concepts": "zebra", "method": "random"},
        )
    with pytest.raises(ErasureInputError, match="side by side"):
        combine([with_pooled, by_hand(flux, random_gate(20, torch.ones(20)), ["gnu"])], mode="sum")


# ---------------------------------------------------------------------------------------------------------- fits


def test_a_map_is_ridge_regression() -> None:
    e, g, ridge = normal(7, 24, seed=1), normal(7, 24, seed=2), 0.3
    lamb = ridge * float(e.square().sum()) / 24
    dense = torch.linalg.solve(e.T @ e + lamb * torch.eye(24).double(), e.T @ (g - e))
    a, d = fit_map(e, g, ridge, 7)
    assert (a.T @ d - dense).norm() <= 1e-10 * dense.norm()
    a, d = fit_map(e, g, ridge, 3)
    assert a.shape == d.shape == (3, 24)
    u, s, vh = torch.linalg.svd(e @ dense, full_matrices=False)
    assert (e @ a.T @ d - (u[:, :3] * s[:3]) @ vh[:3]).norm() <= 1e-10 * dense.norm()


def test_probes_are_fishers_discriminant() -> None:
    kept, named = normal(50, 12, seed=3), [normal(4, 12, seed=4) + 2, normal(3, 12, seed=5) - 1]
    sums = Sums.empty(12)
    sums.add(kept[:20])
    sums.add(kept[20:])
    every = torch.cat([kept, *named])
    covariance = torch.cov(every.T, correction=0)
    covariance += 0.1 * covariance.trace() / 12 * torch.eye(12).double()
    found = directions(sums, named, 0.1)
    for row, own in zip(found.double(), named, strict=True):
        expected = torch.linalg.solve(covariance, own.mean(0) - kept.mean(0))
        expected = expected / expected.abs().max()
        assert torch.equal(row, expected.half().double()) and row.abs().max() == 1


def test_where_thresholds_stand() -> None:
    kept = torch.tensor([[1.0, 6.0], [2.0, -torch.inf], [0.0, 9.0]])
    named = [torch.tensor([5.0, 4.0]), torch.tensor([7.0, 8.0])]
    # Apart: half the way. Overlapping: where least is lost, which is above the kept prompt between the two.
    assert thresholds(named, kept, 0.5).tolist() == pytest.approx([3.0, 6.5], abs=1e-3)
    # With 0 the lower end of what overlaps is that of the name, and all of it opens.
    apart, overlapping = thresholds(named, kept, 0.0).tolist()
    assert apart == 2.0 and 6.999 < overlapping < 7.0
    assert thresholds(named, kept[:0], 0.0).tolist() == [0.0, 0.0]


def test_contexts_that_hardly_name_it_do_not_lower_the_threshold() -> None:
    """A quarter of them may be left out; and a false alarm counts five times a miss."""
    kept = torch.linspace(0, 1, 50)[:, None]
    own = torch.tensor([0.9, 9.0, 8.0, 9.5, 9.1, 8.5, 9.9, 9.3])
    assert 1 < thresholds([own], kept, 0.5).item() == pytest.approx(1 + 0.5 * (8.0 - 1.0))
    assert thresholds([own], kept, 0.0).item() < 0.9  # every prompt that may name it
    # Half of them low: above what is kept, where five of ten are missed, is worse than among it.
    low = torch.tensor([0.95] * 5 + [9.0] * 5)
    assert 0.95 > thresholds([low], kept, 0.5).item() > 0.9
    lower = torch.tensor([0.5] * 5 + [9.0] * 5)
    assert thresholds([lower], kept, 0.5).item() > 1


def test_contexts_take_turns() -> None:
    contexts = [f"{i} {{}}" for i in range(8)]
    split = Split.of(contexts)
    assert (split.setting, split.testing) == (("2 {}", "6 {}"), ("3 {}", "7 {}")) and len(split.fitting) == 4
    assert Split.of(contexts[:3]).testing == tuple(contexts[:3])
    assert split.without({"2 {}", "0 {}"}).setting == ("6 {}",)
    assert split.without(split.testing).testing == (*split.fitting, *split.setting)
    assert split.without(contexts) == split


def test_names_have_probes_of_their_own(pipe: Any) -> None:
    """Synonyms, and plurals and other letters where tokens differ."""
    made = erase(pipe, ["cat", "dog"], **{**COMMON, "retain": KEPT[1:], "synonyms": {"cat": ["kitten", "Cat"]}})
    counts = tensors_of(made)["probe_counts"].tolist()
    text = encoded(pipe, "a kitten", "two kittens here", "a dog", "a car")
    assert counts[0] >= 2 and counts[1] >= 1 and made.config.diagnostics["gates"]["names"] == sum(counts)
    gates = opens(text, tensors_of(made))
    assert gates[0].tolist() == [True, False] and gates[2].tolist() == [False, True] and not gates[3].any()
    assert made.config.method.settings["synonyms"] == {"cat": ["kitten", "Cat"]}
    assert "synonyms" not in made.redacted().config.method.settings
    one = erase(pipe, ["cat"], **{**COMMON, "synonyms": {"cat": "kitten"}})
    assert one.config.method.settings["synonyms"] == {"cat": ["kitten"]}
    with pytest.raises(ErasureInputError, match="'lynx', which is no target"):
        erase(pipe, "cat", **{**COMMON, "synonyms": {"lynx": ["cat"]}})
    with pytest.raises(ErasureInputError, match="synonyms"):
        erase(pipe, "cat", **{**COMMON, "synonyms": {"cat": [" "]}})


def test_strict_and_nothing_retained(pipe: Any, erasure: Erasure) -> None:
    strict = erase(pipe, "cat", **{**COMMON, "strict": True})
    sums = [tensors_of(each)["thresholds"].double().sum(1)[0] for each in (strict, erasure)]
    assert torch.equal(tensors_of(strict)["probes"][0], tensors_of(erasure)["probes"][0]) and sums[0] < sums[1]
    alone = erase(pipe, "cat", **{**COMMON, "retain": ()})
    text = encoded(pipe, "", CAT)
    assert opens(text, tensors_of(alone))[:, 0].tolist() == [False, True]
    assert alone.config.diagnostics["gates"]["kept_tested"] == 0
    # The model's encoder takes 24 tokens, and some contexts of many words have more.
    kept = [*KEPT, "horse with a tree and a house and a rose"]
    long = erase(pipe, "cat with a dog and a horse and a bird", **{**COMMON, "contexts": 40, "retain": kept})
    assert opens(encoded(pipe, "a cat with a dog and a horse and a bird"), tensors_of(long)).all()
    with pytest.raises(ErasureInputError, match="tokens"):
        erase(pipe, "cat", **{**COMMON, "retain": ["dog " * 40]})


def test_a_style_is_taken_out_of_its_context(pipe: Any) -> None:
    """With an empty anchor what is left of "a house in {} style" is "a house"."""
    made = erase(
        pipe,
        "noto",
        **{**COMMON, "anchors": "", "preset": "style", "retain": ["openmoji", "pixel art"], "contexts": 16},
    )
    text, goal = encoded(pipe, "a picture of a chair in noto style"), encoded(pipe, "a picture of a chair")
    pipe.load_erasure(made, "no-noto")
    found = mapped(pipe, text)
    place = len(pipe.tokenizer("a picture of a chair").input_ids) - 2
    behind = slice(len(pipe.tokenizer("a picture of a chair in noto style").input_ids), None)
    assert opens(text, tensors_of(made)).all() and close(found, oracle(text, tensors_of(made)))
    for where in (place, behind):
        before, after = ((each[0, where] - goal[0, where]).norm() for each in (text, found))
        assert after <= 0.5 * before + 0.1 * goal[0, where].norm()


def test_maps_know_all_places(pipe: Any) -> None:
    """What is read of a prompt: its words and what is behind them, once each."""
    (source,) = row_sources(pipe)
    text = read(source, [CAT])[CAT]
    assert text.last == len(pipe.tokenizer(CAT).input_ids) - 2 and text.places[: len(text.ids)] == tuple(
        range(len(text.ids))
    )
    assert torch.equal(text.word, text.at(text.last))
    assert close(text.rows, encoded(pipe, CAT)[0, list(text.places)].double())
    assert len(read(source, [CAT], behind=2)[CAT].rows) == len(text.ids) + 2


# -------------------------------------------------------------------------------------------------- pooled vectors


def of_prompt(pipe: Any, prompt: str, second: str | None = None) -> dict[str, torch.Tensor]:
    """Rows and pooled vectors as a pipeline makes them."""
    more = {"prompt_3": None} if hasattr(pipe, "text_encoder_3") else {}
    given: dict[str, Any] = {"device": "cpu", "max_sequence_length": 12, **more}
    with torch.no_grad():
        if more:
            found = pipe.encode_prompt(prompt, second, do_classifier_free_guidance=False, **given)
            return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}
        found = pipe.encode_prompt(prompt, second, **given)
        return {"encoder_hidden_states": found[0], "pooled_projections": found[1]}


def at_the_doors(pipe: Any, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a transformer's two doors are given."""
    seen: dict[str, torch.Tensor] = {}
    model = pipe.transformer
    doors = {
        "encoder_hidden_states": model.context_embedder,
        "pooled_projections": model.time_text_embed.text_embedder,
    }
    handles = [
        door.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].clone()}))
        for name, door in doors.items()
    ]
    flux = type(model).__name__.startswith("Flux")
    count, rows_of = len(given["encoder_hidden_states"]), given["encoder_hidden_states"].shape[1]
    more = {"txt_ids": torch.zeros(rows_of, 3), "img_ids": torch.zeros(16, 3)} if flux else {}
    latents = torch.zeros(count, 16, 16) if flux else torch.zeros(count, 4, 8, 8)
    with torch.no_grad():
        model(hidden_states=latents, timestep=torch.full((count,), 0.5), **given, **more)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("make", [tiny_flux_pipe, tiny_sd3_pipe])
def test_pooled_vectors_are_mapped_behind_the_gate(make: Any) -> None:
    pipe = make()
    made = erase(pipe, "cat", **BARE)
    tensors = tensors_of(made)
    assert tensors["pooled_A"].shape == tensors["pooled_D"].shape
    assert "pooled_A" not in tensors_of(erase(pipe, "cat", **BARE, pooled=False))
    cat, dog = of_prompt(pipe, "cat"), of_prompt(pipe, "tree")
    given = {name: torch.cat([cat[name], dog[name]]) for name in cat}
    assert opens(given["encoder_hidden_states"], tensors)[:, 0].tolist() == [True, False]
    pipe.load_erasure(made, "no-cat")
    found = at_the_doors(pipe, given)
    vectors = given["pooled_projections"].double()
    expected = vectors + torch.tensor([[1.0], [0.0]]).double() * (
        (vectors @ tensors["pooled_A"].double().T) @ tensors["pooled_D"].double()
    )
    assert close(found["encoder_hidden_states"], oracle(given["encoder_hidden_states"], tensors))
    assert close(found["pooled_projections"], expected) and not close(vectors, expected, 1e-3)
    assert torch.equal(found["pooled_projections"][1], given["pooled_projections"][1])
    assert all(torch.equal(found[name][1], given[name][1]) for name in given)


def test_a_pooled_vector_alone_opens_the_gate() -> None:
    """FLUX.1 makes it of `prompt`, and the rows of `prompt_2`."""
    pipe = tiny_flux_pipe()
    made = erase(pipe, "cat", **BARE)
    tensors = tensors_of(made)
    assert tensors["pooled_probe_counts"].tolist() == [1.0] and len(tensors["pooled_probes"]) == 1
    prompts = [("cat", "tree"), ("tree", "cat"), ("tree", "tree"), ("rose", "dog")]
    parts = [of_prompt(pipe, *each) for each in prompts]
    given = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert opens(given["encoder_hidden_states"], tensors)[:, 0].tolist() == [False, True, False, False]
    values = given["pooled_projections"].float() @ tensors["pooled_probes"].T
    assert (values[:, 0] > tensors["pooled_thresholds"].sum(1)).tolist() == [True, False, False, False]
    for together in (False, True):  # alone, and beside one that has no such probes
        pipe.load_erasure(made, "no-cat")
        if together:
            pipe.load_erasure(erase(pipe, "boat", **BARE, pooled=False), "no-boat")
        found = at_the_doors(pipe, given)
        for name in given:
            changed = (found[name] != given[name]).flatten(1).any(1).tolist()
            assert changed == [True, True, False, False], name
        pipe.unload_erasure()
    assert "pooled_probes" not in tensors_of(erase(pipe, "cat", **{**BARE, "retain": ()}))
    # Of so small an encoder they do not tell a name from all that is kept where it stands among words.
    unsure = {**BARE, "templates": ("{}", "a {}", "the {}", "a red {}"), "strict": False}
    assert "pooled_probes" not in tensors_of(erase(pipe, "cat", **unsure))
    sd3 = tiny_sd3_pipe()
    assert "pooled_probes" not in tensors_of(erase(sd3, "cat", **BARE))


def test_the_same_rows_with_other_pooled_vectors() -> None:
    """Guidance in two passes, of which one vector alone names the concept."""
    pipe, seen = tiny_flux_pipe(), list[bool]()
    pipe.load_erasure(erase(pipe, "cat", **BARE), "no-cat")
    text = of_prompt(pipe, "tree")["encoder_hidden_states"]
    cat, tree = (of_prompt(pipe, each)["pooled_projections"] for each in ("cat", "tree"))
    pipe.transformer.context_embedder.register_forward_pre_hook(
        lambda module, args: seen.append(not torch.equal(args[0], text))
    )
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "true_cfg_scale": 2.0}
    call |= {"prompt_embeds": text, "negative_prompt_embeds": text, "height": 16, "width": 16}
    pipe(pooled_prompt_embeds=cat, negative_pooled_prompt_embeds=tree, **call)
    assert seen == [True, False, True, False]


def test_sums_of_pooled_probes() -> None:
    """Where only some concepts have them."""
    pipe = FAMILIES[FLUX].make()
    bare = random_gate(20, torch.ones(20), 12)
    more = {
        "pooled_probes": rows(12, 3)[0, :2],
        "pooled_thresholds": in_two(torch.tensor([1.0, 2.0])),
        "pooled_probe_counts": torch.tensor([2.0]),
    }
    summed = combine([by_hand(pipe, bare), by_hand(pipe, {**bare, **more}, ["gnu"])], mode="sum")
    tensors = tensors_of(summed)
    assert tensors["pooled_probe_counts"].tolist() == [0.0, 2.0] and set(COUNTED) <= set(tensors)
    with pytest.raises(ErasureFileError, match="gated_map"):
        by_hand(pipe, {**bare, **more, "pooled_probe_counts": torch.tensor([1.0])})
    with pytest.raises(ErasureFileError, match="gated_map"):
        by_hand(pipe, {**bare, **more, "pooled_probes": more["pooled_probes"][:, 1:]})


@pytest.mark.parametrize("make", [tiny_sdxl_pipe, tiny_sd3_pipe])
def test_rows_of_two_prompts_are_refused(make: Any) -> None:
    """Probes see what two encoders make of a token, side by side."""
    pipe = make()
    made = erase(pipe, "cat", **{**BARE, "max_sequence_length": 0 if hasattr(pipe, "unet") else 12})
    assert maps_together(pipe, made) and maps_together(pipe, made.cast("bfloat16"))
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent"}
    pipe.load_erasure(made, "no-cat")
    pipe("cat", prompt_2="cat", **call)
    with pytest.raises(ErasureInactiveError, match="prompt_2"):
        pipe("cat", prompt_2="dog", **call)
    flux = tiny_flux_pipe()
    assert not maps_together(flux, erase(flux, "cat", **BARE))


# ------------------------------------------------------------------------------------------------ stock diffusers


@pytest.mark.parametrize("method", ["dp", "uce"])
def test_stock_diffusers_gets_a_linear_edit(pipe: Any, erasure: Erasure, method: str) -> None:
    made = erase(pipe, "cat", **{**COMMON, "stock": method})
    stock = made.config.stock
    assert stock is not None and stock.form == "approximate" and not stock.is_exact
    share = stock.results[method]["completeness"]["cat"]
    assert stock.error == pytest.approx(abs(1 - share), abs=1e-3)
    alone = erase(pipe, "cat", anchors="animal", retain=KEPT, retain_default="none", method=method)
    for name, value in alone.tensors[LORA_FILE].items():
        assert torch.allclose(made.tensors[LORA_FILE][name], value, atol=1e-4), name  # rows of another batch
    assert alone.config.method.settings["push"] > 0
    assert erasure.config.stock is None and set(erasure.tensors) == {TENSOR_FILE}
    assert all(torch.equal(value, tensors_of(erasure)[name]) for name, value in tensors_of(made).items())
    text = encoded(pipe, CAT, DOG)
    pipe.load_erasure(made, "no-cat")
    assert close(mapped(pipe, text), oracle(text, tensors_of(made)))  # here the gated maps act alone
    made_again = copy.deepcopy(made)
    assert made_again.content_hash == made.content_hash
    pipe.unload_erasure()
    with pytest.raises(ErasureError):  # the LoRA is another edit
        pipe.load_erasure(made, "no-cat", backend="peft")


def test_what_it_shows_of_itself(pipe: Any, tmp_path: Path) -> None:
    made = erase(pipe, "cat", **{**COMMON, "stock": "dp"})
    gates = made.config.diagnostics["gates"]
    names, tested = gates["names"], gates["kept_tested"]
    share = f"{made.config.stock.results['dp']['completeness']['cat']:.3g}"
    told = (
        f"act in this library alone; {names} names, calibrated on 12 contexts",
        f"missed {100 * gates['missed']['cat']:.3g} % of a target's prompts at most, opened for 0 of {tested} others",
        f"DP's linear edit, {share} complete at least",
    )
    for part in told:
        assert part in repr(made), part
    assert "in their test" not in repr(made.redacted()) and "act in this library alone" in repr(made.redacted())
    made.save_pretrained(tmp_path / "no-cat")
    shown = " ".join(invoke("info", str(tmp_path / "no-cat")).stdout.replace("│", " ").split())
    for part in told:
        assert part in shown, part


# -------------------------------------------------------------------------------------------- what is kept, and where


def test_no_row_of_padding_opens_a_gate() -> None:
    """The second tokenizer of SDXL pads with a word piece, whose rows go on changing behind the words."""
    pipe = demo.load_pipeline("sdxl")
    kept = [
        "monkey",
        "dolphin",
        "pineapple",
        "snowman",
        "horse",
        "owl",
        "duck",
        "cookie",
        "tree",
        "car",
        "noto",
        "flat",
    ]
    made = erase(pipe, "butterfly", **{**COMMON, "retain": kept, "contexts": 40, "kept_contexts": 8})
    contexts = ("{}, twemoji style", "fluent {}", "an emoji of a {} in the style of flat", "a {} in noto style")
    prompts = [context.format(word) for word in kept[:10] for context in contexts]
    with torch.no_grad():
        text = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)[0]
        named = pipe.encode_prompt([each.format("butterfly") for each in contexts], device="cpu")[0]
    assert opens(named, tensors_of(made)).all() and int(opens(text, tensors_of(made)).sum()) <= 1


def test_of_some_kept_prompts_all_rows_are_looked_at() -> None:
    """As a running gate looks at all: of some of each kind, of long ones and of the empty one; of the others the words and what follows."""
    pipe = demo.load_pipeline("sdxl")
    sources = row_sources(pipe)
    reading = Reading(sources, None)
    settings = resolve(Config(retain=tuple(KEPT)), Settings, USUAL)
    kept = Kept.of(reading, [(KEPT, KEPT)], settings)
    ((short, whole),) = kept.lists
    assert "" in whole and len(whole) > 3 * 8 and not set(short) & set(whole)
    assert {*kept.fitting, *kept.setting, *kept.testing} == {*short, *whole}
    rows = reading.of_kept(short[:2], whole[:3])
    everything = sources[0].all(whole[:3])[0]
    assert all(close(rows[prompt], found) for prompt, found in zip(whole[:3], everything, strict=True))
    words = [len(ids) for ids in sources[0].ids(short[:2])]
    assert [len(rows[prompt]) for prompt in short[:2]] == [count + 4 for count in words] and max(words) + 4 < 24


def test_long_prompts_are_kept(pipe: Any) -> None:
    """Kept words in rows stand where short prompts have padding."""
    kinds = long_prompts(KEPT)
    assert all(kinds) and all(len(set(each.words)) >= 5 for kind in kinds for each in kind)
    assert kinds[0][0].prompt == ", ".join(kinds[0][0].words) and long_prompts([]) == ([], [], [])


def test_what_is_kept_of_shipped_lists_is_encoded_once(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The prompts of shipped lists are the same for all targets, so that the cache has them; those of a target's name are left out."""
    asked: list[str] = []
    real = cache.fetch

    def fetch(kind: str, key: Any, make: Any) -> Any:
        asked.extend([kind] if kind == "contexts" else [])

        def counted() -> Any:
            made.append(kind)
            return make()

        return real(kind, key, counted)

    monkeypatch.setattr("diffusers_erasure.encoding.contexts.cache.fetch", fetch)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    made: list[str] = []
    settings = {**COMMON, "retain": (), "retain_default": "list:things"}
    erase(pipe, "cat", **settings)
    first = made.count("contexts")
    made.clear()
    again = erase(pipe, "car", **settings)
    assert 0 < made.count("contexts") < first and asked.count("contexts") >= 2 * first - 2
    assert opens(encoded(pipe, "a car"), tensors_of(again)).all()


def test_few_contexts_of_many_words() -> None:
    words = [f"w{i}" for i in range(12)]
    split = Split.of([f"{i} {{}}" for i in range(8)])
    dense, sparse = kept_prompts(words, split, 8), kept_prompts(words, split, 1)
    assert [len(kind) for kind in sparse] == [12 + 3, 3, 6] and sum(map(len, dense)) == 12 * 11
    assert all(all(word in each.prompt for word in each.words) for kind in (*dense, *sparse) for each in kind)
