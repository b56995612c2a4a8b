"""`erasure_config.json`: the dataclasses of schema 1.1, which `strict_json` reads and whose ranges they check themselves.

No string of the file is ever used as an import path, a file name outside the schema, or a regular expression.
"""

import base64
import binascii
import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from ..showing import as_html, as_text, base_repr, config_rows
from .strict_json import load_json, read_as, require


SCHEMA = "1.1"
CONFIG_FILE = "erasure_config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
TENSOR_FILE = "erasure.safetensors"
CARD_FILE = "README.md"
GRID_FILE = "before_after.png"
TENSOR_FILES = (LORA_FILE, TENSOR_FILE)
SOLVE_PREFIX = "solve."
MODIFIER_PREFIX = "modifiers."

MAX_CONFIG_BYTES = 256 * 1024
MAX_FILE_BYTES = 4 * 2**30
MAX_LAYERS = 64
MAX_SITES = 8192
MAX_CONCEPTS = 10_000
MAX_BINS = 1000

SITE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", re.ASCII)
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # on which an erasure may act
COMPONENT = re.compile(r"(unet|transformer|text_encoder(_[23])?|tokenizer(_[23])?)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
# A site under one of these names would be an adapter's or this library's own module, not the base model's.
_FOREIGN = ("erasure_modules", "base_layer", "lora_A", "lora_B", "_orig_mod", "processor")
_FLOATS = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)


def _require_names(**names: str | None) -> None:
    """Names go into messages and logs: short, and without what would steer a terminal."""
    for key, name in names.items():
        plain = name is None or (len(name) <= 200 and name.isprintable())
        require(plain, f"`{key}` must be at most 200 printable characters, not {str(name)[:80]!r}.")


@dataclass(frozen=True)
class Library:
    """The library and version that wrote the file."""

    name: str
    version: str

    def __post_init__(self) -> None:
        _require_names(library=self.name, version=self.version)


