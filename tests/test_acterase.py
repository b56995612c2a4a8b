"""ActErase: the calibration's numbers, an erasure from end to end, resuming to the same bytes, and bad input."""

import os
import signal
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureInputError,
    demo,
    erase,
)
from diffusers_erasure.fitting import recipe_of
from diffusers_erasure.layers.activation import BLEND, MASK, MEANS, TIMESTEPS, Part, pack
from diffusers_erasure.methods.acterase import (
    SOURCE,
    TARGET,
    Calibration,
    Config,
    Settings,
    diagnose,
    importance,
    unit_mask,
)
from diffusers_erasure.methods.acterase_pairs import PAIRS, pairs_for
from diffusers_erasure.methods.acterase_sites import find_sites
from diffusers_erasure.methods.probes import Moments, inputs_seen
from diffusers_erasure.schema import TENSOR_FILE, Concept
from diffusers_erasure.settings import resolve
from diffusers_erasure.tensors import dump
from diffusers_erasure.training import TrainingRun
from tests.forks import Fork
from tests.helpers import (
    ROUNDINGS,
    assert_like,
    equal,
    far,
    images,
    roundings,
    style_lora,
    tiny_sd_pipe,
    tiny_sdxl_pipe,
    tree,
    unchanged_by,
)


QUICK: dict[str, Any] = {
    "method": "acterase",
    "compare": False,
    "num_pairs": 3,
    "num_inference_steps": 4,
    "timesteps": 3,
    "batch_size": 2,
}


@cache
def quick() -> Erasure:
    """Of one concept, by a fresh pipeline."""
    return erase(tiny_sd_pipe(), "cat", **QUICK)


# ------------------------------------------------------------------------------------------------------- the numbers


def test_moments_are_those_of_all_rows() -> None:
    """Whatever the calls by which rows come: a chunked feed-forward gives the same."""
    values = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0)) * 5
    whole, parts = Moments(2, {"a": 6}), Moments(2, {"a": 6})
    whole.add("a", 1, values)
    for chunk in (values[:1], values[1:, :4], values[1:, 4:]):
        parts.add("a", 1, chunk)
    rows = values.flatten(0, 1).double()
    normalised = rows / rows.norm(dim=1, keepdim=True)
    for moments in (whole, parts):
        assert roundings(moments.mean("a")[1], rows.mean(0)) <= 10
        assert roundings(moments.root_mean_square("a")[1], normalised.square().mean(0).sqrt()) <= 10
        assert moments.mean("a")[0].tolist() == [0] * 6
    whole.add("a", 0, 2 * values[:1])
    everything = torch.cat([rows, 2 * rows[:10]])
    assert roundings(whole.pooled().mean("a")[0], everything.mean(0)) <= 10


def test_the_mask() -> None:
    source = torch.tensor([[0.1, 0.2, 0.3, 0.4, 1.0]])
    target = torch.tensor([[1.0, 0.25, 0.2, 0.9, 0.8]])
    assert unit_mask(source, target, 0.0).tolist() == [[True, True, False, True, False]]
    assert unit_mask(source, target, 0.25).tolist() == [[False, True, False, True, False]]
    assert unit_mask(source, target, 0.0, top=0.4).tolist() == [[True, False, False, True, False]]
    assert unit_mask(source, target, 0.5, top=0.2).tolist() == [[False, False, False, True, False]]
    assert unit_mask(target, target, 0.0).sum() == 0


