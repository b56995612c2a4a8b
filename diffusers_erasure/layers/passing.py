"""What one forward pass of a component knows: which edits act in it and how strongly, its timestep and its text.

It belongs to the thread that runs the pass, never to a module that threads share. `threading.local` is what torch.compile can
read within a graph; strengths are tensors there, so that one graph serves all of them.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .. import compat
from ..errors import ErasureInputError
from .buffers import PartKey


if TYPE_CHECKING:
    from .gate import Gate

KEPT = 4  # rows whose results are kept: guidance may take two passes a step


class Pass:
    """One forward pass.

    Attributes:
        names: the erasures that act, for at least one row.
        edits: what they do, by the number of the place (see [`Place`]).
        strengths: one column for each of `names`: float32 [1, names], or [B, names] where they differ by picture.
        values: the strengths as numbers, where they are the same for all rows. No graph may look at them.
        uniform: whether they are.
        numbers: the strengths as numbers, one tuple for all rows or one for each; `None` where only tensors are known.
        whole: one column for each erasure that is loaded, float32 [B, loaded]: what compiled graphs read.
        older: the edits of all erasures that are loaded, where the pass belongs to a request that began before a change.
        joined: whether modules may read the rows of all pictures one after another.
        timestep, scale: as the denoiser was given it, and the factor to the timesteps of the training.
        text: the rows that the denoiser was given.
        gates: their values [B], once asked for.
        looked: what was found in this pass and holds for more than one module.
        reached: numbers of the places on the component itself that were called.
        rows: the text rows that the first of their readers was given.
        kept: results of earlier passes of the thread, see [`kept_for`]; `None` outside of a request.
        first, nodes: of the autograd nodes that are made in it the number that comes first, and all; empty before its end.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        edits: Mapping[int, Any],
        strengths: torch.Tensor,
        values: tuple[float, ...] | None,
        whole: torch.Tensor,
        older: Mapping[int, Any] | None = None,
        kept: "dict[Any, list[Kept]] | None" = None,
        by_row: tuple[tuple[float, ...], ...] | None = None,
    ) -> None:
        self.names, self.edits, self.older = names, edits, older
        self.strengths, self.values, self.whole = strengths, values, whole
        self.numbers = by_row if values is None else (values,)
        self.uniform = values is not None
        self.ones = values is not None and all(value == 1 for value in values)
        self.kept = kept
        self.joined = False
        self.timestep: Any = None
        self.clock = (1.0, 0.0)
        self.text: torch.Tensor | None = None
        self.gates: dict[PartKey, torch.Tensor] = {}
        self.looked: dict[Any, Any] = {}
        self.reached: set[int] = set()
        self.rows: torch.Tensor | None = None
        self.first = 0
        self.nodes = range(0)

    def read(self, timestep: Any, clock: tuple[float, float], text: Any) -> None:
        """Take over the arguments of the forward pass."""
        self.timestep, self.clock = timestep, clock
        text = text[0] if isinstance(text, tuple) else text  # an IP-Adapter's (text, image embeddings)
        self.text = text if isinstance(text, torch.Tensor) else None
        self.gates, self.looked = {}, {}

    def now(self, device: torch.device) -> torch.Tensor:
        """The timestep, [1] or [B], float32.

        Raises:
            ErasureInputError: a part of the denoiser was called by itself.
        """
        if torch.compiler.is_compiling():
            return timesteps(self.timestep, self.clock, device)
        return self.once(("timestep", device), lambda: timesteps(self.timestep, self.clock, device))

    def once(self, key: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` gives, or gave before in the pass. It has no gradients. Not in graphs."""
        found = self.looked.get(key)
        if found is None:
            found = self.looked[key] = compute()
        return found

    def gate(self, key: PartKey, gate: "Gate") -> torch.Tensor | None:
        """The value of a gate, [B]; `None` where there is no text."""
        if self.text is None:
            return None
        if key not in self.gates:
            with torch.no_grad():
                self.gates[key] = gate(self.text) if torch.compiler.is_compiling() else self._gate(gate, self.text)
        return self.gates[key]

    def _gate(self, gate: "Gate", text: torch.Tensor) -> torch.Tensor:
        """Its value, which within a request stays the same for the same rows, until the gate notes another text."""
        noted = gate.noted()
        return gate(text) if noted is None else _kept(self, (gate, noted), text, lambda: gate(text))


def timesteps(given: Any, clock: tuple[float, float], device: torch.device) -> torch.Tensor:
    """A denoiser's timestep, by factor and offset, as float32 [1] or [B]. Of one for each token it is the noisiest.

    Raises:
        ErasureInputError: there is none.
    """
    if given is None:
        raise ErasureInputError(
            "An erasure that acts by timestep was called outside of a forward pass of its denoiser."
        )
    value = torch.as_tensor(given, device=device).detach().to(torch.float32)
    value = value if clock == (1.0, 0.0) else clock[1] + clock[0] * value
    return value.flatten(1).amax(1) if value.ndim > 1 else value.reshape(-1)


class Here(threading.local):
    """What the calling thread is doing on one component. A copy, or a pickle, is in no thread's pass."""

    now: Pass | None = None
    back: Pass | None = None  # the one that is gone through on the way back, for compiled blocks that are recomputed
    ways: tuple[Pass, ...] = ()  # all of which that is so
    task = -1  # the way back that they are of
    kept: dict[Any, list["Kept"]] | None = None  # of the passes before, as long as `of` is what acts
    of: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Here":
        return Here()

    def __reduce__(self) -> tuple[type["Here"], tuple[()]]:
        return Here, ()

    def kept_of(self, what: Any) -> dict[Any, list["Kept"]]:
        """What is kept, while what acts is the very same."""
        if self.kept is None or self.of is not what:
            self.kept, self.of = {}, what
        return self.kept

    def turn(self, now: Pass) -> None:
        """Gradients have come to the output of a pass; its blocks may be recomputed from here on."""
        if self.task != compat.graph_task():
            self.task, self.ways = compat.graph_task(), ()
            own = vars(self)  # of this thread, and another one may call
            compat.after_backward(lambda: own.update(back=None, ways=(), task=-1))
        others = tuple(each for each in self.ways if each is not now)
        self.ways = (*others, now)
        # Later passes have been gone through, as nodes are in their order; of another thread's passes that is not so.
        self.back = None if any(_overlap(now.nodes, each.nodes) for each in others) else now

    def end(self) -> None:
        """A request is over: nothing is held for it any longer."""
        self.now = self.back = self.kept = self.of = None
        self.ways, self.task = (), -1


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


class Kept:
    """A result that depends on text rows and strengths alone.

    Rows are known again as the very object with nothing written into it since, never by an address alone: a freed one may
    come again.
    """

    def __init__(self, rows: torch.Tensor, version: int, strengths: torch.Tensor, value: torch.Tensor) -> None:
        self.rows, self.strengths, self.value = weakref.ref(rows), strengths, value
        self.version = version, rows.data_ptr()  # another storage under the same object counts no version

    def is_of(self, rows: torch.Tensor, version: int, strengths: torch.Tensor) -> bool:
        """Whether the result is that of these rows and strengths."""
        same = self.rows() is rows and self.strengths is strengths
        return same and self.version == (version, rows.data_ptr())


def kept_for(now: Pass, key: Any, rows: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `compute` gives, or gave before in the pass or, within a request, in an earlier pass of the thread.

    It depends on `rows` and on the pass's strengths alone. In `inference_mode`, where writes into rows are not counted, it
    holds for the pass; with gradients for nothing.
    """
    if torch.is_grad_enabled():
        return compute()
    here = now.looked.get(key)
    if here is not None and here[0] is rows:
        return here[1]
    value = _kept(now, key, rows, compute)
    now.looked[key] = rows, value
    return value


def _kept(now: Pass, key: Any, rows: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    version = compat.version_of(rows)
    if version is None or now.kept is None:
        return compute()
    kind, cast = rows.device.type, None
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # not on the meta device
        cast = torch.get_autocast_dtype(kind)
    own = now.kept.setdefault((key, cast), [])
    for each in own:
        if each.is_of(rows, version, now.strengths):
            return each.value
    value = compute()
    own.insert(0, Kept(rows, version, now.strengths, value))
    del own[KEPT:]
    return value
