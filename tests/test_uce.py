"""UCE against a plain dense float64 implementation of the published equation, and its unhappy paths."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_erasure import ErasureCompatibilityError, ErasureInputError, demo, erase
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.encoding import last_rows
from diffusers_erasure.low_rank import compress
from diffusers_erasure.methods import method_names
from diffusers_erasure.methods.rows import KeptRows, TargetRows
from diffusers_erasure.methods.uce import Config, Settings, solve
from diffusers_erasure.schema import LORA_FILE
from diffusers_erasure.settings import resolve
from diffusers_erasure.settings.texts import TEMPLATES
from tests.helpers import ROUNDINGS, edits, roundings


@dataclass(frozen=True)
class Rows:
    """Targets E, anchors G [n, C] and retained rows R [N, C]."""

    targets: torch.Tensor
    anchors: torch.Tensor
    retain: torch.Tensor

    def solve(self, **numbers: float) -> tuple[torch.Tensor, torch.Tensor]:
        e, g = self.targets, self.anchors
        kept = KeptRows(self.retain, e[:0], prompts=len(self.retain))
        return solve(TargetRows(e, g, (e, g), float(e.square().sum(1).mean()), len(e), len(e)), kept, **numbers)


def dense(w: torch.Tensor, rows: Rows, erase_scale: float, retain_scale: float, lamb: float) -> torch.Tensor:
    """W' - W as the paper's equation says, with the sums written out."""
    numerator, denominator = sums(w, rows, erase_scale, retain_scale, lamb)
    return numerator @ torch.linalg.inv(denominator) - w


def sums(
    w: torch.Tensor, rows: Rows, erase_scale: float, retain_scale: float, lamb: float
) -> tuple[torch.Tensor, torch.Tensor]:
    eye = torch.eye(w.shape[1], dtype=torch.float64)
    numerator, denominator = lamb * w, lamb * eye
    for e, g in zip(rows.targets, rows.anchors, strict=True):
        numerator = numerator + erase_scale * torch.outer(w @ g, e)
        denominator = denominator + erase_scale * torch.outer(e, e)
    for r in rows.retain:
        numerator = numerator + retain_scale * torch.outer(w @ r, r)
        denominator = denominator + retain_scale * torch.outer(r, r)
    return numerator, denominator


def random_rows(n: int, retained: int, width: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * n + retained, width)
    e, g, r = torch.randn(shape, generator=generator, dtype=torch.float64).split([n, n, retained])
    return Rows(e, g, r)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    retained=st.integers(0, 20),
    width=st.integers(2, 24),
    lamb=st.floats(1e-2, 10),
    erase_scale=st.floats(0.1, 3),
    retain_scale=st.floats(0, 3),
    seed=st.integers(0, 2**31),
)
def test_factors_equal_the_dense_formula(
    n: int, retained: int, width: int, lamb: float, erase_scale: float, retain_scale: float, seed: int
) -> None:
    rows = random_rows(n, retained, width, seed)
    w = torch.randn(7, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = dense(w, rows, erase_scale, retain_scale, lamb)
    # Solving loses as many digits as the condition has; the oracle then subtracts W.
    condition = float(torch.linalg.cond(sums(w, rows, erase_scale, retain_scale, lamb)[1]))
    tolerance = 100 * torch.finfo(torch.float64).eps * condition * float(expected.abs().max() + w.abs().max())
    assert tolerance < 1e-6 * w.abs().max()
    a, d = rows.solve(erase_scale=erase_scale, retain_scale=retain_scale, lamb=lamb)
    assert (w @ d.T @ a - expected).abs().max() <= tolerance
    small_a, small_d = compress(a, d)
    assert len(small_a) <= min(n, width)
    assert (w @ small_d.T @ small_a - expected).abs().max() <= tolerance


def test_retained_rows_stay_when_lambda_vanishes() -> None:
    rows = random_rows(2, 3, 16, seed=1)
    a, d = rows.solve(erase_scale=1.0, retain_scale=1e6, lamb=1e-6)
    moved = (rows.retain @ a.T) @ d
    assert moved.norm() < 1e-3 * rows.retain.norm()
    # and with few enough retained rows the targets still reach their anchors
    assert ((rows.targets + (rows.targets @ a.T) @ d) - rows.anchors).norm() < 1e-3 * rows.anchors.norm()


def live_rows(pipe: Any, prompts: list[str]) -> tuple[torch.Tensor, list[int]]:
    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    rows, last = [], []
    for prompt in prompts:
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            rows.append(encoder(ids.input_ids)[0][0].double())
        last.append(int(tokenizer(prompt, return_tensors="pt").attention_mask.sum()) - 2)
    return torch.stack(rows), last


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load_pipeline()


@pytest.mark.parametrize("rows", ["last", "window"])
@pytest.mark.parametrize("layer", ["lora", "text_map"])
def test_the_published_variants_on_the_embedded_model(pipe: Any, rows: str, layer: str) -> None:
    """The whole of `erase`, absolute settings as published, against rows picked here and the dense formula."""
    erasure = erase(
        pipe, ["cat", "ice cream"], anchors=["animal", ""], retain=["dog", "pizza"], rows=rows,
        templates="none", lamb=0.5, absolute=True, retain_scale=0.3, push=0.0, layer=layer, retain_default="none",
        retain_rows="all" if rows == "window" else "last",
    )  # fmt: skip
    (cat, ice, animal, empty, dog, pizza), last = live_rows(pipe, ["cat", "ice cream", "animal", "", "dog", "pizza"])
    assert last == [1, len(pipe.tokenizer("ice cream").input_ids) - 2, last[2], 0, 1, last[5]]
    length = cat.shape[0]
    e, g = [], []
    for target, f, anchor, f_anchor in ((cat, last[0], animal, last[2]), (ice, last[1], empty, 0)):
        count = length - max(f, f_anchor) if rows == "window" else 1
        e.append(target[f : f + count])
        g.append(anchor[f_anchor : f_anchor + count])
    retained = [empty, dog, pizza] if rows == "window" else [dog[last[4]][None], pizza[last[5]][None]]
    picked = Rows(torch.cat(e), torch.cat(g), torch.cat(retained))

    if layer == "text_map":
        assert erasure.config.stock is None
        (spec,) = erasure.config.layers
        tensors = erasure.layer_tensors(spec)
        expected = dense(torch.eye(128, dtype=torch.float64), picked, 1.0, 0.3, 0.5)
        found = tensors["D"].double().T @ tensors["A"].double()
        assert roundings(found, expected) <= ROUNDINGS  # float32 factors, and rows encoded short
        return
    tensors = erasure.tensors[LORA_FILE]
    readers = text_readers(pipe)
    assert len(readers) == 22 and list(readers) == list(erasure.config.layers[0].sites)
    for site, linear in readers.items():
        expected = dense(linear.weight.detach().double(), picked, 1.0, 0.3, 0.5)
        found = tensors[f"unet.{site}.lora_B.weight"].double() @ tensors[f"unet.{site}.lora_A.weight"].double()
        assert roundings(found, expected) <= ROUNDINGS
    assert erasure.config.stock is not None and erasure.config.stock.error < 1e-6


def test_truncation_states_its_error(pipe: Any) -> None:
    exact = erase(pipe, "cat", anchors="animal", layer="lora")
    small = erase(pipe, "cat", anchors="animal", layer="lora", rank=4)
    worst = 0.0
    for site in small.config.layers[0].sites:
        products = []
        for erasure in (exact, small):
            factors = erasure.tensors[LORA_FILE]
            products.append(
                factors[f"unet.{site}.lora_B.weight"].double() @ factors[f"unet.{site}.lora_A.weight"].double()
            )
        assert small.tensors[LORA_FILE][f"unet.{site}.lora_A.weight"].shape[0] == 4
        worst = max(worst, float((products[0] - products[1]).norm() / products[0].norm()))
    assert small.config.stock is not None
    assert small.config.stock.error == pytest.approx(worst, rel=1e-2)
    assert 1e-3 < worst < 1


def test_the_stated_error_is_that_of_the_worst_site(pipe: Any) -> None:
    """Of writing float32 alone: about its rounding, however many sites there are."""
    erasure = erase(pipe, "cat", anchors="animal", layer="lora")
    assert erasure.config.stock is not None and 0 < erasure.config.stock.error < 2e-7


def test_a_list_too_long_for_the_configuration_is_counted(pipe: Any) -> None:
    prompts = [f"a thing of the kind number {i}" for i in range(12_000)]
    settings, secret = resolve(Config(retain=prompts), Settings).recorded()
    assert settings["retain_prompts"] == 12_000 and not {"retain", "retain_excluded"} & settings.keys()
    assert secret == ("templates",)
    few, _ = resolve(Config(retain=prompts[:1000]), Settings).recorded()
    assert few["retain"] == prompts[:1000]


def test_scales_are_relative_by_default(pipe: Any) -> None:
    """A relative lambda times the rows' mean squared norm is the absolute one."""
    norm = float(last_rows(pipe, ["cat"]).square().sum())
    plain: dict[str, Any] = {
        "anchors": "animal",
        "rows": "last",
        "retain_rows": "last",
        "templates": "none",
        "retain": (),
    }
    relative = erase(pipe, "cat", lamb=0.1, **plain)
    absolute = erase(pipe, "cat", lamb=0.1 * norm, absolute=True, **plain)
    # The absolute lambda was multiplied out here, so that it may differ by a last bit; factors and product are float32.
    for site, change in edits(absolute).items():
        assert roundings(edits(relative)[site], change) <= 4
    # One target, nothing retained: it moves by |t|^2 / (lambda + |t|^2) of the way.
    assert relative.config.diagnostics["completeness"]["cat"] == pytest.approx(1 / 1.1, abs=1e-4)


