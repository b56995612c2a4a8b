"""What lies beside an erasure for people: its card and the pictures that the card shows, read without trust or harm."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..cards import check_card, is_edited, licence_of
from ..errors import ErasureError, ErasureFileError, ErasureInputError
from ..logging import get_logger
from ..schema import CARD_FILE, GRID_FILE
from ..storage import in_hub_cache, read_inside, write_file
from ..tensors import sha256


logger = get_logger(__name__)

RECORD_FILE = ".erasure_hub.json"
MAX_CARD_BYTES = 1024 * 1024
MAX_PICTURE_BYTES = 8 * 1024 * 1024
MAX_PICTURES = 16
_MAX_RECORD_BYTES = 4 * MAX_CARD_BYTES

_NAME = r"(?:\./)?([A-Za-z0-9_][\w.-]{0,99}\.(?:png|jpe?g|webp))"
# A Markdown link or image, the target of a reference, and an attribute of HTML; a name with a slash is none of ours.
_LINKS = re.compile(
    rf"(?:\]\(\s*<?|\]:\s*<?|\b(?:src|href)\s*=\s*[\"']?){_NAME}(?=[\s)>\"'])", re.ASCII | re.IGNORECASE
)


@dataclass(frozen=True)
class Sight:
    """A card as it once was, and the SHA-256 of the pictures beside it."""

    card: str | None
    pictures: dict[str, str]


@dataclass(frozen=True)
class Record:
    """How folder and repository were when they were last brought together, by a pull or a push.

    By it a later one sees which side was edited since. It lies in the folder and is never published.
    """

    place: str
    local: Sight
    hub: Sight

    def to_bytes(self) -> bytes:
        """Write it as JSON."""
        return (json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Record | None":
        """Read it; `None` where it is none: then a card that was edited on both sides is a conflict."""
        try:
            raw = json.loads(data)
            sights = [Sight(_text(raw[side]["card"]), _hashes(raw[side]["pictures"])) for side in ("local", "hub")]
            return cls(str(raw["place"]), *sights)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def _text(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError
    return value


def _hashes(value: Any) -> dict[str, str]:
    return {str(name): str(digest) for name, digest in value.items()}


@dataclass(frozen=True)
class Beside:
    """A card and pictures.

    Attributes:
        card: the card's text.
        pictures: PNG, JPEG and WebP files to which the card refers by their names alone, and `before_after.png`.
        where: the folder or repository, for messages.
        place: `user/no-cat@main` where it lies on the Hub.
        record: what a folder keeps of its last pull or push.
        folder: the folder.
        problem: why there is no `card` though there is such a file.
    """

    card: str | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    where: str = "here"
    place: str | None = None
    record: Record | None = None
    folder: Path | None = None
    problem: str | None = None

    @property
    def repo_id(self) -> str | None:
        """The repository where it lies, or where it was last pulled from or pushed to."""
        place = self.place or (self.record.place if self.record else None)
        return None if place is None else place.partition("@")[0]

    def sight(self) -> Sight:
        """What a record keeps of it."""
        return Sight(self.card, {name: sha256(data) for name, data in sorted(self.pictures.items())})

    def beside(self, strict: bool = False) -> "Beside":
        """Return itself: as an erasure's origin it has been read already."""
        return self

    def checked(self) -> "Beside":
        """Return it where its card can be read.

        Raises:
            ErasureInputError: there is a card that cannot be.
        """
        if self.problem is not None:
            raise ErasureInputError(
                f"The {CARD_FILE} of {self.where} cannot be kept: {self.problem[:300]}. Correct or delete it, and try again."
            )
        return self

    def withheld(self) -> "Beside":
        """Return what may go with a redacted erasure: what was written by hand and pictures may name the concepts."""
        if self.pictures or self.problem or (self.card is not None and is_edited(self.card)):
            logger.warning(
                "The card of %s was edited by hand, or has pictures: both may name what is left out, so they are left out "
                "too, with the metadata but the licence. Write what the redacted erasure's card should say into it.",
                self.where,
            )
        licence = None if self.card is None else licence_of(self.card)
        card = None if licence is None else f"---\nlicense: {licence}\n---\n"
        return Beside(card, where=self.where, place=self.place, folder=self.folder)


