"""What a closed form's preset says by the base model and by how much is retained, before its settings are resolved."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ..base_model import family_of
from ..lists import Retained
from .rows import TextConfig


MANY = 256  # prompts that are retained; more are not encoded in templates unless that is asked for

Config = TypeVar("Config", bound=TextConfig)


def suited(config: Config, pipe: Any, at_doors: Mapping[str, Any]) -> Config:
    """A config with what depends on the base model or on what is retained filled in for what was left out.

    Args:
        config ([`TextConfig`]): the method's config; with `published=True` it stays as it is.
        pipe ([`DiffusionPipeline`]): the base model.
        at_doors: settings by name that a method has by default where text enters by a door.
    """
    if getattr(config, "published", False):
        return config
    more = dict(at_doors) if family_of(pipe).door is not None else {}
    prompts = config.retain.prompts if isinstance(config.retain, Retained) else config.retain
    if len(prompts) > MANY:
        more["retain_templates"] = False  # eight times as many would take minutes, and long lists hold enough
    return dataclasses.replace(config, **{key: v for key, v in more.items() if getattr(config, key) is None})
