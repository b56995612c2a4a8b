"""SPEED against the dense float64 oracle in the published order of steps, its invariants, presets and warnings."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.dense_closed_form import dense_speed
from diffusers_erasure import ErasureInputError, demo, erase
from diffusers_erasure.base_model import plain_weight, text_readers
from diffusers_erasure.encoding import all_rows, last_rows
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.methods.base_sums import least_direction
from diffusers_erasure.methods.nullspace import Influence, edit, kept_directions, refine
from diffusers_erasure.methods.speed import PRESETS, PUBLISHED, SQUARES, Config, Settings, centres_of
from diffusers_erasure.schema import LORA_FILE
from diffusers_erasure.settings import resolve
from tests.helpers import edits, normal, roundings


def decaying(rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows with a spectrum that falls, so that a threshold cuts through it and the filters matter."""
    return normal(rows, width, seed=seed) * torch.logspace(0.5, -2.5, width, dtype=torch.float64) * 3


def factored(
    w: torch.Tensor,
    e: torch.Tensor,
    g: torch.Tensor,
    concepts: int,
    retain: torch.Tensor,
    invariants: torch.Tensor,
    draws: torch.Tensor | None,
    **numbers: Any,
) -> tuple[torch.Tensor, float]:
    """dW of one layer by the library's functions, and how far float64 may be off."""
    influence = Influence.of(e, concepts, 1.0)
    images = w @ (g - e).T
    v = least_direction(w) if draws is not None else None
    prior = refine(
        retain,
        influence.coordinates(retain),
        images.T @ images,
        filter=numbers["filter"],
        v=v,
        v_coordinates=None if v is None else influence.coordinates(v[None]),
        draws=draws,
        chunk=numbers.get("chunk", 128),
    )
    kept = kept_directions(prior, numbers["threshold"], relative=False)
    ridge, lamb = numbers["ridge"], numbers["lamb"]
    change = images @ edit(e, kept, invariants, concepts, ridge=ridge, lamb=lamb) / concepts
    # Where few free directions are left to the invariants, both ways solve a system that loses as many digits as its
    # condition has, of what the edit would be without them. Where none is left the edit is zero, but for rounding.
    eye = torch.eye(w.shape[1], dtype=torch.float64)
    free = eye - kept @ kept.T
    m = torch.linalg.inv(e.T @ e / concepts @ free + ridge * eye)
    system = invariants @ free @ m @ invariants.T + lamb * torch.eye(len(invariants), dtype=torch.float64)
    values = torch.linalg.svdvals(system)
    condition = values[0] / values[values > 1e-10 * values[0]][-1]
    lost = 10 * torch.finfo(torch.float64).eps * condition * images.norm() * e.norm() / (concepts * ridge)
    return change, float(1e-9 * change.norm() + 1e-11 * w.norm() + lost)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 8),
    retained=st.sampled_from([0, 3, 12, 40, 90]),
    rows_out=st.sampled_from([6, 24, 40]),
    filter=st.booleans(),
    times=st.sampled_from([0, 1, 5]),
    threshold=st.sampled_from([1e-4, 1e-2, 1e-1]),
    ridge=st.sampled_from([0.05, 1.0]),
    lamb=st.sampled_from([0.0, 0.5]),
    one_concept=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_factored_form_is_the_dense_one(
    n: int, retained: int, rows_out: int, filter: bool, times: int, threshold: float, ridge: float, lamb: float,
    one_concept: bool, seed: int,
) -> None:  # fmt: skip
    width = 24
    w, e, g = normal(rows_out, width, seed=seed), normal(n, width, seed=seed + 1), normal(n, width, seed=seed + 2)
    retain, invariants = decaying(retained, width, seed + 3), normal(4, width, seed=seed + 4)
    draws = normal(times, retained, seed=seed + 5) if times and retained else None
    concepts = 1 if one_concept else n
    numbers: dict[str, Any] = {"threshold": threshold, "ridge": ridge, "lamb": lamb, "filter": filter, "chunk": 16}
    expected = dense_speed(
        {"w": w}, e, g, concepts, retain, invariants,
        draws=None if draws is None else {"w": draws}, directions={"w": least_direction(w)}, **numbers,
    )["w"]  # fmt: skip
    found, tolerance = factored(w, e, g, concepts, retain, invariants, draws, **numbers)
    assert (found - expected).norm() <= tolerance
    assert torch.linalg.matrix_rank(found, atol=tolerance) <= n
    if lamb == 0:
        assert (found @ invariants.T).norm() <= tolerance * invariants.norm()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 6), seed=st.integers(0, 10_000))
