"""What a pipeline has already of an erasure that is to be loaded: the same edit, or another one of the same target.

An edit is compared as what it does, whatever file, dtype, form or scale it comes in. Changes of weights are compared by their
factors: an inner product of two `B A` is a sum over Gram matrices, so no product is formed, and the first site that differs ends
it. Text rows are encoded only where a target is removed twice.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..artifact import Erasure
from ..base_model import component, denoiser_name, readable_weight, readers_of_text, weight_times
from ..encoding import last_rows
from ..errors import ErasureError, ErasureInputError
from ..fingerprints import same_component
from ..layers import layer_kind
from ..layers.text_map import ROWS, MapChange
from ..lists.names import folded
from ..logging import get_logger
from ..low_rank import Factors
from ..originals import originals
from ..registry import method_names
from ..schema import LayerSpec
from .attachment import Loaded
from .blocks import erasures_disabled
from .loaded import loaded, states
from .peft_backend import present_strength


logger = get_logger(__name__)

GRAM = 1e-7  # of an edit's norm: sums over Gram matrices in float64 do not tell distances below it
ROUNDED = 0.41  # of eps: what rounding both factors of a product does to it, root mean square
MARGIN = 4.0  # on that
UNLIKE = 0.5  # edits with a cosine up to this are others, however coarse the dtype
ALARM = 1.2  # an overshoot below this is told, but no warning
HOW_PUBLISHED = (
    "layer",
    "rank",
    "max_error",
    "retain_excluded",
)  # settings of a recipe that leave the edit what it is

Place = tuple[str, str]  # a component, and a module or a named input of it
Other = tuple[LayerSpec, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]


def refuse_copy(pipe: Any, content: str) -> None:
    """Refuse an erasure whose tensors are loaded already, bit for bit.

    Raises:
        ErasureInputError: they are.
    """
    twin = next((item for item in loaded(pipe).values() if item.content_hash == content), None)
    if twin is not None:
        raise _refused(pipe, twin, "")


def refuse_same_edit(pipe: Any, erasure: Erasure) -> None:
    """Refuse an erasure that is the same edit as a loaded one.

    The same edit is: layers that change weights by the same `B A` at every site, times one positive number, within what the
    rounding of the coarser dtype makes of the factors; other layers with the same tensors within that rounding; or the same
    recipe on the same base, but where changes of weights say otherwise ([`point_elsewhere`]). Layers with another schedule or
    gate are another edit. What cannot be read, such as weights that are packed in an unknown way, is not compared.

    Raises:
        ErasureInputError: it is.
    """
    own = Edit.of(erasure)
    for item in loaded(pipe).values():
        if same_edit(pipe, erasure, item.erasure, own) or (
            same_recipe(erasure, item.erasure) and not point_elsewhere(pipe, erasure, item.erasure)
        ):
            raise _refused(pipe, item, " in another dtype, form or scale")


def shared_targets(pipe: Any, new: Loaded) -> list[tuple[int, str]]:
    """What is to be told of targets that loaded erasures and one that is about to be loaded all remove.

    It only informs: whatever fails in it, how far they go together is said to be unknown.

    Returns:
        `list` of (`int`, `str`): a logging level and a message for each such target.
    """
    shared = _shared_targets(new.erasure, loaded(pipe).values())
    return [_told(pipe, target, others, new) for target, others in shared.items()]


def _refused(pipe: Any, twin: Loaded, how: str) -> ErasureInputError:
    name = twin.name
    now = "twice it would act at twice the strength" if present_strength(pipe, twin) else "it is at strength 0"
    return ErasureInputError(
        f"This erasure is loaded already, as {name!r}{how}; {now}. Use `pipe.set_erasures({name!r}, strength)`; to exchange one "
        f"for the other, call `pipe.unload_erasure({name!r})` first."
    )


# ------------------------------------------------------------------------------------------------------ the edits


@dataclass(frozen=True)
class Part:
    """`B A` at one place; with a `linear` that reads a mapped input, `W B A`, which is multiplied out where it is asked for."""

    a: torch.Tensor
    b: torch.Tensor
    site: str = ""
    linear: nn.Linear | None = None

    def factors(self) -> Factors:
        """`A` [r, in] and `B` [out, r], float64 on the CPU."""
        a, b = self.a.to("cpu", torch.float64), self.b.to("cpu", torch.float64)
        return a, b if self.linear is None else weight_times(self.linear, self.site, b)

    def move(self, row: torch.Tensor) -> torch.Tensor:
        """What is added for a row [in]: [out]."""
        moved = self.b.to("cpu", torch.float64) @ (self.a.to("cpu", torch.float64) @ row)
        return moved if self.linear is None else weight_times(self.linear, self.site, moved[:, None])[:, 0]

    def noise(self) -> float:
        """Root mean square of what rounding the factors to their dtype makes of the product."""
        a, b = self.factors()
        weight = None if self.linear is None else readable_weight(self.linear, self.site)
        dtypes = [_dtype(self.a), _dtype(self.b)] + ([] if weight is None else [weight.dtype])
        info = torch.finfo(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
        # Per rank, so that heavy rows which cancel count; below the normal range roundings are absolute.
        rows = a.square().sum(1) + self.a.shape[1] * info.tiny**2
        columns = b.square().sum(0) + len(b) * info.tiny**2
        if weight is not None:
            columns = columns + self.b.to("cpu", torch.float64).square().sum(0) * _mean_gain(weight)
        return ROUNDED * info.eps * float((rows * columns).sum().sqrt())


def _mean_gain(weight: torch.Tensor) -> float:
    """|W|^2 / in: what W makes of the square of a rounding error."""
    return float(weight.float().square().sum()) / weight.shape[1]


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    """A tensor's dtype, or the one to which its values were rounded before."""
    if tensor.dtype.itemsize > 2:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return dtype
    return tensor.dtype


