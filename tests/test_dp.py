"""Double Projections: what it promises exactly, what is left where rows leave no room, and its erasures."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_erasure import ErasureInputError, combine, demo, erase
from diffusers_erasure.low_rank import compress
from diffusers_erasure.methods import uce
from diffusers_erasure.methods.dp import left_over, solve
from diffusers_erasure.methods.rows import KeptRows, TargetRows
from diffusers_erasure.methods.uce import relative_units
from diffusers_erasure.schema import LORA_FILE, TENSOR_FILE
from tests.helpers import ROUNDINGS, edits, roundings
from tests.test_uce import live_rows


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


def random_rows(n: int, retained: int, width: int, seed: int) -> tuple[TargetRows, KeptRows]:
    generator = torch.Generator().manual_seed(seed)
    e, g, r = torch.randn(2 * n + retained, width, generator=generator, dtype=torch.float64).split([n, n, retained])
    squares = float(e.square().sum(1).mean())
    return TargetRows(e, g, (e, g), squares, n, n), KeptRows(r, e[:0], prompts=retained)


def dense(e: torch.Tensor, g: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """T = I + (C* - C) (B C)^+ B on columns, with B made of an inverse instead of an SVD."""
    eye = torch.eye(e.shape[1], dtype=torch.float64)
    b = eye - kept.T @ torch.linalg.inv(kept @ kept.T) @ kept
    return eye + (g - e).T @ torch.linalg.pinv(b @ e.T) @ b


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 6), retained=st.integers(0, 20), width=st.integers(32, 48), seed=st.integers(0, 2**31))
def test_targets_arrive_and_retained_rows_stay_exactly(n: int, retained: int, width: int, seed: int) -> None:
    """Wherever there are fewer rows than directions, and never more ranks than targets."""
    rows, kept = random_rows(n, retained, width, seed)
    solution = solve(rows, kept)
    a, d = solution.factors
    assert (rows.targets + (rows.targets @ a.T) @ d - rows.anchors).norm() <= 1e-12 * rows.anchors.norm()
    assert ((kept.retain @ a.T) @ d).norm() <= 1e-12 * kept.retain.norm()
    expected = dense(rows.targets, rows.anchors, kept.retain) - torch.eye(width, dtype=torch.float64)
    assert (d.T @ a - expected).norm() <= 1e-9 * expected.norm()
    assert (solution.kept, solution.width) == (retained, width) and len(compress(a, d)[0]) == n
    told = left_over(rows, kept, solution)
    assert told["target_residual"] <= 1e-12 and told["retained_residual"] <= 1e-12


def test_sums_over_retained_rows_are_as_good_as_the_rows() -> None:
    rows, kept = random_rows(2, 10, 32, seed=1)
    summed = KeptRows(kept.retain[:0], kept.null, kept.retain.T @ kept.retain, 10, 10)
    (a, d), (b, f) = (solve(rows, each).factors for each in (kept, summed))
    assert (d.T @ a - f.T @ b).norm() <= 1e-12 * (d.T @ a).norm()


@pytest.mark.parametrize("limit", [{"keep": 3}, {"threshold": 0.1}], ids=str)
def test_only_the_first_directions_are_kept(limit: dict[str, Any]) -> None:
    rows, kept = random_rows(2, 12, 16, seed=2)
    basis = torch.linalg.qr(kept.retain.T).Q.T
    heavy = KeptRows(basis * torch.tensor([10.0, 9, 8, *[1.0] * 9], dtype=torch.float64)[:, None], kept.null)
    solution = solve(rows, heavy, **limit)
    a, d = solution.factors
    moved = ((basis @ a.T) @ d).norm(dim=1)
    assert solution.kept == 3 and float(moved[:3].max()) <= 1e-12 < 0.01 < float(moved[3:].min())
    assert (rows.targets + (rows.targets @ a.T) @ d - rows.anchors).norm() <= 1e-12 * rows.anchors.norm()


def test_a_threshold_leaves_half_of_the_directions_free() -> None:
    """Also where what is retained spans them all, each alike."""
    rows, kept = random_rows(2, 0, 16, seed=3)
    full = KeptRows(torch.eye(16, dtype=torch.float64), kept.null)
    solution = solve(rows, full, threshold=1e-5)
    assert solution.kept == 8 and left_over(rows, full, solution)["target_residual"] < 1e-12


def test_the_ridge_holds_targets_back_and_nothing_else() -> None:
    rows, kept = random_rows(3, 5, 24, seed=3)
    a, d = solve(rows, kept, ridge=2.0).factors
    u = torch.linalg.qr(kept.retain.T).Q
    pe = rows.targets - rows.targets @ u @ u.T
    expected = torch.linalg.solve(pe @ pe.T + 2.0 * torch.eye(3, dtype=torch.float64), pe)
    assert (a - expected).norm() <= 1e-12 * expected.norm()
    assert ((kept.retain @ a.T) @ d).norm() <= 1e-12 * kept.retain.norm()
    exact, slow = (left_over(rows, kept, solve(rows, kept, ridge=r))["target_residual"] for r in (0.0, 1e3))
    assert exact < 1e-12 and 0.9 < slow < 1


@pytest.mark.parametrize("summed", [False, True])
def test_the_other_directions_are_weighed_as_uce_weighs_them(summed: bool) -> None:
    """With none kept it is UCE; with some kept, UCE among the maps that leave these alone."""
    rows, kept = random_rows(3, 8, 16, seed=6)
    scaled = kept.retain * torch.tensor([20.0, 20, *[1.0] * 6], dtype=torch.float64)[:, None]
    kept = KeptRows(scaled, kept.null, scaled.T @ scaled if summed else None, 8, 8)
    share, ridge = relative_units(rows, kept)[1], 0.5
    a, d = uce.solve(rows, kept, erase_scale=1.0, retain_scale=0.7 * share, lamb=ridge)
    none = solve(rows, kept, threshold=0.9, ridge=ridge, retain_scale=0.7)
    assert none.kept == 0 and (none.factors[1].T @ none.factors[0] - d.T @ a).norm() <= 1e-11 * (d.T @ a).norm()
    some = solve(rows, kept, keep=2, ridge=ridge, retain_scale=0.7)
    u = torch.linalg.svd(scaled).Vh[:2].T
    p = torch.eye(16, dtype=torch.float64) - u @ u.T
    e = rows.targets @ p
    m = ridge * torch.eye(16) + e.T @ e + 0.7 * share * p @ scaled.T @ scaled @ p
    expected = rows.way.T @ e @ torch.linalg.inv(m)
    found = some.factors[1].T @ some.factors[0]
    assert some.kept == 2 and (found - expected).norm() <= 1e-11 * expected.norm() and (found @ u).norm() <= 1e-11


def test_short_ranks_give_least_squares_and_are_told() -> None:
    """A target that goes two ways arrives in the middle; one that is what is retained stays; none that is free is an error."""
    rows, kept = random_rows(3, 4, 12, seed=4)
    e = torch.cat([rows.targets[:1], rows.targets[:1], kept.retain[:1] + kept.retain[1:2]])
    short = TargetRows(e, rows.anchors, (e, rows.anchors), 1.0, 3, 3)
    solution = solve(short, kept)
    a, d = solution.factors
    moved = e + (e @ a.T) @ d
    assert (moved[0] - rows.anchors[:2].mean(0)).norm() <= 1e-12 * moved[0].norm()
    assert (moved[2] - e[2]).norm() <= 1e-12 * e[2].norm()
    told = left_over(short, kept, solution)
    assert 0.1 < told["target_residual"] < 1 and told["retained_residual"] <= 1e-12
    with pytest.raises(ErasureInputError, match="spans all directions"):
        solve(TargetRows(e[2:], rows.anchors[2:], (e[2:], rows.anchors[2:]), 1.0, 1, 1), kept)


def test_the_published_map_on_the_embedded_model(pipe: Any) -> None:
    """The whole of `erase` against rows picked here and the dense formula; the LoRA is the same edit, of one rank a word."""
    erasure = erase(
        pipe, ["cat", "ice cream"], anchors=["animal", ""], retain=["dog", "pizza"], method="dp", published=True,
        retain_default="none",
    )  # fmt: skip
    (cat, ice, animal, empty, dog, pizza), last = live_rows(pipe, ["cat", "ice cream", "animal", "", "dog", "pizza"])
    e, g = torch.stack([cat[last[0]], ice[last[1]]]), torch.stack([animal[last[2]], empty[0]])
    kept = torch.stack([dog[last[4]], pizza[last[5]]])
    expected = dense(e, g, kept) - torch.eye(128, dtype=torch.float64)
    (layer,) = erasure.config.layers
    tensors = erasure.layer_tensors(layer)
    found = tensors["D"].double().T @ tensors["A"].double()
    assert roundings(found, expected) <= ROUNDINGS and len(tensors["A"]) == 2
    told = erasure.config.diagnostics["projections"]
    assert (told["kept_directions"], told["width"]) == (2, 128)
    assert told["target_residual"] < 1e-5 and told["retained_residual"] < 1e-5
    assert erasure.config.stock is not None and erasure.config.stock.is_exact
    assert {len(a) for name, a in erasure.tensors[LORA_FILE].items() if ".lora_A." in name} == {2}


def test_a_word_takes_six_kilobytes_of_stable_diffusion() -> None:
    """Two vectors of 768 numbers in float32, in the shapes of Stable Diffusion 1.x's text rows."""
    rows, kept = random_rows(1, 100, 768, seed=5)
    a, d = solve(rows, kept).factors
    assert sum(4 * factor.numel() for factor in compress(a, d)) == 6144


