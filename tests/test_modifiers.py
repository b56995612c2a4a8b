"""Schedules and gates: exact against the same edit at hand-made strengths, on every kind of layer."""

import copy
import dataclasses
import json
import pickle
from functools import cache
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureConfigError,
    ErasureFileError,
    ErasureInputError,
    combine,
    to_kohya,
    with_gate,
    with_schedule,
    without_gate,
    without_schedule,
)
from diffusers_erasure.cards import render_card
from diffusers_erasure.layers.gate import Gate
from diffusers_erasure.schema import TENSOR_FILE, ErasureConfig, GateSpec, ScheduleSpec
from diffusers_erasure_cli import plotting
from tests.commands import invoke
from tests.helpers import (
    CONV_SITES,
    EFFECT,
    PROMPT,
    ROUNDINGS,
    TEXT_SITES,
    UNET_SITES,
    assert_like,
    dense_edit,
    equal,
    far,
    images,
    random_erasure,
    roundings,
    rows_of,
    tiny_sd_pipe,
    tree,
    unchanged_by,
)


TABLE = [0.0, 0.3, 1.0, 0.6, 0.25]  # five bins of 200 timesteps
KINDS = {"lora": UNET_SITES, "conv": CONV_SITES, "text_map": ()}


@cache  # none changes one
def erasure_of(kind: str, seed: int = 0, size: float = 0.7) -> Erasure:
    layer = "text_map" if kind == "text_map" else "lora"
    return random_erasure(tiny_sd_pipe(), layer, KINDS[kind], seed=seed, size=size)


def near(actual: Any, oracle: Any, base: Any) -> None:
    """Predictions of the UNet: float32 sums in another order, and an effect a hundred times as large."""
    assert roundings(oracle, base) > 100 * ROUNDINGS
    assert roundings(actual, oracle) <= ROUNDINGS


def predict(pipe: Any, timestep: Any, rows: torch.Tensor | None = None) -> Any:
    generator = torch.Generator().manual_seed(1)
    batch = 2 if rows is None else len(rows)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    rows = torch.randn(batch, 24, 32, generator=generator) if rows is None else rows
    with torch.no_grad():
        return pipe.unet(latents, timestep, encoder_hidden_states=rows).sample.numpy()


# ---------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_is_a_strength_at_each_timestep(pipe: Any, kind: str) -> None:
    erasure = erasure_of(kind)
    base = {t: predict(pipe, torch.tensor(t)) for t in (0, 199, 200, 450, 799, 999)}
    pipe.load_erasure(with_schedule(erasure, TABLE), "a")
    for t, factor in {0: 0.0, 199: 0.0, 200: 0.3, 450: 1.0, 799: 0.6, 999: 0.25}.items():
        drawn = predict(pipe, torch.tensor(t))
        if factor == 0:
            assert equal(drawn, base[t])
        else:
            near(drawn, predict(dense_edit(tiny_sd_pipe(), (erasure, factor)), torch.tensor(t)), base[t])


def test_beyond_its_ends_a_schedule_holds(pipe: Any) -> None:
    pipe.load_erasure(with_schedule(erasure_of("lora"), TABLE), "a")
    oracle = dense_edit(tiny_sd_pipe(), (erasure_of("lora"), 0.25))
    assert roundings(predict(pipe, torch.tensor(1000)), predict(oracle, torch.tensor(1000))) <= ROUNDINGS


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_batch_may_have_its_own_timestep(pipe: Any, kind: str) -> None:
    pipe.load_erasure(with_schedule(erasure_of(kind), TABLE), "a")
    both = predict(pipe, torch.tensor([300, 900]))
    for row, t in enumerate((300, 900)):
        assert roundings(both[row], predict(pipe, torch.tensor([t, t]))[row]) <= ROUNDINGS
    assert far(both[0], predict(pipe, torch.tensor([900, 900]))[0]) > 2e-3


