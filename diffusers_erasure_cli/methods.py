"""The commands that tell about things: `methods` and `info`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from . import completion
from .options import ERASURE, Json, Source, Token, err, out
from .report import print_diagnostics


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Tell this method's settings.", autocompletion=completion.methods)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods by which an erasure can be made, or tell one's settings: meaning, range, presets."""
    known = completion.summaries()
    if name is not None and name not in known:
        raise typer.BadParameter(f"there is no method {name!r}; methods are {', '.join(known)}.")
    if name is not None:
        entry = _entry(name)
        if as_json:
            print(json.dumps(entry, indent=2, ensure_ascii=False))
        else:
            _print_method(name, entry)
    elif as_json:
        print(json.dumps(completion.catalogue() | _entries_of_others(), indent=2, ensure_ascii=False))
    else:
        width = max(map(len, known))
        for each, summary in known.items():
            out.print(Text(f"{each:<{width}}  {summary}"), soft_wrap=True)


def _entry(name: str) -> dict[str, Any]:
    """What there is to tell about a method; those of other packages are imported for it."""
    if name in completion.catalogue():
        return completion.catalogue()[name]
    from diffusers_erasure.methods import get_method
    from diffusers_erasure.methods.catalogue import describe

    return describe(get_method(name))


def _entries_of_others() -> dict[str, Any]:
    """The same of all methods of other packages; what is broken is warned of and left out."""
    if not completion.offered():
        return {}
    from diffusers_erasure.errors import ErasureInputError

    found = {}
    for name in completion.offered():
        try:
            found[name] = _entry(name)
        except ErasureInputError as error:
            err.print(Text(f"warning: {error}", style="yellow"), soft_wrap=True)
    return found


def _print_method(name: str, entry: dict[str, Any]) -> None:
    from rich.table import Table

    out.print(Text(f"{name}: {entry['summary']}", style="bold"))
    how = "it trains" if entry["trains"] else "nothing is trained"
    needs = "all of the base model" if entry["needs"] == "base weights" else "the text encoders alone"
    out.print(
        Text(f"For {', '.join(entry['families'])}; {how}; it reads {needs}; layers: {', '.join(entry['makes'])}.")
    )
    if entry["citation"]:
        out.print(Text("{title} ({year}), {url}".format_map(entry["citation"])))
    if not entry["retains"]:
        out.print(Text(f"It takes no --retain. {entry['instead_of_retain']}"))
    if entry["presets"]:
        out.print(Text(f"Presets (--set preset=NAME): {', '.join(entry['presets'])}."))
    if entry["has_published"]:
        out.print(Text("With --set published=true the values are the authors' own: those after the /."))
    table = Table("setting", "meaning", "values", "default, or by preset", show_lines=True)
    for setting, told in entry["settings"].items():
        default = _plain(told["default"]) or _by_preset(told["presets"], told["published"])
        option = "--retain" if setting == "retain" else setting
        table.add_row(*map(Text, (option, told["meaning"], told["range"], default)))
    out.print(table)


def _by_preset(ours: dict[str, Any], published: dict[str, Any]) -> str:
    """One value where all presets agree, else one for each."""
    texts = {}
    for name in {**ours, **published}:
        own, theirs = _plain(ours.get(name)) or "none", _plain(published.get(name)) or "none"
        texts[name] = own if own == theirs or not published else f"{own} / {theirs}"
    same = set(texts.values())
    return same.pop() if len(same) == 1 else "\n".join(f"{name}: {text}" for name, text in texts.items())


def _plain(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def info(
    source: Annotated[str, typer.Argument(help=f"{ERASURE}.")],
    subfolder: Annotated[str | None, typer.Option(help="A folder within it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw its schedules to this picture (PNG).")] = None,
    fingerprints: Annotated[
        bool, typer.Option("--fingerprints", help="JSON: with the samples by which the base model is recognised.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what an erasure removes, how it was made, for which base model, and its layers."""
    erasure = Source.parse(source, revision=revision).read(subfolder=subfolder, token=token)
    config = erasure.config
    if plot is not None:
        from diffusers_erasure.errors import ErasureInputError
        from diffusers_erasure.pictures import as_png
        from diffusers_erasure.storage import write_file

        from .plotting import plot_schedules

        picture = plot_schedules(erasure)
        if picture is None:
            raise ErasureInputError("There is nothing to plot: no layer of this erasure has a schedule.")
        write_file(plot, as_png(picture))
    if as_json:
        print(json.dumps(_as_dict(config, fingerprints), indent=2, sort_keys=True, ensure_ascii=False))
        return
    from rich.table import Table

    from diffusers_erasure.cards import flattened
    from diffusers_erasure.demo import is_embedded
    from diffusers_erasure.registry import find
    from diffusers_erasure.showing import Gates, size_text

    table, declared = Table(show_header=False), find(config.method.name)
    here = "demo" if is_embedded(config.base_model) else "local"
    concepts = ", ".join(f"{c.target} → {c.anchor or '(empty prompt)'}" for c in config.concepts)
    rows = {
        "removes": f"{len(config.concepts)} concepts, not named" if config.redacted else concepts or "not stated",
        "method": f"{config.method.name}: {declared.summary}" if declared else config.method.name,
        "settings": json.dumps(config.method.settings, ensure_ascii=False),
        "base model": f"{config.base_model.repo or here} ({config.base_model.family})",
        "commit": erasure.revision,
        "strength 1 is": None if config.published_strength == 1 else f"{config.published_strength:g} of the original",
        "loads without this package": f"{_STOCK[config.stock.form]}, {config.stock.file}, error {config.stock.error:.1e}"
        if config.stock
        else "no",
    }
    for index, layer in enumerate(config.layers, start=1):
        modified = f"; strength by timestep ({layer.schedule.bins} bins)" if layer.schedule else ""
        modified += "; strength by prompt (a gate, which weakens it)" if layer.gate else ""
        rows[f"layer {index}, {layer.kind}"] = (
            f"{layer.component}, {len(layer.sites)} sites, in {layer.file}{modified}"
        )
    gates = Gates.of(config)
    rows.update({} if gates is None else dict(gates.rows))
    if gates is not None and gates.linear is not None:
        rows["the LoRA file"] = f"{gates.linear_by}'s linear edit, {gates.linear:.3g} complete at least"
    rows.update({f"result, {name}": str(value) for name, value in flattened(config.results)})
    for name, record in config.files.items():
        rows[name] = f"{size_text(record.size)}, sha256 {record.sha256[:12]}…"
    for label, value in rows.items():
        if value is not None:
            table.add_row(label, Text(str(value)))
    out.print(table)
    print_diagnostics(config.diagnostics)


_STOCK = {"exact": "yes, the same edit", "approximate": "approximately"}


def _as_dict(config: Any, fingerprints: bool) -> dict[str, Any]:
    told = dataclasses.asdict(config)
    if not fingerprints:
        for component in told["base_model"]["components"].values():
            del component["values"]
    return told