@dataclass
class Edit:
    """An erasure by place: changes of modules, maps of inputs, and layers that are neither or act by timestep or prompt."""

    modules: dict[Place, list[Part]] = field(default_factory=dict)
    inputs: dict[Place, list[Part]] = field(default_factory=dict)
    others: list[Other] = field(default_factory=list)

    @classmethod
    def of(cls, erasure: Erasure, *, modified: bool = False) -> "Edit":
        """What an erasure changes; with `modified` what it changes where schedules and gates are open. Nothing is computed."""
        edit = cls()
        for layer in erasure.config.layers:
            tensors, kind = erasure.layer_tensors(layer), layer_kind(layer.kind)
            plain = modified or not layer.is_modified
            factors = kind.lora(layer, tensors) if plain else None
            if factors is not None:
                for site, (a, b) in factors.items():
                    place = layer.component, site.removeprefix("text_model.")
                    edit.modules.setdefault(place, []).append(Part(a.flatten(1), b.flatten(1)))
            elif layer.kind == "text_map" and plain:
                place = layer.component, layer.sites[0]
                edit.inputs.setdefault(place, []).append(Part(tensors["A"], tensors["D"].T))
            else:
                edit.others.append((layer, tensors, erasure.modifier_tensors(layer)))
        return edit

    def at_modules(self, pipe: Any) -> dict[Place, list[Part]]:
        """The changes of modules, with what maps of an input are at each module that reads it.

        Raises:
            ErasureCompatibilityError: not everything that reads it is known to be linear.
        """
        found = {place: list(parts) for place, parts in self.modules.items()}
        kind = layer_kind("text_map")
        for (name, site), maps in self.inputs.items():
            model = component(pipe, name)
            before = originals(model)
            for part in maps:
                tensors = {"A": part.a, "D": part.b.T}
                spec = LayerSpec("text_map", name, (site,), kind.file, kind.prefix(name, (site,)))
                kind.check(model, spec, tensors)
                for change in kind.weight_changes(model, spec, tensors):
                    assert isinstance(change, MapChange) and isinstance(change.module, nn.Linear)
                    linear = _with_weight(change.module, before.get((change.module, "weight")))
                    own = Part(change.a, change.d.T, change.site, linear)
                    found.setdefault((name, change.site), []).append(own)
        return found


