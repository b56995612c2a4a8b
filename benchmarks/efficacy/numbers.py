"""From what the judge saw to numbers: shares, and intervals by resampling."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.efficacy.plan import Job, Shot, members
from diffusers_erasure.demo.words import HYPERNYMS, OBJECTS, STYLES, SYNONYMS
from diffusers_erasure.lists.kinds import kind_of, wider_kinds


RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Seen:
    """What the judge sees in an image: the likeliest object and style, and how likely it finds them."""

    object: str
    style: str
    object_confidence: float
    style_confidence: float


@dataclass(frozen=True)
class Samples:
    """
    One value for each image of a cell.

    Args:
        clusters (`tuple[str, ...]`): The concept that each image belongs to, for resampling.
        values (`np.ndarray`): float64 [n].
        baseline (`np.ndarray`): The same of the un-erased model, [n].
    """

    clusters: tuple[str, ...]
    values: np.ndarray
    baseline: np.ndarray


@dataclass(frozen=True)
class Number:
    """A value with its 95 % interval and the images behind it."""

    value: float
    low: float
    high: float
    images: int


# ---------------------------------------------------------------------------------------------------- one image


def is_seen(job: Job, shot: Shot, seen: Seen) -> bool:
    """Whether the judge sees the object that the prompt names, or its style where a style is erased."""
    return seen.style == shot.style if job.of_styles else seen.object == shot.object


def is_other_right(job: Job, shot: Shot, seen: Seen) -> bool:
    """The rest of the prompt: the style where objects are erased, the object where a style is."""
    return seen.object == shot.object if job.of_styles else seen.style == shot.style


def shown_by(anchor: str, target: str = "") -> set[str]:
    """
    The objects that show an anchor: itself, what it is another name of, or all that the captions of the model's training call by
    it. A word that the judge does not know but that is of the target's kind, as picked anchors may be, is shown by objects of the
    target's hypernym.
    """
    if anchor in OBJECTS:
        return {anchor}
    named = {name for name, words in SYNONYMS.items() if anchor in words}
    if named or members(anchor):
        return named or members(anchor)
    kind, own = kind_of(anchor), kind_of(target)
    return members(HYPERNYMS[target]) if kind and own and kind in wider_kinds(own) and target in HYPERNYMS else set()


def has_measured_anchor(job: Job, anchor: str, target: str = "") -> bool:
    """Whether it can be told if an image shows the anchor: no object means the empty prompt, for instance."""
    return job.of_styles or bool(shown_by(anchor, target))


def is_anchor(job: Job, shot: Shot, seen: Seen, anchor: str) -> bool:
    """
    Whether the judge takes an image of an erased prompt for the anchor.

    For an object mapped to a hypernym: it names another object which the captions of the model's training call by this
    hypernym (a parrot is a "bird" and an "animal") and which is not erased too. For an object mapped to another object:
    it names that. For a style mapped to a style: it names that and the object of the prompt. For a style mapped to
    anything else: it names any other style and the object of the prompt, so that a picture that fell apart is no
    success.

    The judge always names something, also in noise: hence the mean of its confidence next to this share.
    """
    if job.of_styles:
        styles = {anchor} if anchor in STYLES else set(STYLES) - set(job.targets)
        return seen.style in styles and seen.object == shot.object
    shown = shown_by(anchor, shot.concept)
    return seen.object in (shown if anchor in OBJECTS else shown - set(job.targets))


# --------------------------------------------------------------------------------------------------- one number


def harmonic(a: Any, b: Any) -> Any:
    """The harmonic mean of two shares, 0 where one is 0."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.where((a > 0) & (b > 0), 2 * a * b / np.maximum(a + b, 1e-300), 0.0)


