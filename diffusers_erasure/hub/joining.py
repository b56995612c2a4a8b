"""Bringing two cards together: the one in a folder and the one on the Hub, with what was edited on either side."""

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cards import ParsedCard, compose, is_edited, joined_tags, parse_card, render_card
from ..errors import ErasureError, ErasureInputError
from ..logging import get_logger
from ..schema import CARD_FILE, CONFIG_FILE, GRID_FILE, MAX_CONFIG_BYTES, ErasureConfig
from ..storage import read_inside
from ..tensors import sha256
from .beside import RECORD_FILE, Beside, FolderOrigin, Record, Sight, beside_of
from .options import Side


if TYPE_CHECKING:
    from ..artifact import Erasure

logger = get_logger(__name__)


def check_side(card: str | None) -> None:
    """Raise `ErasureInputError` for what is no side."""
    if card not in (None, "local", "hub"):
        raise ErasureInputError(f'`card` must be "local" or "hub", or be left out, not {card!r}.')


@dataclass(frozen=True)
class Joined:
    """What comes of two cards.

    Attributes:
        card: the text.
        pictures: those of both sides.
        text_of: the side whose text, written by hand, holds.
        seen: what the local side knows of them: its own part, and for the rest what its record had seen of the Hub before.
    """

    card: str
    pictures: dict[str, bytes]
    text_of: Side | None
    seen: Sight


def join(fresh: str, local: Beside, hub: Beside, *, card: Side | None = None) -> Joined:
    """Bring the cards and pictures of two sides together.

    Where one side alone was edited, that side holds. What both have changed differently is a conflict. Which side was
    changed is told by the local record of the last pull or push where there is one, else by the cards' seals.

    Args:
        fresh (`str`): the erasure's card as it is rendered.
        local ([`Beside`]): the folder's.
        hub ([`Beside`]): the repository's.
        card (`"local"` or `"hub"`, *optional*): the side that holds wherever they differ.

    Raises:
        ErasureInputError: a conflict; or a card cannot be read.
    """
    choice = _Choice(local, hub, card)
    new = parse_card(fresh)
    mine, theirs = _parsed(local), _parsed(hub)
    sides = [side for side in (theirs, mine) if side is not None]
    before = [_seen(sight) for sight in (choice.then_local, choice.then_hub)]

    written = choice.of_text(mine, theirs, *before)
    source = next((side for side in sides if written is not None and side.written == written), None)
    text = new.text if source is None else source.text

    foreign = [
        ({}, []) if side is None else (side.foreign(new), side.foreign_tags) for side in (mine, theirs, *before)
    ]
    data: dict[str, Any] = {}
    for key in dict.fromkeys(key for found, _ in (foreign[1], foreign[0]) for key in found):
        value = choice.of(f"`{key}` of the metadata", *(found.get(key) for found, _ in foreign))
        if value is not None:
            data[key] = value
    others = dict.fromkeys(tag for _, found in (foreign[1], foreign[0]) for tag in found)
    tags = [tag for tag in others if choice.of(f"tag {tag}", *(tag in found or None for _, found in foreign))]

    pictures = {}
    for name in sorted({*local.pictures, *hub.pictures}):
        pair = [beside.pictures.get(name) for beside in (local, hub)]
        now = [None if content is None else sha256(content) for content in pair]
        then = [sight.pictures.get(name) if sight else None for sight in (choice.then_local, choice.then_hub)]
        # A picture is never taken away: one that is on one side alone holds.
        digest = next((d for d in now if d), None) if None in now else choice.of(f"picture {name}", *now, *then)
        pictures[name] = next((c for c, d in zip(pair, now, strict=True) if c is not None and d == digest), b"")
    choice.check()
    whole = compose([*sides, new], {**data, **new.data, "tags": joined_tags(new, tags)}, text)
    holder: Side = "local" if mine is not None and mine.written == written else "hub"
    digests = choice.then_hub.pictures if choice.then_hub else {}
    digests = {name: digest for name, digest in digests.items() if name in pictures}
    digests |= {name: sha256(content) for name, content in pictures.items() if content == local.pictures.get(name)}
    seen = Sight(_seen_card(new, parse_card(whole), mine, before[1]), digests)
    return Joined(whole, pictures, None if source is None else holder, seen)


