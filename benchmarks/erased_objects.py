"""Erasures of single objects, made once and loaded in turn, for benchmarks that draw the same images with each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np

from benchmarks.efficacy.methods import ENTRIES, Entry
from benchmarks.efficacy.numbers import Samples
from benchmarks.efficacy.plan import Shot, spread
from benchmarks.store import Store, do_all
from diffusers_erasure.demo import load_pipeline
from diffusers_erasure.demo.drawing import fast_pipeline


# UCE as either of its layers is one edit on the base alone, and two beside a LoRA on the same projections.
METHODS: dict[str, Entry] = {
    **{name: entry for name, entry in ENTRIES.items() if entry.erases},
    "uce": replace(ENTRIES["uce"], settings={"layer": "lora"}),
    "uce (text map)": Entry("uce (text map)", {"layer": "text_map"}, objects={}),
}
DEFAULT_METHODS = ("uce", "uce (text map)", "esd")


@dataclass(frozen=True)
class Erased:
    """The erasure of one object by a row of [`METHODS`]."""

    method: str
    target: str

    def identity(self) -> dict[str, Any]:
        return {"entry": METHODS[self.method].identity([self.target]), "target": self.target}


def make_erased(item: Erased, store: Store) -> dict[str, Any]:
    """Make the erasure on the CPU, and put it into the store."""
    erasure = METHODS[item.method].make([item.target])
    assert erasure is not None
    erasure.save_pretrained(store.new_files(item))
    return {}


def make_all(methods: Iterable[str], targets: Iterable[str], store: Store, jobs: int) -> None:
    """All erasures that are not stored yet."""
    do_all(
        [Erased(method, name) for method in methods for name in targets], make_erased, store, jobs, label="erasures"
    )


@contextmanager
def erased(pipe: Any, method: str | None, target: str, store: Store) -> Iterator[None]:
    """The pipeline with a stored erasure, or with none."""
    if method is None:
        yield
        return
    pipe.load_erasure(store.files_of(Erased(method, target)), "measured")
    try:
        yield
    finally:
        pipe.unload_erasure("measured")


def embedded(device: str) -> Any:
    """The embedded model as the demo draws with it, on a device."""
    return fast_pipeline(load_pipeline(device=device))


def shots_of(target: str, images: int, seed: int) -> tuple[Shot, ...]:
    """Prompts that name the target, in all styles and wordings, with other first noises for each seed."""
    return tuple(
        replace(shot, seed=crc32(f"{seed}: {shot.seed}".encode())) for shot in spread("erased", (target,), images)
    )


def samples(hits: Mapping[str, Sequence[bool]], before: Mapping[str, Sequence[bool]] | None = None) -> Samples:
    """Whether the target is seen in each image, by target, beside the same images without something."""
    before = hits if before is None else before
    clusters = tuple(target for target, seen in hits.items() for _ in seen)
    values, baseline = (np.array([float(hit) for target in hits for hit in each[target]]) for each in (hits, before))
    return Samples(clusters, values, baseline)
