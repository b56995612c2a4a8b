"""The pieces of the trainer against values worked out otherwise, on a tiny network."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from torch import nn

from diffusers_erasure import ErasureCompatibilityError, ErasureInputError, demo, erase
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.denoising.prompts import Prompts, nearest
from diffusers_erasure.denoising.sampler import SAMPLE, Sampler, generator_for, partial, trajectories
from diffusers_erasure.encoding import last_rows
from diffusers_erasure.lists import read_list
from diffusers_erasure.methods.esd import CONCEPT as ERASED
from diffusers_erasure.methods.esd import NEUTRAL, Config, Settings, eta_of_paper
from diffusers_erasure.methods.esd import Objective as ESD
from diffusers_erasure.methods.sdd import Config as SDDConfig
from diffusers_erasure.methods.sdd import Objective as SDD
from diffusers_erasure.methods.sdd import Settings as SDDSettings
from diffusers_erasure.schema import Concept
from diffusers_erasure.settings import Facts, resolve
from diffusers_erasure.training import TrainConfig, TrainingRun, TrainSettings, resolved_for
from diffusers_erasure.training.network import Network, in_training
from diffusers_erasure.training.objective import RETAIN, STUDENT, Step
from diffusers_erasure.training.pool import MOST_RETAINED, Drawn, Example, Source
from diffusers_erasure.training.retaining import retained_examples
from diffusers_erasure.training.sites import TRAIN_SETS, check_rank, find_sites
from diffusers_erasure.training.student import ADAPTER, LoraStudent
from tests.helpers import ROUNDINGS, equal, images, roundings, tiny_sdxl_pipe, tree


SHAPE = (4, 8, 8)
QUIET = TrainingRun(progress=False)


@pytest.fixture(autouse=True)
def accelerate() -> Iterator[None]:
    with accelerate_state_restored():
        yield


class Opened:
    """A network in training, with the pieces around it."""

    def __init__(self, pipe: Any, prompts: tuple[str, ...], train_set: str = "x", steps: int = 5) -> None:
        self.pipe, self.sampler = pipe, Sampler(pipe.scheduler.config, steps)
        self.accelerator = Accelerator(cpu=True, device_placement=False)
        student = LoraStudent(list(find_sites(pipe, train_set)), 2, 0)
        self.context = in_training(pipe, student, Prompts(pipe, prompts, 16), self.sampler, self.accelerator, False)

    def __enter__(self) -> Network:
        return self.context.__enter__()

    def __exit__(self, *details: Any) -> None:
        self.context.__exit__(*details)


def disturb(network: Network, size: float = 0.3) -> None:
    """Make the LoRA do something: as it starts, it is the base."""
    with torch.no_grad():
        for name, parameter in network.factors.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator_for(1, name)) * size)


def some(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3)), torch.tensor(
        [999, 399, 199][:count]
    )


def direct(pipe: Any, latents: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The base's prediction, by the pipeline's own pieces."""
    with torch.no_grad():
        rows = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])
        return pipe.unet(latents, timesteps, encoder_hidden_states=rows).sample


# ----------------------------------------------------------------------------------------------------- the network


def test_the_teacher_is_the_base_and_the_student_is_not(pipe: Any) -> None:
    latents, timesteps = some()
    base = direct(pipe, latents, timesteps, ["a cat", "", "a dog"])
    with Opened(pipe, ("a cat", "a dog")) as network:
        # The LoRA starts at zero: both are the base, bit for bit.
        assert torch.equal(network.teacher_rows(latents, timesteps, [("a cat", "", "a dog")])[0], base)
        assert torch.equal(network.student(latents, timesteps, ("a cat", "", "a dog")), base)
        disturb(network)
        assert torch.equal(network.teacher_rows(latents, timesteps, [("a cat", "", "a dog")])[0], base)
        assert (network.student(latents, timesteps, ("a cat", "", "a dog")) - base).abs().max() > 1e-3
        assert all(parameter.requires_grad for parameter in network.parameters)
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters)


def test_a_batch_of_three_teachers_is_three_passes(pipe: Any) -> None:
    latents, timesteps = some()
    rows = [("a cat",) * 3, ("",) * 3, ("a dog", "a cat", "")]
    with Opened(pipe, ("a cat", "a dog")) as network:
        calls = []
        handle = network.model.register_forward_hook(lambda *a: calls.append(1))
        together = network.teacher_rows(latents, timesteps, rows)
        assert len(calls) == 1
        handle.remove()
        for row, found in zip(rows, together, strict=True):
            # Another batch size: the same sums in another order.
            assert roundings(found, network.teacher_rows(latents, timesteps, [row])[0]) <= ROUNDINGS