def test_the_order_of_the_targets_does_not_matter(n: int, seed: int) -> None:
    w, e, g = normal(20, 24, seed=seed), normal(n, 24, seed=seed + 1), normal(n, 24, seed=seed + 2)
    retain, invariants, draws = decaying(60, 24, seed), normal(4, 24, seed=seed + 4), normal(3, 60, seed=seed + 5)
    numbers: dict[str, Any] = {"threshold": 1e-2, "ridge": 1.0, "lamb": 0.0, "filter": True, "chunk": 16}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    one, tolerance = factored(w, e, g, n, retain, invariants, draws, **numbers)
    other, _ = factored(w, e[order], g[order], n, retain, invariants, draws, **numbers)
    assert (one - other).norm() <= tolerance


def test_invariants_that_are_retained_anyway_do_no_harm() -> None:
    """With the empty prompt's own rows retained, K lies outside the null space: there is nothing to invert there."""
    w, e, g, k = normal(20, 24, seed=1), normal(2, 24, seed=2), normal(2, 24, seed=3), normal(4, 24, seed=4)
    retain = torch.cat([k, normal(6, 24, seed=5)])
    numbers: dict[str, Any] = {"threshold": 1e-4, "ridge": 1.0, "lamb": 0.0, "filter": False}
    found, _ = factored(w, e, g, 2, retain, k, None, **numbers)
    expected = dense_speed({"w": w}, e, g, 2, retain, k, draws=None, **numbers)["w"]
    assert (found - expected).norm() <= 1e-9 * expected.norm()
    assert (found @ k.T).norm() <= 1e-9 * found.norm() * k.norm()


@pytest.mark.parametrize("shape", [(6, 24), (24, 24), (40, 24)])
def test_the_least_direction_is_the_svds(shape: tuple[int, int]) -> None:
    w = normal(*shape, seed=7)
    v = torch.linalg.svd(w, full_matrices=False).Vh[-1]
    found = least_direction(w)
    assert abs(float(found @ v)) == pytest.approx(1, abs=1e-9)
    assert float(found[found.abs().argmax()]) > 0


# ----------------------------------------------------------------------------------- on the embedded model


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


def test_a_published_preset_end_to_end(pipe: Any) -> None:
    """The whole of `erase` against the oracle on rows picked here, with the draws that the seed gives."""
    retain = ["dog", "pizza", "rose", "car", "whale", "bus", "ink", "corn", "fox", "bee"]
    erasure = erase(pipe, ["cat", "ice cream"], retain=retain, method="speed", published=True, threshold=1e-3, seed=3)
    rows, last = all_rows(pipe, ["cat", "ice cream", "", *sorted(retain)])
    e = torch.stack([rows[0, last[0]], rows[1, last[1]]])
    g = rows[2, 0].expand(2, -1)
    kept = torch.stack([rows[3 + i, last[3 + i]] for i in range(len(retain))])
    kept = kept[torch.randperm(10, generator=torch.Generator().manual_seed(3))]
    invariants = torch.cat([rows[2, :1], centres_of(rows[2, 1:], 3, 3)])
    sites = {name: linear for name, linear in text_readers(pipe).items() if name.endswith("to_v")}
    assert erasure.config.layers[0].sites == tuple(sites)
    weights = {name: plain_weight(linear, name) for name, linear in sites.items()}
    draws = {
        name: torch.randn(10, 10, generator=torch.Generator().manual_seed(3 * 1_000_003 + i), dtype=torch.float64)
        for i, name in enumerate(weights)
    }
    expected = dense_speed(
        weights, e, g, 2, kept, invariants, threshold=1e-3, ridge=1.0, lamb=0.0, filter=True, draws=draws,
        directions={name: least_direction(w) for name, w in weights.items()},
    )  # fmt: skip
    tensors = erasure.tensors[LORA_FILE]
    for name, change in expected.items():
        found = tensors[f"unet.{name}{UP}"].double() @ tensors[f"unet.{name}{DOWN}"].double()
        # float32 factors, and rows that were encoded short instead of padded
        assert (found - change).norm() <= 2e-5 * change.norm()


def test_presets_are_the_published_settings() -> None:
    tasks = ("instance", "celebrity", "nudity")
    assert [Config(preset=p).anchor for p in tasks] == ["", "person", ""]  # type: ignore[arg-type]
    instance, celebrity, nudity = (resolve(Config(preset=p, published=True), Settings) for p in tasks)  # type: ignore[arg-type]
    assert (instance.rows, instance.params, instance.augment, instance.threshold) == ("last", "V", 10, 0.1)
    assert (instance.ridge, instance.lamb, instance.filter) == (1.0, 0.0, True)
    assert (celebrity.threshold, celebrity.ridge, celebrity.filter) == (1e-4, 0.05, False)
    assert (nudity.rows, nudity.ridge, nudity.lamb) == ("all", 0.7, 0.5)
    assert (
        Config(preset="style").anchor == "art"
        and resolve(Config(preset="style"), Settings).templates == "style_context"
    )
    assert set(PUBLISHED) == set(PRESETS)
    assert resolve(Config(published=True, threshold=0.3), Settings).threshold == 0.3


