"""Projection: the directions in which the targets differ from their anchors are taken out of all text rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from diffusers_erasure import Erasure, MethodDeclaration
from diffusers_erasure.base_model import describe_base
from diffusers_erasure.encoding import last_rows
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.schema import Concept, Method
from diffusers_erasure.settings import Number, check_settings


METHOD = MethodDeclaration(
    name="projection",
    module=__name__,
    summary="Projection: takes the targets' directions out of all text rows; seconds, no training",
    families=("stable-diffusion", "stable-diffusion-xl"),
    needs="text encoders",
    makes=("text_map",),
    instead_of_retain="It spares the rest by taking out no more than one direction a concept.",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the projection.

    Args:
        amount (`float`, *optional*, defaults to 1.0): how much of each direction is taken out; 1 is all of it.
    """

    amount: Annotated[float, Number(above=0)] = 1.0

    def __post_init__(self) -> None:
        check_settings(self)


def directions(targets: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows [n, C] that span the differences of paired rows [c, C]."""
    _, sizes, rows = torch.linalg.svd(targets - anchors, full_matrices=False)
    return rows[sizes > 1e-6 * sizes[0]]


def fit(pipe: Any, concepts: Sequence[Concept], config: Config) -> Erasure:
    """Make the erasure: a text map `x + (x A^T) D` with A = V and D = -amount V."""
    targets = last_rows(pipe, [str(concept.target) for concept in concepts])
    anchors = last_rows(pipe, [concept.anchor or "" for concept in concepts])
    v = directions(targets.double(), anchors.double())
    base = describe_base(pipe)
    tensors = {"A": v, "D": -config.amount * v}
    layer = Layer("text_map", ("encoder_hidden_states",), tensors, derived_from=base.text_components)
    method = Method("projection", {"amount": config.amount})
    return Erasure.from_layers([layer], base=base, concepts=concepts, method=method)