def test_the_pipeline_is_as_it_was(pipe: Any) -> None:
    pipe.unet.conv_in.requires_grad_(False)
    pipe.unet.train()
    drawn, before = images(pipe), tree(pipe)
    flags = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    with Opened(pipe, ("a cat",), "full") as network:
        disturb(network)
    erase(pipe, "cat", method="esd", steps=2, rank=2, trajectories=2, num_inference_steps=3, training=QUIET)
    with pytest.raises(ZeroDivisionError), Opened(pipe, ("a cat",)):
        _ = 1 / 0
    assert tree(pipe) == before and equal(images(pipe), drawn) and pipe.unet.training
    assert {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()} == flags
    assert not hasattr(pipe.unet, "peft_config") or ADAPTER not in pipe.unet.peft_config


def test_bf16_base_with_fp32_lora(pipe: Any) -> None:
    pipe.unet.to(torch.bfloat16)
    erasure = erase(pipe, "cat", method="esd", steps=2, rank=2, trajectories=2, num_inference_steps=3, training=QUIET)
    tensors = erasure.tensors["pytorch_lora_weights.safetensors"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert all(bool(tensor.any()) for tensor in ups)
    # Values that bfloat16 cannot hold: the factors were never rounded to it.
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in ups)


def test_gradient_checkpointing_changes_nothing_but_the_memory(pipe: Any) -> None:
    common: dict[str, Any] = {"method": "esd", "steps": 2, "rank": 2, "trajectories": 2, "num_inference_steps": 3}
    plain = erase(pipe, "cat", training=QUIET, **common)
    spared = erase(pipe, "cat", training=QUIET, gradient_checkpointing=True, **common)
    assert plain.content_hash == spared.content_hash and not pipe.unet.is_gradient_checkpointing


# ----------------------------------------------------------------------------------------------------- train sets


@pytest.mark.parametrize(
    ("name", "modules", "per_rank"),
    [
        ("x", 64, 99_456),
        ("x-strict", 32, 49_536),
        ("u", 215, 951_716),
        ("selfattn", 64, 99_840),
        ("full", 282, 1_058_216),
    ],
)
def test_train_sets_of_stable_diffusion_15(name: str, modules: int, per_rank: int) -> None:
    """Counts from the research notes, taken there from the model itself by the published rules."""
    from benchmarks.builders import make_unet

    class Pipe:
        unet = make_unet(device="meta")

    sites = find_sites(Pipe(), name)
    assert len(sites) == modules
    size = 0
    for module in sites.values():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        size += weight.shape[0] + weight[0].numel()
    assert size == per_rank  # peft's second factor of a convolution is 1 x 1, its first one has the kernel


def test_train_set_by_endings_and_wrong_ones(pipe: Any) -> None:
    assert all(name.endswith("attn2.to_v") for name in find_sites(pipe, ("attn2.to_v",)))
    assert set(find_sites(pipe, "noxattn")) == set(find_sites(pipe, "u"))
    assert not any("attn2" in name or name.startswith(("time_emb", "conv_out")) for name in find_sites(pipe, "u"))
    with pytest.raises(ErasureCompatibilityError, match="No Linear or convolution"):
        find_sites(pipe, ("attn7.to_v",))
    with pytest.raises(ErasureInputError, match="no train set 'y'"):
        Config(train_set="y")
    with pytest.raises(ErasureInputError, match=r"rank.*33.*at most 32"):
        check_rank({"a": nn.Linear(32, 64)}, 33)
    check_rank({"a": nn.Linear(32, 64), "b": nn.Conv2d(4, 64, 3)}, 32)
    assert find_sites(pipe, "doors") == find_sites(pipe, "x-strict")
    assert set(TRAIN_SETS) == {"x", "x-strict", "doors", "u", "selfattn", "full", "qk_dual", "text_kq"}


# ---------------------------------------------------------------------------------------------------- noisy latents


