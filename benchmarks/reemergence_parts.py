"""The parts of `reemergence.py`: erasures, fine-tunings, images and comparisons, each done once and stored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from common import finished
from diffusers.utils import logging
from efficacy_methods import ENTRIES, Entry
from efficacy_plan import Neighbours, Shot, find_neighbours, retained
from reemergence_plan import LEARNT, NEW, Counts, shots_for, training_set
from reemergence_train import (
    NewObjects,
    Recipe,
    lora_deltas,
    noise_loss,
    train_lora,
    undoing,
    weight_changes,
    with_fast_sampling,
)
from tqdm.auto import tqdm

from diffusers_erasure import __version__
from diffusers_erasure.demo import _no_progress_bars, load_judge, load_pipeline, load_unseen_images
from diffusers_erasure.demo.command import BATCH, GUIDANCE_SCALE, STEPS, fast_pipeline


FORMAT = 2  # of the stored results
CHECKPOINTS = (50, 100, 300)
SEQUENTIAL, MODULAR, NONE = "sequential", "modular", "none"


@dataclass(frozen=True)
class Settings:
    """What all parts of a run share."""

    checkpoints: tuple[int, ...] = CHECKPOINTS
    recipe: Recipe = Recipe()
    counts: Counts = Counts()
    drawing_steps: int = STEPS


# ------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Fit:
    """An erasure to make: stored as users store one."""

    method: str
    concept: str


@dataclass(frozen=True)
class Training:
    """A LoRA to train: on the clean base where `fit` is None, or on the exported erased model."""

    fit: Fit | None
    data: str
    concept: str  # what the related objects are related to; "" with new objects
    seed: int
    checkpoints: tuple[int, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Model:
    """What images are drawn with: an erasure or none, a LoRA after some steps or none, put together in a way."""

    way: str
    fit: Fit | None
    training: Training | None
    step: int


@dataclass(frozen=True)
class View:
    """Images of one model."""

    way: str
    fit: Fit | None
    training: Training | None
    step: int
    cell: str
    concept: str  # whose prompts are drawn; with `LEARNT` "" for new objects
    data: str  # which objects are drawn with `LEARNT`
    seed: int
    settings: Settings

    @property
    def model(self) -> Model:
        return Model(self.way, self.fit, self.training, self.step)


@dataclass(frozen=True)
class Comparison:
    """The weights that a LoRA adds, against those that an erasure changes."""

    fit: Fit
    training: Training


Part = Fit | Training | View | Comparison


def entry_of(method: str) -> Entry:
    """How a method is called: as `efficacy.py` has it, or else with its defaults."""
    return ENTRIES.get(method) or Entry(method, method, method)


def key_of(part: Part) -> str:
    """A hash of everything that a result depends on, but the library's code and the model."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "kind": type(part).__name__,
        "part": asdict(part),
    }
    fit = part if isinstance(part, Fit) else part.fit
    if fit:
        data["entry"] = entry_of(fit.method).identity([fit.concept])
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=repr).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Store:
    """Finished parts: one small JSON file each, written last, and a folder where weights belong to it."""

    folder: Path
    since: float = 0.0  # older ones do not count

    def weights(self, part: Part) -> Path:
        return self.folder / key_of(part)

    def read(self, part: Part) -> dict[str, Any] | None:
        """A part's result, or None."""
        file = self._file(part)
        try:
            if file.stat().st_mtime < self.since:
                return None
            data = json.loads(file.read_text(encoding="utf-8"))
            return data["result"] if data["key"] == key_of(part) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, part: Part, result: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {"key": key_of(part), "kind": type(part).__name__, "part": asdict(part), "result": result}
        draft = self._file(part).with_suffix(f".{os.getpid()}.part")
        draft.write_text(json.dumps(data) + "\n", encoding="utf-8")
        draft.replace(self._file(part))

    def _file(self, part: Part) -> Path:
        return self.folder / f"{key_of(part)}.json"


# ------------------------------------------------------------------------------------------------------- work


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of loading, and no word about text encoders that a LoRA of a UNet has no weights for."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _no_progress_bars():
            yield
    finally:
        logging.set_verbosity(before)


@cache
def neighbours() -> Neighbours:
    return find_neighbours(load_pipeline())


@cache
def new_objects() -> NewObjects:
    return NewObjects(load_judge(), load_unseen_images())


def run_part(part: Part, store: Store) -> dict[str, Any]:
    """Do a part, of which those that it builds on are stored."""
    started = time.process_time()
    if isinstance(part, Fit):
        result = make_erasure(part, store)
    elif isinstance(part, Training):
        result = fine_tune(part, store)
    elif isinstance(part, View):
        result = look(part, store)
    else:
        result = compare(part, store)
    return {**result, "seconds": round(time.process_time() - started, 2)}


