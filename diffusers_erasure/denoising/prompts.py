"""Prompts as the denoiser reads them: each is encoded once, so that the text encoders can leave the memory."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..base_model import component, family_of
from ..encoding import check_prompts, last_rows


class Prompts:
    """Encoded prompts of a Stable Diffusion 1.x, 2.x or XL pipeline.

    The empty prompt is what the pipeline takes for the unconditional half of classifier-free guidance: for SDXL zeros,
    where its configuration says so.

    Args:
        pipe: the base model.
        prompts: all prompts that the training will use.
        size: pixels of a side, for SDXL's size conditioning.

    Raises:
        ErasureInputError: a prompt is longer than a text encoder reads, or a LoRA is active on one.
        ErasureCompatibilityError: a text encoder or tokenizer is missing.
    """

    def __init__(self, pipe: Any, prompts: Iterable[str], size: int) -> None:
        wanted = list(dict.fromkeys(("", *prompts)))
        check_prompts(pipe, wanted)
        self.index = {prompt: i for i, prompt in enumerate(wanted)}
        self.size = size
        xl = family_of(pipe).name == "stable-diffusion-xl"
        encoder = next(model for name in family_of(pipe).text_encoders if (model := component(pipe, name)) is not None)
        device = encoder.device
        rows, pooled = [], []
        with torch.no_grad():
            for prompt in wanted:
                found = pipe.encode_prompt(
                    prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=prompt == ""
                )
                negative = prompt == ""
                rows.append(found[1 if negative else 0][0].cpu())
                if xl:
                    pooled.append(found[3 if negative else 2][0].cpu())
        self.rows = torch.stack(rows)
        self.pooled = torch.stack(pooled) if xl else None
        self.there: tuple[Any, dict[str, torch.Tensor]] = None, {}  # what the UNet is called with, where it is

    def batch(self, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What the UNet is called with for these prompts, one a sample."""
        if self.there[0] != (device, dtype):
            self.there = (device, dtype), self._moved(device, dtype)
        known = self.there[1]
        chosen = [self.index[prompt] for prompt in prompts]

        def picked(name: str) -> torch.Tensor:  # one by one, as nothing has to be copied for that
            return torch.stack([known[name][i] for i in chosen])

        arguments: dict[str, Any] = {"encoder_hidden_states": picked("rows")}
        if self.pooled is not None:
            sizes = known["sizes"].repeat(len(chosen), 1)
            arguments["added_cond_kwargs"] = {"text_embeds": picked("pooled"), "time_ids": sizes}
        return arguments

    def _moved(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All of it on a device, once: a copy in each step would be waited for."""
        found = {"rows": self.rows.to(device, dtype)}
        if self.pooled is not None:
            found["pooled"] = self.pooled.to(device, dtype)
            size = [self.size, self.size, 0, 0, self.size, self.size]
            found["sizes"] = torch.tensor([size], device=device, dtype=dtype)
        return found


def nearest(pipe: Any, prompts: Sequence[str], targets: Sequence[str], count: int) -> list[str]:
    """The `count` prompts nearest to each target, by the cosine of their last word pieces' rows, less the mean of all."""
    if not prompts or not count:
        return []
    rows = last_rows(pipe, [*prompts, *targets]).double()
    rows = rows - rows.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = rows[len(prompts) :] @ rows[: len(prompts)].T
    chosen = cosines.topk(min(count, len(prompts)), dim=1).indices.flatten().tolist()
    return [prompts[i] for i in dict.fromkeys(chosen)]
