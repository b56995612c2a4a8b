"""Prompt pairs for ActErase's calibration: what is drawn without a concept, and with it."""

from collections.abc import Sequence

from ..errors import ErasureInputError
from ..schema import Concept


Pair = tuple[str, str]  # without, with

# Short and plain, so that the two sides of a pair differ in the concept alone. {} stands for the concept.
PAIRS: dict[str, tuple[Pair, ...]] = {
    "object": (
        ("", "a {}"),
        ("a photo", "a photo of a {}"),
        ("a drawing", "a drawing of a {}"),
        ("a painting", "a painting of a {}"),
        ("a table", "a {} on a table"),
        ("a garden", "a {} in a garden"),
        ("a street", "a {} in a street"),
        ("a room", "a {} in a room"),
        ("a person", "a person with a {}"),
        ("a white background", "a {} on a white background"),
        ("a close-up photo", "a close-up photo of a {}"),
        ("a view of the sea", "a {} by the sea"),
    ),
    "style": (
        ("an animal", "an animal in {} style"),
        ("a bird", "a bird, {} style"),
        ("a flower", "a flower in the style of {}"),
        ("a fruit", "a fruit by {}"),
        ("a vehicle", "a vehicle in {} style"),
        ("a person", "a person, {} style"),
        ("a plant", "a plant in the style of {}"),
        ("a house", "a house by {}"),
        ("a picture of food", "a picture of food in {} style"),
        ("a picture of a tree", "a picture of a tree by {}"),
        ("a portrait", "a portrait in the style of {}"),
        ("a landscape", "a landscape by {}"),
    ),
    "nudity": (
        ("a photo of a woman", "a photo of a woman, {}"),
        ("a photo of a man", "a photo of a man, {}"),
        ("a portrait of a person", "a portrait of a person, {}"),
        ("a couple on a beach", "a couple on a beach, {}"),
        ("a woman in a bedroom", "a woman in a bedroom, {}"),
        ("a man in a bathroom", "a man in a bathroom, {}"),
        ("a dancer on a stage", "a dancer on a stage, {}"),
        ("a woman at a pool", "a woman at a pool, {}"),
        ("a painting of a woman", "a painting of a woman, {}"),
        ("a statue of a man", "a statue of a man, {}"),
        ("a group of people", "a group of people, {}"),
        ("a person asleep", "a person asleep, {}"),
    ),
}


def pairs_for(concept: Concept, count: int, preset: str, own: Sequence[Pair], alone: bool) -> list[Pair]:
    """The `count` pairs of a concept, in turn from the preset's templates or the user's own.

    Args:
        concept ([`Concept`]): with an anchor the prompt without the concept has that in its place.
        count (`int`): how many; templates are used again, with other noise.
        preset (`str`): whose templates.
        own (sequence of pairs): the user's, if there are any, in which `{}` is the target on the right and the anchor on the left.
        alone (`bool`): whether it is the only concept; otherwise each right side needs a `{}`.

    Raises:
        ErasureInputError: a pair is the same prompt twice, or does not say which of several concepts it is about.
    """
    target, anchor = str(concept.target), concept.anchor or ""
    if not own:
        templates = [(right if anchor else left, right) for left, right in PAIRS[preset]]
    else:
        templates = list(own)
        if not alone and not all("{}" in right for _, right in templates):
            raise ErasureInputError("With several concepts each pair needs {} for the concept on its right side.")
    filled = [(left.replace("{}", anchor), right.replace("{}", target)) for left, right in templates]
    for left, right in filled:
        if left.split() == right.split():
            raise ErasureInputError(f"The pair ({left!r}, {right!r}) does not differ, so it cannot show the concept.")
    return [filled[i % len(filled)] for i in range(count)]
