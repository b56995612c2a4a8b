"""Flow-matching transformers: noisy latents, prompts and calls as their own pipelines make them, and what is trained on them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_erasure import ErasureCompatibilityError, ErasureInputError, erase
from diffusers_erasure.base_model import family_of
from diffusers_erasure.compat import accelerate_state_restored
from diffusers_erasure.denoising.calls import Caller, latent_shape, packed, unpacked
from diffusers_erasure.denoising.prompts import Prompts, nearest, text_length
from diffusers_erasure.denoising.sampler import SAMPLE, partial, sampler_for, trajectories
from diffusers_erasure.encoding import check_prompts, short_enough
from diffusers_erasure.methods.esd import CONCEPT, NEUTRAL
from diffusers_erasure.methods.esd import Objective as ESD
from diffusers_erasure.training import TrainingRun
from diffusers_erasure.training.objective import STUDENT
from diffusers_erasure.training.sites import find_sites
from tests.flow_pipes import LENGTH, tiny_flux_pipe, tiny_sd3_pipe
from tests.helpers import ROUNDINGS, Cut, cut_after, far, images, roundings, tree


QUIET = TrainingRun(progress=False)
PIPES: dict[str, Any] = {
    "flux": tiny_flux_pipe,
    "flux-dev": lambda: tiny_flux_pipe(guidance_embeds=True, use_dynamic_shifting=True),
    "sd3": tiny_sd3_pipe,
    "sd3-dynamic": lambda: tiny_sd3_pipe(use_dynamic_shifting=True),
}
SMALL: dict[str, Any] = {
    **{"steps": 4, "rank": 2, "batch_size": 2, "trajectories": 3, "num_inference_steps": 3, "learning_rate": 0.02},
    **{"templates": "none", "compare": False},
}
DRAW: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": LENGTH}


@pytest.fixture(autouse=True)
def accelerate() -> Any:
    with accelerate_state_restored():
        yield


def teacher(pipe: Any, prompts: list[str], steps: int) -> tuple[Any, Any]:
    """A sampler, and a base model's predictions for lists of prompts."""
    family = family_of(pipe)
    shape = latent_shape(pipe)
    sampler = sampler_for(pipe, steps, shape[1:])
    call = Caller(family, pipe.transformer, Prompts(pipe, prompts, 16), sampler)

    @torch.no_grad()
    def predict(latents: Any, timesteps: Any, rows: Any, guidance: Any = None) -> list[torch.Tensor]:
        values = guidance or [1.0] * len(rows)
        return [call(latents, timesteps, row, [value] * len(row)) for row, value in zip(rows, values, strict=True)]

    return sampler, predict


