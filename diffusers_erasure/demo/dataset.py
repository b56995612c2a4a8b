"""The pictures and words that the embedded model is made from, read and checked."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ErasureInputError


@dataclass(frozen=True)
class Dataset:
    """
    Pictures of objects in styles.

    Args:
        images (`np.ndarray`): uint8 [objects, styles, size, size, 3].
        objects (`tuple[str, ...]`): The word of each object.
        styles (`tuple[str, ...]`): The word of each style.
        keywords (`tuple[tuple[str, ...], ...]`): For each object the related words that the json lists as `synonyms`.
    """

    images: np.ndarray
    objects: tuple[str, ...]
    styles: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]

    @property
    def size(self) -> int:
        """Height and width of a picture."""
        return int(self.images.shape[2])

    def first(self, count: int) -> Dataset:
        """The first objects alone."""
        return Dataset(self.images[:count], self.objects[:count], self.styles, self.keywords[:count])


def load_dataset(images: str | Path, labels: str | Path) -> Dataset:
    """
    Read pictures (`.npz` with the key `images`) and their words (`.json` with `styles` and `objects`).

    Args:
        images (`str` or `Path`): The `.npz` file.
        labels (`str` or `Path`): The `.json` file.

    Returns:
        [`Dataset`]: Pictures and words, of which counts, shapes and dtypes agree.

    Raises:
        `ErasureInputError`: If a file is missing or malformed, or if the two do not fit together.
    """
    array = _read_images(Path(images))
    styles, objects, keywords = _read_labels(Path(labels))
    if array.shape[:2] != (len(objects), len(styles)):
        raise ErasureInputError(
            f"{images} holds {array.shape[0]} objects in {array.shape[1]} styles, "
            f"but {labels} names {len(objects)} objects and {len(styles)} styles."
        )
    return Dataset(images=array, objects=objects, styles=styles, keywords=keywords)


def _read_images(path: Path) -> np.ndarray:
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ErasureInputError(f"{path} cannot be read as an .npz archive: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ErasureInputError(f"{path} is a single array; an .npz archive with the key 'images' is needed.")
    with archive:
        if "images" not in archive.files:
            raise ErasureInputError(f"{path} has no key 'images', only {sorted(archive.files)}.")
        try:
            array = archive["images"]
        except (ValueError, zipfile.BadZipFile) as error:
            raise ErasureInputError(f"'images' in {path} cannot be read: {error}") from error
    if array.dtype != np.uint8:
        raise ErasureInputError(f"'images' in {path} must be uint8, not {array.dtype}.")
    if array.ndim != 5 or array.shape[4] != 3 or array.shape[2] != array.shape[3] or 0 in array.shape:
        raise ErasureInputError(
            f"'images' in {path} must have the shape [objects, styles, size, size, 3], not {list(array.shape)}."
        )
    if array.shape[2] % 32:
        # The autoencoder halves the size three times, the UNet twice more.
        raise ErasureInputError(
            f"The pictures in {path} are {array.shape[2]} pixels wide, which is no multiple of 32."
        )
    return array


def _read_labels(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, ...], ...]]:
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ErasureInputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(labels, dict):
        raise ErasureInputError(f"{path} must hold a JSON object with 'styles' and 'objects'.")
    for key in ("styles", "objects"):
        if not isinstance(labels.get(key), list) or not labels[key]:
            raise ErasureInputError(f"{path} needs a non-empty list '{key}'.")
    if not all(isinstance(entry, dict) for entry in labels["objects"]):
        raise ErasureInputError(f"Each entry of 'objects' in {path} must be a JSON object.")
    styles = labels["styles"]
    objects = [entry.get("object") for entry in labels["objects"]]
    keywords = [entry.get("synonyms", []) for entry in labels["objects"]]
    for name, words in (("styles", styles), ("objects", objects)):
        if not all(isinstance(word, str) and word.strip() for word in words) or len(set(words)) != len(words):
            raise ErasureInputError(f"The words of '{name}' in {path} must be distinct, non-empty strings.")
    for word, entry in zip(objects, keywords, strict=True):
        if not isinstance(entry, list) or not all(isinstance(item, str) and item.strip() for item in entry):
            raise ErasureInputError(f"The 'synonyms' of {word!r} in {path} must be a list of non-empty strings.")
    return tuple(styles), tuple(objects), tuple(tuple(entry) for entry in keywords)
