"""Whitened LoRA: a step changes what targets have of their own, and hardly what they share with what is retained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import Erasure, ErasureInputError, demo, erase
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.fitting import recipe_of
from diffusers_erasure.lists import read_list
from diffusers_erasure.training import TrainingRun, loop
from diffusers_erasure.training.epr_student import CHILD, EprStudent
from diffusers_erasure.training.student import ADAPTER, LoraStudent
from diffusers_erasure.training.whitening import GAIN, Whitening, padded, whitening_matrix
from tests.flow_pipes import tiny_sd3_pipe
from tests.helpers import Cut, cut_after, tiny_sd_pipe
from tests.test_null_space import FEW, factors, inputs


QUIET = TrainingRun(progress=False)


@pytest.fixture(autouse=True)
def accelerate() -> Iterator[None]:
    with accelerate_state_restored():
        yield


def trained(pipe: Any, **more: Any) -> Erasure:
    return erase(pipe, "cat", training=more.pop("training", QUIET), **{**FEW, "whiten": 0.01, **more})


# ------------------------------------------------------------------------------------------------------ the algebra


def some_rows() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0, 5, 3, 2, 1, 1, 0.5, 0.2, 0.1, 0, 0, 0], dtype=torch.float64)
    kept = 1 + torch.randn(40, 12, generator=generator, dtype=torch.float64) * scales
    return kept, [torch.randn(5, 12, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_the_matrix_is_the_root_of_the_inverse_moment(ridge: float) -> None:
    """W W (C / c + ridge I) = s^2 I, with the scale by which the targets' farthest rows are as far from the mean as is said."""
    kept, targets = some_rows()
    matrix, count = whitening_matrix(kept.split(7), targets, ridge)
    moment = kept.T @ kept / len(kept)
    mean = moment.trace() / 12
    product = matrix @ matrix @ (moment / mean + ridge * torch.eye(12, dtype=torch.float64))
    scale = float(product.trace()) / 12
    assert (product / scale - torch.eye(12, dtype=torch.float64)).abs().max() < 1e-9
    assert (matrix - matrix.T).abs().max() < 1e-9 * matrix.abs().max()
    apart = [each - kept.mean(0) for each in targets]
    lengths = [
        sum(float((each @ of).square().sum(1).max()) for each in apart) for of in (matrix, torch.eye(12).double())
    ]
    assert lengths[0] / lengths[1] == pytest.approx(GAIN**2, rel=1e-12)
    shares = torch.linalg.eigvalsh(moment) / mean
    assert count == pytest.approx(float((shares / (shares + ridge)).sum()), rel=1e-9)


def test_a_wide_ridge_only_scales() -> None:
    """Then all directions count as much as ever."""
    kept, targets = some_rows()
    matrix, count = whitening_matrix([kept], targets, 1e9)
    assert (matrix - GAIN * torch.eye(12, dtype=torch.float64)).abs().max() < 1e-6 and count < 1e-6


def test_what_stands_behind_what_is_whitened_is_read_as_it_is() -> None:
    """SDXL's sizes and the pooled vector go through one Linear."""
    found = padded(torch.full((2, 2), 3.0), 3)
    assert found.tolist() == [[3, 3, 0], [3, 3, 0], [0, 0, 1]]
    assert torch.equal(padded(found, 3), found)


# ----------------------------------------------------------------------------------------------------- what is trained


def test_an_identity_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through the parametrization is the plain one, bit for bit."""

    def identity(pipe: Any, ridge: float, sites: Any, prompts: Any, *_: Any) -> Whitening:
        return Whitening({site: torch.eye(prompts.rows.shape[-1]) for site in sites if ".attn2.to_k" in site})

    plain = trained(tiny_sd_pipe(), whiten=0.0)
    monkeypatch.setattr(loop, "whitening", identity)
    found = trained(tiny_sd_pipe())
    for part in ("lora_A", "lora_B"):
        expected = factors(plain, part)
        assert all(torch.equal(value, expected[site]) for site, value in factors(found, part).items())


def test_what_acts_in_training_is_what_is_saved() -> None:
    """A' W, in a LoRA and in DuMo's deltas; and a gradient reaches A'."""
    unet: Any = tiny_sd_pipe().unet
    site = next(name for name, _ in unet.named_modules() if name.endswith("attn2.to_k"))
    width = unet.get_submodule(site).in_features
    whitened = Whitening({site: torch.randn(width, width, generator=torch.Generator().manual_seed(0))})
    for student, end in ((LoraStudent([site], 2, 0), ".lora_A.weight"), (EprStudent("compact", 2, 2, 0), ".down")):
        student.whitening = whitened
        with student.inside(unet) as trained_values:
            if isinstance(student, LoraStudent):
                acting = unet.get_submodule(site).lora_A[ADAPTER].weight
            else:
                epr: Any = unet.get_submodule(CHILD)
                acting = epr.deltas[epr.sites[site]].down
            acting.sum().backward()
            assert bool(trained_values[site + end].grad.any())
            saved = student.layer({name: value.detach() for name, value in trained_values.items()}).tensors
            assert torch.equal(acting, saved[site + end])
            assert not torch.equal(acting, trained_values[site + end])


