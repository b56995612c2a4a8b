"""A layer of an erasure as its maker gives it: what it is and its tensors, before it has a place in a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Layer:
    """One layer of an erasure and its tensors.

    Attributes:
        kind: a layer kind of this library, such as `"lora"` or `"text_map"`.
        sites: the modules (or named inputs) of the component on which it acts.
        tensors: by the names that the kind knows, without a prefix.
        component: the pipeline's component on which it acts.
        derived_from: components whose weights the tensors were computed from; another one there is an error.
        schedule: strength by timestep and site, a table [bins, sites], or [bins] or [bins, 1] for all sites.
        span: the timesteps from 0 to `span` are divided into the schedule's bins.
    """

    kind: str
    sites: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    component: str = "unet"
    derived_from: tuple[str, ...] = ()
    schedule: torch.Tensor | None = field(default=None, repr=False)
    span: float = 1000.0
