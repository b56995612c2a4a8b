"""All but One, as reconstructed: its loss by hand, and runs on all families."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_erasure import erase
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.methods import abo
from diffusers_erasure.training import TrainingRun
from diffusers_erasure.training.objective import RETAIN, STUDENT, Step
from diffusers_erasure.training.pool import Drawn, Example
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import tiny_sd_pipe, tiny_sdxl_pipe


FEW: dict[str, Any] = {
    **{"steps": 6, "rank": 2, "num_inference_steps": 3, "trajectories": 3, "batch_size": 2, "accumulation": 1},
    **{"learning_rate": 1e-2, "templates": "none", "compare": False, "training": TrainingRun(progress=False)},
}


def test_the_loss_by_hand_and_what_moves_what() -> None:
    """In float64: the guided term has no gradient on the unconditional branch, the held one none on the conditional."""
    generator = torch.Generator().manual_seed(1)
    student, free, base, instead = (
        torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    student.requires_grad_()
    free.requires_grad_()
    step: Any = SimpleNamespace(
        teacher=lambda *roles: [{abo.UNCONDITIONAL: base, abo.ALTERNATIVE: instead}[role] for role in roles],
        students=lambda *roles: [{STUDENT: student, abo.UNCONDITIONAL: free}[role] for role in roles],
    )
    guided = (student - free - (instead - base)).detach()
    held = (free - base).detach()
    loss = abo.Objective(0.5).loss(step)
    expected = guided.square().flatten(1).mean(1) + 0.5 * held.square().flatten(1).mean(1)
    assert float((loss - expected).abs().max()) < 1e-14
    slopes = torch.autograd.grad(loss.sum(), [student, free])
    size = student[0].numel()
    assert float((slopes[0] - 2 * guided / size).abs().max()) < 1e-14
    assert float((slopes[1] - held / size).abs().max()) < 1e-14


def test_all_roles_and_what_is_retained_pass_the_network_once() -> None:
    """Each gets its own rows of the one batch."""
    asked: list[list[str]] = []

    def passed(latents: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        asked.append(list(prompts))
        marks = torch.tensor([float(len(prompt)) for prompt in prompts])
        return latents + marks[:, None, None, None]

    network: Any = SimpleNamespace(student=passed, model=SimpleNamespace(device=torch.device("cpu")))
    zeros, times = torch.zeros(2, 1, 2, 2), torch.zeros(2)
    drawn = Drawn(zeros, times, [Example({STUDENT: "abc", abo.UNCONDITIONAL: ""})] * 2)
    retained = Drawn(zeros, times, [Example({RETAIN: "retained"})] * 2, {RETAIN: zeros})
    step = Step(network, drawn, retained)
    student, free = step.students(STUDENT, abo.UNCONDITIONAL)
    assert asked == [["abc", "abc", "", "", "retained", "retained"]]
    assert bool((student == 3).all()) and not free.any()
    assert step.retain_loss().tolist() == [64.0, 64.0]
    assert step.students(STUDENT, abo.UNCONDITIONAL)[0] is not None and len(asked) == 1


@pytest.mark.parametrize("make", [tiny_sd_pipe, tiny_sdxl_pipe, tiny_sd3_pipe, tiny_flux_pipe])
def test_it_runs_on_all_families_and_says_what_it_is(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    with accelerate_state_restored():
        pipe = make()
        found = erase(pipe, ["cat", "bird"], anchors=["dog", ""], method="abo", retain=["dog"], **FEW)
    assert "experimental reconstruction" in caplog.text
    assert found.config.layers[0].kind == "lora" and len(found.config.diagnostics["loss"]) == 6
    pipe.load_erasure(found)
