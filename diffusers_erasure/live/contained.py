"""How an erasure that a pipeline's weights contain already is recognised, so that it does not act twice.

Two ways, as a model may be moved, renamed or pushed by other tools: the provenance file beside the weights, which counts
only while the weights are those that it describes; and the weights alone, which differ from the base model that the
erasure recorded by just the change that the erasure makes (this also finds an erasure that stock diffusers has fused).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import compat
from ..artifact import Erasure
from ..base_model import (
    compare_component,
    component,
    denoiser_name,
    sampled_values,
    stored_values,
    text_readers,
)
from ..errors import ErasureError, ErasureInputError
from ..layers import layer_kind
from ..layers.lora import find_site
from ..logging import get_logger
from ..low_rank import DOWN, UP
from ..provenance import MAX_BYTES, PLACES, Provenance


logger = get_logger(__name__)

# Between the change that is found and the one that an erasure makes; what is unrelated has about 0.
ALIKE = 0.95


def check_not_contained(pipe: Any, erasure: Erasure, match: Mapping[str, str]) -> None:
    """Refuse an erasure that the pipeline's weights contain already.

    Args:
        pipe: the pipeline.
        erasure ([`Erasure`]): what is to be loaded.
        match (`dict`): what [`compare_base`] found.

    Raises:
        ErasureInputError: it is contained; loaded as well it would act twice.
    """
    provenance = _provenance_of(pipe)
    content = erasure.content_hash
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
            change = changes.get(each.owner) if each.name == "weight" else None
            if change is not None and each.positions:
                found.append(difference)
                expected.append(change(each.positions).numpy())
    if not found:
        return False
    actual, wanted = np.concatenate(found), np.concatenate(expected)
    if len(actual) < 8 or not np.isfinite(actual).all() or not np.isfinite(wanted).all():
        return False
    norms = float(np.linalg.norm(actual) * np.linalg.norm(wanted))
    return norms > 0 and float(actual @ wanted) > ALIKE * norms


class _LoraChange:
    """Values of B A at positions of the flattened weight."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        self.down, self.up = down.double().flatten(1), up.double().flatten(1)

    def __call__(self, positions: list[int]) -> torch.Tensor:
        width = self.down.shape[1]
        rows, columns = [p // width for p in positions], [p % width for p in positions]
        return (self.up[rows] * self.down[:, columns].T).sum(1)


class _MapChange:
    """Values of W (T - I) at positions of the flattened weight, from W T, which is what a fused reader holds."""

    def __init__(self, weight: torch.Tensor, a: torch.Tensor, d: torch.Tensor) -> None:
        weight = weight.detach()
        self.weight = weight if weight.dtype.itemsize > 1 else weight.float()  # float8 has no indexing
        self.map = torch.eye(a.shape[1]).double() + d.double().T @ a.double()

    def __call__(self, positions: list[int]) -> torch.Tensor:
        width = self.weight.shape[1]
        rows = self.weight[[p // width for p in positions]].to("cpu", torch.float64)
        before = torch.linalg.lstsq(self.map.T, rows.T).solution.T
        return (rows - before)[torch.arange(len(positions)), [p % width for p in positions]]


def _changes(pipe: Any, erasure: Erasure, name: str) -> dict[nn.Module, "_LoraChange | _MapChange"]:
    changes: dict[nn.Module, _LoraChange | _MapChange] = {}
    for layer in erasure.config.layers:
        tensors = erasure.layer_tensors(layer)
        if layer.component != name:
            continue
        layer_kind(layer.kind).check(component(pipe, name), layer, tensors)
        if layer.kind == "lora":
            for site in layer.sites:
                module = find_site(component(pipe, name), site)
                changes[module] = _LoraChange(tensors[site + DOWN], tensors[site + UP])
        elif layer.kind == "text_map" and layer.sites == ("encoder_hidden_states",):
            for module in text_readers(pipe).values():
                weight = module.weight
                if weight.device.type != "meta" and weight.shape[1:] == tensors["A"].shape[1:]:
                    changes[module] = _MapChange(weight, tensors["A"], tensors["D"])
    return changes
