"""Where in a picture a concept is: masks from the base's attention to its words, by which an eraser is kept from the rest (Receler)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers.adapter import attentions
from .attention import AttentionToText


SIDE = 4  # maps are of the layers whose side is a quarter of the latents', which for Stable Diffusion 1.x is 16 of 64


class WordMasks:
    """Watches the attentions that read text, and makes masks of what the last pass looked at.

    In UNets they are averaged over the cross-attentions of one resolution, in transformers the last joint attention is taken, over heads and
    over the concept's words.

    Args:
        places: by prompt, the text rows of the concept's words.
        threshold: of a map between 0 and 1; what lies above it belongs to the concept.
        component: `"unet"` or `"transformer"`.
    """

    def __init__(self, places: Mapping[str, Sequence[int]], threshold: float, component: str) -> None:
        self.places, self.threshold, self.component = places, threshold, component
        self.joint: AttentionToText | None = None
        self.layers: dict[str, Any] = {}
        self.seen: dict[str, dict[str, torch.Tensor]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within the block the passes of a denoiser are watched."""
        if self.component != "unet":
            self.joint = AttentionToText()
            with self.joint.watching(model):
                yield
            return
        handles = []
        for site in attentions(self.component, model):
            self.layers[site] = model.get_submodule(site)
            for name in ("to_q", "to_k"):
                handles.append(self.layers[site].get_submodule(name).register_forward_hook(self._noting(site, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.seen, self.layers = {}, {}

    def _noting(self, site: str, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not torch.is_grad_enabled():  # of the base
                self.seen.setdefault(site, {})[name] = output

        return note

    @torch.no_grad()
    def take(self, prompts: Sequence[str], height: int, width: int) -> torch.Tensor:
        """The masks of the last pass without gradients, for its prompts: [B, 1, h, w], 1 where the concept is.

        Args:
            prompts: one a sample.
            height, width: of the latents.
        """
        if self.joint is not None:
            weights = self.joint.take(len(prompts)).mean(1)  # [B, tokens, text], the text's tokens first
            maps = [self._of_words(weights[:, weights.shape[2] :], prompts, height, width)]
        else:
            seen, self.seen = self.seen, {}
            wanted = height * width / SIDE**2
            sizes = {site: each["to_q"].shape[1] for site, each in seen.items()}
            size = min(sizes.values(), key=lambda tokens: abs(math.log(tokens / wanted)))
            maps = []
            for site in [site for site, tokens in sizes.items() if tokens == size]:
                heads = self.layers[site].heads
                queries, keys = (
                    seen[site][name][: len(prompts)].float().unflatten(-1, (heads, -1)).transpose(1, 2)
                    for name in ("to_q", "to_k")
                )
                weights = (queries @ keys.transpose(-1, -2) * self.layers[site].scale).softmax(-1).mean(1)
                maps.append(self._of_words(weights, prompts, height, width))
        found = torch.stack(maps).mean(0)
        low, high = found.amin((2, 3), keepdim=True), found.amax((2, 3), keepdim=True)
        return ((found - low) / (high - low).clamp(min=1e-12) > self.threshold).float()

    def _of_words(self, weights: torch.Tensor, prompts: Sequence[str], height: int, width: int) -> torch.Tensor:
        """Attention weights [B, tokens, text] as maps [B, 1, h, w] of how much each place looks at the words."""
        rows = []
        for row, prompt in zip(weights, prompts, strict=True):
            rows.append(row[:, list(self.places[prompt])].mean(1))
        tokens = weights.shape[1]
        tall = round(math.sqrt(tokens * height / width))
        return torch.stack(rows).reshape(len(rows), 1, tall, tokens // tall)
