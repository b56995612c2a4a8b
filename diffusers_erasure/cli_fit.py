"""The commands `combine`, `lists` and `cache`. Registered by [`diffusers_erasure.cli`]."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import ErasureInputError


out = Console(highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def combine(
    sources: Annotated[list[str], typer.Argument(help="Folders or repositories of two or more erasures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the combined erasure.")],
    mode: Annotated[
        str, typer.Option(help="joint: solve again for all targets. sum: add the edits up, exactly.")
    ] = "joint",
    retain: Annotated[
        list[str] | None, typer.Option(help="joint: what must not change; what the erasures retained by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Truncate to this rank.", min=1)] = None,
    max_error: Annotated[float | None, typer.Option(help="Truncate to the least rank with no larger error.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Save the tensors in float16.")] = False,
    base: Annotated[
        str, typer.Option("--base", help="joint: the base model: a folder, repository or 'demo'.")
    ] = "demo",
    device: Annotated[str | None, typer.Option(help="Device; the CPU by default.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    token: Annotated[str | None, typer.Option(help="Hub token; the stored one by default.", envvar="HF_TOKEN")] = None,
    as_json: Json = False,
) -> None:
    """Make one erasure of several."""
    import torch

    from .artifact import Erasure
    from .cli_report import print_made
    from .combining import combine as make
    from .loading import load_base

    parts = [Erasure.from_pretrained(source, token=token) for source in sources]
    pipe = load_base(base, device=device, dtype=dtype, token=token) if mode == "joint" else None
    erasure = make(parts, pipe=pipe, mode=mode, retain=retain, rank=rank, max_error=max_error)  # type: ignore[arg-type]
    files = erasure.save_pretrained(output, dtype=torch.float16 if half else None)
    print_made(erasure, output, files, redact=erasure.config.redacted, as_json=as_json)


def lists(
    name: Annotated[str | None, typer.Argument(help="Print this list's entries.")] = None, as_json: Json = False
) -> None:
    """Show the lists that the library ships, for `--retain list:NAME`."""
    from .lists import list_names, read_list

    if name is not None:
        entries = read_list(name)
        print(json.dumps(entries, indent=2, ensure_ascii=False) if as_json else "\n".join(entries))
        return
    counts = {each: len(read_list(each)) for each in list_names()}
    if as_json:
        print(json.dumps(counts, indent=2))
        return
    for each, count in counts.items():
        out.print(Text(f"list:{each}  {count} entries"))


cache_app = typer.Typer(help="Show or clear what is kept on disk to make erasures faster.", no_args_is_help=False)


@cache_app.callback(invoke_without_command=True)
def show(context: typer.Context, as_json: Json = False) -> None:
    """Show what is kept on disk to make erasures faster: text rows of lists, and sums over base models."""
    if context.invoked_subcommand is not None:
        return
    from . import cache

    folder, found = cache.cache_dir(), cache.entries()
    if as_json:
        items = [{**dataclasses.asdict(entry), "path": str(entry.path)} for entry in found]
        print(json.dumps({"folder": None if folder is None else str(folder), "entries": items}, indent=2))
        return
    if folder is None:
        out.print(f"The cache is off (${cache.VARIABLE}).")
        return
    out.print(Text(f"{folder}: {len(found)} entries, {sum(entry.size for entry in found) / 1e6:.1f} MB"))
    if found:
        table = Table("kind", "what", "entries", "MB")
        for kind, what in cache.KINDS.items():
            own = [entry for entry in found if entry.kind == kind]
            if own:
                table.add_row(kind, what, str(len(own)), f"{sum(entry.size for entry in own) / 1e6:.1f}")
        out.print(table)


@cache_app.command()
def clear(
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind, as `cache` lists them.")] = None,
    as_json: Json = False,
) -> None:
    """Delete what is kept; it is computed again when it is needed."""
    from . import cache

    if kind is not None and kind not in cache.KINDS:
        raise ErasureInputError(f"`--kind` must be one of {', '.join(cache.KINDS)}, not {kind!r}.")
    gone = cache.clear(kind)
    size = sum(entry.size for entry in gone)
    print(
        json.dumps({"deleted": len(gone), "bytes": size}) if as_json else f"{len(gone)} entries, {size / 1e6:.1f} MB"
    )


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(combine)
    app.command()(lists)
    app.add_typer(cache_app, name="cache")