def make_erasure(fit: Fit, store: Store) -> dict[str, Any]:
    anchors = entry_of(fit.method).anchors([fit.concept])
    erasure = entry_of(fit.method).make(fast_pipeline(), [fit.concept], anchors, retained([fit.concept], anchors))
    assert erasure is not None
    shutil.rmtree(store.weights(fit), ignore_errors=True)  # of a run that was broken off
    erasure.save_pretrained(store.weights(fit))
    return {"anchors": anchors}


def exported(fit: Fit, store: Store) -> Any:
    """The erased model as its users get it: exported, and loaded as any model."""
    from diffusers import DiffusionPipeline

    pipe: Any = load_pipeline()
    pipe.load_erasure(store.weights(fit), strict_base="error")
    with tempfile.TemporaryDirectory() as folder:
        pipe.export_erased(folder)
        return with_fast_sampling(DiffusionPipeline.from_pretrained(folder, local_files_only=True))


def fine_tune(training: Training, store: Store) -> dict[str, Any]:
    """Train the LoRA."""
    pipe = exported(training.fit, store) if training.fit else fast_pipeline()
    data = training_set(training.data, training.concept, neighbours())
    before = noise_loss(pipe, data)
    train_lora(pipe, data, training.checkpoints, store.weights(training), training.recipe, training.seed)
    return {"loss": [before, noise_loss(pipe, data)], "pictures": len(data.images)}


@lru_cache(maxsize=1)
def load_model(model: Model, store: Store) -> Any:
    """The pipeline, put together as its user would."""
    pipe = exported(model.fit, store) if model.way == SEQUENTIAL and model.fit else fast_pipeline()
    if model.training:
        pipe.load_lora_weights(store.weights(model.training) / str(model.step))
    if model.way == MODULAR and model.fit:
        pipe.load_erasure(store.weights(model.fit), strict_base="error")
    return pipe


def shots_of(view: View) -> tuple[Shot, ...]:
    return shots_for(view.cell, view.concept, view.data, neighbours(), view.settings.counts, view.seed)


def look(view: View, store: Store) -> dict[str, Any]:
    """Draw, and say in which images the object of the prompt is seen."""
    pipe, shots = load_model(view.model, store), shots_of(view)
    images: list[Any] = []
    for start in range(0, len(shots), BATCH):
        chunk = shots[start : start + BATCH]
        images += pipe(
            [shot.prompt for shot in chunk],
            num_inference_steps=view.settings.drawing_steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(shot.seed) for shot in chunk],
        ).images
    wanted = [shot.object for shot in shots]
    if view.cell == LEARNT and view.data == NEW:
        hits = new_objects().right(images, wanted)
    else:
        hits = [a == b for a, b in zip(load_judge().predict(images).objects, wanted, strict=True)]
    return {"hits": [int(hit) for hit in hits]}


@lru_cache(maxsize=1)
def erased_weights(fit: Fit, store: Store) -> dict[str, torch.Tensor]:
    return weight_changes(exported(fit, store), load_pipeline())


def compare(part: Comparison, store: Store) -> dict[str, Any]:
    """How far a LoRA points against an erasure."""
    last = str(part.training.checkpoints[-1])
    pipe: Any = load_pipeline()
    pipe.load_lora_weights(store.weights(part.training) / last)
    cosine, undone = undoing(lora_deltas(pipe), erased_weights(part.fit, store))
    return {"cosine": cosine, "undone": undone}


def run_and_store(parts: Sequence[Part], store: Store) -> list[dict[str, Any]]:
    """Run parts, and read them back, so that a stored and a fresh result are the same."""
    torch.set_num_threads(1)
    for part in parts:
        with quiet():
            store.write(part, run_part(part, store))
    results = [store.read(part) for part in parts]
    return [result for result in results if result is not None]


def run_all(parts: Iterable[Part], store: Store, jobs: int, label: str) -> dict[Part, dict[str, Any]]:
    """The results of parts that do not build on one another: the stored ones and, in `jobs` processes, the others."""
    results = {part: store.read(part) for part in parts}
    groups: dict[Any, list[Part]] = {}  # what loads the same model follows on one another
    for part, result in results.items():
        if result is None:
            same = part.model if isinstance(part, View) else part.fit if isinstance(part, Comparison) else part
            groups.setdefault(same, []).append(part)
    with tqdm(desc=label, total=sum(map(len, groups.values())), disable=not groups) as bar:
        for group, done in finished(list(groups.values()), run_and_store, store, jobs):
            results |= zip(group, done, strict=True)
            bar.update(len(group))
    return {part: result for part, result in results.items() if result is not None}
