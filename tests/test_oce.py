"""OCE: the invariant that it is named for, the published matrix by a dense formula, and its erasures."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_erasure import ErasureInputError, combine, demo, erase
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.methods.oce import Config, Problem, Settings, Turned, rotation
from diffusers_erasure.methods.rows import KeptRows, TargetRows
from diffusers_erasure.schema import CARD_FILE, LORA_FILE
from diffusers_erasure.settings import resolve
from tests.flow_pipes import tiny_flux_pipe
from tests.helpers import edits, tiny_sdxl_pipe
from tests.test_doors_fit import COMMON, with_t5
from tests.test_uce import live_rows


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


def random_problem(n: int, retained: int, width: int, seed: int, **given: Any) -> tuple[Problem, Settings]:
    generator = torch.Generator().manual_seed(seed)
    e, g, r = torch.randn(2 * n + retained, width, generator=generator, dtype=torch.float64).split([n, n, retained])
    rows = TargetRows(e, g, (e, g), float(e.square().sum(1).mean()), n, n)
    kept = KeptRows(r, e[:1], r.T @ r, retained, retained)
    chosen = resolve(Config(**given), Settings)
    return Problem.of(slice(0, width), rows, kept, chosen), chosen


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    retained=st.integers(1, 12),
    outputs=st.integers(4, 40),
    published=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_lengths_and_angles_of_the_columns_stay(
    n: int, retained: int, outputs: int, published: bool, seed: int
) -> None:
    """W'^T W' = W^T W, of more outputs than columns and of fewer, whatever the sign of the determinant."""
    problem, chosen = random_problem(n, retained, 16, seed, published=published)
    w = torch.randn(outputs, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = Turned.of(w, problem, chosen).change
    turned = w + b @ a
    assert (turned.T @ turned - w.T @ w).norm() <= 1e-12 * (w.T @ w).norm()
    if 2 * n < outputs:  # else the anchors have a part in all that a layer puts out
        assert (turned - w).norm() > 1e-3 * w.norm()


def test_the_rotation_is_the_nearest_to_the_published_matrix() -> None:
    """The polar factor by Newton's iteration, of M with its projectors written out by inverses."""
    problem, chosen = random_problem(2, 6, 12, seed=1, published=True)
    w = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    e, g, r = w @ problem.rows.targets.T, w @ problem.rows.anchors.T, problem.kept.retain
    p_e, p_g = (x @ torch.linalg.inv(x.T @ x) @ x.T for x in (e, g))
    eye = torch.eye(9, dtype=torch.float64)
    k = 10.0 * torch.eye(12) + r.T @ r + 10.0 / 6 * r.T @ r
    found = w @ k @ w.T - 2000.0 * p_e @ (eye - p_g)
    for _ in range(60):
        found = (found + torch.linalg.inv(found).T) / 2
    ours = Turned.of(w, problem, chosen).r
    assert (ours - found).norm() <= 1e-9 * found.norm()
    assert (ours.T @ ours - eye).norm() <= 1e-12


def test_a_reflection_is_left_as_it_is() -> None:
    """One target without an anchor's part is reversed, and nothing else: no column of R is negated besides to make its determinant 1."""
    kept = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    target = torch.eye(6, dtype=torch.float64)[:, 2:3]
    r = rotation(target, torch.zeros(6, 1, dtype=torch.float64), kept, 100.0)
    expected = torch.diag(torch.tensor([1.0, 1, -1, 1, 1, 1], dtype=torch.float64))
    assert (r - expected).norm() <= 1e-12 and torch.linalg.det(r) < 0


def test_relative_weights_reverse_from_one_on() -> None:
    kept = torch.diag(torch.tensor([5.0, 4, 3], dtype=torch.float64))
    target, none = torch.eye(3, dtype=torch.float64)[:, :1], torch.zeros(3, 1, dtype=torch.float64)
    for weight, sign in ((0.9, 1.0), (1.1, -1.0)):
        for scale in (1.0, 1e4):  # of what is kept
            r = rotation(target, none, scale * kept, weight, absolute=False)
            assert float(r[0, 0]) == pytest.approx(sign, abs=1e-12)