def by_diffusers(pipe: Any, noise: torch.Tensor, prompt: str, steps: int, scale: float) -> list[torch.Tensor]:
    """The latents before each step, and the last ones, by diffusers' own pipeline; timesteps are those that it used."""
    found, side = [noise.clone()], family_of(pipe).packing

    def note(_: Any, index: int, time: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents = values["latents"].clone()
        found.append(unpacked(latents, side, 8, 8) if side > 1 else latents)
        return values

    given = packed(noise, side) if side > 1 else noise
    more = {"guidance_scale": scale, "num_inference_steps": steps, "callback_on_step_end": note, **DRAW}
    pipe(prompt, latents=given, output_type="latent", **more)
    return found


@pytest.mark.parametrize("name", list(PIPES))
def test_noisy_latents_are_the_pipelines_own(name: str) -> None:
    pipe = PIPES[name]()
    sampler, predict = teacher(pipe, ["a cat", "a dog"], 4)
    assert latent_shape(pipe) == (4, 8, 8) and sampler.timesteps[0] == 1000
    noise = torch.stack([sampler.noise(0, ("x", i), (4, 8, 8)) for i in range(2)])
    pairs = trajectories(predict, sampler, noise, {SAMPLE: ["a cat", "a dog"]}, 3.0)
    assert pairs.latents.shape == (2, 4, 4, 8, 8) and torch.equal(pairs.latents[:, 0], noise)
    for i, prompt in enumerate(("a cat", "a dog")):
        own = by_diffusers(pipe, noise[i : i + 1], prompt, 4, 3.0)
        assert torch.equal(pipe.scheduler.timesteps, sampler.timesteps)
        for taken in range(4):
            assert roundings(pairs.latents[i, taken], own[taken][0]) <= ROUNDINGS
    # Fresh denoising gives the same; and a step from anywhere needs none before it.
    found = partial(predict, sampler, noise, [3, 1], ["a cat", "a dog"], 3.0)
    assert (
        roundings(found[0], pairs.latents[0, 3]) <= ROUNDINGS and roundings(found[1], pairs.latents[1, 1]) <= ROUNDINGS
    )


def test_what_is_kept_is_predicted_without_guidance() -> None:
    """FLUX.1-dev has its guidance in the weights: trajectories follow it, and losses compare what is predicted at 1."""
    pipe = PIPES["flux-dev"]()
    sampler, predict = teacher(pipe, ["a cat", "a dog"], 3)
    assert sampler.guidance == "embedded"
    noise = torch.stack([sampler.noise(0, (i,), (4, 8, 8)) for i in range(2)])
    roles = {SAMPLE: ["a cat"] * 2, CONCEPT: ["a cat"] * 2, NEUTRAL: [""] * 2}
    pairs = trajectories(predict, sampler, noise, roles, 3.5, keep=(CONCEPT, NEUTRAL))
    for k, time in enumerate(sampler.timesteps):
        plain, steered = predict(pairs.latents[:, k], time.expand(2), [["a cat"] * 2] * 2, [1.0, 3.5])
        assert torch.equal(pairs.predictions[CONCEPT][:, k], plain) and far(plain.numpy(), steered.numpy()) > 1e-3
        if k < 2:
            assert torch.equal(pairs.latents[:, k + 1], sampler.step(steered, k, pairs.latents[:, k]))
    assert sampler_for(PIPES["flux"](), 3, (8, 8)).guidance == "none"
    assert sampler_for(PIPES["sd3"](), 3, (8, 8)).guidance == "classifier-free"


def test_latents_are_packed_as_the_pipeline_packs() -> None:
    pipe = tiny_flux_pipe()
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    tokens = packed(latents, 2)
    assert torch.equal(tokens, pipe._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpacked(tokens, 2, 6, 8), latents)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_prompts_are_encoded_once_and_by_the_pipeline(name: str) -> None:
    pipe = PIPES[name]()
    prompts = Prompts(pipe, ["a cat"], 16)
    arguments = prompts.batch(["a cat", ""], torch.device("cpu"), torch.float32)
    more = (None,) if name == "flux" else (None, None)
    found = pipe.encode_prompt(["a cat", ""], *more, device="cpu", max_sequence_length=LENGTH)
    pooled = found[1] if name == "flux" else found[2]
    assert text_length(pipe) == LENGTH  # the pipeline's own number is more than the tokenizer's
    assert roundings(arguments["encoder_hidden_states"], found[0]) <= ROUNDINGS
    assert roundings(arguments["pooled_projections"], pooled) <= ROUNDINGS
    shorter = Prompts(pipe, ["a cat"], 16, 6).batch(["a cat"], torch.device("cpu"), torch.float32)
    assert arguments["encoder_hidden_states"].shape[1] - shorter["encoder_hidden_states"].shape[1] == LENGTH - 6
    with pytest.raises(ErasureInputError, match="tokens; the text encoder takes 6"):
        Prompts(pipe, ["a cat with a red hat and a dog"], 16, 6)
    assert short_enough(pipe, ["a cat", "word " * 30]) == ["a cat"]
    last = pipe.text_encoder_2 if name == "flux" else pipe.text_encoder_3
    idle = last.register_forward_pre_hook(lambda *_: pytest.fail("T5 ran, whose rows are not compared"))
    assert set(nearest(pipe, ["a red cat", "word " * 30, "rocket"], ["a red cat"], 1)) == {"a red cat"}
    idle.remove()
    pipe.text_encoder = pipe.text_encoder_2 = None
    if name == "flux":
        with pytest.raises(ErasureCompatibilityError, match="needs the pipeline.s text_encoder and"):
            check_prompts(pipe, ["a cat"])


def test_train_sets_of_transformers() -> None:
    flux, sd3 = tiny_flux_pipe(), tiny_sd3_pipe()
    names = {key: set(find_sites(flux, key)) for key in ("x", "x-strict", "u", "full", "qk_dual", "text_kq")}
    first = {
        name.removeprefix("transformer_blocks.0.attn.")
        for name in names["x"]
        if name.startswith("transformer_blocks.0.")
    }
    parts = {f"to_{part}" for part in ("q", "k", "v", "out.0", "add_out")}
    assert first == parts | {f"add_{part}_proj" for part in "qkv"}
    assert names["text_kq"] | names["x-strict"] < names["x"] and not names["x"] & names["u"]
    assert {name.rpartition(".")[2] for name in names["qk_dual"]} == {"add_q_proj", "add_k_proj", "to_q", "to_k"}
    assert all(name.startswith("transformer_blocks.") for name in names["qk_dual"])
    # Where text enters belongs to "x": the pooled vector tells the concept too, and no attention hears of it.
    doors = {"context_embedder", "time_text_embed.text_embedder.linear_1"}
    for pipe in (flux, sd3):
        found = set(find_sites(pipe, "x"))
        assert {name for name in found if not name.startswith("transformer_blocks.")} == doors
    assert not doors & (names["x-strict"] | names["qk_dual"] | names["text_kq"])
    assert any(name.startswith("single_transformer_blocks.") for name in names["u"]) and len(names["qk_dual"]) == 8
    assert "context_embedder" in names["full"] and not any("embedder" in name for name in names["u"])
    own = set(find_sites(sd3, "qk_dual"))
    assert "transformer_blocks.1.attn.to_q" in own and not any(".attn2." in name for name in own)
    assert any(name.startswith("transformer_blocks.1.attn2.") for name in find_sites(sd3, "u"))
    with pytest.raises(ErasureInputError, match="'selfattn' for a transformer"):
        find_sites(flux, "selfattn")


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("path", ["straight", "cosine"])
def test_esd_moves_the_picture_alike_in_either_form(path: str) -> None:
    """With x = a x0 + s n, v = s' n + a' x0 is linear in ε at fixed x, with coefficients that add up: a target that weighs
    predictions by 1 + eta and -eta is the same one for ε and for v."""
    generator = torch.Generator().manual_seed(0)
    x, empty, concept = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 3, dtype=torch.float64)[:, None]
    if path == "straight":
        a, s, da, ds = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    else:
        a, s, da, ds = t.cos(), t.sin(), -t.sin(), t.cos()

    def velocity(noise: torch.Tensor) -> torch.Tensor:
        return ds * noise + da * (x - s * noise) / a

    class Known:
        def __init__(self, predictions: dict[str, torch.Tensor]) -> None:
            self.predictions = predictions

        def teacher(self, *roles: str) -> list[torch.Tensor]:
            return [self.predictions[role] for role in roles]

        def student(self) -> torch.Tensor:
            return torch.zeros(3, 5, dtype=torch.float64)

    class Keep(ESD):
        def loss(self, step: Any) -> torch.Tensor:
            source, erased, neutral = step.teacher(STUDENT, CONCEPT, NEUTRAL)
            return source - self.eta * (erased - neutral)

    noise = {STUDENT: concept, CONCEPT: concept, NEUTRAL: empty}
    of_noise = Keep(1.5).loss(Known(noise))
    of_velocity = Keep(1.5).loss(Known({role: velocity(value) for role, value in noise.items()}))
    assert (velocity(of_noise) - of_velocity).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["flux-dev", "sd3"])
