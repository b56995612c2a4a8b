"""Which text rows the closed-form methods (UCE, RECE, SPEED) map, and which they keep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch

from ..base_model import family_of
from ..encoding import all_rows, gram, last_rows, null_rows, part_widths, pooled_rows, short_enough
from ..lists import Retained
from ..schema import Concept, SolveRows
from ..settings import Number, Whole, check_settings
from ..settings.texts import Retain, Templates, recorded_settings, template_list
from .holding import held_prompts, others_than


Which = Literal["last", "window", "all", "whole"]
ROWS, POOLED = "encoder_hidden_states", "text_embeds"  # inputs of the denoiser
SAME = 1e-7  # singular values below this share of the largest are float32's rounding


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Settings that say which text rows are mapped; the closed-form methods' own settings come on top.

    Those that are left out (`None`) come from the method's preset.

    Args:
        rows (`"last"`, `"window"`, `"all"` or `"whole"`, *optional*): which rows of a target's encoding are mapped.
            `"last"` is the row of its last word piece; `"window"` that row and all after it, padding included; `"all"` all
            rows but the start token's; `"whole"` that one too.
        templates (`str` or tuple of `str`, *optional*): `"object"`, `"style"`, `"person"`, `"object_context"`,
            `"style_context"`, `"none"`, or prompts, with `{}` for the concept, in which each target and its anchor are encoded.
        retain (tuple of `str`, *optional*): prompts that must not change.
        retain_templates (`bool`, *optional*): encode the retained prompts in the templates too.
        pooled (`bool`, *optional*, defaults to `True`): SDXL: map the pooled text vector as well.
        per_encoder (`bool`, *optional*): SDXL: map each text encoder's half of a row by itself, so that the erasure acts whatever
            `prompt_2` is. Off, both halves are mapped together, as published, and a call with another `prompt_2` is refused.
        rank (`int`, *optional*): truncate the published LoRA or map to this rank; the error is recorded. 0 for the exact one.
            Where each text encoder's half is mapped by itself, it is the rank of each.
        max_error (`float`, *optional*): truncate to the least rank whose relative error is no larger (that of each half, where
            these are mapped by themselves); 0 for no truncation.
    """

    rows: Which | None = None
    templates: Templates = None
    retain: Retain = ()
    retain_templates: bool | None = None
    pooled: bool = True
    per_encoder: bool | None = None
    rank: Annotated[int | None, Whole(least=0)] = None
    max_error: Annotated[float | None, Number(below=1)] = None

    def stated(self) -> Mapping[str, Any]:
        """What stands for settings that are left out; a method's config adds its preset."""
        return {"retain_templates": False, "per_encoder": True, "rank": 0, "max_error": 0.0}

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What the closed-form methods work with: a [`TextConfig`] with nothing left out."""

    rows: Which
    templates: str | tuple[str, ...]
    retain: Retained
    retain_templates: bool
    pooled: bool
    per_encoder: bool
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
        probes: one row of each concept by itself [c, C], and of its anchor: how far these move is reported.
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
        null: rows of the empty prompt [L, C], the start token's first.
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

    def held_beside(self, rows: TargetRows) -> torch.Tensor:
        """The held rows that do not say the same as a target or its anchor: [H, C], none where nothing is held."""
        if self.held is None:
            return self.null[:0]
        return others_than(self.held, torch.cat(rows.probes))

    def part(self, columns: slice) -> "KeptRows":
        """The same rows on some of the columns alone."""
        gram = None if self.gram is None else self.gram[columns, columns]
        held = None if self.held is None else self.held[:, columns]
        return KeptRows(self.retain[:, columns], self.null[:, columns], gram, self.prompts, self.gram_count, held)


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


def target_rows(pipe: Any, concepts: Sequence[Concept], templates: Sequence[str], rows: str) -> dict[str, TargetRows]:
    """Encode targets and anchors, and pick their rows: those of `encoder_hidden_states`, and SDXL's pooled vectors."""
    pairs = [(template.format(c.target), filled(template, c.anchor)) for c in concepts for template in templates]
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    left, right = ([place[pair[side]] for pair in pairs] for side in (0, 1))
    own = [i * len(templates) for i in range(len(concepts))]  # each concept's first template

    def picked(encoded: torch.Tensor) -> TargetRows:
        e, g = encoded[left], encoded[right]
        return TargetRows(e, g, (e[own], g[own]), float(e.square().sum(1).mean()), len(pairs), len(pairs))

    plain = picked(last_rows(pipe, prompts))
    found = {ROWS: plain if rows == "last" else _blocks(pipe, pairs, rows, plain)}
    if family_of(pipe).name == "stable-diffusion-xl":
        found[POOLED] = picked(pooled_rows(pipe, prompts))
    return found