def test_importance() -> None:
    moments = Moments(2, {"a": 3})
    moments.add("a", 0, torch.tensor([[3.0, 4.0, 0.0], [0.0, -1.0, 0.0]]))
    moments.add("a", 1, torch.tensor([[1.0, 2.0, 2.0]]))
    plain = torch.tensor([[0.6 / 1.64**0.5, 1.0, 0.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
    assert roundings(importance(moments, "a", None), plain) <= 10
    weighted = importance(moments, "a", torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64))
    assert roundings(weighted[1], torch.tensor([1.0, 0.5, 0.5])) <= 10


def test_the_probe_is_gone(pipe: Any) -> None:
    before, found = tree(pipe), []
    modules = find_sites(pipe.unet, resolve(Config(), Settings))
    assert [name.rpartition(".transformer_blocks")[2] for name in modules] == [".0.ff.net.2"] * 4
    with (
        pytest.raises(RuntimeError, match="mine"),
        inputs_seen(pipe.unet, modules, lambda name, x: found.append(x.shape)),
    ):
        images(pipe, num_inference_steps=1)
        raise RuntimeError("mine")
    assert len(found) == 4 * (1 if len(pipe.scheduler.timesteps) == 1 else len(pipe.scheduler.timesteps))
    assert [sorted(value) if isinstance(value, dict) else value for value in tree(pipe)["unet"]] == list(
        before["unet"]
    )


@pytest.mark.parametrize("rows", ["conditional", "all"])
def test_the_calibration_against_a_pipelines_own_run(pipe: Any, rows: str) -> None:
    """The means are those that a plain pipeline's feed-forwards give for the prompts without the concept."""
    site = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    settings = {"num_pairs": 2, "num_inference_steps": 4, "timesteps": 4, "guidance_scale": 3.0, "rows": rows}
    pairs = [("a photo", "a photo of a cat"), ("a table", "a cat on a table")]
    calibration = Calibration(pipe, resolve(Config(pairs=pairs, **settings), Settings), [pairs])
    with inputs_seen(calibration.model, calibration.modules, calibration.see):
        calibration.batch(0, 0)

    other = tiny_sd_pipe()
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, timestep_spacing="trailing")
    seen: list[torch.Tensor] = []
    module = other.unet.get_submodule(site)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for side in (SOURCE, TARGET):
        seen.clear()
        noise = torch.stack([calibration.sampler.noise(0, ("pair", i), (4, 8, 8)) for i in range(2)])
        other([pair[side] for pair in pairs], latents=noise, num_inference_steps=4, guidance_scale=3.0)
        for step, hidden in enumerate(seen):
            own = (hidden if rows == "all" else hidden[2:]).flatten(0, 1).double()
            assert roundings(calibration.moments[side].mean(site)[step], own.mean(0)) <= ROUNDINGS
            share = (own / own.norm(dim=1, keepdim=True)).square().mean(0).sqrt()
            assert roundings(calibration.moments[side].root_mean_square(site)[step], share) <= ROUNDINGS


# ------------------------------------------------------------------------------------------------------- the erasure


def test_what_is_written(pipe: Any) -> None:
    base = images(pipe)
    erasure = unchanged_by(pipe, lambda: erase(pipe, ["cat", "dog"], anchors=["animal", ""], **QUICK))
    config = erasure.config
    assert [(layer.kind, layer.prefix) for layer in config.layers] == [
        ("activation", "activation.0."),
        ("activation", "activation.1."),
    ]
    for layer in config.layers:
        tensors = erasure.layer_tensors(layer)
        assert tensors[TIMESTEPS].tolist() == [999.0, 499.0, 249.0]
        assert tensors[BLEND].tolist() == [2.0]
        assert {value.dtype for name, value in tensors.items() if name.endswith(MEANS)} == {torch.float16}
    assert config.method.name == "acterase" and config.method.settings["tau"] == Config().tau
    assert config.diagnostics["pairs"] == 3 and len(config.diagnostics["patched"]) == 2
    assert all(0 < share < 1 for share in config.diagnostics["patched"])
    pipe.load_erasure(erasure)
    assert far(images(pipe), base) > 1e-3
    again = erase(tiny_sd_pipe(), **{**QUICK, **recipe_settings(erasure)})
    assert again.to_files() == erasure.to_files()


def recipe_settings(erasure: Erasure) -> dict[str, Any]:
    recipe = recipe_of(erasure)
    return {"targets": recipe["targets"], "anchors": recipe["anchors"], **recipe["settings"]}


def test_concepts_together_are_the_concepts_one_by_one(pipe: Any) -> None:
    both = erase(pipe, ["cat", "dog"], **QUICK)
    alone = [quick(), erase(pipe, "dog", **QUICK)]
    for i, one in enumerate(alone):
        own = both.layer_tensors(both.config.layers[i])
        assert own.keys() == (single := one.layer_tensors(one.config.layers[0])).keys()
        assert all(torch.equal(own[name], single[name]) for name in own)
    other = tiny_sd_pipe()
    pipe.load_erasure(both)
    for i, one in enumerate(alone):
        other.load_erasure(one, str(i))
    assert equal(images(pipe), images(other))


def test_the_static_form_can_be_fused(pipe: Any) -> None:
    base, erasure = images(pipe), erase(pipe, "cat", by_timestep=False, sites="attn", **QUICK)
    (layer,) = erasure.config.layers
    assert erasure.layer_tensors(layer)[TIMESTEPS].shape == (1,)
    assert {site.rpartition(".attn")[2] for site in layer.sites} == {"1.to_out.0", "2.to_out.0"}
    pipe.load_erasure(erasure)
    hooked = images(pipe)
    pipe.fuse_erasures()
    assert_like(images(pipe), hooked, base)


def test_settings_act(pipe: Any) -> None:
    def layer(**settings: Any) -> dict[str, torch.Tensor]:
        erasure = erase(pipe, "cat", **{**QUICK, **settings})
        return erasure.layer_tensors(erasure.config.layers[0])

    def units(tensors: dict[str, torch.Tensor]) -> int:
        return sum(value.numel() for name, value in tensors.items() if name.endswith(MEANS))

    plain = quick().layer_tensors(quick().config.layers[0])
    assert units(layer(top=None)) > units(layer(top=None, tau=0.5)) > units(layer(top=None, tau=0.9)) > 0
    assert units(layer(top=None)) > units(plain) > units(few := layer(top=0.05)) > 0
    assert float(layer(blend=1.5)[BLEND]) == 1.5
    site = next(name.removesuffix(MASK) for name in few if name.endswith(MASK))
    width = pipe.unet.get_submodule(site).in_features
    assert int(Part.of(few, site).dense(width)[0].sum(1).max()) <= round(0.05 * width)
    assert {name.partition(".")[0] for name in layer(blocks="up")} == {"up_blocks", TIMESTEPS, BLEND}
    for changed in ({"importance": "wanda"}, {"rows": "all"}, {"seed": 1}, {"guidance_scale": 1.0}):
        other = layer(**changed)
        assert other.keys() != plain.keys() or any(not torch.equal(other[name], plain[name]) for name in plain)


def test_its_size_in_stable_diffusions_shapes() -> None:
    """16 feed-forwards of 49,920 units: at most 5 MB whatever the settings, by default far below 1 MB."""
    widths = [4 * width for width in (320, 640, 1280) for _ in range(5)] + [4 * 1280]
    assert sum(widths) == 49_920
    generator = torch.Generator().manual_seed(0)

    def size(times: int, share: float) -> int:
        tensors: dict[str, torch.Tensor] = {TIMESTEPS: torch.arange(times).float(), BLEND: torch.ones(1)}
        for i, width in enumerate(widths):
            mask = torch.rand(times, width, generator=generator) < share
            tensors[f"{i}{MASK}"], tensors[f"{i}{MEANS}"] = pack(mask), torch.zeros(int(mask.sum())).half()
        return len(dump(tensors))

    assert size(50, 0.7) <= 5_000_000
    defaults = Config()
    assert defaults.top is not None
    assert size(defaults.timesteps, defaults.top) < 500_000


def test_sdxl() -> None:
    pipe = tiny_sdxl_pipe()
    erasure = erase(pipe, "cat", **{**QUICK, "num_pairs": 1, "num_inference_steps": 2})
    base = images(pipe, num_inference_steps=2)
    pipe.load_erasure(erasure)
    assert far(images(pipe, num_inference_steps=2), base) > 1e-4


def test_it_erases_and_travels(tmp_path: Path) -> None:
    """On the embedded model, from making to loading what was saved: the cats go, most of the rest stays."""
    pipe = demo.load_pipeline()
    small = {"num_inference_steps": 8, "timesteps": 8, "guidance_scale": 3.0, "num_pairs": 4, "batch_size": 4}
    erasure = erase(pipe, "cat", anchors="animal", method="acterase", **small)
    erasure.save_pretrained(tmp_path / "e")
    assert sum(path.stat().st_size for path in (tmp_path / "e").iterdir()) < 300_000
    judge = demo.load_judge()

    def draw(pipe: Any, words: list[str]) -> float:
        prompts = [demo.prompt(word, demo.STYLES[i % 5]) for i, word in enumerate(words)]
        generators = [torch.Generator().manual_seed(i) for i in range(len(words))]
        drawn = pipe(prompts, num_inference_steps=8, guidance_scale=3.0, generator=generators).images
        return sum(map(str.__eq__, judge.predict(drawn).objects, words)) / len(words)

    kept = ["pizza", "rocket", "rose", "bus", "lemon", "guitar", "owl", "crab"]
    assert draw(pipe, ["cat"] * 8) >= 0.7
    before = draw(pipe, kept)
    fresh = demo.load_pipeline()
    fresh.load_erasure(tmp_path / "e", strict_base="error")
    assert draw(fresh, ["cat"] * 8) <= 0.5
    assert draw(fresh, kept) >= before - 0.3


# --------------------------------------------------------------------------------------------------------- resuming


LONGER: dict[str, Any] = {**QUICK, "num_pairs": 6}


def longer(folder: Path) -> None:
    erase(tiny_sd_pipe(), ["cat", "dog"], training=TrainingRun(checkpoint_dir=folder, progress=False), **LONGER)


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    expected = erase(tiny_sd_pipe(), ["cat", "dog"], **LONGER).to_files()
    process = Fork(tmp_path, longer, folder := tmp_path / "checkpoints")
    # In the second of the two concepts, so that a finished one is restored too.
    while not any(folder.glob("checkpoint-000000[45].safetensors")):
        assert process.is_running, process.errors[-3000:]
        time.sleep(0.005)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run = TrainingRun(checkpoint_dir=folder, resume=True, progress=False)
    assert not (folder / "checkpoint-0000006.safetensors").exists()
    assert erase(tiny_sd_pipe(), ["cat", "dog"], training=run, **LONGER).to_files() == expected


def test_a_checkpoint_of_another_run(pipe: Any, tmp_path: Path) -> None:
    run = TrainingRun(checkpoint_dir=tmp_path / "c", progress=False)
    erasure = erase(pipe, "cat", training=run, **QUICK)
    assert len(list((tmp_path / "c").iterdir())) == 2
    with pytest.raises(ErasureInputError, match="resume=True"):
        erase(pipe, "cat", training=run, **QUICK)
    again = TrainingRun(checkpoint_dir=tmp_path / "c", resume=True, progress=False)
    with pytest.raises(ErasureInputError, match="another run"):
        erase(pipe, "dog", training=again, **QUICK)
    with pytest.raises(ErasureCompatibilityError, match="another base model"):
        erase(tiny_sd_pipe(3), "cat", training=again, **QUICK)
    assert erase(pipe, "cat", training=again, **QUICK).to_files() == erasure.to_files()


def test_ctrl_c_saves(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Calibration.batch

    def interrupted(self: Calibration, concept: int, number: int) -> None:
        batch(self, concept, number)
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)

    expected = quick().to_files()
    monkeypatch.setattr(Calibration, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        erase(pipe, "cat", training=TrainingRun(checkpoint_dir=tmp_path, progress=False), **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0000001.safetensors"]
    assert len(pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2")._forward_pre_hooks) == 0
    run = TrainingRun(checkpoint_dir=tmp_path, resume=True, progress=False)
    assert erase(pipe, "cat", training=run, **QUICK).to_files() == expected


# --------------------------------------------------------------------------------------------------------- the pairs


@pytest.mark.parametrize("preset", PAIRS)
def test_the_presets_pairs(preset: str) -> None:
    """Each side is another prompt, with and without an anchor, and short enough for the embedded model."""
    assert len(set(PAIRS[preset])) == 12
    tokenizer = demo.load_pipeline().tokenizer
    for anchor in (None, "", "animal"):
        found = pairs_for(Concept("watermelon", anchor), 14, preset, (), True)
        assert len(found) == 14 and found[12:] == found[:2]
        for left, right in found:
            assert "watermelon" in right and "watermelon" not in left and "{}" not in left + right
            assert (left == right.replace("watermelon", "animal")) == (anchor == "animal")
            if preset != "nudity":
                assert max(map(len, tokenizer([left, right]).input_ids)) <= tokenizer.model_max_length


def test_pairs_of_the_user(pipe: Any) -> None:
    own = [("a {} at night", "a {} at night"), ("a street", "a street with a {}")]
    assert pairs_for(Concept("cat", "dog"), 3, "object", own, False) == [
        ("a dog at night", "a cat at night"),
        ("a street", "a street with a cat"),
        ("a dog at night", "a cat at night"),
    ]
    named = erase(pipe, "cat", pairs=[["a street", "a street with cats"]], **QUICK)
    assert named.config.method.settings["pairs"] == [["a street", "a street with cats"]]
    assert "pairs" in named.config.method.concept_settings
    assert "pairs" not in named.redacted().config.method.settings
    again = erase(pipe, **{**QUICK, **recipe_settings(named)})
    assert again.content_hash == named.content_hash


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": []}, "pairs"),
        ({"pairs": "a cat"}, "pairs"),
        ({"pairs": ["ab"]}, "pairs"),
        ({"pairs": [("a", "b", "c")]}, "pairs"),
        ({"pairs": [("a cat", "a  cat")]}, "does not differ"),
        ({"pairs": [("a {}", "a {}")], "anchors": "cat "}, "own anchor"),
        ({"tau": 1.0}, "tau"),
        ({"tau": -0.1}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"top": 0}, "top"),
        ({"top": 1.5}, "top"),
        ({"blend": 0}, "blend"),
        ({"sites": "conv"}, "sites"),
        ({"blocks": "left"}, "blocks"),
        ({"importance": "norm"}, "importance"),
        ({"rows": "none"}, "rows"),
        ({"preset": "person"}, "preset"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"timesteps": 0}, "timesteps"),
        ({"guidance_scale": 0}, "guidance_scale"),
        ({"by_timestep": "no"}, "by_timestep"),
        ({"retain": ["dog"]}, "takes no retained prompts"),
        ({"training": TrainingRun(checkpoint_dir="c", sample_every=1)}, "sample_every"),
        ({"pairs": [("a " + "very " * 30, "b")]}, "tokens"),
    ],
)
def test_bad_settings(pipe: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        unchanged_by(pipe, lambda: erase(pipe, "cat", **{**QUICK, **settings}))


def test_other_bad_input(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ErasureInputError, match="right side"):
        erase(pipe, ["cat", "dog"], pairs=[("a street", "a cat")], **QUICK)
    with pytest.raises(ErasureInputError, match="at most 64"):
        erase(pipe, [f"cat {i}" for i in range(65)], **QUICK)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ErasureInputError, match="one process"):
        erase(pipe, "cat", **QUICK)
    monkeypatch.delenv("WORLD_SIZE")
    pipe.load_lora_weights(style_lora(pipe))
    with pytest.raises(ErasureInputError, match="active LoRAs"):
        erase(pipe, "cat", **QUICK)


