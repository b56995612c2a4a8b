"""RECE's C x C algebra against the dense float64 oracle, which edits every layer one by one."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.dense_closed_form import dense_rece
from diffusers_erasure import ErasureInputError, demo, erase
from diffusers_erasure.base_model import plain_weight, text_readers
from diffusers_erasure.encoding import all_rows
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.methods.rece import PRESETS, PUBLISHED, Config, Scales, Settings, solve
from diffusers_erasure.methods.rows import KeptRows, TargetRows
from diffusers_erasure.schema import LORA_FILE, TENSOR_FILE
from diffusers_erasure.settings import resolve
from tests.helpers import ROUNDINGS, edits, normal, roundings


def target(e: torch.Tensor, g: torch.Tensor) -> TargetRows:
    return TargetRows(e, g, (e[:1], g[:1]), float(e.square().sum(1).mean()), len(e), len(e))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 12),
    epochs=st.integers(0, 3),
    reg=st.sampled_from([1e-1, 1.0]),
    retain_scale=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_the_common_map_is_the_dense_edit_of_every_layer(
    n: int, m: int, epochs: int, reg: float, retain_scale: float, seed: int
) -> None:
    width = 24
    weights = {f"w{o}": normal(o, width, seed=seed + o) for o in (8, 24, 40)}
    e, g = normal(n, width, seed=seed + 1), normal(n, width, seed=seed + 2)
    x, gx = normal(m, width, seed=seed + 3), normal(m, width, seed=seed + 4)
    retain = normal(5, width, seed=seed + 5)
    expected = dense_rece(
        weights, targets=e, anchors=g, retain=retain, concept_rows=x, concept_anchors=gx, rece_retain=retain,
        uce=(0.5, 1.0, retain_scale), lamb=0.1, erase_scale=1.0, retain_scale=retain_scale, reg=reg, epochs=epochs,
    )  # fmt: skip
    s = sum((w.T @ w for w in weights.values()), torch.zeros(width, width, dtype=torch.float64))
    a, d = solve(
        target(e, g), target(x, gx), KeptRows(retain, retain[:1]), s,
        Scales(0.5, retain_scale, 0.1, retain_scale, reg), epochs,
    )  # fmt: skip
    for name, w in weights.items():
        change = w @ d.T @ a
        # The oracle's own `inverse` is off by up to 4.5e-8 against 60 digits when `reg` is small, this form by 6e-10.
        assert (change - expected[name]).norm() <= 1e-8 * expected[name].norm()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


@pytest.mark.parametrize("layer", ["text_map", "lora"])
def test_the_published_nudity_settings_end_to_end(pipe: Any, layer: str) -> None:
    """The whole of `erase` against the oracle, on rows picked here."""
    erasure = erase(pipe, "cat", retain=["dog"], method="rece", preset="nudity", published=True, layer=layer, epochs=2)
    rows, last = all_rows(pipe, ["cat", "", "dog"])
    count = rows.shape[1] - last[0]
    weights = {name: plain_weight(linear, name) for name, linear in text_readers(pipe).items()}
    retain = torch.cat([rows[1], rows[2]])
    expected = dense_rece(
        weights, targets=rows[0, last[0] :], anchors=rows[1, :count], retain=retain,
        concept_rows=rows[0], concept_anchors=rows[1], rece_retain=retain,
        uce=(0.5, 1.0, 1.0), lamb=0.1, erase_scale=1.0, retain_scale=0.1, reg=0.1, epochs=2,
    )  # fmt: skip
    for name, change in expected.items():
        if layer == "text_map":
            a, d = (erasure.tensors[TENSOR_FILE][f"text_map.{part}"].double() for part in "AD")
            found = weights[name] @ d.T @ a
        else:
            factors = erasure.tensors[LORA_FILE]
            found = factors[f"unet.{name}{UP}"].double() @ factors[f"unet.{name}{DOWN}"].double()
        assert (found - change).norm() <= 2e-5 * change.norm()  # float32 factors, and rows encoded short
    assert (erasure.config.stock is None) == (layer == "text_map")


def test_no_epochs_is_uce(pipe: Any) -> None:
    common: dict[str, Any] = {"anchors": "animal", "retain": ["dog", "bee"]}
    rece = erase(pipe, "cat", method="rece", epochs=0, **common)
    uce = erase(pipe, "cat", method="uce", layer="text_map", retain_scale=1.0, push=0.0, **common)
    maps = [edits(erasure)["map"] for erasure in (rece, uce)]
    assert roundings(*maps) <= ROUNDINGS


def test_the_epochs_find_rows_that_still_reach_the_target(pipe: Any) -> None:
    """After RECE the nearest row to the target, seen through the edited weights, is farther off than after UCE."""
    rows, last = all_rows(pipe, ["cat"])
    x = rows[0, last[0] : last[0] + 1]
    weights = {name: plain_weight(linear, name) for name, linear in text_readers(pipe).items()}
    left = {}
    for epochs in (0, 2):
        erasure = erase(pipe, "cat", anchors="animal", method="rece", epochs=epochs, templates="none", reg=1e-2)
        a, d = (erasure.tensors[TENSOR_FILE][f"text_map.{part}"].double() for part in "AD")
        edited = torch.cat([w + w @ d.T @ a for w in weights.values()])
        wanted = torch.cat(list(weights.values())) @ x.T
        reg = 1e-4 * edited.square().sum() / edited.shape[1]
        stacked = torch.cat([edited, reg.sqrt() * torch.eye(edited.shape[1], dtype=torch.float64)])
        padded = torch.cat([wanted, torch.zeros(edited.shape[1], 1, dtype=torch.float64)])
        near = torch.linalg.lstsq(stacked, padded).solution
        left[epochs] = float((edited @ near - wanted).norm() / wanted.norm())
    assert left[2] > 1.1 * left[0]


def test_the_epochs_leave_the_erased_rows_where_they_are(pipe: Any) -> None:
    """`keep_erased`: as published, "cat" moves back towards itself, and "car" far beyond its anchor."""
    for name, anchor in (("cat", ""), ("car", "vehicle")):
        settings: dict[str, Any] = {"anchors": anchor, "retain": ["dog", "bee", "rose"], "method": "rece"}
        settings["retain_default"] = "none"  # of default lists the first edit is scaled up
        settings["retain_templates"] = False  # which hold much of the targets' rows too
        uce, ours, published = (
            erase(pipe, name, **settings, **more).config.diagnostics["completeness"][name]
            for more in ({"epochs": 0}, {"epochs": 3}, {"keep_erased": False})
        )
        assert ours == pytest.approx(uce, abs=0.05)
        assert abs(published - 1) > 0.3


def test_a_truncated_map_states_its_error(pipe: Any) -> None:
    exact = erase(pipe, "cat", anchors="animal", method="rece", epochs=2)
    assert "truncation_error" not in exact.config.diagnostics
    small = erase(pipe, "cat", anchors="animal", method="rece", epochs=2, rank=4)
    maps = [edits(erasure)["map"] for erasure in (exact, small)]
    error = float((maps[0] - maps[1]).norm() / maps[0].norm())
    assert error > 1e-3
    assert small.config.diagnostics["truncation_error"] == pytest.approx(error, rel=1e-2)
    bounded = erase(pipe, "cat", anchors="animal", method="rece", epochs=2, max_error=0.05)
    assert bounded.config.diagnostics["truncation_error"] <= 0.05


def test_presets_are_the_published_settings() -> None:
    nudity, artist = (resolve(Config(preset=p, published=True), Settings) for p in ("nudity", "artist"))  # type: ignore[arg-type]
    assert (nudity.epochs, nudity.reg, nudity.lamb, nudity.retain_scale) == (3, 0.1, 0.1, 0.1)
    assert (nudity.uce_lamb, nudity.uce_retain_scale, nudity.rows, nudity.templates) == (0.5, 1.0, "window", "none")
    assert (artist.epochs, artist.reg, artist.uce_retain_scale) == (1, 1e-3, 0.1)
    assert PUBLISHED["unsafe"]["epochs"] == 2 and PUBLISHED["hard_object"]["reg"] == 1e-3
    assert PUBLISHED["artist"]["anchor"] == "art" and set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"epochs": -1}, "epochs"), ({"reg": 0}, "reg"), ({"preset": "all"}, "preset"), ({"layer": "skip"}, "layer")],
)
def test_bad_settings_are_named(pipe: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        erase(pipe, "cat", method="rece", **bad)