def by_diffusers(pipe: Any, noise: torch.Tensor, prompt: str, steps: int, taken: int) -> torch.Tensor:
    """Partial denoising by diffusers' own pipeline, as far as `taken` steps."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    x, found = noise.clone(), []

    def note(_: Any, index: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found.append(values["latents"].clone())
        return values

    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        pipe(
            prompt, num_inference_steps=steps, guidance_scale=4.0, latents=x, output_type="latent",
            callback_on_step_end=note,
        )  # fmt: skip
    finally:
        pipe.scheduler = before
    return x if not taken else found[taken - 1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noisy_latents_are_the_pipelines_own(pipe: Any, prediction: str) -> None:
    pipe.scheduler.register_to_config(prediction_type=prediction)
    with Opened(pipe, ("a cat", "a dog"), steps=5) as network:
        sampler = network.sampler
        noise = torch.stack([sampler.noise(0, ("x", i), SHAPE) for i in range(2)])
        pairs = trajectories(network.teacher_rows, sampler, noise, {SAMPLE: ["a cat", "a dog"]}, 4.0)
    assert pairs.latents.shape == (2, 5, *SHAPE) and sampler.timesteps[0] == 999
    for taken in range(5):
        own = by_diffusers(pipe, noise[:1], "a cat", 5, taken)[0]
        assert roundings(pairs.latents[0, taken], own) <= ROUNDINGS  # batches of 4 and of 2: sums in another order
    assert torch.equal(pairs.latents[:, 0], noise)  # k = 0 is the untouched noise


def test_fresh_denoising_is_a_trajectorys_point_and_done_ones_leave(pipe: Any) -> None:
    with Opened(pipe, ("a cat", "a dog"), steps=5) as network:
        sampler, sizes = network.sampler, []
        noise = torch.stack([sampler.noise(0, ("x", i), SHAPE) for i in range(4)])
        prompts = ["a cat", "a dog", "a cat", "a dog"]
        whole = trajectories(network.teacher_rows, sampler, noise, {SAMPLE: prompts}, 3.0).latents

        def counted(latents: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
            sizes.append(len(latents))
            return network.teacher_rows(latents, *rest)

        found = partial(counted, sampler, noise, [0, 2, 4, 2], prompts, 3.0)
    assert sizes == [3, 3, 1, 1]
    for i, taken in enumerate([0, 2, 4, 2]):
        assert roundings(found[i], whole[i, taken]) <= ROUNDINGS  # batches of other sizes
    assert torch.equal(found[0], noise[0])


def test_the_predictions_that_are_kept_are_the_teachers(pipe: Any) -> None:
    roles = {SAMPLE: ["a cat"] * 2, ERASED: ["a cat"] * 2, NEUTRAL: ["", ""], "other": ["a dog", "a cat"]}
    with Opened(pipe, ("a cat", "a dog"), steps=3) as network:
        noise = torch.stack([network.sampler.noise(0, (i,), SHAPE) for i in range(2)])
        calls = []

        def counted(latents: torch.Tensor, timesteps: torch.Tensor, rows: Any) -> list[torch.Tensor]:
            calls.append(len(rows))
            return network.teacher_rows(latents, timesteps, rows)

        pairs = trajectories(counted, network.sampler, noise, roles, 3.0, keep=(ERASED, NEUTRAL, "other"))
        assert calls == [3, 3, 3]  # the concept is what is denoised with, the anchor the unconditional half
        for k, timestep in enumerate(network.sampler.timesteps):
            at = timestep.expand(2)
            for role in (ERASED, NEUTRAL, "other"):
                expected = network.teacher_rows(pairs.latents[:, k], at, [roles[role]])[0]
                assert roundings(pairs.predictions[role][:, k], expected) <= ROUNDINGS


def test_sdxl_scales_what_goes_in_and_gives_its_conditioning(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sdxl_pipe()
    asked = []
    original = DDIMScheduler.scale_model_input
    monkeypatch.setattr(
        DDIMScheduler, "scale_model_input", lambda self, x, t=None: asked.append(1) or original(self, x, t)
    )
    prompts = Prompts(pipe, ["a cat"], 16)
    arguments = prompts.batch(["a cat", ""], torch.device("cpu"), torch.float32)
    rows, negative, pooled, negative_pooled = pipe.encode_prompt("a cat", device="cpu")
    assert torch.equal(arguments["encoder_hidden_states"], torch.cat([rows, negative]))
    assert torch.equal(arguments["added_cond_kwargs"]["text_embeds"], torch.cat([pooled, negative_pooled]))
    assert arguments["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert not negative.any()  # this configuration draws without a negative prompt from zeros
    erasure = erase(pipe, "cat", method="esd", steps=2, rank=2, trajectories=2, num_inference_steps=3, training=QUIET)
    assert asked and erasure.config.base_model.family == "stable-diffusion-xl"
    base = images(pipe)
    pipe.load_erasure(erasure)
    assert not equal(images(pipe), base)


# --------------------------------------------------------------------------------------------------------- sources


def source_of(network: Network, count: int, keep: tuple[str, ...] = (), **more: Any) -> Source:
    examples = [Example({SAMPLE: name, STUDENT: name}) for name in ("a cat", "a dog", "a fox")]
    arguments: dict[str, Any] = {"guidance_scale": 3.0, "seed": 0, "name": "x", "dtype": torch.float32, **more}
    return Source(network.sampler, examples, count, keep, SHAPE, **arguments)


def test_the_pool_replaces_its_oldest_and_knows_what_each_is_about(pipe: Any) -> None:
    with Opened(pipe, ("a cat", "a dog", "a fox"), steps=3) as network:
        accelerator = Accelerator(cpu=True)
        source = source_of(network, 4)
        assert source.extend(network.teacher_rows, accelerator, 4) == 4 and source.is_full
        first = source.latents.clone()
        assert source.extend(network.teacher_rows, accelerator, 2) == 2  # numbers 4 and 5 take the places 0 and 1
        assert torch.equal(source.latents[2:], first[2:])
        assert torch.equal(source.latents[0, 0], network.sampler.noise(0, ("x", 4), SHAPE))
        names = [source._example_at(place).prompts[SAMPLE] for place in range(4)]
        assert names == ["a dog", "a fox", "a fox", "a cat"]  # examples 4 % 3, 5 % 3, 2, 3 % 3


def test_draws_depend_on_the_step_alone_and_processes_share_a_batch(pipe: Any) -> None:
    with Opened(pipe, ("a cat", "a dog", "a fox"), steps=4) as network:
        source = source_of(network, 3)
        source.extend(network.teacher_rows, Accelerator(cpu=True), 3)
        whole = source.draw((7, 0), 4, slice(0, 4), lambda: network.teacher_rows)
        parts = [source.draw((7, 0), 4, slice(i, i + 2), lambda: network.teacher_rows) for i in (0, 2)]
        assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
        assert whole.examples == [example for part in parts for example in part.examples]
        assert sorted(whole.timesteps.tolist()) == sorted(network.sampler.timesteps.tolist())  # one of each quarter
        other = source.draw((8, 0), 4, slice(0, 4), lambda: network.teacher_rows)
        assert not torch.equal(whole.latents, other.latents)
        # A latent stands with the timestep at which it lies.
        for latent, timestep, example in zip(whole.latents, whole.timesteps, whole.examples, strict=True):
            k = network.sampler.timesteps.tolist().index(int(timestep))
            place = [p for p in range(3) if torch.equal(source.latents[p, k], latent)]
            assert [source._example_at(p) for p in place] == [example]


def test_half_of_the_samples_are_favoured(pipe: Any) -> None:
    with Opened(pipe, ("a cat", "a dog", "a fox"), steps=3) as network:
        source = source_of(network, 6, favoured=[2])
        chosen = source._chosen(4000, torch.Generator().manual_seed(0))
        assert set(chosen[::2].tolist()) == {2, 5} and set(chosen[1::2].tolist()) == set(range(6))


def test_most_retained_prompts_are_the_nearest_first() -> None:
    names = [f"thing {i}" for i in range(300)]
    found = [example.prompts[RETAIN] for example in retained_examples(names, names[280:283], ("{}", "a {}"))]
    assert len(found) == MOST_RETAINED and found[:4] == ["thing 280", "a thing 281", "thing 282", "a thing 0"]
    few = [example.prompts[RETAIN] for example in retained_examples(("dog", "fox"), ["fox"], ("{}", "a {}"))]
    assert few == ["fox", "a dog", "a fox"]
    assert retained_examples((), (), ("{}",)) == []


def test_nearest_retained_prompts() -> None:
    from diffusers_erasure import demo

    pipe = demo.load_pipeline()
    found = nearest(pipe, ["pizza", "rocket", "dog", "guitar", "fox"], ["cat"], 2)
    assert set(found) == {"dog", "fox"}
    assert nearest(pipe, [], ["cat"], 2) == [] == nearest(pipe, ["dog"], ["cat"], 0)


# ----------------------------------------------------------------------------------------------------------- losses


def step_of(network: Network, examples: list[Example], retained: Drawn | None = None) -> Step:
    latents, timesteps = some(len(examples))
    return Step(network, Drawn(latents, timesteps, examples), retained)


def test_esd_loss_by_hand(pipe: Any) -> None:
    concepts = [Concept("cat", ""), Concept("dog", "fox")]
    examples = ESD(1.0).examples(concepts, ("a {}",))
    assert [e.prompts[NEUTRAL] for e in examples] == ["", "a fox"]
    with Opened(pipe, ("a cat", "a dog", "a fox")) as network:
        disturb(network)
        latents, timesteps = some(2)
        cat, neutral = (
            network.teacher_rows(latents, timesteps, [row])[0] for row in (("a cat", "a dog"), ("", "a fox"))
        )
        with torch.no_grad():
            student = network.student(latents, timesteps, ("a cat", "a dog"))
            for eta in (0.0, 1.0, 2.5):
                paper = (student - (neutral - eta * (cat - neutral))).square().flatten(1).mean(1)
                newer = (student - (cat - eta_of_paper(eta) * (cat - neutral))).square().flatten(1).mean(1)
                own = ESD(eta).loss(step_of(network, examples))
                other = ESD(eta_of_paper(eta), newer=True).loss(step_of(network, examples))
                for value in (paper, newer, other):
                    assert roundings(own, value) <= ROUNDINGS


def test_esd_step_0_is_eta_squared_times_the_guidance(pipe: Any) -> None:
    """The LoRA starts at zero, so that the student is the base: |e*(f) - target|^2 = eta^2 |e*(c) - e*(0)|^2."""
    with Opened(pipe, ("a cat", "a pet")) as network:
        latents, timesteps = some(2)
        cat, empty = network.teacher_rows(latents, timesteps, [("a cat",) * 2, ("",) * 2])
        way = (cat - empty).square().flatten(1).mean(1)
        for eta, erase_from in ((2.0, None), (3.0, "pet")):
            objective = ESD(eta, erase_from, newer=True)
            examples = objective.examples([Concept("cat", "")] * 2, ("a {}",))
            source = {example.prompts[STUDENT] for example in examples} | {e.prompts[SAMPLE] for e in examples}
            assert source == {f"a {erase_from or 'cat'}"}
            with torch.no_grad():
                # Of the difference of two predictions, so that more digits are lost than a loss has by itself.
                assert roundings(objective.loss(step_of(network, examples)), eta**2 * way) <= 5 * ROUNDINGS


def test_sdd_loss_by_hand(pipe: Any) -> None:
    concepts = [Concept("cat", ""), Concept("dog", "")]
    examples = SDD().examples(concepts, ("a {}",))
    assert {e.prompts[SAMPLE] for e in examples} == {"a cat, dog"}
    assert [e.prompts[SAMPLE] for e in SDD(joined=False).examples(concepts, ("a {}",))] == ["a cat", "a dog"]
    with Opened(pipe, ("a cat", "a dog")) as network:
        disturb(network)
        latents, timesteps = some(2)
        asked, empty = network.student_rows(latents, timesteps, [("a cat", "a dog"), ("", "")])
        loss = SDD().loss(step_of(network, examples))
        assert roundings(loss, (asked - empty).square().flatten(1).mean(1)) <= ROUNDINGS
        # The gradient is that of the concept's branch alone.
        loss.sum().backward()
        own = [parameter.grad.clone() for parameter in network.parameters]
        for parameter in network.parameters:
            parameter.grad = None
        (network.student(latents, timesteps, ("a cat", "a dog")) - empty).square().flatten(1).mean(1).sum().backward()
        for grad, parameter in zip(own, network.parameters, strict=True):
            assert roundings(grad, parameter.grad) <= 5 * ROUNDINGS


def test_retained_prompts_join_the_students_pass(pipe: Any) -> None:
    latents, timesteps = some(2)
    retained = Drawn(latents, timesteps, [Example({RETAIN: "a fox", SAMPLE: "a fox"})] * 2)
    examples = ESD(1.0).examples([Concept("cat", "")] * 2, ("a {}",))
    with Opened(pipe, ("a cat", "a fox")) as network:
        step = step_of(network, examples, retained)
        calls = []
        handle = network.model.register_forward_hook(lambda *a: calls.append(1))
        step.student()
        assert len(calls) == 1
        handle.remove()
        # The student is the base, in a batch of another size.
        rounding = ROUNDINGS * torch.finfo(torch.float32).eps * float(step.student().detach().abs().max())
        assert float(step.retain_loss().detach().max()) <= rounding**2
        disturb(network)
        step = step_of(network, examples, retained)
        step.student()
        with torch.no_grad():
            own = network.student(latents, timesteps, ("a fox",) * 2)
            base = network.teacher_rows(latents, timesteps, [("a fox",) * 2])[0]
        assert roundings(step.retain_loss(), (own - base).square().flatten(1).mean(1)) <= ROUNDINGS


# --------------------------------------------------------------------------------------------------------- settings


def worked(facts: Facts = Facts(1, 750.0), /, **given: Any) -> Settings:
    """ESD's settings with nothing left out."""
    return resolve(Config(**given), Settings, facts)


