"""What looks at pictures of an anchor, to tell whether they show the target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import ErasureInputError
from ..lists import names_any, read_list
from ..lists.kinds import are_the_same


if TYPE_CHECKING:
    from PIL.Image import Image


class Picker(Protocol):
    """Tells in which share of some pictures a target is seen.

    Any function will do. It is called once for a candidate and a target, with all pictures of the candidate.
    """

    def __call__(self, images: "Sequence[Image]", target: str) -> float:
        """
        Args:
            images (sequence of `PIL.Image.Image`): pictures of a candidate.
            target (`str`): the concept to remove.

        Returns:
            `float`: the share of the pictures that show the target, from 0 to 1. A candidate with 0 is picked.
        """
        ...


class ClipPicker:
    """A [`Picker`] by zero-shot classification: a picture shows the target where its caption fits best of all.

    Args:
        model: a model of transformers that compares pictures with texts, such as `CLIPModel.from_pretrained(...)`.
        processor: its processor.
        others (sequence of `str`, *optional*): what else the pictures may show; the shipped `list:things` by default. Those that name a
            target or are known to be the same thing are left out.
        template (`str`, *optional*, defaults to `"a picture of a {}"`): the caption.

    Examples:

    ```py
    >>> from transformers import CLIPModel, CLIPProcessor
    >>> from diffusers_erasure.anchors import ClipPicker

    >>> name = "openai/clip-vit-base-patch32"
    >>> picker = ClipPicker(CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name))
    >>> erasure = erase(pipe, "cat", anchors="auto", picker=picker)
    ```
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        others: Sequence[str] | None = None,
        template: str = "a picture of a {}",
    ) -> None:
        self.model, self.processor, self.template = model, processor, template
        self.others = tuple(read_list("things") if others is None else others)

    @torch.no_grad()
    def __call__(self, images: "Sequence[Image]", target: str) -> float:
        others = [word for word in self.others if not names_any(word, [target]) and not are_the_same(word, target)]
        if not others:
            raise ErasureInputError(
                f"All that pictures may show besides {target!r} is the same thing; give the picker other words as `others`."
            )
        texts = [self.template.format(word) for word in (target, *others)]
        inputs = self.processor(text=texts, images=list(images), return_tensors="pt", padding=True)
        found = self.model(**inputs.to(self.model.device))
        best = found.logits_per_image.argmax(dim=1)
        return float((best == 0).float().mean())
