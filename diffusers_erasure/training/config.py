"""What all fine-tuning methods can be told that decides about the result."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from ..errors import ErasureInputError
from ..lists import Retained
from ..settings import ByFacts, Number, Of, Whole, check_settings
from ..settings.texts import Retain, Templates, recorded_settings, template_list
from .sites import TRAIN_SETS, train_set_name


Policy = Literal["base", "student", "ema"]
RATE, SQUARES = 1e-4, 750.0  # the learning rate for Stable Diffusion 1.x, and the |x|^2 of its text rows
# A LoRA does in proportion to what it reads, and its rate acts twice, on both of its matrices. The power was picked between two tiny
# models whose words differ 14-fold, on their development halves.
POWER = 0.75
FLOW_RATE = 1e-3  # of transformers, in which text has gone through norms before any layer that is trained reads it
STEPS = ByFacts("300, and 25 for each further concept", lambda facts: 300 + 25 * (facts.concepts - 1))
LEARNING_RATE = ByFacts(
    f"{RATE:g} where words differ by as much as the text rows of Stable Diffusion 1.x are long, and more where they differ by less; "
    f"{FLOW_RATE:g} of transformers",
    lambda facts: FLOW_RATE if facts.flows else float(f"{RATE * (SQUARES / max(facts.squares, 1e-12)) ** POWER:.2g}"),
)
# The same where whitened text enters, and nothing else is trained.
DOOR_FLOW_RATE = 3e-3
DOOR_RATE = ByFacts(
    f"as without `whiten` of UNets, {DOOR_FLOW_RATE:g} of transformers",
    lambda facts: DOOR_FLOW_RATE if facts.flows else LEARNING_RATE.of(facts),
)


def of_unets(value: Any, others: Any) -> ByFacts:
    """A preset's value for UNets, and another for transformers."""
    return ByFacts(f"{value}; of transformers {others}", lambda facts: others if facts.flows else value)


ALL_BUT_CROSS = ByFacts("u, and x of transformers", lambda facts: "x" if facts.flows else "u")
TRAJECTORIES = ByFacts("16, or two a concept if these are more", lambda facts: max(16, 2 * facts.concepts))
LRSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


# What stands for a setting that neither the caller nor the method's preset gives.
DEFAULTS: dict[str, Any] = {
    "train_set": "x",
    "rank": 4,
    "templates": "none",
    "retain_weight": 1.0,
    "retain_nearest": 8,
    "steps": STEPS,
    "batch_size": 4,
    "accumulation": 1,
    "learning_rate": LEARNING_RATE,
    "weight_decay": 0.0,
    "lr_scheduler": "constant",
    "ema_decay": 0.0,
    "save": "student",
    "policy": "base",
    "trajectories": TRAJECTORIES,
    "refresh_every": 20,
    "refresh": 4,
    "num_inference_steps": 20,
    "first_steps": 0,
    "guidance_scale": 3.0,
    "resolution": 0,
    "max_sequence_length": 0,
    "whiten": 0.0,
}


