"""`erasure_config.json` of a whole erased model: what it says of itself."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from .erasure import CONFIG_FILE, SCHEMA, BaseModel, Component, ErasureConfig, Library
from .strict_json import load_json, read_as, require


KIND = "erased-model"
MAX_BYTES = 4 * 2**20
# Where the file lies. The Hub's downloads of pipelines take whole folders of schedulers, and no JSON file beside them.
PLACES = (CONFIG_FILE, f"scheduler/{CONFIG_FILE}")


@dataclass(frozen=True)
class Contained:
    """One erasure within the weights: its name, the strength, and its configuration without fingerprints."""

    name: str
    strength: float
    content_hash: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Provenance:
    """`erasure_config.json` of a whole erased model (an erasure's own has no `kind`).

    Attributes:
        schema: version of this schema.
        kind: always `"erased-model"`.
        library: what wrote it.
        base_model: the model before, with the fingerprints of its components.
        erased_model: the fingerprints of the changed components as they are in this model.
        contains: the erasures.
    """

    schema: str
    kind: str
    library: Library
    base_model: BaseModel
    erased_model: dict[str, Component]
    contains: tuple[Contained, ...]

    def to_json(self) -> str:
        """Write it as JSON: sorted keys, two spaces, one newline at the end."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Provenance":
        """Read and check a provenance file.

        Raises:
            ErasureConfigError: it is not valid, or no provenance file.
        """
        name = "The provenance file"
        found: Provenance = read_as(cls, load_json(data, name, MAX_BYTES), name)
        known = found.kind == KIND and found.schema.split(".")[0] == SCHEMA.split(".")[0]
        require(known, f"Kind {found.kind[:40]!r} of schema {found.schema[:40]!r} is not known here.")
        return found


def contained_config(config: ErasureConfig) -> dict[str, Any]:
    """An erasure's configuration, for a provenance file: without fingerprints, which stand there once."""
    base = dataclasses.replace(config.base_model, components={})
    return json.loads(dataclasses.replace(config, base_model=base, files={}).to_json())
