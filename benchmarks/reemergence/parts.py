"""What is done once and stored: erasures, fine-tunings, images and comparisons, each built on those before."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from benchmarks.drawing import draw_shots
from benchmarks.efficacy.methods import Fit, make_fit
from benchmarks.efficacy.plan import Neighbours, Shot, find_neighbours
from benchmarks.reemergence.lora import Recipe, lora_deltas, noise_loss, train_lora, undoing, weight_changes
from benchmarks.reemergence.new_objects import NewObjects
from benchmarks.reemergence.plan import LEARNT, NEW, Counts, shots_for, training_set
from benchmarks.store import Store, do_all
from diffusers_erasure.demo import load_judge, load_pipeline, load_unseen_images, no_progress_bars
from diffusers_erasure.demo.drawing import STEPS, fast_pipeline


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


class BuiltOnFit:
    """A part that depends on its own fields and, where it has one, on the erasure `fit`."""

    def identity(self: Any) -> dict[str, Any]:
        return {"part": asdict(self), "fit": self.fit.identity() if self.fit else None}


@dataclass(frozen=True)
class Training(BuiltOnFit):
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
class View(BuiltOnFit):
    """Images of one model."""

    model: Model
    cell: str
    concept: str  # whose prompts are drawn; with `LEARNT` "" for new objects
    data: str  # which objects are drawn with `LEARNT`
    seed: int
    settings: Settings

    @property
    def fit(self) -> Fit | None:
        return self.model.fit


@dataclass(frozen=True)
class Comparison(BuiltOnFit):
    """The weights that a LoRA adds, against those that an erasure changes."""

    fit: Fit
    training: Training


Part = Fit | Training | View | Comparison


# ------------------------------------------------------------------------------------------------------- work


def run_all(parts: Iterable[Part], store: Store, jobs: int, label: str) -> dict[Part, dict[str, Any]]:
    """The results of parts that do not build on one another: the stored ones and, in `jobs` processes, the others."""
    return do_all(parts, run_part, store, jobs, label=label, together=what_is_loaded)


def what_is_loaded(part: Part) -> Hashable:
    """Parts that load the same model follow on one another."""
    return part.model if isinstance(part, View) else part.fit if isinstance(part, Comparison) else part


def run_part(part: Part, store: Store) -> dict[str, Any]:
    """Do a part, of which those that it builds on are stored."""
    started = time.process_time()
    with quiet():
        if isinstance(part, Fit):
            result = make_fit(part, store)
        elif isinstance(part, Training):
            result = fine_tune(part, store)
        elif isinstance(part, View):
            result = look(part, store)
        else:
            result = compare(part, store)
    return {**result, "seconds": round(time.process_time() - started, 2)}


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of loading, and no word about text encoders that a LoRA of a UNet has no weights for."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        logging.set_verbosity(before)


@cache
def neighbours() -> Neighbours:
    return find_neighbours(load_pipeline())


@cache
def new_objects() -> NewObjects:
    return NewObjects(load_judge(), load_unseen_images())


def exported(fit: Fit, store: Store) -> Any:
    """The erased model as its users get it: exported, and loaded as any model."""
    pipe: Any = load_pipeline()
    pipe.load_erasure(store.files_of(fit), strict_base="error")
    with tempfile.TemporaryDirectory() as folder:
        pipe.export_erased(folder)
        loaded = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return fast_pipeline(loaded)


def fine_tune(training: Training, store: Store) -> dict[str, Any]:
    """Train the LoRA."""
    pipe = exported(training.fit, store) if training.fit else fast_pipeline()
    data = training_set(training.data, training.concept, neighbours())
    before = noise_loss(pipe, data)
    train_lora(pipe, data, training.checkpoints, store.new_files(training), training.recipe, training.seed)
    return {"loss": [before, noise_loss(pipe, data)], "pictures": len(data.images)}


@lru_cache(maxsize=1)
def load_model(model: Model, store: Store) -> Any:
    """The pipeline, put together as its user would."""
    pipe = exported(model.fit, store) if model.way == SEQUENTIAL and model.fit else fast_pipeline()
    if model.training:
        pipe.load_lora_weights(store.files_of(model.training) / str(model.step))
    if model.way == MODULAR and model.fit:
        pipe.load_erasure(store.files_of(model.fit), strict_base="error")
    return pipe


def shots_of(view: View) -> tuple[Shot, ...]:
    return shots_for(view.cell, view.concept, view.data, neighbours(), view.settings.counts, view.seed)


def look(view: View, store: Store) -> dict[str, Any]:
    """Draw, and say in which images the object of the prompt is seen."""
    shots = shots_of(view)
    images = draw_shots(load_model(view.model, store), shots, view.settings.drawing_steps)
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
    pipe: Any = load_pipeline()
    pipe.load_lora_weights(store.files_of(part.training) / str(part.training.checkpoints[-1]))
    cosine, undone = undoing(lora_deltas(pipe), erased_weights(part.fit, store))
    return {"cosine": cosine, "undone": undone}
