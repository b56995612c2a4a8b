"""Gates: how far a prompt is about the erased concepts, one factor for each row of the batch.

The cosine of the prompt's text rows, flattened, to those of the concepts is computed at the denoiser from what it is
given, so that it needs no state and works with `prompt_embeds`. The share of a concept's tokens that the prompt holds can
only be known where a text encoder was seen to encode it; for other text the factor is 1. DuMo takes the larger of the two
(arXiv 2501.01125, after the facilitated transport of SPM).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import compat
from ..errors import ErasureInputError
from ..schema import GateSpec
from .buffers import live_buffer
from .locks import Lock


# Texts that are remembered, among them those of all requests under way, and values of each by which it is known again.
SEEN, SAMPLES = 1024, 96


class Gate(nn.Module):
    """The gate of one layer.

    Args:
        spec ([`GateSpec`]): factor, layout and tokens.
        rows (`torch.Tensor`): encoded concepts, [concepts, length, width].
    """

    rows: torch.Tensor  # [concepts, length * width], of norm 1
    places: torch.Tensor  # [SAMPLES] in the flattened rows
    record: torch.Tensor  # [SEEN, SAMPLES + 1]: of a text its values, NaN where there is none yet, and its share
    written: torch.Tensor  # how many texts so far

    def __init__(self, spec: GateSpec, rows: torch.Tensor) -> None:
        super().__init__()
        self.spec, self.shape = spec, tuple(rows.shape[1:])
        flat = F.normalize(rows.double().flatten(1), dim=1)
        cpu = torch.device("cpu")
        live_buffer(self, "rows", flat, cpu, torch.float32)
        live_buffer(self, "places", torch.linspace(0, flat.shape[1] - 1, SAMPLES).round(), cpu, torch.int64)
        live_buffer(self, "record", torch.full((SEEN, SAMPLES + 1), torch.nan), cpu, torch.float32)
        live_buffer(self, "written", torch.tensor(0), cpu, torch.int64)
        self.lock = Lock()  # of the record: other threads write while a pass reads
        self.handle: torch.utils.hooks.RemovableHandle | None = None
        # The record as it was last read on a device, and its state then: [`Gate.noted`].
        self.read: dict[torch.device, tuple[Any, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "read": {}}

    def noted(self) -> Any:
        """What is another one after a text was noted, by a graph too; `None` where torch does not count writes. Not in graphs."""
        version = compat.version_of(self.record)
        return None if version is None else (version, self.record.data_ptr())

    def listen(self, encoder: nn.Module) -> None:
        """Note which texts a text encoder encodes, where the gate compares tokens."""
        if self.spec.tokens is not None and self.handle is None:
            hook = NoteText(self)
            self.handle = compat.unwrap_compiled(encoder).register_forward_hook(hook, with_kwargs=True)

    def close(self) -> None:
        """Listen no more."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    @torch.no_grad()
    def note(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Remember encoded texts: token ids [B, length], rows [B, length, width]."""
        if tuple(rows.shape[1:]) != self.shape:
            return
        ids, rows = ids[-SEEN:], rows[-SEEN:].detach()
        tokens = [torch.tensor(each, device=ids.device) for each in self.spec.tokens or ()]
        held = [(ids[:, None] == each[:, None]).any(2).float().mean(1) for each in tokens]  # of each concept, [B]
        shares = torch.stack(held).amax(0).to(rows.device, rows.dtype)
        found = torch.cat([rows.flatten(1)[:, self.places.to(rows.device)], shares[:, None]], 1).to(self.record)
        with self.lock.held():
            places = (self.written + torch.arange(len(found), device=self.written.device)) % SEEN
            self.record[places] = found
            self.written.add_(len(found))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Factors [B] for text rows [B, length, width]; 1, the full strength, where they are of another shape."""
        if tuple(text.shape[1:]) != self.shape:
            return text.new_ones(len(text), dtype=torch.float32)
        rows = self.rows.to(text.device, torch.float32)
        value = (F.normalize(text.float().flatten(1), dim=1) @ rows.T).amax(1).clamp_min(0)
        unknown = torch.zeros_like(value, dtype=torch.bool)
        if self.spec.tokens is not None:
            share, unknown = self._shares(text)
            value = value.maximum(share)
        value = torch.where(unknown, 1.0, self.spec.factor * value)
        return by_layout(self.spec, value)

    def _shares(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of a concept's tokens in each text [B], and which texts are not known [B].

        A text is known by the very values that the encoder gave: a near one could open the gate for another prompt.
        """
        sample = text.flatten(1)[:, self.places.to(text.device)]
        record = self._record(text.device)
        same = (record[:, :-1].to(text.dtype) == sample[:, None]).all(2)  # [B, SEEN]
        shares = torch.where(same, record[:, -1].float(), 0.0).amax(1)
        return shares, ~same.any(1)

    def _record(self, device: torch.device) -> torch.Tensor:
        """The record on a device, where it is copied to when something was noted. Nobody writes into the copy."""
        with self.lock.held():
            if torch.compiler.is_compiling():
                return self.record.to(device, copy=True)
            noted, (known, record) = self.noted(), self.read.get(device, (None, self.record))
            if noted is None or noted != known:
                with torch.inference_mode(False), torch.no_grad():
                    record = self.record.to(device, copy=True)
                if not compat.is_capturing():  # what is made then belongs to the graph
                    self.read[device] = noted, record
            return record


def by_layout(spec: GateSpec, value: torch.Tensor) -> torch.Tensor:
    """The factors [B] of the rows of a batch from their own: as published, both guidance branches may have the conditional one's."""
    if spec.layout == "row":
        return value
    if len(value) % 2:
        raise ErasureInputError(
            f"A gate of the layout 'uncond_first' takes unconditional rows, then as many conditional ones, not a batch of "
            f"{len(value)}. Draw with guidance, or load the erasure without its gate (`without_gate`)."
        )
    return value[len(value) // 2 :].repeat(2)


class NoteText:
    """Forward hook of a text encoder. A class and no closure, so that models stay picklable."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    @compat.untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None:
            self.gate.note(ids, output[0])