def _with_weight(linear: nn.Linear, weight: torch.Tensor | None) -> nn.Linear:
    """The Linear as it was before erasures were fused into it."""
    if weight is None:
        return linear
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def same_edit(pipe: Any, one: Erasure, other: Erasure, edit: Edit | None = None) -> bool:
    """Whether two erasures that fit a pipeline change the same by the same, times one positive number.

    See [`refuse_same_edit`]. `edit` is that of the first, where it is known.
    """
    first, second = edit or Edit.of(one), Edit.of(other)
    scale = other.config.published_strength / one.config.published_strength
    if len(first.others) != len(second.others) or not all(
        _same_layer(a, b, scale) for a, b in zip(first.others, second.others, strict=True)
    ):
        return False
    if first.inputs.keys() == second.inputs.keys():
        return _same_parts({**first.inputs, **first.modules}, {**second.inputs, **second.modules})
    try:
        return _same_parts(first.at_modules(pipe), second.at_modules(pipe))
    except _UNREAD:
        return False


def point_elsewhere(pipe: Any, one: Erasure, other: Erasure) -> bool:
    """Whether the changes of weights that two erasures make where both make some are known to have another direction.

    A textual inversion of one token may be exchanged, which no recipe tells.
    """
    first, second = Edit.of(one, modified=True), Edit.of(other, modified=True)
    try:
        if first.inputs.keys() == second.inputs.keys():
            parts = {**first.inputs, **first.modules}, {**second.inputs, **second.modules}
        else:
            parts = first.at_modules(pipe), second.at_modules(pipe)
        pairs = [(_joined(parts[0][place]), _joined(parts[1][place])) for place in parts[0].keys() & parts[1].keys()]
        pairs = [(x, y) for x, y in pairs if x[0].shape[1] == y[0].shape[1] and len(x[1]) == len(y[1])]
        aa, bb, ab = (sum(_inner(*pair[i], *pair[j]) for pair in pairs) for i, j in ((0, 0), (1, 1), (0, 1)))
    except _UNREAD:
        return False
    return aa > 0 and bb > 0 and ab <= UNLIKE * (aa * bb) ** 0.5


# What reading a weight raises: an error of this library, or one of whatever unpacks it or brings it from elsewhere.
_UNREAD = (ErasureError, RuntimeError, ImportError, TypeError, ValueError)


def _same_parts(one: Mapping[Place, Sequence[Part]], other: Mapping[Place, Sequence[Part]]) -> bool:
    both = one.keys() & other.keys()
    if any(_acts(one.get(place) or other[place]) for place in one.keys() ^ other.keys()):
        return False
    products = []
    for place in both:
        a, b = _joined(one[place])
        a2, b2 = _joined(other[place])
        if a.shape[1] != a2.shape[1] or len(b) != len(b2):
            return False
        aa, bb, ab = _inner(a, b, a, b), _inner(a2, b2, a2, b2), _inner(a, b, a2, b2)
        if aa == bb == 0:
            continue
        if ab <= UNLIKE * (aa * bb) ** 0.5:
            return False
        noises = _noise(one[place]), _noise(other[place])
        if not _near(aa, bb, ab, ab / bb, *noises):
            return False
        products.append((aa, bb, ab, *noises))
    if not products:
        return not one and not other
    # One scale for all places, from where the edit is heaviest.
    scale = sum(each[2] for each in products) / sum(each[1] for each in products)
    return all(_near(aa, bb, ab, scale, *noises) for aa, bb, ab, *noises in products)


def _joined(parts: Sequence[Part]) -> Factors:
    """The sum of parts at one place as one pair of factors."""
    factors = [part.factors() for part in parts]
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], 1)


def _noise(parts: Sequence[Part]) -> float:
    return sum(part.noise() ** 2 for part in parts) ** 0.5


def _acts(parts: Sequence[Part]) -> bool:
    """Whether anything is changed: a LoRA may be padded to more sites with zeros."""
    return any(bool(part.a.any()) and bool(part.b.any()) for part in parts)


def _inner(a: torch.Tensor, b: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor) -> float:
    """<B A, B' A'>."""
    return float(((b.T @ b2) * (a @ a2.T)).sum())


def _near(aa: float, bb: float, ab: float, scale: float, noise: float, noise2: float) -> bool:
    """Whether |E - scale E'| is no more than roundings."""
    distance = max(0.0, aa - 2 * scale * ab + scale**2 * bb) ** 0.5
    return distance <= MARGIN * (noise + scale * noise2) + GRAM * aa**0.5


