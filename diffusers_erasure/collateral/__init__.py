"""What an erasure does to everything else: how far the words of shipped lists moved, told after every fit."""

import dataclasses
import signal
from collections.abc import Sequence
from typing import Any

import torch

from ..artifact import Erasure
from ..encoding import short_enough
from ..errors import ErasureError
from ..lists import names_any, read_list
from ..lists.defaults import LISTS
from ..logging import get_logger
from ..runs.interrupts import Interrupt, noted
from .predictions import Predictions, StoppedError
from .rows import row_moves
from .telling import told


__all__ = ["Collateral"]

logger = get_logger(__name__)

# Above these pictures of a word more often change than not; chosen on the development half of the embedded model's objects
# (benchmarks/collateral.py).
ROWS_MOVED = 0.1
PREDICTIONS_MOVED = 0.4
BY_ROWS = "text rows: 1 - cos(W'x, Wx)"
BY_PREDICTIONS = "predictions: |e' - e| as a share of the targets'"


class Collateral:
    """Compares a shipped list before and after a fit.

    Args:
        pipe ([`DiffusionPipeline`]): the base model.
        targets, anchors (sequence of `str`): words that name one are not compared.
        task (`str`): the kind of concept: `"object"`, `"style"` or `"person"`.
        ahead (`bool`): encode what predictions need now, as the fit may release the text encoders.
        progress (`bool`, *optional*, defaults to `True`): show a bar while predictions are compared.
    """

    def __init__(
        self,
        pipe: Any,
        targets: Sequence[str],
        anchors: Sequence[str],
        task: str,
        ahead: bool,
        progress: bool = True,
    ) -> None:
        self.pipe, self.targets, self.lists, self.progress = pipe, list(targets), LISTS[task], progress
        named = [name for name in (*targets, *anchors) if name.strip()]
        words = dict.fromkeys(word for name in self.lists for word in read_list(name))
        try:
            fitting = short_enough(pipe, list(words))
        except ErasureError as error:
            _not_compared(error)
            fitting = []
        self.listed = fitting
        self.words = [word for word in fitting if not names_any(word, named)]
        self.ahead = ahead
        self.predictions = self._predictions() if ahead and self.words else None

    def added_to(self, erasure: Erasure) -> Erasure:
        """The erasure with the numbers among its diagnostics; warns of what moved far. It goes within `erasures_disabled`.

        The first Ctrl-C ends the comparison and nothing else: a fit that is done is worth more. SIGTERM ends the process.
        """
        if not self.words:
            return erasure
        with noted() as interrupt:
            try:
                found = None if self.ahead else self._by_rows(erasure)
                found = found or self._by_predictions(erasure, interrupt)
            except StoppedError:
                found = None
        if interrupt.signal == signal.SIGTERM:
            interrupt.stop()
        if interrupt.signal is not None:
            logger.warning(
                "Interrupted: the erasure is made and kept. %s `compare=False` leaves the comparison out.",
                f"What it does to the {len(self.words)} words of {', '.join(self.lists)} was not compared."
                if found is None
                else "The comparison was done by then.",
            )
        if found is None:
            return erasure
        diagnostics = {**erasure.config.diagnostics, "collateral": found}
        return dataclasses.replace(erasure, config=dataclasses.replace(erasure.config, diagnostics=diagnostics))

    def _by_rows(self, erasure: Erasure) -> dict[str, Any] | None:
        try:
            # All of the lists, so that what is cached of their rows serves any targets.
            moves = row_moves(self.pipe, erasure, self.listed)
        except ErasureError as error:
            _not_compared(error)
            return None
        if moves is None:
            return None
        own = set(self.words)
        compared = torch.tensor([word in own for word in self.listed])
        return told(self.words, moves[compared], self.lists, BY_ROWS, ROWS_MOVED)

    def _by_predictions(self, erasure: Erasure, interrupt: Interrupt) -> dict[str, Any] | None:
        if not all(layer.component in ("unet", "transformer") for layer in erasure.config.layers):
            return None
        predictions = self.predictions if self.ahead else self._predictions()
        if predictions is None:
            return None
        try:
            moves = predictions.moves(erasure, interrupt)
        except (ErasureError, torch.OutOfMemoryError) as error:
            _not_compared(error)
            return None
        return told(predictions.words, moves, self.lists, BY_PREDICTIONS, PREDICTIONS_MOVED)

    def _predictions(self) -> Predictions | None:
        try:
            return Predictions(self.pipe, self.words, self.targets, self.progress)
        except ErasureError as error:
            _not_compared(error)
            return None


def _not_compared(error: Exception) -> None:
    """An erasure that was made is worth more than the numbers about it."""
    logger.info("What the erasure does to other words was not compared: %s", error)
