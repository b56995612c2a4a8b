"""Whether new objects were learnt: they are named by the nearest centroid in the judge's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_erasure.demo.dataset import Dataset
from diffusers_erasure.demo.judge import Judge
from tools.demo_model.augment import Augmentation
from tools.demo_model.train_judge import LATENT_NOISE, TEST_AUGMENTATION


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, size, size, 3] as floats in [0, 1], [n, 3, size, size]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


class NewObjects:
    """
    Names new objects in pictures by the nearest centroid in the features of the judge, which has never seen them.

    A centroid is the mean over augmented copies of one picture, so each object has one in each style: an object in ink
    is farther from itself in colour than from another object in ink.

    Args:
        judge ([`~diffusers_erasure.demo.judge.Judge`]): Gives the features, the input of its two last layers.
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]): The real pictures of the new objects.
        copies (`int`, *optional*, defaults to 16): Augmented copies of each picture.
    """

    def __init__(self, judge: Judge, dataset: Dataset, copies: int = 16) -> None:
        self.judge = judge
        self.dataset = dataset
        self.names = tuple(name for name in dataset.objects for _ in dataset.styles)
        generator = torch.Generator().manual_seed(0)
        pixels = to_pixels(dataset.images.reshape(-1, dataset.size, dataset.size, 3))
        augmented = [self.features(Augmentation()(pixels, generator)) for _ in range(copies)]
        every = torch.cat(augmented)
        self.mean, self.deviation = every.mean(0), every.std(0).clamp(min=1e-3)
        self.centroids = self.scaled(torch.stack(augmented).mean(0))

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and maximum of the judge's last convolution, [n, 320]."""
        features = self.judge.net.features(1 - pixels)
        return torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)

    def scaled(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.deviation

    def predict(self, pixels: torch.Tensor) -> list[str]:
        """The nearest object of each picture, [n, 3, size, size] in [0, 1]; always one of them."""
        nearest = torch.cdist(self.scaled(self.features(pixels)), self.centroids).argmin(dim=1)
        return [self.names[index] for index in nearest]

    def right(self, images: Sequence[Image.Image], objects: Sequence[str]) -> list[bool]:
        """Whether each image is nearest to the object that it should show."""
        pixels = to_pixels(np.stack([np.array(image.convert("RGB")) for image in images]))
        return [seen == wanted for seen, wanted in zip(self.predict(pixels), objects, strict=True)]

    @torch.no_grad()
    def validate(self, vae: Any, draws: int = 4) -> tuple[int, int]:
        """
        Try it on real pictures, changed harder than for the centroids and put through the autoencoder with noise.

        Returns:
            `tuple[int, int]`: How many were right, and of how many.
        """
        generator = torch.Generator().manual_seed(1)
        pixels = to_pixels(self.dataset.images.reshape(-1, self.dataset.size, self.dataset.size, 3))
        right = 0
        for _ in range(draws):
            latents = vae.encode(TEST_AUGMENTATION(pixels, generator) * 2 - 1).latent_dist.mean
            level = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator) * latents.std()
            latents = latents + level * torch.randn(latents.shape, generator=generator)
            seen = self.predict((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
            right += sum(name == wanted for name, wanted in zip(seen, self.names, strict=True))
        return right, draws * len(pixels)