def test_an_anchor_keeps_its_part_of_the_target() -> None:
    """What target and anchor share is no reason to turn: of the same rows nothing is left to erase."""
    rows = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    r = rotation(rows, rows, torch.eye(8, dtype=torch.float64), 1e3)
    assert (r - torch.eye(8)).norm() <= 1e-9


def test_the_erasure_is_a_truncated_lora_on_the_values(pipe: Any, tmp_path: Any) -> None:
    """Against the dense edit of each layer: within the error that is told, which the card tells too."""
    erasure = erase(
        pipe, "cat", anchors="animal", retain=["dog", "pizza"], method="oce", published=True, erase_scale=20.0
    )
    (cat, animal, empty, dog, pizza), last = live_rows(pipe, ["cat", "animal", "", "dog", "pizza"])
    kept = torch.stack([dog[last[3]], pizza[last[4]]])
    every = torch.cat([empty, dog, pizza])
    k = 10.0 * torch.eye(128) + kept.T @ kept + 10.0 / len(every) * every.T @ every
    assert erasure.config.stock is not None
    told, tensors = erasure.config.diagnostics, erasure.tensors[LORA_FILE]
    assert told["truncation_error"] == pytest.approx(erasure.config.stock.error, rel=0.01)
    assert 1e-3 < told["truncation_error"] <= 0.0301
    values = {site: each for site, each in text_readers(pipe).items() if site.endswith("to_v")}
    assert tuple(values) == erasure.config.layers[0].sites and told["rotations"]["layers"] == len(values) == 11
    worst = 0.0
    for site, linear in values.items():
        w = linear.weight.detach().double()
        basis = torch.linalg.qr(w).Q if len(w) > 128 else torch.eye(len(w), dtype=torch.float64)
        s = basis.T @ w
        e, g = s @ cat[last[0]][:, None], s @ animal[last[1]][:, None]
        r = rotation(e, g, s @ k @ s.T, 20.0)
        expected = basis @ (r - torch.eye(len(r))) @ s
        found = tensors[f"unet.{site}{UP}"].double() @ tensors[f"unet.{site}{DOWN}"].double()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    assert worst == pytest.approx(erasure.config.stock.error, rel=0.02)
    erasure.save_pretrained(tmp_path)
    assert f"by at most {erasure.config.stock.error:.1e} of its size" in (tmp_path / CARD_FILE).read_text()


def test_a_rank_is_a_limit_and_zero_error_is_all_of_it(pipe: Any) -> None:
    whole, cut = (
        erase(pipe, "cat", anchors="animal", method="oce", **each) for each in ({"max_error": 0.0}, {"rank": 2})
    )
    assert whole.config.diagnostics["truncation_error"] < 1e-6 < 0.05 < cut.config.diagnostics["truncation_error"]
    assert cut.config.diagnostics["rotations"]["rank"] == 2 < whole.config.diagnostics["rotations"]["rank"]
    site, linear = next((site, each) for site, each in text_readers(pipe).items() if site.endswith("to_v"))
    w = linear.weight.detach().double()
    turned = w + edits(whole)[f"unet.{site}"]
    assert (turned.T @ turned - w.T @ w).norm() <= 1e-5 * (w.T @ w).norm()  # factors of float32


