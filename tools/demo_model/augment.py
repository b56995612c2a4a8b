"""Random changes of pictures that leave object and style as they are, in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Augmentation:
    """
    How far pictures may be changed; each number is the largest deviation to either side.

    Args:
        rotation (`float`): In degrees.
        scale (`float`): As a share of the size.
        shift (`float`): As a share of the width.
        colour (`float`): Change of contrast and saturation as a share, and half of it in brightness.
        blur (`float`): Standard deviation of the blur in pixels, which one picture in three gets.
        noise (`float`): Standard deviation of the noise.
    """

    rotation: float = 10.0
    scale: float = 0.15
    shift: float = 0.1
    colour: float = 0.15
    blur: float = 0.8
    noise: float = 0.04

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Changed copies of pixels in [0, 1], [n, 3, size, size]."""
        pixels = self._warp(pixels, generator)
        pixels = self._recolour(pixels, generator)
        pixels = self._blur(pixels, generator)
        level = self.noise * _uniform(len(pixels), generator, pixels, low=0)
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        return (pixels + level * noise).clamp(0, 1)

    def _warp(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count = len(pixels)
        angle = math.radians(self.rotation) * _uniform(count, generator, pixels).flatten()
        scale = 1 + self.scale * _uniform(count, generator, pixels).flatten()
        flip = torch.sign(_uniform(count, generator, pixels).flatten())
        shift = 2 * self.shift * torch.stack([_uniform(count, generator, pixels).flatten() for _ in range(2)], dim=1)
        cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
        matrix = torch.stack([torch.stack([flip * cosine, -sine], 1), torch.stack([flip * sine, cosine], 1)], 1)
        grid = F.affine_grid(torch.cat([matrix, shift[:, :, None]], dim=2), list(pixels.shape), align_corners=False)
        # Sampled as 1 - pixels, so that what comes in from outside is white.
        return 1 - F.grid_sample(1 - pixels, grid, align_corners=False)

    def _recolour(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        contrast, saturation, brightness = (self.colour * _uniform(len(pixels), generator, pixels) for _ in range(3))
        grey = pixels.mean(dim=1, keepdim=True)
        pixels = grey + (1 + saturation) * (pixels - grey)
        return 0.5 + (1 + contrast) * (pixels - 0.5) + brightness / 2

    def _blur(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count = len(pixels)
        sigma = self.blur * _uniform(count, generator, pixels, low=0)
        sigma = sigma * (torch.rand(count, generator=generator).to(pixels)[:, None, None, None] < 1 / 3)
        offsets = torch.arange(-2, 3, device=pixels.device, dtype=pixels.dtype)
        # A sigma of 0 gives the identity kernel.
        kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3).view(count, 1)) ** 2)
        kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(pixels.shape[1], dim=0)
        planes = F.pad(pixels, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
        groups = planes.shape[1]
        planes = F.conv2d(planes, kernel[:, None, None, :], groups=groups)
        planes = F.conv2d(planes, kernel[:, None, :, None], groups=groups)
        return planes.view(pixels.shape)


def _uniform(count: int, generator: torch.Generator, like: torch.Tensor, low: float = -1) -> torch.Tensor:
    """Uniform draws in [low, 1], [count, 1, 1, 1]; drawn on the CPU so that every device sees the same."""
    return (low + (1 - low) * torch.rand(count, generator=generator)).to(like)[:, None, None, None]
