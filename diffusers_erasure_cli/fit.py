"""The commands `combine`, `lists` and `cache`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from . import completion
from .options import (
    ERASURE,
    Base,
    CpuDevice,
    Dtype,
    Half,
    Json,
    Overwrite,
    Source,
    Token,
    load_model,
    new_erasure_folder,
    out,
    save_dtype,
)


def combine(
    sources: Annotated[list[str], typer.Argument(help=f"{ERASURE}, of two or more erasures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the combined erasure.")],
    mode: Annotated[
        str,
        typer.Option(
            help="joint: solve again for all targets. sum: add the edits up, exactly.",
            autocompletion=completion.of("joint", "sum"),
        ),
    ] = "joint",
    retain: Annotated[
        list[str] | None,
        typer.Option(
            help="joint: what must not change; what the erasures retained by default.",
            autocompletion=completion.retained,
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Truncate to this rank; 0 for no limit.", min=0)] = None,
    max_error: Annotated[float | None, typer.Option(help="Truncate to the least rank with no larger error.")] = None,
    half: Half = False,
    base: Base = "demo",
    device: CpuDevice = "cpu",
    dtype: Dtype = "auto",
    token: Token = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make one erasure of several."""
    new_erasure_folder(output, overwrite)
    parts = [Source.parse(source).read(token=token) for source in sources]
    pipe = load_model(base, device=device, dtype=dtype, token=token) if mode == "joint" else None
    from diffusers_erasure.combining import combine as make

    from .report import print_made

    erasure = make(parts, pipe=pipe, mode=mode, retain=retain, rank=rank, max_error=max_error)  # type: ignore[arg-type]
    files = erasure.save_pretrained(output, dtype=save_dtype(half))
    print_made(erasure, output, files, redact=erasure.config.redacted, as_json=as_json)


def lists(
    name: Annotated[
        str | None, typer.Argument(help="Print this list's entries.", autocompletion=completion.lists)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the lists that the library ships, for `--retain list:NAME`."""
    from diffusers_erasure.lists import list_names, read_list

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
    from diffusers_erasure import cache

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
        from rich.table import Table

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
    from diffusers_erasure import cache

    if kind is not None and kind not in cache.KINDS:
        raise typer.BadParameter(f"it must be one of {', '.join(cache.KINDS)}, not {kind!r}.", param_hint="--kind")
    gone = cache.clear(kind)
    size = sum(entry.size for entry in gone)
    print(
        json.dumps({"deleted": len(gone), "bytes": size}) if as_json else f"{len(gone)} entries, {size / 1e6:.1f} MB"
    )
