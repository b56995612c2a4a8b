"""Prompts as the denoiser reads them: each is encoded once, so that the text encoders can leave the memory."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base_model import component, family_of
from ..encoding import check_prompts, last_rows, pooled_rows, short_enough
from ..errors import ErasureCompatibilityError


TEXT_ROWS, POOLED, SIZES = "rows", "pooled", "sizes"


@dataclass(frozen=True)
class Mixture:
    """A convex mixture of what is encoded of several prompts: rows place by place, and pooled vectors.

    Attributes:
        parts: the prompts.
        weights: one a prompt; they add up to 1. As a tensor [n] they get gradients.
    """

    parts: tuple[str, ...]
    weights: tuple[float, ...] | torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[str], weights: Sequence[float]) -> "Prompt":
        """That mixture, or the prompt itself where all are the same one."""
        return cls(tuple(parts), tuple(weights)) if len(set(parts)) > 1 else parts[0]


@dataclass(frozen=True)
class Inserted:
    """A prompt with other rows in place of some of its own.

    Attributes:
        prompt: the prompt.
        place: of the first of these.
        rows: [n, C].
    """

    prompt: str
    place: int
    rows: torch.Tensor


Prompt = str | Mixture | Inserted  # what a denoiser can be asked


def parts_of(prompt: Prompt) -> list[tuple[str, float]]:
    """The prompts that are mixed, with their weights; a prompt by itself is one of them."""
    if isinstance(prompt, Mixture):
        return list(zip(prompt.parts, map(float, prompt.weights), strict=True))
    return [(prompt if isinstance(prompt, str) else prompt.prompt, 1.0)]


class Prompts:
    """Encoded prompts of a Stable Diffusion 1.x, 2.x, XL, 3.x or FLUX.1 pipeline, by its own `encode_prompt`.

    The empty prompt is what the pipeline takes for the unconditional half of classifier-free guidance: for SDXL zeros,
    where its configuration says so.

    Args:
        pipe: the base model.
        prompts: all prompts that the training will use.
        size: pixels of a side, for SDXL's size conditioning.
        length: rows that T5 makes of a prompt; 0 for the pipeline's own number, see [`text_length`].

    Raises:
        ErasureInputError: a prompt is longer than a text encoder reads, or a LoRA is active on one.
        ErasureCompatibilityError: a text encoder or tokenizer is missing, or prompts of this family are not encoded here.
    """

    def __init__(self, pipe: Any, prompts: Iterable[str], size: int, length: int = 0) -> None:
        wanted = list(dict.fromkeys(("", *prompts)))
        self.family = family_of(pipe)
        self.length = length or text_length(pipe)
        check_prompts(pipe, wanted, self.length)
        self.index = {prompt: i for i, prompt in enumerate(wanted)}
        self.size = size
        found = [encoded(pipe, [prompt], self.length) for prompt in wanted]
        self.rows = torch.cat([rows for rows, _ in found]).cpu()
        has_pooled = self.family.pooled is not None
        self.pooled = torch.cat([vectors for _, vectors in found]).cpu() if has_pooled else None
        self.there: tuple[Any, dict[str, torch.Tensor]] = None, {}  # what the denoiser is called with, where it is

    def batch(self, prompts: Sequence[Prompt], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What the denoiser is called with for these prompts, one a sample."""
        if self.there[0] != (device, dtype):
            self.there = (device, dtype), self._moved(device, dtype)
        known = self.there[1]

        def picked(name: str) -> torch.Tensor:  # one by one, as nothing has to be copied for that
            return torch.stack([self._one(name, known[name], prompt) for prompt in prompts])

        arguments: dict[str, Any] = {self.family.argument: picked(TEXT_ROWS)}
        if self.pooled is None:
            return arguments
        assert self.family.pooled is not None
        if SIZES in known:
            sizes = known[SIZES].repeat(len(prompts), 1)
            arguments["added_cond_kwargs"] = {self.family.pooled.input: picked(POOLED), "time_ids": sizes}
        else:
            arguments[self.family.pooled.input] = picked(POOLED)
        return arguments

    def _one(self, name: str, known: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """What is known of a prompt; of a mixture, added up in float32. All prompts have as many rows."""
        if isinstance(prompt, str):
            return known[self.index[prompt]]
        if isinstance(prompt, Inserted):
            own, first, rows = known[self.index[prompt.prompt]], prompt.place, prompt.rows.to(known)
            return own if name != TEXT_ROWS else torch.cat([own[:first], rows, own[first + len(rows) :]])
        if isinstance(prompt.weights, torch.Tensor):
            rows = known[[self.index[part] for part in prompt.parts]].float()
            return torch.tensordot(prompt.weights.to(rows.device, rows.dtype), rows, 1).to(known.dtype)
        pairs = zip(prompt.parts, prompt.weights, strict=True)
        parts = [known[self.index[part]].float() * weight for part, weight in pairs]
        return torch.stack(parts).sum(0).to(known.dtype)

    def _moved(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All of it on a device, once: a copy in each step would be waited for."""
        found = {TEXT_ROWS: self.rows.to(device, dtype)}
        if self.pooled is not None:
            found[POOLED] = self.pooled.to(device, dtype)
            if self.family.denoiser == "unet":
                size = [self.size, self.size, 0, 0, self.size, self.size]
                found[SIZES] = torch.tensor([size], device=device, dtype=dtype)
        return found


def text_length(pipe: Any) -> int:
    """Rows that T5 makes of a prompt: the pipeline's own number, or what its tokenizer says, if that is less; 0 without T5."""
    own = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
    if own is None:
        return 0
    tokenizer = component(pipe, family_of(pipe).tokenizers[-1])
    return min(int(own.default), getattr(tokenizer, "model_max_length", int(own.default)))


@torch.no_grad()
def encoded(pipe: Any, prompts: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as the pipeline encodes them, the empty one alone: rows [B, L, C], pooled vectors [B, p] (or nothing, [0]).

    Raises:
        ErasureCompatibilityError: how this family's pipelines encode is not known here.
    """
    family, texts = family_of(pipe), list(prompts)
    encoder = next(model for name in family.text_encoders if (model := component(pipe, name)) is not None)
    device, nothing = encoder.device, torch.empty(0)
    if family.denoiser == "unet":
        empty = texts == [""]
        found = pipe.encode_prompt(
            texts[0] if len(texts) == 1 else texts,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=empty,
        )
        first = 1 if empty else 0
        return found[first], found[2 + first] if family.pooled is not None else nothing
    if family.name == "flux":
        rows, pooled, _ = pipe.encode_prompt(texts, None, device=device, max_sequence_length=length)
        return rows, pooled
    if family.name == "stable-diffusion-3":
        more = {"do_classifier_free_guidance": False, "max_sequence_length": length}
        rows, _, pooled, _ = pipe.encode_prompt(texts, None, None, device=device, **more)
        return rows, pooled
    raise ErasureCompatibilityError(
        f"Prompts of {family.title} cannot be encoded here; those of Stable Diffusion, SDXL, SD3 and FLUX.1 can."
    )


def nearest(pipe: Any, prompts: Sequence[str], targets: Sequence[str], count: int) -> list[str]:
    """The `count` prompts nearest to each target, one target's after another's, each once: see [`nearest_to_each`]."""
    return list(dict.fromkeys(prompt for own in nearest_to_each(pipe, prompts, targets, count) for prompt in own))


def nearest_to_each(pipe: Any, prompts: Sequence[str], targets: Sequence[str], count: int) -> list[list[str]]:
    """For each target the `count` prompts nearest to it, by cosine, less the mean of all, the nearest first.

    Of UNets' prompts the rows of the last word pieces are compared, of transformers' the pooled vectors: for these CLIP alone has
    to run, and prompts that it does not read whole are left out.
    """
    unets = family_of(pipe).denoiser == "unet"
    prompts = prompts if unets else short_enough(pipe, prompts)
    if not prompts or not count:
        return [[] for _ in targets]
    rows = (last_rows if unets else pooled_rows)(pipe, [*prompts, *targets])
    rows = rows - rows.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = rows[len(prompts) :] @ rows[: len(prompts)].T
    chosen = cosines.topk(min(count, len(prompts)), dim=1).indices.tolist()
    return [[prompts[i] for i in row] for row in chosen]