def test_presets_conversion_and_what_is_recorded() -> None:
    assert eta_of_paper(1.0) == 2.0
    assert worked().formula == "paper" and worked(formula="newer").eta == eta_of_paper(worked().eta)
    assert worked(erase_from="pet").formula == "newer"
    published = worked(preset="object", published=True)
    assert (published.train_set, published.policy, published.trajectories, published.steps) == (
        "u",
        "student",
        0,
        1000,
    )
    usual = Facts(1, 750.0)
    assert resolve(SDDConfig(published=True), SDDSettings, usual).ema_decay == 0.999
    assert resolve(SDDConfig(), SDDSettings, usual).save == "ema"
    settings, secret = worked(erase_from="pet", templates=("x {}",), retain=("dog",)).recorded()
    assert secret == ("erase_from", "retain", "retain_excluded", "templates") and settings["templates"] == ["x {}"]
    assert None not in [settings[key] for key in ("rank", "eta", "policy", "train_set", "retain_weight")]
    assert worked(Facts(9, 2.0), steps=7).steps == 7
    many = worked(Facts(32, 750.0))
    assert (many.steps, many.trajectories, many.learning_rate) == (2160, 64, 1e-4)
    few = worked(Facts(1, 7.5), trajectories=0)
    assert (few.steps, few.trajectories, few.learning_rate) == (300, 0, 3.2e-3)  # a hundredth, to the power of 3/4
    assert worked(Facts(1, 7.5), learning_rate=0.5).learning_rate == 0.5


