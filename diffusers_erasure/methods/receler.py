"""Receler: reliable concept erasing by lightweight erasers (Huang et al., ECCV 2024, arXiv 2311.17717), adapters behind attentions.

Behind each attention a that reads text a bottleneck is trained, o(a) = U gelu(D a + d) + u, which is added to a. Each step, at a noisy
latent x_t, with e the student (erasers on), e* the base, c the concept, 0 the anchor and r rows of the concept's own:

    r is led, by a few steps of Adam, to the minimum of | e(x_t, c + r) - e*(x_t, c) |^2        what brings the concept back
    L = | e(x_t, c + r) - (e*(x_t, 0) - eta (e*(x_t, c) - e*(x_t, 0))) |^2 + 0.1 R
    R = mean over layers of  sum (o (1 - M))^2 / sum (1 - M)                                    nothing outside of the concept

c + r is the concept's prompt with the rows r behind its words, in place of those that the encoder put there. M is 1 where the base looks at
the concept's words: its attention to them, averaged, between 0 and 1, above a tenth. r stays from step to step.

In the authors' code r is never inserted (a value is assigned to a copy), so that it trains with the plain prompt; that is `inner_steps=0` here.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F

from ..artifact import Erasure
from ..base_model import component, family_of
from ..denoising.prompts import text_length
from ..errors import ErasureInputError
from ..layers import adapter
from ..schema import Concept
from ..settings import Number, Whole
from ..training import Fit, TrainConfig, TrainingRun, TrainSettings, resolved_for
from ..training.adapter_student import AdapterStudent, OutputStudent
from ..training.attention import word_places
from ..training.masks import WordMasks
from ..training.objective import Inserting, Step, squares
from ..training.publish import curve
from . import esd
from .esd import CONCEPT, NEUTRAL


# What the authors run; fifty steps of the inner search, of which all but the last are wasted in their code.
PUBLISHED: dict[str, Any] = {
    "kind": "adapter",
    "train_set": "x",
    "rank": 128,
    "templates": "none",
    "eta": 1.0,
    "mask_weight": 0.1,
    "mask_threshold": 0.1,
    "inserted_rows": 16,
    "inner_steps": 50,
    "inner_learning_rate": 0.1,
    "inner_weight_decay": 0.1,
    "learning_rate": 3e-4,
    "steps": 500,
    "batch_size": 1,
    "policy": "student",
    "trajectories": 0,
    "num_inference_steps": 50,
    "guidance_scale": 3.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **PUBLISHED,
        "templates": {"style": "style_context", "object": "object_context"}.get(task, "none"),
        "inner_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "retain_weight": 5.0,
        "steps": 300,
        "batch_size": 4,
        "policy": "base",
        "trajectories": 16,
        "num_inference_steps": 20,
    }
    for task in ("style", "object", "nudity")
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of Receler, on top of those of [`TrainConfig`]. Those that are left out (`None`) come from
    the preset.

    Args:
        preset (`"style"`, `"object"` or `"nudity"`, *optional*, defaults to `"object"`): the kind of concept; what
            is not given is chosen for it.
        published (`bool`, *optional*, defaults to `False`): take the authors' settings instead of this library's.
        train_set (*optional*): to be left out: erasers stand behind the attentions that read text.
        null_space, pull, mixtures, whiten (*optional*): to be left out: they are for LoRAs that read text.
        kind (`"adapter"` or `"linear"`, *optional*): bottlenecks behind the attentions, as published, or LoRAs on their output
            projections, which stock diffusers loads.
        rank (`int`, *optional*): of the bottlenecks.
        eta (`float`, *optional*): strength of the negative guidance, in the units of ESD's paper.
        mask_weight (`float`, *optional*): of what the erasers add outside of where the concept is; 0 for no masks.
        mask_threshold (`float`, *optional*): of the attention to the concept's words, between 0 and 1, above which the concept is there.
        inserted_rows (`int`, *optional*): rows that are searched for, of each concept.
        inner_steps (`int`, *optional*): steps of that search in each step; 0 for none.
        inner_learning_rate (`float`, *optional*), inner_weight_decay (`float`, *optional*): Adam's, in units of the root mean square of
            the prompts' rows, which is about 1 in Stable Diffusion 1.x.
    """

    preset: Literal["style", "object", "nudity"] = "object"
    published: bool = False
    kind: Literal["adapter", "linear"] | None = None
    eta: Annotated[float | None, Number()] = None
    mask_weight: Annotated[float | None, Number()] = None
    mask_threshold: Annotated[float | None, Number(below=1)] = None
    inserted_rows: Annotated[int | None, Whole(least=1)] = None
    inner_steps: Annotated[int | None, Whole(least=0)] = None
    inner_learning_rate: Annotated[float | None, Number(above=0)] = None
    inner_weight_decay: Annotated[float | None, Number()] = None

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), **(PUBLISHED if self.published else PRESETS[self.preset])}

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("null_space", "pull", "mixtures", "whiten") if getattr(self, name)]
        given += ["train_set"] * (self.train_set not in (None, "x"))
        if given:
            raise ErasureInputError(
                f"Receler's erasers stand behind the attentions that read text, and read no text themselves: leave `{'`, `'.join(given)}` out."
            )


