"""The methods that `efficacy.py` compares: one entry each. A new method is one more `Entry` in `ENTRIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusers_erasure.demo.words import HYPERNYMS, OBJECTS, STYLES


if TYPE_CHECKING:
    from efficacy_plan import Shot

    from diffusers_erasure import Erasure


@dataclass(frozen=True)
class Entry:
    """
    How one row of the tables is made.

    Args:
        name (`str`): The row's label, and what `--methods` takes.
        summary (`str`): One line about it for the docs.
        method (`str`, *optional*): What `erase(method=...)` gets. Left out, nothing is erased (a baseline).
        settings (`Mapping`, *optional*): What `erase` gets for every concept.
        object_settings (`Mapping`, *optional*): What it gets besides when objects are erased; wins over `settings`.
        style_settings (`Mapping`, *optional*): The same for styles.
        object_anchor (`str`, *optional*): One anchor for all objects instead of each one's hypernym.
        style_anchor (`str`, *optional*, defaults to `""`): The anchor of styles.
        gives_retain (`bool`, *optional*, defaults to `True`): Whether `erase` gets the words to retain.
        max_targets (`int`, *optional*): Scenarios that erase more concepts at once are left out for this entry.
        drawing (`Callable`, *optional*): From the targets to further keyword arguments of the pipeline's call.
        says_anchor (`bool`, *optional*, defaults to `False`): Put the anchor into the prompts instead of the target: what
            an edit would draw that maps the one to the other perfectly.
        trains (`bool`, *optional*, defaults to `False`): Whether the method trains; it then shows no bar of its own.
        version (`int`, *optional*, defaults to 1): Raise it when code that the fields above do not show changes, so that
            stored results are not taken any more.
    """

    name: str
    summary: str
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    object_settings: Mapping[str, Any] = field(default_factory=dict)
    style_settings: Mapping[str, Any] = field(default_factory=dict)
    object_anchor: str | None = None
    style_anchor: str = ""
    gives_retain: bool = True
    max_targets: int | None = None
    drawing: Callable[[Sequence[str]], dict[str, Any]] | None = None
    says_anchor: bool = False
    trains: bool = False
    version: int = 1

    def anchors(self, targets: Sequence[str]) -> list[str]:
        """What each target is mapped to."""
        of_object = HYPERNYMS if self.object_anchor is None else dict.fromkeys(OBJECTS, self.object_anchor)
        return [self.style_anchor if target in STYLES else of_object[target] for target in targets]

    def settings_for(self, targets: Sequence[str]) -> dict[str, Any]:
        """The method's settings for targets that are all objects or all styles."""
        return {**self.settings, **(self.style_settings if targets[0] in STYLES else self.object_settings)}

    def drawing_for(self, targets: Sequence[str]) -> dict[str, Any]:
        """Further keyword arguments of the pipeline's call."""
        return self.drawing(targets) if self.drawing else {}

    def prompt(self, shot: Shot, targets: Sequence[str]) -> str:
        """What is drawn for a shot: its prompt, or the same about the anchor."""
        if not self.says_anchor or shot.concept not in targets:
            return shot.prompt
        (anchor,) = self.anchors([shot.concept])
        if shot.concept in STYLES:
            return f"a {shot.object}"  # of no style, which is what the empty prompt stands for
        return shot.wording.format(object=anchor, style=shot.style)

    def make(self, pipe: Any, targets: Sequence[str], anchors: Sequence[str], retain: Sequence[str]) -> Erasure | None:
        """
        Make the erasure. A subclass may make it otherwise.

        Args:
            pipe ([`DiffusionPipeline`]): A fresh copy of the embedded model; the images are drawn with another one.
            targets (sequence of `str`): The concepts to erase.
            anchors (sequence of `str`): What each is mapped to.
            retain (sequence of `str`): All the model's other words.

        Returns:
            [`Erasure`] or `None`: None for a baseline that erases nothing.
        """
        if self.method is None:
            return None
        from diffusers_erasure import erase

        settings = self.settings_for(targets)
        if self.trains:
            from diffusers_erasure.training import TrainingRun

            settings["training"] = TrainingRun(progress=False)
        if self.gives_retain:
            settings["retain"] = list(retain)
        return erase(pipe, list(targets), anchors=list(anchors), method=self.method, **settings)

    def identity(self, targets: Sequence[str]) -> dict[str, Any]:
        """All of the entry that the images depend on, for the key of a stored result."""
        further = {"says_anchor": True} if self.says_anchor else {}
        return {
            **further,
            "name": self.name,
            "method": self.method,
            "settings": self.settings_for(targets),
            "gives_retain": self.gives_retain,
            "drawing": self.drawing_for(targets),
            "version": self.version,
        }


