"""EAP: erasing with adversarial preservation (Bui et al., NeurIPS 2024, arXiv 2410.15618), trained as a LoRA.

What an edit hurts most is searched for while it is trained, and preserved. Of each concept c there are logits pi [n] over a pool of
prompts; g is Gumbel noise, tau a temperature:

    r     = the prompt with the highest pi + g; for gradients the pool's rows, weighted by softmax((pi + g) / tau)
    L1    = | x0(x_t, c) - (x0*(x_t, a) - eta (x0*(x_t, c) - x0*(x_t, a))) |^2
    L2    = | x0(x_r, r) - x0*(x_r, r) |^2
    theta = theta - lr grad L1 + weight L2
    pi    = pi + lr' grad L2

e is the student, e* the base, a the anchor, x_t and x_r noisy latents of c and r, and x0(x, p) the clean latents that a prediction e(x, p)
means. Latents cancel in the differences, so that each loss is that of predictions times a number for the timestep, (1 - abar) / abar where
noise is predicted, so that the noisiest steps count most by far. `loss_space="eps"` leaves that out. Without a pool
a step is ESD's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..artifact import Erasure
from ..denoising.sampler import Sampler
from ..schema import Concept
from ..settings import Number, Of, Whole
from ..training import TrainConfig, TrainingRun, fit_by_training, resolved_for
from ..training.config import with_layers_of
from ..training.objective import Adversarial, Step
from .esd import PRESETS as ESD_PRESETS
from .esd import PUBLISHED as ESD_PUBLISHED
from .esd import Objective as Esd
from .hard_pool import RETAINED, VOCABULARY, PoolSettings, pools_for


# What the authors run: full weights, here as a LoRA with the learning rate of one. Objects and styles by their cross-attention. Their pool
# are words of a list of English that is not ours to ship; `"vocabulary"` has the text encoder's own.
PUBLISHED: dict[str, dict[str, Any]] = {
    task: {
        **{name: value for name, value in preset.items() if name != "formula"},
        "train_set": "u" if task == "nudity" else "x",
        "retain_weight": 1.0,
        "loss_space": "x0",
        "pool": VOCABULARY,
        "pool_by": "rows",
        "pool_nearest": 1000,
        "pool_size": 100,
        "temperature": 2.0,
        "logit_learning_rate": 1e-2,
        "adversarial_share": 1.0,
    }
    for task, preset in ESD_PUBLISHED.items()
}
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        **PUBLISHED[task],
        **{name: value for name, value in ESD_PRESETS[task].items() if name != "formula"},
        "loss_space": "eps",
        "pool": RETAINED,
        "pool_by": "output",
        "pool_nearest": 64,
        "pool_size": 32,
        "logit_learning_rate": 3e-2,
        "adversarial_share": 0.5,
    }
    for task in PUBLISHED
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Settings of EAP, on top of those of [`TrainConfig`]. Those that are left out (`None`) come from
    the preset.

    Args:
        preset (`"style"`, `"object"` or `"nudity"`, *optional*, defaults to `"object"`): the kind of concept; what
            is not given is chosen for it.
        published (`bool`, *optional*, defaults to `False`): take the authors' settings of the preset instead of this library's.
        eta (`float`, *optional*): strength of the negative guidance, in the units of ESD's paper.
        loss_space (`"x0"` or `"eps"`, *optional*): whether clean latents are compared, as published, or predictions.
        retain_weight (`float`, *optional*): weight of what is preserved: of the adversary's picks, and of other retained prompts.
        pool (`str` or a tuple of `str`, *optional*): among what the adversary searches: `"retain"` (what is retained, or `"list:things"`
            where nothing is), `"vocabulary"` (the common words of the tokenizer), a shipped list, or one's own prompts; an empty one for no
            adversary.
        pool_nearest (`int`, *optional*): of these the so many that are nearest to a concept by their text rows.
        pool_by (`"rows"` or `"output"`, *optional*): which of these are the pool: some of every nearness by rows, as published, or those
            for which the base draws what is most like the concept.
        pool_size (`int`, *optional*): prompts of a concept's pool.
        temperature (`float`, *optional*): of the softmax through which the logits get their gradients.
        logit_learning_rate (`float`, *optional*): Adam's, of the logits.
        adversarial_share (`float`, *optional*): of the retained samples, that are of the adversary's picks; others are of any.
    """

    preset: Literal["style", "object", "nudity"] = "object"
    published: bool = False
    eta: Annotated[float | None, Number()] = None
    loss_space: Literal["x0", "eps"] | None = None
    pool: Annotated[
        str | Sequence[str] | None,
        Of("retain, vocabulary, a shipped list (list:NAME) or a list of prompts", *(str, Sequence)),
    ] = None
    pool_nearest: Annotated[int | None, Whole(least=1)] = None
    pool_by: Literal["rows", "output"] | None = None
    pool_size: Annotated[int | None, Whole(least=1)] = None
    temperature: Annotated[float | None, Number(above=0)] = None
    logit_learning_rate: Annotated[float | None, Number(above=0)] = None
    adversarial_share: Annotated[float | None, Number(above=0, most=1)] = None

    def stated(self) -> Mapping[str, Any]:
        chosen = {**super().stated(), **(PUBLISHED if self.published else PRESETS)[self.preset]}
        return with_layers_of(self, chosen, self.published)


@dataclass(frozen=True, kw_only=True)
class Settings(PoolSettings):
    """What EAP works with: a [`Config`] with nothing left out."""

    preset: str
    published: bool
    eta: float
    loss_space: Literal["x0", "eps"]
    temperature: float
    logit_learning_rate: float
    adversarial_share: float


class Objective(Esd):
    """EAP's losses. Implements [`Objective`]."""

    def __init__(self, eta: float, loss_space: str, adversarial: Adversarial | None) -> None:
        super().__init__(eta)
        self.loss_space, self.adversarial = loss_space, adversarial

    def scale(self, sampler: Sampler, timesteps: torch.Tensor) -> torch.Tensor | float:
        return sampler.clean_scale(timesteps) if self.loss_space == "x0" else 1.0

    def loss(self, step: Step) -> torch.Tensor:
        found = super().loss(step)
        scale = self.scale(step.network.sampler, step.drawn.timesteps)
        return found * (scale.to(found.device) if isinstance(scale, torch.Tensor) else scale)


def fit(pipe: Any, concepts: Sequence[Concept], config: Config, run: TrainingRun | None = None) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    concepts = [Concept(c.target, c.anchor or "") for c in concepts]
    settings = resolved_for(pipe, concepts, config, Settings)
    pools = pools_for(pipe, concepts, settings) if settings.retain_weight else []
    how = settings.temperature, settings.logit_learning_rate, settings.adversarial_share
    adversarial = Adversarial(pools, *how) if pools else None
    objective = Objective(settings.eta, settings.loss_space, adversarial)
    return fit_by_training(pipe, "eap", concepts, objective, settings, run)
