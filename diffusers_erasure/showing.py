"""How an erasure shows itself, in a terminal and in a notebook: what it removes and how, in a few lines, without hashes."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .artifact import Erasure
    from .schema import BaseModel, Concept, ErasureConfig, LayerSpec


WIDTH = 96  # characters of a value
MOST_CONCEPTS, MOST_LAYERS = 5, 4
MOST_NAME = 40  # characters of a concept's name

Rows = list[tuple[str, str]]


def size_text(count: int) -> str:
    """A size in bytes, for people."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def one_line(value: Any, most: int = WIDTH) -> str:
    """Text on one line of limited length, without what would steer a terminal or turn the direction of text."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(value)).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def layer_text(layer: "LayerSpec") -> str:
    """A layer in words, such as `"lora on unet (32 sites)"`."""
    sites = layer.sites[0] if len(layer.sites) == 1 else f"{len(layer.sites)} sites"
    modified = {"by timestep": layer.schedule, "by prompt": layer.gate}
    about = ", ".join([sites, *(words for words, spec in modified.items() if spec is not None)])
    return f"{layer.kind} on {layer.component} ({about})"


def concepts_text(concepts: "Sequence[Concept]") -> str:
    """The first concepts, each with what it is mapped to, and how many more there are."""
    named = [(concept.target, concept.anchor) for concept in concepts[:MOST_CONCEPTS]]
    texts = [
        f"{one_line(target, MOST_NAME)} → {one_line(anchor or '(empty prompt)', MOST_NAME)}"
        for target, anchor in named
    ]
    more = len(concepts) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")


def base_text(base: "BaseModel") -> str:
    """The base model: its repository and family."""
    return f"{base.repo or 'a local model'} ({base.family})"


def picked_rows(config: "ErasureConfig") -> Rows:
    """That anchors were picked automatically, and how near they are."""
    picked = config.method.settings.get("anchors_picked")
    if not isinstance(picked, dict) or "candidates" not in picked:
        return []
    cosines = [value for value in picked.get("cosines", ()) if isinstance(value, float | int)]
    near = f", cosines {min(cosines):.2f} to {max(cosines):.2f}" if len(cosines) > 1 else ""
    near = f", cosine {cosines[0]:.2f}" if len(cosines) == 1 else near
    return [("anchors", f"picked automatically from {picked['candidates']} candidates{near}")]


LINEAR = {"dp": "DP", "uce": "UCE"}  # what stock diffusers gets of a gated edit may be made by these


@dataclass(frozen=True)
class Gates:
    """What an erasure's file tells of gates that are part of it (`gated_map`); of what it does not tell, `None`.

    Attributes:
        names: how many names have a probe.
        contexts: in how many contexts these were fitted and tested.
        missed: the largest share of a target's tested prompts that opened no gate of its.
        opened, tested: how many kept prompts opened a gate, of how many that were tested.
        linear: the least completeness of the linear edit that stock diffusers gets.
        linear_by: the method's name.
    """

    names: int | None = None
    contexts: int | None = None
    missed: float | None = None
    opened: int | None = None
    tested: int | None = None
    linear: float | None = None
    linear_by: str | None = None

    @classmethod
    def of(cls, config: "ErasureConfig") -> "Gates | None":
        """`None` where there are none."""
        if not any(layer.kind == "gated_map" for layer in config.layers):
            return None
        told = _part(config.diagnostics, "gates")
        contexts = _numbers(_part(told, "contexts"))
        missed = _numbers(_part(told, "missed"))
        results = {} if config.stock is None else config.stock.results
        by = next((method for method in LINEAR if method in results), None)
        linear = [] if by is None else _numbers(_part(results, by, "completeness"))
        counts = {
            name: int(number)
            for name, key in (("names", "names"), ("opened", "kept_opened"), ("tested", "kept_tested"))
            for number in _numbers({key: told.get(key)})
        }
        return cls(
            contexts=_contexts(contexts),
            missed=max(missed, default=None),
            linear=min(linear, default=None),
            linear_by=LINEAR.get(by or ""),
            **counts,
        )

    @property
    def rows(self) -> Rows:
        """In words, as labels and values."""
        calibrated = ""
        if self.names is not None and self.contexts is not None:
            calibrated = f"; {self.names} names, calibrated on {self.contexts} contexts"
        rows = [("gates", f"act in this library alone{calibrated}")]
        if self.missed is not None and self.opened is not None and self.tested is not None:
            told = f"missed {100 * self.missed:.3g} % of a target's prompts at most, opened for {self.opened} of {self.tested} others"
            rows.append(("in their test", told))
        return rows


def _part(values: Any, *names: str) -> dict[str, Any]:
    """A dictionary in dictionaries; an empty one where there is none: files may hold anything."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _contexts(kinds: list[float]) -> int | None:
    """How many there are of those that fit, set and test; few did all three."""
    few = len(kinds) == 3 and kinds[0] == kinds[1] == kinds[2] < 4
    return int(kinds[0] if few else sum(kinds)) if kinds else None


