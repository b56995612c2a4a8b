"""The methods: how an erasure is made. A new one is a file here, and its declaration in `registry/built_in.py`."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ErasureInputError
from ..registry import MethodDeclaration, declaration, method_names
from ..settings import USUAL, resolve, rules_of


__all__ = ["DEFAULTS", "MethodEntry", "check_names", "default_method", "get_method", "make_config", "method_names"]

# What `erase` takes where no method is named, the best first: docs/methods/index.md has the rule and the figures.
DEFAULTS = ("gated", "uce")


@dataclass(frozen=True)
class MethodEntry:
    """A method with its code.

    Attributes:
        declared: what it says about itself.
        config: the dataclass of its settings, as they are given.
        fit: `(pipe, concepts, config) -> Erasure`, with a further [`TrainingRun`] where it is resumable.
        settings: the dataclass of what it works with, where settings may be left out in `config`.
        refit: `(pipe, concepts, config, rows) -> Erasure` from the rows that erasures keep, for `combine`; `None` where the
            method keeps none.
    """

    declared: MethodDeclaration
    config: type[Any]
    fit: Callable[..., Any]
    settings: type[Any] | None = None
    refit: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """What `erase(method=...)` takes."""
        return self.declared.name

    def resolved(self, config: Any) -> Any:
        """A config with nothing left out; what depends on the concepts or the base model is that of a usual case."""
        return config if self.settings is None else resolve(config, self.settings, USUAL)


def get_method(name: str) -> MethodEntry:
    """Return a method by name.

    Raises:
        ErasureInputError: there is no such method, or its package is broken.
    """
    declared = declaration(name)
    try:
        module = importlib.import_module(declared.module)
        config, fit = module.Config, module.fit
        rules_of(config)
    except (Exception, SystemExit) as error:  # whatever a package's module does
        raise ErasureInputError(
            f"The method {name!r} cannot be used: its module {declared.module!r} does not give a function `fit` and a dataclass "
            f"`Config` whose annotations say what each setting may be ({type(error).__name__}: {error})."
        ) from error
    # Only a config that says what stands for settings that are left out has settings to resolve into.
    settings = getattr(module, "Settings", None) if hasattr(config, "stated") else None
    return MethodEntry(declared, config, fit, settings, getattr(module, "refit", None))


def default_method(names: Iterable[str]) -> str:
    """The method that `erase` takes where none is named: the first of [`DEFAULTS`] that has settings of these names, or the first."""
    wanted = set(names)
    for method in DEFAULTS:
        if wanted <= {item.name for item in dataclasses.fields(get_method(method).config)}:
            return method
    return DEFAULTS[0]


def check_names(entry: MethodEntry, names: Iterable[str]) -> None:
    """See that a method has settings of these names.

    Raises:
        ErasureInputError: it has not; where it takes no retained prompts, what it has instead.
    """
    known = [item.name for item in dataclasses.fields(entry.config)]
    unknown = sorted(set(names) - set(known))
    if "retain" in unknown and not entry.declared.retains:
        instead = entry.declared.instead_of_retain
        raise ErasureInputError(f"The method {entry.name!r} takes no retained prompts (`retain`). {instead}")
    if unknown:
        raise ErasureInputError(f"The method {entry.name!r} has no setting {unknown[0]!r}; settings are {known}.")


def as_meant(entry: MethodEntry, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """An artefact's recorded settings with what those mean that it was made without, before there were such settings."""
    return {**getattr(entry.config, "unrecorded", {}), **recorded}


def make_config(entry: MethodEntry, settings: Mapping[str, Any]) -> Any:
    """Build a method's config from settings by name, and see that they go together.

    Raises:
        ErasureInputError: a setting is unknown or out of range, or does not go with another.
    """
    check_names(entry, settings)
    config = entry.config(**settings)
    entry.resolved(config)
    return config