def test_what_is_retained_changes_less_for_as_much_change_of_the_target() -> None:
    """With no retained prompt in the loss, so that nothing but the whitening holds them."""
    pipe = demo.load_pipeline()
    read = inputs(pipe, ["dog", "fox", "guitar", "cat"])
    ratios = {}
    for ridge in (0.0, 0.01):
        kept = ["dog", "fox", "guitar"]
        how = {"train_set": "x-strict", "retain": kept, "retain_weight": 0.0, "learning_rate": 0.003}
        erasure = trained(demo.load_pipeline(), whiten=ridge, **how)
        downs, ups = factors(erasure, "lora_A"), factors(erasure, "lora_B")

        def change(texts: list[str], downs: Any = downs, ups: Any = ups) -> float:
            parts = [
                (read[site][text] @ downs[site].T @ ups[site].T).square().sum() for site in downs for text in texts
            ]
            return float(sum(parts)) / len(texts)

        ratios[ridge] = change(kept) / change(["cat"])
    assert ratios[0.01] < 0.5 * ratios[0.0]


def test_other_layers_read_what_they_always_do() -> None:
    """Queries and outputs of cross-attention begin as they do without it; what text enters by is read through W."""
    plain = factors(trained(tiny_sd_pipe(), train_set="x", whiten=0.0, steps=1), "lora_A")
    erasure = trained(tiny_sd_pipe(), train_set="x", steps=1)
    found, told = factors(erasure, "lora_A"), erasure.config.diagnostics["whitened"]
    of_text = {site for site in found if site.endswith((".to_k", ".to_v"))}
    assert sum(each["layers"] for each in told.values()) == len(of_text) < len(found)
    for site, value in found.items():
        # One step of Adam moves each value by the rate (0.02); W moves them by as much as they are.
        assert ((value - plain[site]).abs().max() > 0.05) == (site in of_text)


@pytest.mark.parametrize("load", [tiny_sd_pipe, tiny_sd3_pipe])
def test_where_no_layer_reads_text_nothing_is_whitened(load: Any) -> None:
    train_set = "u" if load is tiny_sd_pipe else "x-strict"
    plain, found = (trained(load(), train_set=train_set, whiten=ridge) for ridge in (0.0, 0.01))
    assert "whitened" not in found.config.diagnostics
    assert all(torch.equal(plain.tensors[c][n], v) for c, own in found.tensors.items() for n, v in own.items())


def test_the_doors_of_a_transformer_are_whitened_each_by_its_own() -> None:
    told = trained(tiny_sd3_pipe(), train_set="x").config.diagnostics["whitened"]
    assert len(told) == 2 and all(each["layers"] == 1 and each["prompts"] == 2 for each in told.values())


def test_without_anything_retained_a_list_of_words_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    original = loop.whitening
    monkeypatch.setattr(loop, "whitening", lambda *a: asked.append(list(a[4])) or original(*a))
    trained(tiny_sd_pipe(), retain=())
    trained(tiny_sd_pipe(), retain=["dog"], retain_weight=0.0)
    assert asked[0] == list(read_list("list:things")) and set(asked[1]) == {"dog"}


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tiny_sd_pipe())
    run = TrainingRun(checkpoint_dir=tmp_path, checkpoint_every=1, resume=True, progress=False)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 2)
        trained(tiny_sd_pipe(), training=run)
    assert trained(tiny_sd_pipe(), training=run).to_files() == whole.to_files()
    with pytest.raises(ErasureInputError, match="another run"):
        trained(tiny_sd_pipe(), whiten=0.02, training=run)


def test_an_artefact_from_before_is_repeated_without() -> None:
    """It records no `whiten`, which its method now takes by default."""
    erasure = trained(tiny_sd_pipe(), whiten=None)
    assert recipe_of(erasure)["settings"]["whiten"] == erasure.config.method.settings.pop("whiten") > 0
    assert recipe_of(erasure)["settings"]["whiten"] == 0


def test_the_base_is_as_it_was() -> None:
    pipe = tiny_sd_pipe()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    trained(pipe)
    after = pipe.unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(value, before[name]) for name, value in after.items())


def test_dumos_compact_form_reads_text_whitened_in_the_encoder() -> None:
    """Its first values are what the text is read by, and the second stage, which has no such layers, needs no text encoder."""
    how: dict[str, Any] = {"method": "dumo", "schedule_steps": 1, "train_set": None, "steps": 1}
    plain, found = (trained(tiny_sd_pipe(), **how, whiten=ridge) for ridge in (0.0, 0.01))
    (before,), (after,) = plain.tensors.values(), found.tensors.values()
    downs = [name for name in after if name.endswith(".down") and ".zero." not in name]
    changed = {name for name in downs if not torch.equal(before[name], after[name])}
    of_text = {name for name in downs if "attn2.to_k" in name or "attn2.to_v" in name}
    assert of_text and of_text <= changed
    full = trained(tiny_sd_pipe(), **how, form="full")
    assert "whitened" in found.config.diagnostics and "whitened" not in full.config.diagnostics


def test_where_it_cannot_be_it_is_told() -> None:
    with pytest.raises(ErasureInputError, match="`null_space` and `whiten` are two ways"):
        trained(tiny_sd_pipe(), null_space=0.5)
    with pytest.raises(ErasureInputError, match="`whiten` must be"):
        trained(tiny_sd_pipe(), whiten=-1)
