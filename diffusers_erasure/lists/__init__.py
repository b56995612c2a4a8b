"""Lists of targets and of prompts to retain: from files, from the lists that the library ships, or given in place."""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ErasureInputError
from ..logging import get_logger


logger = get_logger(__name__)

SHIPPED = "list:"  # what a shipped list's name is written with: "list:artists"
SUFFIXES = (".txt", ".csv", ".tsv")
USUAL_COLUMNS = ("concept", "artist", "prompt", "text")


def list_names() -> list[str]:
    """Names of the lists that the library ships: `"artists"`, `"characters"`, `"objects"`, `"public_figures"`, `"styles"`, `"things"`."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".txt") for file in files if file.name.endswith(".txt"))


def read_list(name: str) -> list[str]:
    """Read a list that the library ships.

    Args:
        name (`str`): one of [`list_names`], with or without `"list:"` before it.

    Raises:
        ErasureInputError: there is no such list.
    """
    bare = name.removeprefix(SHIPPED)
    if bare not in list_names():
        raise ErasureInputError(
            f"There is no list {bare!r}; the library ships {', '.join(SHIPPED + each for each in list_names())}. "
            "A list of your own is given by the path of a .txt, .csv or .tsv file."
        )
    text = resources.files(__name__).joinpath(f"{bare}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompts from a file: one a line, or a column of a CSV file.

    Args:
        path (`str` or `os.PathLike`): a text file, where empty lines and lines that start with `#` are left out; or a
            `.csv` or `.tsv` file with a header. Its column is given behind a `#` (`"list.csv#name"`), and is otherwise
            one named `concept`, `artist`, `prompt` or `text`, or the only one.

    Returns:
        `list` of `str`: the prompts in order, each once. How many entries were empty or repeated is logged.

    Raises:
        ErasureInputError: the file cannot be read, has no such column, no prompts, or names another list.
    """
    name, column = _column_of(os.fspath(path))
    file = Path(name)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ErasureInputError(f"The list {file} cannot be read: {error}") from error
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
        try:
            rows, fields = list(reader), list(reader.fieldnames or [])
        except csv.Error as error:  # such as a field that never ends
            raise ErasureInputError(f"The list {file} cannot be read: {error}") from error
        usual = [field for field in USUAL_COLUMNS if field in fields]
        column = column or (usual[0] if usual else fields[0] if len(fields) == 1 else "")
        if column not in fields:
            raise ErasureInputError(
                f"{file} has the columns {fields}; name one, as in {file.name}#{'/'.join(fields)[:40]}."
            )
        lines = [(row[column] or "").strip() for row in rows]
    else:
        lines = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    prompts = _each_once(lines)
    if not prompts:
        raise ErasureInputError(f"The list {file} has no prompts.")
    for prompt in prompts:
        if is_list(prompt):  # an artefact that records it as a prompt would read it as a list later
            raise ErasureInputError(
                f"The list {file} holds the name of a list, {prompt[:80]!r}; give it beside this one."
            )
    empty = lines.count("")
    repeated = len(lines) - empty - len(prompts)
    if empty or repeated:
        logger.warning("%s: left out %d empty and %d repeated entries.", file, empty, repeated)
    return prompts


def is_list(text: Any) -> bool:
    """Whether a string (or path) names a list rather than being a prompt itself."""
    return isinstance(text, os.PathLike) or (
        isinstance(text, str) and (text.startswith(SHIPPED) or _column_of(text)[0].lower().endswith(SUFFIXES))
    )


def _column_of(path: str) -> tuple[str, str]:
    """Split `"list.csv#name"`; a `#` elsewhere belongs to the path, as in `"C#/list.txt"`."""
    found = re.fullmatch(r"(.*\.(?:txt|csv|tsv))#(.*)", path, re.DOTALL | re.IGNORECASE)
    return (found[1], found[2]) if found and not path.lower().endswith(SUFFIXES) else (path, "")


