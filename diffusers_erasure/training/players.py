"""Who plays against the student while it is trained: each has something of its own that learns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ..denoising.prompts import Prompts
from .adversary import Adversary, Picks
from .config import TrainSettings
from .insertions import Insertions
from .network import Network
from .objective import Objective, Step
from .pool import Example
from .retaining import with_pools


class Players:
    """An objective's, of those that it has.

    Args:
        objective ([`Objective`]): the method.
        config ([`TrainSettings`]): the settings.
        examples: of the concepts, all of them in the first template, then all in the next.
        concepts: how many there are.
        retained: the retained examples.

    Attributes:
        retained: these with what the players need among them.
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainSettings,
        examples: Sequence[Example],
        concepts: int,
        retained: Sequence[Example],
    ) -> None:
        self.objective, self.config, self.examples, self.concepts = objective, config, examples, concepts
        self.retained = list(retained)
        self.concept_of = {id(example): i % concepts for i, example in enumerate(examples)}
        self.adversary: Adversary | None = None
        self.insertions: Insertions | None = None
        if objective.adversarial is not None and config.retain_weight:
            self.retained, texts = with_pools(retained, objective.adversarial.pools, config.template_list)
            self.adversary = Adversary(objective.adversarial, self.retained, texts, config.seed)

    def begin(self, prompts: Prompts) -> None:
        """Before the first step, with what is encoded."""
        if self.objective.inserting is not None:
            how = self.objective.inserting, prompts, self.examples, self.concepts, self.config.seed
            self.insertions = Insertions(*how)

    def picks(self, drawn: Sequence[Example], what: tuple[int, int], total: int, own: slice) -> Picks | None:
        """What is picked for the retained samples of a batch, for the concepts' samples beside them."""
        if self.adversary is None:
            return None
        return self.adversary.picks([self.concept_of[id(example)] for example in drawn], what, total, own)

    def before(self, network: Network, step: Step, accelerator: Accelerator) -> Step:
        """Before the student is trained on a batch: the batch that it is trained on."""
        return step if self.insertions is None else self.insertions.search(network, step, accelerator)

    def after(self, network: Network, step: Step, accelerator: Accelerator) -> None:
        """After the student's step, with its last batch."""
        if self.adversary is not None:
            self.adversary.ascend(network, self.objective, step, accelerator)

    @property
    def there(self) -> dict[str, Adversary | Insertions]:
        """Those that there are, by name."""
        found = {"adversary": self.adversary, "insertions": self.insertions}
        return {name: player for name, player in found.items() if player is not None}

    def saved(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {f"{name}.{key}": v for name, player in self.there.items() for key, v in player.saved().items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what [`saved`] gave, of all tensors of a checkpoint."""
        for name, player in self.there.items():
            prefix = name + "."
            player.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What they found."""
        return {name: player.diagnostics for name, player in self.there.items()}
