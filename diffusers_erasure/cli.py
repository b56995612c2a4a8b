"""The command line, `diffusers-erasure`."""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import cli_convert, cli_erase, cli_fit, cli_hub
from .cli_export import export
from .cli_options import Base, Device, Dtype, Json, Offload, Revision, Token, Variant, err, out
from .cli_report import print_diagnostics, size_text
from .errors import ErasureError, ErasureInputError


if TYPE_CHECKING:
    from .demo.command import DemoReport


app = typer.Typer(
    name="diffusers-erasure",
    help="diffusers-erasure: make, use and inspect erasures, which remove concepts from text-to-image models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from ._version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """diffusers-erasure: make, use and inspect erasures."""
    logger = logging.getLogger("diffusers_erasure")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=err, show_path=False, show_time=False))
    if debug:
        logger.setLevel(logging.DEBUG)


@app.command()
def demo(
    concept: Annotated[str, typer.Option(help="Object or style of the embedded model to erase.")] = "cat",
    anchor: Annotated[str | None, typer.Option(help="What it is mapped to; its hypernym by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="A new folder; by default one in the current directory.")] = None,
    as_json: Json = False,
) -> None:
    """The main job on the embedded model: erase, save, load into a fresh pipeline, compare, score."""
    from .demo.command import run_demo

    with _bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(f"drawing {label}", total=total)
            bar.update(tasks[label], completed=done)

        report = run_demo(concept, anchor, output, progress)
    if as_json:
        print(report.to_json())
        return
    _print_demo(report)


def _print_demo(report: "DemoReport") -> None:
    table = Table("", "before", "after")
    rows = (("the erased concept is drawn", "erased_accuracy"), ("kept concepts are drawn", "kept_accuracy"))
    for label, name in rows:
        table.add_row(label, f"{getattr(report.before, name):.1%}", f"{getattr(report.after, name):.1%}")
    out.print(
        Text(f"Erased {report.concept!r} (mapped to {report.anchor!r}), judged over {report.images} images each:")
    )
    out.print(table)
    out.print(Text(f"erasure       {report.erasure}"))
    out.print(Text(f"before/after  {report.grid}"))
    out.print(Text(f"report        {Path(report.output) / 'report.json'}"))
    out.print(Text(f"{report.seconds:.0f} s"))


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods by which an erasure can be made, with their settings."""
    from .methods import get_method, method_names

    found: dict[str, Any] = {}
    for name, summary in method_names().items():
        fields = dataclasses.fields(get_method(name).config)
        found[name] = {"summary": summary, "settings": {f.name: _plain(f.default) for f in fields}}
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, entry in found.items():
        out.print(Text(f"{name}: {entry['summary']}", style="bold"))
        table = Table("setting", "default")
        for setting, default in entry["settings"].items():
            table.add_row(setting, json.dumps(default))
        out.print(table)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")],
    erasure: Annotated[
        list[str] | None, typer.Option("--erasure", "-e", help="Folder or repository, or NAME=STRENGTH; repeatable.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Annotated[int, typer.Option(help="The i-th image starts from seed + i.")] = 0,
    images: Annotated[int, typer.Option(help="Images a prompt.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; the pipeline's (3 for demo) by default.")
    ] = None,
    strict_base: Annotated[str, typer.Option(help="warn, error or ignore.")] = "warn",
    base: Base = "demo",
    device: Device = None,
    dtype: Dtype = "auto",
    variant: Variant = None,
    revision: Revision = None,
    token: Token = None,
    offload: Offload = "none",
    as_json: Json = False,
) -> None:
    """Draw images, with erasures on."""
    import torch

    from .loading import load_base
    from .pipeline import load_erasure

    wanted = [_with_strength(text) for text in erasure or []]
    pipe = load_base(
        base,
        device=device,
        dtype=dtype,
        variant=variant,
        revision=revision,
        token=token,
        offload=offload,  # type: ignore[arg-type]  # `load_base` checks it
    )
    loaded = []
    for source, strength in wanted:
        info = load_erasure(pipe, source, strength=strength, strict_base=strict_base, token=token)  # type: ignore[arg-type]
        loaded.append({"name": info.name, "strength": info.strength, "base_match": dict(info.base_match)})
    output.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
    scale = 3.0 if guidance is None and base == "demo" else guidance
    extra.update({} if scale is None else {"guidance_scale": scale})
    files = []
    with _bar() as bar:
        task = bar.add_task("drawing", total=len(prompts) * images)
        for index, prompt in enumerate(p for p in prompts for _ in range(images)):
            generator = torch.Generator().manual_seed(seed + index)
            image = pipe(prompt, num_inference_steps=steps, generator=generator, **extra).images[0]
            path = output / f"{index:04d}.png"
            image.save(path)
            files.append({"file": str(path), "prompt": prompt, "seed": seed + index})
            bar.advance(task)
    if as_json:
        print(json.dumps({"erasures": loaded, "images": files}, indent=2))
        return
    for item in files:
        out.print(Text(f"{item['file']}  {item['prompt']}  (seed {item['seed']})"))


@app.command()
def info(
    source: Annotated[str, typer.Argument(help="Folder or repository of an erasure.")],
    subfolder: Annotated[str | None, typer.Option(help="A folder within it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw its schedules to this picture (PNG).")] = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what an erasure removes, how it was made, for which base model, and its layers."""
    from .artifact import Erasure
    from .cards import flattened
    from .demo import is_embedded

    erasure = Erasure.from_pretrained(source, subfolder=subfolder, revision=revision, token=token)
    config = erasure.config
    if plot is not None:
        from .plotting import plot_schedules

        picture = plot_schedules(erasure)
        if picture is None:
            raise ErasureInputError("There is nothing to plot: no layer of this erasure has a schedule.")
        picture.save(plot, format="PNG")
    if as_json:
        print(config.to_json(), end="")
        return
    table = Table(show_header=False)
    concepts = ", ".join(f"{c.target} → {c.anchor or '(empty prompt)'}" for c in config.concepts)
    rows = {
        "removes": f"{len(config.concepts)} concepts, not named" if config.redacted else concepts or "not stated",
        "method": config.method.name,
        "settings": json.dumps(config.method.settings, ensure_ascii=False),
        "base model": f"{config.base_model.repo or ('demo' if is_embedded(config.base_model) else 'local')} ({config.base_model.family})",
        "commit": erasure.revision,
        "strength 1 is": None if config.published_strength == 1 else f"{config.published_strength:g} of the original",
        "loads without this package": f"yes, {config.stock.file}, error {config.stock.max_error:.1e}"
        if config.stock
        else "no",
    }
    for index, layer in enumerate(config.layers, start=1):
        modified = f"; strength by timestep ({layer.schedule.bins} bins)" if layer.schedule else ""
        modified += "; strength by prompt (a gate, which weakens it)" if layer.gate else ""
        rows[f"layer {index}, {layer.kind}"] = (
            f"{layer.component}, {len(layer.sites)} sites, in {layer.file}{modified}"
        )
    rows.update({f"result, {name}": str(value) for name, value in flattened(config.results)})
    for name, record in config.files.items():
        rows[name] = f"{size_text(record.size)}, sha256 {record.sha256[:12]}…"
    for label, value in rows.items():
        if value is not None:
            table.add_row(label, Text(str(value)))
    out.print(table)
    print_diagnostics(config.diagnostics)


cli_erase.register(app)
cli_fit.register(app)
cli_hub.register(app)
cli_convert.register(app)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err)


def _plain(value: Any) -> Any:
    return None if value is dataclasses.MISSING else list(value) if isinstance(value, tuple) else value


def _with_strength(text: str) -> tuple[str, float]:
    source, equals, value = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return source, float(value)
    except ValueError as error:
        raise ErasureInputError(f"`--erasure` takes a folder, a repository or NAME=STRENGTH, not {text!r}.") from error


app.command()(export)


def main() -> None:
    """Entry point: errors of the library and of the Hub become one line and exit code 1 (`--debug` shows tracebacks)."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        app()
    except (ErasureError, HfHubHTTPError, OSError) as error:
        if "--debug" in sys.argv[1:]:
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    err.print(Text("error: ", style="bold red").append(message, style="not bold default"))
    sys.exit(1)


if __name__ == "__main__":
    main()
