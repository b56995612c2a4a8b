"""How an erasure that a pipeline's weights contain already is recognised, so that it does not act twice.

Two ways, as a model may be moved, renamed or pushed by other tools: the provenance file beside the weights, which counts
only while the weights are those that it describes; and the weights alone, which differ from the base model that the
erasure recorded by just the change that the erasure makes (this also finds an erasure that stock diffusers has fused).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import compat
from ..artifact import Erasure
from ..base_model import component, denoiser_name
from ..errors import ErasureCompatibilityError, ErasureError, ErasureInputError
from ..fingerprints import compare_component, sampled_values, stored_values
from ..layers import WeightChange, layer_kind
from ..logging import get_logger
from ..schema.erased_model import MAX_BYTES, PLACES, Provenance


logger = get_logger(__name__)

# Between the change that is found and the one that an erasure makes; what is unrelated has about 0.
ALIKE = 0.95


def check_not_contained(pipe: Any, erasure: Erasure, content: str, match: Mapping[str, str]) -> None:
    """Refuse an erasure that the pipeline's weights contain already.

    Args:
        pipe: the pipeline.
        erasure ([`Erasure`]): what is to be loaded.
        content (`str`): its content's hash.
        match (`dict`): what [`compare_base`] found.

    Raises:
        ErasureInputError: it is contained; loaded as well it would act twice.
    """
    provenance = _provenance_of(pipe)
    for each in provenance.contains if provenance is not None else ():
        if each.content_hash == content:
            raise ErasureInputError(
                f"This erasure is already contained in the model, as {each.name!r} at strength {each.strength:g}: its weights "
                "were exported with it. Loaded as well it would act twice. To set its strength, load it onto the base model."
            )
    changed = [layer.component for layer in erasure.config.layers if match.get(layer.component) == "different weights"]
    if changed and _is_in_the_weights(pipe, erasure, set(changed)):
        raise ErasureInputError(
            f"This erasure is already contained in the model: the weights of its {sorted(set(changed))} differ from the base "
            "model's by the change that this erasure makes (fused and saved). Loaded as well it would act twice."
        )


def _provenance_of(pipe: Any) -> Provenance | None:
    """The provenance file of the folder from which the denoiser came, if its weights are still those of the file."""
    name = denoiser_name(pipe)
    model = component(pipe, name)
    source = compat.name_or_path(model)
    if not source:
        return None
    folder = Path(source)
    for path in (parent / place for parent in (folder.parent, folder) for place in PLACES):
        try:
            if not path.is_file() or path.stat().st_size > MAX_BYTES:
                continue
            data = path.read_bytes()
            if b'"erased-model"' not in data:  # the folder of an erasure
                continue
            found = Provenance.from_json(data)
            live = {each: component(pipe, each) for each in found.erased_model}
            same = all(
                isinstance(live[each], nn.Module) and compare_component(each, stored, live[each]) == "same"
                for each, stored in found.erased_model.items()
            )
        except (ErasureError, OSError) as error:
            logger.warning("%s was left aside: %s", path, error)
            continue
        if same:
            return found
    return None


def _is_in_the_weights(pipe: Any, erasure: Erasure, changed: set[str]) -> bool:
    """Whether the sampled values differ from the recorded base's along the erasure's own change of weights."""
    found: list[np.ndarray] = []
    expected: list[np.ndarray] = []
    for name in changed:
        stored, model = erasure.config.base_model.components.get(name), component(pipe, name)
        if stored is None:
            return False
        samples, reference = sampled_values(model), stored_values(stored)
        if len(reference) != sum(len(each.values) for each in samples):
            return False
        changes = _changes(pipe, erasure, name)
        start = 0
        for each in samples:
            values = each.values.double().numpy()
            difference = values - reference[start : start + len(values)]
            start += len(values)
            change = _expected(changes.get(each.owner, ()), each.name, each.positions) if each.positions else None
            if change is not None:
                found.append(difference)
                expected.append(change.numpy())
    if not found:
        return False
    actual, wanted = np.concatenate(found), np.concatenate(expected)
    if len(actual) < 8 or not np.isfinite(actual).all() or not np.isfinite(wanted).all():
        return False
    norms = float(np.linalg.norm(actual) * np.linalg.norm(wanted))
    return norms > 0 and float(actual @ wanted) > ALIKE * norms


def _changes(pipe: Any, erasure: Erasure, name: str) -> dict[nn.Module, list[WeightChange]]:
    """What an erasure changes in the weights of a component, by module; layers that are no change of weights are left out."""
    changes: dict[nn.Module, list[WeightChange]] = {}
    for layer in erasure.config.layers:
        if layer.component != name:
            continue
        kind, tensors = layer_kind(layer.kind), erasure.layer_tensors(layer)
        kind.check(component(pipe, name), layer, tensors)
        try:
            found = kind.weight_changes(component(pipe, name), layer, tensors)
        except ErasureCompatibilityError:
            continue
        for change in found:
            changes.setdefault(change.module, []).append(change)
    return changes


def _expected(changes: Sequence[WeightChange], name: str, positions: list[int]) -> torch.Tensor | None:
    """What some changes added to one parameter, where any of them can tell."""
    values = [value for each in changes if (value := each.values(name, positions)) is not None]
    return sum(values[1:], values[0]) if values else None
