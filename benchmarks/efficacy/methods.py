"""The table of methods that are compared: a line each. Re-emergence and structure take theirs from it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.efficacy.plan import Shot, retained
from benchmarks.store import Store
from diffusers_erasure import Erasure
from diffusers_erasure.demo import load_pipeline
from diffusers_erasure.demo.drawing import fast_pipeline
from diffusers_erasure.demo.words import HYPERNYMS, OBJECTS, STYLES
from diffusers_erasure.demo.worlds import WORLDS
from diffusers_erasure.registry import declaration, method_names


EMBEDDED = "sd1"  # of the tiny models


@dataclass(frozen=True)
class Entry:
    """
    How one row of the tables is made.

    Args:
        name (`str`): The row's label, and what `--methods` takes. It begins with what `erase(method=...)` gets.
        settings (`Mapping`, *optional*): What `erase` gets for every concept.
        objects (`Mapping`, *optional*, defaults to the preset `object`): What it gets besides for objects; wins over
            `settings`.
        styles (`Mapping`, *optional*, defaults to the preset `style`): The same for styles.
        erases (`bool`, *optional*, defaults to `True`): Whether it erases. A baseline draws alone, and has no settings.
        says (`str`, *optional*, defaults to `"target"`): What the prompts say of a target: itself, with `"anchor"` the anchor
            instead (what an edit would draw that maps the one to the other perfectly), or with `"not target"` itself
            and, in the negative prompt, all targets.
        max_targets (`int`, *optional*): Scenarios that erase more concepts at once are left out.
        object_anchor (`str`, *optional*): One anchor for all objects instead of each one's hypernym.
        style_anchor (`str`, *optional*, defaults to `""`): The anchor of styles.
        auto_anchors (`bool`, *optional*, defaults to `False`): Anchors are picked by the library, from the model's words, instead of the
            above; what was picked is measured.
        gated (`bool`, *optional*, defaults to `False`): Its layers act behind the probes of a gated edit of the same concepts.
        note (`str`, *optional*): What the docs say of it besides the settings.
        version (`int`, *optional*, defaults to 1): Raise it when code that the fields above do not show changes, so that
            stored results are not taken any more.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=lambda: {"preset": "object"})
    styles: Mapping[str, Any] = field(default_factory=lambda: {"preset": "style"})
    erases: bool = True
    says: str = "target"
    max_targets: int | None = None
    object_anchor: str | None = None
    style_anchor: str = ""
    auto_anchors: bool = False
    gated: bool = False
    note: str = ""
    version: int = 1

    @property
    def method(self) -> str:
        """What `erase(method=...)` gets."""
        known = [name for name in method_names() if self.name.startswith(name)]
        return max(known, key=len, default=self.name)

    @property
    def summary(self) -> str:
        """One line about it for the docs."""
        if not self.erases:
            return self.note
        parts = [declaration(self.method).summary.partition(" (")[0]]
        common, styles = {**self.settings, **self.objects}, {**self.settings, **self.styles}
        parts += [f"`{key}={value!r}`".replace("'", '"') for key, value in common.items()]
        other = {key: value for key, value in styles.items() if value != common.get(key)}
        parts += [f"for styles `{key}={value!r}`".replace("'", '"') for key, value in other.items()]
        parts += ["anchors picked automatically"] * self.auto_anchors
        parts += ["behind the probes of `gated`"] * self.gated
        parts += [f"at most {self.max_targets} at once"] * bool(self.max_targets)
        return ", ".join(parts) + (f"; {self.note}" if self.note else "")

    def anchors(self, targets: Sequence[str], erasure: Erasure | None = None) -> list[str]:
        """What each target is mapped to: what the erasure recorded, where one is given, and else what it is made with."""
        if erasure is not None:
            recorded = {concept.target: concept.anchor or "" for concept in erasure.concepts}
            return [recorded[target] for target in targets]
        if self.auto_anchors:
            raise ValueError(f"{self.name}: which anchors are picked is known once the erasure is made")
        of_object = HYPERNYMS if self.object_anchor is None else dict.fromkeys(OBJECTS, self.object_anchor)
        return [self.style_anchor if target in STYLES else of_object[target] for target in targets]

    def settings_for(self, targets: Sequence[str]) -> dict[str, Any]:
        """The method's settings for targets that are all objects or all styles."""
        return {**self.settings, **(self.styles if targets[0] in STYLES else self.objects)} if self.erases else {}

    def prompt(self, shot: Shot, targets: Sequence[str]) -> str:
        """What is drawn for a shot: its prompt, or the same about the anchor."""
        if self.says != "anchor" or shot.concept not in targets:
            return shot.prompt
        (anchor,) = self.anchors([shot.concept])
        if shot.concept in STYLES:
            return f"a {shot.object}"  # of no style, which is what the empty prompt stands for
        return shot.wording.format(object=anchor, style=shot.style)

    def drawing_for(self, targets: Sequence[str]) -> dict[str, Any]:
        """Further keyword arguments of the pipeline's call."""
        return {"negative_prompt": ", ".join(targets)} if self.says == "not target" else {}

    def works_on(self, world: str) -> bool:
        """Whether there can be such a row of a tiny model."""
        of = WORLDS[world]
        if self.erases:
            return of.family in declaration(self.method).families
        return self.says != "not target" or of.guidance_scale is not None

    def make(self, targets: Sequence[str], world: str = EMBEDDED) -> Erasure | None:
        """The erasure, made on a fresh copy of a tiny model; None for a baseline."""
        if not self.erases:
            return None
        from diffusers_erasure import erase, with_gate
        from diffusers_erasure.training import TrainingRun

        settings, method = self.settings_for(targets), declaration(self.method)
        anchors = self.given_anchors(targets)
        if not method.instead_of_retain:
            settings["retain"] = self.retained(targets)
        if method.resumable:
            settings["training"] = TrainingRun(progress=False)
        # Backward passes through channels-last weights are slow in small batches, and torch 2.13 crashes in some on a CPU.
        pipe = load_pipeline(world)
        pipe = pipe if method.resumable else fast_pipeline(pipe)
        made = erase(pipe, list(targets), anchors=anchors, method=self.method, **settings)
        if not self.gated:
            return made
        retain = self.retained(targets)
        probes = erase(
            pipe, list(targets), anchors=anchors, method="gated", retain=retain, stock="none", compare=False
        )
        return with_gate(made, pipe, by=probes)

    def given_anchors(self, targets: Sequence[str]) -> str | list[str]:
        """What `erase(anchors=...)` gets."""
        return "auto" if self.auto_anchors else self.anchors(targets)

    def retained(self, targets: Sequence[str]) -> list[str]:
        """What the method is told to keep; anchors that are picked are among it."""
        return retained(targets, [] if self.auto_anchors else self.anchors(targets))

    def identity(self, targets: Sequence[str]) -> dict[str, Any]:
        """All of the entry that the images depend on, for the key of a stored result."""
        anchors = self.given_anchors(targets)
        return {
            **{"name": self.name, "says": self.says, "version": self.version, "anchors": anchors},
            **{"settings": self.settings_for(targets), "retain": self.retained(targets)},
            **({"gated": True} if self.gated else {}),
        }