def and_doors_of_sd3(train_set: str) -> ByFacts:
    """A train set; of SD3 `x`, for it reads the concept from its pooled vector too, of which queries and keys know nothing."""
    return ByFacts(f"{train_set}; of SD3 x", lambda facts: "x" if facts.family == "stable-diffusion-3" else train_set)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. Those that are left out (`None`) come from the method's preset.

    Args:
        train_set (`str` or a tuple of `str`, *optional*): which layers get a LoRA: `"x"` (cross-attention, or where text
            enters a transformer and attention of text and image together), `"x-strict"` (keys and values of text), `"doors"` (what
            text enters by: of a UNet keys and values of text, of a transformer what rows and pooled vector pass first), `"u"` (all
            else), `"selfattn"`, `"full"`, of transformers `"qk_dual"` (queries and keys of text and image) and `"text_kq"` (those of
            text), or endings of module names.
        rank (`int`, *optional*): rank of the LoRA; its alpha is the same, so that its scale is 1.
        templates (`str` or a tuple of `str`, *optional*): prompts, with `{}` for the concept, in which it is trained:
            `"none"` (the concept alone, as published), `"object"`, `"style"`, `"person"`, `"object_context"`,
            `"style_context"`, or one's own.
        retain (tuple of `str`, *optional*): prompts for which the prediction must stay that of the base.
        retain_weight (`float`, *optional*): weight of the retained prompts in the loss; no effect without `retain`.
        retain_nearest (`int`, *optional*, defaults to 8): half of the retained samples are of the so many prompts that lie
            nearest to a target; they are the ones that would change most.
        steps (`int`, *optional*): optimiser steps.
        batch_size (`int`, *optional*): noisy latents of the concepts in a step, for each process; as many of retained
            prompts come on top.
        accumulation (`int`, *optional*): batches whose gradients make one step.
        learning_rate (`float`, *optional*): AdamW's learning rate. By default of UNets 1e-4 (750 / s)^0.75, s the mean square of what
            the targets' text rows differ by from the mean of many words, for a LoRA does in proportion to what it reads (750 is about
            |x|^2 of Stable Diffusion 1.x); 1e-3 for transformers.
        weight_decay (`float`, *optional*): AdamW's weight decay.
        lr_scheduler (`str`, *optional*): one of diffusers' schedules: `"constant"`, `"constant_with_warmup"`,
            `"linear"`, `"cosine"`, `"cosine_with_restarts"` or `"polynomial"`.
        lr_warmup_steps (`int`, *optional*, defaults to 0): steps over which the learning rate rises.
        max_grad_norm (`float`, *optional*, defaults to 1.0): gradients are scaled down to this norm.
        ema_decay (`float`, *optional*): decay of the moving average of what is trained; 0 for none.
        save (`"student"` or `"ema"`, *optional*): what becomes the erasure: what was trained, or its moving average.
        policy (`"base"`, `"student"` or `"ema"`, *optional*): whose denoising gives the noisy latents. With `"base"` the
            base's predictions along it are also the teacher's, so that a step is one forward pass.
        trajectories (`int`, *optional*): trajectories in the pool, each of `num_inference_steps` noisy latents; 0 for no
            pool: every sample is denoised anew, as published. By default 16, or two a concept if these are more.
        refresh_every (`int`, *optional*): with the policies `"student"` and `"ema"`: steps after which the
            oldest trajectories of the pool are drawn again.
        refresh (`int`, *optional*): how many trajectories are drawn again each time.
        num_inference_steps (`int`, *optional*): steps N of the sampler that denoises; a noisy latent lies after k of them.
        first_steps (`int`, *optional*): noisy latents lie after 0 to `first_steps - 1` of these N steps; 0 for all of them.
        guidance_scale (`float`, *optional*): guidance of the sampler that denoises, as the base model is guided: by the empty
            prompt (1, or 0, is none), or by the number that FLUX.1-dev is given; it does nothing where a model has none.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): compute activations again in the backward pass: less
            memory, for more time.
        resolution (`int`, *optional*): pixels of a side; 0, the default, for the base's own.
        max_sequence_length (`int`, *optional*): text rows that T5 makes of a prompt, where there is one; 0, the default, for the
            pipeline's own number.
        null_space (`float`, *optional*, defaults to 0.0): keep the layers that text enters by from reading what retained prompts
            have there: the share of their text rows' energy that is protected. With 1 no layer of these changes any row of theirs or
            of the empty prompt; below 1 what is protected are the directions that hold most. 0 for none.
        whiten (`float`, *optional*): let the layers that text enters by read it in units of what retained prompts (without any, a
            shipped list of words) have there: what they have in common counts little, what they do not have the more, up to a ridge of
            so many times the mean. Other layers read what they always do. 0 for none.
        pull (`float`, *optional*, defaults to 0.0): how much of a step that leads away from the base's weights is taken out, rising
            from 0 at the first step to this at the last; 0 for none.
        mixtures (`int`, *optional*, defaults to 0): ask for mixtures of so many of a concept's prompts, with random weights, in place
            of one of them: as many `templates` are needed, and the base is asked anew in each step. 0 or 1 for none.
        seed (`int`, *optional*, defaults to 0): everything random depends on it and on the step, nothing on the process.
    """

    unrecorded: ClassVar[Mapping[str, Any]] = {"whiten": 0.0}  # what an artefact means that does not tell of it

    train_set: Annotated[
        str | Sequence[str] | None,
        Of(
            f"one of {', '.join(TRAIN_SETS)}, or a list of endings of module names",
            *(str, Collection),
            plain=train_set_name,
        ),
    ] = None
    rank: Annotated[int | None, Whole(least=1)] = None
    templates: Templates = None
    retain: Retain = ()
    retain_weight: Annotated[float | None, Number()] = None
    retain_nearest: Annotated[int | None, Whole(least=0)] = None
    steps: Annotated[int | None, Whole(least=1)] = None
    batch_size: Annotated[int | None, Whole(least=1)] = None
    accumulation: Annotated[int | None, Whole(least=1)] = None
    learning_rate: Annotated[float | None, Number(above=0)] = None
    weight_decay: Annotated[float | None, Number()] = None
    lr_scheduler: LRSchedule | None = None
    lr_warmup_steps: Annotated[int, Whole(least=0)] = 0
    max_grad_norm: Annotated[float, Number(above=0)] = 1.0
    ema_decay: Annotated[float | None, Number(below=1)] = None
    save: Literal["student", "ema"] | None = None
    policy: Policy | None = None
    trajectories: Annotated[int | None, Whole(least=0)] = None
    refresh_every: Annotated[int | None, Whole(least=1)] = None
    refresh: Annotated[int | None, Whole(least=1)] = None
    num_inference_steps: Annotated[int | None, Whole(least=1)] = None
    first_steps: Annotated[int | None, Whole(least=0)] = None
    guidance_scale: Annotated[float | None, Number()] = None
    gradient_checkpointing: bool = False
    resolution: Annotated[int | None, Whole(least=0)] = None
    max_sequence_length: Annotated[int | None, Whole(least=0)] = None
    null_space: Annotated[float, Number(most=1)] = 0.0
    whiten: Annotated[float | None, Number()] = None
    pull: Annotated[float, Number()] = 0.0
    mixtures: Annotated[int, Whole(least=0)] = 0
    seed: Annotated[int, Whole(least=0)] = 0

    def stated(self) -> Mapping[str, Any]:
        """What stands for settings that are left out; a method's config adds its preset."""
        return DEFAULTS

    def __post_init__(self) -> None:
        check_settings(self)