def _same_layer(one: Other, other: Other, scale: float) -> bool:
    """Whether two layers that are compared by their tensors are one, the second at `scale` times the strength of the first."""
    spec, tensors, modifiers = one
    spec2, tensors2, modifiers2 = other
    if (spec.kind, spec.component, set(spec.sites)) != (spec2.kind, spec2.component, set(spec2.sites)):
        return False
    if not same_modifiers(spec, modifiers, spec2, modifiers2):
        return False
    scaled = tensors if scale == 1 else layer_kind(spec.kind).rescaled(tensors, scale)
    return scaled.keys() == tensors2.keys() and all(_close(scaled[name], tensors2[name]) for name in scaled)


def same_modifiers(
    one: LayerSpec, tensors: Mapping[str, torch.Tensor], other: LayerSpec, tensors2: Mapping[str, torch.Tensor]
) -> bool:
    """Whether two layers have the same schedule and gate, or none."""
    if (one.schedule is None) != (other.schedule is None) or (one.gate is None) != (other.gate is None):
        return False
    if one.schedule is not None and other.schedule is not None:
        if one.schedule.span != other.schedule.span:
            return False
        if not _close(tensors[one.schedule.name], tensors2[other.schedule.name]):
            return False
    if one.gate is None or other.gate is None:
        return True
    how = dataclasses.replace(one.gate, name=other.gate.name) == other.gate
    return how and _close(tensors[one.gate.name], tensors2[other.gate.name])


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, but for the rounding of the coarser dtype; integers exactly."""
    if one.shape != other.shape or one.dtype.is_floating_point != other.dtype.is_floating_point:
        return False
    if not one.dtype.is_floating_point:
        return torch.equal(one, other)
    info = torch.finfo(max((_dtype(one), _dtype(other)), key=lambda dtype: torch.finfo(dtype).eps))
    a, b = one.double(), other.double()
    return bool(((a - b).abs() <= info.eps * (torch.maximum(a.abs(), b.abs()) + info.tiny)).all())


def same_recipe(one: Erasure, other: Erasure) -> bool:
    """Whether two erasures were made alike: method, settings, concepts and seed, on the same base model."""
    recipes = _recipe(one), _recipe(other)
    if recipes[0] is None or recipes[0] != recipes[1]:
        return False
    layers, layers2 = one.config.layers, other.config.layers
    if any(layer.is_modified for layer in (*layers, *layers2)):
        pairs = zip(layers, layers2, strict=len(layers) == len(layers2))
        if len(layers) != len(layers2) or not all(
            same_modifiers(a, one.modifier_tensors(a), b, other.modifier_tensors(b)) for a, b in pairs
        ):
            return False
    needed = {name for layer in (*layers, *layers2) for name in layer.derived_from}
    needed |= {layer.component for layer in (*layers, *layers2) if layer.kind != "text_map"}
    bases = one.config.base_model.components, other.config.base_model.components
    return all(
        name in bases[0] and name in bases[1] and same_component(bases[0][name], bases[1][name]) == "same"
        for name in needed
    )


def _recipe(erasure: Erasure) -> tuple[Any, ...] | None:
    """What an erasure was made by; `None` where that is not told in full."""
    config = erasure.config
    settings = dict(config.method.settings)
    unread = settings.get("retain_prompts") and "retain" not in settings
    if config.redacted or unread or config.method.name not in method_names():
        return None
    concepts = tuple((folded(each.target or ""), folded(each.anchor or "")) for each in config.concepts)
    kept = {key: value for key, value in settings.items() if key not in HOW_PUBLISHED}
    return config.method.name, kept, config.method.seed, concepts


# -------------------------------------------------------------------------------------------- one target, removed twice


def _targets(erasure: Erasure) -> dict[str, str]:
    """The targets by their folded names."""
    return {folded(each.target): each.target for each in erasure.concepts if each.target is not None}


def _shared_targets(erasure: Erasure, items: Iterable[Loaded]) -> dict[str, list[Loaded]]:
    """The targets that loaded erasures remove too, with these."""
    found: dict[str, list[Loaded]] = {}
    own = _targets(erasure)
    for item in items:
        for name in own.keys() & _targets(item.erasure).keys():
            found.setdefault(own[name], []).append(item)
    return found


def _told(pipe: Any, target: str, others: Sequence[Loaded], new: Loaded) -> tuple[int, str]:
    names = ", ".join(repr(item.name) for item in others)
    acting = [(item.erasure, present_strength(pipe, item)) for item in others] + [(new.erasure, new.strength)]
    if any(strength == 0 for _, strength in acting):
        return logging.INFO, f"{target!r} is removed by {names} too; one of them is at strength 0."
    try:
        times = overshoot(pipe, target, acting)
    except Exception as error:  # of a text encoder, a tokenizer, or for want of memory
        logger.debug("How far %r is moved cannot be told: %s", target, error)
        times = None
    if times is not None and times <= ALARM:
        return (
            logging.INFO,
            f"{target!r} is removed by {names} too; together they move it {times:.2f} times as far as one.",
        )
    far = "how far they move it together cannot be told" if times is None else _FAR.format(times=times)
    return (
        logging.WARNING,
        f"{target!r} is removed already, by {names}: at these strengths {far}. Unload one of them, or lower their strengths "
        "(`pipe.set_erasures`). For several targets make one erasure: in one call to `erase`, or with `combine` of erasures that "
        "share no target.",
    )


_FAR = "they move it {times:.2f} times as far as the farther one alone, past what it is mapped to"


def overshoot(pipe: Any, target: str, erasures: Sequence[tuple[Erasure, float]]) -> float | None:
    """How far erasures at their strengths move a target together, over what the one that moves it farthest does alone.

    The move is what is added for the row of the target's last word piece, at all text-reading projections (or the input, where
    all are maps of it) that every one of them changes: together, projected on the direction of the farthest, over the length of
    that. 1: the others add nothing in its direction; 2: two of the same edit. Where the target cannot be encoded or no such
    projection is common, the changes of weights stand for the moves.

    Returns:
        `float`, *optional*: `None` where one of them is no plain change of weights or nothing is common to all.
    """
    edits = [Edit.of(erasure) for erasure, _ in erasures]
    if any(edit.others for edit in edits):
        return None
    strengths = [strength for _, strength in erasures]
    row = _row(pipe, target)
    place = denoiser_name(pipe), ROWS
    if row is not None and all(place in edit.inputs and not edit.modules for edit in edits):
        return _projected([s * _moved(edit.inputs[place], row) for s, edit in zip(strengths, edits, strict=True)])
    try:
        parts = [edit.at_modules(pipe) for edit in edits]
    except ErasureError:
        return None
    common = [each for each in parts[0] if all(each in other for other in parts[1:])]
    if row is not None:
        readers = readers_of_text(component(pipe, place[0]))
        reading = [each for each in common if each[0] == place[0] and each[1] in readers]
        if reading:
            moves = [
                torch.cat([s * _moved(own[each], row) for each in reading])
                for s, own in zip(strengths, parts, strict=True)
            ]
            return _projected(moves)
    return _of_factors([[_joined(own[each]) for each in common] for own in parts], strengths)


def _row(pipe: Any, target: str) -> torch.Tensor | None:
    """The row of a target's last word piece [C], encoded without erasures; `None` where it cannot be."""
    try:
        if any(name.startswith("text_encoder") for name in states(pipe)):
            with erasures_disabled(pipe):
                return last_rows(pipe, [target])[0]
        return last_rows(pipe, [target])[0]
    except ErasureError:
        return None


def _moved(parts: Sequence[Part], row: torch.Tensor) -> torch.Tensor:
    return sum((part.move(row) for part in parts[1:]), parts[0].move(row))


def _projected(moves: Sequence[torch.Tensor]) -> float | None:
    far = max(moves, key=lambda move: float(move.norm()))
    length = float(far @ far)
    return float(sum(moves[1:], moves[0]) @ far) / length if length else None


def _of_factors(edits: Sequence[Sequence[Factors]], strengths: Sequence[float]) -> float | None:
    def inner(i: int, j: int) -> float:
        products = (_inner(*one, *other) for one, other in zip(edits[i], edits[j], strict=True))
        return strengths[i] * strengths[j] * sum(products)

    squares = [inner(i, i) for i in range(len(edits))]
    far = max(range(len(edits)), key=lambda i: squares[i])
    return sum(inner(i, far) for i in range(len(edits))) / squares[far] if squares[far] else None
