"""DuMo on the trainer: what is trained is what is loaded, stages resume, and the base stays as it was."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import Erasure, ErasureInputError, demo, erase, without_schedule
from diffusers_erasure.denoising.prompts import Prompts
from diffusers_erasure.denoising.sampler import Sampler
from diffusers_erasure.schema import TENSOR_FILE
from diffusers_erasure.training import TrainingRun, loop
from diffusers_erasure.training.epr_student import CHILD, EprStudent, ScheduleStudent
from diffusers_erasure.training.network import in_training
from tests.helpers import (
    EFFECT,
    ROUNDINGS,
    assert_same_weights,
    equal,
    far,
    images,
    roundings,
    tiny_sd_pipe,
    tiny_sdxl_pipe,
    tree,
    weights,
)


SMALL: dict[str, Any] = {
    "compare": False,
    "steps": 6,
    "rank": 2,
    "batch_size": 2,
    "trajectories": 3,
    "num_inference_steps": 3,
    "learning_rate": 3e-2,
    "schedule_steps": 4,
    "templates": "none",
}
TABLE = "modifiers.0.schedule"


def make(pipe: Any, folder: Path | None = None, *, resume: bool = False, **more: Any) -> Erasure:
    run = TrainingRun(checkpoint_dir=folder, checkpoint_every=1, resume=resume, progress=False)
    return erase(pipe, "cat", anchors="dog", method="dumo", training=run, **{**SMALL, **more})


@cache
def made(**more: Any) -> Erasure:
    """By a fresh pipeline."""
    return make(tiny_sd_pipe(), **more)


@pytest.mark.parametrize("form", ["compact", "full"])
def test_made_saved_and_loaded(pipe: Any, form: str, tmp_path: Path) -> None:
    base = images(pipe, prompt="cat")
    before, values = tree(pipe), weights(pipe)
    erasure = make(pipe, form=form, retain="fox")
    assert tree(pipe) == before and equal(images(pipe, prompt="cat"), base)
    assert_same_weights(values, weights(pipe))
    assert made(form=form, retain="fox").to_files() == erasure.to_files()
    (layer,) = erasure.config.layers
    assert (layer.kind, layer.sites[-1], layer.schedule.bins) == ("skip", "mid_block", 20)
    table = erasure.tensors[TENSOR_FILE][TABLE]
    assert table.shape == (20, len(layer.sites)) and bool((table != 1).any())
    assert len(erasure.config.diagnostics["loss"]) == 6 and len(erasure.config.diagnostics["schedule_loss"]) == 4
    assert ("skip.conv_in.weight" in erasure.tensors[TENSOR_FILE]) == (form == "full")
    erasure.save_pretrained(tmp_path / "e")
    pipe.load_erasure(tmp_path / "e", "e")
    erased = images(pipe, prompt="cat")
    assert far(erased, base) > EFFECT
    pipe.unload_erasure()
    pipe.load_erasure(erasure, "e")
    assert equal(images(pipe, prompt="cat"), erased)
    pipe.unload_erasure()
    assert equal(images(pipe, prompt="cat"), base)


@pytest.mark.parametrize("form", ["compact", "full"])
def test_what_is_trained_is_what_is_loaded(pipe: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last prediction of each student, in the trainer, is that of the erasure on a pipeline."""
    generator = torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([999, 640, 20])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    steps = loop.Trainer._steps

    def watched(self: Any, state: Any, interrupt: Any) -> None:
        steps(self, state, interrupt)
        rows = [("cat", "dog", "cat")]
        student = state.network.student_rows(latents, timesteps, rows)[0]
        seen.append((student, state.network.teacher_rows(latents, timesteps, rows)[0]))

    monkeypatch.setattr(loop.Trainer, "_steps", watched)
    erasure = make(pipe, form=form)
    rows = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in ("cat", "dog", "cat")])
    with torch.no_grad():
        base = pipe.unet(latents, timesteps, encoder_hidden_states=rows).sample
    for (student, teacher), loaded in zip(seen, (without_schedule(erasure), erasure), strict=True):
        assert torch.equal(teacher, base)
        assert float((student - base).abs().max()) > 1e-2
        pipe.load_erasure(loaded, "e")
        with torch.no_grad():
            drawn = pipe.unet(latents, timesteps, encoder_hidden_states=rows).sample
        pipe.unload_erasure()
        assert roundings(drawn, student) <= ROUNDINGS


