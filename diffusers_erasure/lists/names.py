"""Names of concepts as people write them: the same one in other case, with other spaces, or with an article."""

from collections.abc import Sequence

from ..errors import ErasureInputError
from ..logging import get_logger


logger = get_logger(__name__)

ARTICLES = ("a", "an", "the")


def folded(name: str) -> str:
    """A name without regard to case and spaces."""
    return " ".join(name.split()).casefold()


def bare(name: str) -> str:
    """A folded name without the article that it begins with."""
    first, _, rest = folded(name).partition(" ")
    return rest if rest and first in ARTICLES else folded(name)


def check_targets(targets: Sequence[str]) -> None:
    """See that targets are different concepts; those that differ by an article alone are warned of.

    Raises:
        ErasureInputError: two are the same, but for case and spaces.
    """
    seen: dict[str, str] = {}
    for target in targets:
        if folded(target) in seen:
            first = seen[folded(target)]
            also = "" if first == target else f", the second time as {target!r}"
            raise ErasureInputError(f"`targets` names {first!r} twice{also}; leave one out.")
        seen[folded(target)] = target
    alike: dict[str, str] = {}
    for target in targets:
        first = alike.setdefault(bare(target), target)
        if first != target:
            logger.warning(
                "The targets %r and %r differ by an article alone: the concept is erased once, but weighs twice against the "
                "other targets and what is retained. One of them is enough.",
                first,
                target,
            )


def check_anchor(target: str, anchor: str) -> None:
    """See that a target is not mapped to itself.

    Raises:
        ErasureInputError: it is, or but for an article: then the images still show it.
    """
    if folded(target) == folded(anchor):
        raise ErasureInputError(f"The target {target!r} is its own anchor, so nothing would be erased.")
    if bare(target) == bare(anchor):
        raise ErasureInputError(
            f"The anchor {anchor!r} is the target {target!r} but for an article, and means the same: images would still show it. "
            'Give a broader word (as "animal" for a cat), or leave `anchors` out.'
        )
