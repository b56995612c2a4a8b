"""All that changes during a training run, and how it is saved and restored."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from .config import TrainSettings
from .network import Network
from .players import Players
from .pool import Source


class State:
    """The student, its optimiser, learning rate and moving average, and the losses so far.

    Args:
        network ([`Network`]): has the student.
        config ([`TrainSettings`]): the settings.
        sources: by name, where noisy latents come from.
        players ([`Players`], *optional*): who plays against the student.
    """

    def __init__(
        self,
        network: Network,
        config: TrainSettings,
        sources: Mapping[str, Source],
        players: Players | None = None,
    ) -> None:
        self.network, self.sources, self.players = network, dict(sources), players
        parameters = network.parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.steps,
        )
        self.ema = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None
        self.losses: list[float] = []
        self.unread: list[torch.Tensor] = []  # of the last steps, where the network is: to read one is to wait for it

    @property
    def step(self) -> int:
        """Optimiser steps so far."""
        return len(self.losses) + len(self.unread)

    def factors(self, which: str) -> dict[str, torch.Tensor]:
        """The parameters of the `"student"` or of its `"ema"` by name, float32, on the CPU."""
        values = self.ema.shadow_params if which == "ema" and self.ema is not None else self.network.parameters
        names = self.network.factors
        return {name: value.detach().float().cpu() for name, value in zip(names, values, strict=True)}

    def saved_pools(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All pools, as far as they are filled, for a file of their own."""
        tensors = {"nothing": torch.zeros(1)}  # a file has at least one tensor
        for name in self.sources:
            tensors.update(self._pool(name))
        return tensors, {"drawn_times": self._drawn_times()}

    def restore_pools(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Take what [`saved_pools`] gave."""
        for name in self.sources:
            self._restore_pool(name, tensors, values)

    def _pool(self, name: str) -> dict[str, torch.Tensor]:
        return {f"pool.{name}.{key}": value for key, value in self.sources[name].tensors().items()}

    def _restore_pool(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        prefix = f"pool.{name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        self.sources[name].restore(own, values["drawn_times"][name])

    def _drawn_times(self) -> dict[str, int]:
        return {name: source.drawn_times for name, source in self.sources.items()}

    def is_changing(self, name: str) -> bool:
        """Whether a pool follows the student."""
        return not self.sources[name].keep

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and plain values, but for the pools that never change."""
        tensors: dict[str, torch.Tensor] = {f"student.{name}": value for name, value in self.network.factors.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        for name, parameter in self.network.factors.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        if self.ema is not None:
            averages = zip(self.network.factors, self.ema.shadow_params, strict=True)
            tensors.update({f"ema.{name}": value for name, value in averages})
        tensors.update({} if self.players is None else self.players.saved())
        for name in self.sources:
            tensors.update(self._pool(name) if self.is_changing(name) else {})
        return tensors, {
            "schedule": self.schedule.state_dict(),  # plain values: diffusers' schedules are functions of the step
            "ema_step": None if self.ema is None else self.ema.optimization_step,
            "drawn_times": self._drawn_times(),
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Take what [`saved`] gave."""
        device = self.network.model.device
        self.losses, self.unread = tensors["losses"].tolist(), []
        with torch.no_grad():
            for name, parameter in self.network.factors.items():
                parameter.copy_(tensors[f"student.{name}"])
        if self.step:
            states = {
                index: {key: tensors[f"optimizer.{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                for index, name in enumerate(self.network.factors)
            }
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.schedule.load_state_dict(dict(values["schedule"]))
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.ema is not None:
            self.ema.optimization_step = values["ema_step"]
            self.ema.shadow_params = [tensors[f"ema.{name}"].to(device) for name in self.network.factors]
        if self.players is not None:
            self.players.restore(tensors)
        for name in self.sources:
            if self.is_changing(name):
                self._restore_pool(name, tensors, values)
