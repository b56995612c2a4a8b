"""EAP: its reduction to ESD, the adversary's gradient and picks, its pools, and short runs on all families."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_erasure import ErasureInputError, demo, erase
from diffusers_erasure.base_model import component, family_of
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.denoising.prompts import nearest
from diffusers_erasure.denoising.sampler import Sampler, sampler_for
from diffusers_erasure.lists import Retained
from diffusers_erasure.methods import eap, esd, hard_pool
from diffusers_erasure.training import TrainingRun
from diffusers_erasure.training.adversary import Adversary
from diffusers_erasure.training.loop import Trainer
from diffusers_erasure.training.objective import RETAIN, STUDENT, Adversarial, Step
from diffusers_erasure.training.pool import Drawn, Example
from tests.flow_pipes import tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import tiny_sd_pipe, tiny_sdxl_pipe


QUIET = TrainingRun(progress=False)
FEW: dict[str, Any] = {
    **{"steps": 6, "rank": 2, "num_inference_steps": 3, "trajectories": 3, "batch_size": 2, "accumulation": 1},
    **{"learning_rate": 1e-2, "templates": "none", "compare": False, "training": QUIET},
}
KEPT = ["dog", "fox", "tree"]
LORA = "pytorch_lora_weights.safetensors"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def accelerate() -> Any:
    with accelerate_state_restored():
        yield


# ------------------------------------------------------------------------------------------------ what it reduces to


def test_an_empty_pool_is_esd(pipe: Any) -> None:
    """The same losses and the same LoRA, bit for bit, with retained prompts and without."""
    for retain in ([], KEPT):
        found = erase(pipe, "cat", method="eap", pool=(), retain=retain, **FEW)
        plain = erase(pipe, "cat", method="esd", retain=retain, **FEW)
        assert same(dict(found.tensors[LORA]), dict(plain.tensors[LORA]))
        assert found.config.diagnostics["loss"] == plain.config.diagnostics["loss"]


class Known:
    """A step of which all is known, in float64."""

    def __init__(self, sampler: Any) -> None:
        generator = torch.Generator().manual_seed(7)
        values = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4))
        self.own, self.concept, self.neutral, self.latents = values
        self.network = SimpleNamespace(sampler=sampler)
        self.drawn = SimpleNamespace(timesteps=sampler.timesteps[:3])

    def teacher(self, *roles: str) -> list[torch.Tensor]:
        return [self.neutral if role == esd.NEUTRAL else self.concept for role in roles]

    def student(self) -> torch.Tensor:
        return self.own


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_losses_of_clean_latents_are_those_of_predictions_scaled(kind: str) -> None:
    """By hand in float64: x0 of student and target, at the same latents."""
    if kind == "flow":
        sampler = sampler_for(tiny_flux_pipe(), 6, (8, 8))
    else:
        sampler = Sampler({"prediction_type": kind, "beta_schedule": "scaled_linear"}, 6)
    step: Any = Known(sampler)
    if kind == "flow":
        sigma = step.drawn.timesteps.double()[:, None, None, None] / 1000

        def clean(prediction: torch.Tensor) -> torch.Tensor:
            return step.latents - sigma * prediction
    else:
        kept = sampler.scheduler.alphas_cumprod.double()[step.drawn.timesteps][:, None, None, None]

        def clean(prediction: torch.Tensor) -> torch.Tensor:
            if kind == "v_prediction":
                return kept.sqrt() * step.latents - (1 - kept).sqrt() * prediction
            return (step.latents - (1 - kept).sqrt() * prediction) / kept.sqrt()

    eta = 1.5
    target = clean(step.neutral) - eta * (clean(step.concept) - clean(step.neutral))
    by_hand = (clean(step.own) - target).square().flatten(1).mean(1)
    found = eap.Objective(eta, "x0", None).loss(step)
    assert float((found / by_hand - 1).abs().max()) < 1e-5  # the scheduler's own numbers are float32
    plain = eap.Objective(eta, "eps", None).loss(step)
    assert torch.equal(plain, esd.Objective(eta).loss(step))
    assert float((found / plain).max() / (found / plain).min()) > 1.05  # it does weigh


# ------------------------------------------------------------------------------------------------------ the adversary


def adversary(pools: list[list[str]], **more: Any) -> Adversary:
    texts = list(dict.fromkeys(text for pool in pools for text in pool))
    how = {"temperature": 2.0, "learning_rate": 0.1, "share": 1.0, **more}
    return Adversary(Adversarial(pools, **how), [Example({RETAIN: text}) for text in texts], pools, 0)


class Linear:
    """A network whose predictions are linear in a prompt's row, float64: the student's are off by `hurt` of the row."""

    def __init__(self, prompts: list[str], hurt: list[float]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randn(len(prompts), 5, generator=generator, dtype=torch.float64)
        self.map = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        self.index = {prompt: i for i, prompt in enumerate(prompts)}
        self.off = torch.tensor(hurt, dtype=torch.float64)
        self.model, self.sampler = SimpleNamespace(device=torch.device("cpu")), None

    def predicted(self, weights: torch.Tensor, student: bool) -> torch.Tensor:
        own = (1 + self.off)[:, None] * self.rows if student else self.rows
        return (weights @ own @ self.map).reshape(2, 2, 2)

    def call(self, latents: torch.Tensor, timesteps: torch.Tensor, asked: list[Any]) -> torch.Tensor:
        found = []
        for mixture in asked:
            weights = torch.zeros(len(self.index), dtype=torch.float64)
            places = torch.tensor([self.index[part] for part in mixture.parts])
            found.append(self.predicted(weights.index_add(0, places, mixture.weights), True))
        return torch.stack(found)

    def drawn(self, search: Adversary, picks: Any) -> Drawn:
        texts = [
            next(text for text, i in self.index.items() if i == place) if place >= 0 else next(iter(self.index))
            for place in picks.places.tolist()
        ]
        eye = torch.eye(len(self.index), dtype=torch.float64)
        known = torch.stack([self.predicted(eye[self.index[text]], False) for text in texts])
        zeros = torch.zeros(len(texts), 2, 2, 2)
        return Drawn(zeros, torch.zeros(len(texts)), [Example({RETAIN: text}) for text in texts], {RETAIN: known})


ALONE: Any = SimpleNamespace(device=torch.device("cpu"))


def test_the_gradient_of_the_logits_is_the_softmaxs_through_what_was_picked() -> None:
    """By hand, in float64: the loss's slope in the rows' weights, at the one that was picked, times the softmax's Jacobian."""
    words = ["a", "b", "c", "d"]
    network: Any = Linear(words, [0.1, 0.9, 0.3, -0.5])
    search = adversary([words])
    objective = eap.Objective(1.0, "eps", None)
    picks = search.picks([0, 0, 0], (4, 0), 3, slice(None))
    drawn = network.drawn(search, picks)
    expected = torch.zeros(1, 4, dtype=torch.float64)
    for row, place in enumerate(picks.places.tolist()):
        scores = (search.logits.detach()[0] + picks.noise[row]) / 2.0
        soft = scores.softmax(0)
        weights = torch.zeros(4, dtype=torch.float64)
        weights[place] = 1.0

        def loss(at: torch.Tensor, row: int = row) -> torch.Tensor:
            return (network.predicted(at, True) - drawn.known[RETAIN][row]).square().mean()

        steps = 1e-6 * torch.eye(4, dtype=torch.float64)
        slope = torch.stack([(loss(weights + each) - loss(weights - each)) / 2e-6 for each in steps])
        expected[0] += (torch.diag(soft) - soft[:, None] * soft[None]) @ slope / 2.0 / 3
    before = search.logits.detach().clone()
    search.ascend(network, objective, Step(network, drawn, drawn, picks=picks), ALONE)
    assert search.logits.grad is not None
    assert float((search.logits.grad + expected).abs().max()) < 1e-8 * float(expected.abs().max()) + 1e-9
    assert bool(((search.logits.detach() - before).sign() == expected.sign()).all())  # it climbs


