"""SPEED's algebra for one layer, in factored form: which retained rows count, their null space, and the edit in it.

Notation as in [`speed`]: targets E, anchors G, D = G - E [n, C] of c concepts; retained R [N, C]; invariants K [k, C];
a weight W [o, C]. Everything is float64. No C x C matrix is inverted, and nothing of W's size is formed but W D^T.
"""

from dataclasses import dataclass

import torch


THIN = 0.65  # of the width: with more rows than that one eigendecomposition of all of Sigma is faster


@dataclass(frozen=True)
class Influence:
    """How strongly the edit alone (without anything retained) would change a row x: |W_e x|^2 = y^T H y, y = coordinates(x).

    W_e = W (S_at - S_tt)(u I + S_tt)^-1 = B Y with B = W D^T and Y = (c u I + E E^T)^-1 E, H = B^T B; u = 1 as published.
    """

    targets: torch.Tensor
    factor: torch.Tensor

    @classmethod
    def of(cls, targets: torch.Tensor, concepts: int, unit: float) -> "Influence":
        gram = targets @ targets.T
        gram.diagonal().add_(concepts * unit)
        return cls(targets, torch.linalg.cholesky(gram))

    def coordinates(self, rows: torch.Tensor) -> torch.Tensor:
        """`y` of each row: [n, N]."""
        return torch.cholesky_solve(self.targets @ rows.T, self.factor)


