"""Training and closed forms do not wait for an accelerator: what would is counted on a CPU, by `benchmarks/waits.py`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.waits import DEVICE, ESD, Pretended, total, waits_of_a_fit, waits_of_steps
from diffusers_erasure import ErasureTrainingError, erase
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.denoising.sampler import placed
from diffusers_erasure.training import TrainingRun, loop
from diffusers_erasure.training.loop import READ_EVERY
from tests.test_benchmarks import run


def test_expanded_tensors_are_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value for a batch shares its memory, and torch pins no such tensor."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self, raising=False)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self, raising=False)
    found = placed(torch.ones(1).expand(4), torch.device("cuda"))
    assert found is pinned[0] and found.is_contiguous() and found.tolist() == [1.0] * 4


def test_what_is_counted() -> None:
    """Values that are read, searched for, and copied; on the host nothing waits."""
    linear, host = nn.Linear(3, 3), torch.arange(9.0).view(3, 3)
    with Pretended(linear) as mode:
        assert linear.weight.device == DEVICE and host.device == torch.device("cpu")
        float(host.sum()), host.tolist(), host.to("cpu"), host[host > 1], host.nonzero()
        assert not mode.counts
        found = linear(placed(host, linear.weight.device))
        assert found.device == DEVICE and mode.counts == {"copy": 1} and total(mode.counts) == 0
        for number, wait in enumerate(
            (
                lambda: float(found.detach().sum()),
                lambda: found.sum().item(),
                lambda: bool(found.isfinite().all()),
                lambda: found.cpu(),
                lambda: found[0].tolist(),
                lambda: found.nonzero(),
                lambda: found[found > 0],
                lambda: found[[0, 2]],
                lambda: host.to(found.device),
                lambda: torch.tensor([1.0], device=found.device),
            ),
            start=1,
        ):
            wait()
            assert total(mode.counts) == number, number
        kept = found.cpu()
        before = total(mode.counts)
        assert kept.device == torch.device("cpu") and kept.tolist() and total(mode.counts) == before


@pytest.mark.parametrize("name", ESD)
def test_a_step_of_training_waits_for_nothing(pipe: Any, name: str) -> None:
    """Only every tenth reads the losses, all at once."""
    found = waits_of_steps(pipe, "cpu", "cat", "dog", READ_EVERY, **{**ESD[name], "num_inference_steps": 3})
    found.pop("copy")
    assert sum(found.values()) * READ_EVERY == 1, found


def test_a_fit_of_uce_reads_what_it_computes_with(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight of the projections once, and else two fingerprints, a checksum and some lists of rows, however long."""
    monkeypatch.setenv("DIFFUSERS_ERASURE_CACHE", str(tmp_path))
    found = waits_of_a_fit(pipe, "cpu", "cat", "dog")
    assert found["read"] <= len(text_readers(pipe)) + 10, found


def test_losses_are_read_before_anything_is_saved(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not finite is found a few steps later, and told by its number; the checkpoint before is good."""
    losses, steps = loop.Trainer._loss, list[int]()

    def broken(self: Any, step: Any) -> torch.Tensor:
        steps.append(1)
        return losses(self, step) * (float("nan") if len(steps) == 13 else 1.0)

    monkeypatch.setattr(loop.Trainer, "_loss", broken)
    run = TrainingRun(checkpoint_dir=tmp_path, checkpoint_every=12, progress=False)
    with pytest.raises(ErasureTrainingError, match=r"step 13 is not finite.*good checkpoint is of step 12"):
        few = {"trajectories": 2, "num_inference_steps": 3, "rank": 2, "accumulation": 1}
        erase(pipe, "cat", method="esd", training=run, steps=40, **few)
    assert len(steps) == 20
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-0000012.safetensors"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command(tmp_path: Path) -> None:
    numbers = run("waits", tmp_path)
    for name in ESD:
        assert 0 < total(numbers[name]) < 1