def test_what_is_picked_is_one_of_the_concepts_own_pool() -> None:
    pools = [["a", "b", "c"], ["d", "e"]]
    search = adversary(pools, share=0.5)
    counted: Counter[int] = Counter()
    for step in range(60):
        picks = search.picks([0, 1, 1, 0], (step, 0), 4, slice(None))
        weights = search.weights(picks)
        assert sorted(set(weights.detach().flatten().tolist())) == [0.0, 1.0] and bool((weights.sum(1) == 1).all())
        assert [place >= 0 for place in picks.places.tolist()] == [False, True, False, True]  # every second
        counted.update(picks.places.tolist())
    assert set(counted) == {-1, 0, 1, 2, 3, 4}  # equal logits: all of both, and none of the other's
    parts = [search.picks([0, 1], (3, 0), 4, slice(i, i + 2)) for i in (0, 2)]
    whole = search.picks([0, 1, 0, 1], (3, 0), 4, slice(None))
    assert torch.equal(torch.cat([part.places for part in parts]), whole.places)


def test_it_finds_what_is_hurt_most() -> None:
    words = ["a", "b", "c", "d", "e", "f"]
    network: Any = Linear(words, [0.05, 0.05, 0.05, 2.0, 0.05, 0.05])
    search = adversary([words])
    objective = eap.Objective(1.0, "eps", None)
    late: Counter[int] = Counter()
    for step in range(300):
        picks = search.picks([0] * 4, (step, 0), 4, slice(None))
        late.update(picks.places.tolist() if step >= 200 else [])
        drawn = network.drawn(search, picks)
        search.ascend(network, objective, Step(network, drawn, drawn, picks=picks), ALONE)
    assert late[3] > 350
    assert next(iter(search.diagnostics["picked"][0])) == "d"
    again = adversary([words])
    again.restore({name: value.clone() for name, value in search.saved().items()})
    for each in (search, again):
        picks = each.picks([0] * 4, (999, 0), 4, slice(None))
        drawn = network.drawn(each, picks)
        each.ascend(network, objective, Step(network, drawn, drawn, picks=picks), ALONE)
    assert same(search.saved(), again.saved())