@dataclass(frozen=True, kw_only=True)
class Settings(TrainSettings):
    """What Receler works with: a [`Config`] with nothing left out."""

    preset: str
    published: bool
    kind: Literal["adapter", "linear"]
    eta: float
    mask_weight: float
    mask_threshold: float
    inserted_rows: int
    inner_steps: int
    inner_learning_rate: float
    inner_weight_decay: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_checkpointing and self.mask_weight:
            raise ErasureInputError(
                "`gradient_checkpointing` computes again what erasers add where nobody sees it. Leave it out, or set `mask_weight` to 0."
            )


class Objective(esd.Objective):
    """Receler's loss. Implements [`Objective`].

    Args:
        eta: of ESD.
        mask_weight: of what erasers add outside of the masks.
        masks ([`WordMasks`], *optional*): where the concept is.
        student (*optional*): notes what erasers add.
        inserting ([`Inserting`], *optional*): how rows that bring the concept back are searched for.
    """

    teacher_roles = (CONCEPT, NEUTRAL)

    def __init__(
        self,
        eta: float,
        mask_weight: float = 0.0,
        masks: WordMasks | None = None,
        student: AdapterStudent | OutputStudent | None = None,
        inserting: Inserting | None = None,
    ) -> None:
        super().__init__(eta)
        self.paper_eta, self.mask_weight = eta, mask_weight
        self.masks, self.of_student, self.inserting = masks, student, inserting

    def inside(self, model: Any) -> AbstractContextManager[None]:
        return super().inside(model) if self.masks is None else self.masks.watching(model)

    def loss(self, step: Step) -> torch.Tensor:
        concept, neutral = step.teacher(CONCEPT, NEUTRAL)
        where = _where(self.masks, step) if self.masks is not None and self.mask_weight else None
        if self.of_student is not None:
            self.of_student.watched = where is not None
        found = squares(step.student(), neutral - self.paper_eta * (concept - neutral))
        if where is None or self.of_student is None:
            return found
        return found + self.mask_weight * outside(self.of_student.added, where)


def _where(masks: WordMasks, step: Step) -> torch.Tensor:
    """Where the concepts of a batch are, [B, 1, h, w]: a pass of the base, and what it looked at."""
    prompts = [example.prompts[CONCEPT] for example in step.drawn.examples]
    step.network.teacher_rows(step.drawn.latents, step.drawn.timesteps, [prompts])
    return masks.take(prompts, *step.drawn.latents.shape[-2:])


def outside(added: Mapping[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """What was added outside of the masks: its mean square there, averaged over layers, [B].

    Args:
        added: by layer, [B or more, tokens, C]; rows after the masks' are of retained prompts.
        where: [B, 1, h, w], 1 where the concept is.
    """
    found = []
    height, width = where.shape[-2:]
    for values in added.values():
        own, tokens = values[: len(where)].float(), values.shape[1]
        tall = round((tokens * height / width) ** 0.5)
        free = 1 - F.interpolate(where.to(own.device), (tall, tokens // tall), mode="nearest").flatten(
            1
        )  # [B, tokens]
        sums = (own.square().mean(2) * free).sum(1)
        found.append(sums / free.sum(1).clamp(min=1))
    return torch.stack(found).mean(0)


def places_of(pipe: Any, concepts: Sequence[Concept], settings: Settings) -> dict[str, list[int]]:
    """At which text rows each concept's words stand, by prompt.

    Raises:
        ErasureInputError: a prompt has none.
    """
    length = settings.max_sequence_length or text_length(pipe)
    found = {}
    for template in settings.template_list:
        for concept in concepts:
            prompt = template.format(concept.target)
            found[prompt] = word_places(pipe, prompt, str(concept.target), length)
            if not found[prompt]:
                raise ErasureInputError(f"The tokenizer makes no words of {prompt!r}, where Receler has to know them.")
    return found


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolved_for(pipe, concepts, config, Settings)
    name = family_of(pipe).denoiser
    sites = adapter.attentions(name, component(pipe, name))
    of_kind = AdapterStudent if settings.kind == "adapter" else OutputStudent
    student = of_kind(sites, settings.rank, settings.seed, name)
    places = places_of(pipe, concepts, settings)
    masks = WordMasks(places, settings.mask_threshold, name) if settings.mask_weight else None
    inserting = None
    if settings.inner_steps:
        behind = {prompt: _behind(own) for prompt, own in places.items()}
        how = settings.inserted_rows, settings.inner_steps, settings.inner_learning_rate, settings.inner_weight_decay
        inserting = Inserting(*how, CONCEPT, behind)
    objective = Objective(settings.eta, settings.mask_weight, masks, student, inserting)
    stages = Fit(pipe, "receler", concepts, objective, settings, run)
    trained = stages.train(student)
    return stages.erasure(student.layer(trained.tensors), loss=curve(trained.losses), **trained.diagnostics)


def _behind(places: Sequence[int]) -> int:
    """The row behind the words where they stand first: of several text encoders that is the first one's."""
    last = places[0]
    for place in places[1:]:
        if place != last + 1:
            break
        last = place
    return last + 1
