"""GEM and EraseAnything: their losses by hand and in their limits, what they watch, and short runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffusers_erasure import ErasureInputError, erase
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.denoising.calls import Caller
from diffusers_erasure.denoising.prompts import Prompts
from diffusers_erasure.denoising.sampler import sampler_for
from diffusers_erasure.families import FAMILIES
from diffusers_erasure.methods import eraseanything, esd, gem
from diffusers_erasure.methods.eraseanything import WORD
from diffusers_erasure.schema import Concept
from diffusers_erasure.settings import Facts, resolve
from diffusers_erasure.training import TrainingRun
from diffusers_erasure.training.attention import AttentionToText, word_places
from diffusers_erasure.training.objective import STUDENT
from diffusers_erasure.training.pool import Drawn, Source
from diffusers_erasure.training.sites import find_sites
from tests.flow_pipes import LENGTH, tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import ROUNDINGS, Cut, cut_after, far, images, roundings


QUIET = TrainingRun(progress=False)
PIPES: dict[str, Any] = {"flux": tiny_flux_pipe, "sd3": tiny_sd3_pipe}
DRAW: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": LENGTH}
FEW: dict[str, Any] = {
    **{"steps": 4, "rank": 2, "num_inference_steps": 4, "learning_rate": 0.02, "templates": "none"},
    **{"compare": False, "training": QUIET},
}


@pytest.fixture(autouse=True)
def accelerate() -> Any:
    with accelerate_state_restored():
        yield


class Known:
    """A step of which all predictions are known, in float64."""

    def __init__(self, number: int = 0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.number = number
        shape, dtype = (3, 2, 4, 4), torch.float64
        self.own = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
        self.concept, self.neutral = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))

    def teacher(self, *roles: str) -> list[torch.Tensor]:
        return [self.neutral if role == gem.NEUTRAL else self.concept for role in roles]

    def student(self) -> torch.Tensor:
        return self.own


def gradient(objective: Any) -> tuple[torch.Tensor, torch.Tensor]:
    step: Any = Known()
    loss = objective.loss(step)
    (found,) = torch.autograd.grad(loss.sum(), step.own)
    return loss.detach(), found


# -------------------------------------------------------------------------------------------------------------- GEM


def test_gem_without_repulsion_is_regression_to_the_anchor() -> None:
    step = Known()
    loss, slope = gradient(gem.Objective(2.0, 0.0))
    way = (step.own - step.neutral).detach()
    size = way.flatten(1).norm(dim=1)
    assert (loss - 2 * size).abs().max() < 1e-12
    assert (slope - 2 * way / size[:, None, None, None]).abs().max() < 1e-12
    # Its square, over the number of values, is ESD's loss for the paper's eta = 0, and so is its gradient.
    of_esd, slope_of_esd = gradient(esd.Objective(0.0))
    assert ((loss / 2) ** 2 / way[0].numel() - of_esd).abs().max() < 1e-12
    scale = 2 * size[:, None, None, None] / way[0].numel()
    assert (slope / 2 * scale - slope_of_esd).abs().max() < 1e-12


def test_gem_by_hand_and_its_hinge() -> None:
    step: Any = Known()
    near, distant = ((step.own - each).detach().flatten(1).norm(dim=1) for each in (step.neutral, step.concept))
    for eta in (0.5, 1.0):
        loss, _ = gradient(gem.Objective(100.0, eta))
        assert (loss - 100 * (near - eta * distant).clamp_min(0)).abs().max() < 1e-10
    least = float((near / distant).max())
    loss, slope = gradient(gem.Objective(100.0, least * 1.001))  # nearer to the anchor than that: nothing more to do
    assert not loss.any() and not slope.any()
    # At the start the student is the base: nothing is infinite where it lies on the concept.
    step.own = step.concept.clone().requires_grad_()
    gem.Objective(1.0, 1.0).loss(step).sum().backward()
    assert bool(step.own.grad.isfinite().all()) and bool(step.own.grad.any())


def seen_by(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[list[Any], Any]:
    """What each step of a run is given, with all trajectories that were drawn; and the sampler of the whole way."""
    pipe, found = tiny_flux_pipe(), []
    draw, extend = Source.draw, Source.extend
    drawn: list[torch.Tensor] = []

    def noted(self: Any, *arguments: Any) -> Any:
        found.append(draw(self, *arguments))
        return found[-1]

    def kept(self: Any, *arguments: Any) -> int:
        count = extend(self, *arguments)
        drawn.append(self.latents.clone())
        return count

    monkeypatch.setattr(Source, "draw", noted)
    monkeypatch.setattr(Source, "extend", kept)
    erase(pipe, "cat", method="gem", published=True, **{**FEW, "batch_size": 3, "first_steps": 3, **settings})
    return list(zip(found, drawn, strict=True)), sampler_for(pipe, FEW["num_inference_steps"], (8, 8))


@pytest.mark.parametrize("late", [False, True])
def test_gem_takes_the_first_latents_of_a_trajectory_of_the_student(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, sampler = seen_by(monkeypatch, published_pairing=late)
    assert len(steps) == FEW["steps"]
    for step, (found, trajectory) in enumerate(steps):
        own = {float(time): latent for time, latent in zip(found.timesteps, found.latents, strict=True)}
        assert sorted(own, reverse=True) == sampler.timesteps[:3].tolist()
        for k, time in enumerate(sampler.timesteps[:3].tolist()):
            assert torch.equal(own[time], trajectory[0, k + late]), (step, k)
    # Each trajectory is another one, and starts with noise of its own.
    assert len({float(trajectory[0, 0].sum()) for _, trajectory in steps}) == FEW["steps"]


def test_dropout_depends_on_the_step_alone_and_is_not_in_the_erasure() -> None:
    first, second, without = (
        erase(tiny_flux_pipe(), "cat", method="gem", dropout=dropout, gradient_checkpointing=checkpointing, **FEW)
        for dropout, checkpointing in ((0.3, False), (0.3, True), (0.0, False))
    )
    assert first.tensors.keys() == without.tensors.keys()
    values = [
        torch.cat([v.flatten() for v in e.tensors["pytorch_lora_weights.safetensors"].values()])
        for e in (first, second, without)
    ]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_settings_of_gem() -> None:
    def rate(family: str) -> float:
        return resolve(gem.Config(published=True), gem.Settings, Facts(1, family=family)).learning_rate

    assert (rate("flux"), rate("stable-diffusion-3")) == (1e-3, 2e-4)
    published = resolve(gem.Config(published=True), gem.Settings, Facts(1, family="flux"))
    assert (published.gamma, published.eta, published.rank, published.dropout) == (100.0, 1.0, 16, 0.1)
    assert published.first_steps == published.batch_size == 10 and not published.published_pairing
    with pytest.raises(ErasureInputError, match="`gamma`"):
        gem.Config(gamma=0.0)


# ---------------------------------------------------------------------------------------------------- EraseAnything


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_attention_is_that_of_the_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed from the projections is what the block's own attention is given."""
    pipe = PIPES[name]()
    attention, calls = AttentionToText(), []
    kernel = F.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        calls.append((query, key))
        return kernel(query, key, *arguments, **more)

    family = FAMILIES[{"flux": "flux", "sd3": "stable-diffusion-3"}[name]]
    prompts = Prompts(pipe, ["a cat"], 16)
    call = Caller(family, pipe.transformer, prompts, sampler_for(pipe, 3, (8, 8)))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)  # text encoders call it too
    with torch.no_grad(), attention.watching(pipe.transformer):
        call(latents, torch.tensor([700.0, 300.0]), ["a cat", ""])
        found = attention.take(2)
    query, key = calls[1 if name == "flux" else -1]  # FLUX has its single blocks after the last double one
    if name == "flux" and query.shape[1] != 2:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    rows = prompts.rows.shape[1]
    whole = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    if name == "sd3":  # there the image comes first
        order = [*range(whole.shape[-1] - rows, whole.shape[-1]), *range(whole.shape[-1] - rows)]
        whole = whole[:, :, order][..., order]
    assert roundings(found, whole[..., :rows]) <= ROUNDINGS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