# ---------------------------------------------------------------------------------------------------------- the pools


def settings(**more: Any) -> Any:
    base = {
        "retain": Retained((), (), ()),
        "pool": hard_pool.RETAINED,
        "pool_nearest": 64,
        "pool_by": "rows",
        "pool_size": 8,
    }
    more_of_it = {
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "resolution": 0,
        "max_sequence_length": 0,
        "seed": 0,
    }
    return SimpleNamespace(**{**base, **more_of_it, **more})


def concepts(*names: str) -> list[Any]:
    return [SimpleNamespace(target=name, anchor=None) for name in names]


@pytest.fixture(scope="module")
def embedded() -> Any:
    return demo.load_pipeline()


def test_pools_are_near_by_rows_or_by_what_is_drawn(embedded: Any) -> None:
    animals, things = ["dog", "lion", "horse", "bear"], ["car", "pizza", "guitar", "rocket", "crown", "donut"]
    kept = Retained((*things, *animals, "a black cat"), (), ())
    by_rows, by_output = (
        hard_pool.pools_for(
            embedded, concepts("cat"), settings(retain=kept, pool_by=by, pool_size=3, pool_nearest=10)
        )[0]
        for by in ("rows", "output")
    )
    assert "a black cat" not in (*by_rows, *by_output)  # it names the target
    near = nearest(embedded, [*things, *animals], ["cat"], 10)
    assert by_rows == [near[0], near[3], near[6]]  # some of every nearness
    assert by_output == hard_pool.by_output(embedded, ["cat"], [near], settings())[0][:3] and by_output != by_rows
    (ordered,) = hard_pool.by_output(embedded, ["cat"], [[*things, "cat"]], settings())
    assert ordered[0] == "cat"  # nothing is as near as itself


def test_where_candidates_come_from(embedded: Any) -> None:
    words = hard_pool.candidates_of(embedded, settings(pool="vocabulary"))
    assert len(words) > 50 and "dog" in words and all(word.isalpha() and word.islower() for word in words)
    assert "airplane" in hard_pool.candidates_of(embedded, settings())  # nothing is retained: a shipped list
    assert hard_pool.candidates_of(embedded, settings(pool="list:styles"))
    assert hard_pool.candidates_of(embedded, settings(pool=("x", "y"))) == ["x", "y"]
    assert hard_pool.pools_for(embedded, concepts("cat"), settings(pool=())) == []
    with pytest.raises(ErasureInputError, match="each names a target"):
        hard_pool.pools_for(embedded, concepts("cat"), settings(pool=("cat", "a cat")))
    with pytest.raises(ErasureInputError, match="no list|there is no|There is no"):
        hard_pool.pools_for(embedded, concepts("cat"), settings(pool="list:nothing"))


