"""SPEED and RECE as published: dense formulas in the published order of steps, in float64.

The fitting code uses factored forms of the same algebra and is checked against these functions, which therefore share
nothing with it. Rows of text are rows, [n, C]; a weight is [o, C] and acts as W x. Nothing here is fast on purpose:
`dense_speed` also follows the published costs, so that a benchmark can time it (in float32, as published).
"""

import torch
from torch import Tensor


def gram(rows: Tensor) -> Tensor:
    """The sum of x x^T over the rows, by one outer product for each: [k, C] -> [C, C], through a [k, C, C] tensor."""
    return (rows[:, :, None] * rows[:, None, :]).sum(0)


def published_direction(w: Tensor) -> Tensor:
    """The last right-singular vector of the reduced svd, its largest entry made positive: [o, C] -> [C]."""
    v = torch.linalg.svd(w, full_matrices=False).Vh[-1]
    return v if v[v.abs().argmax()] > 0 else -v


def shift(rows: Tensor, change: Tensor) -> Tensor:
    """|change x| of each row x: [k, C], [o, C] -> [k]."""
    return (rows @ change.T).norm(dim=1)


def above_mean(values: Tensor) -> Tensor:
    """Which values exceed the mean of all of them: [k] -> bool [k]."""
    return values > values.mean()


def perturbed_rows(rows: Tensor, scalars: Tensor, v: Tensor, change: Tensor, batch: int) -> Tensor:
    """DPA of one chunk: x + z v for every row and draw, then those that `change` moves more than the chunk's mean.

    rows [k, C], scalars [times, k], v [C], change [o, C] -> [kept, C]
    """
    made, moved = [], []
    for some, drawn in zip(rows.split(batch), scalars.split(batch, dim=1), strict=True):
        for z in drawn:
            new = some + z[:, None] * v
            made.append(new)
            moved.append(shift(new, change))
    return torch.cat(made)[above_mean(torch.cat(moved))]


def null_space(
    retain: Tensor,
    change: Tensor,
    *,
    threshold: float,
    filter: bool,
    scalars: Tensor | None,
    v: Tensor | None,
    chunk: int,
    batch: int,
) -> Tensor:
    """Steps c to f for one layer: the projector P [C, C] on what the refined retain rows leave free.

    retain [N, C], change (the erasure alone, W_e) [o, C], scalars [times, N], v [C]. Without rows P is the identity,
    also where the filter leaves none (one row is never above its own mean).
    """
    width = retain.shape[1]
    kept = torch.arange(len(retain))
    if filter and len(retain):
        kept = kept[above_mean(shift(retain, change))]
    if not len(kept):
        return torch.eye(width, dtype=retain.dtype)

    total, count = torch.zeros(width, width, dtype=retain.dtype), 0
    for index in kept.split(chunk):
        rows = retain[index]
        if scalars is not None and v is not None and len(scalars):
            rows = torch.cat([rows, perturbed_rows(rows, scalars[:, index], v, change, batch)])
        total += gram(rows)
        count += len(rows)
    u, s, _ = torch.linalg.svd(total / count)
    small = u[:, s < threshold]
    return small @ small.T


