"""Noisy latents by partial denoising, aligned: a latent after k sampler steps, with the timestep at which it now lies.

    k ~ U{0 .. N-1};  x ~ N(0, I);  k steps of DDIM (eta 0), or of Euler where velocities are predicted;  t = timesteps[k]

k = 0 gives the untouched noise at the largest timestep. Neither sampler has a memory of earlier steps, so that one trajectory of
N steps gives N such pairs. The published codes are off by one or more timesteps here (docs/methods/esd.md).
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ..base_model import component, family_of


# (latents [B, ...], timesteps [B], lists of prompts of length B) -> a prediction for each list, all in one batch. Models with
# their guidance in the weights are given one value for each list too, as `guidance`.
Predict = Callable[..., list[torch.Tensor]]
SAMPLE, EMPTY = "sample", "empty"  # roles: the prompt that is denoised with, and the unconditional half
# What guides: the empty prompt's predictions; a number that the denoiser is given, as FLUX.1-dev is; or nothing.
Guidance = Literal["classifier-free", "embedded", "none"]
_SAMPLED = "sampled"  # the role of what is denoised with, under its guidance
PLAIN = 1.0  # guidance that is given where predictions are compared: nothing is exaggerated


def generator_for(seed: int, *what: object) -> torch.Generator:
    """A generator of its own for everything that is drawn: what comes out does not depend on what was drawn before."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device: from the CPU's memory by way of pinned memory where there is such a thing, so that nothing waits."""
    if tensor.device.type != "cpu" or device.type == "mps":
        return tensor.to(device)
    # An expanded tensor, one value for the whole batch, cannot be pinned as it is.
    return (tensor.contiguous().pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Sampler:
    """Deterministic DDIM over N timesteps, for ε- and v-prediction.

    Args:
        config: the base's scheduler configuration, from which betas and prediction type are taken.
        num_inference_steps: N. They are spaced so that the first is the largest timestep ("trailing").
    """

    guidance: Guidance = "classifier-free"

    def __init__(self, config: Mapping[str, Any], num_inference_steps: int) -> None:
        self.scheduler = DDIMScheduler.from_config(  # clipping would be wrong for latents, and is DDIM's default
            dict(config), clip_sample=False, thresholding=False, timestep_spacing="trailing"
        )
        self.scheduler.set_timesteps(num_inference_steps)
        self.timesteps = torch.as_tensor(self.scheduler.timesteps, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.timesteps)

    def first(self, count: int) -> "Sampler":
        """The same sampler, ended after so many timesteps."""
        found = copy.copy(self)
        found.timesteps = self.timesteps[:count]
        return found

    def noise(self, seed: int, what: Sequence[object], shape: Sequence[int]) -> torch.Tensor:
        """Where a trajectory begins, float32 `shape`, on the CPU."""
        noise = torch.randn(tuple(shape), generator=generator_for(seed, "noise", *what))
        return noise * self.scheduler.init_noise_sigma

    def model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Latents as the network takes them."""
        return self.scheduler.scale_model_input(latents, timestep)

    def clean_scale(self, timesteps: torch.Tensor) -> torch.Tensor:
        """By how much a square difference of predictions at timesteps [B] counts as one of the clean latents that they mean, [B]."""
        kept = self.scheduler.alphas_cumprod[timesteps.long().cpu()]
        kind = self.scheduler.config.prediction_type
        return (
            (1 - kept) / kept if kind == "epsilon" else 1 - kept if kind == "v_prediction" else torch.ones_like(kept)
        )

    def step(self, prediction: torch.Tensor, index: int, latents: torch.Tensor) -> torch.Tensor:
        """One step, from `timesteps[index]` to the next, in float32."""
        return self.scheduler.step(prediction, int(self.timesteps[index]), latents, eta=0.0).prev_sample


class FlowSampler(Sampler):
    """Euler's steps along predicted velocities, by diffusers' own scheduler.

    Args:
        config: the base's scheduler configuration, from which shifts are taken.
        num_inference_steps: N.
        tokens: of an image; schedulers that shift by its size ("dynamic shifting") ask for that.
        even: whether the sigmas, before they are shifted, are evenly spaced from 1 to 1 / N; see [`Family`].
        guidance: what guides the base.
    """

    def __init__(
        self, config: Mapping[str, Any], num_inference_steps: int, tokens: int, even: bool, guidance: Guidance
    ) -> None:
        self.guidance = guidance
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config), stochastic_sampling=False)
        own = scheduler.config
        # The line through the two sizes of the configuration, as all pipelines have it.
        slope = (own.max_shift - own.base_shift) / (own.max_image_seq_len - own.base_image_seq_len)
        mu = own.base_shift + slope * (tokens - own.base_image_seq_len)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if even else None
        given: dict[str, Any] = {"sigmas": sigmas} if even else {}
        scheduler.set_timesteps(num_inference_steps, mu=mu, **given)
        self.flow, self.timesteps = scheduler, scheduler.timesteps.float().cpu()

    def noise(self, seed: int, what: Sequence[object], shape: Sequence[int]) -> torch.Tensor:
        """See [`Sampler.noise`]."""
        return torch.randn(tuple(shape), generator=generator_for(seed, "noise", *what))

    def model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """See [`Sampler.model_input`]; the same here."""
        return latents

    def clean_scale(self, timesteps: torch.Tensor) -> torch.Tensor:
        """See [`Sampler.clean_scale`]: x0 = x - sigma v."""
        return (timesteps.float().cpu() / self.flow.config.num_train_timesteps).square()

    def step(self, prediction: torch.Tensor, index: int, latents: torch.Tensor) -> torch.Tensor:
        """See [`Sampler.step`]."""
        scheduler = copy.copy(self.flow)  # it counts its steps, and these are not taken in order
        scheduler.set_begin_index(index)
        return scheduler.step(prediction, self.timesteps[index], latents).prev_sample


def sampler_for(pipe: Any, num_inference_steps: int, size: Sequence[int]) -> Sampler:
    """The sampler of a base model, for latents of some height and width."""
    family = family_of(pipe)
    config, model = pipe.scheduler.config, component(pipe, family.denoiser)
    if family.prediction == "scheduler":
        return Sampler(config, num_inference_steps)
    tokens = size[0] * size[1] // (family.packing * getattr(model.config, "patch_size", 1)) ** 2
    embedded = bool(getattr(model.config, "guidance_embeds", False))
    guidance: Guidance = "embedded" if embedded else "classifier-free" if family.guided else "none"
    return FlowSampler(config, num_inference_steps, tokens, family.even_sigmas, guidance)


@dataclass(frozen=True)
class Pairs:
    """Noisy latents along trajectories, and what was predicted there.

    Attributes:
        latents: [B, N, C, H, W].
        predictions: by role, [B, N, C, H, W].
    """

    latents: torch.Tensor
    predictions: dict[str, torch.Tensor]


@torch.no_grad()
def trajectories(
    predict: Predict,
    sampler: Sampler,
    noise: torch.Tensor,
    prompts: Mapping[str, Sequence[str]],
    guidance_scale: float,
    keep: Sequence[str] = (),
) -> Pairs:
    """Denoise B latents to the end, and keep all that lie on the way.

    Args:
        predict: the network.
        sampler ([`Sampler`]): gives the timesteps and the step.
        noise: [B, C, H, W].
        prompts: by role, one a latent. `"sample"` is denoised with.
        guidance_scale: 1 for none. What it does is the sampler's `guidance`.
        keep: roles of which the predictions are kept; those that guidance needs anyhow cost nothing.
    """
    free = sampler.guidance == "classifier-free" and guidance_scale != 1
    embedded = sampler.guidance == "embedded"
    asked: dict[str, Sequence[str]] = {EMPTY: [""] * len(noise)} if free else {}
    asked |= {role: prompts[role] for role in keep}
    # Roles with the same prompts are one row of the batch. What is kept is predicted without guidance.
    given = {_SAMPLED: (tuple(prompts[SAMPLE]), guidance_scale if embedded else PLAIN)}
    given |= {role: (tuple(value), PLAIN) for role, value in asked.items()}
    rows = list(dict.fromkeys(given.values()))
    place = {role: rows.index(value) for role, value in given.items()}
    texts = [row for row, _ in rows]
    more = {"guidance": [value for _, value in rows]} if embedded else {}
    latents: list[torch.Tensor] = []
    found: dict[str, list[torch.Tensor]] = {role: [] for role in keep}
    x = noise.float()
    for index, timestep in enumerate(sampler.timesteps):
        last = index == len(sampler) - 1
        if last and not keep:
            latents.append(x)
            break
        outputs = predict(x, timestep.expand(len(x)), texts, **more)
        x = placed(x, outputs[0].device)
        latents.append(x)
        for role in keep:
            found[role].append(outputs[place[role]])
        if not last:
            steered = {SAMPLE: place[_SAMPLED], EMPTY: place.get(EMPTY, 0)}
            x = sampler.step(guided(outputs, steered, guidance_scale if free else 1.0), index, x)
    return Pairs(torch.stack(latents, 1), {role: torch.stack(values, 1) for role, values in found.items()})


@torch.no_grad()
def partial(
    predict: Predict,
    sampler: Sampler,
    noise: torch.Tensor,
    taken: Sequence[int],
    prompts: Sequence[str],
    guidance_scale: float,
) -> torch.Tensor:
    """Denoise each of B latents by its own number of steps; those that are done leave the batch.

    Args:
        noise: [B, C, H, W].
        taken: k of each latent, from 0 to N - 1.
        prompts: one a latent.

    Returns:
        `torch.Tensor`: [B, C, H, W], float32, where the predictions are.
    """
    free = sampler.guidance == "classifier-free" and guidance_scale != 1
    more = {"guidance": [guidance_scale]} if sampler.guidance == "embedded" else {}
    x = list(noise.float())  # one by one: to pick from a tensor by numbers, an accelerator is given these, and waits
    for index in range(max(taken, default=0)):
        going = [i for i, count in enumerate(taken) if count > index]
        own = tuple(prompts[i] for i in going)
        rows = [own, ("",) * len(going)] if free else [own]
        batch = torch.stack([x[i] for i in going])
        outputs = predict(batch, sampler.timesteps[index].expand(len(going)), rows, **more)
        place = {SAMPLE: 0, EMPTY: len(rows) - 1}
        x = [placed(each, outputs[0].device) for each in x]
        batch = placed(batch, outputs[0].device)
        prediction = guided(outputs, place, guidance_scale if free else 1.0)
        for i, each in zip(going, sampler.step(prediction, index, batch), strict=True):
            x[i] = each
    return torch.stack(x)


def guided(outputs: Sequence[torch.Tensor], place: Mapping[str, int], guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance, in float32."""
    conditional = outputs[place[SAMPLE]].float()
    if guidance_scale == 1:
        return conditional
    empty = outputs[place[EMPTY]].float()
    return empty + guidance_scale * (conditional - empty)