def test_what_is_reported_is_what_the_layers_put_out(pipe: Any) -> None:
    erasure = erase(
        pipe, "cat", anchors="animal", retain=["dog", "bee"], method="oce", max_error=0.0, retain_default="none"
    )
    (cat, animal, dog, bee), last = live_rows(pipe, ["cat", "animal", "dog", "bee"])
    e, g = cat[last[0]], animal[last[1]]
    shares, moved = [], []
    for name, change in edits(erasure).items():
        site = name.partition(".")[2]
        w = text_readers(pipe)[site].weight.detach().double()
        way = w @ (g - e)
        shares.append(float((change @ e) @ way / way.square().sum()))
        moved.append([float((change @ x).norm() / (w @ x).norm()) for x in (bee[last[3]], dog[last[2]])])
    told = erasure.config.diagnostics
    assert told["completeness"]["cat"] == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert told["retained_change"]["max"] == pytest.approx(float(torch.tensor(moved).mean(0).max()), rel=1e-3)


def test_erasures_are_joined_by_solving_again(pipe: Any) -> None:
    common: dict[str, Any] = {"method": "oce", "retain": ["dog", "bee"], "max_error": 0.0}
    whole = erase(pipe, ["cat", "shark"], anchors="animal", **common)
    joint = combine(
        [erase(pipe, word, anchors="animal", **common) for word in ("cat", "shark")], pipe=pipe, max_error=0
    )
    first, second = edits(whole), edits(joint)
    for site, change in first.items():
        assert (change - second[site]).norm() <= 1e-3 * change.norm()


def test_doors_and_pooled_vectors_are_turned_too() -> None:
    flux = with_t5(tiny_flux_pipe())
    plain = {name: value for name, value in COMMON.items() if name != "push"}  # a rotation has no goal
    erasure = erase(flux, "cat", **plain, retain=["dog"], method="oce", max_error=0.0)
    assert erasure.config.layers[0].sites == ("context_embedder", "time_text_embed.text_embedder.linear_1")
    assert erasure.config.diagnostics["pooled"]["completeness"]["cat"] > 0.1
    for name, change in edits(erasure).items():
        site = name.partition(".")[2]
        w = flux.transformer.get_submodule(site).weight.detach().double()
        assert ((w + change).T @ (w + change) - w.T @ w).norm() <= 1e-5 * (w.T @ w).norm() and change.any()
    xl = tiny_sdxl_pipe()
    halves = erase(xl, "apple", anchors="", retain=["dog"], method="oce", max_error=0.0)
    site, *_, pooled = halves.config.layers[0].sites
    assert pooled == "add_embedding.linear_1" and halves.config.diagnostics["rotations"]["layers"] > len(
        halves.config.layers[0].sites
    )
    w, change = text_readers(xl)[site].weight.detach().double(), edits(halves)[f"unet.{site}"]
    for half in (slice(0, 32), slice(32, None)):
        before, after = w[:, half], (w + change)[:, half]
        assert (after.T @ after - before.T @ before).norm() <= 1e-5 * (before.T @ before).norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"erase_scale": 0.0}, "above 0"),
        ({"lamb": 0.0}, "above 0"),
        ({"span": 1.0}, "span"),
        ({"general_scale": -1.0}, "at least 0"),
        ({"layer": "text_map"}, "no setting 'layer'"),
    ],
)
def test_bad_settings_are_named(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        erase(pipe, "cat", method="oce", **arguments)


def test_words_are_erased_beside_many_others_as_they_are_alone() -> None:
    """What all rows share weighs more the more concepts there are; the words' own directions are not left out for that."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(1, 192, generator=generator, dtype=torch.float64)
    own = 0.3 * torch.randn(129, 192, generator=generator, dtype=torch.float64)
    e, g, r = (shared + own).split([64, 1, 64])
    chosen = resolve(Config(erase_scale=2.0), Settings)
    w = torch.randn(160, 192, generator=generator, dtype=torch.float64)
    shares = []
    for count in (1, 8, 64):
        rows = TargetRows(e[:count], g.expand(count, -1), (e[:count], g.expand(count, -1)), 200.0, count, count)
        problem = Problem.of(slice(0, 192), rows, KeptRows(r, e[:1], r.T @ r, 64, 64), chosen)
        shares.append(float(Turned.of(w, problem, chosen).measured(problem, count).shares.mean()))
    assert min(shares) > 0.5 * max(shares) > 0.5
