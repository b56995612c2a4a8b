"""`erase`: the one entry point through which every method makes an erasure."""

import os
from collections.abc import Sequence
from typing import Any

from .artifact import Erasure
from .encoding import one_fit
from .errors import ErasureInputError
from .lists import expand, retained
from .logging import get_logger
from .methods import get_method, make_config
from .pipeline import erasures_disabled
from .schema import Concept


logger = get_logger(__name__)

Texts = str | Sequence[str]


def erase(
    pipe: Any,
    targets: "Texts | os.PathLike[str]",
    *,
    anchors: Texts | None = None,
    retain: "Texts | os.PathLike[str] | None" = None,
    method: str = "uce",
    **settings: Any,
) -> Erasure:
    """Make an erasure of one or more concepts.

    The pipeline is only read: nothing is attached, and erasures that are loaded into it are off meanwhile.

    Args:
        pipe ([`DiffusionPipeline`]): the base model.
        targets (`str`, sequence of `str`, or `os.PathLike`): the concepts to remove, or the path of a list of them.
        anchors (`str` or sequence of `str`, *optional*): what they are mapped to: one for all, or one for each. The
            method's own choice by default.
        retain (`str`, sequence of `str`, or `os.PathLike`, *optional*): what must not change: prompts, paths of lists
            (see [`read_prompts`]), and names of the lists that the library ships (`"list:artists"`, see
            [`list_names`]). Entries of lists that name a target as whole words are left out.
        method (`str`, *optional*, defaults to `"uce"`): one of `diffusers-erasure methods`.
        settings: the method's own settings.

    Returns:
        [`Erasure`]: to be loaded with `pipe.load_erasure(erasure)`, saved with `erasure.save_pretrained(dir)`.

    Raises:
        ErasureInputError: an empty target, a target equal to its anchor or among the retained prompts, a prompt longer
            than the encoder, an unknown method or setting, or a setting out of range.
        ErasureCompatibilityError: the method does not support this base model.

    Examples:

    ```py
    >>> from diffusers_erasure import erase
    >>> erasure = erase(pipe, ["Van Gogh", "Monet"], anchors="art", retain="artists.csv")
    >>> pipe.load_erasure(erasure)
    ```
    """
    entry = get_method(method)
    names = expand(targets, "targets")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ErasureInputError(f"`targets` names {twice[0]!r} twice.")
    if anchors is not None:
        mapped = expand(anchors, "anchors", allow_empty=True)
        mapped = mapped * len(names) if len(mapped) == 1 else mapped
        if len(mapped) != len(names):
            raise ErasureInputError(
                f"There are {len(names)} targets and {len(mapped)} anchors; give one, or one each."
            )
        concepts = tuple(Concept(target, anchor) for target, anchor in zip(names, mapped, strict=True))
    else:
        concepts = tuple(Concept(target) for target in names)
    for concept in concepts:
        if concept.anchor is not None and _same(concept.target, concept.anchor):
            raise ErasureInputError(f"The target {concept.target!r} is its own anchor, so nothing would be erased.")
    if retain is not None:
        settings["retain"] = retained(retain, names)
    config = make_config(entry, settings)
    with erasures_disabled(pipe), one_fit():
        erasure = entry.fit(pipe, concepts, config)
    assert isinstance(erasure, Erasure)
    logger.info("Made an erasure of %d concepts by %s.", len(concepts), method)
    return erasure


def _same(a: str | None, b: str | None) -> bool:
    return " ".join((a or "").split()).casefold() == " ".join((b or "").split()).casefold()
