"""`combine`: several erasures made one, by solving again for all of their targets, or by adding them up exactly."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .anchors import RECORDED as ANCHORS_PICKED
from .artifact import Erasure
from .assembling import rounded
from .base_model import compare_base
from .collateral import Collateral
from .encoding import one_fit
from .errors import ErasureCompatibilityError, ErasureInputError
from .fingerprints import same_component
from .layers import Layer, Summand, layer_kind
from .lists import Retained, expand, names_any, retained
from .lists.defaults import task_of, with_lists
from .lists.names import folded
from .live.blocks import erasures_disabled
from .logging import get_logger
from .methods import MethodEntry, as_meant, get_method, make_config
from .methods.rows import TargetRows, TextConfig, TextSettings, from_tensors, join
from .registry import method_names
from .schema import LORA_FILE, Concept, Method
from .settings.texts import template_list
from .stock_lora import summed_stock_lora
from .stored import with_stored_denoiser


logger = get_logger(__name__)

Source = Erasure | str | os.PathLike[str]
# Settings in which the parts of a joint solve may differ: what they say of concepts, and how the result is published.
FREE = (
    "retain",
    "retain_default",
    "retain_excluded",
    "retain_prompts",
    "rank",
    "max_error",
    "layer",
    "templates",
    "retain_templates",
    ANCHORS_PICKED,
)


def combine(
    erasures: Sequence[Source],
    *,
    pipe: Any = None,
    mode: Literal["joint", "sum"] = "joint",
    retain: Any = None,
    rank: int | None = None,
    max_error: float | None = None,
) -> Erasure:
    """Make one erasure of several.

    Args:
        erasures (sequence of [`Erasure`], `str` or `os.PathLike`): two or more: in memory, folders, or repositories.
        pipe ([`DiffusionPipeline`], *optional*): the base model; `"joint"` needs it.
        mode (`"joint"` or `"sum"`, *optional*, defaults to `"joint"`): `"joint"` solves again, as if all targets had been
            given to `erase` at once: erasures of one closed-form method, one base model and the same settings, from the
            text rows that they keep; their prompts are not needed, so that they may be redacted. `"sum"` adds the edits of
            any LoRA, text-map and adapter erasures of one base model, exactly: what loading all of them does.
        retain (*optional*): joint: what must not change, as in [`erase`]; by default what the parts retained, all together,
            without what names one of the targets.
        rank (`int`, *optional*), max_error (`float`, *optional*): truncate; the error is recorded. For SDXL edits that map each
            text encoder's half of a row by itself both hold for each half.

    Returns:
        [`Erasure`]: redacted, where one of the parts is.

    Raises:
        ErasureInputError: fewer than two erasures; a target twice; other methods or settings (joint); kept rows or retained
            prompts missing (joint); a layer that is neither `lora`, `text_map`, `gated_map` nor `adapter` (sum); a schedule or a gate.
        ErasureCompatibilityError: they were made for different base models, or for another one than `pipe`.

    Examples:

    ```py
    >>> combined = combine(["user/no-hundred-artists", new_one], pipe=pipe)
    >>> combined.push_to_hub("user/no-hundred-and-one-artists")
    ```
    """
    parts = [part if isinstance(part, Erasure) else Erasure.from_pretrained(part) for part in erasures]
    if len(parts) < 2:
        raise ErasureInputError(f"`combine` takes two or more erasures, not {len(parts)}.")
    if mode not in ("joint", "sum"):
        raise ErasureInputError(f'`mode` must be "joint" or "sum", not {mode!r}.')
    modified = [i for i, part in enumerate(parts, start=1) if any(layer.is_modified for layer in part.config.layers)]
    if modified:
        raise ErasureInputError(f"Erasure number {modified[0]} has a schedule or a gate, which no combined edit has.")
    TextConfig(rank=rank, max_error=max_error)  # checks them
    _check_one_base(parts)
    names = [concept.target for part in parts for concept in part.concepts if concept.target is not None]
    alike = [folded(name) for name in names]
    twice = next((name for name in names if alike.count(folded(name)) > 1), None)
    if twice is not None:
        raise ErasureInputError(f"Two of the erasures remove {twice!r}; leave one of them out.")
    if mode == "sum":
        if retain is not None:
            raise ErasureInputError("`retain` goes with the mode 'joint': a sum is not solved again.")
        combined = _sum(parts, rank or None, max_error or None)  # 0 is no limit
    else:
        combined = _joint(parts, pipe, retain, rank, max_error)
    if any(part.config.redacted for part in parts):
        return combined.redacted()
    return combined


def _check_one_base(parts: Sequence[Erasure]) -> None:
    first = parts[0].config.base_model
    for index, part in enumerate(parts[1:], start=2):
        other = part.config.base_model
        if other.family != first.family:
            raise ErasureCompatibilityError(
                f"The first erasure was made for {first.family}, number {index} for {other.family}."
            )
        for name in first.components.keys() & other.components.keys():
            match = same_component(first.components[name], other.components[name])
            if match not in ("same", "unverified"):
                raise ErasureCompatibilityError(
                    f"The first erasure and number {index} were made for base models with different {name}: "
                    f"{first.repo or 'a local model'} and {other.repo or 'a local model'}."
                )


# --------------------------------------------------------------------------------------------------------- joint


def _joint(parts: Sequence[Erasure], pipe: Any, retain: Any, rank: int | None, max_error: float | None) -> Erasure:
    name, settings = _common_settings(parts)
    entry = get_method(name)
    assert entry.refit is not None
    if pipe is None:
        raise ErasureInputError("A joint solve reads the base model's weights: give the pipeline as `pipe`.")
    loaded, pipe = pipe, with_stored_denoiser(pipe)
    for part in parts:
        layers = part.config.layers
        needed = {layer.component for layer in layers}
        compare_base(
            part.config.base_model,
            pipe,
            needed=needed,
            derived_from={d for layer in layers for d in layer.derived_from},
        )
    concepts = [concept for part in parts for concept in part.concepts]
    targets = [concept.target for concept in concepts if concept.target is not None]
    # Names for messages alone: `combine` redacts the result.
    shown = [c if c.target is not None else Concept(f"redacted {i}", "") for i, c in enumerate(concepts, start=1)]
    settings.update(rank=rank, max_error=max_error)
    forms = {part.config.method.settings.get("layer") for part in parts}
    if len(forms) == 1 and None not in forms:  # else the method's default
        settings["layer"] = forms.pop()
    anchors = [concept.anchor or "" for concept in concepts]
    if retain is None:
        lists = dict.fromkeys(name for part in parts for name in part.config.method.settings.get("retain_default", ()))
        settings["retain"] = with_lists(_all_retained(parts, targets), list(lists), [*targets, *anchors])
    else:
        settings["retain"] = retained(retain, targets)
    config = make_config(entry, settings)
    with erasures_disabled(loaded), one_fit():
        combined = entry.refit(pipe, shown, config, _joined_rows(parts))
        assert isinstance(combined, Erasure)
        if not any(part.config.redacted for part in parts):  # what moved farthest would tell what is erased
            combined = Collateral(pipe, targets, anchors, task_of(targets, settings), ahead=False).added_to(combined)
    logger.info("Solved jointly for %d concepts by %s.", len(concepts), name)
    return combined


def _common_settings(parts: Sequence[Erasure]) -> tuple[str, dict[str, Any]]:
    """The method and the settings that all parts share."""
    first = parts[0].config.method
    common: dict[str, Any] = {}
    # Only what is retained is encoded again: in the templates of all parts, or in none where it was in none for one of them.
    in_templates = all(part.config.method.settings.get("retain_templates") for part in parts)
    for index, part in enumerate(parts, start=1):
        method = part.config.method
        if method.name not in method_names() or get_method(method.name).refit is None or part.config.solve is None:
            raise ErasureInputError(
                f"Erasure number {index} (made by {method.name}) keeps no rows to solve again; use mode='sum'."
            )
        if part.config.published_strength != 1:
            raise ErasureInputError(
                f"Erasure number {index} was published at {part.config.published_strength:g} of its strength, which a joint "
                "solve would undo; use mode='sum'."
            )
        if method.name != first.name:
            raise ErasureInputError(
                f"A joint solve needs one method: the first erasure is by {first.name}, number {index} by {method.name}; "
                "use mode='sum'."
            )
        if in_templates and "templates" not in method.settings:
            raise ErasureInputError(
                f"Erasure number {index} is redacted and does not say in which templates the retained prompts stood; use mode='sum'."
            )
        own = _effective(get_method(method.name), method.settings)
        common = common or own
        for key in sorted(key for key in own if own[key] != common[key]):
            raise ErasureInputError(
                f"A joint solve needs the same settings: `{key}` is {common[key]!r} in the first erasure and {own[key]!r} in "
                f"number {index}; use mode='sum'."
            )
    common["retain_templates"] = in_templates
    if in_templates:
        told = [part.config.method.settings["templates"] for part in parts]
        every = dict.fromkeys(template for each in told for template in template_list(each))
        common["templates"] = told[0] if all(each == told[0] for each in told) else tuple(every)
    return first.name, common


def _effective(entry: MethodEntry, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings with what was left out, as erasures of earlier versions do, filled in; without those that are free."""
    given = {key: value for key, value in as_meant(entry, recorded).items() if key not in FREE}
    resolved = entry.resolved(make_config(entry, given))
    if not isinstance(resolved, TextSettings):
        raise ErasureInputError(
            f"The method {entry.name!r} offers to solve again, but its `Settings` are no `TextSettings`; use mode='sum'."
        )
    settings, _ = resolved.recorded()
    return {key: value for key, value in settings.items() if key not in FREE}


