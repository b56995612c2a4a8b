"""`erase`: the one entry point through which every method makes an erasure."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .anchors import AUTO as PICKED_FOR_ALL
from .anchors import RECORDED, Picked, Picker, pick_anchors
from .artifact import Erasure
from .base_model import family_of, refuse_second_transformer
from .collateral import Collateral
from .encoding import one_fit
from .errors import ErasureCompatibilityError, ErasureInputError
from .lists import expand, retained
from .lists.defaults import AUTO, NONE, lists_for, task_of, with_lists
from .lists.names import check_anchor, check_targets
from .live.blocks import erasures_disabled
from .logging import get_logger
from .methods import MethodEntry, as_meant, check_names, default_method, get_method, make_config
from .registry import MethodDeclaration, method_names
from .schema import Concept
from .stored import with_stored_denoiser


if TYPE_CHECKING:
    from .runs.options import TrainingRun

logger = get_logger(__name__)

Texts = str | Sequence[str]


def erase(
    pipe: Any,
    targets: "Texts | os.PathLike[str]",
    *,
    anchors: Texts | None = None,
    anchor_images: int | None = None,
    picker: Picker | None = None,
    retain: "Texts | os.PathLike[str] | None" = None,
    retain_default: Texts = "auto",
    method: str | None = None,
    training: "TrainingRun | None" = None,
    compare: bool = True,
    **settings: Any,
) -> Erasure:
    """Make an erasure of one or more concepts.

    The pipeline is only read: nothing is attached, and erasures that are loaded into it are off meanwhile. Methods that run
    the denoiser do so with a private twin of it, which has the same weights in the same memory.

    Args:
        pipe ([`DiffusionPipeline`]): the base model. A method that needs text encoders alone ("uce", "rece", "speed", "dp", "oce") takes one
            without its denoiser, such as `FluxPipeline.from_pretrained(path, transformer=None)`; what has to be known of that is
            read from its files: single values, and the weights of the modules that read the text where these take part.
        targets (`str`, sequence of `str`, or `os.PathLike`): the concepts to remove, or the path of a list of them.
        anchors (`str` or sequence of `str`, *optional*): what they are mapped to: one for all, or one for each. The
            method's own choice by default. `"auto"` picks for each target the nearest thing of its kind, by its text rows, from the
            shipped list of the kind of concept and the retained prompts: never what is erased too, means the same or is broader.
            What was picked is logged, and recorded. To map a target to the word "auto", give `["auto"]`.
        anchor_images (`int`, *optional*): with `anchors="auto"` and a `picker`, so many pictures of a candidate are looked at; 4 by
            default.
        picker ([`Picker`], *optional*): with `anchors="auto"`, what looks at pictures of the candidates, the nearest first: a function
            of images and a target that gives the share of the images that show the target, such as [`ClipPicker`]. The first
            candidate with none is picked. Without it text rows alone decide, and nothing is drawn.
        retain (`str`, sequence of `str`, or `os.PathLike`, *optional*): what must not change: prompts, paths of lists
            (see [`read_prompts`]), and names of the lists that the library ships (`"list:artists"`, see
            [`list_names`]). Entries of lists that name a target as whole words are left out. `()` is nothing at all.
        retain_default (`str` or sequence of `str`, *optional*, defaults to `"auto"`): lists that are retained besides:
            `"auto"` for those of the kind of concept (object, style or person) where fewer than 32 prompts are given, to
            closed forms and without `published=True`; `"none"`; a kind (`"object"`, `"style"`, `"person"`); or names of
            shipped lists. Entries that name a target or an anchor are left out.
        method (`str`, *optional*): one of `diffusers-erasure methods`. By default `"gated"`, which erases and keeps best by our
            measurements; or `"uce"` where a setting is given that only this has.
        training ([`TrainingRun`], *optional*): for methods that train, and for `"acterase"`: checkpoints, resuming, progress
            and (where it trains) sample images.
        compare (`bool`, *optional*, defaults to `True`): after the fit, measure how far the words of a shipped list moved. For
            methods that train this costs several hundred passes of the denoiser for one image. Ctrl-C ends the comparison
            alone, and the erasure is returned without it.
        settings: the method's own settings.

    Returns:
        [`Erasure`]: to be loaded with `pipe.load_erasure(erasure)`, saved with `erasure.save_pretrained(dir)`.

    Raises:
        ErasureInputError: an empty target, a target that is named twice, equal to its anchor (but for case, spaces or an
            article) or among the retained prompts, a prompt longer than the encoder, an unknown method or setting, or a setting out of
            range; with `anchors="auto"` no candidate that is a thing of a target's kind.
        ErasureCompatibilityError: the method does not support this base model.
        ErasureTrainingError: methods that train: the loss is not finite, or a checkpoint cannot be written.

    Examples:

    ```py
    >>> from diffusers_erasure import erase
    >>> erasure = erase(pipe, ["Van Gogh", "Monet"], anchors="art", retain="artists.csv")
    >>> pipe.load_erasure(erasure)
    ```
    """
    entry = get_method(method or default_method(settings))
    nothing = isinstance(retain, Sequence) and not isinstance(retain, str) and not retain  # on purpose
    retain, retain_default = (None, "none") if nothing else (retain, retain_default)
    check_names(entry, settings if retain is None else [*settings, "retain"])  # before a list is read
    names = expand(targets, "targets")
    check_targets(names)
    automatic = isinstance(anchors, str) and anchors == PICKED_FOR_ALL
    if not automatic and (picker is not None or anchor_images is not None):
        raise ErasureInputError(
            '`picker` and `anchor_images` are for `anchors="auto"`; leave them out, or the anchors.'
        )
    concepts = concepts_of(names, None if automatic else anchors)
    kept, task = None if retain is None else retained(retain, names), task_of(names, settings)
    lists = default_lists(entry, retain_default, task, 0 if kept is None else len(kept.prompts), settings)

    def settled(concepts: Sequence[Concept]) -> Any:
        replaced = [concept.anchor or "" for concept in concepts]
        more = {"retain": with_lists(kept, lists, [*names, *replaced])} if kept is not None or lists else {}
        return make_config(entry, {**settings, **more})

    config = make_config(entry, settings) if automatic else settled(concepts)
    resumable = entry.declared.resumable
    if training is not None and not resumable:
        raise ErasureInputError(
            f"`training` is for methods that can be interrupted and resumed; {entry.name!r} cannot be."
        )
    loaded = pipe
    if entry.declared.needs == "text encoders":
        pipe = with_stored_denoiser(pipe)
    check_family(entry.declared, pipe)
    with erasures_disabled(loaded), one_fit():
        shown = training is None or training.progress
        picked = None
        if automatic:
            length, own = settings.get("max_sequence_length") or 0, () if kept is None else kept.prompts
            picked = pick_anchors(pipe, names, task, own, length=length, picker=picker, images=anchor_images)
            concepts = concepts_of(names, picked.anchors)
            config = settled(concepts)
        replaced = [concept.anchor or "" for concept in concepts]
        collateral = Collateral(pipe, names, replaced, task, ahead=resumable, progress=shown) if compare else None
        erasure = entry.fit(pipe, concepts, config, *([training] if resumable else []))
        if not isinstance(erasure, Erasure):
            raise ErasureInputError(
                f"The method {entry.name!r} gave {type(erasure).__name__} where it should give an Erasure."
            )
        erasure = erasure if picked is None else with_picked(erasure, picked)
        erasure = erasure if collateral is None else collateral.added_to(erasure)
    logger.info("Made an erasure of %d concepts by %s.", len(concepts), entry.name)
    return erasure


def concepts_of(names: Sequence[str], anchors: Texts | None) -> tuple[Concept, ...]:
    """Targets, each with its anchor: one for all, one for each, or the method's own choice.

    Raises:
        ErasureInputError: there are other numbers of targets and anchors, or a target is its own anchor.
    """
    if anchors is None:
        return tuple(Concept(target) for target in names)
    mapped = expand(anchors, "anchors", allow_empty=True)
    mapped = mapped * len(names) if len(mapped) == 1 else mapped
    if len(mapped) != len(names):
        raise ErasureInputError(f"There are {len(names)} targets and {len(mapped)} anchors; give one, or one each.")
    for target, anchor in zip(names, mapped, strict=True):
        check_anchor(target, anchor)
    return tuple(Concept(target, anchor) for target, anchor in zip(names, mapped, strict=True))


def with_picked(erasure: Erasure, picked: Picked) -> Erasure:
    """The erasure with what is recorded of a pick; the anchors themselves stand beside the targets."""
    method = erasure.config.method
    method = dataclasses.replace(method, settings={**method.settings, RECORDED: picked.recorded()})
    return dataclasses.replace(erasure, config=dataclasses.replace(erasure.config, method=method))


def default_lists(
    entry: MethodEntry, wanted: Texts, task: str, given: int, settings: Mapping[str, Any]
) -> tuple[str, ...]:
    """Names of the lists that a method retains besides what is given.

    Raises:
        ErasureInputError: `wanted` is none that [`lists_for`] knows, or the method takes no retained prompts.
    """
    takes = any(item.name == "retain" for item in dataclasses.fields(entry.config))
    if wanted == AUTO and (not takes or entry.declared.trains or settings.get("published")):
        return ()
    lists = lists_for(wanted, given, task)
    if lists and not takes:
        check_names(entry, ["retain"])  # raises, and says what it has instead
    return lists


def check_family(declared: MethodDeclaration, pipe: Any) -> None:
    """Refuse a base model on which a method does not work.

    Raises:
        ErasureCompatibilityError: its family is none of those that the method declares, or two transformers take turns.
    """
    refuse_second_transformer(pipe)
    family = family_of(pipe).name
    if family not in declared.families:
        raise ErasureCompatibilityError(
            f"The method {declared.name!r} works on {' and '.join(declared.families)}, but this pipeline "
            f"({type(pipe).__name__}) is of the family {family}. Choose another method, or another base model; "
            "`diffusers-erasure methods METHOD` tells what a method works on."
        )


def recipe_of(erasure: Erasure) -> dict[str, Any]:
    """The arguments of [`erase`] with which an erasure was made, its settings under `"settings"`.

    Raises:
        ErasureInputError: it is redacted, its list of retained prompts was too long to be recorded, it was published at
            another strength, or it is none that `erase` made.
    """
    method = erasure.config.method
    if erasure.config.redacted:
        raise ErasureInputError(
            "The erasure is redacted and no longer says what it removes, so it cannot be repeated."
        )
    if erasure.config.published_strength != 1:
        raise ErasureInputError(
            f"The erasure was published at {erasure.config.published_strength:g} of its strength; repeat the original one."
        )
    if method.name not in method_names():
        raise ErasureInputError(f"The erasure was made by {method.name!r}, which is none of {sorted(method_names())}.")
    settings = as_meant(get_method(method.name), method.settings)
    count = settings.pop("retain_prompts", 0)
    settings.pop("retain_excluded", None)
    settings.pop(RECORDED, None)  # the anchors that were picked are the concepts'
    if count and "retain" not in settings:
        raise ErasureInputError(
            f"The erasure retained {count} prompts, too many to be recorded; it cannot be repeated."
        )
    retain = settings.pop("retain", None)
    lists = settings.pop("retain_default", None)
    anchors = [concept.anchor or "" for concept in erasure.concepts]
    return {
        "targets": [str(concept.target) for concept in erasure.concepts],
        "anchors": anchors,
        "retain": retain or None,
        "retain_default": lists or NONE,
        "method": method.name,
        "settings": settings,
    }
