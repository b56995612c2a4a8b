"""The training loop of autoencoder and judge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from diffusers.utils.logging import tqdm
from torch import nn


logger = logging.getLogger(__name__)


def train(
    name: str,
    modules: Sequence[nn.Module],
    loss: Callable[[], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    accelerator: Accelerator,
    weight_decay: float = 0.01,
) -> list[float]:
    """
    Minimise a loss with AdamW under a one-cycle schedule.

    Args:
        name (`str`): The name of the stage in the progress bar and the log.
        modules (sequence of `nn.Module`): What is trained, already on the accelerator's device.
        loss (`Callable[[], torch.Tensor]`): Draws a batch and returns its loss.
        steps (`int`): Optimiser steps.
        learning_rate (`float`): The peak of the schedule.
        accelerator ([`~accelerate.Accelerator`]): Where to compute.
        weight_decay (`float`, *optional*, defaults to 0.01): AdamW's.

    Returns:
        `list[float]`: The loss of each step.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
    # One step more than is taken: at its very end the schedule would stand still.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    for module in modules:
        module.train()
    losses = []
    log_every = max(1, steps // 20)
    progress = tqdm(range(steps), desc=name, mininterval=1.0)
    for step in progress:
        value = loss()
        accelerator.backward(value)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(value.item())
        if (step + 1) % log_every == 0:
            mean = sum(losses[-log_every:]) / log_every
            progress.set_postfix(loss=f"{mean:.4f}")
            logger.info("%s: step %d of %d, loss %.4f", name, step + 1, steps, mean)
    for module in modules:
        module.eval()
    return losses
