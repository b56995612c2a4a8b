"""The methods: how an erasure is made. A new method is one new file here and one line below."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ErasureInputError


@dataclass(frozen=True)
class Declared:
    """What a method says about itself; read without importing it.

    Attributes:
        summary: one line for people.
        trains: whether weights are trained by gradients.
        resumable: whether `fit` takes a [`TrainingRun`]: checkpoints, resuming and progress.
        instead: where the method takes no retained prompts: what it has instead, in a sentence; empty where it takes them.
    """

    summary: str
    trains: bool = False
    resumable: bool = False
    instead: str = ""


# `python -m diffusers_erasure.methods.catalogue` writes down again what is told about them.
# A method is a module of its name. It has `Config`, a dataclass of settings, `fit(pipe, concepts, config)` (with a further
# `run` where it is resumable) and, where erasures can be solved again, `refit(pipe, concepts, config, rows)`.
_REGISTRY: dict[str, Declared] = {
    "acterase": Declared(
        "ActErase (2026): activations that carry the concept are replaced by their means without it; no training, minutes",
        resumable=True,
        instead="It spares the rest by changing few units: at most the share `top`, none whose importance without the concept "
        "lies below the quantile `tau`, and each only as far as `blend` says.",
    ),
    "dumo": Declared(
        "DuMo (AAAI 2025): a network beside the encoder that adds to the skip connections, and its schedule; minutes",
        trains=True,
        resumable=True,
    ),
    "esd": Declared(
        "ESD (ICCV 2023): fine-tuning away from the concept by the base's own guidance, as a LoRA; minutes",
        trains=True,
        resumable=True,
    ),
    "rece": Declared("RECE (ECCV 2024): UCE, then further closed-form edits against rows that still reach the target"),
    "sdd": Declared(
        "SDD (ICML workshop 2023): self-distillation towards the empty prompt, averaged, as a LoRA; minutes",
        trains=True,
        resumable=True,
    ),
    "speed": Declared(
        "SPEED (ICLR 2026): closed-form edit of the values in the null space of what is retained; seconds"
    ),
    "uce": Declared("UCE (WACV 2024): closed-form edit of the cross-attention keys and values; seconds, no training"),
}


@dataclass(frozen=True)
class MethodEntry:
    """A method of the registry.

    Attributes:
        name: what `erase(method=...)` takes.
        summary: one line for people.
        config: the dataclass of its settings.
        fit: `(pipe, concepts, config) -> Erasure`, with a further [`TrainingRun`] where `resumable`.
        trains: whether weights are trained by gradients.
        refit: `(pipe, concepts, config, rows) -> Erasure` from the rows that erasures keep, for `combine`; `None` where the
            method keeps none.
        resumable: whether it can save checkpoints and go on from them.
        instead: where it takes no retained prompts: what it has instead, in a sentence; empty where it takes them.
    """

    name: str
    summary: str
    config: type[Any]
    fit: Callable[..., Any]
    trains: bool = False
    refit: Callable[..., Any] | None = None
    resumable: bool = False
    instead: str = ""

    @property
    def retains(self) -> bool:
        """Whether it takes prompts that must not change."""
        return not self.instead


def method_names() -> dict[str, str]:
    """Names of the methods, with a line about each; imports none of them."""
    return {name: declared.summary for name, declared in _REGISTRY.items()}


def get_method(name: str) -> MethodEntry:
    """Return a method by name.

    Raises:
        ErasureInputError: there is no such method.
    """
    if name not in _REGISTRY:
        raise ErasureInputError(f"There is no method {name!r}; methods are {sorted(_REGISTRY)}.")
    says = _REGISTRY[name]
    module = importlib.import_module(f".{name}", __name__)
    refit = getattr(module, "refit", None)
    return MethodEntry(name, says.summary, module.Config, module.fit, says.trains, refit, says.resumable, says.instead)


def check_names(entry: MethodEntry, names: Iterable[str]) -> None:
    """See that a method has settings of these names.

    Raises:
        ErasureInputError: it has not; where it takes no retained prompts, what it has instead.
    """
    known = [item.name for item in dataclasses.fields(entry.config)]
    unknown = sorted(set(names) - set(known))
    if "retain" in unknown and not entry.retains:
        raise ErasureInputError(f"The method {entry.name!r} takes no retained prompts (`retain`). {entry.instead}")
    if unknown:
        raise ErasureInputError(f"The method {entry.name!r} has no setting {unknown[0]!r}; settings are {known}.")


def make_config(entry: MethodEntry, settings: Mapping[str, Any]) -> Any:
    """Build a method's config from settings by name.

    Raises:
        ErasureInputError: a setting is unknown or out of range.
    """
    check_names(entry, settings)
    return entry.config(**settings)
