"""Automatic anchors: for each target the nearest thing of its kind that does not hold it.

Candidates are the shipped list of the kind of concept and what the user retains. Left out are all targets, what names one, what means
the same as one, and words for a whole kind ("animal"), which hold everything of it. The nearest is the one with the highest cosine of
text rows less the candidates' mean; among those that are a target's kind of thing ([`kinds`]), as far as that is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..encoding import check_prompts, row_sources, short_enough
from ..errors import ErasureInputError
from ..lists import _plain_words, names_any, read_list
from ..lists.kinds import are_the_same, is_broad, kind_of, wider_kinds
from ..lists.names import bare
from ..logging import get_logger
from ..methods.holding import SAME
from .pickers import ClipPicker, Picker
from .pictures import IMAGES, Pictures, checked_share


__all__ = ["AUTO", "RECORDED", "ClipPicker", "Picked", "Picker", "pick_anchors"]

logger = get_logger(__name__)

AUTO = "auto"
RECORDED = "anchors_picked"  # among the settings that an artefact records
# By the kind of concept: where candidates come from, and the prompt in which they are compared.
LISTS = {"object": ("things", "objects"), "style": ("styles",), "person": ("public_figures",)}
CONTEXTS = {"object": "a {}", "style": "{}", "person": "{}"}
# A target of unknown kind has no other sign that a candidate is a thing of its kind.
LEAST = 0.2
MOST_WORDS = 4  # of a retained prompt: longer ones are sentences
MOST_LOOKED_AT = 8  # candidates of which pictures are drawn
MOST_TOLD = 5


@dataclass(frozen=True)
class Picked:
    """The anchors that were picked.

    Attributes:
        anchors: one for each target.
        cosines: how near each is to its target: of text rows, less the candidates' mean.
        candidates: how many words were compared.
        images: how many pictures of a candidate were looked at; 0 where text rows alone decided.
    """

    anchors: tuple[str, ...]
    cosines: tuple[float, ...]
    candidates: int
    images: int = 0

    def recorded(self) -> dict[str, Any]:
        """What the artefact says of it. It names nothing, so that it may stay in a redacted one."""
        return {"candidates": self.candidates, "cosines": list(self.cosines), "images": self.images}


def pick_anchors(
    pipe: Any,
    targets: Sequence[str],
    task: str,
    retained: Sequence[str] = (),
    *,
    length: int = 0,
    picker: Picker | None = None,
    images: int | None = None,
) -> Picked:
    """Pick an anchor for each target.

    Args:
        pipe ([`DiffusionPipeline`]): the base model; its text encoders are read, and with a `picker` it draws.
        targets (sequence of `str`): the concepts to remove.
        task (`str`): their kind: `"object"`, `"style"` or `"person"`; see [`task_of`].
        retained (sequence of `str`, *optional*): further candidates: what the user retains.
        length (`int`, *optional*, defaults to 0): rows that T5 makes of a prompt; 0 for the pipeline's own number.
        picker ([`Picker`], *optional*): looks at pictures of the candidates, the nearest first; the first whose pictures do not show the
            target is picked. Without one text rows alone decide.
        images (`int`, *optional*): how many pictures of a candidate it looks at; 4 by default where there is a `picker`, else 0.

    Returns:
        [`Picked`].

    Raises:
        ErasureInputError: a target has no candidate that is near enough; images without a picker; the picker gives no share.
        ErasureCompatibilityError: there are pictures to be drawn, and the pipeline has nothing to draw them with.
    """
    count = _count(picker, images)
    check_prompts(pipe, targets, length)
    context = CONTEXTS[task]
    pool = [word for word in pool_of(task, retained) if not is_broad(word)]
    fitting = set(short_enough(pipe, [context.format(word) for word in pool], length))
    pool = [word for word in pool if context.format(word) in fitting]
    own = set(retained)
    known = own | known_words(pipe, pool, context, length)
    means, highest = nearness(pipe, targets, pool, context, length)
    alike = highest.amax(0) >= SAME  # to any of the targets: an anchor that goes too is none
    open_ones = [
        not same and not any(_holds(word, target) for target in targets)
        for word, same in zip(pool, alike.tolist(), strict=True)
    ]
    pictures = None if picker is None or not count else Pictures(pipe, context, count, length)
    anchors, cosines = [], []
    for target, near in zip(targets, means.tolist(), strict=True):
        free = {word: cosine for word, cosine, open in zip(pool, near, open_ones, strict=True) if open}
        ordered = _ordered(target, task, free, known)
        if not ordered:
            raise ErasureInputError(
                f"No anchor was found for {target!r}: none of {len(pool)} candidates is known to be a thing of its kind and is near to it "
                "in the text encoder's eyes, or all of them are erased too. Name one with `anchors`, or retain prompts of its kind."
            )
        anchor = ordered[0]
        if pictures is not None and picker is not None:
            anchor = _by_pictures(pictures, picker, target, ordered)
        anchors.append(anchor)
        cosines.append(round(free[anchor], 3))
    told = [f"{t!r} → {a!r} ({c:.2f})" for t, a, c in zip(targets, anchors, cosines, strict=True)]
    more = ", …" if len(told) > MOST_TOLD else ""
    logger.info(
        "Anchors picked from %d candidates, with their cosines: %s", len(pool), ", ".join(told[:MOST_TOLD]) + more
    )
    return Picked(tuple(anchors), tuple(cosines), len(pool), count)


def pool_of(task: str, retained: Sequence[str]) -> list[str]:
    """All candidates: entries of the shipped lists of a kind of concept, and retained prompts that may be of that kind."""
    listed = [word for name in LISTS[task] for word in read_list(name)]
    if task == "object":
        others: set[tuple[str, ...]] = set()
    else:  # what is known to be a thing is neither a style nor a person, and what is known to be one of these is not the other
        name = {"style": "public_figures", "person": "styles"}[task]
        others = {_plain_words(word) for word in read_list(name)}
    own = [
        word
        for word in retained
        if 0 < len(_plain_words(word)) <= MOST_WORDS
        and (task == "object" or (kind_of(word) is None and _plain_words(word) not in others))
    ]
    # One of several spellings, the user's first.
    return list({bare(word): word for word in [*listed, *own]}.values())


def known_words(pipe: Any, words: Sequence[str], context: str, length: int = 0) -> set[str]:
    """Words that all tokenizers have whole. What is cut into pieces was rarely read, and so may be anywhere among the rows."""
    found = set(words)
    for source in row_sources(pipe, length=length):
        further = {
            word: len(ids) - len(word.split())
            for word, ids in zip(words, source.ids([context.format(word) for word in words]), strict=True)
        }
        least = min(further.values(), default=0)
        found &= {word for word, count in further.items() if count == least}
    return found


def nearness(
    pipe: Any, targets: Sequence[str], words: Sequence[str], context: str, length: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of targets to words, of their rows less the words' mean: the means over the encoders, and the highest, [t, w] each."""
    found = []
    for source in row_sources(pipe, length=length):
        rows = source.last([context.format(word) for word in words])
        named = source.last([context.format(target) for target in targets])
        mean = rows.mean(0)
        rows, named = (torch.nn.functional.normalize(each - mean, dim=1) for each in (rows, named))
        found.append(named @ rows.T)
    cosines = torch.stack(found)
    return cosines.mean(0), cosines.amax(0)