def expand(value: Any, what: str, *, allow_empty: bool = False) -> list[str]:
    """Turn what a user gives for targets, anchors or prompts into texts, with lists read in their place.

    Args:
        value (`str`, `os.PathLike`, or sequence of them): texts, paths of files, names of shipped lists.
        what (`str`): name of the argument, for messages.
        allow_empty (`bool`, *optional*, defaults to `False`): let empty texts through.

    Raises:
        ErasureInputError: nothing, no text, or an empty one; an unknown list; a file that cannot be read.
    """
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not given:
        raise ErasureInputError(f"`{what}` is empty; give at least one.")
    texts: list[str] = []
    for text in given:
        if is_list(text):
            texts += read_list(text) if isinstance(text, str) and text.startswith(SHIPPED) else read_prompts(text)
        elif not isinstance(text, str):
            raise ErasureInputError(f"`{what}` must be a string or a list of strings, not {text!r}.")
        elif not text.strip() and not allow_empty:
            raise ErasureInputError(f"`{what}` has an empty entry.")
        else:
            texts.append(text)
    return texts


@dataclass(frozen=True)
class Retained:
    """Prompts that must not change.

    Attributes:
        prompts: each once, in order, without those that name a target.
        source: what the user gave, as far as a later run could read it again: shipped lists by name, all else as prompts,
            without those of files that were left out: given in place, they would be kept.
        excluded: the prompts that were left out, because they name a target.
        default: names of the lists that are retained besides, because little was given; see [`lists.defaults`].
        held: their entries, without those that name a target or an anchor, each once; none of them is in `prompts`.
    """

    prompts: tuple[str, ...]
    source: tuple[str, ...]
    excluded: tuple[str, ...]
    default: tuple[str, ...] = ()
    held: tuple[str, ...] = ()


def retained(value: Any, targets: Sequence[str]) -> Retained:
    """Read what is to be retained, without the entries of lists that name a target as whole words.

    Args:
        value (`str`, `os.PathLike`, or sequence of them): prompts, paths of files, `"list:NAME"` of shipped lists.
        targets (sequence of `str`): the concepts that are removed.

    Raises:
        ErasureInputError: a prompt that was given in place is a target; nothing is left; or as [`expand`].
    """
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not given:
        raise ErasureInputError("`retain` is empty; give at least one, or leave it out.")
    prompts: list[str] = []
    source: list[str] = []
    in_place: set[str] = set()
    for item in given:
        texts = expand([item], "retain")
        if not is_list(item):
            in_place.update(texts)
            for name in targets:
                if _same(name, texts[0]):
                    raise ErasureInputError(
                        f"{name!r} is both a target and a prompt to retain; take it out of one of them."
                    )
        prompts += texts
        source += [item] if isinstance(item, str) and item.startswith(SHIPPED) else texts
    unique = _each_once(prompts)
    excluded = [prompt for prompt in unique if prompt not in in_place and names_any(prompt, targets)]
    gone = set(excluded)
    kept = [prompt for prompt in unique if prompt not in gone]
    source = [item for item in source if item not in gone]
    if excluded:
        shown = ", ".join(repr(prompt) for prompt in excluded[:5]) + (", …" if len(excluded) > 5 else "")
        logger.info("%d prompts are not retained, because they name a target: %s", len(excluded), shown)
    if not kept:
        raise ErasureInputError(
            "No prompt to retain is left: all of them name a target. Give other prompts, or leave `retain` out."
        )
    return Retained(tuple(kept), tuple(_each_once(source)), tuple(excluded))


def names_any(prompt: str, targets: Iterable[str]) -> bool:
    """Whether a prompt holds one of the targets as whole words, in order, whatever the case and with accents or without."""
    words = _plain_words(prompt)
    for target in targets:
        wanted = _plain_words(target)
        n = len(wanted)
        if any(words[i : i + n] == wanted for i in range(len(words) - n + 1)) if n else _has_sign(prompt, target):
            return True
    return False


@lru_cache(maxsize=1 << 16)  # of every target for every prompt of a list
def _plain_words(text: str) -> tuple[str, ...]:
    return tuple(_words(_without_accents(text)))


def _has_sign(prompt: str, target: str) -> bool:
    """The same for a target without any word, such as an emoji."""
    sign = "".join(target.split())
    return bool(sign) and sign in "".join(prompt.split())


def _same(name: str, prompt: str) -> bool:
    words = _words(name)
    return words == _words(prompt) if words else "".join(name.split()) == "".join(prompt.split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _without_accents(text: str) -> str:
    """Who erases "Salvador Dali" means the one whom a list calls "Salvador Dalí"."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))


def _each_once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))