@dataclass(frozen=True)
class Method:
    """How the erasure was made. `concept_settings` names the settings whose text would reveal a concept."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    concept_settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(0 < len(self.name) <= 64, "`method.name` must have 1 to 64 characters.")
        _require_names(method=self.name)


@dataclass(frozen=True)
class Component:
    """What identifies one component of the base model.

    Attributes:
        class_name: class of the component, for people and for error messages; never imported.
        architecture: SHA-256 over the names and shapes of its parameters, or over a tokenizer's vocabulary.
        dtype: coarsest dtype of the sampled values; `None` for a tokenizer.
        values: sampled parameter values, little-endian float32 in base64; `None` for a tokenizer.
        serialised: SHA-256 over a tokenizer's vocabulary as the library `tokenizers` writes it; `None` for a model, where it
            is not known, and in artefacts made before there was that. Where it is equal, `architecture` need not be computed.
    """

    class_name: str
    architecture: str = field(repr=False)
    dtype: str | None = None
    values: str | None = field(default=None, repr=False)
    serialised: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(bool(_SHA256.fullmatch(self.architecture)), "`architecture` must be a SHA-256 in hexadecimal.")
        plain = self.serialised is None or (self.values is None and bool(_SHA256.fullmatch(self.serialised)))
        require(plain, "`serialised` must be a SHA-256 in hexadecimal, and goes without `values`.")
        _require_names(class_name=self.class_name)
        require((self.dtype is None) == (self.values is None), "`dtype` and `values` go together.")
        require(self.dtype is None or self.dtype in _FLOATS, f"`dtype` must be one of {_FLOATS}.")
        require(self.values is None or len(self.values) <= 96 * 1024, "`values` holds too many samples.")
        try:
            size = len(base64.b64decode(self.values or "", validate=True))
        except (binascii.Error, ValueError):
            size = -1
        require(size >= 0 and size % 4 == 0, "`values` must be float32 numbers in base64.")


@dataclass(frozen=True)
class BaseModel:
    """The pipeline that the erasure was made for. Without `components` nothing can be compared on loading."""

    family: str
    repo: str | None = None
    revision: str | None = None
    components: dict[str, Component] = field(default_factory=dict)

    def __repr__(self) -> str:
        return base_repr(self)

    @property
    def text_components(self) -> tuple[str, ...]:
        """What encodes the text: with another one there, what was made from its rows would miss."""
        return tuple(sorted(name for name in self.components if name not in ("unet", "transformer")))

    def __post_init__(self) -> None:
        _require_names(family=self.family, repo=self.repo, revision=self.revision)
        for name in self.components:
            known = bool(COMPONENT.fullmatch(name))
            require(known, f"`base_model.components` has an unknown component {name[:80]!r}.")


@dataclass(frozen=True)
class Concept:
    """A concept that is removed, and what it is mapped to. Both are `None` in a redacted erasure."""

    target: str | None
    anchor: str | None = None


def _require_modifier_name(name: str) -> None:
    valid = name.startswith(MODIFIER_PREFIX) and len(name) <= 128 and bool(SITE.fullmatch(name))
    require(valid, f"A modifier's tensor must be named {MODIFIER_PREFIX}…, not {name[:80]!r}.")


@dataclass(frozen=True)
class ScheduleSpec:
    """Strength by timestep and site: a table that multiplies a layer's strength.

    Attributes:
        name: its tensor [bins, sites] in `erasure.safetensors`; [bins, 1] is the same for all sites.
        bins: the timesteps from 0 to `span` are divided into so many; row `floor(t * bins / span)`.
        span: the base model's number of training timesteps.
    """

    name: str
    bins: int
    span: float = 1000.0

    def __post_init__(self) -> None:
        _require_modifier_name(self.name)
        require(0 < self.bins <= MAX_BINS, f"A schedule must have 1 to {MAX_BINS} `bins`.")
        require(0 < self.span <= 1e6, "A schedule's `span` must be above 0, and at most a million.")


@dataclass(frozen=True)
class GateSpec:
    """Strength by the prompt: a factor for each row of the batch. It weakens an erasure, for prompts that seem unrelated.

    The factor is `factor` times the largest cosine between the prompt's text rows, flattened, and those of the concepts;
    1 where the text is not known. With `probes` it is `factor` where a probe finds a name in one of the rows, and else 0.

    Attributes:
        name: its tensor [concepts, length, width] in `erasure.safetensors`: the encoded concepts; or [probes, width + 2], probes with
            their thresholds in two halves behind them.
        factor: multiplies the cosine.
        layout: `"row"`: each row of the batch by its own text; `"uncond_first"`: the first half of the batch holds the
            unconditional rows, and they get the factor of the conditional ones.
        tokens: token ids of each concept, without special ones. With them the factor is at least the share of a
            concept's tokens that the prompt holds; where no text encoder was seen to encode the prompt, it is 1.
        probes: whether it is one of probes, which has no tokens.
    """

    name: str
    factor: float = 1.0
    layout: str = "row"
    tokens: tuple[tuple[int, ...], ...] | None = None
    probes: bool = False

    def __post_init__(self) -> None:
        _require_modifier_name(self.name)
        require(0 < self.factor < math.inf, "A gate's `factor` must be a finite number above 0.")
        require(self.layout in ("row", "uncond_first"), "A gate's `layout` must be 'row' or 'uncond_first'.")
        for ids in self.tokens or ():
            plain = 0 < len(ids) <= 1000 and all(0 <= each < 2**24 for each in ids)
            require(plain, "A gate's `tokens` must be lists of token ids.")
        require(self.tokens is None or len(self.tokens) > 0, "A gate's `tokens` must not be empty; leave it out.")
        require(self.tokens is None or not self.probes, "A gate of `probes` has no `tokens`.")


@dataclass(frozen=True)
class LayerSpec:
    """One layer of an erasure.

    Attributes:
        kind: a layer kind of this library's registry.
        component: the pipeline's component on which it acts.
        sites: the modules (or named inputs) of that component on which it acts.
        file: the tensor file that holds its tensors.
        prefix: what its tensors' names start with.
        derived_from: components whose weights the tensors were computed from; another one there is an error.
        schedule: strength by timestep and site.
        gate: strength by prompt.
    """

    kind: str
    component: str
    sites: tuple[str, ...]
    file: str
    prefix: str
    derived_from: tuple[str, ...] = ()
    schedule: ScheduleSpec | None = None
    gate: GateSpec | None = None

    def __post_init__(self) -> None:
        known = bool(COMPONENT.fullmatch(self.component))
        require(known, f"A layer acts on unknown component {self.component[:80]!r}.")
        require(self.file in TENSOR_FILES, f"A layer's `file` must be one of {TENSOR_FILES}, not {self.file[:80]!r}.")
        require(0 < len(self.sites) <= MAX_SITES, f"A layer must have 1 to {MAX_SITES} `sites`.")
        require(len(set(self.sites)) == len(self.sites), "A layer names one of its `sites` twice.")
        for site in self.sites:
            require(len(site) <= 256 and bool(SITE.fullmatch(site)), f"{site[:80]!r} cannot be the name of a site.")
            parts = site.split(".")
            dunder = any(part.startswith("__") for part in parts)
            require(not dunder and not set(parts) & set(_FOREIGN), f"{site[:80]!r} is not a site of a base model.")
        require(len(self.prefix) <= 128 and bool(SITE.fullmatch(self.prefix + "x")), "A layer's `prefix` is invalid.")
        for name in self.derived_from:
            require(bool(COMPONENT.fullmatch(name)), f"`derived_from` names unknown component {name[:80]!r}.")
        denoises = self.component in ("unet", "transformer")
        require(denoises or not self.is_modified, "Only a layer on the denoiser can have a `schedule` or a `gate`.")

    @property
    def is_modified(self) -> bool:
        """Whether it has a schedule or a gate."""
        return self.schedule is not None or self.gate is not None

    @property
    def modifier_names(self) -> list[str]:
        """Names of the tensors of its schedule and gate, in `erasure.safetensors`."""
        return [modifier.name for modifier in (self.schedule, self.gate) if modifier is not None]


@dataclass(frozen=True)
class Stock:
    """The LoRA file, which `diffusers` alone loads: the same edit as the layers make, or an approximation of it.

    Attributes:
        file: its name.
        error: how far it is from the layers' edit: the largest over all sites of |file's delta - exact delta| / |exact
            delta| (Frobenius norms). Of an exact one that is rounding, and truncation where its rank was limited.
        form: `"exact"` or `"approximate"`.
        results: what was measured on images with the LoRA file; `results` of the configuration are the layers'.
    """

    file: str
    error: float
    form: str = "exact"
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.file == LORA_FILE, f"`stock.file` must be {LORA_FILE!r}.")
        require(self.form in ("exact", "approximate"), "`stock.form` must be 'exact' or 'approximate'.")
        largest = 1.0 if self.is_exact else math.inf
        require(0 <= self.error < largest, f"`stock.error` must be at least 0 and below {largest:g}.")

    @property
    def is_exact(self) -> bool:
        """Whether it is the same edit."""
        return self.form == "exact"


@dataclass(frozen=True)
class SolveRows:
    """Of one set of text rows: the mean of |x|^2, how many rows were encoded, and from how many prompts."""

    squares: float
    count: int
    prompts: int

    def __post_init__(self) -> None:
        require(self.squares >= 0, "`squares` must be at least 0.")
        require(0 < self.prompts <= self.count < 2**40, "`prompts` and `count` must be above 0.")


@dataclass(frozen=True)
class SolveSpec:
    """The text rows from which the erasure was solved, kept so that others can join it. They are never attached.

    Attributes:
        file: the tensor file that holds them.
        prefix: what their names start with; then come the set's name and `.targets`, `.anchors`, `.probe_targets` or
            `.probe_anchors`.
        rows: the sets, by name.
    """

    file: str
    prefix: str
    rows: dict[str, SolveRows]

    def __post_init__(self) -> None:
        require(self.file == TENSOR_FILE, f"`solve.file` must be {TENSOR_FILE!r}.")
        require(self.prefix == SOLVE_PREFIX, f"`solve.prefix` must be {SOLVE_PREFIX!r}.")
        require(0 < len(self.rows) <= 8, "`solve.rows` must name 1 to 8 sets.")
        for name in self.rows:
            require(len(name) <= 64 and bool(SITE.fullmatch(name)), f"`solve.rows` has a set {name[:80]!r}.")


@dataclass(frozen=True)
class FileRecord:
    """SHA-256 and size in bytes of a tensor file."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        require(bool(_SHA256.fullmatch(self.sha256)), "`sha256` must have 64 hexadecimal digits.")
        require(0 < self.size <= MAX_FILE_BYTES, f"A tensor file must have 1 to {MAX_FILE_BYTES} bytes.")