def _holds(word: str, target: str) -> bool:
    """Whether a candidate is a target, names one, is named by one (which it is broader than), or is known to be the same thing."""
    return names_any(word, [target]) or names_any(target, [word]) or are_the_same(word, target)


def _ordered(target: str, task: str, cosines: dict[str, float], known: set[str]) -> list[str]:
    """Candidates for a target, the nearest first: words that are known before others, and its kind before those next to it."""
    by_nearness = sorted(cosines, key=lambda word: -cosines[word])
    kind = kind_of(target) if task == "object" else None
    if kind is not None:
        kinds = {word: kind_of(word) for word in by_nearness}
        groups = [[word for word in by_nearness if kinds[word] in some] for some in ({kind}, wider_kinds(kind))]
    else:
        least = LEAST if task == "object" else -1.0  # a list of styles or of people holds nothing else
        groups = [[word for word in by_nearness if cosines[word] >= least]]
    whole = [word for group in groups for word in group if word in known]
    return list(dict.fromkeys([*whole, *(word for group in groups for word in group)]))


def _by_pictures(pictures: Pictures, picker: Picker, target: str, ordered: Sequence[str]) -> str:
    """The first of some candidates whose pictures do not show the target; else the one whose pictures show it least."""
    shares: dict[str, float] = {}
    for word in ordered[:MOST_LOOKED_AT]:
        shares[word] = checked_share(picker(pictures.of(word), target))
        if not shares[word]:
            return word
    best = min(shares, key=shares.__getitem__)
    logger.warning(
        "Pictures of each of the %d nearest candidates show %r; %r shows it least, in %.0f %% of them. Name an anchor with `anchors`.",
        len(shares),
        target,
        best,
        100 * shares[best],
    )
    return best


def _count(picker: Picker | None, images: int | None) -> int:
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 0):
        raise ErasureInputError(f"`anchor_images` must be a whole number of at least 0, not {images!r}.")
    if images and picker is None:
        raise ErasureInputError(
            "`anchor_images` are looked at by a `picker`, and there is none: give one, such as `anchors.ClipPicker`, or leave "
            "`anchor_images` out; anchors are then picked by text rows alone."
        )
    if picker is not None and not callable(picker):
        raise ErasureInputError(f"`picker` must be a function of images and a target, not {picker!r}.")
    return (IMAGES if picker is not None else 0) if images is None else images