BASELINE = "none"  # what the shares "of the un-erased model's" are taken of
AS_PUBLISHED = {"published": True, "rows": "window", "retain_rows": "all"}  # UCE's code of 2023
HEAVIER = "the authors' settings are absolute, for rows 30 times as heavy as this model's"

# A new method is one more line: `Entry("name")`, and what it does not have in common with the others.
_ENTRIES = (
    Entry(BASELINE, erases=False, note="the un-erased model"),
    Entry(
        "negative prompt",
        erases=False,
        says="not target",
        note="the targets as the negative prompt, cut at 24 positions",
    ),
    Entry("anchor prompt", erases=False, says="anchor", note="the anchor in the prompt instead: a perfect edit"),
    Entry("uce", version=2),
    Entry("uce-published", AS_PUBLISHED, {}, {}, note=HEAVIER),
    Entry("dp", version=2),
    Entry("oce"),
    Entry("rece", styles={"preset": "artist"}, version=2),
    Entry("rece-published", {"published": True}, styles={"preset": "artist"}, note=HEAVIER),
    Entry("speed", objects={"preset": "instance"}, version=2),
    Entry("speed-published", {"published": True}, objects={"preset": "instance"}, note=HEAVIER),
    Entry("speed + adversarial rows", {"adversarial": 1}, objects={"preset": "instance"}, version=2),
    Entry("gated", version=2),
    Entry("gated (auto anchors)", auto_anchors=True, version=2),
    Entry("esd", version=5),
    Entry("gem"),
    Entry("eraseanything"),
    Entry("eap"),
    Entry("abo"),
    Entry("receler"),
    Entry("dumo", max_targets=1, version=3),
    Entry("dumo-full", {"form": "full", "learning_rate": 5e-4}, max_targets=1),
    Entry("sdd", version=3),
    Entry("acterase", {"guidance_scale": 3.0}, max_targets=8, note="the guidance with which the model is drawn"),
    Entry("acterase (behind probes)", {"guidance_scale": 3.0}, max_targets=8, gated=True),
)
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def entry_of(name: str) -> Entry:
    """An entry of the table, or else a method of the library with its defaults."""
    return ENTRIES.get(name) or Entry(name, objects={}, styles={})


@dataclass(frozen=True)
class Fit:
    """The erasure of one concept, which is stored as users store one."""

    method: str
    concept: str

    def identity(self) -> dict[str, Any]:
        return {"entry": entry_of(self.method).identity([self.concept]), "concept": self.concept}


def make_fit(fit: Fit, store: Store) -> dict[str, Any]:
    """Make an erasure, and put it into the store."""
    erasure = entry_of(fit.method).make([fit.concept])
    assert erasure is not None
    erasure.save_pretrained(store.new_files(fit))
    return {"anchors": entry_of(fit.method).anchors([fit.concept], erasure)}
