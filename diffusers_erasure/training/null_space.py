"""Null-space LoRA: the layers that read text are kept from reading what retained prompts have there.

A LoRA adds B A x to what a layer makes of x. With A v = 0 for all directions v that the rows of retained prompts lie in, it adds
nothing to these rows, whatever B is. So A is projected onto what is left of the space, A <- A - A V V^T, before the first step
and after each one. V [C, k] are right singular vectors of the retained rows R [N, C], by falling singular values s; those that
hold a given share of the energy, sum s^2.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import compat
from ..base_model import component, door_readers, family_of
from ..denoising.prompts import Prompts, encoded
from ..encoding import check_prompts
from ..errors import ErasureInputError
from ..low_rank import DOWN


# Of the longest row: what is left of a row below that is no direction of its own.
ROUNDING = float(torch.finfo(torch.float32).eps)
SEEN = 1e-5  # of its length: below that a LoRA cannot act on a target's row


@dataclass(frozen=True)
class Directions:
    """What of one input of a denoiser is protected.

    Attributes:
        vectors: V [C, k], orthonormal, float64.
        energy: share of the retained rows' energy that lies in them.
    """

    vectors: torch.Tensor
    energy: float

    @property
    def left(self) -> int:
        """How many directions a LoRA can still read."""
        return self.vectors.shape[0] - self.vectors.shape[1]

    def outside(self, rows: torch.Tensor) -> torch.Tensor:
        """What of some rows [N, C] is not protected; of longer ones, which text is only the beginning of, nothing behind it."""
        width = self.vectors.shape[0]
        own = rows[:, :width].to(self.vectors.dtype)
        found = torch.zeros_like(rows)
        found[:, :width] = (own - (own @ self.vectors) @ self.vectors.T).to(rows.dtype)
        return found


def triangle(parts: Iterable[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """A matrix R with R^T R = X^T X for rows X that come in parts, by QR so that no digit is lost; and the longest row's length."""
    reduced, waiting, longest = torch.empty(0), [], 0.0
    for rows in parts:
        waiting.append(rows)
        longest = max(longest, float(rows.norm(dim=1).max()))
        if sum(map(len, waiting)) >= rows.shape[1]:
            reduced, waiting = _joined(reduced, waiting), []
    return (_joined(reduced, waiting) if waiting else reduced), longest


