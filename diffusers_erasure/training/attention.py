"""What the tokens of a transformer look at: its attention to text, seen while it is trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from ..base_model import component, family_of
from ..errors import ErasureCompatibilityError


ROTARY = "image_rotary_emb"
PARTS = (("add_q_proj", "norm_added_q"), ("to_q", "norm_q"), ("add_k_proj", "norm_added_k"), ("to_k", "norm_k"))


class AttentionToText:
    """Watches the last attention in which text and image have projections of their own.

    Queries and keys are noted as the projections give them, so that any attention processor may compute with them.
    """

    def __init__(self) -> None:
        self.attention: Any = None
        self.seen: dict[str, Any] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within the block the passes of a model are watched.

        Raises:
            ErasureCompatibilityError: it has no such attention.
        """
        blocks: Any = getattr(model, "transformer_blocks", ())
        self.attention = getattr(blocks[-1], "attn", None) if len(blocks) else None
        if getattr(self.attention, "add_k_proj", None) is None:
            raise ErasureCompatibilityError(f"{type(model).__name__} has no blocks in which text has keys of its own.")

        def noted(name: str) -> Any:
            def note(_: nn.Module, __: Any, output: torch.Tensor) -> None:
                self.seen[name] = output

            return note

        def with_places(_: nn.Module, __: Any, more: dict[str, Any]) -> None:
            self.seen = {ROTARY: more.get(ROTARY)}

        handles = [self.attention.get_submodule(name).register_forward_hook(noted(name)) for name, _ in PARTS]
        handles.append(self.attention.register_forward_pre_hook(with_places, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.seen = {}

    def take(self, count: int) -> torch.Tensor:
        """The attention weights of the first `count` samples of the last pass: [B, heads, tokens, text], text tokens first."""
        seen, self.seen = self.seen, {}
        heads = []
        for name, norm in PARTS:
            values = seen[name][:count].float().unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)
            scale = getattr(self.attention, norm, None)
            heads.append(values if scale is None else scale(values).float())
        queries, keys = torch.cat(heads[:2], 2), torch.cat(heads[2:], 2)
        if seen[ROTARY] is not None:
            queries, keys = (apply_rotary_emb(each, seen[ROTARY]) for each in (queries, keys))
        logits = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        return logits.softmax(-1)[..., : heads[2].shape[2]]


def word_places(pipe: Any, prompt: str, word: str, length: int) -> list[int]:
    """At which text rows a word of a prompt stands, or the whole prompt where the tokenizer cuts the word otherwise in it.

    Args:
        pipe: the base model; its tokenizers are used.
        prompt, word (`str`): the word as it stands in the prompt.
        length (`int`): rows that the last text encoder makes; the others make as many as their tokenizers say.
    """
    family, found, first = family_of(pipe), [], 0
    for block in family.rows:
        name = family.tokenizers[family.text_encoders.index(block[0])]
        tokenizer = component(pipe, name)
        if tokenizer is None:
            continue
        rows = length if name == family.tokenizers[-1] and length else tokenizer.model_max_length
        ids = tokenizer(prompt).input_ids
        inner = [tokenizer(text, add_special_tokens=False).input_ids for text in (word, prompt)]
        part: list[int] = next((own for own in inner if own and (at := _found(ids, own)) is not None), [])
        at = _found(ids, part) or 0
        found += [first + place for place in range(at, at + len(part)) if place < rows]
        first += rows
    return found


def _found(ids: Sequence[int], part: Sequence[int]) -> int | None:
    """Where a sequence is in another one for the first time."""
    size = len(part)
    return next((i for i in range(len(ids) - size + 1) if list(ids[i : i + size]) == list(part)), None)
