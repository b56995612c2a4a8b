"""The judge of the embedded model: a small network that names the object and the style of a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import ErasureInputError


JudgeInput: TypeAlias = Image.Image | Sequence[Image.Image] | np.ndarray


class JudgeNet(nn.Module):
    """Five convolutions, mean and maximum over the picture, and one linear head each for object and style."""

    def __init__(self, num_objects: int, num_styles: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        self.features = nn.Sequential(
            block(3, 32, 2), block(32, 64, 2), block(64, 96, 1), block(96, 128, 2), block(128, 160, 1)
        )
        self.object_head = nn.Linear(320, num_objects)
        self.style_head = nn.Linear(320, num_styles)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Object and style logits of pixels in [0, 1], [n, 3, size, size]."""
        features = self.features(1 - pixels)  # the background is white: make it 0, as the padding of convolutions is
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return self.object_head(pooled), self.style_head(pooled)


@dataclass(frozen=True)
class JudgeResult:
    """
    What the judge sees in n pictures.

    Args:
        objects (`tuple[str, ...]`): The most likely object of each picture.
        styles (`tuple[str, ...]`): The most likely style of each picture.
        object_indices (`np.ndarray`): The indices of `objects` among the judge's objects, int64 [n].
        style_indices (`np.ndarray`): The indices of `styles` among the judge's styles, int64 [n].
        object_probabilities (`np.ndarray`): float32 [n, objects].
        style_probabilities (`np.ndarray`): float32 [n, styles].
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    object_indices: np.ndarray
    style_indices: np.ndarray
    object_probabilities: np.ndarray
    style_probabilities: np.ndarray


class Judge:
    """
    Names the object and the style of pictures.

    Args:
        net ([`JudgeNet`]): The network.
        objects (`tuple[str, ...]`): The word of each object.
        styles (`tuple[str, ...]`): The word of each style.
        size (`int`): Height and width that pictures are brought to.
    """

    def __init__(self, net: JudgeNet, objects: tuple[str, ...], styles: tuple[str, ...], size: int) -> None:
        self.net = net.eval().requires_grad_(False)
        self.objects = objects
        self.styles = styles
        self.size = size

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu") -> Judge:
        """Load a judge that [`Judge.save`] wrote."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                state = {name: file.get_tensor(name) for name in names}
            config = json.loads(metadata["judge"])
            objects, styles, size = tuple(config["objects"]), tuple(config["styles"]), int(config["size"])
            net = JudgeNet(len(objects), len(styles))
            net.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ErasureInputError(f"{path} is no judge of this version: {error}") from error
        return cls(net.to(device), objects, styles, size)

    def save(self, path: str | Path) -> None:
        """Write weights and words to one safetensors file."""
        state = {key: value.detach().cpu().contiguous() for key, value in self.net.state_dict().items()}
        config = json.dumps({"objects": self.objects, "styles": self.styles, "size": self.size})
        # One key alone: safetensors writes several in no fixed order, and the same judge should be the same bytes.
        save_file(state, str(path), metadata={"judge": config})

    @torch.no_grad()
    def predict(self, images: JudgeInput, batch_size: int = 64) -> JudgeResult:
        """
        Name the object and the style of each picture.

        Args:
            images (`PIL.Image.Image`, a sequence of them, or `np.ndarray`):
                Pictures of any size; an array is [height, width, 3] or [n, height, width, 3], uint8 or floats in [0, 1].
            batch_size (`int`, *optional*, defaults to 64):
                How many pictures to look at in one go.

        Returns:
            [`JudgeResult`]: Words, indices and probabilities.
        """
        pixels = self._pixels(images)
        device = next(self.net.parameters()).device
        outputs = [self.net(chunk.to(device)) for chunk in pixels.split(batch_size)]
        object_probabilities, style_probabilities = (
            torch.cat(logits).softmax(dim=1).cpu().numpy() for logits in zip(*outputs, strict=True)
        )
        object_indices, style_indices = object_probabilities.argmax(axis=1), style_probabilities.argmax(axis=1)
        return JudgeResult(
            objects=tuple(self.objects[index] for index in object_indices),
            styles=tuple(self.styles[index] for index in style_indices),
            object_indices=object_indices,
            style_indices=style_indices,
            object_probabilities=object_probabilities,
            style_probabilities=style_probabilities,
        )

    def accuracy(
        self,
        images: JudgeInput,
        objects: str | Sequence[str] | None = None,
        styles: str | Sequence[str] | None = None,
    ) -> float:
        """
        The share of pictures in which the judge sees what it should.

        Args:
            images (`PIL.Image.Image`, a sequence of them, or `np.ndarray`):
                Pictures, as in [`Judge.predict`].
            objects (`str` or a sequence of `str`, *optional*):
                The object expected in every picture, or one for each.
            styles (`str` or a sequence of `str`, *optional*):
                The style expected in every picture, or one for each. With `objects` too, both must be right.

        Returns:
            `float`: Between 0 and 1.
        """
        if objects is None and styles is None:
            raise ErasureInputError("Give the expected `objects`, `styles`, or both.")
        result = self.predict(images)
        right = np.ones(len(result.objects), dtype=bool)
        for expected, seen, known in ((objects, result.objects, self.objects), (styles, result.styles, self.styles)):
            if expected is None:
                continue
            words = (expected,) * len(seen) if isinstance(expected, str) else tuple(expected)
            if len(words) != len(seen):
                raise ErasureInputError(f"{len(words)} words were expected of {len(seen)} pictures.")
            if unknown := sorted(set(words) - set(known)):
                raise ErasureInputError(f"The judge does not know {unknown}.")
            right &= np.array(words) == np.array(seen)
        return float(right.mean())

    def _pixels(self, images: JudgeInput) -> torch.Tensor:
        """The pictures as floats in [0, 1], [n, 3, size, size]."""
        if isinstance(images, np.ndarray):
            arrays = list(images) if images.ndim == 4 else [images]
        else:
            pictures = [images] if isinstance(images, Image.Image) else list(images)
            if not all(isinstance(picture, Image.Image) for picture in pictures):
                raise ErasureInputError("Pictures must be PIL images or one NumPy array.")
            arrays = [np.array(picture.convert("RGB")) for picture in pictures]
        if not arrays:
            raise ErasureInputError("There is no picture to look at.")
        return torch.stack([self._to_tensor(array) for array in arrays])

    def _to_tensor(self, array: np.ndarray) -> torch.Tensor:
        if array.ndim != 3 or array.shape[2] != 3:
            raise ErasureInputError(f"A picture must have the shape [height, width, 3], not {list(array.shape)}.")
        if array.dtype == np.uint8:
            pixels = torch.from_numpy(array.copy()).float() / 255
        elif np.issubdtype(array.dtype, np.floating):
            pixels = torch.from_numpy(array.astype(np.float32))
            if not bool(torch.isfinite(pixels).all()) or pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3:
                raise ErasureInputError("A picture of floats must be finite and within [0, 1].")
        else:
            raise ErasureInputError(f"A picture must be uint8 or floats, not {array.dtype}.")
        pixels = pixels.permute(2, 0, 1)
        if pixels.shape[1:] == (self.size, self.size):
            return pixels
        resized = F.interpolate(pixels[None], (self.size, self.size), mode="bilinear", antialias=True)[0]
        return resized.clamp(0, 1)