@pytest.mark.parametrize("method", ["esd", "sdd"])
def test_what_is_trained_is_loaded_here_and_by_stock_diffusers(name: str, method: str, tmp_path: Path) -> None:
    pipe = PIPES[name]()
    drawn, before = images(pipe, **DRAW), tree(pipe)
    erasure = erase(pipe, "cat", method=method, retain=["dog"], training=QUIET, **{**SMALL, "ema_decay": 0.5})
    assert tree(pipe) == before
    (layer,) = erasure.config.layers
    assert layer.component == "transformer" and layer.prefix == "transformer."
    assert erasure.config.base_model.family == family_of(pipe).name
    erasure.save_pretrained(tmp_path)
    stock = PIPES[name]()
    pipe.load_erasure(tmp_path)
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    ours = images(pipe, **DRAW)
    assert far(ours, drawn) > 1e-3 and roundings(ours, images(stock, **DRAW)) <= ROUNDINGS


@pytest.mark.parametrize("name", ["flux-dev", "sd3"])
@pytest.mark.parametrize("policy", ["base", "student"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    name: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "method": "esd", "policy": policy, "retain": ["dog"], "refresh_every": 2, "refresh": 1}
    whole = erase(PIPES[name](), "cat", training=QUIET, **settings)
    run = TrainingRun(checkpoint_dir=tmp_path, checkpoint_every=1, resume=True, progress=False)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, 2)
        erase(PIPES[name](), "cat", training=run, **settings)
    assert erase(PIPES[name](), "cat", training=run, **settings).to_files() == whole.to_files()


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_samples_are_drawn_and_encoders_leave(name: str, tmp_path: Path) -> None:
    pipe = PIPES[name]()
    run = TrainingRun(checkpoint_dir=tmp_path, sample_every=2, sample_prompts=("cat",), progress=False, release=True)
    erasure = erase(pipe, "cat", method="esd", training=run, **SMALL)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    assert pipe.text_encoder is None and pipe.text_encoder_2 is None
    assert name == "flux" or pipe.text_encoder_3 is None
    assert erasure.to_files() == erase(PIPES[name](), "cat", method="esd", training=QUIET, **SMALL).to_files()


