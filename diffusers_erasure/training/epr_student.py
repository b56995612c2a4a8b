"""DuMo's networks as students: first the EPR beside the encoder, then, with it frozen, its schedule (TLMO)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import compat
from ..layers.buffers import placement
from ..layers.encoder_copy import empty_copy
from ..layers.epr import DOWN, EPR, LearnedSchedule, skip_sites
from ..layers.layer import Layer
from .whitening import Whitening


CHILD = "erasure_epr_in_training"  # of the UNet, so that several processes and optimisers find the parameters
TABLE = "table"


class _Epr:
    """What the two students share: a network that is attached to the UNet, on for the student and off for the teacher."""

    @contextmanager
    def _attached(self, unet: Any, epr: EPR) -> Iterator[None]:
        unet.add_module(CHILD, epr)
        epr.attach(unet)
        try:
            yield
        finally:
            epr.detach()
            compat.remove_child(unet, CHILD)

    def shuffle(self, *what: object) -> None:
        """Nothing in them is random."""

    def switch(self, unet: Any, on: bool) -> None:
        unet.get_submodule(CHILD).on = on


class EprStudent(_Epr):
    """The EPR, in training.

    Args:
        form: `"full"` or `"compact"`.
        rank: of the compact form's deltas.
        zero_rank: of the 1x1 convolutions; `None` for whole ones.
        seed: of the first values.
    """

    def __init__(self, form: str, rank: int, zero_rank: int | None, seed: int) -> None:
        self.form, self.rank, self.zero_rank, self.seed = form, rank, zero_rank, seed
        self.whitening = Whitening()

    def low_rank(self, unet: Any) -> Sequence[str]:
        """Of the compact form all Linears of the encoder."""
        if self.form == "full":
            return ()
        return [name for name, module in empty_copy(unet).named_modules() if isinstance(module, nn.Linear)]

    @contextmanager
    def inside(self, unet: Any) -> Iterator[dict[str, nn.Parameter]]:
        epr = EPR.fresh(unet, self.form, self.rank, self.zero_rank, self.seed)
        found: dict[str, nn.Parameter] = {}
        for name, value in epr.named_tensors().items():
            assert isinstance(value, nn.Parameter)
            found[name] = value
        for site, index in epr.sites.items():
            self.whitening.register(site, epr.deltas[index], "down")
        with self._attached(unet, epr):
            yield found

    def layer(self, tensors: Mapping[str, torch.Tensor]) -> Layer:
        sites = skip_sites(len({name.split(".")[1] for name in tensors if name.startswith("zero.")}) - 1)
        return Layer("skip", sites, self.whitening.applied(tensors, DOWN))


class ScheduleStudent(_Epr):
    """The table by timestep bin and site, in training, of an EPR that stays as it is.

    Args:
        network ([`Layer`]): the EPR.
        bins: rows of the table.
    """

    def __init__(self, network: Layer, bins: int) -> None:
        self.network, self.bins = network, bins
        self.whitening = Whitening()

    def low_rank(self, unet: Any) -> Sequence[str]:
        return ()

    @contextmanager
    def inside(self, unet: Any) -> Iterator[dict[str, nn.Parameter]]:
        device, _ = placement(unet, unet.conv_in)
        epr = EPR(unet, self.network.tensors, device, torch.float32)
        epr.schedule = LearnedSchedule(self.bins, len(epr.layer_sites)).to(device)
        with self._attached(unet, epr):
            yield {TABLE: epr.schedule.table}

    def layer(self, tensors: Mapping[str, torch.Tensor]) -> Layer:
        return dataclasses.replace(self.network, schedule=tensors[TABLE])