def _seen_card(new: ParsedCard, joined: ParsedCard, mine: ParsedCard | None, then: ParsedCard | None) -> str:
    """What a folder knows of a joined card: where that has the Hub's words, those that the folder had seen before."""

    def known(now: Any, here: Any, before: Any) -> Any:
        return now if now == here else before

    sides = (joined, mine, then)
    found = [{} if side is None else side.foreign(new) for side in sides]
    data = {key: known(*(values.get(key) for values in found)) for key in {k: 0 for values in found for k in values}}
    tags = [[] if side is None else side.foreign_tags for side in sides]
    others = [tag for tag in dict.fromkeys(sum(tags, [])) if known(*(tag in values for values in tags))]
    written = joined.written == (None if mine is None else mine.written)
    text = joined.text if written else (then or new).text
    data = {key: value for key, value in data.items() if value is not None}
    return compose([joined, new], {**data, **new.data, "tags": joined_tags(new, others)}, text)


class _Choice:
    """Which of two values holds, and what could not be decided."""

    def __init__(self, local: Beside, hub: Beside, card: Side | None) -> None:
        self.local, self.hub, self.card = local, hub, card
        record = local.record if local.card is not None and hub.card is not None else None
        self.then_local = record.local if record else None
        self.then_hub = record.hub if record else None
        self.same_place = record is not None and record.place == hub.place
        self.conflicts: list[str] = []

    def of(self, what: str, local: Any, hub: Any, local_then: Any, hub_then: Any) -> Any:
        """One of two values, `None` standing for absence."""
        if self.card is not None and local is not None and hub is not None:
            return local if self.card == "local" else hub
        if local == hub:
            return local
        if self.same_place and local == local_then:
            return hub
        if self.then_hub is not None and hub == hub_then:
            return local
        if local is None or hub is None:
            return hub if local is None else local
        self.conflicts.append(what)
        return local

    def of_text(
        self,
        local: ParsedCard | None,
        hub: ParsedCard | None,
        local_then: ParsedCard | None,
        hub_then: ParsedCard | None,
    ) -> str | None:
        """The text that was written by hand and holds; `None` for the one that is rendered."""
        if self.card is not None and local is not None and hub is not None:
            return local.written if self.card == "local" else hub.written
        written = [None if side is None else side.written for side in (local, hub, local_then, hub_then)]
        return self.of("the text", *written)

    def check(self) -> None:
        """Raise where something could not be decided."""
        if self.conflicts:
            named = ", ".join(self.conflicts[:5]) + (", …" if len(self.conflicts) > 5 else "")
            raise ErasureInputError(
                f"The {CARD_FILE} or the pictures of {self.local.where} and of {self.hub.where} were both edited, and "
                f'differ in {named}. Nothing was changed. Choose with `card="local"` ({self.local.where}) or '
                f'`card="hub"` ({self.hub.where}), on the command line with `--card`; or bring them together by hand.'
            )


def _parsed(side: Beside) -> ParsedCard | None:
    return None if side.card is None else parse_card(side.card)


def _seen(sight: Sight | None) -> ParsedCard | None:
    try:
        return None if sight is None or sight.card is None else parse_card(sight.card)
    except ValueError:  # it was written by this library, but may have been changed since
        return None