def with_layers_of(config: TrainConfig, stated: Mapping[str, Any], published: bool = False) -> dict[str, Any]:
    """What a preset states that whitens text where it enters, for a config with other layers or with whitening's hard form."""
    chosen = dict(stated)
    if config.null_space:
        chosen["whiten"] = 0.0
    if config.train_set not in (None, "doors") and not published:
        chosen["learning_rate"] = LEARNING_RATE
    return chosen


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a training run works with: a [`TrainConfig`] with nothing left out."""

    train_set: str | tuple[str, ...]
    rank: int
    templates: str | tuple[str, ...]
    retain: Retained
    retain_weight: float
    retain_nearest: int
    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    weight_decay: float
    lr_scheduler: LRSchedule
    lr_warmup_steps: int
    max_grad_norm: float
    ema_decay: float
    save: Literal["student", "ema"]
    policy: Policy
    trajectories: int
    refresh_every: int
    refresh: int
    num_inference_steps: int
    first_steps: int
    guidance_scale: float
    gradient_checkpointing: bool
    resolution: int
    max_sequence_length: int
    null_space: float
    whiten: float
    pull: float
    mixtures: int
    seed: int

    def __post_init__(self) -> None:
        if not self.ema_decay and "ema" in (self.policy, self.save):
            raise ErasureInputError("`policy` or `save` is 'ema', but there is no moving average: give `ema_decay`.")
        if self.null_space and self.whiten:
            raise ErasureInputError(
                "`null_space` and `whiten` are two ways to keep a LoRA from reading what retained prompts have: give one of them."
            )

    @property
    def template_list(self) -> tuple[str, ...]:
        """The templates themselves."""
        return template_list(self.templates)

    def recorded(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The settings for the artefact, and the names of those that would reveal a concept."""
        return recorded_settings(self)