def test_the_shipped_lists_are_retained_by_default(pipe: Any) -> None:
    held = erase(pipe, "cat", anchors="animal", method="dp")
    assert held.config.method.settings["retain_default"] == ["list:things"]
    told, bare = (
        each.config.diagnostics["projections"]
        for each in (held, erase(pipe, "cat", anchors="animal", method="dp", retain=()))
    )
    assert 4 * bare["kept_directions"] < told["kept_directions"] < 64 and 0 < told["retained_residual"] < 0.05


def test_more_retained_than_directions_is_an_error_unless_some_are_let_go(pipe: Any) -> None:
    words = [word for word in demo.OBJECTS if word != "cat"]
    every: dict[str, Any] = {"anchors": "animal", "method": "dp", "retain": words, "threshold": 0.0}
    with pytest.raises(ErasureInputError, match="Keep only some of its directions"):
        erase(pipe, "cat", **every)
    some = erase(pipe, "cat", **every, keep=30).config.diagnostics
    assert some["projections"]["kept_directions"] == 30 and some["completeness"]["cat"] > 0.8
    assert 0 < some["projections"]["retained_residual"] < 0.1


def test_erasures_are_joined_by_solving_again(pipe: Any) -> None:
    common: dict[str, Any] = {"method": "dp", "retain": ["dog", "bee"], "keep": 20}
    whole = erase(pipe, ["cat", "shark"], anchors="animal", **common)
    parts = [erase(pipe, word, anchors="animal", **common) for word in ("cat", "shark")]
    joint = combine(parts, pipe=pipe)
    first, second = edits(whole), edits(joint)
    for site, change in first.items():
        assert (change - second[site]).norm() <= 1e-4 * change.norm()
    assert TENSOR_FILE in joint.tensors and joint.config.diagnostics["completeness"].keys() == {"cat", "shark"}


