"""The algebra of low-rank edits `D^T A` and `B A`: all of it on the factors, in float64, without the product."""

from collections.abc import Mapping

import torch


DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # what the names of a LoRA's factors end in
ROUNDING = 1e-13  # singular values below this share of the largest are rounding, not edit
HALVES = 2  # text encoders whose rows lie side by side; more groups than that are a sparse matrix's own
Factors = tuple[torch.Tensor, torch.Tensor]


def product(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The SVD `u [m, k], s [k], vh [k, C]` of `left [m, n] @ right [n, C]`, without the product where n is small."""
    if right.shape[0] >= min(left.shape[0], right.shape[1]):
        u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
        return u, s, vh
    q_l, r_l = torch.linalg.qr(left)
    q_r, r_r = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_l @ r_r.T, full_matrices=False)
    return q_l @ u, s, vh @ q_r.T


def blocks(a: torch.Tensor) -> list[tuple[torch.Tensor, slice]]:
    """The rows of `a` [n, C] in groups that share no column, exact zeros left out: for each its rows and its columns.

    SDXL's edits that act on each text encoder's half of a row by itself have one a half; most edits have one.
    """
    nonzero = a != 0
    used = nonzero.any(1)
    if not bool(used.any()):
        return [(torch.arange(len(a)), slice(0, a.shape[1]))]
    first, last = nonzero.int().argmax(1).tolist(), nonzero.flip(1).int().argmax(1).tolist()
    spans = sorted((first[i], a.shape[1] - last[i], i) for i in torch.nonzero(used)[:, 0].tolist())
    groups: list[tuple[int, int, list[int]]] = []
    for start, stop, row in spans:
        if groups and start < groups[-1][1]:
            before, end, rows = groups.pop()
            groups.append((before, max(end, stop), [*rows, row]))
        else:
            groups.append((start, stop, [row]))
    return [(torch.tensor(sorted(rows)), slice(start, stop)) for start, stop, rows in groups]


def svd(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`left @ right` as [`product`] gives it, where rows of `right` share no column ([`blocks`]) each group by itself.

    So each row of `vh` stays within the columns of one group, also where the result is truncated; `s` still falls, and what is
    left out adds up as with singular values.
    """
    groups = blocks(right)
    if len(groups) == 1:
        return product(left, right)
    parts = []
    for rows, columns in groups:
        own = left[:, rows]
        used = (own != 0).any(1)  # zeros of `left` stay exact too
        if not bool(used.any()):
            continue
        u, s, vh = product(own[used], right[rows][:, columns])
        whole_u, whole_vh = left.new_zeros(len(left), len(s)), right.new_zeros(len(s), right.shape[1])
        whole_u[used], whole_vh[:, columns] = u, vh
        parts.append((whole_u, s, whole_vh))
    if not parts:
        return left.new_zeros(len(left), 1), left.new_zeros(1), right.new_zeros(1, right.shape[1])
    s = torch.cat([part[1] for part in parts])
    order = torch.argsort(s, descending=True, stable=True)
    return torch.cat([part[0] for part in parts], 1)[:, order], s[order], torch.cat([part[2] for part in parts])[order]


def rank_for(s: torch.Tensor, rank: int | None, max_error: float | None) -> int:
    """The least rank that keeps the error within `max_error`, or all that is no rounding; at most `rank`."""
    kept = max(1, int((s > ROUNDING * s[0]).sum()))
    if max_error is not None:
        tail = s.square().flip(0).cumsum(0).flip(0)  # tail[r]: what is lost with the rank r
        kept = min(kept, max(1, int((tail > (max_error**2) * tail[0]).sum())))
    return kept if rank is None else min(kept, rank)


def heaviest(s: torch.Tensor, vh: torch.Tensor, rank: int | None, max_error: float | None) -> slice | list[int]:
    """The rows of `vh` that [`rank_for`] keeps: where they are in two groups ([`blocks`]), so many of each.

    Each half of an SDXL row is mapped by itself, so `rank` is that of each map and `max_error` a share of each, and a half that
    is lighter than the other keeps acting.
    """
    groups = blocks(vh)
    if len(groups) != HALVES:
        return slice(0, rank_for(s, rank, max_error))
    return sorted(i for rows, _ in groups for i in rows[: rank_for(s[rows], rank, max_error)].tolist())


def norm_without(values: torch.Tensor, kept: slice | list[int]) -> float:
    """The norm of what is left out where some of the singular values are kept."""
    if isinstance(kept, slice):
        return float(values[kept.stop :].norm())
    out = torch.ones(len(values), dtype=torch.bool)
    out[kept] = False
    return float(values[out].norm())


def compress(a: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write D^T A with as few rows as it has rank, the heaviest first, balanced between the two factors."""
    u, s, vh = svd(d.T, a)
    kept = heaviest(s, vh, None, None)
    root = s[kept].sqrt()
    return vh[kept] * root[:, None], (u[:, kept] * root).T


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give both factors a like magnitude, by a power of two (exact), so that neither overflows in half precision."""
    largest_a, largest_b = (torch.linalg.vector_norm(factor, float("inf")) for factor in (a, b))
    if not float(largest_a) or not float(largest_b):
        return a, b
    shift = float(torch.exp2((largest_b.log2() - largest_a.log2()).div(2).round()))
    return a * shift, b / shift


def truncated(
    a: torch.Tensor, d: torch.Tensor, rank: int | None, max_error: float | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`D^T A` with as few rows as wanted, and the relative error (Frobenius norm) of leaving the others out."""
    a, d = compress(a, d)
    values = a.norm(dim=1) * d.norm(dim=1)  # the singular values
    kept = heaviest(values, a, rank, max_error)
    whole = float(values.norm())
    return a[kept], d[kept], norm_without(values, kept) / whole if whole else 0.0


def pad_rank(factor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """Pad a factor with zeros to `rank` along `dim`: stock readers need one rank for all modules."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim).contiguous()


def norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """|BA| (Frobenius) without the product."""
    a, b = a.flatten(1), b.flatten(1)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())


def low_rank_error(exact: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Largest |B'A' - BA| / |BA| over the sites of a LoRA file (Frobenius norms, float64, no product formed).

    B'A' - BA = dB A' + B dA, so that its square is tr(dB^T dB A' A'^T) + 2 tr(dB^T B dA A'^T) + tr(B^T B dA dA^T).
    """
    worst = 0.0
    for name in exact:
        if not name.endswith(DOWN):
            continue
        partner = name.removesuffix(DOWN) + UP
        a, b = exact[name].double().flatten(1), exact[partner].double().flatten(1)
        a2, b2 = other[name].double().flatten(1), other[partner].double().flatten(1)
        da, db, gram = a2 - a, b2 - b, b.T @ b
        terms = (db.T @ db) * (a2 @ a2.T) + 2 * (db.T @ b) * (a2 @ da.T) + gram * (da @ da.T)
        square, whole = float(terms.sum()), float((gram * (a @ a.T)).sum())
        if whole > 0:
            worst = max(worst, max(square, 0.0) ** 0.5 / whole**0.5)
    return worst


def written(a: torch.Tensor, b: torch.Tensor, rank: int | None, max_error: float | None) -> tuple[Factors, float]:
    """`B A` as it is written: truncated where that is asked for, balanced, in float32; and the relative error of that."""
    error = 0.0
    # More rows than the matrix has rank (many rows of a window) are written as fewer, exactly.
    if rank is not None or max_error is not None or len(a) > min(a.shape[1], b.shape[0]):
        u, s, vh = svd(b, a)
        kept = heaviest(s, vh, rank, max_error)
        lost, whole = norm_without(s, kept), float(s.norm())
        error = lost / whole if whole else 0.0
        a, b = vh[kept], u[:, kept] * s[kept]
    a, b = balanced(a, b)
    rounded = a.float().contiguous(), b.float().contiguous()
    return rounded, error + cast_error((a, b), rounded)


def cast_error(exact: Factors, rounded: Factors) -> float:
    """Relative error |B'A' - BA| / |BA| of writing factors in float32: exact for small ranks.

    For larger ones, where that costs more than the edit itself, it is estimated from what both make of 32 random rows.
    """
    if len(exact[0]) <= 64:
        return low_rank_error(dict(zip((DOWN, UP), exact, strict=True)), dict(zip((DOWN, UP), rounded, strict=True)))
    width = exact[0].shape[1]
    probes = torch.randn(width, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = exact[1] @ (exact[0] @ probes)
    return float(
        (rounded[1].double() @ (rounded[0].double() @ probes) - image).norm() / image.norm().clamp_min(1e-300)
    )
