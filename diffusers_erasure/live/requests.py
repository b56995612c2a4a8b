"""What holds for a request: it belongs to the place where the request is made, never to the modules that requests share.

Blocks (`erasures_disabled`, `erasure_strengths`) and requests are frames of a context variable, from the outermost to the
innermost. A request, which is a call of a pipeline, keeps the erasures and strengths that held when it began.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import compat
from ..errors import ErasureInputError, ErasureNotFoundError
from ..schema import COMPONENTS
from . import turnstile
from .carrying import carry
from .plans import Plan, Strength, View


if TYPE_CHECKING:
    from .attachment import ErasureModules

EMPTY = Plan({}, ())


class Frame:
    """A block or a request, on the components of one pipeline: those that it has now, and those that it had at first.

    Args:
        pipe: the pipeline; `None` for the named components alone.
        modules (iterable of `nn.Module`, *optional*): components.
    """

    def __init__(self, pipe: Any, modules: Iterable[nn.Module] = ()) -> None:
        self.pipe = pipe
        self.modules = [compat.unwrap_compiled(each) for each in (*components(pipe).values(), *modules)]
        self.open = True

    def covers(self, component: nn.Module) -> bool:
        """Whether it holds for a component."""
        if any(each is component for each in self.modules):
            return True
        return any(compat.unwrap_compiled(each) is component for each in components(self.pipe).values())


class Block(Frame):
    """A block of code.

    Args:
        pipe, modules: as of [`Frame`].
        exact (`dict`, *optional*): the strengths of all erasures that act; none of the others does.
        strengths (`dict`, *optional*): those of some erasures; the others keep theirs.
        training (`bool`, *optional*): weights may be trained through erasures.
        trusted (`bool`, *optional*): text rows from outside were encoded with the erasures on.
    """

    def __init__(
        self,
        pipe: Any,
        modules: Iterable[nn.Module] = (),
        *,
        exact: Mapping[str, Strength] | None = None,
        strengths: Mapping[str, Strength] | None = None,
        training: bool = False,
        trusted: bool = False,
    ) -> None:
        super().__init__(pipe, modules)
        self.exact, self.strengths = exact, dict(strengths or {})
        self.training, self.trusted = training, trusted
        if exact is not None and not exact:
            _disabled.add(self)
        self.had = {
            (id(module), name) for module in self.modules for name in self.strengths if name in _loaded(module)
        }

    def strengths_on(self, component: nn.Module, plan: Plan, strict: bool = True) -> dict[str, Strength]:
        """The strengths that it gives to erasures of a component.

        Raises (where it is `strict`):
            ErasureNotFoundError: one of them was unloaded within the block.
        """
        gone = [n for n in self.strengths if n not in plan.strengths and (id(component), n) in self.had]
        if gone and strict:
            raise ErasureNotFoundError(
                f"The erasures {gone}, whose strengths `erasure_strengths` gives, were unloaded meanwhile. Load them again, or "
                "leave the block."
            )
        return {name: value for name, value in self.strengths.items() if name in plan.strengths}


class Request(Frame):
    """A call of a pipeline, with what was loaded when it began: by component, `EMPTY` where there was nothing."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.plans: dict[int, Plan] = {}

    def plan_of(self, component: nn.Module, present: Plan) -> Plan:
        """What was loaded on a component; the present plan on one that came later."""
        return self.plans.get(id(component), present)


_under_way: dict[int, Request] = {}
_disabled: "weakref.WeakSet[Block]" = weakref.WeakSet()  # blocks in which all erasures are off, of all threads


def disabled(component: nn.Module) -> tuple[bool, bool]:
    """Whether erasures are off on a component in a block in which the caller is, and in one of another thread or task."""
    mine = frames()
    blocks = [block for block in list(_disabled) if block.open and block.covers(component)]
    own = [block for block in blocks if any(block is each for each in mine)]
    return bool(own), len(blocks) > len(own)


def under_way(component: nn.Module) -> list[Request]:
    """The requests on a component that have begun, also before it had its first erasure, and are not over."""
    return [each for each in list(_under_way.values()) if id(component) in each.plans]


def over(request: Request) -> None:
    """A request is no longer under way."""
    if _under_way.pop(id(request), None) is not None:
        turnstile.end([turnstile.of(module) for module in request.modules])


@dataclass(frozen=True)
class Handed:
    """A block in which a job was handed over to an executor: it holds for the job, also where that begins later."""

    block: Block


# A thread that was started within blocks may live longer than they do. It holds nothing of them, and they end for it too.
Frames = tuple[Frame | Handed | weakref.ReferenceType[Frame], ...]
_frames: ContextVar[Frames] = ContextVar("erasure requests", default=())


def for_threads(frames: Frames) -> Frames:
    """What a thread inherits that is started here."""
    return tuple(weakref.ref(each) if isinstance(each, Frame) else each for each in frames)


def for_jobs(frames: Frames) -> Frames:
    """What a job inherits that is handed over here: the blocks, whether they have ended or not when it begins."""
    return tuple(Handed(each) if isinstance(each, Block) and each.open else each for each in frames)


def frames() -> list[Frame]:
    """The blocks and requests that the caller is in, from the outermost to the innermost."""
    found: list[Frame] = []
    for each in _frames.get():
        if isinstance(each, Handed):
            found.append(each.block)
            continue
        frame = each if isinstance(each, Frame) else each()
        if frame is not None and frame.open:  # contexts are copied, and so may know of blocks that have ended
            found.append(frame)
    return found


