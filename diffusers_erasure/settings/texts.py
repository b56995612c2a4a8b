"""Settings about texts that several methods share: templates around a concept, and prompts to retain."""

import dataclasses
import string
from collections.abc import Collection, Sequence
from typing import Annotated, Any

from ..errors import ErasureInputError
from ..lists import Retained
from . import contexts
from .ranges import Of


TEMPLATES = {
    "none": ("{}",),
    "object": ("{}", "a {}", "a picture of a {}", "an image of {}", "a photo of {}", "a drawing of a {}"),
    "style": ("{}", "{} style", "in the style of {}", "a painting by {}", "art by {}", "a picture by {}"),
    # Contexts on both sides: the rows of the words behind a concept carry it too, and so do those of the padding.
    "object_context": (
        *("{}", "a {}", "a picture of a {}", "a photo of a {}"),
        *("a {} in a picture", "a {}, artwork", "a drawing of a {} on paper", "two {} together"),
    ),
    "style_context": (
        *("{}", "{} style", "a picture in {} style", "art in the style of {}", "a drawing of a person in {} style"),
        *("a photo of an object, {} style", "a painting by {}", "{} artwork"),
    ),
    "person": ("{}", "a portrait of {}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}"),
    # Many contexts of every kind, for probes that have to know a name wherever it stands.
    **{"object_many": contexts.OBJECTS, "style_many": tuple(contexts.STYLES), "person_many": contexts.PEOPLE},
}
MOST_RECORDED = 65_536  # characters of a user's own list, of the 256 KiB that a configuration may have


def check_template(template: Any) -> None:
    """See that `template.format(concept)` puts the concept in once, and asks for nothing else.

    Raises:
        ErasureInputError: it is no such text.
    """
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except (TypeError, ValueError):  # no text, or a brace alone
        fields = []
    if [field[1:] for field in fields] != [("", "", None)]:
        raise ErasureInputError(
            f"The template {template!r} must hold {{}} once, for the concept, and no other braces; a brace that belongs to "
            "the prompt is doubled, as in {{ and }}."
        )


def template_list(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of a set by its name, or one's own."""
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ErasureInputError(f"`templates` must be one of {sorted(TEMPLATES)} or a list of prompts with {{}}.")
        return TEMPLATES[templates]
    return tuple(templates) or ("{}",)


def checked_templates(templates: str | Collection[str]) -> str | tuple[str, ...]:
    """The name of a set, or one's own templates.

    Raises:
        ErasureInputError: there is no such set, or one does not hold {} once.
    """
    named = templates if isinstance(templates, str) else tuple(templates)
    for template in template_list(named):
        check_template(template)
    return named


def without_concept(template: str) -> str:
    """What is left of a prompt where the concept is taken out: what it is around a style, else nothing."""
    return contexts.STYLES.get(template, "")


def as_retained(retain: Retained | Collection[str]) -> Retained:
    """Prompts to retain, with where they come from."""
    prompts = () if isinstance(retain, Retained) else tuple(retain)
    return retain if isinstance(retain, Retained) else Retained(prompts, prompts, ())


Templates = Annotated[
    str | Sequence[str] | None,
    Of(
        f"one of {', '.join(TEMPLATES)}, or a list of prompts with {{}} for the concept",
        *(str, Collection),
        plain=checked_templates,
    ),
]
Retain = Annotated[
    Retained | Sequence[str],
    Of(
        "a list of prompts, of files of them and of shipped lists (list:NAME)",
        *(Retained, Collection),
        plain=as_retained,
    ),
]


def recorded_settings(settings: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings for the artefact, and the names of those that would reveal a concept."""
    kept: Retained = settings.retain
    values = {
        item.name: getattr(settings, item.name) for item in dataclasses.fields(settings) if item.name != "retain"
    }
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    values["retain_prompts"] = len(kept.prompts)
    if kept.default:
        values["retain_default"] = list(kept.default)
    if sum(map(len, (*kept.source, *kept.excluded))) > MOST_RECORDED:
        return values, ("templates",)  # whoever joins the erasure gives the list again
    values["retain"], values["retain_excluded"] = list(kept.source), list(kept.excluded)
    secret = ["retain_excluded"] if isinstance(settings.templates, str) else ["retain_excluded", "templates"]
    if not all(source.startswith("list:") for source in kept.source):
        secret.append("retain")
    return values, tuple(sorted(secret))