def test_the_rate_asks_what_words_differ_by() -> None:
    pipe, concepts = demo.load_pipeline(), [Concept("cat"), Concept("dog")]
    rows, words = last_rows(pipe, ["cat", "dog"]), last_rows(pipe, read_list("list:things"))
    apart = float((rows - words.mean(0)).square().sum(1).mean())
    assert apart < 0.5 * float(rows.square().sum(1).mean())  # most of a row is what all words share
    rate = resolved_for(pipe, concepts, Config(), Settings).learning_rate
    assert rate == pytest.approx(1e-4 * (750 / apart) ** 0.75, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`rank`"),
        ({"steps": True}, "`steps`"),
        ({"learning_rate": math.nan}, "`learning_rate`"),
        ({"policy": "teacher"}, "`policy`"),
        ({"policy": "ema"}, "give `ema_decay`"),
        ({"ema_decay": 1.0}, "`ema_decay`"),
        ({"templates": "no"}, "`templates`"),
        ({"templates": ("no",)}, "must hold"),
        ({"lr_scheduler": "steep"}, "`lr_scheduler`"),
        ({"trajectories": -1}, "`trajectories`"),
        ({"preset": "person"}, "`preset`"),
        ({"erase_from": "pet", "formula": "paper"}, "erase_from"),
        ({"erase_from": " "}, "erase_from"),
        ({"eta": -1.0}, "`eta`"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ErasureInputError, match=message):
        worked(**settings)


def test_defaults_stand_for_what_nobody_gives() -> None:
    usual = Facts(1, 750.0)
    assert resolve(TrainConfig(), TrainSettings, usual).policy == "base"
    assert resolve(TrainConfig(policy="student"), TrainSettings, usual).policy == "student"
    with pytest.raises(ErasureInputError, match="checkpoint_dir"):
        TrainingRun(resume=True)
