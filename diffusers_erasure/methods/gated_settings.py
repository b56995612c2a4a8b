"""Settings of the gated edit; see [`gated`]."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import ErasureInputError
from ..lists import Retained
from ..settings import ByFacts, Number, Of, Whole, check_settings
from ..settings.texts import Retain, Templates, recorded_settings, template_list


PROMPTS = 640  # of targets, about
CONTEXTS = ByFacts(
    f"40, and fewer, but 8 at least, where {PROMPTS} prompts of targets would be exceeded",
    lambda facts: max(8, min(40, PROMPTS // facts.concepts)),
)
KEPT_CONTEXTS = ByFacts(
    "8, and 1 where there are more than 48 concepts", lambda facts: 8 if facts.concepts <= 48 else 1
)
RANK = ByFacts(
    "12 for Stable Diffusion 1.x and 2.x, 32 for SDXL, and 64 where text enters a transformer",
    lambda facts: {"stable-diffusion": 12, "stable-diffusion-xl": 32}.get(facts.family, 64),
)
# Beyond the anchor, as a ridge leaves maps short of it; a style is one direction of many rows, so a map of it is stiffer.
MAPS: dict[str, dict[str, Any]] = {
    "object": {"ridge": 1e-4, "push": 0.4},
    "style": {"ridge": 0.3, "push": 1.0},
    "person": {"ridge": 1e-4, "push": 0.0},
}
PRESETS: dict[str, dict[str, Any]] = {
    task: {
        "templates": f"{task}_many",
        "contexts": CONTEXTS,
        "kept_contexts": KEPT_CONTEXTS,
        "rank": RANK,
        "probe_ridge": 3e-2,
        "share": 0.4,
        **MAPS[task],
    }
    for task in ("object", "style", "person")
}


def synonym_lists(value: Any) -> dict[str, tuple[str, ...]]:
    """Other names by target.

    Raises:
        ErasureInputError: it is no dictionary of lists of texts.
    """
    given = dict(value)
    found = {key: tuple([names] if isinstance(names, str) else names) for key, names in given.items()}
    if not all(isinstance(name, str) and name.strip() for key, names in found.items() for name in (key, *names)):
        raise ErasureInputError("`synonyms` gives for a target the list of its other names, none of them empty.")
    return found


Synonyms = Annotated[
    Mapping[str, Sequence[str]] | None, Of("a dictionary of lists of names", Mapping, plain=synonym_lists)
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the gated edit. Those that are left out (`None`) come from the preset.

    Args:
        preset (`"object"`, `"style"` or `"person"`, *optional*, defaults to `"object"`): the kind of concept, which says in which
            contexts it is looked for.
        templates (`str` or tuple of `str`, *optional*): contexts, with `{}` for the concept; every fourth sets thresholds, every
            fourth tests them, the others fit probes, and all but the last kind fit maps. Of fewer than four all do everything.
        contexts (`int`, *optional*): how many of them are taken.
        kept_contexts (`int`, *optional*): in how many of them each kept word is looked at, which take turns.
        retain (tuple of `str`, *optional*): prompts that must not open a gate, alone and in contexts.
        synonyms (`dict`, *optional*): for a target a list of its other names, which have probes of their own.
        strict (`bool`, *optional*, defaults to `False`): a prompt that may name a target counts as one that does: thresholds stand
            at the highest value that a kept prompt reached, instead of above it.
        share (`float`, *optional*): where a threshold stands between the kept prompts' highest value (0) and the name's lowest (1).
        rank (`int`, *optional*): rank of each map at most, of rows and pooled vector.
        ridge (`float`, *optional*): weight of a small map, relative to the rows' mean square.
        push (`float`, *optional*): move what a target is mapped to away from the target, by this share of the way between
            them: the row g + push (g - e) for the target's row e and the anchor's g, and likewise the pooled vector.
        probe_ridge (`float`, *optional*): ridge of the probes' covariance, relative to its mean diagonal.
        pooled (`bool`, *optional*, defaults to `True`): SDXL, Stable Diffusion 3, FLUX.1: map the pooled text vector behind the gates.
        max_sequence_length (`int`, *optional*, defaults to 0): Stable Diffusion 3, FLUX.1 and others: how many rows T5 makes of a
            prompt, as in calls of the pipeline; 0 for the pipeline's own number.
        stock (`"dp"`, `"uce"` or `"none"`, *optional*, defaults to `"dp"`): what stock diffusers gets: the LoRA of Double Projections or
            of UCE of the same concepts, which is linear and acts on all prompts, or nothing.
    """

    preset: Literal["object", "style", "person"] = "object"
    templates: Templates = None
    contexts: Annotated[int | None, Whole(least=1)] = None
    kept_contexts: Annotated[int | None, Whole(least=1)] = None
    retain: Retain = ()
    synonyms: Synonyms = None
    strict: bool = False
    share: Annotated[float | None, Number(below=1)] = None
    rank: Annotated[int | None, Whole(least=1)] = None
    ridge: Annotated[float | None, Number(above=0)] = None
    probe_ridge: Annotated[float | None, Number(above=0)] = None
    push: Annotated[float | None, Number()] = None
    pooled: bool = True
    max_sequence_length: Annotated[int, Whole(least=0)] = 0
    stock: Literal["dp", "uce", "none"] = "dp"

    def stated(self) -> Mapping[str, Any]:
        return {**PRESETS[self.preset], "synonyms": {}}

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the gated edit works with: a [`Config`] with nothing left out."""

    preset: Literal["object", "style", "person"]
    templates: str | tuple[str, ...]
    contexts: int
    kept_contexts: int
    retain: Retained
    synonyms: dict[str, tuple[str, ...]]
    strict: bool
    share: float
    rank: int
    ridge: float
    probe_ridge: float
    push: float
    pooled: bool
    max_sequence_length: int
    stock: Literal["dp", "uce", "none"]

    @property
    def template_list(self) -> tuple[str, ...]:
        """The contexts themselves."""
        return template_list(self.templates)[: self.contexts]

    def recorded(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The settings for the artefact, and the names of those that would reveal a concept."""
        values, secret = recorded_settings(self)
        values["synonyms"] = {key: list(names) for key, names in self.synonyms.items()}
        return values, tuple(sorted({*secret, "synonyms"}))