def dense_speed(
    weights: dict[str, Tensor],
    targets: Tensor,
    anchors: Tensor,
    concepts: int,
    retain: Tensor,
    invariants: Tensor,
    *,
    threshold: float,
    ridge: float,
    lamb: float,
    filter: bool,
    draws: dict[str, Tensor] | None,
    directions: dict[str, Tensor] | None = None,
    chunk: int = 128,
    batch: int = 8,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """SPEED's change of each weight, name -> dW [o, C].

    Args:
        weights: name -> W [o, C].
        targets: E [n, C], paired with `anchors`.
        anchors: G [n, C].
        concepts: How many concepts the n rows belong to; the published means are over these.
        retain: [N, C], already shuffled; N may be 0.
        invariants: [k, C], the rows that must stay: SOT and the centres of the null prompt.
        threshold: Singular values of the retain covariance below it count as free.
        ridge: The `retain_scale` of the published code.
        lamb: Added to the diagonal of the invariants' k x k matrix. At 0 its pseudo-inverse is used, with a cut-off
            relative to the matrix itself; it cannot tell that all of the matrix is rounding error, as it is where P
            takes every invariant to zero. Give a positive `lamb` there, as the published settings do.
        filter: IPF, keep the retain rows that the erasure alone moves more than their mean.
        draws: name -> z [times, N], the scalars (randn . v) by the row's index in `retain`; None: no augmentation.
        directions: name -> v [C], of norm 1; None: `published_direction`.
        chunk: Retain rows for each DPA filter.
        batch: Retain rows for each mini-batch of perturbations.
        dtype: What it is computed in.
    """
    targets, anchors, retain, k2 = (t.to(dtype) for t in (targets, anchors, retain, invariants.T))
    s_tt = targets.T @ targets / concepts
    s_at = anchors.T @ targets / concepts
    eye = torch.eye(targets.shape[1], dtype=dtype)

    changes = {}
    for name, weight in weights.items():
        w = weight.to(dtype)
        erasure_only = w @ (s_at - s_tt) @ torch.linalg.inv(eye + s_tt)
        scalars = v = None
        if draws is not None and len(retain):
            scalars = draws[name].to(dtype)
            v = published_direction(w) if directions is None else directions[name].to(dtype)
        p = null_space(
            retain, erasure_only, threshold=threshold, filter=filter, scalars=scalars, v=v, chunk=chunk, batch=batch
        )
        m = torch.linalg.inv(s_tt @ p + ridge * eye)
        middle = k2.T @ p @ m @ k2  # [k, k], symmetric
        if lamb:
            inverse = torch.linalg.inv(middle + lamb * torch.eye(len(middle), dtype=dtype))
        else:
            # What P leaves out of K2 is only rounding here, of the order of |K2|^2 / ridge.
            noise = 1e-10 * float(k2.square().sum()) / ridge
            inverse = torch.linalg.pinv((middle + middle.T) / 2, hermitian=True, atol=noise, rtol=1e-10)
        q = eye - m @ k2 @ inverse @ k2.T @ p
        changes[name] = w @ (s_at - s_tt) @ p @ q @ m
    return changes


def uce_step(
    w: Tensor,
    targets: Tensor,
    anchors: Tensor,
    retain: Tensor,
    *,
    lamb: float,
    erase_scale: float,
    retain_scale: float,
) -> Tensor:
    """One closed-form UCE update of one weight, v* = W g: w [o, C], targets and anchors [n, C], retain [N, C]."""
    numerator, denominator = lamb * w, lamb * torch.eye(w.shape[1], dtype=w.dtype)
    for e, g in zip(targets, anchors, strict=True):
        numerator = numerator + erase_scale * torch.outer(w @ g, e)
        denominator = denominator + erase_scale * torch.outer(e, e)
    for r in retain:
        numerator = numerator + retain_scale * torch.outer(w @ r, r)
        denominator = denominator + retain_scale * torch.outer(r, r)
    return numerator @ torch.linalg.inv(denominator)


def adversarial_map(current: dict[str, Tensor], old: dict[str, Tensor], reg: float) -> Tensor:
    """P [C, C]: P x minimises sum |W c - W_old x|^2 + reg |c|^2 over c, the sum over all layers."""
    width = next(iter(old.values())).shape[1]
    left, right = reg * torch.eye(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for name, w in current.items():
        left = left + w.T @ w
        right = right + w.T @ old[name]
    return torch.linalg.inv(left) @ right


def dense_rece(
    weights: dict[str, Tensor],
    *,
    targets: Tensor,
    anchors: Tensor,
    retain: Tensor,
    concept_rows: Tensor,
    concept_anchors: Tensor,
    rece_retain: Tensor,
    uce: tuple[float, float, float],
    lamb: float,
    erase_scale: float,
    retain_scale: float,
    reg: float,
    epochs: int,
) -> dict[str, Tensor]:
    """RECE's edit, name -> dW [o, C].

    Args:
        weights: name -> W_old [o, C], all the K and V projections.
        targets: E [n, C] of the first UCE edit, paired with `anchors`.
        anchors: G [n, C].
        retain: [N, C], retained in that edit.
        concept_rows: X [m, C], all rows of every concept, paired with `concept_anchors`.
        concept_anchors: [m, C], the rows of their guides.
        rece_retain: [K, C], retained in the epochs.
        uce: lamb, erase_scale and retain_scale of the first edit.
        lamb: Of the epochs' steps, as are the two scales.
        erase_scale: Weight of the adversarial rows.
        retain_scale: Weight of `rece_retain`.
        reg: Ridge of the adversarial rows' closed form.
        epochs: How often adversarial rows are found and erased; all concepts at once.
    """
    old = {name: w.double() for name, w in weights.items()}
    first = {"lamb": uce[0], "erase_scale": uce[1], "retain_scale": uce[2]}
    current = {
        name: uce_step(w, targets.double(), anchors.double(), retain.double(), **first) for name, w in old.items()
    }

    guides, kept = concept_anchors.double(), rece_retain.double()
    step = {"lamb": lamb, "erase_scale": erase_scale, "retain_scale": retain_scale}
    for _ in range(epochs):
        adversarial = concept_rows.double() @ adversarial_map(current, old, reg).T
        current = {name: uce_step(w, adversarial, guides, kept, **step) for name, w in current.items()}
    return {name: w - old[name] for name, w in current.items()}