@contextmanager
def within(frame: Frame) -> Iterator[None]:
    """A block of code within a frame, and what is handed to other threads there."""
    carry(_frames, for_threads, for_jobs)
    mine = (*_frames.get(), frame)
    token = _frames.set(mine)
    try:
        yield
    finally:
        frame.open = False
        if _frames.get() is mine:
            _frames.reset(token)
        else:  # blocks of generators end in any order, and in other contexts
            _frames.set(tuple(each for each in _frames.get() if each is not frame))


def view(component: nn.Module, state: "ErasureModules", strict: bool = True) -> View:
    """What holds on a component for a request that would be made here and now.

    Raises (where it is `strict`):
        ErasureNotFoundError: see [`Block.strengths_on`].
    """
    plan, training = state.plan, False
    blocks: list[Block] = []
    for frame in frames():
        if frame.covers(component):
            if isinstance(frame, Request):
                plan = frame.plan_of(component, plan)
            elif isinstance(frame, Block):
                blocks.append(frame)
    strengths: dict[str, Strength] = dict(plan.strengths)
    disabled = False
    for block in blocks:
        training = training or block.training
        if block.exact is not None:
            strengths = {name: block.exact.get(name, 0.0) for name in plan.names}
            disabled = not block.exact
        elif not disabled:
            strengths.update(block.strengths_on(component, plan, strict))
    return View(plan, strengths, disabled, training)


def within_request(component: nn.Module) -> bool:
    """Whether the caller is within a call of a pipeline that has a component."""
    return any(isinstance(frame, Request) and frame.covers(component) for frame in frames())


def trusts_prompts(pipe: Any) -> bool:
    """Whether text rows from outside are trusted here, for any of a pipeline's components."""
    modules = [compat.unwrap_compiled(module) for module in components(pipe).values()]
    blocks = [frame for frame in frames() if isinstance(frame, Block) and frame.trusted]
    return any(block.covers(module) for block in blocks for module in modules)


def changed(component: nn.Module, state: "ErasureModules") -> None:
    """A change was made here: the requests that the caller is in go on with it."""
    for frame in frames():
        if isinstance(frame, Request) and frame.covers(component):
            frame.plans[id(component)] = state.plan


def extend(component: nn.Module, new: nn.Module) -> None:
    """Blocks that hold for a component hold for another one too, which was built from it."""
    for frame in frames():
        if isinstance(frame, Block) and frame.covers(component):
            frame.modules.append(compat.unwrap_compiled(new))


@contextmanager
def request(
    pipe: Any, states: Callable[[Any], Mapping[str, "ErasureModules"]], pictures: int | None = None
) -> Iterator[Request]:
    """A call of a pipeline for so many pictures (`None` where that is not known) begins, and ends with the block.

    Raises:
        ErasureInputError: strengths are given by picture, for more or fewer pictures.
    """
    frame = Request(pipe)
    with turnstile.quiet(map(turnstile.of, frame.modules), frames()):
        by_name = states(pipe)
        for name, module in components(pipe).items():
            state = by_name.get(name)
            bare = compat.unwrap_compiled(module)
            held = None if state is None else view(bare, state)
            frame.plans[id(bare)] = EMPTY if held is None else held.plan
            for erasure, strength in held.strengths.items() if held is not None else ():
                if isinstance(strength, tuple) and pictures not in (None, len(strength)):
                    raise ErasureInputError(
                        f"{len(strength)} strengths are given for {erasure!r}, but {pictures} pictures are asked for. Give one for each "
                        "picture (prompts times `num_images_per_prompt`), or one number for all."
                    )
        _under_way[id(frame)] = frame
        turnstile.begin(map(turnstile.of, frame.modules))
    with within(frame):
        yield frame


def wrapped(
    states: Callable[[Any], Mapping[str, "ErasureModules"]], end: Callable[[Request], None]
) -> Callable[..., Any]:
    """Makes of a pipeline class's `__call__` one that is a request; `end` is called after each."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def requested(self: Any, *args: Any, **kwargs: Any) -> Any:
            with request(self, states, pictures_of(call, self, *args, **kwargs)) as frame:
                try:
                    return call(self, *args, **kwargs)
                finally:
                    end(frame)

        return requested

    return wrap


def pictures_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int | None:
    """How many pictures a pipeline is called for; `None` where its arguments do not say."""
    try:
        given = inspect.signature(call).bind(*args, **kwargs).arguments
    except TypeError:  # the call says it itself
        return None
    given |= given.get("kwargs", {})  # of a modular pipeline
    prompts, rows = given.get("prompt"), given.get("prompt_embeds")
    each = given.get("num_images_per_prompt", given.get("num_videos_per_prompt")) or 1
    if isinstance(prompts, str):
        return int(each)
    if isinstance(prompts, list | tuple):
        return len(prompts) * int(each)
    return len(rows) * int(each) if isinstance(rows, torch.Tensor | list) else None  # Z-Image has a list of rows


def components(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline on which an erasure may act, by name."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _loaded(component: nn.Module) -> Mapping[str, Any]:
    state: Any = compat.child(component, "erasure_modules")
    return {} if state is None else state.loaded