def test_without_a_ridge_the_other_directions_are_the_targets(pipe: Any) -> None:
    sharp = erase(
        pipe, "cat", anchors="animal", method="dp", retain=["dog"], ridge=0.0, templates="none", compare=False
    )
    told = sharp.config.diagnostics["projections"]
    assert sharp.config.method.settings["retain_scale"] == 0.0 and told["target_residual"] < 1e-6


@pytest.mark.parametrize("more", [{}, {"threshold": 1e-4, "push": 0.0}, {"ridge": 0.0}])
def test_defaults_where_text_enters_by_a_door(more: dict[str, Any]) -> None:
    """Fewer directions stay than elsewhere, and targets go farther; what is given wins."""
    flux = demo.load_pipeline("flux")
    made = erase(flux, "cat", anchors="animal", method="dp", retain=["dog"], compare=False, **more)
    told = made.config.method.settings
    assert {name: told[name] for name in ("rows", "directions", "threshold", "push")} == {
        **{"rows": "window", "directions": 2, "threshold": 1e-3, "push": 1.0},
        **{name: value for name, value in more.items() if name != "ridge"},
    }
    assert made.config.diagnostics["completeness"]["cat"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": -1}, "keep"),
        ({"threshold": 1.0}, "threshold"),
        ({"ridge": -0.1}, "at least 0"),
        ({"ridge": 0.0, "retain_scale": 1.0}, "give one above 0"),
        ({"published": True, "retain_scale": 1.0}, "give one above 0"),
        ({"layer": "hook"}, "layer"),
        ({"lamb": 1.0}, "no setting 'lamb'"),
    ],
)
def test_bad_settings_are_named(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        erase(pipe, "cat", method="dp", **arguments)