@dataclass(frozen=True)
class ErasureConfig:
    """The whole of `erasure_config.json`. No timestamps: the same inputs give the same bytes."""

    schema: str
    library: Library
    method: Method
    base_model: BaseModel
    concepts: tuple[Concept, ...]
    layers: tuple[LayerSpec, ...]
    files: dict[str, FileRecord] = field(default_factory=dict)
    stock: Stock | None = None
    solve: SolveSpec | None = None
    redacted: bool = False
    published_strength: float = 1.0
    diagnostics: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return as_text("ErasureConfig", config_rows(self))

    def _repr_html_(self) -> str:
        return as_html("ErasureConfig", config_rows(self))

    def __post_init__(self) -> None:
        require(0 < len(self.layers) <= MAX_LAYERS, f"An erasure must have 1 to {MAX_LAYERS} `layers`.")
        require(len(self.concepts) <= MAX_CONCEPTS, f"An erasure may name at most {MAX_CONCEPTS} `concepts`.")
        require(0 < self.published_strength < math.inf, "`published_strength` must be a finite number above 0.")
        require(set(self.files) <= set(TENSOR_FILES), f"`files` may name only {TENSOR_FILES}.")
        require(
            not self.redacted or all(c.target is None and c.anchor is None for c in self.concepts),
            "`redacted` is set, but `concepts` are named.",
        )
        modified = any(layer.is_modified for layer in self.layers)
        require(
            self.stock is None or not self.stock.is_exact or not modified,
            "`stock` is exact, but a layer has a schedule or a gate, which no LoRA has.",
        )
        prefixes = [(layer.file, layer.prefix) for layer in self.layers]
        prefixes += [(self.solve.file, self.solve.prefix)] if self.solve else []
        require(len(set(prefixes)) == len(prefixes), "Two layers have the same `file` and `prefix`.")
        reserved = any(prefix.startswith(MODIFIER_PREFIX) for _, prefix in prefixes)
        names = [name for layer in self.layers for name in layer.modifier_names]
        require(
            not reserved and len(set(names)) == len(names), "Modifiers share a tensor, or a layer has their prefix."
        )

    @property
    def tensor_files(self) -> set[str]:
        """Names of the files in which the layers, the rows of `solve` and the LoRA for others lie."""
        modified = {TENSOR_FILE for layer in self.layers if layer.is_modified}
        besides = {part.file for part in (self.solve, self.stock) if part is not None}
        return {layer.file for layer in self.layers} | modified | besides

    def to_json(self) -> str:
        """Write the configuration as JSON: sorted keys, two spaces, one newline at the end."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text + "\n"

    @classmethod
    def from_json(cls, data: bytes) -> "ErasureConfig":
        """Read and check a configuration.

        Args:
            data (`bytes`): the file's content, UTF-8, at most 256 KiB.

        Raises:
            ErasureConfigError: it is no valid configuration of schema 1.x.
        """
        raw = load_json(data, CONFIG_FILE, MAX_CONFIG_BYTES)
        require(isinstance(raw, dict), "The configuration must be a JSON object.")
        require(
            raw.get("kind") != "erased-model",
            "This is the provenance of a whole erased model, which holds no erasure: load it with "
            "`DiffusionPipeline.from_pretrained`.",
        )
        schema = raw.get("schema")
        match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", schema, re.ASCII) if isinstance(schema, str) else None
        require(match is not None, f"`schema` must look like {SCHEMA!r}, not {str(schema)[:80]!r}.")
        assert match is not None
        require(
            int(match[1]) == int(SCHEMA.split(".")[0]),
            f"The erasure has schema {schema}, this version of diffusers-erasure reads {SCHEMA}. "
            "Upgrade diffusers-erasure.",
        )
        config: ErasureConfig = read_as(cls, _upgraded(raw, int(match[2])), CONFIG_FILE)
        return config


def _upgraded(raw: dict[str, Any], minor: int) -> dict[str, Any]:
    """A configuration of schema 1.0 as one of 1.1: there `stock` was exact where it was there at all."""
    if minor > 0:
        return raw
    stock = raw.get("stock")
    if stock is not None:
        old = isinstance(stock, dict) and set(stock) == {"file", "max_error"}
        require(old, "`stock` of schema 1.0 must be an object with the keys 'file' and 'max_error'.")
        layers = raw.get("layers")
        whole = isinstance(layers, list) and all(
            isinstance(each, dict) and each.get("file") == LORA_FILE and not (each.get("schedule") or each.get("gate"))
            for each in layers
        )
        require(whole, "`stock` is set, but a layer lies outside the LoRA file, or is modified.")
        stock = {"file": stock["file"], "error": stock["max_error"]}
    return {**raw, "schema": SCHEMA, "stock": stock}
