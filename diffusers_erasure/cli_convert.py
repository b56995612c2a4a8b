"""The command `convert`: checkpoints that methods' authors publish, as erasures. Registered by [`diffusers_erasure.cli`]."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Device, Dtype, Json, Revision, Token, Variant


convert_app = typer.Typer(help="Make an erasure of what a method's authors publish.", no_args_is_help=True)


@convert_app.command()
def dumo(
    folder: Annotated[
        Path, typer.Argument(help="A local folder with config.json, weights, and perhaps time_scale.npy.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erasure.")],
    base: Annotated[str, typer.Option("--base", help="Base model: a folder, a repository id, or 'demo'.")],
    concept: Annotated[
        list[str] | None, typer.Option(help="What the network removes, for the gate and the card; repeatable.")
    ] = None,
    gate: Annotated[
        bool | None,
        typer.Option(
            "--gate/--no-gate", help="Act less on other prompts; by default where there is a time_scale.npy."
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Save the tensors in float16.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    variant: Variant = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Convert a folder that DuMo's authors publish."""
    import torch

    from .cli_report import print_made
    from .dumo_folder import read_dumo
    from .loading import load_base

    pipe = load_base(base, device=device, dtype=dtype, variant=variant, revision=revision, token=token)
    erasure = read_dumo(pipe, folder, concept or (), gate=gate)
    files = erasure.save_pretrained(output, dtype=torch.float16 if half else None)
    print_made(erasure, output, files, redact=False, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.add_typer(convert_app, name="convert")
