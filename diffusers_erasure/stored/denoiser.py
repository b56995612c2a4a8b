"""A pipeline without its denoiser: the module without weights, beside the files that hold them."""

import functools
import json
import re
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..base_model import component
from ..errors import ErasureCompatibilityError, ErasureError, ErasureFileError
from ..families import DENOISERS
from ..fingerprints import keep_stored
from .places import Folder, Place, Repository
from .weights import Weights


# Of pipelines, as fits see them.
_views: weakref.WeakKeyDictionary[Any, tuple[str, nn.Module]] = weakref.WeakKeyDictionary()


class WithDenoiser:
    """A pipeline with a denoiser that it has not loaded; all else is the pipeline's own."""

    def __init__(self, pipe: Any, name: str, model: nn.Module) -> None:
        self.__dict__.update({"_pipe": pipe, name: model})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_pipe"], name)

    @property  # type: ignore[misc]  # typeshed has a plain attribute; a property, as `isinstance` asks for it
    def __class__(self) -> Any:
        return type(self.__dict__["_pipe"])


def with_stored_denoiser(pipe: Any) -> Any:
    """The pipeline itself where its denoiser is loaded; else a view of it with one whose weights stay in their files.

    That module has the names and shapes of all parameters and no weights; those that a fit asks for, and the values by which it
    is recognised, are read from the files: of a local folder, or by ranges from the Hub.

    Args:
        pipe: a pipeline, for example `FluxPipeline.from_pretrained(path, transformer=None)`.

    Raises:
        ErasureCompatibilityError: the files are not found or do not fit, or the denoiser is of no known family.
    """
    names = [name for name in ("unet", "transformer") if hasattr(pipe, name)]
    if not names or any(component(pipe, name) is not None for name in names):
        return pipe
    name, errors, where = names[0], [], compat.name_or_path(pipe)
    if pipe in _views and _views[pipe][0] == where:
        return WithDenoiser(pipe, name, _views[pipe][1])
    for place in _places(pipe, name):
        try:
            model = _skeleton(pipe, name, place)
            _views[pipe] = where, model
            return WithDenoiser(pipe, name, model)
        except (OSError, ValueError, ErasureError) as error:
            if isinstance(error, ErasureCompatibilityError):
                raise
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
    raise ErasureCompatibilityError(
        f"{type(pipe).__name__} has no {name} loaded, and its files cannot be read "
        + (
            f"from {where!r} ({'; '.join(errors)})."
            if where
            else "as the pipeline does not say where it was loaded from."
        )
        + f" Load the pipeline with its {name}, or from a folder or a repository that holds it."
    )


def _places(pipe: Any, name: str) -> list[Place]:
    """Where the denoiser's files may lie: in the pipeline's folder, in the cache, or on the Hub."""
    where = compat.name_or_path(pipe)
    if Path(where).is_dir():
        return [Folder(Path(where) / name)] if where else []
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", where, re.ASCII):
        return []
    paths = [compat.name_or_path(each) for each in pipe.components.values() if isinstance(each, nn.Module)]
    snapshot = next((m for path in paths if (m := re.match(r"(.*snapshots[/\\]([0-9a-f]{40}))", path))), None)
    hub = Repository(where, snapshot[2] if snapshot else None, name)
    if snapshot and (Path(snapshot[1]) / name / "config.json").is_file():
        local = Folder(Path(snapshot[1]) / name)
        return [local, hub] if local.names() else [hub]
    return [hub]


def _skeleton(pipe: Any, name: str, place: Place) -> nn.Module:
    """The denoiser without weights, of its configuration."""
    import diffusers
    from accelerate import init_empty_weights

    written = place.read("config.json")
    if written is None:
        raise FileNotFoundError(f"there is no {name}/config.json")
    config = json.loads(written)
    if not isinstance(config, dict):
        raise ErasureFileError("config.json is no configuration.")
    kind = str(config.get("_class_name"))
    if kind not in DENOISERS:
        raise ErasureCompatibilityError(f"{kind} belongs to no known family of base models; see `docs/families.md`.")
    weights = Weights(place)
    try:
        with init_empty_weights():
            model = getattr(diffusers, kind).from_config(config)
    except Exception as error:  # of whatever a model's own code does with values that it does not expect
        raise ErasureCompatibilityError(
            f"diffusers cannot build a {kind} by the {name}'s config.json: {error}. Load the pipeline with its {name}."
        ) from error
    model.register_to_config(_name_or_path=_said(pipe, name, place))
    model.eval().requires_grad_(False)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    wrong = [key for key, shape in shapes.items() if key not in weights.entries or weights.entries[key].shape != shape]
    if wrong:
        raise ErasureCompatibilityError(
            f"The files of the {name} do not fit its configuration: {wrong[0]!r} is missing or of another shape. Load the "
            f"pipeline with its {name}."
        )
    for path, module in model.named_modules():
        vars(module)["kept_elsewhere"] = functools.partial(_read, weights, path)
    keep_stored(model, weights)
    return model


def _read(weights: Weights, path: str, name: str) -> torch.Tensor | None:
    return weights.read(f"{path}.{name}" if path else name)


def _said(pipe: Any, name: str, place: Place) -> str:
    """What the denoiser would say of where it was loaded from."""
    if isinstance(place, Repository):
        return f"snapshots/{place.revision}/{name}" if place.revision else compat.name_or_path(pipe)
    assert isinstance(place, Folder)
    return str(place.path)