def test_a_column_is_of_one_site(pipe: Any) -> None:
    erasure = erasure_of("lora")
    table = torch.rand(4, len(UNET_SITES), generator=torch.Generator().manual_seed(3))
    pipe.load_erasure(with_schedule(erasure, table), "a")
    tensors = {name: value.clone() for name, value in erasure.tensors["pytorch_lora_weights.safetensors"].items()}
    for column, site in enumerate(UNET_SITES):
        tensors[f"{site}.lora_B.weight"] *= table[2, column]  # t = 600 of 1000 in four bins
    scaled = Erasure(erasure.config, {"pytorch_lora_weights.safetensors": tensors})
    oracle = dense_edit(tiny_sd_pipe(), scaled)
    near(
        predict(pipe, torch.tensor(600)),
        predict(oracle, torch.tensor(600)),
        predict(tiny_sd_pipe(), torch.tensor(600)),
    )


def test_a_schedule_of_another_erasure_is_its_own(pipe: Any) -> None:
    """Two on the same modules, with tables of different length; one is not scheduled."""
    first, second, third = (erasure_of("lora", seed) for seed in range(3))
    pipe.load_erasure(with_schedule(first, TABLE), "a")
    pipe.load_erasure(second, "b", strength=0.5)
    pipe.load_erasure(with_schedule(third, [0.2, 0.8]), "c")
    oracle = dense_edit(tiny_sd_pipe(), (first, 1.0), (second, 0.5), (third, 0.2))
    t = torch.tensor(450)
    near(predict(pipe, t), predict(oracle, t), predict(tiny_sd_pipe(), t))
    pipe.unload_erasure("a")
    oracle = dense_edit(tiny_sd_pipe(), (second, 0.5), (third, 0.2))
    near(predict(pipe, t), predict(oracle, t), predict(tiny_sd_pipe(), t))


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_any_scheduler(pipe: Any, scheduler: Any) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    base = images(pipe)
    pipe.load_erasure(with_schedule(erasure_of("lora"), [0.7]), "a")
    constant = images(pipe)
    pipe.unload_erasure()
    pipe.load_erasure(erasure_of("lora"), "a", strength=0.7)
    assert_like(constant, images(pipe), base)


def test_off_and_gone(pipe: Any) -> None:
    def through() -> None:
        pipe.load_erasure(with_gate(with_schedule(erasure_of("lora"), TABLE), pipe, "a cat"), "a", strength=0)
        pipe.load_erasure(with_schedule(erasure_of("text_map"), TABLE), "b", strength=0)
        assert equal(images(pipe), base)
        pipe.set_erasures(["a", "b"])
        assert far(images(pipe), base) > EFFECT
        with pipe.erasures_disabled():
            assert equal(images(pipe), base)
        pipe.unload_erasure()

    base = images(pipe)
    unchanged_by(pipe, through)


def test_the_timestep_is_read_no_more_without_a_schedule(pipe: Any) -> None:
    pipe.load_erasure(erasure_of("lora", 1), "plain")
    before = tree(pipe)
    pipe.load_erasure(with_schedule(erasure_of("lora"), TABLE), "a")
    pipe.unload_erasure("a")
    after = tree(pipe)
    assert before["unet."] == after["unet."]  # no hook stays on the UNet


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies(pipe: Any, copied: Any) -> None:
    pipe.load_erasure(with_gate(with_schedule(erasure_of("lora"), TABLE), pipe, PROMPT), "a")
    drawn = images(pipe)
    twin = copied(pipe)
    pipe.unload_erasure()
    assert equal(images(twin), drawn)


def test_half_precision(pipe: Any) -> None:
    pipe.load_erasure(with_schedule(erasure_of("lora"), TABLE), "a")
    pipe.unet.to(torch.bfloat16)
    rows = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        low = pipe.unet(latents, torch.tensor(999), encoder_hidden_states=rows).sample
        pipe.unet.float()
        high = pipe.unet(latents.float(), torch.tensor(999), encoder_hidden_states=rows.float()).sample
    assert far(low.float().numpy(), high.numpy()) < 0.05 * float(high.abs().max())  # bfloat16 has 8 bits


