"""Whole training runs: resumed, killed, interrupted, in two processes, with full disks and losses that are no numbers."""

import errno
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureError,
    ErasureFileError,
    ErasureInputError,
    ErasureTrainingError,
    erase,
)
from diffusers_erasure.runs.checkpoint import POOL_FILE, Checkpoints
from diffusers_erasure.training import TrainingRun, loop
from diffusers_erasure.training.state import State
from tests.forks import Fork, cli
from tests.helpers import ROUNDINGS, Cut, contents, cut_after, equal, far, images, roundings, tiny_sd_pipe


SMALL: dict[str, Any] = {
    "steps": 6,
    "rank": 2,
    "batch_size": 2,
    "accumulation": 1,
    "trajectories": 3,
    "num_inference_steps": 3,
    "learning_rate": 1e-2,
    "refresh_every": 2,
    "refresh": 1,
    "templates": "none",
}
# What differs in what a checkpoint must hold.
KINDS: dict[str, dict[str, Any]] = {
    "base": {"method": "esd", "retain": ["dog", "fox"], "lr_scheduler": "linear", "lr_warmup_steps": 2},
    "student": {"method": "esd", "policy": "student", "weight_decay": 0.1},
    "fresh": {"method": "esd", "policy": "student", "trajectories": 0, "accumulation": 2},
    "ema": {"method": "sdd", "ema_decay": 0.8},
    "adversary": {"method": "eap", "retain": ["dog", "fox"], "pool_by": "rows", "adversarial_share": 1.0},
    "insertions": {"method": "receler", "inner_steps": 2, "retain": ["dog"]},
}


def make(pipe: Any, kind: str = "base", folder: Path | None = None, *, resume: bool = False, **more: Any) -> Erasure:
    run = TrainingRun(checkpoint_dir=folder, checkpoint_every=more.pop("every", 1), resume=resume, progress=False)
    return erase(pipe, "cat", training=run, **{**SMALL, **KINDS[kind], **more})


@cache
def whole(kind: str = "base") -> Erasure:
    """What an uninterrupted run on a fresh pipeline gives."""
    return make(tiny_sd_pipe(), kind)


def flat(erasure: Erasure) -> torch.Tensor:
    """All that was trained in a row."""
    (layer,) = erasure.config.layers
    tensors = erasure.layer_tensors(layer)
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    pipe: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(kind).to_files()
    assert make(pipe, kind).to_files() == expected  # and so does a second one
    for step in (2, 5):
        with monkeypatch.context() as patch:
            cut_after(patch, step)
            with pytest.raises(Cut):
                make(pipe, kind, tmp_path, resume=True)
    assert make(pipe, kind, tmp_path, resume=True).to_files() == expected
    assert make(pipe, kind, tmp_path, resume=True).to_files() == expected  # it is finished: nothing to do
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != POOL_FILE)
    assert names == ["checkpoint-0000005.safetensors", "checkpoint-0000006.safetensors"]