def test_many_concepts_have_smaller_pools(embedded: Any, caplog: pytest.LogCaptureFixture) -> None:
    pools = hard_pool.pools_for(
        embedded, concepts(*("cat", "dog", "fox") * 40), settings(pool=demo.OBJECTS, pool_size=30)
    )
    assert len(pools) == 120 and {len(pool) for pool in pools} == {2} and "pools of 2 prompts" in caplog.text


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("make", [tiny_sd_pipe, tiny_sdxl_pipe, tiny_sd3_pipe, tiny_flux_pipe])
def test_it_runs_on_all_families_and_tells_what_it_picked(make: Any, tmp_path: Path) -> None:
    pipe = make()
    found = erase(pipe, ["cat", "bird"], method="eap", retain=KEPT, pool_size=2, adversarial_share=1.0, **FEW)
    told = found.config.diagnostics["adversary"]
    assert told["pool"] == [2, 2] and sum(sum(each.values()) for each in told["picked"]) == 6 * 2
    assert all(set(each) <= set(KEPT) for each in told["picked"]) and told["logits"] > 0
    found.save_pretrained(tmp_path / "e")
    assert "adversary" in (tmp_path / "e" / "README.md").read_text()
    assert not found.redacted().config.diagnostics


def test_ones_own_pool_is_not_told_by_a_redacted_erasure(pipe: Any) -> None:
    """What is near to a concept tells of it; shipped lists and what is retained do not."""
    found = erase(pipe, "cat", method="eap", pool=("kitten", "lynx"), retain=["dog"], **FEW)
    assert found.config.method.settings["pool"] == ["kitten", "lynx"]
    assert "pool" not in found.redacted().config.method.settings
    listed = erase(pipe, "cat", method="eap", pool="list:styles", retain=["dog"], pool_size=2, **FEW)
    assert listed.redacted().config.method.settings["pool"] == "list:styles"


def test_published_settings_run(pipe: Any) -> None:
    """Fresh denoising by the student for concepts and picks, in clean latents, among the tokenizer's words."""
    more = {"steps": 2, "num_inference_steps": 3, "pool": ("dog", "fox"), "training": QUIET, "compare": False}
    found = erase(pipe, "cat", method="eap", published=True, preset="object", **more)
    assert found.config.method.settings["loss_space"] == "x0" and found.config.method.settings["trajectories"] == 0
    assert sum(found.config.diagnostics["adversary"]["picked"][0].values()) == 2


def test_it_costs_at_most_two_and_a_half_times_esds_forwards(pipe: Any) -> None:
    """Rows of the denoiser's batches, counted in it, pools and picking included."""
    counts = {}
    for method, more in (("esd", {}), ("eap", {"pool_size": 32})):
        total = 0

        def count(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal total
            total += len(args[0] if args else kwargs["sample"])

        model = component(pipe, family_of(pipe).denoiser)
        handle = model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            erase(
                pipe,
                "zebra",
                method=method,
                retain=demo.OBJECTS[1:40],
                steps=40,
                compare=False,
                training=QUIET,
                **more,
            )
        finally:
            handle.remove()
        counts[method] = total
    assert counts["esd"] and counts["eap"] <= 2.5 * counts["esd"], counts


def test_the_adversary_acts_on_what_is_trained(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples that it picks are those that are trained on."""
    seen: list[tuple[list[int], list[str]]] = []
    draw = Trainer._draw

    def noted(self: Any, *arguments: Any) -> Any:
        step = draw(self, *arguments)
        picks = step.picks
        asked = [example.prompts[RETAIN] for example in step.retained.examples]
        texts = [self.players.adversary.texts[k] for k in picks.concepts]
        expected = [self.retained[place].prompts[RETAIN] if place >= 0 else None for place in picks.places.tolist()]
        assert [a for a, e in zip(asked, expected, strict=True) if e is not None] == [e for e in expected if e]
        assert all(e is None or e in own for e, own in zip(expected, texts, strict=True))
        assert [example.prompts[STUDENT] for example in step.drawn.examples]
        seen.append((picks.places.tolist(), asked))
        return step

    monkeypatch.setattr(Trainer, "_draw", noted)
    erase(pipe, ["cat", "bird"], method="eap", retain=KEPT, pool=("dog", "tree"), **FEW)
    assert len(seen) == FEW["steps"] and any(place >= 0 for places, _ in seen for place in places)
