"""Whitened LoRA: the layers that text enters by read it in units of what retained prompts have there.

Text rows hardly differ: of their energy nearly all lies in a few directions that all prompts share, so that a step of the optimiser which
changes a target's row changes all others' as well. So the down matrix is trained as A = A' W, W = s (C / c + ridge I)^(-1/2), where C [C, C]
is the second moment of retained rows and c its mean eigenvalue: along what is common to them a step does little, along what they do not have
it does the more. It is what the ridge of a closed form does to a solution, done to the steps towards one; the LoRA A, B is an ordinary one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import compat
from ..base_model import component, door_readers, family_of
from ..denoising.prompts import Prompts
from ..encoding import check_prompts
from .null_space import Inputs


# What a target's prompt has of its own (the row that is farthest from the mean of the retained ones) is so many times as long as
# unwhitened: steps may be larger where they move the others less. Picked with the rates on the embedded model's development half.
GAIN = 7.0


class Whitened(nn.Module):
    """A parametrization [r, C] -> [r, C] by a fixed matrix W [C, C] at the right."""

    matrix: torch.Tensor

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values @ self.matrix


@dataclass(frozen=True)
class Whitening:
    """How the layers of a train set read text.

    Attributes:
        matrices: by layer's name, W [C, C], float32, on the CPU; layers that read the same share it.
        diagnostics: what is told of it, by the name of what is read.
    """

    matrices: Mapping[str, torch.Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def register(self, site: str, module: nn.Module, name: str) -> None:
        """Let a parameter [r, C] of a module, a down matrix, be what W is behind, where the layer reads text."""
        if site in self.matrices:
            matrix = self.matrices[site].to(getattr(module, name).device)
            parametrize.register_parametrization(module, name, Whitened(matrix))

    def applied(self, tensors: Mapping[str, torch.Tensor], down: str) -> dict[str, torch.Tensor]:
        """The values of what was trained as others read them, A = A' W; `down` ends the name of an A'."""
        read = {site + down: matrix for site, matrix in self.matrices.items()}
        return {name: value @ read[name] if name in read else value for name, value in tensors.items()}


def whitening_matrix(
    kept: Iterable[torch.Tensor], targets: Iterable[torch.Tensor], ridge: float
) -> tuple[torch.Tensor, float]:
    """W [C, C] for the rows [L, C] of each retained prompt and of each target's, float64; and in how many directions the retained ones
    lie, sum e / (e + ridge c) over the eigenvalues e of C. One prompt after another: of T5 all of them are gigabytes."""
    count, total, moment = 0, torch.zeros(()), torch.zeros(())
    for rows in kept:
        count, total, moment = count + len(rows), total + rows.sum(0), moment + rows.T @ rows
    center = total / count
    values, vectors = torch.linalg.eigh(moment / count)
    values = values.clamp(min=0)
    mean = values.mean()
    matrix = (vectors * (values / mean + ridge).rsqrt()) @ vectors.T
    plain, white = 0.0, 0.0
    for rows in targets:
        apart = rows - center
        plain += float(apart.square().sum(1).max())
        white += float((apart @ matrix).square().sum(1).max())
    scale = GAIN * math.sqrt(plain / white) if white else GAIN
    return matrix * scale, float((values / (values + ridge * mean)).sum())


def padded(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """W [C, C] for a layer that reads more than what it is for, behind that, as SDXL's sizes stand: [width, width]."""
    return torch.block_diag(matrix, torch.eye(width - len(matrix)))


def whitening(
    pipe: Any,
    ridge: float,
    sites: Sequence[str],
    prompts: Prompts,
    kept: Sequence[str],
    targets: Sequence[str],
) -> Whitening:
    """Find how text is read.

    Args:
        pipe: the base model.
        ridge: of the mean eigenvalue of the retained rows' second moment.
        sites: the layers that are trained; those that do not read text as the denoiser is given it are left as they are.
        prompts ([`Prompts`]): encoded prompts; those of `kept` that are not among them are encoded here, and not kept.
        kept: retained prompts; the empty one is always among them.
        targets: prompts for which the student must change.
    """
    family = family_of(pipe)
    model: Any = compat.unwrap_compiled(component(pipe, family.denoiser))
    doors = {name: {s: readers[s] for s in sites if s in readers} for name, readers in door_readers(model).items()}
    found = {name: own for name, own in doors.items() if own}
    if not found:
        return Whitening()
    texts = list(dict.fromkeys(("", *kept)))
    check_prompts(pipe, [text for text in texts if text not in prompts.index], prompts.length)
    matrices: dict[str, torch.Tensor] = {}
    diagnostics: dict[str, Any] = {}
    for name, own in found.items():
        rows = Inputs(pipe, prompts, name == family.argument, model.dtype)
        matrix, count = whitening_matrix(rows.of(texts), rows.of(dict.fromkeys(targets)), ridge)
        widened = {width: padded(matrix.float(), width) for width in {reader.in_features for reader in own.values()}}
        matrices |= {site: widened[reader.in_features] for site, reader in own.items()}
        diagnostics[name] = {"layers": len(own), "prompts": len(texts), "directions": float(f"{count:.3g}")}
    return Whitening(matrices, diagnostics)
