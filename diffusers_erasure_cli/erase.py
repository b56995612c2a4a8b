"""The command `erase`."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import completion
from .options import (
    Base,
    Device,
    Dtype,
    Half,
    Json,
    Offload,
    Overwrite,
    Revision,
    Source,
    Token,
    Variant,
    err,
    load_model,
    new_erasure_folder,
    save_dtype,
)
from .report import print_made


if TYPE_CHECKING:
    from diffusers_erasure.runs.options import TrainingRun


def erase(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erasure.")],
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="The concepts to remove, or a .txt or .csv file of them.", autocompletion=completion.targets
        ),
    ] = None,
    anchor: Annotated[
        list[str] | None,
        typer.Option(
            "--anchor",
            "--anchors",
            help="What they are mapped to: one, or one each; repeatable. `auto` picks for each the nearest thing of its kind.",
        ),
    ] = None,
    retain: Annotated[
        list[str] | None,
        typer.Option(
            help="What must not change: a prompt, a .txt or .csv file, or list:NAME (see `lists`); repeatable. `none` for "
            "nothing on purpose.",
            autocompletion=completion.retained,
        ),
    ] = None,
    retain_default: Annotated[
        str | None,
        typer.Option(
            help="What is retained besides: auto (closed forms: shipped lists, where fewer than 32 prompts are given), none, "
            "object, style, person, or list:NAME.",
            autocompletion=completion.retained_by_default,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="One of `diffusers-erasure methods`; by default gated, or uce where it alone has what is `--set`.",
            autocompletion=completion.methods,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting, as name=value; `diffusers-erasure methods METHOD` lists them. Repeatable.",
            autocompletion=completion.settings,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Repeat what made this erasure (a folder or repository); --set changes single settings."),
    ] = None,
    half: Half = False,
    redact: Annotated[bool, typer.Option("--redact", help="Leave the concepts' names out of the files.")] = False,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Training: folder for checkpoints and samples; OUTPUT.checkpoints by default."),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Training: steps between checkpoints.", min=1)] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Training: go on from the newest checkpoint.")] = False,
    sample_every: Annotated[
        int | None, typer.Option(help="Training: steps between sample images; none by default.", min=1)
    ] = None,
    sample_prompt: Annotated[list[str] | None, typer.Option(help="Training: their prompts; repeatable.")] = None,
    base: Base = "demo",
    base_model: Annotated[
        str | None, typer.Option(help="Id of the base model on the Hub, for the card, where --base is a folder.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    variant: Variant = None,
    revision: Revision = None,
    token: Token = None,
    offload: Offload = "none",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make an erasure and save it to a folder."""
    settings = _settings(setting)  # wrong usage is told before anything is imported or loaded
    if (config is None) == (not targets):
        raise typer.BadParameter("name the concepts to remove, or give `--config` with an erasure to repeat.")
    if config is not None and (anchor or method):
        raise typer.BadParameter("`--config` says what is erased, and by which method; change settings with `--set`.")
    if sample_prompt and not sample_every:
        raise typer.BadParameter("`--sample-prompt` needs `--sample-every`.")
    new_erasure_folder(output, overwrite)
    from diffusers_erasure.cards import check_repo_id
    from diffusers_erasure.errors import ErasureInputError
    from diffusers_erasure.fitting import erase as make
    from diffusers_erasure.fitting import recipe_of
    from diffusers_erasure.hub.joining import check_nothing_tells
    from diffusers_erasure.methods import check_names, default_method, get_method, make_config

    if base_model is not None:
        check_repo_id(base_model)
    if redact:
        check_nothing_tells(output)
    kept: Any = () if retain == ["none"] else retain  # the empty one is nothing on purpose
    recipe: dict[str, Any] = {
        **{
            "targets": targets,
            "anchors": "auto" if anchor == ["auto"] else anchor,
            "retain": kept or None,
            "method": method or default_method(settings),
        },
        "retain_default": "auto",
    }
    if config is not None:
        recipe = recipe_of(Source.parse(config).read(token=token))
        recipe["retain"] = kept or recipe["retain"]
    if kept == () or retain_default is not None:
        recipe["retain"] = None if kept == () else recipe["retain"]
        recipe["retain_default"] = "none" if kept == () else retain_default
    own = sorted(settings.keys() & {*recipe, "training"})
    if own:
        raise ErasureInputError(f"`--set {own[0]}=...` is no setting of a method; it has an option of its own.")
    settings = {**recipe.pop("settings", {}), **settings}
    entry = get_method(recipe["method"])
    check_names(entry, [*settings, *(["retain"] if recipe["retain"] else [])])
    make_config(entry, settings)  # wrong settings are told before a model is loaded
    resumable, trains = entry.declared.resumable, entry.declared.trains
    folder = checkpoints or _beside(output)
    run = _run(folder, checkpoint_every, resume, sample_every, sample_prompt or ()) if resumable else None
    if not resumable and (checkpoints or resume or sample_every or sample_prompt):
        raise ErasureInputError(
            f"{recipe['method']} does not train: there is nothing to checkpoint, resume or sample."
        )
    pipe = load_model(
        base,
        device=device or _own_device(resumable),
        dtype=dtype,
        variant=variant,
        revision=revision,
        token=token,
        offload=offload,
        half="bfloat16" if trains else "float16",
    )
    status = f"making an erasure of {len(recipe['targets'])} concepts by {recipe['method']}"
    with nullcontext() if resumable else err.status(status):
        erasure = make(pipe, **recipe, training=run, **settings)
    if not _is_main():
        return
    erasure = erasure if base_model is None else erasure.with_base_model(base_model)
    files = erasure.save_pretrained(output, dtype=save_dtype(half), redact_concepts=redact)
    if resumable:
        from diffusers_erasure.runs.checkpoint import clear

        clear(folder)  # the erasure is saved: they have done their work
    print_made(erasure, output, files, redact=redact, as_json=as_json)


def _beside(output: Path) -> Path:
    """The folder of the checkpoints, beside that of the erasure."""
    whole = output.expanduser().resolve()  # "." has no name
    return whole.with_name(whole.name + ".checkpoints")


def _run(
    folder: Path, every: int, resume: bool, sample_every: int | None, sample_prompts: Sequence[str]
) -> "TrainingRun":
    from diffusers_erasure.runs.options import TrainingRun

    return TrainingRun(
        checkpoint_dir=folder,
        checkpoint_every=every,
        resume=resume,
        sample_every=sample_every,
        sample_prompts=tuple(sample_prompts),
        release=True,
    )


def _is_main() -> bool:
    """Whether this is the process that writes and prints (`accelerate launch` and `torchrun` start several)."""
    return os.environ.get("RANK", "0") == "0"


def _own_device(trains: bool) -> str | None:
    """Each of several processes has a device of its own."""
    if not trains or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    import torch
    from accelerate import PartialState

    return str(PartialState(cpu=not torch.accelerator.is_available()).device)


def _settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`name=value` pairs; values are JSON where they parse as it, else text."""
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"it takes name=value, not {pair!r}.", param_hint="--set")
        try:
            settings[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            settings[name] = value
    return settings