def _joined(reduced: torch.Tensor, waiting: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = torch.cat([*([reduced] if len(reduced) else []), *waiting])
    return torch.linalg.qr(rows, mode="r").R


def directions(parts: Iterable[torch.Tensor], share: float) -> Directions:
    """The fewest directions that hold a share of the energy of some rows (float64); with 1 all in which there is any."""
    reduced, longest = triangle(parts)
    _, values, vectors = torch.linalg.svd(reduced, full_matrices=False)
    energy = values.square()
    within, behind = energy.cumsum(0), energy.flip(0).cumsum(0).flip(0)
    rank = int((behind > (ROUNDING * longest) ** 2).sum())
    count = min(rank, int((within < share * energy.sum()).sum()) + 1) if share < 1 else rank
    return Directions(vectors[:count].T.contiguous(), float(energy[:count].sum() / energy.sum()) if count else 1.0)


class NullSpace:
    """Keeps a student's LoRA from reading retained prompts.

    Args:
        protected: by parameter's name, what its layer must not read.
        diagnostics: what is told of it.
    """

    def __init__(self, protected: Mapping[str, Directions], diagnostics: Mapping[str, Any]) -> None:
        self.protected, self.diagnostics = dict(protected), dict(diagnostics)
        self.placed: dict[tuple[int, torch.device], Directions] = {}

    @torch.no_grad()
    def apply(self, factors: Mapping[str, nn.Parameter]) -> None:
        """Project the LoRA's factors."""
        for name, known in self.protected.items():
            factors[name].copy_(self._placed(known, factors[name].device).outside(factors[name]))

    def _placed(self, known: Directions, device: torch.device) -> Directions:
        """Where a factor is; once for all layers that read the same."""
        key = id(known), device
        if key not in self.placed:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.placed[key] = Directions(known.vectors.to(device, dtype), known.energy)
        return self.placed[key]


def text_readers(model: nn.Module, sites: Sequence[str]) -> dict[str, list[str]]:
    """Which of some layers read text as the denoiser is given it, by the name of what they read.

    Raises:
        ErasureInputError: none does.
    """
    doors = door_readers(model)
    found = {name: own for name, readers in doors.items() if (own := [site for site in sites if site in readers])}
    if not found:
        examples = [site for readers in doors.values() for site in list(readers)[:1]]
        raise ErasureInputError(
            "`null_space` acts on the layers that text enters by, but none of them is in the train set. Give a `train_set` that "
            f"has them, such as {examples!r}; or leave `null_space` out."
        )
    return found


def null_space(
    pipe: Any,
    share: float,
    sites: Sequence[str],
    prompts: Prompts,
    kept: Sequence[str],
    targets: Sequence[str],
) -> NullSpace:
    """Find what is protected.

    Args:
        pipe: the base model.
        share: of the retained rows' energy.
        sites: the layers that are trained.
        prompts ([`Prompts`]): encoded prompts; those of `kept` that are not among them are encoded here, and not kept.
        kept: retained prompts; the empty one is always protected.
        targets: prompts for which the student must change.

    Raises:
        ErasureInputError: no layer that is trained reads text; or nothing would be left, of the space or of the targets' rows.
    """
    family = family_of(pipe)
    model: Any = compat.unwrap_compiled(component(pipe, family.denoiser))
    readers = text_readers(model, sites)
    texts = list(dict.fromkeys(("", *kept)))
    check_prompts(pipe, [text for text in texts if text not in prompts.index], prompts.length)
    protected: dict[str, Directions] = {}
    diagnostics: dict[str, Any] = {}
    reached = False
    for name, own in readers.items():
        rows = Inputs(pipe, prompts, name == family.argument, model.dtype)
        known = directions(rows.of(texts), share)
        if not known.left:
            raise ErasureInputError(
                f"`null_space` is {share:g}, but the rows of {len(texts)} retained prompts (the empty one among them) have "
                f"{'all' if share == 1 else 'that share'} of their energy in no fewer than all {len(known.vectors)} directions, so "
                "that nothing could change. Retain fewer prompts, or give a smaller share, such as 0.9999."
            )
        of_targets = torch.cat(list(rows.of(dict.fromkeys(targets))))
        outside = known.outside(of_targets)
        reached |= bool((outside.norm(dim=1) > SEEN * of_targets.norm(dim=1)).any())
        protected |= dict.fromkeys((site + DOWN for site in own), known)
        diagnostics[name] = {
            "layers": len(own),
            "prompts": len(texts),
            "energy": float(f"{known.energy:.6g}"),
            "directions": known.vectors.shape[1],
            "left": known.left,
            "of_targets": float(f"{float(outside.square().sum() / of_targets.square().sum()):.3g}"),
        }
    if not reached:
        raise ErasureInputError(
            f"`null_space` is {share:g}, but all rows of the targets lie where those of retained prompts do, so that no layer that "
            "reads text could tell them apart. Retain other prompts, or give a smaller share, such as 0.9999."
        )
    return NullSpace(protected, diagnostics)


class Inputs:
    """What the denoiser reads of prompts, in its own dtype, as float64: text rows, or the pooled vector as one row."""

    def __init__(self, pipe: Any, prompts: Prompts, is_rows: bool, dtype: torch.dtype) -> None:
        self.pipe, self.prompts, self.is_rows, self.dtype = pipe, prompts, is_rows, dtype

    def of(self, texts: Iterable[str]) -> Iterator[torch.Tensor]:
        """One prompt after another, [L, C] or [1, p]."""
        for text in texts:
            number = self.prompts.index.get(text)
            if number is None:
                both = encoded(self.pipe, [text], self.prompts.length)
                found = both[0 if self.is_rows else 1][0]
            else:
                known = self.prompts.rows if self.is_rows else self.prompts.pooled
                assert known is not None
                found = known[number]
            yield found.reshape(-1, found.shape[-1]).cpu().to(self.dtype).double()