def test_the_students_start_as_the_base_and_as_the_epr(pipe: Any) -> None:
    from accelerate import Accelerator

    from diffusers_erasure.compat import accelerate_state_restored

    latents, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 100])
    rows = [("cat", "")]
    with accelerate_state_restored():
        parts = Prompts(pipe, ["cat"], 16), Sampler(pipe.scheduler.config, 3), Accelerator(cpu=True)
        first = EprStudent("compact", 2, None, 0)
        with in_training(pipe, first, *parts, False) as network:
            assert torch.equal(
                network.student_rows(latents, timesteps, rows)[0], network.teacher_rows(latents, timesteps, rows)[0]
            )
            assert not any(
                parameter.requires_grad for name, parameter in network.model.named_parameters() if CHILD not in name
            )
            with torch.no_grad():
                for name, parameter in network.factors.items():
                    if name.startswith("zero."):
                        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
            tensors = {name: value.detach().clone() for name, value in network.factors.items()}
            erased = network.student_rows(latents, timesteps, rows)[0]
        second = ScheduleStudent(first.layer(tensors), 20)
        with in_training(pipe, second, *parts, False) as network:
            assert list(network.factors) == ["table"] and network.factors["table"].shape == (20, 5)
            assert roundings(network.student_rows(latents, timesteps, rows)[0], erased) <= ROUNDINGS
            network.student(latents, timesteps, rows[0]).square().mean().backward()
            gradient = network.factors["table"].grad
            assert gradient is not None
            touched = gradient.abs().sum(1).nonzero().flatten().tolist()
            assert touched == [2, 18]  # the bins of the timesteps 100 and 900
            assert bool((gradient[touched] != 0).all())
    assert CHILD not in dict(pipe.unet.named_children())


@pytest.mark.parametrize("cut", [(1, 3), (2, 2)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    pipe: Any, cut: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in stage 1 or 2 when a step's checkpoint is written; then it goes on, to the same bytes."""
    stage, step = cut
    expected, save = made(form="compact", retain="fox").to_files(), loop.Trainer._save

    class Cut(BaseException):
        pass

    def cutting(self: Any, state: Any) -> None:
        save(self, state)
        if self.checkpoints.folder.name == f"stage-{stage}" and state.step == step:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_save", cutting)
        with pytest.raises(Cut):
            make(pipe, tmp_path, retain=["fox"])
    assert (tmp_path / "stage-2").exists() == (stage == 2)
    with pytest.raises(ErasureInputError, match="resume"):
        make(pipe, tmp_path, retain=["fox"])
    assert make(pipe, tmp_path, resume=True, retain=["fox"]).to_files() == expected


def test_released_encoders_are_not_missed_in_stage_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command line runs it: with `release`, on the embedded model, interrupted in stage 2 and resumed."""
    settings = {**SMALL, "steps": 2, "schedule_steps": 2, "retain": ["dog", "house"]}

    def made(folder: Path | None = None, **run: Any) -> Erasure:
        run = {"checkpoint_dir": folder, "checkpoint_every": 1, "progress": False, **run}
        return erase(demo.load_pipeline(), "cat", method="dumo", training=TrainingRun(**run), **settings)

    whole = made()
    save, released = loop.Trainer._save, []

    def cutting(self: Any, state: Any) -> None:
        save(self, state)
        stage = self.checkpoints.folder.name
        released.append((stage, self.pipe.text_encoder is None and self.pipe.vae is None))
        if stage == "stage-2" and state.step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_save", cutting)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, release=True)
    assert released == [("stage-1", True), ("stage-1", True), ("stage-2", True)]
    assert made(tmp_path, release=True, resume=True).to_files() == whole.to_files()


def test_without_a_schedule(pipe: Any) -> None:
    erasure = made(schedule_steps=0)
    assert erasure.config.layers[0].schedule is None and "schedule_loss" not in erasure.config.diagnostics
    assert erasure.tensors[TENSOR_FILE]["skip.zero.mid.up"].shape == (64, 16)
    whole = make(pipe, schedule_steps=0, zero_rank=0)
    assert whole.tensors[TENSOR_FILE]["skip.zero.mid.weight"].shape == (64, 64)


def test_gradient_checkpointing_changes_nothing(pipe: Any) -> None:
    plain = made(schedule_steps=0)
    lean = make(pipe, schedule_steps=0, gradient_checkpointing=True)
    assert lean.config.diagnostics["loss"] == pytest.approx(plain.config.diagnostics["loss"], rel=1e-3)
    # Adam divides by the gradient's own size, so that rounding of tiny gradients shows.
    one, other = (torch.cat([v.flatten() for v in e.tensors[TENSOR_FILE].values()]) for e in (plain, lean))
    assert float((other - one).norm() / one.norm()) < 1e-3


def test_a_bfloat16_base_and_sdxl() -> None:
    half = tiny_sd_pipe()
    half.unet.to(torch.bfloat16)
    half.text_encoder.to(torch.bfloat16)
    erasure = make(half, schedule_steps=2)
    assert all(value.dtype == torch.float32 for value in erasure.tensors[TENSOR_FILE].values())
    large = tiny_sdxl_pipe()
    base = images(large)
    large.load_erasure(make(large, schedule_steps=2), "e")
    assert far(images(large), base) > EFFECT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_set": "x"}, "train_set"),
        ({"form": "half"}, "form"),
        ({"bins": 0}, "bins"),
        ({"zero_rank": -1}, "zero_rank"),
        ({"schedule_steps": -1}, "schedule_steps"),
        ({"schedule_learning_rate": 0.0}, "schedule_learning_rate"),
        ({"eta": float("nan")}, "eta"),
    ],
)
def test_bad_settings(pipe: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        make(pipe, **settings)
