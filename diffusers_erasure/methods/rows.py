"""Which text rows the closed-form methods (UCE, RECE, SPEED, DP, OCE) map, and which they keep."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from ..base_model import family_of
from ..encoding import Source, part_widths, pooled_source, row_sources, short_enough
from ..families import POOLED_INPUTS, ROW_INPUTS
from ..lists import Retained
from ..schema import Concept, SolveRows
from ..settings import Number, Whole, check_settings
from ..settings.texts import Retain, Templates, recorded_settings, template_list
from .holding import held_prompts, others_than


Which = Literal["last", "window", "all", "whole"]
SAME = 1e-7  # singular values below this share of the largest are float32's rounding


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Settings that say which text rows are mapped; the closed-form methods' own settings come on top.

    Those that are left out (`None`) come from the method's preset.

    Args:
        rows (`"last"`, `"window"`, `"all"` or `"whole"`, *optional*): which rows of a target's encoding are mapped.
            `"last"` is the row of its last word piece; `"window"` that row and all after it, padding included; `"all"` all
            rows but the start token's; `"whole"` that one too. T5 reads in both directions, so that a word is in every row:
            for Stable Diffusion 3, FLUX.1 and others the methods take more rows by default than for CLIP.
        eot (`bool`, *optional*, defaults to `False`): with `rows="last"`, map the row of the first end-of-text token besides
            (T5: of its end token); the others hold it anyway. Where prompts end in no such token it is an error.
        after_weight (`float`, *optional*, defaults to 1.0): weight of the rows behind a prompt's last word piece, that of
            `eot` among them, where that piece's own row has 1.
        templates (`str` or tuple of `str`, *optional*): `"object"`, `"style"`, `"person"`, `"object_context"`,
            `"style_context"`, `"none"`, or prompts, with `{}` for the concept, in which each target and its anchor are encoded.
        retain (tuple of `str`, *optional*): prompts that must not change.
        retain_templates (`bool`, *optional*): encode the retained prompts in the templates too, where the text encoders take them.
        pooled (`bool`, *optional*, defaults to `True`): SDXL, Stable Diffusion 3, FLUX.1: map the pooled text vector as well.
        per_encoder (`bool`, *optional*): SDXL, Stable Diffusion 3: map what each CLIP makes of a row by itself, so that the
            erasure acts whatever `prompt_2` is. Off, both are mapped together, as published, and a call with another `prompt_2`
            is refused.
        max_sequence_length (`int`, *optional*, defaults to 0): Stable Diffusion 3, FLUX.1 and others: how many rows T5 makes of
            a prompt, as in calls of the pipeline. 0 for the pipeline's own number: 512 for FLUX.1 dev, 256 for schnell and Stable
            Diffusion 3.
        directions (`int`, *optional*): let all rows of a concept go to its anchor's in so many directions, those in which they go
            farthest; 0 for each row's own. UCE's map has the rank of these.
        rank (`int`, *optional*): truncate the published LoRA or map to this rank; the error is recorded. 0 for the exact one.
            Where each text encoder's half is mapped by itself, it is the rank of each.
        max_error (`float`, *optional*): truncate to the least rank whose relative error is no larger (that of each half, where
            these are mapped by themselves); 0 for no truncation.
    """

    rows: Which | None = None
    eot: bool | None = None
    after_weight: Annotated[float | None, Number(above=0)] = None
    templates: Templates = None
    retain: Retain = ()
    retain_templates: bool | None = None
    pooled: bool = True
    per_encoder: bool | None = None
    max_sequence_length: Annotated[int, Whole(least=0)] = 0
    directions: Annotated[int | None, Whole(least=0)] = None
    rank: Annotated[int | None, Whole(least=0)] = None
    max_error: Annotated[float | None, Number(below=1)] = None

    def stated(self) -> Mapping[str, Any]:
        """What stands for settings that are left out; a method's config adds its preset."""
        rows = {"eot": False, "after_weight": 1.0, "retain_templates": False, "per_encoder": True, "directions": 0}
        return {**rows, "rank": 0, "max_error": 0.0}

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class MapConfig(TextConfig):
    """The same for methods that take each row to its anchor's.

    Args:
        push (`float`, *optional*): move what a target is mapped to away from the target, by this share of the way between
            them: the row g + push (g - e) for the target's row e and the anchor's g, and likewise the pooled vector.
    """

    push: Annotated[float | None, Number()] = None

    # What an artefact means that does not record a setting, as there was none when it was made.
    unrecorded: ClassVar[Mapping[str, Any]] = {"push": 0.0}

    def stated(self) -> Mapping[str, Any]:
        return {**super().stated(), "push": 0.0}


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What the closed-form methods work with: a [`TextConfig`] with nothing left out."""

    rows: Which
    eot: bool
    after_weight: float
    templates: str | tuple[str, ...]
    retain: Retained
    retain_templates: bool
    pooled: bool
    per_encoder: bool
    max_sequence_length: int
    directions: int
    rank: int
    max_error: float

    @property
    def template_list(self) -> tuple[str, ...]:
        """The templates themselves."""
        return template_list(self.templates)

    @property
    def retained_in(self) -> tuple[str, ...]:
        """The templates in which what is retained is encoded."""
        return self.template_list if self.retain_templates else ("{}",)

    def recorded(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The settings for the artefact, and the names of those that would reveal a concept."""
        return recorded_settings(self)


