"""Two switches of all trainers of LoRAs: the pull towards the base where a step leads away from it, and mixtures of prompts."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_erasure import Erasure, ErasureInputError, erase
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.denoising.prompts import Mixture, Prompts
from diffusers_erasure.denoising.sampler import SAMPLE
from diffusers_erasure.methods import eraseanything, get_method, make_config
from diffusers_erasure.methods.esd import CONCEPT, NEUTRAL
from diffusers_erasure.methods.esd import Objective as ESD
from diffusers_erasure.methods.sdd import Objective as SDD
from diffusers_erasure.schema import Concept
from diffusers_erasure.training import TrainingRun, loop
from diffusers_erasure.training.mixing import Mixing
from diffusers_erasure.training.objective import STUDENT, Step
from diffusers_erasure.training.pool import Drawn
from diffusers_erasure.training.pull import distance_gradients, pull
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import ROUNDINGS, Cut, cut_after, roundings, tiny_sd_pipe, tiny_sdxl_pipe


QUIET = TrainingRun(progress=False)
FEW: dict[str, Any] = {
    **{"method": "esd", "steps": 5, "rank": 2, "batch_size": 2, "trajectories": 3, "num_inference_steps": 3},
    **{"learning_rate": 0.02, "templates": ("{}", "a {}", "a photo of a {}"), "compare": False},
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def accelerate() -> Iterator[None]:
    with accelerate_state_restored():
        yield


def trained(pipe: Any, **more: Any) -> Erasure:
    return erase(pipe, "cat", training=more.pop("training", QUIET), **{**FEW, **more})


def tensors(erasure: Erasure) -> dict[str, torch.Tensor]:
    (found,) = erasure.tensors.values()
    return found


def same(one: Erasure, other: Erasure) -> bool:
    """Whether all values are the same, bit for bit."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------- the pull


