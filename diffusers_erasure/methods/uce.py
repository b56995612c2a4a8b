"""UCE: Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761).

Every cross-attention key and value projection W gets the closed-form edit that maps the rows E of the targets to what
W gave for the rows G of the anchors, and keeps the rows R to retain:

    W' = (lamb W + a sum W g e^T + b sum W r r^T) M^-1,    M = lamb I + a E^T E + b R^T R.

Since `W M` reproduces all terms but one, W' = W T with T = I + (G - E)^T A, A = a E M^-1: one C x C Cholesky
factorisation serves the whole model, and each edit is low rank, dW = B A with B = W (G - E)^T. It is published as a
LoRA of that rank, or as a map of the text rows (`layer="text_map"`), which does the same to an unmodified model.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .._version import __version__
from ..artifact import Erasure, low_rank_error
from ..base_model import describe_base, encode_rows, family_of, text_readers, weight_times
from ..errors import ErasureCompatibilityError, ErasureInputError
from ..layers.lora import DOWN, UP, pad_rank
from ..logging import get_logger
from ..schema import (
    LORA_FILE,
    SCHEMA,
    TENSOR_FILE,
    Concept,
    ErasureConfig,
    LayerSpec,
    Library,
    Method,
    Stock,
)


logger = get_logger(__name__)

TEMPLATES = {
    "none": ("{}",),
    "object": ("{}", "a {}", "a picture of a {}", "an image of {}", "a photo of {}", "a drawing of a {}"),
    "style": ("{}", "{} style", "in the style of {}", "a painting by {}", "art by {}", "a picture by {}"),
}
ROUNDING = 1e-13  # singular values below this share of the largest are rounding, not edit


@dataclass(frozen=True)
class Config:
    """Settings of UCE.

    Args:
        rows (`"last"` or `"window"`, *optional*, defaults to `"last"`): which rows of a target's encoding are mapped.
            `"last"` is the row of its last word piece (the authors' code of 2025); `"window"` that row and all after it,
            padding included (their code of 2023, which RECE, MACE and SPEED compare with).
        templates (`"object"`, `"style"`, `"none"` or a tuple of `str`, *optional*, defaults to `"object"`): prompts,
            with `{}` for the concept, in which each target and its anchor are encoded.
        retain (tuple of `str`, *optional*): prompts whose rows must not change.
        retain_rows (`"all"` or `"last"`, *optional*, defaults to `"all"`): which rows of a retained prompt must not
            change: all of them (published with `"window"`), or that of its last word piece (published with `"last"`).
        retain_templates (`bool`, *optional*, defaults to `False`): encode the retained prompts in the templates too.
        erase_scale (`float`, *optional*, defaults to 1.0): weight `a` of the targets' rows.
        retain_scale (`float`, *optional*, defaults to 1.0): weight `b` of the retained rows. Relative to the number of
            prompts: all the retained ones together weigh no more than all the targets', however long the list is.
        lamb (`float`, *optional*, defaults to 1e-3): weight of staying near the original. Relative to the mean squared
            norm of the targets' rows: the published 0.5 is 7e-4 for Stable Diffusion 1.x (|x|^2 about 750).
        absolute (`bool`, *optional*, defaults to `False`): take `retain_scale` and `lamb` as they are, as published.
        layer (`"lora"` or `"text_map"`, *optional*, defaults to `"lora"`): how the erasure is published.
        rank (`int`, *optional*): truncate to this rank; the error is recorded. The exact rank by default.
    """

    rows: Literal["last", "window"] = "last"
    templates: str | Sequence[str] = "object"
    retain: Sequence[str] = ()
    retain_rows: Literal["all", "last"] = "all"
    retain_templates: bool = False
    erase_scale: float = 1.0
    retain_scale: float = 1.0
    lamb: float = 1e-3
    absolute: bool = False
    layer: Literal["lora", "text_map"] = "lora"
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rows not in ("window", "last"):
            raise ErasureInputError(f'`rows` must be "window" or "last", not {self.rows!r}.')
        if self.retain_rows not in ("all", "last"):
            raise ErasureInputError(f'`retain_rows` must be "all" or "last", not {self.retain_rows!r}.')
        if self.layer not in ("lora", "text_map"):
            raise ErasureInputError(f'`layer` must be "lora" or "text_map", not {self.layer!r}.')
        for name, least in (("erase_scale", 0.0), ("retain_scale", 0.0), ("lamb", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
                raise ErasureInputError(f"`{name}` must be a finite number of at least 0, not {value!r}.")
        if self.lamb == 0 or self.erase_scale == 0:
            raise ErasureInputError("`lamb` and `erase_scale` must be above 0.")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise ErasureInputError(f"`rank` must be a whole number above 0, not {self.rank!r}.")
        for template in self.template_list():
            if not isinstance(template, str) or template.count("{}") != 1:
                raise ErasureInputError(f"The template {template!r} must hold {{}} once, for the concept.")

    def template_list(self) -> tuple[str, ...]:
        """The templates themselves."""
        if isinstance(self.templates, str):
            if self.templates not in TEMPLATES:
                raise ErasureInputError(
                    f"`templates` must be one of {sorted(TEMPLATES)} or a list of prompts with {{}}."
                )
            return TEMPLATES[self.templates]
        return tuple(self.templates) or ("{}",)


@dataclass(frozen=True)
class Rows:
    """Text rows in float64: targets E and anchors G [n, C], each with the index of its concept; retained R [N, C].

    `prompts` counts the prompts that the targets' and the retained rows come from.
    """

    targets: torch.Tensor
    anchors: torch.Tensor
    owner: torch.Tensor
    retain: torch.Tensor
    prompts: tuple[int, int] = (1, 0)


def solve(rows: Rows, *, erase_scale: float, retain_scale: float, lamb: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The closed form: `(A, D)`, both float64 [n, C], with T = I + D^T A."""
    e, r = rows.targets, rows.retain
    m = lamb * torch.eye(e.shape[1], dtype=e.dtype) + erase_scale * (e.T @ e) + retain_scale * (r.T @ r)
    a = torch.cholesky_solve(erase_scale * e.T, torch.linalg.cholesky(m)).T
    return a, rows.anchors - e


def relative_units(rows: Rows) -> tuple[float, float]:
    """What `lamb` and `retain_scale` are multiplied by: the targets' mean |x|^2; target prompts a retained one, at most 1."""
    return float(rows.targets.square().sum(1).mean()), min(1.0, rows.prompts[0] / max(1, rows.prompts[1]))


def compress(a: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write D^T A with as few rows as it has rank, the heaviest first, balanced between the two factors."""
    q_d, r_d = torch.linalg.qr(d.T)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_d @ r_a.T)
    kept = max(1, int((s > ROUNDING * s[0]).sum()))
    root = s[:kept].sqrt()
    return (q_a @ (vh[:kept].T * root)).T, (q_d @ (u[:, :kept] * root)).T


def gather_rows(pipe: Any, concepts: Sequence[Concept], config: Config) -> Rows:
    """Encode the targets, their anchors and the retained prompts, and pick their rows."""
    templates = config.template_list()
    pairs = [
        (i, template.format(concept.target), template.format(concept.anchor) if (concept.anchor or "").strip() else "")
        for i, concept in enumerate(concepts)
        for template in templates
    ]
    kept_templates = templates if config.retain_templates else ("{}",)
    kept = [template.format(prompt) for prompt in config.retain for template in kept_templates]
    if config.retain_rows == "all":
        kept = ["", *kept]
    prompts = list(dict.fromkeys([*(p[1] for p in pairs), *(p[2] for p in pairs), *kept]))
    encoded, last = encode_rows(pipe, prompts)
    place = {prompt: i for i, prompt in enumerate(prompts)}

    targets, anchors, owner = [], [], []
    for i, target, anchor in pairs:
        t, g = place[target], place[anchor]
        first, first_anchor = last[t], last[g]
        # Rows are paired from the last piece on; the longer prompt decides how many there are.
        count = encoded.shape[1] - max(first, first_anchor) if config.rows == "window" else 1
        targets.append(encoded[t, first : first + count])
        anchors.append(encoded[g, first_anchor : first_anchor + count])
        owner.extend([i] * count)
    if config.retain_rows == "all":
        retain = torch.cat([encoded[place[prompt]] for prompt in kept])
    else:
        retain = torch.stack([encoded[place[p], last[place[p]]] for p in kept]) if kept else encoded.new_zeros(0, 1)
    e = torch.cat(targets)
    retain = retain if len(retain) else e.new_zeros(0, e.shape[1])
    return Rows(e, torch.cat(anchors), torch.tensor(owner), retain, prompts=(len(pairs), len(kept)))


def diagnose(rows: Rows, a: torch.Tensor, d: torch.Tensor, concepts: Sequence[Concept]) -> dict[str, Any]:
    """How far each target moved to its anchor (0..1), and by which share of their norm the retained rows changed."""
    moved, way = (rows.targets @ a.T) @ d, rows.anchors - rows.targets
    share = (moved * way).sum(1) / way.square().sum(1).clamp_min(1e-300)
    completeness = {str(c.target): round(float(share[rows.owner == i].mean()), 4) for i, c in enumerate(concepts)}
    report: dict[str, Any] = {"completeness": completeness}
    if len(rows.retain):
        change = ((rows.retain @ a.T) @ d).norm(dim=1) / rows.retain.norm(dim=1)
        report["retained_change"] = {"median": round(float(change.median()), 4), "max": round(float(change.max()), 4)}
    return report


def fit(pipe: Any, concepts: Sequence[Concept], config: Config) -> Erasure:
    """Make the erasure. Called by [`erase`], which has checked the concepts."""
    if family_of(pipe).name != "stable-diffusion":
        raise ErasureCompatibilityError(
            f"UCE is made for Stable Diffusion 1.x and 2.x; this pipeline is {family_of(pipe).name}."
        )
    concepts = [Concept(c.target, "" if c.anchor is None else c.anchor) for c in concepts]
    rows = gather_rows(pipe, concepts, config)
    norm, share = (1.0, 1.0) if config.absolute else relative_units(rows)
    a, d = solve(
        rows, erase_scale=config.erase_scale, retain_scale=config.retain_scale * share, lamb=config.lamb * norm
    )
    diagnostics = diagnose(rows, a, d, concepts)
    for name, value in diagnostics["completeness"].items():
        if value < 0.5:
            logger.warning(
                "%r moved only %.0f %% of the way to its anchor: lower `lamb` or `retain_scale`, or check that it is not "
                "among what is retained.",
                name,
                100 * value,
            )
    layer, tensors, stock = publish(pipe, a, d, config)
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "retain"}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    config_of_erasure = ErasureConfig(
        schema=SCHEMA,
        library=Library("diffusers_erasure", __version__),
        method=Method(
            name="uce",
            settings={**settings, "retain": list(config.retain)},
            versions={"torch": torch.__version__.partition("+")[0]},
            concept_settings=("retain", "templates"),
        ),
        base_model=describe_base(pipe),
        concepts=tuple(concepts),
        layers=(layer,),
        stock=stock,
        diagnostics=diagnostics,
    )
    return Erasure(config_of_erasure, {layer.file: tensors})


def publish(
    pipe: Any, a: torch.Tensor, d: torch.Tensor, config: Config
) -> tuple[LayerSpec, dict[str, torch.Tensor], Stock | None]:
    """Turn the map T = I + D^T A into a layer: as it is, or as a LoRA `W D^T A` on each reader of the text rows."""
    origin = ("text_encoder", "tokenizer")
    full_a, full_d = compress(a, d)
    rank = len(full_a) if config.rank is None else min(config.rank, len(full_a))
    if config.layer == "text_map":
        layer = LayerSpec("text_map", "unet", ("encoder_hidden_states",), TENSOR_FILE, "text_map.", origin)
        return layer, {"text_map.A": full_a[:rank].float(), "text_map.D": full_d[:rank].float()}, None
    tensors: dict[str, torch.Tensor] = {}
    error = 0.0
    readers = text_readers(pipe)
    for site, linear in readers.items():
        names = f"unet.{site}{DOWN}", f"unet.{site}{UP}"
        exact = balanced(full_a, weight_times(linear, site, full_d.T))
        written = exact[0][:rank].float().contiguous(), exact[1][:, :rank].float().contiguous()
        tensors.update(zip(names, written, strict=True))
        padded = pad_rank(written[0], len(full_a), 0), pad_rank(written[1], len(full_a), 1)
        error = max(error, low_rank_error(dict(zip(names, exact, strict=True)), dict(zip(names, padded, strict=True))))
    layer = LayerSpec("lora", "unet", tuple(readers), LORA_FILE, "unet.", origin)
    return layer, tensors, Stock(LORA_FILE, float(f"{error:.3g}"))


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give both factors a like magnitude, by a power of two (exact), so that neither overflows in half precision."""
    largest_a, largest_b = (torch.linalg.vector_norm(factor, float("inf")) for factor in (a, b))
    shift = float(torch.exp2((largest_b.log2() - largest_a.log2()).div(2).round()))
    return a * shift, b / shift
