"""The methods: how an erasure is made. A new method is one new file here and one line below."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ErasureInputError


# Name -> (module, one line for people). A module has `Config`, a dataclass of settings, `fit(pipe, concepts, config)`
# (with a further `run` where it trains) and, where erasures can be solved again, `refit(pipe, concepts, config, rows)`.
_REGISTRY: dict[str, tuple[str, str]] = {
    "acterase": (
        "acterase",
        "ActErase (2026): activations that carry the concept are replaced by their means without it; no training, minutes",
    ),
    "dumo": (
        "dumo",
        "DuMo (AAAI 2025): a network beside the encoder that adds to the skip connections, and its schedule; minutes",
    ),
    "esd": (
        "esd",
        "ESD (ICCV 2023): fine-tuning away from the concept by the base's own guidance, as a LoRA; minutes",
    ),
    "rece": ("rece", "RECE (ECCV 2024): UCE, then further closed-form edits against rows that still reach the target"),
    "sdd": (
        "sdd",
        "SDD (ICML workshop 2023): self-distillation towards the empty prompt, averaged, as a LoRA; minutes",
    ),
    "speed": (
        "speed",
        "SPEED (ICLR 2026): closed-form edit of the values in the null space of what is retained; seconds",
    ),
    "uce": ("uce", "UCE (WACV 2024): closed-form edit of the cross-attention keys and values; seconds, no training"),
}


@dataclass(frozen=True)
class MethodEntry:
    """A method of the registry.

    Attributes:
        name: what `erase(method=...)` takes.
        summary: one line for people.
        config: the dataclass of its settings.
        fit: `(pipe, concepts, config) -> Erasure`.
        trains: whether `fit` takes a [`TrainingRun`] too, as it trains.
        refit: `(pipe, concepts, config, rows) -> Erasure` from the rows that erasures keep, for `combine`; `None` where the
            method keeps none.
    """

    name: str
    summary: str
    config: type[Any]
    fit: Callable[..., Any]
    trains: bool = False
    refit: Callable[..., Any] | None = None


def method_names() -> dict[str, str]:
    """Names of the methods, with a line about each; imports none of them."""
    return {name: summary for name, (_, summary) in _REGISTRY.items()}


def get_method(name: str) -> MethodEntry:
    """Return a method by name.

    Raises:
        ErasureInputError: there is no such method.
    """
    if name not in _REGISTRY:
        raise ErasureInputError(f"There is no method {name!r}; methods are {sorted(_REGISTRY)}.")
    module_name, summary = _REGISTRY[name]
    module = importlib.import_module(f".{module_name}", __name__)
    trains = "run" in inspect.signature(module.fit).parameters
    return MethodEntry(name, summary, module.Config, module.fit, trains, getattr(module, "refit", None))


def make_config(entry: MethodEntry, settings: Mapping[str, Any]) -> Any:
    """Build a method's config from settings by name.

    Raises:
        ErasureInputError: a setting is unknown or out of range.
    """
    known = [item.name for item in dataclasses.fields(entry.config)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ErasureInputError(f"The method {entry.name!r} has no setting {unknown[0]!r}; settings are {known}.")
    return entry.config(**settings)
