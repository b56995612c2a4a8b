"""Null-space LoRA: what retained prompts have where text enters stays as it is, and what targets have does not."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import Erasure, ErasureInputError, demo, erase
from diffusers_erasure.base_model import component, door_readers, family_of
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.denoising.calls import Caller, latent_shape
from diffusers_erasure.denoising.prompts import Prompts
from diffusers_erasure.denoising.sampler import generator_for, sampler_for
from diffusers_erasure.training import TrainingRun, loop
from diffusers_erasure.training.null_space import Directions, directions, triangle
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import Cut, cut_after, tiny_sd_pipe


QUIET = TrainingRun(progress=False)
DOORS = ("context_embedder", "text_embedder.linear_1")
FEW: dict[str, Any] = {
    **{"method": "esd", "steps": 4, "rank": 2, "batch_size": 2, "trajectories": 3, "num_inference_steps": 3},
    **{"learning_rate": 0.02, "templates": "none", "compare": False, "retain": ["dog"]},
}
# Bases whose retained rows leave something of the space: the rows of two prompts are fewer than it has directions.
EXACT: dict[str, tuple[Any, dict[str, Any]]] = {
    "unet": (demo.load_pipeline, {"train_set": "x-strict"}),
    "flux": (tiny_flux_pipe, {"train_set": DOORS, "max_sequence_length": 6}),
}


@pytest.fixture(autouse=True)
def accelerate() -> Iterator[None]:
    with accelerate_state_restored():
        yield


def trained(pipe: Any, **more: Any) -> Erasure:
    return erase(pipe, "cat", training=more.pop("training", QUIET), **{**FEW, **more})


@cache
def exact(name: str, kind: str = "esd") -> Erasure:
    """An erasure with all energy protected."""
    load, settings = EXACT[name]
    how = {} if kind == "esd" else {"method": "sdd", "ema_decay": 0.5, "save": "ema"}
    return trained(load(), null_space=1.0, **settings, **how)


def factors(erasure: Erasure, part: str) -> dict[str, torch.Tensor]:
    """The LoRA's, by module; `part` is lora_A or lora_B."""
    (tensors,) = erasure.tensors.values()
    end = f".{part}.weight"
    return {name.split(".", 1)[1].removesuffix(end): each for name, each in tensors.items() if name.endswith(end)}


