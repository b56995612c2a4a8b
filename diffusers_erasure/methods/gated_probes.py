"""Probes of the gated edit: directions of text rows that tell a name from all else that is kept, and their thresholds.

Fisher's discriminant: with S the covariance of all rows, mu the mean of the kept ones and m_j that of the rows of name j's last word piece,

    w_j = (S + ridge tr(S) / C)^-1 (m_j - mu).

A threshold stands between what the kept prompts reach in contexts that were held out, and what the name reaches there. Pooled vectors
that another encoder makes than the rows (FLUX.1's) have such probes too, where these are sure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..layers.gated_map import in_two
from ..lists import names_any
from ..schema import Concept
from .gated_reading import (
    WHOLE,
    Name,
    Reading,
    Split,
    evenly,
    kept_prompts,
    long_prompts,
    named_rows,
    read_names,
)
from .gated_settings import Settings


APART = 1.0  # standard deviations of the kept prompts' values between the highest of them and a threshold
WORSE = 5.0  # than a missed prompt is an opened one that is kept
SURE = 4.0  # standard deviations of the kept prompts' values between them and a name that was not asked for


@dataclass
class Sums:
    """Sums over rows [.., C], so that these need not lie in memory together: float64."""

    count: int
    total: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def empty(cls, width: int) -> "Sums":
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def add(self, rows: torch.Tensor) -> None:
        """Take in rows [N, C]."""
        rows = rows.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.squares.addmm_(rows.T, rows)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(1, self.count)


def directions(kept: Sums, named: Sequence[torch.Tensor], ridge: float) -> torch.Tensor:
    """Fisher's directions [names, C] between the kept rows and each name's rows [n, C].

    They are scaled to a largest entry of 1 and rounded to half precision, in which files may be saved: thresholds are those of what
    is saved.
    """
    mean, width = kept.mean, len(kept.mean)
    everything = Sums(kept.count, kept.total.clone(), kept.squares.clone())
    for rows in named:
        everything.add(rows)
    center = everything.mean
    covariance = everything.squares / everything.count - torch.outer(center, center)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    ways = torch.stack([rows.double().mean(0) - mean for rows in named])
    found = torch.cholesky_solve(ways.T, torch.linalg.cholesky(covariance)).T
    return (found / found.abs().amax(1, keepdim=True).clamp_min(1e-300)).half().float()


def highest(rows: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    """What each probe [P, C] reaches at most among a prompt's rows [L, C]: [P], as a gate reads it."""
    return (rows.float() @ probes.T).amax(0)