def resampled_means(samples: Samples, picks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """
    Means of values and baseline over resampled concepts and, within each, resampled images.

    Args:
        samples ([`Samples`]): n images in C clusters.
        picks (`np.ndarray`): For each resample the clusters that it takes, integers below C, [resamples, C].
        rng (`np.random.Generator`): Draws the images.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: float64 [resamples] each.
    """
    names = sorted(set(samples.clusters))
    places = [[i for i, cluster in enumerate(samples.clusters) if cluster == name] for name in names]
    sizes = np.array([len(each) for each in places])
    padded = np.zeros((len(names), sizes.max()), int)
    for row, each in zip(padded, places, strict=True):
        row[: len(each)] = each
    sums, base_sums, counts = (np.zeros(len(picks)) for _ in range(3))
    for cluster in picks.T:
        size = sizes[cluster][:, None]
        index = (rng.random((len(picks), padded.shape[1])) * size).astype(int)
        index = padded[cluster[:, None], index]
        inside = np.arange(padded.shape[1]) < size
        sums += (samples.values[index] * inside).sum(1)
        base_sums += (samples.baseline[index] * inside).sum(1)
        counts += size[:, 0]
    return sums / counts, base_sums / counts


class Bootstrap:
    """Resamples cells, seeded. Cells over the same concepts take the same concepts, so that they vary together."""

    def __init__(self, seed: int = SEED, resamples: int = RESAMPLES) -> None:
        self.seed, self.resamples = seed, resamples

    def means(self, samples: Samples, stream: int = 1) -> tuple[np.ndarray, np.ndarray]:
        names = sorted(set(samples.clusters))
        concepts = np.random.default_rng([self.seed, 0, zlib.crc32("|".join(names).encode())])
        picks = concepts.integers(len(names), size=(self.resamples, len(names)))
        return resampled_means(samples, picks, np.random.default_rng([self.seed, stream]))

    def mean(self, samples: Samples) -> Number:
        return self._number(samples.values.mean(), self.means(samples)[0], samples)

    def ratio(self, samples: Samples) -> Number:
        """The mean as a share of the baseline's, on the same images in each resample."""
        values, baseline = self.means(samples)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._number(samples.values.mean() / samples.baseline.mean(), values / baseline, samples)

    def difference(self, samples: Samples) -> Number:
        """The mean less the baseline's, on the same images in each resample."""
        values, baseline = self.means(samples)
        return self._number(samples.values.mean() - samples.baseline.mean(), values - baseline, samples)

    def harmonic(self, erased: Samples, kept: Samples) -> Number:
        """H_o: the harmonic mean of 1 - acc_e and acc_r."""
        value = float(harmonic(1 - erased.values.mean(), kept.values.mean()))
        drawn = harmonic(1 - self.means(erased)[0], self.means(kept, stream=2)[0])
        return self._number(value, drawn, erased)

    def _number(self, value: float, drawn: np.ndarray, samples: Samples) -> Number:
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (np.nan, np.nan)
        return Number(float(value), float(low), float(high), len(samples.values))


# --------------------------------------------------------------------------------------------------- one row


def gather(
    jobs: Sequence[Job], seen: Sequence[Sequence[Seen]], baseline: Sequence[Sequence[Seen]], cell: str, score: Any
) -> Samples | None:
    """
    The images of a cell in all jobs of a scenario.

    Args:
        jobs (sequence of [`Job`]): The scenario's erasures.
        seen, baseline: What the judge saw in each shot of each job, with the method and without.
        cell (`str`): Which shots.
        score (`Callable`): From a job, a shot and what was seen in it to a number.

    Returns:
        [`Samples`] or `None`: Clustered by the job where each erases one concept, or else by the concept of the shot.
    """
    clusters, values, base = [], [], []
    for job, each, without in zip(jobs, seen, baseline, strict=True):
        for place in job.cell(cell):
            shot = job.shots[place]
            clusters.append(job.targets[0] if len(job.targets) == 1 else shot.concept)
            values.append(float(score(job, shot, each[place])))
            base.append(float(score(job, shot, without[place])))
    return Samples(tuple(clusters), np.array(values), np.array(base)) if values else None


def measure(
    jobs: Sequence[Job],
    seen: Sequence[Sequence[Seen]],
    baseline: Sequence[Sequence[Seen]],
    anchors: Mapping[str, str],
    bootstrap: Bootstrap,
    floor: Sequence[Sequence[Seen]] | None = None,
) -> dict[str, Number]:
    """
    All numbers of one method in one scenario.

    Args:
        jobs (sequence of [`Job`]): The scenario's erasures.
        seen, baseline: What the judge saw in each shot of each job, with the method and without.
        anchors (`Mapping[str, str]`): What each target was mapped to.
        bootstrap ([`Bootstrap`]): For the intervals.
        floor: What the judge saw in each shot where the anchor stood in its prompt instead of the target; with it what is erased is also
            compared with that, image by image.
    """

    def cell(name: str, score: Any = is_seen) -> Samples | None:
        return gather(jobs, seen, baseline, name, score)

    def confidence(job: Job, shot: Shot, seen: Seen) -> float:
        return seen.style_confidence if job.of_styles else seen.object_confidence

    def anchor_seen(job: Job, shot: Shot, seen: Seen) -> bool:
        return is_anchor(job, shot, seen, anchors[shot.concept])

    erased, kept, near, synonyms = cell("erased"), cell("kept"), cell("near"), cell("synonyms")
    assert erased is not None and kept is not None and near is not None
    numbers = {"acc_e": bootstrap.mean(erased)}
    over = None if floor is None else gather(jobs, seen, floor, "erased", is_seen)
    if over:
        numbers["over"] = bootstrap.difference(over)
    if synonyms:
        numbers["acc_e_synonyms"] = bootstrap.mean(synonyms)
    numbers |= {"acc_r": bootstrap.mean(kept), "acc_r_ratio": bootstrap.ratio(kept)}
    if not jobs[0].of_styles:  # a style's nearest are all the kept ones
        numbers |= {"acc_r_near": bootstrap.mean(near), "acc_r_near_ratio": bootstrap.ratio(near)}
    numbers["h_o"] = bootstrap.harmonic(erased, kept)
    measured = all(has_measured_anchor(job, anchors[target], target) for job in jobs for target in job.targets)
    for name, of, score in (
        ("anchor", "erased", anchor_seen if measured else None),
        ("confidence", "erased", confidence),
        ("other", "kept", is_other_right),
    ):
        samples = cell(of, score) if score else None
        if samples:
            numbers[name] = bootstrap.mean(samples)
    return numbers


def shares_by(jobs: Sequence[Job], seen: Sequence[Sequence[Seen]], cell: str, key: str) -> dict[str, float]:
    """Shares of a cell's images in which the judge sees what the prompt names, by an attribute of the shot."""
    groups: dict[str, list[bool]] = {}
    for job, each in zip(jobs, seen, strict=True):
        for place in job.cell(cell):
            shot = job.shots[place]
            groups.setdefault(getattr(shot, key), []).append(is_seen(job, shot, each[place]))
    return {name: statistics.mean(hits) for name, hits in groups.items()}