class Origin(Protocol):
    """Where an erasure was read from. What lies beside it is read when it is needed, not when the erasure is loaded."""

    def beside(self, strict: bool = False) -> Beside:
        """Read it. `strict` raises where the Hub did not answer, which otherwise is a warning."""
        ...


@dataclass(frozen=True)
class FolderOrigin:
    """A local folder."""

    folder: Path

    def beside(self, strict: bool = False) -> Beside:
        """Read it; odd files are left out with a warning."""
        place = self.folder.expanduser().resolve()

        def read(name: str, limit: int) -> bytes | None:
            return read_inside(place, name, limit) if os.path.lexists(place / name) else None

        found = read_beside(read, str(self.folder))
        record = None
        try:
            data = read(RECORD_FILE, _MAX_RECORD_BYTES)
            record = None if data is None else Record.from_bytes(data)
        except ErasureFileError as error:
            logger.warning("%s", error)
        return dataclasses.replace(found, folder=place, record=record)


@dataclass(frozen=True)
class Withheld:
    """Where the original of a redacted copy was read from, if anywhere: what was written there may name the concepts."""

    original: Origin | None

    def beside(self, strict: bool = False) -> Beside:
        """Read it, and leave that out."""
        return beside_of(self.original, strict).withheld()


def read_beside(read: Callable[[str, int], bytes | None], where: str, names: Iterable[str] | None = None) -> Beside:
    """Read a card and its pictures.

    Args:
        read: gives a file of a name, of at most so many bytes, or `None` where there is none.
        where (`str`): the folder or repository, for messages.
        names (iterable of `str`, *optional*): the pictures, by default those to which the card refers.
    """
    card, problem = None, None
    try:
        data = read(CARD_FILE, MAX_CARD_BYTES)
        if data is not None:
            card = data.decode("utf-8-sig")
            check_card(card)
    except (ErasureFileError, ValueError) as error:
        card, problem = None, str(error)
    wanted = linked_pictures(card or "") if names is None else list(names)
    if len(wanted) > MAX_PICTURES:
        logger.warning("The card of %s refers to %d pictures; %d are taken.", where, len(wanted), MAX_PICTURES)
    pictures = {}
    for name in wanted[:MAX_PICTURES]:
        try:
            content = read(name, MAX_PICTURE_BYTES)
            if content is not None and not is_picture(content):
                raise ErasureFileError(f"{name} of {where} is no PNG, JPEG or WebP file")
        except ErasureFileError as error:
            logger.warning("A picture of the card is left out: %s", error)
            continue
        if content is not None:
            pictures[name] = content
    return Beside(card, pictures, where, problem=problem)


def linked_pictures(card: str) -> list[str]:
    """Names of the pictures beside a card: `before_after.png`, and those to which it refers by a name without a path."""
    return list(dict.fromkeys([GRID_FILE, *(found[1] for found in _LINKS.finditer(card))]))


def is_picture(data: bytes) -> bool:
    """Whether it starts as a PNG, JPEG or WebP file does."""
    return data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def keep_record(folder: Path, record: Record) -> None:
    """Write a folder's record, whole or not at all. One that cannot be written is only missed at a later conflict."""
    if in_hub_cache(folder):
        return
    try:
        write_file(folder / RECORD_FILE, record.to_bytes())
    except OSError as error:
        logger.debug("%s could not be written: %s", folder / RECORD_FILE, error)


def beside_of(origin: Origin | None, strict: bool = False) -> Beside:
    """What lies beside an erasure, and nothing where it was not read from anywhere.

    Raises:
        ErasureError: the Hub did not answer, and `strict`.
    """
    try:
        return Beside() if origin is None else origin.beside(strict)
    except ErasureError as error:
        if strict:
            raise
        logger.warning("The card could not be read, so that a fresh one is written: %s", error)
        return Beside()