def test_a_hundred_retained_prompts_do_not_outweigh_the_target(pipe: Any) -> None:
    words = [word for word in demo.OBJECTS if word != "cat"]
    few = erase(pipe, "cat", anchors="animal", retain=words[:10], method="uce").config.diagnostics["completeness"][
        "cat"
    ]
    many = erase(pipe, "cat", anchors="animal", retain=[f"{w} {s}" for w in words for s in demo.STYLES], method="uce")
    assert many.config.diagnostics["completeness"]["cat"] > 0.5 * few


def test_fitting_leaves_the_pipeline_alone(pipe: Any) -> None:
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    first = erase(pipe, "cat", anchors="animal", method="uce")
    pipe.load_erasure(first, "on")
    second = erase(pipe, "cat", anchors="animal", method="uce")  # fitted on the base, not on what is loaded
    pipe.unload_erasure()
    assert first.content_hash == second.content_hash
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())


def test_a_string_is_accepted_for_every_list(pipe: Any, tmp_path: Path) -> None:
    listed = erase(pipe, ["cat"], anchors=["animal"], retain=["dog"], method="uce")
    assert erase(pipe, "cat", anchors="animal", retain="dog", method="uce").content_hash == listed.content_hash
    (tmp_path / "kept.txt").write_text("# a comment\ndog\n\ndog\n", encoding="utf-8")
    assert (
        erase(pipe, "cat", anchors="animal", retain=tmp_path / "kept.txt", method="uce").content_hash
        == listed.content_hash
    )
    (tmp_path / "kept.csv").write_text("id,animal\n1,dog\n", encoding="utf-8")
    assert (
        erase(pipe, "cat", anchors="animal", retain=f"{tmp_path}/kept.csv#animal", method="uce").content_hash
        == listed.content_hash
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ""}, "empty entry"),
        ({"targets": []}, "empty"),
        ({"targets": ["cat", "cat"]}, "'cat' twice; leave"),
        ({"targets": ["cat", "dog", " CAT"]}, "'cat' twice, the second time as ' CAT'"),
        ({"targets": ["ice cream", "Ice  cream"]}, "twice, the second time as"),
        ({"targets": "cat", "anchors": " Cat "}, "own anchor"),
        ({"targets": "cat", "anchors": "a  cat"}, "but for an article"),
        ({"targets": ["dog", "The cat"], "anchors": ["animal", "cat"]}, "but for an article"),
        ({"targets": "cat", "retain": ["dog", "CAT"]}, "retain"),
        ({"targets": ["cat", "dog"], "anchors": ["a", "b", "c"]}, "3 anchors"),
        ({"targets": "cat " * 40}, "tokens"),
        ({"targets": "cat", "method": "magic"}, "no method"),
        ({"targets": "cat", "speed": 1}, "no setting 'speed'"),
        ({"targets": "cat", "lamb": 0.0}, "above 0"),
        ({"targets": "cat", "lamb": float("nan")}, "finite"),
        ({"targets": "cat", "retain_scale": -1}, "at least 0"),
        ({"targets": "cat", "rank": -1}, "rank"),
        ({"targets": "cat", "rows": "middle"}, "rows"),
        ({"targets": "cat", "layer": "hook"}, "layer"),
        ({"targets": "cat", "templates": ["no place"]}, "template"),
        ({"targets": "cat", "templates": "photo"}, "templates"),
        ({"targets": 3}, "string"),
    ],
)
def test_bad_input_names_the_culprit(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        erase(pipe, arguments.pop("targets"), **arguments)


def test_targets_that_differ_by_an_article_are_told(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "diffusers_erasure")
    erase(pipe, ["owl", "apple", "An  Apple", "the", "then"], anchors="a thing", templates="none", method="uce")
    (record,) = [each for each in caplog.records if "article" in each.getMessage()]
    assert "'apple' and 'An  Apple' differ by an article alone" in record.getMessage()


def test_damaged_and_missing_models() -> None:
    pipe = demo.load_pipeline()
    site, linear = next(iter(text_readers(pipe).items()))
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ErasureInputError, match=site.replace(".", r"\.")):
        erase(pipe, "cat", method="uce")
    pipe.text_encoder = None
    with pytest.raises(ErasureCompatibilityError, match="text_encoder"):
        erase(pipe, "cat", method="uce")


def test_a_lora_on_the_text_encoder_is_refused() -> None:
    from peft import LoraConfig

    pipe = demo.load_pipeline()
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "style")
    with pytest.raises(ErasureInputError, match="style"):
        erase(pipe, "cat", method="uce")


def test_fused_projections_are_refused() -> None:
    pipe = demo.load_pipeline()
    pipe.fuse_qkv_projections()
    with pytest.raises(ErasureCompatibilityError, match="unfuse_qkv_projections"):
        erase(pipe, "cat", method="uce")


def test_defaults_are_documented() -> None:
    assert "uce" in method_names()
    assert resolve(Config(), Settings).template_list == TEMPLATES["object_context"]
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)
