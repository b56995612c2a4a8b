"""What is retained where nothing, or little, was given: the shipped lists of the kind of concept that is erased."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ErasureInputError
from ..logging import get_logger
from . import SHIPPED, Retained, _each_once, _plain_words, names_any, read_list


logger = get_logger(__name__)

LITTLE = 32  # fewer prompts than these are little
AUTO, NONE = "auto", "none"
# By the kind of concept, the lists of what may go with it, and of what should stay whatever goes.
LISTS: dict[str, tuple[str, ...]] = {
    "object": ("list:things",),
    "style": ("list:styles", "list:artists", "list:things"),
    "person": ("list:public_figures", "list:things"),
}
# Presets and sets of templates that say what kind of concept it is; those for objects are what stands where none is given.
TOLD = {
    **dict.fromkeys(("style", "artist", "style_context"), "style"),
    **dict.fromkeys(("person", "celebrity"), "person"),
}
MOST_LOOKED_UP = 20  # targets that are looked up to tell their kind


def task_of(targets: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The kind of concept: `"object"`, `"style"` or `"person"`.

    A preset or templates that are made for styles or people tell it. Else it is a style where each target is in `list:styles` or
    `list:artists`, a person where each is in `list:public_figures`, both by whole name or by its last words; and else an
    object.

    Args:
        targets (sequence of `str`): what is erased.
        settings (mapping): what the method is told.
    """
    for key in ("preset", "templates"):
        if isinstance(settings.get(key), str) and settings[key] in TOLD:
            return TOLD[settings[key]]
    looked_up = [_plain_words(target) for target in targets[:MOST_LOOKED_UP]]
    things = {_plain_words(entry) for name in ("things", "objects") for entry in read_list(name)}
    for task, names in (("style", ("styles", "artists")), ("person", ("public_figures",))):
        entries = [_plain_words(entry) for name in names for entry in read_list(name)]
        ends = {words[i:] for words in entries for i in range(len(words))}
        if all(words in ends and words not in things for words in looked_up):
            return task
    return "object"


def lists_for(wanted: str | Sequence[str], given: int, task: str) -> tuple[str, ...]:
    """Names of the lists to retain besides.

    Args:
        wanted (`str` or sequence of `str`): `"auto"` for those of the task where fewer than 32 prompts are given, `"none"`,
            a task, or names of shipped lists.
        given (`int`): how many prompts are given.
        task (`str`): from [`task_of`].

    Raises:
        ErasureInputError: it is none of these.
    """
    if wanted == AUTO:
        return LISTS[task] if given < LITTLE else ()
    if wanted == NONE:
        return ()
    if isinstance(wanted, str) and wanted in LISTS:
        return LISTS[wanted]
    names = list(wanted) if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
    for name in names:
        if not isinstance(name, str) or not name.startswith(SHIPPED):
            raise ErasureInputError(
                f"`retain_default` must be {AUTO!r}, {NONE!r}, one of {sorted(LISTS)} or names of shipped lists "
                f"({SHIPPED}NAME), not {name!r}."
            )
        read_list(name)
    return tuple(dict.fromkeys(names))


def with_lists(given: Retained | None, lists: Sequence[str], named: Sequence[str]) -> Retained:
    """What is given, and the entries of some lists.

    Args:
        given ([`Retained`], *optional*): what the user gave.
        lists (sequence of `str`): from [`lists_for`].
        named (sequence of `str`): targets and anchors; entries that hold one as whole words are left out.
    """
    own = given or Retained((), (), ())
    if not lists:
        return own
    there = set(own.prompts)
    entries = _each_once(entry for name in lists for entry in read_list(name))
    names = [name for name in named if name.strip()]
    held = tuple(entry for entry in entries if entry not in there and not names_any(entry, names))
    logger.info("Retained by default: %s (%d entries); `retain=()` retains nothing.", ", ".join(lists), len(held))
    return dataclasses.replace(own, default=tuple(lists), held=held)