def test_errors_name_the_transformer() -> None:
    pipe = tiny_flux_pipe()
    pipe.transformer.half()
    with pytest.raises(ErasureInputError, match="The transformer is in float16"):
        erase(pipe, "cat", method="esd", training=QUIET, **SMALL)
    with pytest.raises(ErasureInputError, match="multiple of 4, not 18"):
        erase(tiny_flux_pipe(), "cat", method="esd", training=QUIET, **{**SMALL, "resolution": 18})
    with pytest.raises(ErasureInputError, match="tokens; the text encoder takes 3"):
        erase(tiny_flux_pipe(), "a red cat", method="esd", training=QUIET, max_sequence_length=3, **SMALL)


def test_what_other_words_do_is_compared_on_a_transformer() -> None:
    erasure = erase(tiny_sd3_pipe(), "cat", method="esd", training=QUIET, **{**SMALL, "compare": True})
    told = erasure.config.diagnostics["collateral"]
    assert told["words"] == 40 and told["measure"].startswith("predictions")


@pytest.mark.parametrize("before", [True, False])
def test_training_is_without_cudnn_attention(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And afterwards the process is as it was."""
    enabled, seen = torch.backends.cuda.cudnn_sdp_enabled, []
    loss = ESD.loss
    monkeypatch.setattr(ESD, "loss", lambda self, step: seen.append(enabled()) or loss(self, step))
    usual = enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(before)
        erase(tiny_flux_pipe(), "cat", method="esd", training=QUIET, **SMALL)
        assert seen and not any(seen) and enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(usual)


def test_a_step_of_the_student_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn and retained samples, and the timesteps at which they lie, go through the transformer together."""
    calls: list[tuple[int, list[float]]] = []
    pipe = tiny_flux_pipe()
    original = type(pipe.transformer).forward

    def counted(self: Any, *arguments: Any, **more: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append((len(more["hidden_states"]), more["timestep"].tolist()))
        return original(self, *arguments, **more)

    monkeypatch.setattr(type(pipe.transformer), "forward", counted)
    erase(pipe, "cat", method="esd", retain=["dog"], training=QUIET, **SMALL)
    times = sampler_for(pipe, SMALL["num_inference_steps"], (8, 8)).timesteps / 1000
    assert len(calls) == SMALL["steps"] and {size for size, _ in calls} == {4}
    assert all(min(abs(float(time) - time_) for time_ in times.tolist()) < 1e-6 for _, each in calls for time in each)