def inputs(pipe: Any, texts: list[str], length: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """What the layers that read text read of each prompt: by layer and prompt, [L, C]."""
    prompts = Prompts(pipe, texts, 32, length)
    found: dict[str, dict[str, torch.Tensor]] = {}
    family = family_of(pipe)
    for name, readers in door_readers(component(pipe, family.denoiser)).items():
        values = prompts.rows if name == family.argument else prompts.pooled
        assert values is not None
        rows = {text: values[prompts.index[text]].reshape(-1, values.shape[-1]) for text in ("", *texts)}
        found.update(dict.fromkeys(readers, rows))
    return found


# ------------------------------------------------------------------------------------------------------ the algebra


def some_rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    return rows * torch.tensor([10.0, 5, 3, 2, 1, 1, 0.5, 0.2, 0.1, 0, 0, 0], dtype=torch.float64)


def test_rows_that_come_in_parts_are_the_whole() -> None:
    rows = some_rows()
    for size in (1, 7, 12, 40):
        reduced, longest = triangle(rows.split(size))
        assert (reduced.T @ reduced - rows.T @ rows).abs().max() < 1e-10
        assert longest == pytest.approx(float(rows.norm(dim=1).max()))


def test_the_fewest_directions_that_hold_a_share() -> None:
    rows = some_rows()
    values, vectors = torch.linalg.eigh(rows.T @ rows)  # by rising values
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    for share in (0.3, 0.9, 0.99, 1.0):
        found = directions(rows.split(5), share)
        count = found.vectors.shape[1]
        held = float(values[:count].sum() / values.sum())
        assert found.energy == pytest.approx(held, abs=1e-12) and found.left == 12 - count
        if share < 1:
            assert held >= share > float(values[: count - 1].sum() / values.sum())
        else:
            assert count == 9
        unit = found.vectors.T @ found.vectors - torch.eye(count, dtype=torch.float64)
        assert unit.abs().max() < 1e-12
        own = vectors[:, :count]
        assert (found.vectors @ found.vectors.T - own @ own.T).abs().max() < 1e-8
        assert found.outside(rows).square().sum() == pytest.approx(float(values[count:].sum()), abs=1e-9)
    assert directions(rows.split(5), 1.0).outside(rows).abs().max() < 1e-12


def test_what_stands_behind_a_pooled_vector_is_not_read() -> None:
    """SDXL's sizes and the pooled vector go through one Linear; they are the same in all prompts."""
    known = Directions(torch.eye(4, 1, dtype=torch.float64), 1.0)
    assert known.outside(torch.ones(2, 6)).tolist() == [[0, 1, 1, 1, 0, 0]] * 2


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("name", list(EXACT))
@pytest.mark.parametrize("kind", ["esd", "ema"])
def test_retained_rows_do_not_change_and_the_targets_do(name: str, kind: str) -> None:
    """With all energy protected, in every layer that text enters by: whatever B is, and with the B that was trained."""
    pipe, settings = EXACT[name][0](), EXACT[name][1]
    erasure = exact(name, kind)
    downs, ups = factors(erasure, "lora_A"), factors(erasure, "lora_B")
    told = erasure.config.diagnostics["null_space"]
    assert sum(each["layers"] for each in told.values()) == len(downs)
    assert all(each["energy"] == 1 and each["left"] > 0 and each["of_targets"] > 0 for each in told.values())
    read = inputs(pipe, ["dog", "cat"], settings.get("max_sequence_length", 0))
    model = component(pipe, family_of(pipe).denoiser)
    for site, down in downs.items():
        layer: Any = model.get_submodule(site).requires_grad_(False)
        assert bool(ups[site].any())
        at_random = torch.randn(ups[site].shape, generator=generator_for(0, site))
        at_random *= layer.weight.norm() / (at_random @ down).norm()  # an edit as large as the weight itself
        for up in (ups[site], at_random):
            for text, rows in read[site].items():
                base = layer(rows)
                change = rows @ down.T @ up.T
                far = float(change.norm() / base.norm())
                if text == "cat":
                    assert far > 1e-4
                else:
                    assert far <= 1e-6 and float(change.abs().max()) <= 1e-6


@pytest.mark.parametrize("name", list(EXACT))
def test_the_prediction_for_a_retained_prompt_is_the_bases(name: str) -> None:
    pipe, settings = EXACT[name][0](), EXACT[name][1]
    family, length = family_of(pipe), settings.get("max_sequence_length", 0)
    shape = latent_shape(pipe)
    sampler = sampler_for(pipe, 3, shape[1:])
    latents = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def predicted() -> torch.Tensor:
        call = Caller(family, component(pipe, family.denoiser), Prompts(pipe, ["dog", "cat"], 32, length), sampler)
        return call(latents, sampler.timesteps[1].expand(3), ["", "dog", "cat"])

    before = predicted()
    pipe.load_erasure(exact(name))
    moved = (predicted() - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert moved[:2].max() < 1e-5 < 1e-3 < moved[2]


@pytest.mark.parametrize(
    ("load", "settings"),
    [
        (tiny_sd_pipe, {"train_set": "x"}),
        (tiny_sd3_pipe, {"train_set": "x"}),
        (tiny_flux_pipe, {"method": "gem", "train_set": ("context_embedder", "add_k_proj"), "retain_weight": 0.0}),
    ],
    ids=["sd", "sd3", "flux-gem"],
)
def test_a_share_of_the_energy_is_protected_where_text_enters_and_nowhere_else(
    load: Any, settings: dict[str, Any]
) -> None:
    pipe = load()
    erasure = trained(pipe, null_space=0.9, **settings)
    downs, read = factors(erasure, "lora_A"), inputs(pipe, ["dog"])
    told = erasure.config.diagnostics["null_space"]
    assert sum(each["layers"] for each in told.values()) == sum(site in read for site in downs) < len(downs)
    for site, down in downs.items():
        if site in read:
            rows = torch.cat(list(read[site].values())).double()
            known = directions([rows], 0.9)
            assert (down.double() @ known.vectors).abs().max() < 1e-6 * down.abs().max()
            assert any(
                each["directions"] == known.vectors.shape[1]
                and each["energy"] == pytest.approx(known.energy, rel=1e-5)
                for each in told.values()
            )


def test_prompts_are_protected_as_they_stand_and_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    original = loop.null_space
    monkeypatch.setattr(loop, "null_space", lambda *a: asked.append(list(dict.fromkeys(a[4]))) or original(*a))
    retain = ["dog", "fox"]
    trained(tiny_sd_pipe(), null_space=0.9, retain=retain, templates=("{}", "a {}"), retain_nearest=0)
    assert asked == [["dog", "fox", "a fox"]]


def test_without_it_nothing_is_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "null_space", lambda *_: pytest.fail("asked for"))
    plain = trained(tiny_sd_pipe())
    assert trained(tiny_sd_pipe(), null_space=0.0).to_files() == plain.to_files()
    assert "null_space" not in plain.config.diagnostics


@pytest.mark.parametrize("more", [{"method": "esd"}, {"method": "sdd", "ema_decay": 0.8, "weight_decay": 0.1}])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tiny_sd_pipe(), null_space=0.9, **more)
    assert whole.content_hash != trained(tiny_sd_pipe(), **more).content_hash
    run = TrainingRun(checkpoint_dir=tmp_path, checkpoint_every=1, resume=True, progress=False)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 2)
        trained(tiny_sd_pipe(), null_space=0.9, training=run, **more)
    assert trained(tiny_sd_pipe(), null_space=0.9, training=run, **more).to_files() == whole.to_files()
    with pytest.raises(ErasureInputError, match="another run"):
        trained(tiny_sd_pipe(), null_space=0.8, training=run, **more)


@pytest.mark.parametrize(
    ("load", "settings", "message"),
    [
        (tiny_sd_pipe, {"retain": ()}, "nothing is: name in `retain`"),
        (tiny_sd_pipe, {"train_set": "selfattn"}, r"none of them is in the train set.*attn2\.to_k"),
        (tiny_sd3_pipe, {"train_set": "x-strict"}, "none of them is in the train set.*'context_embedder'"),
        (demo.load_pipeline, {"retain": ["dog", "fox", "guitar", "pizza", "rocket", "frog"]}, "all 128 directions"),
        (tiny_sd_pipe, {}, "all rows of the targets lie"),
        (tiny_sd_pipe, {"null_space": 1.5}, "`null_space` must be a finite number of at least 0 and at most 1"),
    ],
)
def test_where_it_cannot_be_it_is_told(load: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        trained(load(), **{"null_space": 1.0, **settings})