def test_where_a_word_stands() -> None:
    flux, sd3 = tiny_flux_pipe(), tiny_sd3_pipe()
    ids = flux.tokenizer_2("a red cat, a dog").input_ids
    (place,) = word_places(flux, "a red cat, a dog", "cat", LENGTH)
    assert ids[place] == flux.tokenizer_2("cat").input_ids[1]
    clip = sd3.tokenizer.model_max_length
    assert word_places(sd3, "a red cat", "cat", LENGTH) == [3, clip + 3]  # CLIP's rows come before T5's
    assert word_places(sd3, "a red cat", "red cat", 3) == [2, 3, clip + 2]  # what is cut off stands nowhere
    assert word_places(flux, "caterpillar", "cat", LENGTH) == word_places(flux, "caterpillar", "caterpillar", LENGTH)
    sd3.tokenizer_3 = None
    assert word_places(sd3, "a red cat", "cat", LENGTH) == [3]


class Watched(Known):
    """A step whose attention is known too: concept, and two retained words; 2 heads, 5 tokens, 4 of them text."""

    def __init__(self, number: int, objective: Any) -> None:
        super().__init__(number)
        examples = objective.examples([Concept("cat", "")], ("a {}",)) * 3
        self.weights = torch.rand(9, 2, 5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.moved = self.weights[:3] * 0.5 + 0.1
        self.asked: list[Any] = []
        self.drawn = Drawn(torch.zeros(3), torch.zeros(3), examples)
        objective.attention.take = self._take
        self.network: Any = type("Network", (), {"teacher_rows": lambda _, *given: self.asked.append(given[2])})()

    def _take(self, count: int) -> torch.Tensor:
        return self.weights[:count] if self.asked else self.moved[:count]


def eraser(**more: Any) -> eraseanything.Objective:
    places = {"a cat": [1, 2], "a dog": [2], "a fox": [0, 1, 2]}
    return eraseanything.Objective(1.0, 0.5, 0.2, {"cat": ("dog", "fox")}, places, **more)


def test_steps_erase_and_preserve_by_turns() -> None:
    objective = eraser()
    assert [objective.retains(number) for number in range(4)] == [False, True, False, True]
    assert [objective.rate(number) for number in range(3)] == [1.0, 0.5, 1.0]
    assert not any(eraser(alternates=False).retains(number) for number in range(4))
    assert eraser(alternates=False).rate(1) == 1.0


def test_eraseanything_by_hand() -> None:
    objective = eraser()
    lower: Any = Watched(0, objective)
    plain = esd.Objective(1.0).loss(lower)
    to_word = lower.moved[..., [1, 2]]
    expected = plain + 0.5 * to_word.norm(dim=1).flatten(1).sum(1)
    assert (objective.loss(lower) - expected).abs().max() < 1e-12
    assert not lower.asked  # the teacher is asked for nothing more

    upper: Any = Watched(1, objective)
    found = objective.loss(upper)
    (rows,) = upper.asked
    assert rows == [
        ["a cat"] * 3,
        ["a dog"] * 3,
        ["a fox"] * 3,
    ]  # the base, of the concept itself and of retained words

    def feature(weights: torch.Tensor, columns: list[int]) -> torch.Tensor:
        return F.normalize(weights[..., columns].sum(-1).mean(1), dim=1)

    own, base = feature(upper.moved, [1, 2]), feature(upper.weights[:3], [1, 2])
    others = feature(upper.weights[3:6], [2]), feature(upper.weights[6:], [0, 1, 2])
    scores = [((each * base).sum(1) / eraseanything.TEMPERATURE).exp() for each in (own, *others)]
    assert (found - 0.2 * (scores[0] / sum(scores)).log()).abs().max() < 1e-12


def test_without_its_further_terms_it_is_esd() -> None:
    objective = eraseanything.Objective(1.0, 0.0, 0.0, {"cat": ("dog",)}, alternates=False)
    for number in (0, 1):
        step: Any = Known(number)
        assert torch.equal(objective.loss(step), esd.Objective(1.0).loss(step))


def test_the_teacher_of_eraseanything_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the authors' code it is the student: its target then moves along with what is trained."""
    from diffusers_erasure.training.network import Network

    asked: list[list[torch.Tensor]] = []
    teacher = Network.teacher_rows

    def noted(self: Any, *arguments: Any, **more: Any) -> list[torch.Tensor]:
        before = [value.data for value in self.parameters]
        for value in self.parameters:
            value.data = torch.zeros_like(value)
        bare = self.student_rows(*arguments, **more)
        for value, old in zip(self.parameters, before, strict=True):
            value.data = old
        found = teacher(self, *arguments, **more)
        asked.append([each - other for each, other in zip(found, bare, strict=True)])
        assert any(bool(value.any()) for value in before)
        return found

    monkeypatch.setattr(Network, "teacher_rows", noted)
    erase(tiny_flux_pipe(), "cat", method="eraseanything", policy="student", retain=["dog", "fox"], **FEW)
    assert len(asked) >= FEW["steps"] and not any(bool(each.any()) for found in asked for each in found)


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("method", ["gem", "eraseanything"])
def test_runs_resume_and_are_loaded_by_stock_diffusers(
    method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FEW, "method": method, "retain": ["dog", "fox"]}
    pipe = PIPES[name]()
    drawn = images(pipe, **DRAW)
    whole = erase(pipe, "cat", **settings)
    settings["training"] = TrainingRun(
        checkpoint_dir=tmp_path / "run", checkpoint_every=1, resume=True, progress=False
    )
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 3)
        erase(PIPES[name](), "cat", **settings)
    assert erase(PIPES[name](), "cat", **settings).to_files() == whole.to_files()
    sites = set(whole.config.layers[0].sites)
    if name == "sd3":  # where text enters too
        assert sites == set(find_sites(pipe, "x"))
    else:
        assert sites == set(find_sites(pipe, "qk_dual" if method == "gem" else "text_kq"))
    whole.save_pretrained(tmp_path / "out")
    stock = PIPES[name]()
    pipe.load_erasure(tmp_path / "out")
    stock.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
    ours = images(pipe, **DRAW)
    assert far(ours, drawn) > 1e-3 and roundings(ours, images(stock, **DRAW)) <= ROUNDINGS


def test_what_cannot_be_done_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from tests.helpers import tiny_sd_pipe

    with pytest.raises(ErasureInputError, match="gradient_checkpointing"):
        erase(tiny_flux_pipe(), "cat", method="eraseanything", gradient_checkpointing=True, **FEW)
    for method in ("gem", "eraseanything"):
        with pytest.raises(Exception, match="works on stable-diffusion-3 and flux"):
            erase(tiny_sd_pipe(), "cat", method=method, **FEW)
    with pytest.raises(ErasureInputError, match="two steps of denoising"):
        erase(tiny_flux_pipe(), "cat", method="gem", published_pairing=True, **{**FEW, "num_inference_steps": 1})


def test_each_concept_has_words_of_its_own() -> None:
    words = {"cat": ("dog", "fox"), "bus": ("car", "van")}
    objective = eraseanything.Objective(1.0, 0.5, 0.2, words)
    examples = objective.examples([Concept("cat", ""), Concept("bus", "car")], ("a {}", "the {}"))
    found = [(each.prompts[STUDENT], each.prompts[WORD.format(0)], each.prompts[WORD.format(1)]) for each in examples]
    assert found[:2] == [("a cat", "a dog", "a fox"), ("a bus", "a car", "a van")] and found[3][1] == "the car"
