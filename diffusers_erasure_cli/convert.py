"""The command `convert`: checkpoints that methods' authors publish, as erasures."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Base,
    Device,
    Dtype,
    Half,
    Json,
    Overwrite,
    Revision,
    Token,
    Variant,
    load_model,
    new_erasure_folder,
    save_dtype,
)


convert_app = typer.Typer(help="Make an erasure of what a method's authors publish.", no_args_is_help=True)


@convert_app.command()
def dumo(
    folder: Annotated[
        Path, typer.Argument(help="A local folder with config.json, weights, and perhaps time_scale.npy.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erasure.")],
    base: Base,
    concept: Annotated[
        list[str] | None, typer.Option(help="What the network removes, for the gate and the card; repeatable.")
    ] = None,
    gate: Annotated[
        bool | None,
        typer.Option(
            "--gate/--no-gate", help="Act less on other prompts; by default where there is a time_scale.npy."
        ),
    ] = None,
    half: Half = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    variant: Variant = None,
    revision: Revision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a folder that DuMo's authors publish."""
    new_erasure_folder(output, overwrite)
    pipe = load_model(base, device=device, dtype=dtype, variant=variant, revision=revision, token=token)
    from diffusers_erasure.formats.dumo import read_dumo

    from .report import print_made

    erasure = read_dumo(pipe, folder, concept or (), gate=gate)
    files = erasure.save_pretrained(output, dtype=save_dtype(half))
    print_made(erasure, output, files, redact=False, as_json=as_json)


@convert_app.command()
def receler(
    folder: Annotated[Path, typer.Argument(help="A local folder with eraser_weights.pt and eraser_config.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erasure.")],
    base: Base,
    concept: Annotated[
        list[str] | None, typer.Option(help="What the erasers remove, for the card; repeatable.")
    ] = None,
    half: Half = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    variant: Variant = None,
    revision: Revision = None,
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a folder that Receler's code wrote."""
    new_erasure_folder(output, overwrite)
    pipe = load_model(base, device=device, dtype=dtype, variant=variant, revision=revision, token=token)
    from diffusers_erasure.formats.receler import read_receler

    from .report import print_made

    erasure = read_receler(pipe, folder, concept or ())
    files = erasure.save_pretrained(output, dtype=save_dtype(half))
    print_made(erasure, output, files, redact=False, as_json=as_json)