def thresholds(named: Sequence[torch.Tensor], kept: torch.Tensor, share: float) -> torch.Tensor:
    """Where probes open: the given share of the way from the highest kept value to the lowest of the name.

    Contexts in which an encoder hardly reads the name are left out, at most a quarter, as long as the threshold would stand less than
    `APART` standard deviations above what is kept. Where that is not enough the threshold is where what it loses is least, and an
    opened kept prompt counts as `WORSE` times as much as a missed one that names the concept: many more prompts are kept.

    Args:
        named: of each probe what it reached for its own name [n].
        kept (`torch.Tensor`): what each reached for prompts that do not name it [N, P]; -inf where one does.
        share (`float`): between 0, just above all that is kept, and 1, just below all that names it. 0 is for those who would rather
            lose what is kept: where the two overlap it is just below the lower end, so that every prompt that may name it opens the gate.
    """
    found = []
    for values, others in zip(named, kept.double().T, strict=True):
        own = values.double().sort().values
        others = others[others.isfinite()]
        if not len(others):
            others = own[:1] - own[:1].abs().clamp_min(1.0)
        high, spread = others.amax(), others.std(correction=0)
        if share == 0.0:
            # What reaches a threshold exactly does not open, and of a name that overlaps the lowest is to.
            below = own[0] - 1e-4 * (high - own[0]) - 1e-6 * own[0].abs()
            found.append(below if own[0] <= high else high)
            continue
        clear = [t for low in own[: len(own) // 4 + 1] if (t := high + share * (low - high)) >= high + APART * spread]
        found.append(clear[0] if clear else _least_loss(own, others, share))
    return torch.stack(found)


def _least_loss(own: torch.Tensor, others: torch.Tensor, share: float) -> torch.Tensor:
    """The threshold between two neighbouring values that loses least of overlapping ones, both sorted or not, float64."""
    values = torch.cat([own, others]).sort().values
    missed = (own[None] < values[1:, None]).double().mean(1)
    opened = (others[None] > values[:-1, None]).double().mean(1)
    best = int((missed + WORSE * opened).argmin())
    return values[best] + share * (values[best + 1] - values[best])


@dataclass(frozen=True)
class Gates:
    """Probes with their thresholds, and what they did in contexts that were held out.

    Attributes:
        names: what they look for: all that were given, and of the others those that can be told from what is kept.
        probes: [P, C].
        thresholds: [P], float64.
        missed: by target the share of its tested prompts that open none of its probes.
        opened: kept tested prompts that open a gate, and the targets whose gate it is.
        tested: how many kept prompts were tested.
        blurred: names whose thresholds could not stand between them and what is kept.
    """

    names: tuple[Name, ...]
    probes: torch.Tensor
    thresholds: torch.Tensor
    missed: dict[str, float]
    opened: dict[str, list[str]]
    tested: int
    blurred: list[str]


@dataclass(frozen=True)
class Kept:
    """Prompts that must not open a gate: those to fit probes, to set thresholds, and to test them.

    Attributes:
        fitting, setting, testing: the prompts.
        lists: what is encoded to know them, list by list: short prompts, and those of which all rows are looked at, as a running gate
            does. They may hold more than is kept.
    """

    fitting: list[str]
    setting: list[str]
    testing: list[str]
    lists: tuple[tuple[list[str], list[str]], ...]

    @classmethod
    def of(cls, reading: Reading, words: Sequence[tuple[Sequence[str], Sequence[str]]], settings: Settings) -> "Kept":
        """Of some lists of words, each with what prompts are made of, in contexts in which all encoders read them whole."""
        split = Split.of(settings.template_list)
        kinds: tuple[list[str], list[str], list[str]] = [], [], []
        lists: list[tuple[list[str], list[str]]] = []
        for kept, made_of in words:
            short, whole, all_kept = [], [] if lists else [""], set(kept)
            for kind, own, more in zip(
                kinds, kept_prompts(made_of, split, settings.kept_contexts), long_prompts(made_of), strict=True
            ):
                known = set(reading.readable([each.prompt for each in (*own, *more)]))
                own, more = ([each for each in some if each.prompt in known] for some in (own, more))
                seen = {each.prompt for each in (*evenly(own, WHOLE), *more)}
                whole += sorted(seen)
                short += [each.prompt for each in own if each.prompt not in seen]
                kind += [each.prompt for each in (*own, *more) if all_kept.issuperset(each.words)]
            lists.append((short, whole))
        fitting, setting, testing = kinds
        return cls(list(dict.fromkeys([*fitting, ""])), setting, testing, tuple(lists))


def fit_gates(
    reading: Reading, concepts: Sequence[Concept], names: Sequence[Name], prompts: Kept, settings: Settings
) -> Gates:
    """Fit probes, set their thresholds, and test them, each in contexts of its own."""
    fitting, setting, testing = prompts.fitting, prompts.setting, prompts.testing
    kept_rows: dict[str, torch.Tensor] = {}
    for short, whole in prompts.lists:
        kept_rows |= reading.of_kept(short, whole)
    read_names(reading, names, concepts)
    sums = Sums.empty(reading.sources[0].width)
    for prompt in fitting:
        sums.add(kept_rows[prompt])
    probes = directions(sums, [named_rows(reading, name, name.split.fitting) for name in names], settings.probe_ridge)

    def highest_of(prompt: str) -> torch.Tensor:
        rows = kept_rows.get(prompt)
        return highest(reading.rows(prompt) if rows is None else rows, probes)

    def reached(prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack([highest_of(prompt) for prompt in prompts]) if prompts else torch.zeros(0, len(names))

    own = [reached(name.within(name.split.setting))[:, i] for i, name in enumerate(names)]
    targets = [str(concept.target) for concept in concepts]
    kept = torch.cat([reached(setting or [""]), _beside(reached, names, targets)])
    limits = thresholds(own, kept, 0.0 if settings.strict else settings.share)
    blurred = [float(kept[:, i].amax()) >= float(own[i].amin()) for i in range(len(names))]
    tested = reached(testing)
    # What was not asked for must not cost what is kept.
    clear = [
        _gap(own[i], kept[:, i]) >= SURE and not bool((tested[:, i] > limits[i]).any()) for i in range(len(names))
    ]
    used = [i for i, name in enumerate(names) if clear[i] or not name.made]
    names, probes, limits = [names[i] for i in used], probes[used], limits[used]
    unsure = [name.text for name, i in zip(names, used, strict=True) if blurred[i]]

    def opened(prompt: str) -> set[int]:
        values = highest_of(prompt)
        return {name.concept for i, name in enumerate(names) if float(values[i]) > float(limits[i])}

    missed: dict[str, float] = {}
    for index, target in enumerate(targets):
        own_prompts = [
            prompt for n in names if n.concept == index and not n.made for prompt in n.within(n.split.testing)
        ]
        missed[target] = sum(index not in opened(prompt) for prompt in own_prompts) / max(1, len(own_prompts))
    false = {prompt: sorted(targets[i] for i in found) for prompt in testing if (found := opened(prompt))}
    return Gates(tuple(names), probes, limits, missed, false, len(testing), unsure)


def fit_pooled_gates(
    reading: Reading, concepts: Sequence[Concept], names: Sequence[Name], prompts: Kept, settings: Settings
) -> dict[str, torch.Tensor]:
    """Probes of pooled vectors as the layer's tensors: of names that they tell from all that is kept, none where there are none."""
    if not (reading.apart and prompts.setting):
        return {}
    names = [name for name in names if not name.made]
    sums = Sums.empty(reading.vectors_of([""]).shape[1])
    sums.add(reading.vectors_of(prompts.fitting))
    named = [reading.vectors_of(name.within(name.split.fitting)) for name in names]
    probes = directions(sums, named, settings.probe_ridge)

    def reached(some: Sequence[str]) -> torch.Tensor:
        return reading.vectors_of(some) @ probes.T if some else torch.zeros(0, len(names))

    targets = [str(concept.target) for concept in concepts]
    own = [reached(name.within(name.split.setting))[:, i] for i, name in enumerate(names)]
    kept = torch.cat([reached(prompts.setting), _beside(reached, names, targets)])
    limits = thresholds(own, kept, 0.0 if settings.strict else settings.share)
    opened = (reached(prompts.testing) > limits).any(0)
    gaps = [_gap(own[i], kept[:, i]) for i in range(len(names))]
    clear = [i for i, gap in enumerate(gaps) if (gap > 0 if settings.strict else gap >= SURE and not opened[i])]
    if not clear:
        return {}
    concept_of = [names[i].concept for i in clear]
    return {
        "pooled_probes": probes[clear],
        "pooled_thresholds": in_two(limits[clear]),
        "pooled_probe_counts": torch.tensor([concept_of.count(i) for i in range(len(concepts))]).float(),
    }


def _beside(
    reached: Callable[[Sequence[str]], torch.Tensor], names: Sequence[Name], targets: Sequence[str]
) -> torch.Tensor:
    """What probes reach for the prompts of the other concepts [N, names]; -inf where these name the probe's own."""
    others = [(name.concept, prompt) for name in names if not name.made for prompt in name.within(name.split.setting)]
    values = reached([prompt for _, prompt in others])
    for row, (concept, prompt) in enumerate(others):
        for i, name in enumerate(names):
            if name.concept == concept or names_any(prompt, [name.text, targets[name.concept]]):
                values[row, i] = -torch.inf
    return values


def _gap(own: torch.Tensor, kept: torch.Tensor) -> float:
    """How far a name's lowest value lies above the highest of what is kept, in standard deviations of the latter."""
    others = kept[kept.isfinite()]
    return float(own.amin() - others.amax()) / max(float(others.std()), 1e-12) if len(others) > 1 else 0.0
