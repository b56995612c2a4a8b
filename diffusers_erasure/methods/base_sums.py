"""What the closed-form methods need of a base model alone, computed once and then read from the cache."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from .. import cache
from ..base_model import plain_weight, readable_weight
from ..encoding import checksum


def _key(linears: Mapping[str, nn.Linear], widths: Iterable[int | str]) -> Callable[[], list[str | None]]:
    weights = ((name, readable_weight(linear, name)) for name, linear in linears.items())
    return lambda: [*map(str, widths), checksum(weights)]


def weight_gram(linears: Mapping[str, nn.Linear], width: int) -> torch.Tensor:
    """`sum W^T W` over some projections, of the first `width` columns: float64 [C, C]."""

    def make() -> dict[str, torch.Tensor]:
        total = torch.zeros(width, width, dtype=torch.float64)
        for name, linear in linears.items():
            weight = plain_weight(linear, name)[:, :width]
            total.addmm_(weight.T, weight)
        return {"gram": total}

    return cache.fetch("weights", _key(linears, [width]), make)["gram"]


def least_directions(linears: Mapping[str, nn.Linear], columns: Mapping[str, slice]) -> dict[str, torch.Tensor]:
    """For each projection, of its `columns` alone, the last right-singular vector of its reduced SVD [C], its largest entry positive."""

    def make() -> dict[str, torch.Tensor]:
        return {
            name: least_direction(plain_weight(linear, name)[:, columns[name]]) for name, linear in linears.items()
        }

    places = [f"{each.start}:{each.stop}" if each.start else each.stop for each in columns.values()]
    return cache.fetch("directions", _key(linears, places), make)


def least_direction(weight: torch.Tensor) -> torch.Tensor:
    """The last right-singular vector of the reduced SVD of W [o, C], from the eigenvectors of the smaller of W W^T and W^T W."""
    rows, columns = weight.shape
    if rows < columns:
        v = weight.T @ torch.linalg.eigh(weight @ weight.T).eigenvectors[:, 0]
        v = v / v.norm()
    else:
        v = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, 0]
    return v * torch.sign(v[v.abs().argmax()])
