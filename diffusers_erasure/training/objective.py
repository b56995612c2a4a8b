"""What a fine-tuning method is: prompts for its samples, and a loss. The loop does the rest."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..denoising.sampler import Sampler, placed
from ..schema import Concept
from .network import Network
from .pool import Drawn, Example


if TYPE_CHECKING:
    from .adversary import Picks

STUDENT, RETAIN = "student", "retain"  # roles


@dataclass(frozen=True)
class Adversarial:
    """How an adversary searches.

    Attributes:
        pools: for each concept the prompts among which it searches; none of them is empty.
        temperature: of the softmax.
        learning_rate: Adam's, of the logits.
        share: of the retained samples, that are of what it picks; the others are drawn at random.
    """

    pools: Sequence[Sequence[str]]
    temperature: float
    learning_rate: float
    share: float


@dataclass(frozen=True)
class Inserting:
    """How rows that bring a concept back are searched for.

    Attributes:
        count: rows of a concept.
        steps: of the search, in each step of the student; it goes on from where it was.
        learning_rate, weight_decay: Adam's.
        role: the base's predictions for these prompts are what they lead to.
        places: by prompt, the text row behind its words.
    """

    count: int
    steps: int
    learning_rate: float
    weight_decay: float
    role: str
    places: Mapping[str, int]


class Step:
    """One batch, as a loss sees it. Predictions are float32 [B, C, H, W].

    Args:
        network ([`Network`]): teacher and student.
        drawn ([`Drawn`]): the noisy latents of the concepts.
        retained ([`Drawn`], *optional*): those of retained prompts, which join the student's forward pass.
        number: of the step.
        picks ([`Picks`], *optional*): which of the retained prompts an adversary picked.
    """

    def __init__(
        self,
        network: Network,
        drawn: Drawn,
        retained: Drawn | None = None,
        number: int = 0,
        picks: "Picks | None" = None,
    ) -> None:
        self.network, self.drawn, self.retained, self.number, self.picks = network, drawn, retained, number, picks
        self._student: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None
        self._asked = 0  # its rows that are not of retained prompts

    def teacher(self, *roles: str) -> list[torch.Tensor]:
        """The base's predictions for the prompts of some roles: those of the pool, and one batch of all others."""
        return self._teacher(self.drawn, roles)

    def _teacher(self, drawn: Drawn, roles: Sequence[str]) -> list[torch.Tensor]:
        rows = {role: tuple(drawn.asked(role)) for role in roles}
        unknown = list(dict.fromkeys(row for role, row in rows.items() if role not in drawn.known))
        found = {}
        if unknown:
            outputs = self.network.teacher_rows(drawn.latents, drawn.timesteps, unknown)
            found = dict(zip(unknown, outputs, strict=True))
        device = self.network.model.device
        return [placed(drawn.known[role], device) if role in drawn.known else found[rows[role]] for role in roles]

    def student(self) -> torch.Tensor:
        """The student's predictions for the role `"student"`, with gradients; one forward pass with the retained prompts."""
        return self.students(STUDENT)[0]

    def students(self, *roles: str) -> Sequence[torch.Tensor]:
        """The student's predictions for some roles, the same ones in each call, with gradients; one forward pass with the retained prompts."""
        count = len(roles)
        if self._student is None:
            latents = self.drawn.latents.repeat(count, 1, 1, 1) if count > 1 else self.drawn.latents
            timesteps = self.drawn.timesteps.repeat(count)
            prompts = [prompt for role in roles for prompt in self.drawn.asked(role)]
            self._asked = len(prompts)
            if self.retained is not None:
                device = self.network.model.device
                latents = torch.cat([placed(each, device) for each in (latents, self.retained.latents)])
                timesteps = torch.cat([timesteps, self.retained.timesteps])
                prompts += self.retained.asked(RETAIN)
            self._student = self.network.student(latents, timesteps, prompts)
        return self._student[: self._asked].chunk(count)

    def student_now(self, role: str) -> torch.Tensor:
        """The student's predictions for another role, without gradients."""
        rows = [self.drawn.asked(role)]
        return self.network.student_rows(self.drawn.latents, self.drawn.timesteps, rows)[0]

    def kept(self) -> torch.Tensor:
        """The base's predictions for the retained prompts."""
        assert self.retained is not None
        if self._kept is None:
            (self._kept,) = self._teacher(self.retained, (RETAIN,))
        return self._kept

    def retain_loss(self) -> torch.Tensor:
        """How far the student is from the base for the retained prompts: mean squares, [B]."""
        assert self._student is not None
        return squares(self._student[self._asked :], self.kept())


class Objective(Protocol):
    """A fine-tuning method.

    Attributes:
        teacher_roles: roles of which the loss asks the teacher; with the policy `"base"` they are known from the denoising.
        late: sampler steps by which noisy latents are cleaner than the timesteps that they are given; 0 is right.
        adversarial: how what is hurt most is searched for, where it is.
        inserting: how what brings a concept back is searched for, where it is.
    """

    teacher_roles: tuple[str, ...]
    late: int = 0
    adversarial: Adversarial | None = None
    inserting: Inserting | None = None

    def examples(self, concepts: Sequence[Concept], templates: Sequence[str]) -> list[Example]:
        """Prompts by role, for each concept in each template; all concepts in the first template come first."""
        ...

    def loss(self, step: Step) -> torch.Tensor:
        """The loss of each sample, float32 [B]."""
        ...

    def retains(self, number: int) -> bool:
        """Whether retained prompts are trained on in a step."""
        return True

    def rate(self, number: int) -> float:
        """What the learning rate of a step is multiplied by."""
        return 1.0

    def scale(self, sampler: Sampler, timesteps: torch.Tensor) -> torch.Tensor | float:
        """What the retained prompts' losses at timesteps [B] are multiplied by."""
        return 1.0

    def inside(self, model: Any) -> AbstractContextManager[None]:
        """A block within which the denoiser is trained, for what the loss has to watch in it."""
        return nullcontext()


def squares(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square of the difference for each sample, [B]."""
    return (prediction - target).square().flatten(1).mean(1)