def _numbers(values: dict[str, Any]) -> list[float]:
    return [each for each in values.values() if isinstance(each, int | float) and not isinstance(each, bool)]


def rows_of(config: "ErasureConfig", sizes: dict[str, int], source: str | None = None) -> Rows:
    """What is shown, as labels and values.

    Args:
        config ([`ErasureConfig`]): the configuration.
        sizes (`dict`): bytes of its tensor files.
        source (`str`, *optional*): where it was read from.
    """
    hidden = f"{len(config.concepts)} concepts, not named"
    rows = [
        ("removes", hidden if config.redacted else concepts_text(config.concepts) or "not stated"),
        *picked_rows(config),
        ("method", config.method.name),
        ("base model", base_text(config.base_model)),
        *(("layer", layer_text(layer)) for layer in config.layers[:MOST_LAYERS]),
    ]
    more = len(config.layers) - MOST_LAYERS
    rows += [("", f"and {more} more layers")] if more > 0 else []
    gates = Gates.of(config)
    rows += [] if gates is None else gates.rows
    rows += [(name, size_text(size)) for name, size in sorted(sizes.items())]
    if config.stock is not None and any(layer.file != config.stock.file for layer in config.layers):
        same = "the same edit" if config.stock.is_exact else "an edit that comes near it"
        if gates is not None and gates.linear is not None:
            same = f"{gates.linear_by}'s linear edit, {gates.linear:.3g} complete at least"
        rows.append(("stock diffusers", f"{same}, by the LoRA in {config.stock.file}"))
    if config.published_strength != 1:
        rows.append(("strength 1 is", f"{config.published_strength:g} of the original"))
    rows += [("read from", source)] if source else []
    return [(one_line(label), one_line(value, WIDTH if label != "removes" else 5 * WIDTH)) for label, value in rows]


def as_text(title: str, rows: Rows) -> str:
    """Rows for a terminal."""
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)])


def as_html(title: str, rows: Rows) -> str:
    """Rows for a notebook, escaped."""
    cells = "".join(f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>" for label, value in rows)
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def erasure_rows(erasure: "Erasure") -> Rows:
    """What is shown of an erasure."""
    sizes = {
        name: sum(tensor.numel() * tensor.element_size() for tensor in items.values())
        for name, items in erasure.tensors.items()
    }
    return rows_of(erasure.config, sizes, erasure.source)


def config_rows(config: "ErasureConfig") -> Rows:
    """What is shown of a configuration; the sizes are known once it was saved."""
    return rows_of(config, {name: record.size for name, record in config.files.items()})


def base_repr(base: "BaseModel") -> str:
    """A base model on one line, its components by their classes."""
    parts = [f"{one_line(name)}: {one_line(part.class_name, MOST_NAME)}" for name, part in base.components.items()]
    return one_line(f"<BaseModel {base_text(base)}; {', '.join(parts) or 'components unknown'}>", 4 * WIDTH)