@dataclass(frozen=True)
class Prior:
    """The refined retain set of a layer: kept rows X, and of the augmented ones x + z v only sums.

    Sigma = (X^T diag(weights) X + m v^T + v m^T + square v v^T) / count, with m = X^T first.

    Attributes:
        rows: X [M, C].
        weights: how often each row counts [M]: once, and once for each of its augmentations that was kept.
        first: sum of z over these [M].
        square: sum of z^2 over all of them.
        count: rows and kept augmentations.
        v: the direction [C]; `None` where nothing was augmented.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    first: torch.Tensor
    square: float
    count: int
    v: torch.Tensor | None = None


def refine(
    retain: torch.Tensor,
    coordinates: torch.Tensor,
    gram: torch.Tensor,
    *,
    filter: bool,
    v: torch.Tensor | None = None,
    v_coordinates: torch.Tensor | None = None,
    draws: torch.Tensor | None = None,
    chunk: int = 128,
) -> Prior:
    """Influence-based prior filtering (IPF) and directed prior augmentation (DPA).

    Args:
        retain: R [N, C], shuffled.
        coordinates: `Influence.coordinates(R)` [n, N].
        gram: H = (W D^T)^T (W D^T) [n, n].
        filter: keep the rows that the edit would change by more than the mean.
        v: W's least singular direction [C], with its coordinates [n, 1]; `None` for no augmentation.
        draws: z [times, N]: each kept row x is also taken as x + z v. Kept of these are the ones that the edit would change
            by more than the mean over their chunk of kept rows.
        chunk: rows in a chunk.
    """
    images = gram @ coordinates
    q0 = (coordinates * images).sum(0).clamp_min(0)
    norms = q0.sqrt()
    kept = norms > norms.mean() if filter else torch.ones(len(retain), dtype=torch.bool)
    x = retain[kept]
    once = torch.ones(len(x), dtype=x.dtype)
    if v is None or v_coordinates is None or draws is None or not len(x):
        return Prior(x, once, 0 * once, 0.0, len(x))
    # |W_e (x + z v)|^2 is a quadratic in z.
    q1 = 2 * (v_coordinates.T @ images)[0, kept]
    q2 = float((v_coordinates * (gram @ v_coordinates)).sum())
    z = draws[:, kept]
    moved = (q0[kept] + z * q1 + z.square() * q2).clamp_min(0).sqrt()
    chosen = torch.cat([part > part.mean() for part in moved.split(chunk, dim=1)], dim=1)
    square = float((z.square() * chosen).sum())
    return Prior(x, once + chosen.sum(0), (z * chosen).sum(0), square, len(x) + int(chosen.sum()), v)


def kept_directions(prior: Prior, threshold: float, relative: bool, extra: torch.Tensor | None = None) -> torch.Tensor:
    """Orthonormal directions [C, r] of Sigma with an eigenvalue of at least `threshold`.

    Where `relative` these are times its trace, and at most half of all directions, those with the largest.

    `extra` [C, C] is added to Sigma: the second moment of further rows.
    """
    x, width = prior.rows, prior.rows.shape[1]
    if not len(x) and extra is None:
        return x.new_zeros(width, 0)
    if len(x) + 1 < THIN * width and extra is None:
        # A thin set: Sigma = Y^T K Y with Y = [X; v], so that its eigenvectors lie in the span of Y.
        y, core = x, torch.diag(prior.weights)
        if prior.v is not None:
            y = torch.cat([x, prior.v[None]])
            last = x.new_full((1, 1), prior.square)
            core = torch.cat([torch.cat([core, prior.first[:, None]], 1), torch.cat([prior.first[None], last], 1)])
        q, r = torch.linalg.qr(y.T)
        values, vectors = torch.linalg.eigh(r @ core @ r.T / prior.count)
        vectors = q @ vectors
    else:
        sigma = (x.T * prior.weights) @ x
        if prior.v is not None:
            cross = torch.outer(x.T @ prior.first, prior.v)
            sigma += cross + cross.T + prior.square * torch.outer(prior.v, prior.v)
        sigma = sigma / max(1, prior.count)
        values, vectors = torch.linalg.eigh(sigma if extra is None else sigma + extra)
    if not relative:
        return vectors[:, values >= threshold]
    found = vectors[:, values >= threshold * float(values.sum())]
    return found[:, -(width // 2) :]


def edit(
    targets: torch.Tensor, kept: torch.Tensor, invariants: torch.Tensor, concepts: int, *, ridge: float, lamb: float
) -> torch.Tensor:
    """The edit in the null space: `A` [n, C] with dW = W D^T A / c.

    With P = I - U U^T and M = (E^T E / c P + ridge I)^-1:  A = E P (I - M K (K^T P M K + lamb I)^-1 K^T P) M.

    Args:
        targets: E [n, C].
        kept: U [C, r], directions in which nothing may change.
        invariants: K^T [k, C], rows that stay exactly where they are (`lamb=0`).
        concepts: c.
        ridge: weight of a small change.
        lamb: softens the invariance.
    """
    e, k = targets, invariants
    pe, pk = e - (e @ kept) @ kept.T, k - (k @ kept) @ kept.T
    inner = pe @ pe.T
    inner.diagonal().add_(concepts * ridge)
    factor = torch.linalg.cholesky(inner)
    # G = P M = (P - P E^T inner^-1 E P) / ridge is symmetric, and E G = c inner^-1 E P.
    eg = concepts * torch.cholesky_solve(pe, factor)
    gk = (pk - (pk @ pe.T) @ torch.cholesky_solve(pe, factor)) / ridge
    constraint = k @ gk.T
    constraint = (constraint + constraint.T) / 2 + lamb * torch.eye(len(k), dtype=k.dtype)
    # An invariant that the null space leaves out anyway has only rounding here; that must not be inverted.
    noise = 1e-10 * float(k.square().sum()) / ridge
    return eg - (eg @ k.T) @ torch.linalg.pinv(constraint, atol=noise, rtol=1e-10, hermitian=True) @ gk


def centres_of(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """k-means centres of some rows [count, C] (Lloyd's algorithm, from rows drawn at random)."""
    count = min(count, len(rows))
    centres = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]
    for _ in range(100 if count else 0):
        nearest = torch.cdist(rows, centres).argmin(1)
        means = [rows[nearest == i].mean(0) if bool((nearest == i).any()) else centres[i] for i in range(count)]
        new = torch.stack(means)
        if torch.equal(new, centres):
            break
        centres = new
    return centres