# -------------------------------------------------------------------------------------------------------- gates


def by_hand(concept: torch.Tensor, rows: torch.Tensor) -> list[float]:
    """Cosines of flattened rows in float64."""
    flat, own = rows.double().flatten(1), concept.double().flatten(1)
    return [float(max((own @ each) / own.norm(dim=1) / each.norm())) for each in flat]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_is_a_strength_for_each_row_of_the_batch(pipe: Any, kind: str) -> None:
    erasure, t = erasure_of(kind), torch.tensor(500)
    rows = torch.cat([rows_of(pipe, text) for text in ("a zebra", "", "a photo of the sea at night")])
    base = predict(pipe, t, rows)
    pipe.load_erasure(with_gate(erasure, pipe, factor=0.9), "a")  # its concept is "zebra"
    drawn = predict(pipe, t, rows)
    cosines = by_hand(rows_of(pipe, "zebra"), rows)
    assert max(cosines) - min(cosines) > 0.05
    for row, cosine in enumerate(cosines):
        oracle = predict(dense_edit(tiny_sd_pipe(), (erasure, 0.9 * cosine)), t, rows)
        assert far(drawn[row], oracle[row]) <= 2e-3 * far(oracle[row], base[row])  # the gate's rows are float16
        assert far(oracle[row], base[row]) > 2e-3


def test_a_gate_works_with_prompt_embeds(pipe: Any) -> None:
    pipe.load_erasure(with_gate(erasure_of("lora"), pipe, "zebra"), "a")
    embeds = {"prompt_embeds": rows_of(pipe), "negative_prompt_embeds": rows_of(pipe, "")}
    assert equal(images(pipe, **embeds), images(pipe))


def test_of_several_concepts_the_nearest_counts(pipe: Any) -> None:
    rows = torch.cat([rows_of(pipe, text) for text in ("a horse", "a house")])
    gate = Gate(GateSpec("modifiers.gate"), rows)
    found = gate(torch.cat([rows, rows_of(pipe, "two words")]))
    assert roundings(found[:2], torch.ones(2)) <= ROUNDINGS
    assert roundings(found[2:], torch.tensor(by_hand(rows, rows_of(pipe, "two words")))) <= ROUNDINGS


def test_text_of_an_unknown_shape_fails_closed(pipe: Any) -> None:
    erasure = erasure_of("lora")
    pipe.load_erasure(with_gate(erasure, pipe, "zebra", factor=0.01), "a")
    rows = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(1))  # twice as long a prompt
    t = torch.tensor(500)
    oracle = predict(dense_edit(tiny_sd_pipe(), erasure), t, rows)
    near(predict(pipe, t, rows), oracle, predict(tiny_sd_pipe(), t, rows))


def test_both_branches_by_the_conditional_one(pipe: Any) -> None:
    rows = torch.cat([rows_of(pipe, text) for text in ("", "", "zebra", "the sea")])
    gate = Gate(GateSpec("modifiers.gate", layout="uncond_first"), rows_of(pipe, "zebra"))
    cosine = by_hand(rows_of(pipe, "zebra"), rows[3:])[0]
    assert roundings(gate(rows), torch.tensor([1, cosine, 1, cosine])) <= ROUNDINGS
    with pytest.raises(ErasureInputError, match="batch of 3"):
        gate(rows[:3])