def test_stopped_while_the_pool_is_filled(pipe: Any, tmp_path: Path) -> None:
    expected = make(pipe, "student", trajectories=40, steps=2).to_files()
    everywhere, chunks = loop.Trainer._everywhere, []

    def asked(self: Any, loss: torch.Tensor, interrupt: Any) -> tuple[list[float], bool]:
        chunks.append(1)
        return everywhere(self, loss, interrupt)[0], len(chunks) == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_everywhere", asked)
        with pytest.raises(KeyboardInterrupt):
            make(pipe, "student", tmp_path, trajectories=40, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        chunks.clear()
        chunks += [
            1,
            1,
            1,
        ]  # 32 trajectories are there, so that one chunk is missing, and two steps follow
        patch.setattr(loop.Trainer, "_everywhere", asked)
        resumed = make(pipe, "student", tmp_path, resume=True, trajectories=40, steps=2)
    assert len(chunks) == 6 and resumed.to_files() == expected


def test_a_lost_pool_is_drawn_again(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            make(pipe, folder=tmp_path)
    (tmp_path / POOL_FILE).unlink()
    assert make(pipe, folder=tmp_path, resume=True).to_files() == whole().to_files()


def test_what_a_run_depends_on(pipe: Any) -> None:
    base = whole()
    assert make(pipe, seed=1).content_hash != base.content_hash
    assert make(pipe, retain_weight=3.0).content_hash != base.content_hash
    assert make(pipe, max_grad_norm=1e-3).content_hash != base.content_hash
    assert make(pipe, "base", batch_size=1, accumulation=2).content_hash != base.content_hash


def test_accumulated_batches_are_one_large_one(pipe: Any) -> None:
    """Two batches of one give the mean of their gradients, as a batch of two does, if both see the same samples."""
    state: dict[str, torch.Tensor] = {}
    drawn = loop.Trainer._draw

    def halves(self: Any, found: State, what: tuple[int, int], total: int, own: slice) -> Any:
        return drawn(self, found, (what[0], 0), 2, slice(what[1] * total, what[1] * total + total))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_draw", halves)
        for name, settings in (("large", {"batch_size": 2}), ("small", {"batch_size": 1, "accumulation": 2})):
            erasure = make(pipe, "base", lr_scheduler="constant", **settings)
            state[name] = flat(erasure)
    # Adam divides by the gradient's own size, so that rounding of tiny gradients shows.
    assert float((state["large"] - state["small"]).norm() / state["large"].norm()) < 1e-3


def command(output: Path, *arguments: str) -> list[str]:
    small = [f"--set={key}={value}" for key, value in SMALL.items()]
    return ["erase", "cat", "-o", str(output), "--method", "esd", *small, *arguments]


def training_module(*arguments: str) -> None:
    """`python -m diffusers_erasure.training`."""
    sys.argv = ["diffusers_erasure.training", *arguments]
    runpy.run_module("diffusers_erasure.training", run_name="__main__")


def run(folder: Path, *arguments: str) -> None:
    """The command line, in a process of its own."""
    process = Fork(folder, cli, *arguments)
    assert process.wait() == 0, process.errors[-3000:]


def wait_for(path: Path, process: Fork) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.is_running and time.monotonic() < deadline, f"{path.name} never came: {process.errors[-3000:]}"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The erasure of a run of 12 steps on the embedded model, by the command."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(folder.parent, *command(folder, "--set=steps=12"))
    assert not folder.with_name("out.checkpoints").exists()  # they have done their work
    return contents(folder)


@pytest.mark.slow
def test_killed_twice_the_resumed_run_is_bit_identical(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    folder = tmp_path / "out"
    arguments = command(folder, "--set=steps=12", "--checkpoint-every=1", "--resume")
    for step in (2, 7):
        process = Fork(tmp_path, cli, *arguments)
        wait_for(tmp_path / "out.checkpoints" / f"checkpoint-{step:07d}.safetensors", process)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not folder.exists()
    run(tmp_path, *arguments)
    assert contents(folder) == uninterrupted


def test_ctrl_c_saves_and_a_forgotten_resume_loses_nothing(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    folder = tmp_path / "out"
    arguments = command(folder, "--set=steps=12", "--checkpoint-every=1000")
    process = Fork(tmp_path, cli, *arguments)
    wait_for(tmp_path / "out.checkpoints" / POOL_FILE, process)  # the next thing is the first step
    process.send(signal.SIGINT)
    assert process.wait() == 130, process.errors[-2000:]
    assert "--resume" in process.errors and "Traceback" not in process.errors and not folder.exists()
    saved = [path for path in (tmp_path / "out.checkpoints").iterdir() if path.name.startswith("checkpoint")]
    assert len(saved) == 1
    forgotten = Fork(tmp_path, cli, *arguments)
    assert forgotten.wait() == 1 and "--resume" in forgotten.errors and saved[0].exists()
    run(tmp_path, *arguments, "--resume")
    assert contents(folder) == uninterrupted


def test_config_repeats_an_erasure_to_the_byte(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for name, data in uninterrupted.items():
        (first / name).write_bytes(data)
    run(tmp_path, "erase", "-o", str(second), "--config", str(first))
    assert contents(second) == uninterrupted


@pytest.mark.parametrize(
    ("protected", "method"),
    [("null_space=0.9", "esd"), ("whiten=1", "esd"), ("whiten=1", "eap"), ("inner_steps=1", "receler")],
)
def test_two_processes_are_one_with_the_batch_doubled(tmp_path: Path, protected: str, method: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    switches = (f"--set={protected}", "--set=pull=0.5", "--set=mixtures=2", "--set=templates=object")
    if method == "receler":
        switches = (f"--set={protected}", "--set=templates=object")
    switches = (*switches, f"--method={method}", *(["--retain=fox"] if method == "eap" else []))
    shared = ("--set=policy=student", "--retain=dog", "--set=trajectories=3", "--set=refresh=2", *switches)
    one, two = tmp_path / "one", tmp_path / "two"
    run(tmp_path / "whole", *command(one, *shared, "--set=batch_size=2"))
    # What `torchrun` gives to each; `accelerate launch` starts several processes on GPUs only.
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    half = command(two, *shared, "--set=batch_size=1")
    processes = [
        Fork(
            tmp_path / str(rank),
            training_module,
            *half[1:],
            environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        assert process.wait() == 0, process.errors[-3000:]
    erasures = [Erasure.from_pretrained(folder) for folder in (one, two)]
    losses = [erasure.config.diagnostics["loss"] for erasure in erasures]
    assert len(losses[0]) == SMALL["steps"] and losses[0][-1] != losses[0][0]
    # Sums over other batches, in another order; Adam makes more of it where gradients are tiny, in two players more than in one.
    assert losses[1] == pytest.approx(losses[0], rel=2e-3 if method == "esd" else 1e-2)
    one_flat, two_flat = (flat(erasure) for erasure in erasures)
    assert float((one_flat - two_flat).norm() / one_flat.norm()) < 5e-3


def test_a_second_signal_stops_at_once_and_sigterm_exits(pipe: Any, tmp_path: Path) -> None:
    from diffusers_erasure.runs.interrupts import noted

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with noted() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with noted() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            interrupt.stop()
        assert stopped.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    drawn, loss = images(pipe), loop.Trainer._loss
    with pytest.MonkeyPatch.context() as patch:

        def asked(self: Any, step: Any) -> torch.Tensor:
            signal.raise_signal(signal.SIGTERM)
            return loss(self, step)

        patch.setattr(loop.Trainer, "_loss", asked)
        with pytest.raises(SystemExit):
            make(pipe, folder=tmp_path, every=1000)
    assert (tmp_path / "checkpoint-0000001.safetensors").exists() and equal(images(pipe), drawn)


# ------------------------------------------------------------------------------------------------------- bad input


def stopped_at(pipe: Any, folder: Path, step: int = 3, kind: str = "base") -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, step)
        with pytest.raises(Cut):
            make(pipe, kind, folder)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(bytes(data))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut_short, flipped, emptied])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_good(
    pipe: Any, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    stopped_at(pipe, tmp_path)
    newest = tmp_path / "checkpoint-0000003.safetensors"
    harm(newest)
    with pytest.raises(ErasureFileError, match="damaged.*delete it to go on from step 2"):
        make(pipe, folder=tmp_path, resume=True)
    newest.unlink()
    assert make(pipe, folder=tmp_path, resume=True).to_files() == whole().to_files()


def test_a_checkpoint_of_another_run_or_base_is_refused(pipe: Any, tmp_path: Path) -> None:
    stopped_at(pipe, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ErasureInputError, match="`learning_rate` was 0.01, and is now 0.5"):
        make(pipe, folder=tmp_path, resume=True, learning_rate=0.5)
    with pytest.raises(ErasureInputError, match="`method` was esd, and is now sdd"):
        make(pipe, "ema", tmp_path, resume=True)
    with pytest.raises(ErasureCompatibilityError, match="another base model"):
        make(tiny_sd_pipe(seed=5), folder=tmp_path, resume=True)
    with pytest.raises(ErasureInputError, match="resume=True"):
        make(pipe, folder=tmp_path)
    assert contents(tmp_path) == before


def test_a_full_disk_keeps_the_last_good_checkpoint(pipe: Any, tmp_path: Path) -> None:
    stopped_at(pipe, tmp_path)
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        with pytest.raises(ErasureTrainingError, match=r"No space left.*of step 3.*resume"):
            make(pipe, folder=tmp_path, resume=True)
    assert contents(tmp_path) == before
    assert make(pipe, folder=tmp_path, resume=True).to_files() == whole().to_files()


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(pipe: Any, tmp_path: Path) -> None:
    drawn, loss = images(pipe), loop.Trainer._loss
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []

        def broken(self: Any, step: Any) -> torch.Tensor:
            calls.append(1)
            return loss(self, step) * (float("nan") if len(calls) == 4 else 1.0)

        patch.setattr(loop.Trainer, "_loss", broken)
        with pytest.raises(
            ErasureTrainingError, match=r"step 4 is not finite.*good checkpoint is of step 3.*learning_rate"
        ):
            make(pipe, folder=tmp_path)
    assert equal(images(pipe), drawn)
    assert make(pipe, folder=tmp_path, resume=True).to_files() == whole().to_files()


def test_nan_in_the_base_is_told(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ErasureError, match="not finite"):
        make(pipe)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 500}, ErasureInputError, "rank"),
        ({"train_set": ("nothing",)}, ErasureCompatibilityError, "No Linear"),
        ({"anchors": " CAT "}, ErasureInputError, "its own anchor"),
        ({"erase_from": "word " * 40, "formula": "newer"}, ErasureInputError, "tokens"),
        ({"retain": ["word " * 40]}, ErasureInputError, "tokens"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(
    pipe: Any, settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    drawn = images(pipe)
    with pytest.raises(error, match=message):
        make(pipe, folder=tmp_path / "x", **settings)
    assert equal(images(pipe), drawn) and not (tmp_path / "x").exists()


def test_pipelines_that_cannot_be_trained(pipe: Any) -> None:
    from tests.helpers import style_lora

    pipe.load_lora_weights(style_lora(pipe))
    with pytest.raises(ErasureInputError, match="LoRA"):
        make(pipe)
    pipe.unload_lora_weights()
    half = tiny_sd_pipe()
    half.unet.half()
    with pytest.raises(ErasureInputError, match="bfloat16"):
        make(half)
    with pytest.raises(ErasureInputError, match="interrupted and resumed"):
        erase(pipe, "cat", method="uce", training=TrainingRun())


def test_accelerate_is_left_as_it_was(pipe: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    from diffusers_erasure.compat import accelerate_state_restored

    AcceleratorState._reset_state(reset_partial_state=True)  # whatever ran in this process before
    make(pipe)
    assert not PartialState._shared_state
    with accelerate_state_restored():
        Accelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(ErasureInputError, match="mixed precision"):
            make(pipe)
        assert PartialState._shared_state  # the user's own stays


@pytest.mark.parametrize("train_set", ["x", "u", "full"])
def test_stock_diffusers_loads_what_was_trained(pipe: Any, train_set: str, tmp_path: Path) -> None:
    erasure = make(pipe, train_set=train_set, learning_rate=0.05)
    erasure.save_pretrained(tmp_path)
    assert erasure.config.stock is not None and erasure.config.stock.error == 0
    base, ours, stock = tiny_sd_pipe(), tiny_sd_pipe(), tiny_sd_pipe()
    ours.load_erasure(tmp_path)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    drawn = images(ours)
    assert far(drawn, images(base)) > 0.02
    assert roundings(drawn, images(stock)) <= ROUNDINGS  # B (A x) is added in both, in another order of sums


@pytest.mark.parametrize(("method", "preset"), [("esd", "object"), ("esd", "nudity"), ("sdd", "style")])
def test_published_presets_run(pipe: Any, method: str, preset: str) -> None:
    run = TrainingRun(progress=False)
    few: dict[str, Any] = {"steps": 1, "num_inference_steps": 3, "rank": 2}
    erasure = erase(pipe, ["cat", "dog"], method=method, preset=preset, published=True, training=run, **few)
    settings = erasure.config.method.settings
    assert (settings["trajectories"], settings["batch_size"], settings["learning_rate"]) == (0, 1, 1e-4)
    assert [concept.anchor for concept in erasure.concepts] == ["", ""]


def test_a_loaded_erasure_is_off_while_another_is_trained(pipe: Any) -> None:
    pipe.load_erasure(whole("student"))
    assert make(pipe).to_files() == whole().to_files()


# ------------------------------------------------------------------------------------------------ samples, memory


def test_sample_images(pipe: Any, tmp_path: Path) -> None:
    run = TrainingRun(checkpoint_dir=tmp_path, sample_every=3, sample_prompts=("cat", "a dog"), progress=False)
    erasure = erase(pipe, "cat", training=run, **{**SMALL, **KINDS["base"]})
    sheets = sorted((tmp_path / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-0000003.png", "step-0000006.png"]
    first, second = (Image.open(sheet).convert("RGB") for sheet in sheets)
    assert first.size == second.size and first.tobytes() != second.tobytes()
    assert erasure.to_files() == whole().to_files()  # samples do not change the run


def test_released_components_leave_and_the_erasure_knows_them(pipe: Any) -> None:
    fingerprint = whole().config
    run = TrainingRun(release=True, progress=False)
    erasure = erase(pipe, "cat", training=run, **{**SMALL, **KINDS["base"]})
    assert pipe.text_encoder is None and pipe.vae is None
    assert erasure.config == fingerprint and "text_encoder" in erasure.config.layers[0].derived_from


def test_files_of_a_checkpoint_are_whole_or_not_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new", {"a": 1}, {})
    assert checkpoints.steps() == [] and checkpoints.latest() is None
    for step in (1, 2, 30):
        checkpoints.save(step, {"x": torch.full((2,), float(step))}, {"note": step})
    assert checkpoints.steps() == [2, 30]
    tensors, state = checkpoints.latest() or ({}, {})
    assert tensors["x"].tolist() == [30.0, 30.0] and state == {"note": 30, "step": 30}
    (tmp_path / "new" / "checkpoint-0000099.safetensors.part").write_text("half")
    assert checkpoints.steps() == [2, 30]