def lora(zero: bool = False) -> dict[str, nn.Parameter]:
    """A Linear's and a convolution's, float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x.lora_A": (2, 6), "x.lora_B": (5, 2), "y.lora_A": (2, 3, 3, 3), "y.lora_B": (4, 2, 1, 1)}
    return {
        f"{name}.weight": nn.Parameter(
            torch.randn(shape, generator=generator, dtype=torch.float64) * (not zero or "lora_A" in name)
        )
        for name, shape in shapes.items()
    }


def by_hand(factors: dict[str, nn.Parameter]) -> torch.Tensor:
    """Half the square of what is added to all weights, for autograd."""
    linear = factors["x.lora_B.weight"] @ factors["x.lora_A.weight"]
    kernel = torch.einsum("or,rikl->oikl", factors["y.lora_B.weight"][:, :, 0, 0], factors["y.lora_A.weight"])
    return (linear.square().sum() + kernel.square().sum()) / 2


def in_a_row(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values[name].flatten() for name in sorted(values)])


def given(factors: dict[str, nn.Parameter], seed: int) -> dict[str, torch.Tensor]:
    """Gradients of a loss, put where an optimiser looks for them."""
    generator = torch.Generator().manual_seed(seed)
    for each in factors.values():
        each.grad = torch.randn(each.shape, generator=generator, dtype=each.dtype)
    return {name: each.grad.clone() for name, each in factors.items() if each.grad is not None}


def test_the_distances_gradient_is_autograds() -> None:
    factors = lora()
    expected = torch.autograd.grad(by_hand(factors), list(factors.values()))
    found = distance_gradients({name: each.detach() for name, each in factors.items()})
    for name, own in zip(factors, expected, strict=True):
        assert (found[name] - own).abs().max() < 1e-12


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.0])
def test_where_a_step_leads_away_that_part_is_taken_out(weight: float) -> None:
    factors, seen = lora(), set()
    g_r = in_a_row(dict(zip(factors, torch.autograd.grad(by_hand(factors), list(factors.values())), strict=True)))
    for seed in range(8):
        g_e = in_a_row(given(factors, seed))
        product = float(g_e @ g_r)
        pull(factors, weight)
        found = in_a_row({name: each.grad for name, each in factors.items() if each.grad is not None})
        if product < 0:
            assert (found - (g_e - weight * product / float(g_r @ g_r) * g_r)).abs().max() < 1e-12
            assert float(found @ g_r) == pytest.approx((1 - weight) * product, abs=1e-10)
        else:
            assert torch.equal(found, g_e)
        seen.add(product < 0)
    assert seen == {True, False}


def test_at_the_start_there_is_nothing_to_be_pulled_back_from() -> None:
    factors = lora(zero=True)
    before = in_a_row(given(factors, 0))
    pull(factors, 1.0)
    assert torch.equal(in_a_row({name: each.grad for name, each in factors.items() if each.grad is not None}), before)


def test_the_pull_rises_over_the_run_and_keeps_the_student_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"learning_rate": 1e-3}  # so that all steps lead away from the base
    plain = trained(tiny_sd_pipe(), **slow)
    weights: list[float] = []
    monkeypatch.setattr(loop, "pull", lambda factors, weight: weights.append(weight) or pull(factors, weight))
    assert same(trained(tiny_sd_pipe(), pull=0.0, **slow), plain) and not weights
    pulled = trained(tiny_sd_pipe(), pull=0.8, **slow)
    assert weights == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert not same(pulled, plain)

    def far(erasure: Erasure) -> float:
        own = tensors(erasure)
        return sum(
            float((own[name.replace("lora_A", "lora_B")].flatten(1) @ each.flatten(1)).square().sum())
            for name, each in own.items()
            if "lora_A" in name
        )

    assert far(pulled) < far(plain)


def test_a_run_of_one_step_is_not_pulled() -> None:
    one = {"steps": 1}
    assert same(trained(tiny_sd_pipe(), pull=1.0, **one), trained(tiny_sd_pipe(), **one))


# ----------------------------------------------------------------------------------------------------- the mixtures


TEMPLATES = ("{}", "a {}", "a photo of a {}", "two {}")
CONCEPTS = [Concept("cat", "pet"), Concept("dog", "")]


def drawn_from(mixing: Mixing, places: list[int]) -> Drawn:
    nothing = torch.zeros(len(places), 4, 8, 8)
    return Drawn(nothing, torch.tensor([999] * len(places)), [mixing.examples[place] for place in places])


def test_the_weights_are_convex_the_same_for_all_roles_and_depend_on_the_step_alone() -> None:
    examples = ESD(1.0).examples(CONCEPTS, TEMPLATES)
    mixing = Mixing(examples, 2, 3, seed=5)
    places = [0, 1, 4, 7]
    drawn = drawn_from(mixing, places)
    mixed = mixing.of(drawn, (7, 0), 4, slice(0, 4))
    assert mixed.latents is drawn.latents and mixed.examples == drawn.examples
    for place, asked in zip(places, mixed.mixed, strict=True):
        target, anchor = CONCEPTS[place % 2].target, CONCEPTS[place % 2].anchor
        student = asked[STUDENT]
        assert isinstance(student, Mixture) and asked[CONCEPT] == student
        assert len(set(student.parts)) == 3 and student.parts[0] == TEMPLATES[place // 2].format(target)
        assert math.fsum(student.weights) == pytest.approx(1, abs=1e-15) and min(student.weights) > 0
        chosen = [TEMPLATES.index(part.replace(str(target), "{}")) for part in student.parts]
        if anchor:
            expected = tuple(TEMPLATES[i].format(anchor) for i in chosen)
            assert asked[NEUTRAL] == Mixture(expected, student.weights)
        else:
            assert asked[NEUTRAL] == ""  # the empty prompt is the same in all templates
    assert mixing.of(drawn, (7, 0), 4, slice(0, 4)) == mixed
    parts = [mixing.of(drawn_from(mixing, places[i : i + 2]), (7, 0), 4, slice(i, i + 2)) for i in (0, 2)]
    assert [each for part in parts for each in part.mixed] == mixed.mixed  # two processes share a batch
    assert mixing.of(drawn, (8, 0), 4, slice(0, 4)).mixed != mixed.mixed
    assert Mixing(examples, 2, 3, seed=6).of(drawn, (7, 0), 4, slice(0, 4)).mixed != mixed.mixed
    assert mixing.mixes(STUDENT) and mixing.mixes(NEUTRAL)
    assert not Mixing(ESD(1.0).examples([Concept("cat", "")], TEMPLATES), 1, 3, 0).mixes(NEUTRAL)


def test_the_weights_are_uniform_over_all_that_add_up_to_one() -> None:
    """Each of three then has the mean 1/3 and the variance 1/18."""
    mixing = Mixing(ESD(1.0).examples(CONCEPTS, TEMPLATES), 2, 3, seed=0)
    found = mixing.of(drawn_from(mixing, [0] * 4000), (0, 0), 4000, slice(0, 4000)).mixed
    weights = torch.tensor([each[STUDENT].weights for each in found if isinstance(each[STUDENT], Mixture)])
    assert weights.shape == (4000, 3)
    assert (weights.mean(0) - 1 / 3).abs().max() < 0.02 and (weights.var(0) - 1 / 18).abs().max() < 0.005
    others = {part for each in found if isinstance(own := each[STUDENT], Mixture) for part in own.parts[1:]}
    assert others == {template.format("cat") for template in TEMPLATES[1:]}


@pytest.mark.parametrize("load", [tiny_sd_pipe, tiny_sdxl_pipe, tiny_sd3_pipe, tiny_flux_pipe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_is_that_of_the_encodings(load: Any, dtype: torch.dtype) -> None:
    texts = ["cat", "a photo of a cat"]
    prompts = Prompts(load(), texts, 16)
    both = prompts.batch(texts, CPU, dtype)
    mixed = prompts.batch([Mixture(tuple(texts), (0.25, 0.75)), "cat"], CPU, dtype)
    pooled = prompts.family.pooled

    def parts(found: dict[str, Any]) -> list[torch.Tensor]:
        more = found | found.get("added_cond_kwargs", {})
        return [more[prompts.family.argument], *([] if pooled is None else [more[pooled.input]])]

    for own, plain in zip(parts(mixed), parts(both), strict=True):
        assert own.dtype == dtype and torch.equal(own[1], plain[0])
        assert torch.equal(own[0], (plain[0].float() * 0.25 + plain[1].float() * 0.75).to(dtype))


def test_teacher_and_student_are_asked_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LoRA starts at zero, so that in the first step the student's prediction is the base's for the very same mixture."""
    seen: list[tuple[list[Any], torch.Tensor, torch.Tensor]] = []
    loss = ESD.loss

    def noted(self: Any, step: Step) -> torch.Tensor:
        student, teacher = step.student(), step.teacher(STUDENT)[0]
        seen.append((step.drawn.asked(STUDENT), student.detach(), teacher))
        assert set(step.drawn.known) == {NEUTRAL}  # the empty prompt, which is the same at all times
        return loss(self, step)

    monkeypatch.setattr(ESD, "loss", noted)
    trained(tiny_sd_pipe(), mixtures=2)
    prompts, student, teacher = seen[0]
    assert all(isinstance(prompt, Mixture) for prompt in prompts)
    assert roundings(student, teacher) <= ROUNDINGS
    assert len({str(asked) for asked, _, _ in seen}) == len(seen)  # others in each step


