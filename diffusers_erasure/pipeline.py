"""The pipeline methods, as typed functions whose first argument is the pipeline.

Importing `diffusers_erasure` binds forwarders to them onto `DiffusionPipeline` and `ModularPipeline`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack, cast

from .artifact import Erasure
from .base_model import compare_base, denoiser_name
from .errors import ErasureCompatibilityError, ErasureInputError
from .formats.erased_model import export_erased, push_erased_model
from .hub.options import CommitOptions, PushOptions, ReadOptions, SaveOptions, takes
from .live import attachment, fusing, peft_backend, processor, prompt_guard, second_prompt, twins
from .live.blocks import erasure_strengths, erasures_disabled, training_through_erasures, valid_strength
from .live.contained import check_not_contained
from .live.fusing import fuse_erasures, unfuse_erasures
from .live.loaded import components as _components
from .live.loaded import known as _known
from .live.loaded import loaded as _loaded
from .live.loaded import states as _states
from .live.peft_backend import PeftGuard
from .live.state import Loaded
from .logging import get_logger
from .schema import CARD_FILE, CONFIG_FILE, TENSOR_FILES, Concept
from .showing import layer_text


if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from huggingface_hub import CommitInfo

logger = get_logger(__name__)

TRIES = 3  # of a load beside others; the last one lets nobody in between

StrictBase = Literal["warn", "error", "ignore"]
Backend = Literal["hook", "merge", "peft"]


@dataclass(frozen=True)
class ErasureInfo:
    """One loaded erasure.

    Attributes:
        name: the name under which it is loaded.
        method: how it was made.
        concepts: what it removes; the names are `None` where the erasure was redacted.
        strength: the strength that is set; 0 where it is set to 0, whatever `erasures_disabled` does. With `backend="peft"` the
            weight that `set_adapters` gave it, where it gave one.
        layers: its layers in words, such as `"lora on unet (32 sites)"`.
        base_match: for each component of its base model `"same"`, `"different weights"` or `"unverified"`.
        source: the folder or repository that it came from, `None` for one made in this process.
        revision: the commit that it came from, where it came from the Hub.
        backend: how it acts: `"hook"`, `"merge"` where it is fused into the weights, `"peft"`, or `"processor"` where it was made
            as attention processors.
        kept_bytes: memory of the original weights that are kept while it is fused.
        acting: the strength with which a request that is made here and now draws: 0 within `erasures_disabled`, and within
            `erasure_strengths` what that gives, as a tuple where it gives one for each picture.
    """

    name: str
    method: str
    concepts: tuple[Concept, ...]
    strength: float
    layers: tuple[str, ...]
    base_match: Mapping[str, str]
    source: str | None
    revision: str | None
    backend: str = "hook"
    kept_bytes: int = 0
    acting: float | tuple[float, ...] = 0.0


class ErasablePipeline(Protocol):
    """A pipeline with the methods that this library binds, for type checkers. See [`as_erasable`]."""

    def load_erasure(
        self,
        src: "str | os.PathLike[str] | Erasure",
        adapter_name: str | None = None,
        *,
        strength: float = 1.0,
        strict_base: StrictBase = "warn",
        method: str | None = None,
        weight_name: str | None = None,
        backend: Backend = "hook",
        peft_guard: PeftGuard = "reactivate",
        **options: Unpack[ReadOptions],
    ) -> ErasureInfo: ...

    def list_erasures(self) -> list[ErasureInfo]: ...

    def set_erasures(
        self, names: str | Sequence[str] | Mapping[str, float], strengths: float | Sequence[float] | None = None
    ) -> None: ...

    def unload_erasure(self, name: str | None = None) -> None: ...

    def erasure_strengths(
        self, strengths: Mapping[str, float | Sequence[float]]
    ) -> "AbstractContextManager[None]": ...

    def erasures_disabled(self) -> "AbstractContextManager[None]": ...

    def fuse_erasures(self, names: str | Sequence[str] | None = None) -> int: ...

    def unfuse_erasures(self) -> None: ...

    def export_erased(
        self, save_directory: str | os.PathLike[str], names: str | Sequence[str] | None = None
    ) -> list[Path]: ...

    def push_erased_model(
        self, repo_id: str, names: str | Sequence[str] | None = None, **options: Unpack[CommitOptions]
    ) -> "CommitInfo": ...

    def save_erasure(
        self, save_directory: str | os.PathLike[str], adapter_name: str | None = None, **options: Unpack[SaveOptions]
    ) -> list[Path]: ...

    def push_erasure_to_hub(
        self, repo_id: str, adapter_name: str | None = None, **options: Unpack[PushOptions]
    ) -> "CommitInfo": ...


def as_erasable(pipe: Any) -> ErasablePipeline:
    """Return the same pipeline, typed as one that has the erasure methods.

    Raises:
        ErasureInputError: the methods are not bound (`diffusers_erasure.install()` binds them).
    """
    if not hasattr(pipe, "load_erasure"):
        raise ErasureInputError(
            f"{type(pipe).__name__} has no erasure methods. Call `diffusers_erasure.install()` first."
        )
    return cast(ErasablePipeline, pipe)


# ----------------------------------------------------------------------------------------------------- the state


def _info(pipe: Any, item: Loaded) -> ErasureInfo:
    config = item.erasure.config
    layers = tuple(map(layer_text, config.layers))
    kept = fusing.kept_bytes(pipe, item.name)
    return ErasureInfo(
        name=item.name,
        method=config.method.name,
        concepts=config.concepts,
        strength=peft_backend.present_strength(pipe, item),
        layers=layers,
        base_match=dict(item.base_match),
        source=item.erasure.source,
        revision=item.erasure.revision,
        backend="merge" if item.name in fusing.fused_names(pipe) else item.backend,
        kept_bytes=kept,
        acting=_acting(pipe, item),
    )


def _acting(pipe: Any, item: Loaded) -> float | tuple[float, ...]:
    """Where components say different things (one was copied alone), that of the denoiser, or of the last."""
    views = [state.view() for state in _states(pipe).values()]
    found = [view.strengths[item.name] for view in views if item.name in view.strengths]
    set_by_peft = found and item.backend == "peft" and found[0]
    return peft_backend.present_strength(pipe, item) if set_by_peft else found[0] if found else 0.0


def _in_weights(pipe: Any, names: Sequence[str]) -> bool:
    """Whether any of these erasures lies in weights that all requests share."""
    fused = fusing.fused_names(pipe)
    return any(name in fused or item.backend == "peft" for name, item in _loaded(pipe).items() if name in names)


def _free_name(pipe: Any, src: Any, adapter_name: str | None) -> str:
    taken = _loaded(pipe)
    name = _default_name(src, taken) if adapter_name is None else adapter_name
    if not isinstance(name, str) or not name or "." in name:
        raise ErasureInputError(
            f"An erasure's name must be a string with at least one character and no '.': {name!r}."
        )
    if name in taken:
        raise ErasureInputError(
            f"An erasure {name!r} is loaded already. Give another `adapter_name`, or unload it with "
            f"`pipe.unload_erasure({name!r})` first."
        )
    return name


def _default_name(src: Any, taken: Mapping[str, Loaded]) -> str:
    if isinstance(src, Erasure):
        base = Path(src.source).name if src.source else src.config.method.name
    else:
        path = Path(os.fspath(src))
        base = (path.parent if path.name in (CONFIG_FILE, CARD_FILE, *TENSOR_FILES) else path).name
    base = re.sub(r"[^\w-]+", "_", base).strip("_") or "erasure"
    if not isinstance(src, Erasure) or base not in taken:
        return base
    return next(name for i in range(2, len(taken) + 3) if (name := f"{base}_{i}") not in taken)


# ------------------------------------------------------------------------------------------------- the functions


@takes(ReadOptions)
def load_erasure(
    pipe: Any,
    src: "str | os.PathLike[str] | Erasure",
    adapter_name: str | None = None,
    *,
    strength: float = 1.0,
    strict_base: StrictBase = "warn",
    method: str | None = None,
    weight_name: str | None = None,
    backend: Backend = "hook",
    peft_guard: PeftGuard = "reactivate",
    **options: Unpack[ReadOptions],
) -> ErasureInfo:
    """Load an erasure into a pipeline. It stays on until it is unloaded, whatever is done with LoRAs.

    Everything is checked before anything is attached; a failure leaves the pipeline as it was.

    Args:
        pipe ([`DiffusionPipeline`] or [`ModularPipeline`]): the pipeline.
        src (`str`, `os.PathLike` or [`Erasure`]): a repository id on the Hub, a local folder, or an erasure.
        adapter_name (`str`, *optional*): name under which it is loaded; by default that of the folder or repository.
        strength (`float`, *optional*, defaults to 1.0): finite, at least 0; 0 is the base model bit for bit.
        strict_base (`"warn"`, `"error"` or `"ignore"`, *optional*, defaults to `"warn"`): what to do where the denoiser
            has the right architecture, but other weights than the one that the erasure was made for (a fine-tune of it, or
            one that reads other channels beside the latents).
        method (`str`, *optional*): `"lora"` loads a plain LoRA file as an erasure; otherwise leave it out.
        weight_name (`str`, *optional*): the LoRA's file, with `method="lora"` alone.
        backend (`"hook"`, `"merge"` or `"peft"`, *optional*, defaults to `"hook"`): how it acts. `"merge"` is loading and
            then [`fuse_erasures`]; `"peft"` makes its LoRA, which may be one that it carries for stock diffusers, an adapter of
            the pipeline, which `set_adapters` governs.
        peft_guard (`"reactivate"` or `"error"`, *optional*, defaults to `"reactivate"`): with `backend="peft"`, what a
            forward pass does where other calls have switched the adapter off or written into its tensors: undo that, with
            one warning, or raise [`ErasureInactiveError`].
        options: see [`ReadOptions`].

    Returns:
        [`ErasureInfo`]: what was loaded and how its base model matched.

    Raises:
        ErasureInputError: the name or the edit (in whatever dtype, form or scale) is loaded already, or an argument is out of
            range. Another erasure of the same target is loaded, with a warning of how far both overshoot.
        ErasureCompatibilityError: the erasure was made for another architecture or another text encoder.
        ErasureNotFoundError, ErasureConfigError, ErasureFileError: see [`Erasure.from_pretrained`].
    """
    strength = valid_strength(strength)
    if strict_base not in ("warn", "error", "ignore"):
        raise ErasureInputError(f'`strict_base` must be "warn", "error" or "ignore", not {strict_base!r}.')
    if method not in (None, "lora"):
        raise ErasureInputError(f'`method` must be left out, or be "lora" for a plain LoRA file, not {method!r}.')
    if weight_name is not None and method is None:
        raise ErasureInputError('`weight_name` goes with `method="lora"`; an erasure names its files itself.')
    if backend not in ("hook", "merge", "peft") or peft_guard not in ("reactivate", "error"):
        raise ErasureInputError(
            '`backend` must be "hook", "merge" or "peft", and `peft_guard` "reactivate" or "error", not '
            f"{backend!r} and {peft_guard!r}."
        )
    _free_name(pipe, src, adapter_name)  # before anything is read
    if isinstance(src, Erasure):
        erasure = src
    elif method == "lora":
        from .formats.plain_lora import read_plain_lora

        erasure = read_plain_lora(pipe, src, weight_name=weight_name, **options)
    else:
        erasure = Erasure.from_pretrained(src, **options)
    for attempt in range(
        TRIES
    ):  # passes go on while it is looked at what is loaded; where that changed meanwhile, again
        looked_at = _plans(pipe)
        item, told = _checked(pipe, src, adapter_name, erasure, strength, strict_base, backend)
        with attachment.changing_alone(_components(pipe).values(), weights=backend != "hook"):
            if _plans(pipe) != looked_at:
                if attempt < TRIES - 1:
                    continue
                item, told = _checked(pipe, src, adapter_name, erasure, strength, strict_base, backend)
            _attach(pipe, item, backend, peft_guard)
        break
    for level, message in told:
        logger.log(level, "%s", message)
    logger.info("Loaded the erasure %r (%s) at strength %g.", item.name, erasure.config.method.name, strength)
    return _info(pipe, item)


def _plans(pipe: Any) -> dict[str, Any]:
    """What is loaded, by component: another object after each change."""
    return {name: (state.plan, tuple(state.merged)) for name, state in _states(pipe).items()}


def _checked(
    pipe: Any,
    src: Any,
    adapter_name: str | None,
    erasure: Erasure,
    strength: float,
    strict_base: StrictBase,
    backend: Backend,
) -> tuple[Loaded, list[tuple[int, str]]]:
    """The erasure as it is to be listed, and what is to be told of it; refuses what cannot be loaded."""
    name = _free_name(pipe, src, adapter_name)
    content = erasure.content_hash
    twins.refuse_copy(pipe, content)
    match = _check_base(pipe, erasure, content, strict_base)
    if backend != "merge":  # fused together with those that are, it adds as it does to unfused ones
        fusing.check_beside_fused(pipe, erasure)
    components = _components(pipe)
    processor.check_beside(components.values(), erasure)
    twins.refuse_same_edit(pipe, erasure)
    on_text = any(layer.component.startswith("text_encoder") for layer in erasure.config.layers)
    if on_text:
        prompt_guard.check(pipe)
    item = Loaded(name, erasure, strength, match, content, "peft" if backend == "peft" else "hook")
    item.prompts = prompt_guard.PromptRecord() if on_text else None
    item.one_prompt = prompt_guard.OnePrompt() if second_prompt.needs_guard(pipe, erasure) else None
    if backend == "peft":
        peft_backend.check(pipe, erasure, name, components)
    return item, list(twins.shared_targets(pipe, item))


def _attach(pipe: Any, item: Loaded, backend: Backend, peft_guard: PeftGuard) -> None:
    components = _components(pipe)
    if backend == "peft":
        fusing.refuse_while_disabled(pipe)
        peft_backend.load(pipe, item, components, denoiser_name(pipe), peft_guard)
    else:
        attachment.attach(components, [denoiser_name(pipe)], item)
    if backend == "merge":
        fusing.attach_fused(pipe, item.name)


def _check_base(pipe: Any, erasure: Erasure, content: str, strict_base: StrictBase) -> dict[str, str]:
    layers = erasure.config.layers
    needed = {layer.component for layer in layers}
    derived = {name for layer in layers for name in layer.derived_from}
    base = erasure.config.base_model
    match = compare_base(base, pipe, needed=needed, derived_from=derived)
    check_not_contained(pipe, erasure, content, match)
    changed = [name for name, value in match.items() if value == "different weights" and name not in derived]
    if changed and strict_base != "ignore":
        message = (
            f"The erasure was made for {base.repo or 'a ' + base.family + ' model'}; the weights of {changed} in this "
            "pipeline are others (of the same architecture: a fine-tune of it, fused LoRAs, or other input channels as for "
            "inpainting). How well the concept is erased here was not measured. "
            '`strict_base="ignore"` silences this, "error" refuses.'
        )
        if strict_base == "error":
            raise ErasureCompatibilityError(message)
        logger.warning(message)
    unread = [name for name, value in match.items() if value == "unverified"]
    if unread and strict_base != "ignore":
        message = f"The base model's {unread} could not be compared: not loaded in this pipeline, or quantised."
        if strict_base == "error":
            raise ErasureCompatibilityError(message + ' `strict_base="warn"` loads the erasure all the same.')
        logger.warning(message)
    return dict(match)


def list_erasures(pipe: Any) -> list[ErasureInfo]:
    """List the erasures that are loaded into a pipeline, in the order of loading.

    Returns:
        `list` of [`ErasureInfo`]: empty where there are none.
    """
    return [_info(pipe, item) for item in _loaded(pipe).values()]


def set_erasures(
    pipe: Any, names: str | Sequence[str] | Mapping[str, float], strengths: float | Sequence[float] | None = None
) -> None:
    """Set the strengths of loaded erasures. Others keep theirs: unlike a LoRA, an erasure is not switched off unnamed.

    Takes effect in place, without a new attachment or compilation. Requests that are under way in other threads keep the
    strengths that they began with.

    Args:
        pipe ([`DiffusionPipeline`] or [`ModularPipeline`]): the pipeline.
        names (`str`, sequence of `str`, or `dict`): the erasures, or a `dict` of strengths by name.
        strengths (`float` or sequence of `float`, *optional*): one for all or one for each; 1.0 by default.

    Raises:
        ErasureNotFoundError: a name is not loaded; then nothing is changed.
        ErasureInputError: a strength is negative or not finite, or the numbers of names and strengths differ.
    """
    if isinstance(names, Mapping):
        if strengths is not None:
            raise ErasureInputError("Give the strengths in the `dict` or as `strengths`, not both.")
        strengths = list(names.values())
    listed = [names] if isinstance(names, str) else list(names)
    if strengths is None:
        strengths = 1.0
    values = list(strengths) if isinstance(strengths, Sequence) else [strengths] * len(listed)
    if len(values) != len(listed) or len(set(listed)) != len(listed):
        raise ErasureInputError(f"{len(listed)} names and {len(values)} strengths: give one for each name, each once.")
    changes = [(_known(pipe, name), valid_strength(value)) for name, value in zip(listed, values, strict=True)]
    weights = _in_weights(pipe, listed)
    with attachment.changing_alone(_components(pipe).values(), weights=weights), fusing.changing(pipe, listed):
        for state in _states(pipe).values():  # each by itself: a component that was copied alone has its own items
            for item, value in changes:
                if item.name in state.loaded:
                    state.loaded[item.name].strength = value
        for state in _states(pipe).values():
            state.set_strengths()


def unload_erasure(pipe: Any, name: str | None = None) -> None:
    """Unload one erasure, or all. The others stay exact; without any the pipeline is the base model bit for bit.

    Args:
        pipe ([`DiffusionPipeline`] or [`ModularPipeline`]): the pipeline.
        name (`str`, *optional*): the erasure; all of them by default.

    Raises:
        ErasureNotFoundError: no erasure has that name.
    """
    names = list(_loaded(pipe)) if name is None else [_known(pipe, name).name]
    weights = _in_weights(pipe, names)
    with attachment.changing_alone(_components(pipe).values(), weights=weights), fusing.changing(pipe, names):
        for each in names:
            attachment.detach(_components(pipe).values(), each)


@takes(SaveOptions)
def save_erasure(
    pipe: Any, save_directory: str | os.PathLike[str], adapter_name: str | None = None, **options: Unpack[SaveOptions]
) -> list[Path]:
    """Save a loaded erasure, at the strength that is set, whatever a block gives: other than 1 rescales the tensors and is recorded.

    Args:
        pipe ([`DiffusionPipeline`] or [`ModularPipeline`]): the pipeline.
        save_directory (`str` or `os.PathLike`): the folder.
        adapter_name (`str`, *optional*): the erasure; may be left out where only one is loaded.
        options: see [`SaveOptions`].

    Returns:
        `list` of `Path`: the files.
    """
    return _one(pipe, adapter_name).save_pretrained(save_directory, **options)


@takes(CommitOptions, SaveOptions, PushOptions)
def push_erasure_to_hub(
    pipe: Any, repo_id: str, adapter_name: str | None = None, **options: Unpack[PushOptions]
) -> "CommitInfo":
    """Push a loaded erasure to the Hub, at the strength that is set, whatever a block gives: other than 1 rescales the tensors.

    Args:
        pipe ([`DiffusionPipeline`] or [`ModularPipeline`]): the pipeline.
        repo_id (`str`): the repository, such as `"user/no-cat"`; it is created where it does not exist.
        adapter_name (`str`, *optional*): the erasure; may be left out where only one is loaded.
        options: see [`PushOptions`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit, with its address and that of the pull request.

    Raises:
        ErasureHubError: the Hub refused it or gave no answer, or somebody else pushed meanwhile.
        ErasureInputError: the erasure's or the repository's name, or what it holds, does not allow it.
    """
    return _one(pipe, adapter_name).push_to_hub(repo_id, **options)


def _one(pipe: Any, adapter_name: str | None) -> Erasure:
    """The named erasure (or the only one), at its present strength."""
    items = _loaded(pipe)
    if adapter_name is None:
        if len(items) != 1:
            raise ErasureInputError(f"Name one erasure; loaded are {list(items)}.")
        adapter_name = next(iter(items))
    item = _known(pipe, adapter_name)
    return item.erasure.rescaled(peft_backend.present_strength(pipe, item))


__all__ = [
    "ErasablePipeline",
    "ErasureInfo",
    "as_erasable",
    "erasure_strengths",
    "erasures_disabled",
    "export_erased",
    "fuse_erasures",
    "list_erasures",
    "load_erasure",
    "push_erased_model",
    "push_erasure_to_hub",
    "save_erasure",
    "set_erasures",
    "training_through_erasures",
    "unfuse_erasures",
    "unload_erasure",
]