def test_tokens_of_seen_text(pipe: Any) -> None:
    """A prompt with half of the concept's tokens acts at one half at least; text that nobody saw encoded, fully."""
    erasure, t = erasure_of("lora"), torch.tensor(500)
    gated = with_gate(erasure, pipe, "red apple", factor=1.0, tokens=True)
    ids = gated.config.layers[0].gate.tokens[0]
    assert len(ids) >= 2
    pipe.load_erasure(gated, "a")
    gate = next(iter(pipe.unet.erasure_modules.conditions.gates.values()))
    seen = rows_of(pipe, "green apple juice")
    shared = set(pipe.tokenizer("green apple juice").input_ids) & set(ids)
    share, cosine = len(shared) / len(ids), by_hand(rows_of(pipe, "red apple"), seen)[0]
    assert 0 < share < 1
    assert abs(float(gate(seen)) - max(share, cosine)) < 1e-3
    assert roundings(gate(rows_of(pipe, "my red apple")), [1.0]) <= ROUNDINGS
    assert float(gate(seen + 1e-6)) == 1.0  # text that the encoder did not give
    oracle = predict(dense_edit(tiny_sd_pipe(), erasure), t, seen + 1e-3)
    near(predict(pipe, t, seen + 1e-3), oracle, predict(tiny_sd_pipe(), t, seen + 1e-3))
    hooks = len(pipe.text_encoder._forward_hooks)
    pipe.unload_erasure()
    assert len(pipe.text_encoder._forward_hooks) == hooks - 1


