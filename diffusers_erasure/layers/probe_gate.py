"""Gates by probes: whether a prompt names what a layer erases, found by the probes of a gated edit.

Beside [`Gate`], whose factor falls with the distance of whole prompts, this one is open or shut: at a row of the text that a probe's
product with it exceeds the probe's threshold. It reads what the denoiser is given, so it needs no state.
"""

import torch
from torch import nn

from ..schema import GateSpec
from .gate import Gate, by_layout
from .gated_map import Probes


HALVES = 2  # numbers in which a threshold is written, so that their sum is exact in half precision


class ProbeGate(Gate):
    """The gate of one layer, by probes.

    Args:
        spec ([`GateSpec`]): factor and layout.
        rows (`torch.Tensor`): probes, each with the halves of its threshold behind it, [probes, width + 2].
    """

    def __init__(self, spec: GateSpec, rows: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.spec, self.width = spec, rows.shape[1] - HALVES
        probes, thresholds = rows[:, :-HALVES], rows[:, -HALVES:]
        self.probes = Probes([(probes, thresholds, torch.tensor([float(len(rows))]), 0)], 1, torch.device("cpu"))
        self.handle = None
        self.read = {}

    def noted(self) -> int:
        """Always the same: nothing is noted."""
        return 0

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Factors [B] for text rows [B, length, width], 0 where no probe finds a name; the full strength for rows of another width."""
        if text.shape[-1] != self.width:
            return text.new_ones(len(text), dtype=torch.float32)
        return by_layout(self.spec, self.spec.factor * self.probes(text)[:, 0].float())


def gate_of(spec: GateSpec, rows: torch.Tensor) -> Gate:
    """The gate that a layer's specification asks for."""
    return (ProbeGate if spec.probes else Gate)(spec, rows)