def beside_files(
    config: ErasureConfig, own: Beside, folder: Path, *, card: Side | None = None, redacts: bool = False
) -> dict[str, bytes]:
    """The card, the pictures and the record that go into a folder with an erasure.

    Args:
        config ([`ErasureConfig`]): the erasure's configuration as it is saved.
        own ([`Beside`]): what lay beside the erasure where it was read from.
        folder (`Path`): the folder; what lies there already is kept where it was edited by hand.
        card (`"local"` or `"hub"`, *optional*): at a conflict, the folder's or the erasure's own.
        redacts (`bool`, *optional*, defaults to `False`): the concepts' names are being left out.

    Raises:
        ErasureInputError: a conflict; or a card edited by hand lies where a redacted erasure is to be saved.
    """
    there = FolderOrigin(folder).beside()
    record = there.record
    if redacts:
        check_nothing_tells(folder)
        own = own.withheld()
        there = Beside(None if own.folder == there.folder else there.withheld().card, where=there.where)
        record = None
    if own.problem is not None:
        logger.warning("The card of %s is left out: %s", own.where, own.problem[:300])
    related = own.folder == there.folder or (own.repo_id is not None and own.repo_id == there.repo_id)
    replaced = not related and _holds_another(folder, config)
    shown = {*own.pictures, *({} if replaced else there.pictures)}
    fresh = render_card(config, own.repo_id or there.repo_id, grid=GRID_FILE in shown)
    if there.problem is not None:
        logger.warning("The %s of %s stays as it is: %s", CARD_FILE, folder, there.problem[:300])
        return {}
    joined = join(fresh, there, own, card=card)
    if joined.text_of is not None:
        source = there if joined.text_of == "local" else own
        level = logging.WARNING if replaced and joined.text_of == "local" else logging.INFO
        check = " It was written for the erasure that lay there before: check it." if level == logging.WARNING else ""
        logger.log(level, "The text of the card of %s was edited by hand and is kept.%s", source.where, check)
    if replaced and there.pictures:
        logger.warning(
            "%s in %s show the erasure that lay there before. They stay, and a push takes them along: replace or delete them.",
            ", ".join(sorted(there.pictures)),
            folder,
        )
    if own.place is not None and own.card is not None:
        record = Record(own.place, own.sight(), own.sight())
    elif own.record is not None:
        record = own.record
    files = {CARD_FILE: joined.card.encode(), **joined.pictures}
    return files if record is None else {**files, RECORD_FILE: record.to_bytes()}


def check_nothing_tells(folder: Path) -> None:
    """See that nothing written by hand lies in a folder to which a redacted erasure is to be saved.

    Raises:
        ErasureInputError: there is a card edited by hand, or a picture.
    """
    there = FolderOrigin(folder).beside()
    if there.problem is not None or there.pictures or (there.card is not None and is_edited(there.card)):
        raise ErasureInputError(
            f"The {CARD_FILE} in {folder} was edited by hand, or pictures lie there: they may name what is to be left "
            "out. Nothing was saved. Save to another folder, or move them away first."
        )


def _holds_another(folder: Path, config: ErasureConfig) -> bool:
    """Whether a folder holds an erasure that is not this one; in another dtype it is the same."""
    try:
        old = ErasureConfig.from_json(read_inside(folder.expanduser().resolve(), CONFIG_FILE, MAX_CONFIG_BYTES))
    except ErasureError:  # none, or one that cannot be read
        return os.path.lexists(folder.expanduser() / CONFIG_FILE)
    if old.files == config.files:
        return False
    same = dataclasses.replace(old, files=config.files, library=config.library, stock=config.stock)
    return same != config


def pushed_card(erasure: "Erasure", repo_id: str | None = None, *, redact_concepts: bool = False) -> str:
    """The card that a push writes into a repository without one.

    Args:
        erasure ([`Erasure`]): the erasure.
        repo_id (`str`, *optional*): the repository; by default the one that it was last pulled from or pushed to.
        redact_concepts (`bool`, *optional*, defaults to `False`): leave out the concepts' names.

    Raises:
        ErasureInputError: the card that lies beside the erasure cannot be read.
        ErasureHubError: it is on the Hub, which did not answer.
    """
    own = beside_of(erasure.origin, strict=True)
    if redact_concepts and not erasure.config.redacted:
        erasure, own = erasure.redacted(), own.withheld()
    fresh = render_card(erasure.config, repo_id or own.repo_id, grid=GRID_FILE in own.pictures)
    return join(fresh, own.checked(), Beside()).card