def test_notes_of_many_threads_at_once() -> None:
    """None is lost or torn, while others read; a copy and a pickle have a lock of their own."""
    rows = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(0))
    gate = Gate(GateSpec("modifiers.gate", tokens=((1, 2, 3, 4),)), rows)
    texts, threads = 40, 8
    ids = torch.zeros(threads, texts, 24, dtype=torch.int64)
    for thread in range(threads):
        ids[thread, :, : thread % 5] = torch.arange(1, thread % 5 + 1)  # thread % 5 of the tokens
    encoded = torch.randn(threads, texts, 24, 32)
    wrong: list[float] = []
    ready = Barrier(threads)

    def write(thread: int) -> None:
        ready.wait()
        for text in range(texts):
            own = encoded[thread, text : text + 1]
            gate.note(ids[thread, text : text + 1], own)
            share, unknown = gate._shares(own)
            if bool(unknown) or float(share) != thread % 5 / 4:
                wrong.append(float(share))

    running = [Thread(target=write, args=(thread,)) for thread in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    assert wrong == [] and int(gate.written) == texts * threads
    for copied in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert copied.lock is not gate.lock and not copied._shares(encoded.flatten(0, 1))[1].any()


@pytest.mark.parametrize("whole", [True, False])
def test_tokens_are_noted_of_a_compiled_text_encoder(pipe: Any, whole: bool) -> None:
    """Compiled as one module, or in place, where the hook is a part of the graph."""
    pipe.load_erasure(with_gate(erasure_of("lora"), pipe, "red apple", factor=1.0, tokens=True), "one")
    pipe.load_erasure(with_gate(erasure_of("lora", seed=1), pipe, "apple tree", factor=1.0, tokens=True), "two")
    gates = list(pipe.unet.erasure_modules.conditions.gates.values())
    expected = [float(gate(rows_of(pipe, "green apple juice"))) for gate in gates]
    torch.compiler.reset()
    try:
        if whole:
            pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager", fullgraph=True)
        else:
            pipe.text_encoder.compile(backend="eager", fullgraph=True)
        for text in ("a sea", "my red apple", "green apple juice"):
            rows = rows_of(pipe, text)
            assert not any(bool(gate._shares(rows)[1]) for gate in gates)
        assert [float(gate(rows)) for gate in gates] == pytest.approx(expected)
    finally:
        torch.compiler.reset()


def test_schedule_and_gate_multiply(pipe: Any) -> None:
    erasure, t = erasure_of("lora"), torch.tensor(300)
    rows = rows_of(pipe, "the sea")
    pipe.load_erasure(with_schedule(with_gate(erasure, pipe, "zebra"), TABLE), "a")
    cosine = by_hand(rows_of(pipe, "zebra"), rows)[0]
    oracle = dense_edit(tiny_sd_pipe(), (erasure, 0.3 * cosine))
    base = predict(tiny_sd_pipe(), t, rows)
    assert far(predict(pipe, t, rows), predict(oracle, t, rows)) <= 1e-3 * far(predict(oracle, t, rows), base)


def test_a_gate_of_a_text_map_reads_the_text_before_it_is_mapped(pipe: Any) -> None:
    pipe.load_erasure(erasure_of("text_map", size=3.0), "map")
    pipe.load_erasure(with_gate(erasure_of("lora"), pipe, "zebra"), "gated")
    gate, found = next(iter(pipe.unet.erasure_modules.conditions.gates.values())), []
    gate.register_forward_hook(lambda module, args, output: found.append(output))
    predict(pipe, torch.tensor(500), rows_of(pipe, "zebra"))
    assert float(found[0]) == pytest.approx(1.0, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- the files


def test_saved_and_loaded(pipe: Any, tmp_path: Path) -> None:
    erasure = with_gate(with_schedule(erasure_of("lora"), TABLE), pipe, "zebra", tokens=True)
    erasure.save_pretrained(tmp_path / "e")
    back = Erasure.from_pretrained(tmp_path / "e")
    assert back.config == dataclasses.replace(erasure.config, files=back.config.files)
    pipe.load_erasure(erasure, "a")
    drawn = images(pipe)
    other = tiny_sd_pipe()
    other.load_erasure(tmp_path / "e")
    assert equal(images(other), drawn)
    card = (tmp_path / "e" / "README.md").read_text()
    assert "gate" in card and "weakens" in card
    half = erasure.cast(torch.float16)
    assert half.tensors[TENSOR_FILE]["modifiers.0.schedule"].dtype == torch.float16


def test_taken_off(pipe: Any) -> None:
    erasure = erasure_of("lora")
    modified = with_gate(with_schedule(erasure, TABLE), pipe, "zebra")
    assert without_gate(without_schedule(modified)).content_hash == erasure.content_hash
    assert without_schedule(modified).config.layers[0].gate is not None
    pipe.load_erasure(without_schedule(without_gate(modified)), "a")
    drawn = images(pipe)
    pipe.unload_erasure()
    pipe.load_erasure(erasure, "a")
    assert equal(images(pipe), drawn)


def test_publishing_at_another_strength(pipe: Any) -> None:
    erasure, t = with_schedule(erasure_of("lora"), TABLE), torch.tensor(300)
    pipe.load_erasure(erasure.rescaled(0.5), "a")
    oracle = dense_edit(tiny_sd_pipe(), (erasure_of("lora"), 0.15))
    near(predict(pipe, t), predict(oracle, t), predict(tiny_sd_pipe(), t))


def test_what_a_modified_erasure_cannot_do(pipe: Any, tmp_path: Path) -> None:
    erasure = with_schedule(erasure_of("lora"), TABLE)
    pipe.load_erasure(erasure, "a")
    drawn = images(pipe)
    with pytest.raises(ErasureCompatibilityError, match="schedule or a gate"):
        pipe.fuse_erasures()
    with pytest.raises(ErasureCompatibilityError, match="schedule or a gate"):
        pipe.export_erased(tmp_path / "model")
    assert equal(images(pipe), drawn)
    with pytest.raises(ErasureInputError, match="number 1 has a schedule"):
        combine([erasure, erasure_of("lora", 1)], mode="sum")
    with pytest.raises(ErasureInputError, match="a schedule or a gate"):
        tiny_sd_pipe().load_erasure(erasure, backend="peft")
    with pytest.raises(ErasureInputError, match="LoRA"):
        to_kohya(erasure)
    assert pipe.list_erasures()[0].layers == ("lora on unet (6 sites, by timestep)",)
    with pytest.raises(ErasureInputError, match="tokens"):
        with_gate(erasure, pipe, "zebra", tokens=True).redacted()


@pytest.mark.parametrize("table", [[], [float("nan")], torch.ones(2, 2, 2), torch.ones(3, 4)])
def test_a_table_that_cannot_be(table: Any) -> None:
    with pytest.raises(ErasureInputError, match="schedule"):
        with_schedule(erasure_of("lora"), table)


def test_nothing_to_modify(pipe: Any) -> None:
    text = random_erasure(pipe, sites=TEXT_SITES)
    with pytest.raises(ErasureInputError, match="No layer on the denoiser"):
        with_schedule(text, TABLE)
    with pytest.raises(ErasureInputError, match="does not name"):
        with_gate(erasure_of("lora").redacted(), pipe)
    with pytest.raises(ErasureInputError, match="factor"):
        with_gate(erasure_of("lora"), pipe, factor=0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"name": "elsewhere", "bins": 5, "span": 1000.0}},
        {"schedule": {"name": "modifiers.0.schedule", "bins": 0, "span": 1000.0}},
        {"schedule": {"name": "modifiers.0.schedule", "bins": 5, "span": -1.0}},
        {"schedule": {"name": "modifiers.0.schedule", "bins": 5, "span": 1000.0, "code": "import os"}},
        {"gate": {"name": "modifiers.0.schedule", "factor": 1.0, "layout": "row", "tokens": None}},
        {"gate": {"name": "modifiers.g", "factor": 1.0, "layout": "guess", "tokens": None}},
        {"gate": {"name": "modifiers.g", "factor": 1.0, "layout": "row", "tokens": [[-1]]}},
        {"gate": {"name": "modifiers.g", "factor": 1e999, "layout": "row", "tokens": None}},
    ],
)
def test_a_modifier_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    raw = json.loads(with_schedule(erasure_of("lora"), TABLE).config.to_json())
    raw["layers"][0].update(change)
    with pytest.raises(ErasureConfigError):
        ErasureConfig.from_json(json.dumps(raw).encode())