@dataclass(frozen=True)
class TargetRows:
    """Rows in float64 that are mapped, on one input of the denoiser.

    Attributes:
        targets: E [n, C].
        anchors: G [n, C], what each row is mapped to.
        probes: one row of each concept by itself [c, C], and of its anchor: how far these move is reported. Where several
            encoders make rows of their own, as many of each concept, one after another.
        squares: mean of |x|^2 over the rows as they were encoded; `targets` may be a rotation of them.
        count: how many rows were encoded.
        prompts: how many prompts they come from.
    """

    targets: torch.Tensor
    anchors: torch.Tensor
    probes: tuple[torch.Tensor, torch.Tensor]
    squares: float
    count: int
    prompts: int

    @property
    def way(self) -> torch.Tensor:
        """D = G - E [n, C]."""
        return self.anchors - self.targets

    @property
    def concepts(self) -> int:
        """How many concepts the rows belong to."""
        return len(self.probes[0])

    def part(self, columns: slice) -> "TargetRows":
        """The same rows on some of the columns alone."""
        e, g = self.targets[:, columns], self.anchors[:, columns]
        probes = self.probes[0][:, columns], self.probes[1][:, columns]
        return TargetRows(e, g, probes, float(e.square().sum()) / self.count, self.count, self.prompts)


@dataclass(frozen=True)
class KeptRows:
    """Rows in float64 that must not change, on one input of the denoiser.

    Attributes:
        retain: R [N, C], one row of each retained prompt.
        null: rows of the empty prompt [L, C], the start tokens' first.
        starts: how many of these are start tokens'.
        gram: `sum x x^T` over all rows of the retained prompts, where the method wants that.
        prompts: how many prompts are retained.
        gram_count: how many rows `gram` sums up.
        held: rows of last word pieces of the lists that are retained by default [H, C]; see [`holding`].
    """

    retain: torch.Tensor
    null: torch.Tensor
    gram: torch.Tensor | None = None
    prompts: int = 0
    gram_count: int = 0
    held: torch.Tensor | None = None
    starts: int = 1

    def held_beside(self, rows: TargetRows) -> torch.Tensor:
        """The held rows that do not say the same as a target or its anchor: [H, C], none where nothing is held."""
        if self.held is None:
            return self.null[:0]
        return others_than(self.held, torch.cat(rows.probes))

    def part(self, columns: slice) -> "KeptRows":
        """The same rows on some of the columns alone."""
        gram = None if self.gram is None else self.gram[columns, columns]
        held = None if self.held is None else self.held[:, columns]
        retain, null = self.retain[:, columns], self.null[:, columns]
        return KeptRows(retain, null, gram, self.prompts, self.gram_count, held, self.starts)


def parts_of(pipe: Any, settings: TextSettings) -> tuple[slice, ...]:
    """The columns of `encoder_hidden_states` that are mapped by themselves: each text encoder's, or all together."""
    widths = part_widths(pipe)
    if not settings.per_encoder:
        return (slice(0, sum(widths)),)
    stops = [sum(widths[: i + 1]) for i in range(len(widths))]
    return tuple(slice(stop - width, stop) for stop, width in zip(stops, widths, strict=True))


def by_part(parts: Sequence[slice], rows: TargetRows, kept: KeptRows) -> list[tuple[slice, TargetRows, KeptRows]]:
    """Rows cut into parts; one part is the rows themselves."""
    if len(parts) < 2:
        return [(slice(0, rows.targets.shape[1]), rows, kept)]
    return [(columns, rows.part(columns), kept.part(columns)) for columns in parts]