def _blocks(pipe: Any, pairs: Sequence[tuple[str, str]], rows: str, plain: TargetRows) -> TargetRows:
    """Many rows of each pair of prompts, rotated into few as they come, so that they never lie in memory together."""
    width = plain.targets.shape[1]
    e, g = plain.targets[:0], plain.anchors[:0]
    squares, count = 0.0, 0
    for start in range(0, len(pairs), 32):
        chunk = pairs[start : start + 32]
        prompts = list(dict.fromkeys(prompt for pair in chunk for prompt in pair))
        encoded, last = all_rows(pipe, prompts)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        for target, anchor in chunk:
            t, a = place[target], place[anchor]
            # Rows are paired from the last piece on; the longer prompt decides how many there are.
            start_token = 0 if rows == "whole" else 1
            first, first_anchor = (last[t], last[a]) if rows == "window" else (start_token, start_token)
            n = encoded.shape[1] - max(first, first_anchor)
            e = torch.cat([e, encoded[t, first : first + n]])
            g = torch.cat([g, encoded[a, first_anchor : first_anchor + n]])
            squares, count = squares + float(encoded[t, first : first + n].square().sum()), count + n
        if len(e) > 2 * width:
            e, g = reduced(e, g)
    e, g = reduced(e, g)
    return TargetRows(e, g, plain.probes, squares / count, count, len(pairs))


def filled(template: str, concept: str | None) -> str:
    """A template with a concept in it; the empty concept is the empty prompt."""
    return template.format(concept) if (concept or "").strip() else ""


def kept_rows(
    pipe: Any, retained: Retained, templates: Sequence[str], *, with_gram: bool = False
) -> dict[str, KeptRows]:
    """Encode what is retained; with `with_gram`, sums over all rows of the retained prompts and the empty one."""
    # Lists are encoded whole, so that what is cached of them serves any targets; the excluded ones then go.
    whole = [*retained.prompts, *retained.excluded]
    whole = sorted({filled(template, prompt) for prompt in whole for template in templates})
    gone = {filled(template, prompt) for prompt in retained.excluded for template in templates}
    kept = torch.tensor([prompt not in gone for prompt in whole], dtype=torch.bool)
    null = null_rows(pipe)
    number_kept = int(kept.sum())
    found = {}
    rows = last_rows(pipe, whole)[kept] if whole else null[:0]
    total = None
    if with_gram:
        total = null.T @ null
        if whole:
            total = total + gram(pipe, whole)
            total = total - gram(pipe, sorted(gone)) if gone else total
    prompts = number_kept + int(with_gram)  # the empty prompt is one of those that the sums are over
    held = _held(pipe, retained, last_rows)
    found[ROWS] = KeptRows(rows, null, total, prompts, prompts * len(null), held)
    if family_of(pipe).name == "stable-diffusion-xl":
        empty = pooled_rows(pipe, [""])
        rows = pooled_rows(pipe, whole)[kept] if whole else empty[:0]
        both = torch.cat([rows, empty])
        held = _held(pipe, retained, pooled_rows)
        found[POOLED] = KeptRows(rows, empty, both.T @ both if with_gram else None, prompts, len(both), held)
    return found


def _held(pipe: Any, retained: Retained, encode: Callable[[Any, Sequence[str]], torch.Tensor]) -> torch.Tensor | None:
    """Rows of the default lists' entries that are held and that the encoders read whole."""
    wanted = dict(zip(*held_prompts(retained), strict=True))
    prompts = short_enough(pipe, list(wanted))
    return encode(pipe, prompts)[torch.tensor([wanted[prompt] for prompt in prompts])] if prompts else None


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
        if not key.startswith(prefix) or name not in (ROWS, POOLED):
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
