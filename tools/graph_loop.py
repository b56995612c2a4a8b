"""The training loop: steps of one shape without a wait for the GPU, there as one CUDA graph; for a time or some steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


logger = logging.getLogger(__name__)

_WARM_UP = 0.03  # share of the run in which the learning rate rises; it falls as a cosine after it
_FRESH_AVERAGE = 0.4  # share of the run after which the average begins anew, as the weights before it were poor
_LOOK_EVERY = 20  # steps between looks at the clock


@dataclass(frozen=True)
class LoopSettings:
    """
    How long and how fast is trained.

    Args:
        seconds (`float`): The run ends after this time, with the schedule's end.
        steps (`int`, *optional*): It ends after so many steps at the latest.
        learning_rate (`float`): The peak.
        decay (`float`): Of the moving average of the weights.
        graph (`bool`): Whether a GPU runs a step as one CUDA graph.
    """

    seconds: float = 220.0
    steps: int | None = None
    learning_rate: float = 1.5e-3
    decay: float = 0.999
    graph: bool = True


def train(modules: Sequence[nn.Module], loss: Callable[[], torch.Tensor], settings: LoopSettings) -> dict[str, float]:
    """
    Minimise a loss with AdamW; at the end the weights are their moving average.

    Args:
        modules (sequence of `nn.Module`): What is trained, on its device.
        loss (`Callable[[], torch.Tensor]`): Draws a batch on the device and returns its loss; it may not wait for it.
        settings ([`LoopSettings`]): For how long.

    Returns:
        `dict[str, float]`: `steps`, `seconds`, and the `loss`, averaged over the last steps.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    # A tensor, so that a captured step sees each new value.
    rate = torch.tensor(1e-6, device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, weight_decay=1e-3, betas=(0.9, 0.99), capturable=on_gpu, fused=on_gpu or None
    )
    averages = [parameter.detach().clone() for parameter in parameters]
    average = get_ema_multi_avg_fn(settings.decay)
    mean = torch.zeros((), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            average(averages, [each.detach() for each in parameters], 0)
            mean.mul_(0.98).add_(value.detach(), alpha=0.02)

    run = _captured(step, optimizer) if on_gpu and settings.graph else step
    began, done, fresh = time.perf_counter(), 0, False
    while True:
        gone = (time.perf_counter() - began) / settings.seconds
        gone = min(1.0, max(gone, done / settings.steps if settings.steps else 0.0))
        if done % _LOOK_EVERY == 0 or gone == 1:
            if on_gpu:
                torch.cuda.synchronize()  # or the clock runs behind what is queued
            rising = gone / _WARM_UP
            falling = 0.5 * (1 + math.cos(math.pi * (gone - _WARM_UP) / (1 - _WARM_UP)))
            rate.fill_(settings.learning_rate * (rising if rising < 1 else falling) + 1e-6)
            if gone > _FRESH_AVERAGE and not fresh:
                fresh = True
                _copy(parameters, averages)
        if done % 1000 == 0:
            logger.info("step %d, %.0f %% gone, loss %.4f", done, 100 * gone, mean.item())
        if gone == 1:
            break
        run()
        done += 1
    _copy(averages, parameters)
    return {"steps": done, "seconds": time.perf_counter() - began, "loss": mean.item()}


@torch.no_grad()
def _copy(source: Sequence[torch.Tensor], to: Sequence[torch.Tensor]) -> None:
    for one, other in zip(source, to, strict=True):
        other.copy_(one)


def _captured(step: Callable[[], None], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The step as one CUDA graph. Some steps are run before it, as the libraries set themselves up in their first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    return graph.replay