def reduced(targets: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate paired rows into as few as they have rank: E^T E, G^T E and G^T G stay as they are.

    The methods see the rows through these sums alone. What is dropped lies below float32's rounding.
    """
    width = targets.shape[1]
    pairs = torch.cat([targets, anchors], dim=1)
    if len(pairs) > 2 * width:
        pairs = torch.linalg.qr(pairs, mode="r").R
    _, s, vh = torch.linalg.svd(pairs, full_matrices=False)
    pairs = s[:, None] * vh
    pairs = pairs[s > SAME * s[0]]
    return pairs[:, :width].contiguous(), pairs[:, width:].contiguous()


def join(parts: Sequence[TargetRows]) -> TargetRows:
    """The rows of several erasures as those of one."""
    prompts, count = sum(part.prompts for part in parts), sum(part.count for part in parts)
    targets, anchors = (torch.cat([getattr(part, name) for part in parts]) for name in ("targets", "anchors"))
    if len(targets) > targets.shape[1]:
        targets, anchors = reduced(targets, anchors)
    probes = torch.cat([part.probes[0] for part in parts]), torch.cat([part.probes[1] for part in parts])
    squares = sum(part.squares * part.count for part in parts) / count
    return TargetRows(targets, anchors, probes, squares, count, prompts)


def inputs_of(pipe: Any, settings: TextSettings) -> dict[str, tuple[Source, ...]]:
    """What feeds each input of the denoiser that text enters: its rows, and the pooled vector where there is one."""
    family = family_of(pipe)
    per_encoder, length = settings.per_encoder, settings.max_sequence_length
    found = {family.input: row_sources(pipe, per_encoder=per_encoder, length=length)}
    pooled = pooled_source(pipe)
    if family.pooled is not None and pooled is not None:
        found[family.pooled.input] = (pooled,)
    return found


def target_rows(
    pipe: Any, concepts: Sequence[Concept], settings: TextSettings, rows: str | None = None, push: float = 0.0
) -> dict[str, TargetRows]:
    """Encode targets and anchors, and pick their rows, for each input of the denoiser that text enters.

    Args:
        rows: which ones, where not those of the settings.
        push: how much farther than the anchors' rows what targets are mapped to lies; see [`MapConfig`].
    """
    chosen = settings.rows if rows is None else rows
    groups = [[each] for each in concepts] if settings.directions else [list(concepts)]
    found = {}
    for name, sources in inputs_of(pipe, settings).items():
        own, asked = (
            ("last", dataclasses.replace(settings, eot=False)) if name in POOLED_INPUTS else (chosen, settings)
        )
        parts = [
            _together(
                [_pushed(_led(_encoded(source, group, asked, own), settings.directions), push) for source in sources]
            )
            for group in groups
        ]
        found[name] = parts[0] if len(parts) == 1 else join(parts)
    return found


def _encoded(source: Source, concepts: Sequence[Concept], settings: TextSettings, rows: str) -> TargetRows:
    """The rows of some concepts that one source makes."""
    templates = settings.template_list
    pairs = [(template.format(c.target), filled(template, c.anchor)) for c in concepts for template in templates]
    # Each concept's first template is its probe.
    plain = _picked(source, pairs, [i * len(templates) for i in range(len(concepts))])
    if rows != "last":
        return _blocks(source, pairs, rows, plain, settings.after_weight)
    return _with_ends(source, pairs, plain, settings.after_weight) if settings.eot else plain


def _led(rows: TargetRows, directions: int) -> TargetRows:
    """Rows that go to their anchors in few directions: those in which they go farthest, all together."""
    if not directions:
        return rows
    leading = torch.linalg.svd(rows.way, full_matrices=False).Vh[:directions]
    return dataclasses.replace(rows, anchors=rows.targets + (rows.way @ leading.T) @ leading)


def _pushed(rows: TargetRows, push: float) -> TargetRows:
    """Rows whose anchors lie farther from the targets, and so do those of the probes."""
    if not push:
        return rows
    own, goal = rows.probes
    probes = own, pushed(own, goal, push)
    return dataclasses.replace(rows, anchors=pushed(rows.targets, rows.anchors, push), probes=probes)


def pushed(targets: torch.Tensor, anchors: torch.Tensor, push: float) -> torch.Tensor:
    """What targets' rows E are mapped to: their anchors' rows G, farther from them by some share of the way: G + push (G - E)."""
    return anchors + push * (anchors - targets) if push else anchors


def _picked(source: Source, pairs: Sequence[tuple[str, str]], own: Sequence[int]) -> TargetRows:
    """The last row of each pair of prompts; those in the places `own` are the probes."""
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    encoded = source.last(prompts)
    e, g = (encoded[[place[pair[side]] for pair in pairs]] for side in (0, 1))
    return TargetRows(e, g, (e[own], g[own]), float(e.square().sum(1).mean()), len(pairs), len(pairs))


def _together(parts: Sequence[TargetRows]) -> TargetRows:
    """Rows of the same prompts from several sources as those of one input."""
    if len(parts) == 1:
        return parts[0]
    e, g = (torch.cat([getattr(part, name) for part in parts]) for name in ("targets", "anchors"))
    probes = [torch.stack([part.probes[side] for part in parts], dim=1).flatten(0, 1) for side in (0, 1)]
    count = sum(part.count for part in parts)
    squares = sum(part.squares * part.count for part in parts) / count
    return TargetRows(e, g, (probes[0], probes[1]), squares, count, parts[0].prompts)


def _with_ends(source: Source, pairs: Sequence[tuple[str, str]], plain: TargetRows, weight: float) -> TargetRows:
    """The rows of the last word pieces, and those of the end tokens behind them.

    A weight of rows in all sums over them is its root in both rows of a pair.
    """
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    encoded = source.ends(prompts)
    e, g = (encoded[[place[pair[side]] for pair in pairs]] for side in (0, 1))
    squares = (plain.squares + float(e.square().sum(1).mean())) / 2
    targets, anchors = torch.cat([plain.targets, weight**0.5 * e]), torch.cat([plain.anchors, weight**0.5 * g])
    return TargetRows(targets, anchors, plain.probes, squares, 2 * plain.count, plain.prompts)


def _blocks(
    source: Source, pairs: Sequence[tuple[str, str]], rows: str, plain: TargetRows, after_weight: float = 1.0
) -> TargetRows:
    """Many rows of each pair of prompts, rotated into few as they come, so that they never lie in memory together."""
    width = plain.targets.shape[1]
    e, g = plain.targets[:0], plain.anchors[:0]
    squares, count = 0.0, 0
    for start in range(0, len(pairs), source.batch):
        chunk = pairs[start : start + source.batch]
        prompts = list(dict.fromkeys(prompt for pair in chunk for prompt in pair))
        encoded, last = source.all(prompts)
        ids = source.ids(prompts)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        for target, anchor in chunk:
            t, a = place[target], place[anchor]
            lengths = len(encoded[t]), len(encoded[a])
            if rows == "window":
                left, right = _from((last[t], last[a]), lengths)
            elif source.causal and source.starts:
                first = 0 if rows == "whole" else source.starts
                left, right = _from((first, first), lengths)
            else:
                left, right = aligned(ids[t], ids[a], lengths)
            own, goal = encoded[t][left], encoded[a][right]
            squares, count = squares + float(own.square().sum()), count + len(left)
            roots = torch.where(torch.tensor(left) > last[t], after_weight**0.5, 1.0).to(own.dtype)[:, None]
            e, g = torch.cat([e, roots * own]), torch.cat([g, roots * goal])
        if len(e) > 2 * width:
            e, g = reduced(e, g)
    e, g = reduced(e, g)
    return TargetRows(e, g, plain.probes, squares / count, count, len(pairs))


def _from(first: tuple[int, int], lengths: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Places from a first one on, in pairs; the prompt with fewer left decides how many there are."""
    n = min(length - start for length, start in zip(lengths, first, strict=True))
    return list(range(first[0], first[0] + n)), list(range(first[1], first[1] + n))


def aligned(target: Sequence[int], anchor: Sequence[int], lengths: tuple[int, int]) -> tuple[list[int], list[int]]:
    """All places of two prompts that differ in some tokens, in pairs: what stands before these, they, and what follows.

    Where the target has more tokens than its anchor, several of its places go with the anchor's first one.
    """
    shorter = min(len(target), len(anchor))
    before = next((i for i in range(shorter) if target[i] != anchor[i]), shorter)
    behind = next((i for i in range(shorter - before) if target[-1 - i] != anchor[-1 - i]), shorter - before)
    ends = len(target) - behind, len(anchor) - behind
    least = min(before, lengths[1] - 1)
    left = list(range(ends[0]))
    right = [i if i < before else max(least, ends[1] - (ends[0] - i)) for i in left]
    more_left, more_right = _from(ends, lengths)
    return left + more_left, right + more_right


def filled(template: str, concept: str | None) -> str:
    """A template with a concept in it; the empty concept is the empty prompt."""
    return template.format(concept) if (concept or "").strip() else ""


def _in_templates(pipe: Any, prompts: Sequence[str], settings: TextSettings) -> set[str]:
    """Retained prompts in their templates, and as they are where these make them too long."""
    found = {prompt: {filled(template, prompt) for template in settings.retained_in} for prompt in prompts}
    fit = set(short_enough(pipe, sorted(set().union(*found.values())), settings.max_sequence_length))
    return set().union(*((own & fit) or {prompt} for prompt, own in found.items()))


def kept_rows(pipe: Any, settings: TextSettings, *, with_gram: bool = False) -> dict[str, KeptRows]:
    """Encode what is retained; with `with_gram`, sums over all rows of the retained prompts and the empty one."""
    retained = settings.retain
    # Lists are encoded whole, so that what is cached of them serves any targets; the excluded ones then go.
    whole = sorted(_in_templates(pipe, [*retained.prompts, *retained.excluded], settings))
    gone = _in_templates(pipe, retained.excluded, settings)
    kept = torch.tensor([prompt not in gone for prompt in whole], dtype=torch.bool)
    prompts = int(kept.sum()) + int(with_gram)  # the empty prompt is one of those that the sums are over
    held = dict(zip(*held_prompts(retained), strict=True))
    held = {prompt: held[prompt] for prompt in short_enough(pipe, list(held), settings.max_sequence_length)}
    chosen = torch.tensor(list(held.values()), dtype=torch.bool)
    found = {}
    for name, sources in inputs_of(pipe, settings).items():
        nulls = [source.null() for source in sources]
        rows = [source.last(whole)[kept] if whole else null[:0] for source, null in zip(sources, nulls, strict=True)]
        starts = [null[: source.starts] for source, null in zip(sources, nulls, strict=True)]
        rest = [null[source.starts :] for source, null in zip(sources, nulls, strict=True)]
        total: torch.Tensor | None = None
        if with_gram:
            sums = [_gram(source, whole, sorted(gone), null) for source, null in zip(sources, nulls, strict=True)]
            total = sum(sums[1:], sums[0])
        null = torch.cat([*starts, *rest])
        own = torch.cat([source.last(list(held))[chosen] for source in sources]) if held else None
        count = prompts * len(null)
        found[name] = KeptRows(torch.cat(rows), null, total, prompts, count, own, sum(map(len, starts)))
    return found


def _gram(source: Source, whole: Sequence[str], gone: Sequence[str], null: torch.Tensor) -> torch.Tensor:
    total = null.T @ null
    if whole:
        total = total + source.gram(whole)
        total = total - source.gram(gone) if gone else total
    return total


def to_tensors(
    found: Mapping[str, TargetRows], prefix: str = ""
) -> tuple[dict[str, torch.Tensor], dict[str, SolveRows]]:
    """What a later joint solve needs of the rows: tensors in float32, and numbers for the configuration."""
    tensors, numbers = {}, {}
    for name, rows in found.items():
        base = f"{prefix}{name}."
        tensors[base + "targets"] = rows.targets.float()
        # One anchor for all rows is kept once.
        same = bool((rows.anchors == rows.anchors[:1]).all())
        tensors[base + "anchors"] = (rows.anchors[:1] if same else rows.anchors).float()
        if rows.probes[0].shape != rows.targets.shape or not torch.equal(rows.probes[0], rows.targets):
            tensors[base + "probe_targets"], tensors[base + "probe_anchors"] = (p.float() for p in rows.probes)
        numbers[prefix + name] = SolveRows(rows.squares, rows.count, rows.prompts)
    return {name: value.contiguous() for name, value in tensors.items()}, numbers


def from_tensors(
    tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, SolveRows], prefix: str = ""
) -> dict[str, TargetRows]:
    """The inverse of [`to_tensors`]."""
    found = {}
    for key, item in numbers.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name not in ROW_INPUTS | POOLED_INPUTS:
            continue
        part = {
            entry: tensors[f"{key}.{entry}"].double()
            for entry in ("targets", "anchors", "probe_targets", "probe_anchors")
            if f"{key}.{entry}" in tensors
        }
        e = part["targets"]
        g = part["anchors"].expand(len(e), -1) if len(part["anchors"]) == 1 else part["anchors"]
        probes = (part.get("probe_targets", e), part.get("probe_anchors", g))
        found[name] = TargetRows(e, g, probes, item.squares, item.count, item.prompts)
    return found