def test_sdd_asks_the_student_for_the_anchors_mixture() -> None:
    mixing = Mixing(SDD().examples([Concept("cat", "pet"), Concept("dog", "")], TEMPLATES), 2, 2, 0)
    network: Any = None  # which is not asked
    step = Step(network, mixing.of(drawn_from(mixing, [0]), (0, 0), 1, slice(0, 1)))
    (own,), (anchor,) = step.drawn.asked(STUDENT), step.drawn.asked("neutral")
    assert isinstance(own, Mixture) and isinstance(anchor, Mixture) and own.weights == anchor.weights
    assert [part.replace("cat", "pet") for part in own.parts] == list(anchor.parts)
    assert "cat, dog" in step.drawn.examples[0].prompts[SAMPLE]


def test_eraseanything_looks_at_a_word_as_much_as_it_is_mixed_in() -> None:
    objective = eraseanything.Objective(1.0, 1.0, 0.0, places={"cat": [1], "a cat": [2]})
    mixing = Mixing(objective.examples([Concept("cat", "")], ("{}", "a {}")), 1, 2, 0)
    drawn = mixing.of(drawn_from(mixing, [1]), (0, 0), 1, slice(0, 1))
    asked = drawn.asked(STUDENT)[0]
    assert isinstance(asked, Mixture) and asked.parts == ("a cat", "cat")
    network: Any = None  # which is not asked
    step = Step(network, drawn)
    found = objective._to_words(torch.ones(1, 1, 1, 4), step, STUDENT).flatten().tolist()
    assert found == pytest.approx([0, asked.weights[1], asked.weights[0], 0])
    plain = Step(network, drawn_from(mixing, [1]))
    assert objective._to_words(torch.ones(1, 1, 1, 4), plain, STUDENT).flatten().tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("load", "more"),
    [
        (tiny_sd_pipe, {"retain": ["dog"]}),
        (tiny_sd_pipe, {"policy": "student", "trajectories": 0, "accumulation": 2, "anchors": "pet"}),
        (tiny_sd_pipe, {"method": "sdd", "ema_decay": 0.8}),
        (tiny_flux_pipe, {"method": "gem", "anchors": "pet"}),
        (tiny_sd3_pipe, {"method": "eraseanything", "retain": ["dog"]}),
    ],
    ids=["base", "fresh", "sdd", "gem", "eraseanything"],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    load: Any, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, whole = trained(load(), **more), trained(load(), mixtures=2, pull=0.5, **more)
    assert not same(plain, whole)
    run = TrainingRun(checkpoint_dir=tmp_path, checkpoint_every=1, resume=True, progress=False)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 3)
        trained(load(), mixtures=2, pull=0.5, training=run, **more)
    assert trained(load(), mixtures=2, pull=0.5, training=run, **more).to_files() == whole.to_files()


def test_without_mixtures_all_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(tiny_sd_pipe(), retain=["dog"])
    monkeypatch.setattr(loop, "Mixing", lambda *_: pytest.fail("asked for"))
    for count in (0, 1):
        assert same(trained(tiny_sd_pipe(), retain=["dog"], mixtures=count), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixtures": 4}, "`mixtures` is 4, but a concept has prompts in 3 templates"),
        ({"mixtures": 2, "templates": "none"}, "`mixtures` is 2, but a concept has prompts in 1 templates"),
        ({"mixtures": -1}, "`mixtures` must be"),
        ({"pull": -0.5}, "`pull` must be"),
    ],
)
def test_where_it_cannot_be_it_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        trained(tiny_sd_pipe(), **settings)


@pytest.mark.parametrize("settings", [{"null_space": 0.5}, {"pull": 1.0, "mixtures": 2}])
def test_dumo_trains_no_lora(settings: dict[str, Any]) -> None:
    with pytest.raises(ErasureInputError, match=f"no LoRA, for which `{'`, `'.join(settings)}` is made"):
        make_config(get_method("dumo"), settings)