def test_no_unit_passes(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see = Calibration.see

    def the_same(self: Calibration, site: str, hidden_states: torch.Tensor) -> None:
        see(self, site, torch.ones_like(hidden_states))

    monkeypatch.setattr(Calibration, "see", the_same)
    with pytest.raises(ErasureInputError, match="Lower `tau`"):
        unchanged_by(pipe, lambda: erase(pipe, "cat", **QUICK))


def test_other_families_are_refused() -> None:
    class WanTransformer3DModel(torch.nn.Module):
        pass

    class Pipe:
        transformer = WanTransformer3DModel()

    with pytest.raises(ErasureCompatibilityError, match="works on stable-diffusion and .* and flux, but"):
        erase(Pipe(), "cat", **QUICK)


def test_diagnostics_are_shares(pipe: Any) -> None:
    calibration = Calibration(pipe, resolve(Config(num_pairs=1), Settings), [[("a", "b")]])
    site, module = next(iter(calibration.modules.items()))
    layer = {TIMESTEPS: torch.zeros(2), site + MEANS: torch.ones(module.in_features)}
    found = diagnose(calibration, [layer])
    assert found["patched_by_site"][site] == 0.5
    assert sum(found["patched_by_site"].values()) == 0.5
    assert TENSOR_FILE not in found
