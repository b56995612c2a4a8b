"""Receler: what it reduces to, rows that really are inserted, masks, what is outside of them, whole runs, and published folders."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureError,
    ErasureFileError,
    ErasureInputError,
    ErasureNotFoundError,
    demo,
    erase,
)
from diffusers_erasure.base_model import component, family_of
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.denoising.calls import Caller
from diffusers_erasure.denoising.prompts import Inserted, Prompts
from diffusers_erasure.denoising.sampler import sampler_for
from diffusers_erasure.formats.receler import CONFIG, WEIGHTS, read_receler
from diffusers_erasure.layers import adapter
from diffusers_erasure.methods.receler import outside, places_of
from diffusers_erasure.schema import Concept
from diffusers_erasure.training import TrainingRun, loop
from diffusers_erasure.training.adapter_student import AdapterStudent
from diffusers_erasure.training.insertions import Insertions
from diffusers_erasure.training.masks import WordMasks
from diffusers_erasure.training.objective import STUDENT, Inserting, Step
from diffusers_erasure.training.pool import Drawn, Example
from tests.commands import invoke
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import ROUNDINGS, far, images, tiny_sd_pipe, tiny_sdxl_pipe
from tests.test_adapter import plain, tensors_for


QUIET = TrainingRun(progress=False)
FEW: dict[str, Any] = {
    **{"steps": 6, "rank": 2, "num_inference_steps": 3, "trajectories": 3, "batch_size": 2, "accumulation": 1},
    **{"learning_rate": 1e-2, "templates": "none", "compare": False, "training": QUIET},
}
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def accelerate() -> Any:
    with accelerate_state_restored():
        yield


# ------------------------------------------------------------------------------------------------ what it reduces to


def test_the_linear_kind_without_rows_and_masks_is_esd_there(pipe: Any) -> None:
    """Bit for bit."""
    shared = {**FEW, "retain": ["dog", "fox"], "retain_weight": 2.0, "lr_scheduler": "constant", "eta": 1.0}
    found = erase(pipe, "cat", method="receler", kind="linear", inner_steps=0, mask_weight=0.0, **shared)
    same = erase(pipe, "cat", method="esd", train_set=("attn2.to_out.0",), whiten=0.0, retain_nearest=8, **shared)
    a, b = dict(found.tensors[LORA]), dict(same.tensors[LORA])
    # The target is written without the concept's own prediction, which ESD's adds and takes off again.
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5) for name in a)
    assert any(bool(a[name].any()) for name in a if name.endswith("lora_B.weight"))


def test_what_acts_in_training_is_what_is_saved(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    train = loop.Trainer._steps

    def noted(self: Any, state: Any, interrupt: Any) -> None:
        train(self, state, interrupt)
        network = state.network
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        seen["prediction"] = network.student_rows(latents, torch.tensor([500]), [["cat"]])[0]
        seen["base"] = network.teacher_rows(latents, torch.tensor([500]), [["cat"]])[0]
        seen["latents"] = latents

    monkeypatch.setattr(loop.Trainer, "_steps", noted)
    for kind in ("adapter", "linear"):
        erasure = erase(pipe, "cat", method="receler", kind=kind, **FEW)
        pipe.load_erasure(erasure)
        with torch.no_grad():
            rows = pipe.encode_prompt("cat", "cpu", 1, False)[0]
            found = pipe.unet(seen["latents"], torch.tensor(500), encoder_hidden_states=rows).sample
        pipe.unload_erasure()
        change = float((seen["prediction"] - seen["base"]).norm())
        assert float((found - seen["prediction"]).norm()) < 1e-3 * change


# --------------------------------------------------------------------------------------------------- rows that are asked


@pytest.mark.parametrize("make", [tiny_sd_pipe, tiny_sd3_pipe, tiny_flux_pipe])
def test_inserted_rows_reach_the_network(make: Any) -> None:
    """In the authors' code they do not: a value is assigned to a copy."""
    pipe = make()
    family = family_of(pipe)
    model = component(pipe, family.denoiser)
    size = 4 if family.denoiser == "unet" else model.config.in_channels // family.packing**2
    prompts = Prompts(pipe, ["a cat"], 64)
    call = Caller(family, model, prompts, sampler_for(pipe, 4, (8, 8)))
    latents, timesteps = torch.randn(1, size, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    rows = torch.zeros(3, prompts.rows.shape[2]).requires_grad_()
    plainly = call(latents, timesteps, ["a cat"])
    found = call(latents, timesteps, [Inserted("a cat", 2, rows)])
    assert float((found - plainly).abs().max()) > 1e-4
    (slope,) = torch.autograd.grad(found.square().sum(), [rows])
    assert bool(slope.any(1).all())
    own = prompts.rows[prompts.index["a cat"]]
    assert torch.equal(call(latents, timesteps, [Inserted("a cat", 2, own[2:5])]), plainly)


def search(pipe: Any, steps: int) -> tuple[Insertions, Any, Step]:
    family, model = family_of(pipe), pipe.unet
    prompts, sampler = Prompts(pipe, ["cat", "bird"], 64), sampler_for(pipe, 4, (8, 8))
    call = Caller(family, model, prompts, sampler)
    examples = [Example({STUDENT: word, "concept": word}) for word in ("cat", "bird")]
    settings = Inserting(4, steps, 0.1, 0.0, "concept", {"cat": 2, "bird": 2})
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    wanted = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = Drawn(latents, torch.tensor([100, 500, 900]), [examples[i] for i in (0, 0, 1)], {"concept": wanted})
    network: Any = SimpleNamespace(call=call, model=model)
    return Insertions(settings, prompts, examples, 2, 0), network, Step(network, drawn)


def test_the_search_comes_nearer_and_goes_on_from_where_it_was(pipe: Any) -> None:
    alone: Any = SimpleNamespace(device=torch.device("cpu"))
    pipe.unet.requires_grad_(False)
    players, network, step = search(pipe, 1)
    for _ in range(12):
        found = players.search(network, step, alone)
    assert players.found[-1] < players.found[0]
    asked = found.drawn.asked(STUDENT)
    assert [type(each) for each in asked] == [Inserted] * 3 and torch.equal(asked[0].rows, asked[1].rows)
    assert not torch.equal(asked[0].rows, asked[2].rows) and not asked[0].rows.requires_grad
    again, _, same = search(pipe, 1)
    again.restore({name: value.clone() for name, value in players.saved().items()})
    players.search(network, step, alone)
    again.search(network, same, alone)
    saved = players.saved()
    assert all(torch.equal(saved[name], value) for name, value in again.saved().items())


# ---------------------------------------------------------------------------------------------------------------- masks


def test_masks_are_the_attention_to_the_words(pipe: Any) -> None:
    """Against diffusers' own scores of the cross-attentions of that resolution."""
    scores: dict[str, torch.Tensor] = {}
    handles = []
    latents, rows = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.randn(2, 24, 32)
    for site in adapter.attentions("unet", pipe.unet):
        module = pipe.unet.get_submodule(site)

        def note(module: Any, args: Any, kwargs: Any, site: str = site) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            queries = module.head_to_batch_dim(module.to_q(hidden))
            keys = module.head_to_batch_dim(module.to_k(kwargs["encoder_hidden_states"]))
            found = module.get_attention_scores(queries, keys)
            scores[site] = found.unflatten(0, (2, -1)).mean(1)

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    masks = WordMasks({"a cat": [2], "two words": [1, 2]}, 0.4, "unet")
    with torch.no_grad(), masks.watching(pipe.unet):
        pipe.unet(latents, torch.tensor(500), encoder_hidden_states=rows)
        found = masks.take(["a cat", "two words"], 8, 8)
    for handle in handles:
        handle.remove()
    sizes = sorted({each.shape[1] for each in scores.values()}, key=lambda tokens: abs(np.log(tokens / 4)))
    maps = [each for each in scores.values() if each.shape[1] == sizes[0]]
    side = int(sizes[0] ** 0.5)
    for row, columns in enumerate(([2], [1, 2])):
        mean = torch.stack([each[row][:, columns].mean(1) for each in maps]).mean(0).reshape(side, side)
        expected = (mean - mean.min()) / (mean.max() - mean.min()) > 0.4
        assert torch.equal(found[row, 0].bool(), expected)
    assert 0 < float(found.mean()) < 1


def test_what_is_outside_by_hand() -> None:
    generator = torch.Generator().manual_seed(4)
    where = torch.zeros(2, 1, 2, 2)
    where[0, 0, 0, 0] = where[1, 0, :, 1] = 1
    added = {"small": torch.randn(3, 4, 5, generator=generator), "large": torch.randn(3, 16, 5, generator=generator)}
    expected = torch.zeros(2)
    for values in added.values():
        side = int(values.shape[1] ** 0.5)
        for row in range(2):
            total, count = 0.0, 0
            for token in range(values.shape[1]):
                if not where[row, 0, token // side * 2 // side, token % side * 2 // side]:
                    total, count = total + float(values[row, token].square().mean()), count + 1
            expected[row] += total / count / 2
    assert torch.allclose(outside(added, where), expected)
    everywhere = outside(added, torch.ones(2, 1, 2, 2))
    assert not everywhere.any()


def test_words_are_found_and_rows_stand_behind_them() -> None:
    pipe = demo.load_pipeline()
    settings: Any = SimpleNamespace(max_sequence_length=0, template_list=("a {} on a hill", "{}"))
    found = places_of(pipe, [Concept("ice cream")], settings)
    assert set(found) == {"a ice cream on a hill", "ice cream"}
    assert found["a ice cream on a hill"][0] == found["ice cream"][0] + 1


# ------------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("make", [tiny_sd_pipe, tiny_sdxl_pipe, tiny_sd3_pipe, tiny_flux_pipe])
@pytest.mark.parametrize("kind", ["adapter", "linear"])
def test_it_runs_on_all_families(make: Any, kind: str, tmp_path: Path) -> None:
    pipe = make()
    found = erase(pipe, ["cat", "bird"], method="receler", kind=kind, retain=["dog"], inner_steps=2, **FEW)
    assert found.config.layers[0].kind == ("adapter" if kind == "adapter" else "lora")
    assert found.config.diagnostics["insertions"]["rows"] == 16
    ups = [
        value
        for tensors in found.tensors.values()
        for name, value in tensors.items()
        if ".up." in name or "lora_B" in name
    ]
    assert ups and all(bool(value.any()) for value in ups if value.ndim == 2)
    found.save_pretrained(tmp_path / "e")
    pipe.load_erasure(Erasure.from_pretrained(tmp_path / "e"))


def test_published_settings_run(pipe: Any) -> None:
    more = {"steps": 2, "num_inference_steps": 3, "inner_steps": 2, "training": QUIET, "compare": False}
    found = erase(pipe, "cat", method="receler", published=True, **more)
    assert found.config.method.settings["rank"] == 128 and found.config.method.settings["trajectories"] == 0
    assert erase(pipe, "cat", method="receler", inner_steps=0, **FEW).config.diagnostics.get("insertions") is None


def test_the_mask_keeps_erasers_from_the_rest(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a heavy weight they add less outside of the concept than without."""
    sums = []
    for weight in (0.0, 1e4):
        student = AdapterStudent(adapter.attentions("unet", pipe.unet), 2, 0, "unet")
        monkeypatch.setattr("diffusers_erasure.methods.receler.AdapterStudent", lambda *a, s=student: s)
        found = erase(pipe, "cat", method="receler", inner_steps=0, mask_weight=weight, **{**FEW, "steps": 20})
        tensors = found.tensors["erasure.safetensors"]
        sums.append(sum(float(value.square().sum()) for name, value in tensors.items() if ".up." in name))
    assert sums[1] < 0.5 * sums[0]


def test_it_costs_at_most_eight_times_esds_forwards(pipe: Any) -> None:
    """Rows of the denoiser's batches, counted in it, with as many steps, batches and retained prompts."""
    counts = {}
    shared = {"steps": 20, "accumulation": 1, "retain": ["dog", "fox"], "compare": False, "training": QUIET}
    for method in ("esd", "receler"):
        total = 0

        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal total
            total += len(args[0] if args else kwargs["sample"])

        handle = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
        try:
            erase(pipe, "cat", method=method, **shared)
        finally:
            handle.remove()
        counts[method] = total
    assert counts["esd"] < counts["receler"] <= 8 * counts["esd"], counts


def test_what_it_cannot_do_is_told(pipe: Any) -> None:
    for more in ({"train_set": "u"}, {"null_space": 0.5}, {"whiten": 0.1}, {"mixtures": 2}):
        with pytest.raises(ErasureInputError, match="leave"):
            erase(pipe, "cat", method="receler", **FEW, **more)
    with pytest.raises(ErasureInputError, match="mask_weight"):
        erase(pipe, "cat", method="receler", gradient_checkpointing=True, **FEW)


# ---------------------------------------------------------------------------------------------------- published folders


def publish(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """As the authors' code writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        part = next(part for part in adapter.PARTS if name.endswith(part))
        block = name.removesuffix(part).removesuffix(".transformer_blocks.0.attn2")
        nested.setdefault(block, {})[part[1:]] = value
    torch.save(nested, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"eraser_type": "adapter", "eraser_rank": 3, **config}))
    return folder


def test_a_published_folder_is_an_erasure(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_for(pipe)
    folder = publish(tmp_path / "eraser", tensors)
    erasure = read_receler(pipe, folder, "cat")
    own = erasure.layer_tensors(erasure.config.layers[0])
    assert own.keys() == tensors.keys() and all(torch.equal(own[name], value) for name, value in tensors.items())
    pipe.load_erasure(erasure)
    expected = images(plain(tiny_sd_pipe(), tensors))
    assert far(images(pipe), expected) <= ROUNDINGS * torch.finfo(torch.float32).eps * float(np.abs(expected).max())
    tiny_sd_pipe().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    invoke("convert", "receler", "eraser", "--base", "base", "--concept", "cat", "-o", "out")
    assert Erasure.from_pretrained(tmp_path / "out").config.layers[0].kind == "adapter"


def test_folders_that_are_none(pipe: Any, tmp_path: Path) -> None:
    tensors = tensors_for(pipe)
    with pytest.raises(ErasureNotFoundError, match=WEIGHTS):
        read_receler(pipe, tmp_path)
    one = next(iter(tensors)).rpartition(".attn2")[0] + ".attn2"
    few = {name: value for name, value in tensors.items() if name.startswith(one)}
    cases: list[tuple[type[ErasureError], str, Any]] = [
        (ErasureCompatibilityError, "another architecture", lambda f: publish(f, few)),
        (ErasureCompatibilityError, "kind 'prompt'", lambda f: publish(f, tensors, eraser_type="prompt")),
        (ErasureFileError, "a rank of 7", lambda f: publish(f, tensors, eraser_rank=7)),
        (ErasureFileError, "JSON", lambda f: (publish(f, tensors) / CONFIG).write_text("{")),
        (
            ErasureFileError,
            "no file of weights alone",
            lambda f: (publish(f, tensors) / WEIGHTS).write_bytes(b"PK\x03\x04"),
        ),
        (
            ErasureFileError,
            "not finite",
            lambda f: publish(f, {**tensors, next(iter(tensors)): torch.full((3, 4), torch.nan)}),
        ),
        (
            ErasureFileError,
            "no tensor of an eraser",
            lambda f: torch.save({"x": torch.ones(1)}, publish(f, tensors) / WEIGHTS),
        ),
    ]
    for number, (error, match, make) in enumerate(cases):
        folder = tmp_path / str(number)
        make(folder)
        with pytest.raises(error, match=match):
            read_receler(pipe, folder)