def test_a_modifier_without_its_tensor_is_refused() -> None:
    erasure = with_schedule(erasure_of("lora"), TABLE)
    name = "modifiers.0.schedule"
    for own, match in (
        ({}, "lacks"),
        ({name: torch.ones(4, 1)}, "shape"),
        ({name: torch.full((5, 1), torch.inf)}, "finite"),
    ):
        with pytest.raises(ErasureFileError, match=match):
            Erasure(erasure.config, {**erasure.tensors, TENSOR_FILE: own})
    text = random_erasure(tiny_sd_pipe(), sites=TEXT_SITES)
    with pytest.raises(ErasureConfigError, match="denoiser"):
        dataclasses.replace(text.config.layers[0], schedule=ScheduleSpec(name, 5))


def test_a_card_without_a_gate_does_not_speak_of_one() -> None:
    assert "weakens" not in render_card(with_schedule(erasure_of("lora"), TABLE).config)


# ---------------------------------------------------------------------------------------------------- for people


def test_a_picture_of_a_schedule() -> None:
    """Each cell has its value's colour: the first row of the table, the last steps, lies at the bottom."""
    table = torch.tensor([[0.0, 1.0], [0.5, 2.0], [1.0, -1.0]])
    erasure = erasure_of("lora")
    layer = dataclasses.replace(erasure.config.layers[0], sites=("a", "b"))
    picture = plotting.heat_map("title", table, layer.sites, 1000.0)
    colours = {picture.getpixel((x, y)) for x in range(picture.width) for y in range(picture.height)}
    assert {plotting.colour(value) for value in (0.0, 0.5, 1.0, 2.0)} <= colours
    assert plotting.colour(0.0) == (255, 255, 255) and plotting.colour(7.0) == plotting.colour(2.0)
    assert plotting.plot_schedules(erasure) is None
    whole = plotting.plot_schedules(with_schedule(erasure, table[:, :1]))
    assert whole is not None and whole.width < 400


def test_info_of_a_schedule(tmp_path: Path) -> None:
    with_schedule(erasure_of("lora"), TABLE).save_pretrained(tmp_path / "e")
    done = invoke("info", str(tmp_path / "e"), "--plot", str(tmp_path / "plot.png"))
    assert "strength by timestep (5 bins)" in " ".join(done.output.split())
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    erasure_of("lora").save_pretrained(tmp_path / "plain")
    with pytest.raises(ErasureInputError, match="schedule"):
        invoke("info", str(tmp_path / "plain"), "--plot", str(tmp_path / "none.png"))
    assert not (tmp_path / "none.png").exists()