def _all_retained(parts: Sequence[Erasure], targets: Sequence[str]) -> Retained:
    """What the parts retained, all together, without what names one of all their targets."""
    prompts: dict[str, None] = {}
    source: dict[str, None] = {}
    excluded: dict[str, None] = {}
    for index, part in enumerate(parts, start=1):
        settings = part.config.method.settings
        if settings.get("retain_prompts") and "retain" not in settings:
            raise ErasureInputError(
                f"Erasure number {index} is redacted or its list too long, and does not say what it retained "
                f"({settings['retain_prompts']} prompts); "
                "give `retain`."
            )
        own = dict.fromkeys(str(item) for item in settings.get("retain", ()))
        source.update(own)
        texts = expand(list(own), "retain") if own else []
        if "retain_excluded" not in settings and settings.get("retain_prompts") != len(texts):
            raise ErasureInputError(
                f"Erasure number {index} is redacted, and of the list that it retained some entries named its targets; which "
                "ones it no longer says. Give `retain`, without them."
            )
        excluded.update(dict.fromkeys(str(item) for item in settings.get("retain_excluded", ())))
        prompts.update(dict.fromkeys(texts))
    dropped = [prompt for prompt in prompts if prompt in excluded or names_any(prompt, targets)]
    kept = tuple(prompt for prompt in prompts if prompt not in set(dropped))
    news = [prompt for prompt in dropped if prompt not in excluded]
    if news:
        logger.warning("No longer retained, because another part removes it: %s", ", ".join(map(repr, news[:5])))
    return Retained(kept, tuple(source), tuple(dropped))