BASELINE = "none"  # what the shares "of the un-erased model's" are taken of

_ENTRIES = (
    Entry(BASELINE, "the un-erased model"),
    Entry(
        "negative prompt",
        "no erasure; the targets, joined by commas, as the negative prompt (the encoder cuts it off at 24 positions)",
        drawing=lambda targets: {"negative_prompt": ", ".join(targets)},
    ),
    Entry(
        "anchor prompt",
        "no erasure; the anchor stands in the prompt instead of the target: what a perfect edit would draw",
        says_anchor=True,
    ),
    Entry("uce", "UCE with the library's defaults", "uce", style_settings={"templates": "style"}),
    Entry(
        "uce (demo settings)",
        "UCE as `diffusers-erasure demo` sets it: `retain_scale=2, retain_templates=True`",
        "uce",
        {"retain_scale": 2.0, "retain_templates": True},
        style_settings={"templates": "style"},
    ),
    Entry(
        "uce-published",
        'UCE as first published: `rows="window", templates="none", absolute=True, lamb=0.5` (set for rows 400 times as '
        "heavy as this model's)",
        "uce",
        {"rows": "window", "templates": "none", "absolute": True, "lamb": 0.5, "retain_rows": "all"},
    ),
    Entry(
        "rece",
        "RECE with the library's presets `object` and `artist`",
        "rece",
        {"preset": "object"},
        style_settings={"preset": "artist"},
    ),
    Entry(
        "rece-published",
        "RECE with the authors' settings of these presets (`published=True`, absolute, for heavier rows)",
        "rece",
        {"preset": "object", "published": True},
        style_settings={"preset": "artist"},
    ),
    Entry(
        "speed",
        "SPEED with the library's presets `instance` and `style`",
        "speed",
        {"preset": "instance"},
        style_settings={"preset": "style"},
    ),
    Entry(
        "speed-published",
        "SPEED with the authors' settings of these presets (`published=True`, absolute, for heavier rows)",
        "speed",
        {"preset": "instance", "published": True},
        style_settings={"preset": "style"},
    ),
    Entry(
        "speed + adversarial rows",
        "SPEED with the library's presets and one round of RECE's rows (`adversarial=1`)",
        "speed",
        {"preset": "instance", "adversarial": 1},
        style_settings={"preset": "style"},
    ),
    Entry(
        "esd",
        "ESD, trained as a LoRA with the library's presets `object` and `style`",
        "esd",
        {"preset": "object"},
        style_settings={"preset": "style"},
        trains=True,
    ),
    Entry(
        "dumo",
        "DuMo in the compact form, with the library's presets `object` and `style`; one concept at a time",
        "dumo",
        {"preset": "object"},
        style_settings={"preset": "style"},
        max_targets=1,
        trains=True,
    ),
    Entry(
        "dumo-full",
        "DuMo with a whole copy of the encoder, `learning_rate=5e-4`; one concept at a time",
        "dumo",
        {"preset": "object", "form": "full", "learning_rate": 5e-4},
        style_settings={"preset": "style"},
        max_targets=1,
        trains=True,
    ),
    Entry(
        "sdd",
        "SDD, trained as a LoRA with the library's presets `object` and `style`",
        "sdd",
        {"preset": "object"},
        style_settings={"preset": "style"},
        trains=True,
    ),
    Entry(
        "acterase",
        "ActErase with the library's presets `object` and `style`, calibrated with the guidance with which the model is drawn; "
        "at most 8 at once, of which its paper already warns",
        "acterase",
        {"preset": "object", "guidance_scale": 3.0},
        style_settings={"preset": "style"},
        gives_retain=False,
        max_targets=8,
        trains=True,
    ),
)
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
