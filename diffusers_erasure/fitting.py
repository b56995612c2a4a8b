"""`erase`: the one entry point through which every method makes an erasure."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .artifact import Erasure
from .errors import ErasureInputError
from .logging import get_logger
from .methods import get_method, make_config
from .pipeline import erasures_disabled
from .schema import Concept


logger = get_logger(__name__)

Texts = str | Sequence[str]


def erase(
    pipe: Any,
    targets: Texts,
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
        targets (`str` or sequence of `str`): the concepts to remove.
        anchors (`str` or sequence of `str`, *optional*): what they are mapped to: one for all, or one for each. The
            method's own choice by default.
        retain (`str`, sequence of `str`, or `os.PathLike`, *optional*): prompts that must not change, or the path of a
            file with them (see [`read_prompts`]).
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
    names = _texts(targets, "targets")
    if anchors is not None:
        mapped = _texts(anchors, "anchors", allow_empty=True)
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
        kept = _retained(retain)
        for name in names:
            if any(_same(name, prompt) for prompt in kept):
                raise ErasureInputError(
                    f"{name!r} is both a target and a prompt to retain; take it out of one of them."
                )
        settings["retain"] = tuple(kept)
    config = make_config(entry, settings)
    with erasures_disabled(pipe):
        erasure = entry.fit(pipe, concepts, config)
    assert isinstance(erasure, Erasure)
    logger.info("Made an erasure of %d concepts by %s.", len(concepts), method)
    return erasure


def _texts(value: Any, what: str, allow_empty: bool = False) -> list[str]:
    listed = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    if not listed:
        raise ErasureInputError(f"`{what}` is empty; give at least one.")
    for text in listed:
        if not isinstance(text, str):
            raise ErasureInputError(f"`{what}` must be a string or a list of strings, not {text!r}.")
        if not text.strip() and not allow_empty:
            raise ErasureInputError(f"`{what}` has an empty entry.")
    twice = sorted({text for text in listed if listed.count(text) > 1}) if what == "targets" else []
    if twice:
        raise ErasureInputError(f"`{what}` names {twice[0]!r} twice.")
    return listed


def _same(a: str | None, b: str | None) -> bool:
    return " ".join((a or "").split()).casefold() == " ".join((b or "").split()).casefold()


def _retained(value: "Texts | os.PathLike[str]") -> list[str]:
    if isinstance(value, os.PathLike):
        return read_prompts(value)
    if isinstance(value, str) and value.partition("#")[0].endswith((".txt", ".csv", ".tsv")):
        return read_prompts(value)
    return _texts(value, "retain")


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompts from a file: one a line, or a column of a CSV file.

    Args:
        path (`str` or `os.PathLike`): a text file, where empty lines and lines that start with `#` are left out; or a
            `.csv` or `.tsv` file with a header. Its column is given behind a `#` (`"list.csv#name"`), and is otherwise
            one named `concept`, `artist`, `prompt` or `text`, or the only one.

    Returns:
        `list` of `str`: the prompts in order, each once.

    Raises:
        ErasureInputError: the file cannot be read, has no such column, or no prompts.
    """
    name, _, column = os.fspath(path).partition("#")
    file = Path(name)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ErasureInputError(f"The list {file} cannot be read: {error}") from error
    if file.suffix in (".csv", ".tsv"):
        rows = csv.DictReader(text.splitlines(), delimiter="\t" if file.suffix == ".tsv" else ",")
        fields = list(rows.fieldnames or [])
        usual = [field for field in ("concept", "artist", "prompt", "text") if field in fields]
        column = column or (usual[0] if usual else fields[0] if len(fields) == 1 else "")
        if column not in fields:
            raise ErasureInputError(
                f"{file} has the columns {fields}; name one, as in {file.name}#{'/'.join(fields)[:40]}."
            )
        lines = [(row[column] or "").strip() for row in rows]
    else:
        lines = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise ErasureInputError(f"The list {file} has no prompts.")
    dropped = len(lines) - len(prompts)
    if dropped:
        logger.warning("%s: %d empty or repeated entries were left out.", file, dropped)
    return prompts