def _joined_rows(parts: Sequence[Erasure]) -> dict[str, dict[str, TargetRows]]:
    """For each stage of the method and each input of the denoiser the rows of all parts."""
    stages: dict[str, dict[str, list[TargetRows]]] = {}
    for part in parts:
        spec = part.config.solve
        assert spec is not None
        for stage in sorted({key.rpartition(".")[0] for key in spec.rows}):
            found = from_tensors(part.solve_tensors(), spec.rows, f"{stage}." if stage else "")
            for name, rows in found.items():
                stages.setdefault(stage, {}).setdefault(name, []).append(rows)
    if any(len(rows) != len(parts) for inputs in stages.values() for rows in inputs.values()):
        raise ErasureInputError("The erasures keep different sets of rows; use mode='sum'.")
    return {stage: {name: join(rows) for name, rows in inputs.items()} for stage, inputs in stages.items()}


# ----------------------------------------------------------------------------------------------------------- sum


def _sum(parts: Sequence[Erasure], rank: int | None, max_error: float | None) -> Erasure:
    members: dict[str, list[Summand]] = {}
    for number, part in enumerate(parts, start=1):
        stated = part.config.stock.error if part.config.stock and not part.lora_for_others() else 0.0
        for spec in part.config.layers:
            error = stated if spec.file == LORA_FILE else 0.0
            member = Summand(f"Erasure number {number}", spec, part.layer_tensors(spec), error)
            members.setdefault(spec.kind, []).append(member)
    layers: list[Layer] = []
    in_lora = besides = 0.0  # the largest errors: the LoRA file states its own
    for name, own in members.items():
        kind = layer_kind(name)
        for layer, error in kind.summed(own, rank, max_error):
            layers.append(layer)
            in_lora = max(in_lora, error if kind.file == LORA_FILE else 0.0)
            besides = max(besides, error if kind.file != LORA_FILE else 0.0)
    described = [
        {
            "method": part.config.method.name,
            "concepts": len(part.concepts),
            "published_strength": part.config.published_strength,
        }
        for part in parts
    ]
    concepts = [concept for part in parts for concept in part.concepts]
    if any(part.config.redacted for part in parts):
        concepts = [dataclasses.replace(concept, target=None, anchor=None) for concept in concepts]
    summed = Erasure.from_layers(
        layers,
        base=parts[0].config.base_model,
        concepts=concepts,
        method=Method("sum", {"parts": described, "rank": rank, "max_error": max_error}),
        error=in_lora,
        diagnostics={"truncation_error": rounded(besides)} if besides else {},
    )
    summed = summed_stock_lora(summed, parts)
    if summed.config.stock is None and any(part.config.stock for part in parts):
        mixed = 'it has maps and LoRAs. It can load one of parts that were made with `layer="lora"`.'
        alone = "not all parts carry a LoRA for it. `with_stock_lora` gives one to the sum."
        logger.warning("Stock diffusers cannot load the sum, as %s", mixed if len(members) > 1 else alone)
    return summed
