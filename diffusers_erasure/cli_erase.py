"""The command `erase`. Registered by [`diffusers_erasure.cli`]."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Base, Device, Dtype, Json, Offload, Revision, Token, Variant, err
from .cli_report import print_made
from .errors import ErasureInputError


if TYPE_CHECKING:
    from .training import TrainingRun


def erase(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erasure.")],
    targets: Annotated[
        list[str] | None, typer.Argument(help="The concepts to remove, or a .txt or .csv file of them.")
    ] = None,
    anchor: Annotated[list[str] | None, typer.Option(help="What they are mapped to: one, or one each.")] = None,
    retain: Annotated[
        list[str] | None,
        typer.Option(
            help="What must not change: a prompt, a .txt or .csv file, or list:NAME (see `lists`); repeatable."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="One of `diffusers-erasure methods`; uce by default.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting, as name=value.")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Repeat what made this erasure (a folder or repository); --set changes single settings."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Save the tensors in float16.")] = False,
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
    as_json: Json = False,
) -> None:
    """Make an erasure and save it to a folder."""
    import torch

    from .artifact import Erasure
    from .cards import check_repo_id
    from .fitting import erase as make
    from .fitting import recipe_of
    from .loading import load_base
    from .methods import get_method

    if base_model is not None:
        check_repo_id(base_model)
    settings = _settings(setting)  # wrong settings are told before a model is loaded
    if (config is None) == (not targets):
        raise ErasureInputError("Name the concepts to remove, or give `--config` with an erasure to repeat.")
    recipe: dict[str, Any] = {"targets": targets, "anchors": anchor, "retain": retain, "method": method or "uce"}
    if config is not None:
        if anchor or method:
            raise ErasureInputError(
                "`--config` says what is erased, and by which method; change settings with `--set`."
            )
        recipe = recipe_of(Erasure.from_pretrained(config, token=token))
        recipe["retain"] = retain or recipe["retain"]
    own = sorted(settings.keys() & {*recipe, "training"})
    if own:
        raise ErasureInputError(f"`--set {own[0]}=...` is no setting of a method; it has an option of its own.")
    settings = {**recipe.pop("settings", {}), **settings}
    trains = get_method(recipe["method"]).trains
    folder = checkpoints or _beside(output)
    run = _run(folder, checkpoint_every, resume, sample_every, sample_prompt or ()) if trains else None
    if not trains and (checkpoints or resume or sample_every or sample_prompt):
        raise ErasureInputError(
            f"{recipe['method']} does not train: there is nothing to checkpoint, resume or sample."
        )
    pipe = load_base(
        base,
        device=device or _own_device(trains),
        dtype=dtype,
        variant=variant,
        revision=revision,
        token=token,
        offload=offload,  # type: ignore[arg-type]  # `load_base` checks it
        half=torch.bfloat16 if trains else torch.float16,
    )
    status = f"making an erasure of {len(recipe['targets'])} concepts by {recipe['method']}"
    with nullcontext() if trains else err.status(status):
        erasure = make(pipe, **recipe, training=run, **settings)
    if not _is_main():
        return
    erasure = erasure if base_model is None else erasure.with_base_model(base_model)
    files = erasure.save_pretrained(output, dtype=torch.float16 if half else None, redact_concepts=redact)
    if trains:
        from .training.checkpoint import clear

        clear(folder)  # the erasure is saved: they have done their work
    print_made(erasure, output, files, redact=redact, as_json=as_json)


def _beside(output: Path) -> Path:
    """The folder of the checkpoints, beside that of the erasure."""
    whole = output.expanduser().resolve()  # "." has no name
    return whole.with_name(whole.name + ".checkpoints")


def _run(
    folder: Path, every: int, resume: bool, sample_every: int | None, sample_prompts: Sequence[str]
) -> "TrainingRun":
    from .training import TrainingRun

    if sample_prompts and not sample_every:
        raise ErasureInputError("`--sample-prompt` needs `--sample-every`.")
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
            raise ErasureInputError(f"`--set` takes name=value, not {pair!r}.")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(erase)