def test_the_same_seed_gives_the_same_bytes(pipe: Any) -> None:
    made = [erase(pipe, "cat", retain=["dog", "bee", "fox"], method="speed", seed=s).to_files() for s in (1, 1, 2)]
    assert made[0] == made[1]
    assert made[0][LORA_FILE] != made[2][LORA_FILE]


def test_relative_units_are_absolute_ones_scaled(pipe: Any) -> None:
    """`threshold`, `ridge` and `lamb` as shares equal the absolute numbers that they amount to on these rows."""
    e = last_rows(pipe, ["cat"])
    squares = float(e.square().sum())
    common: dict[str, Any] = {"method": "speed", "retain": ["dog", "bee", "fox"], "rows": "last", "templates": "none"}
    common.update(filter=False, augment=0, retain_default="none")
    kept = last_rows(pipe, ["bee", "dog", "fox"])
    trace = float(kept.square().sum(1).mean())
    relative = erase(pipe, "cat", units="relative", threshold=1e-2, ridge=2e-3, lamb=1e-4, **common)
    absolute = erase(
        pipe, "cat", units="absolute", threshold=1e-2 * trace, ridge=2e-3 * squares, lamb=1e-4 / 2e-3, **common
    )
    # The absolute numbers were multiplied out here, and may differ by a last bit; factors and product are float32.
    for site, change in edits(absolute).items():
        assert roundings(edits(relative)[site], change) <= 4


def test_absolute_units_on_other_rows_are_warned_of(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("diffusers_erasure").propagate = True
    with caplog.at_level(logging.WARNING, "diffusers_erasure"):
        erase(pipe, "cat", retain=["dog"], method="speed", published=True)
    assert any("units='relative'" in message for message in caplog.messages)
    assert SQUARES == 750


def test_the_null_space_is_reported_and_none_is_refused(pipe: Any) -> None:
    plain: dict[str, Any] = {"method": "speed", "retain_rows": "last", "retain_templates": False, "filter": False}
    plain["retain_default"] = "none"
    erasure = erase(pipe, "cat", retain=["dog", "bee"], augment=0, threshold=0.0, **plain)
    # two retained rows take two dimensions, and eigenvalues of exactly 0 or above count as retained at threshold 0
    assert erasure.config.diagnostics["null_space"] == {"least": 126, "largest": 126, "width": 128}
    # Of relative ones half of all dimensions stay free whatever is retained, of the published ones none.
    many = erase(pipe, "cat", retain="list:objects", threshold=0.0, **plain)
    assert many.config.diagnostics["null_space"] == {"least": 64, "largest": 64, "width": 128}
    with pytest.raises(ErasureInputError, match="spans all 128 dimensions"):
        erase(pipe, "cat", retain="list:objects", threshold=0.0, units="absolute", **plain)


def test_the_rank_is_never_above_the_width(pipe: Any) -> None:
    """A window in eight templates has more rows than the text has dimensions."""
    erasure = erase(pipe, "cat", retain=["dog"], method="speed", max_error=0.0)
    ranks = {v.shape[0] for k, v in erasure.tensors[LORA_FILE].items() if k.endswith(DOWN)}
    assert max(ranks) <= 128
    assert erasure.config.stock is not None and erasure.config.stock.error < 1e-5


def test_adversarial_rows_are_further_targets(pipe: Any) -> None:
    plain = erase(pipe, "cat", retain=["dog"], method="speed", rows="last", templates="none")
    more = erase(pipe, "cat", retain=["dog"], method="speed", rows="last", templates="none", adversarial=1)
    site = plain.config.layers[0].sites[0]
    name = f"unet.{site}{DOWN}"
    assert plain.tensors[LORA_FILE][name].shape[0] == 1 and more.tensors[LORA_FILE][name].shape[0] == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"preset": "cartoon"}, "preset"),
        ({"params": "Q"}, "params"),
        ({"ridge": 0}, "ridge"),
        ({"threshold": float("nan")}, "threshold"),
        ({"augment": -1}, "augment"),
        ({"chunk": 0}, "chunk"),
        ({"max_error": 1.5}, "max_error"),
        ({"units": "feet"}, "units"),
    ],
)
def test_bad_settings_are_named(pipe: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        erase(pipe, "cat", method="speed", **bad)


def test_a_target_that_is_the_presets_anchor_is_refused(pipe: Any) -> None:
    with pytest.raises(ErasureInputError, match="anchor of this preset"):
        erase(pipe, "art", method="speed", preset="style")
