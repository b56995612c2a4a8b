"""The commands that speak to the Hub: `push`, `pull` and `card`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from . import completion, options
from .options import ERASURE, Json, Token, out, save_dtype


Source = Annotated[str, typer.Argument(help=f"{ERASURE}.")]
Subfolder = Annotated[str | None, typer.Option(help="A folder within it.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Redact = Annotated[bool, typer.Option("--redact", help="Leave the concepts' names out.")]
Card = Annotated[
    str | None,
    typer.Option(
        help="local or hub: whose card holds where both were edited.",
        autocompletion=completion.of("local", "hub"),
    ),
]


def push(
    source: Source,
    repo_id: Annotated[str, typer.Argument(help="The repository on the Hub, such as user/no-cat.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a repository that is created.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; main by default.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's message.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Push the tensors in float16.")] = False,
    redact: Redact = False,
    grid: Annotated[Path | None, typer.Option(help="A picture for the card, of images before and after.")] = None,
    license: Annotated[str | None, typer.Option(help="Identifier of the licence, such as apache-2.0.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Id of the base model on the Hub, where none is recorded.")
    ] = None,
    card: Card = None,
    subfolder: Subfolder = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Push an erasure to the Hub, in one commit."""
    from PIL import Image

    picture = None if grid is None else Image.open(grid)
    erasure = options.Source.parse(source).read(subfolder=subfolder, token=token)
    info = erasure.push_to_hub(
        repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        dtype=save_dtype(half),
        redact_concepts=redact,
        grid=picture,
        license=license,
        base_model=base_model,
        card=card,
    )
    if as_json:
        print(json.dumps({"commit": info.oid, "url": info.commit_url, "pull_request": info.pr_url}, indent=2))
        return
    out.print(Text(f"pushed {info.pr_url or info.commit_url}"))


def pull(
    repo_id: Annotated[str, typer.Argument(help="The repository on the Hub, such as user/no-cat.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erasure.")],
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    card: Card = None,
    force: Annotated[bool, typer.Option("--force", help="Download again what is cached.")] = False,
    as_json: Json = False,
) -> None:
    """Download an erasure from the Hub into a folder, checked, with its card and the pictures of that."""
    if os.path.isdir(repo_id):
        raise typer.BadParameter(f"{repo_id!r} is a folder here; name a repository on the Hub.")
    options.folder_to_update(output)
    place = options.Source.parse(repo_id, revision=revision)
    erasure = place.read(subfolder=subfolder, token=token, force_download=force)
    from diffusers_erasure.hub.beside import beside_of

    erasure.origin = beside_of(erasure.origin, strict=True)  # read once: all of it comes, or an error
    files = erasure.save_pretrained(output, card=card)
    if as_json:
        sizes = {path.name: path.stat().st_size for path in files}
        print(json.dumps({"commit": erasure.revision, "output": str(output), "files": sizes}, indent=2))
        return
    out.print(Text(f"commit {erasure.revision}"))
    for path in files:
        out.print(Text(str(path)))


def card(
    source: Source,
    repo_id: Annotated[str | None, typer.Option(help="Repository for the examples of use in the card.")] = None,
    redact: Redact = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
) -> None:
    """Print the card (README.md) that a push would write for an erasure, with what was edited in it by hand."""
    erasure = options.Source.parse(source, revision=revision).read(subfolder=subfolder, token=token)
    from diffusers_erasure.hub.joining import pushed_card

    print(pushed_card(erasure, repo_id, redact_concepts=redact), end="")
