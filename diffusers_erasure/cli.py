"""The command line, `diffusers-erasure`."""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from . import cli_fit, cli_hub
from .cli_export import export
from .errors import ErasureError, ErasureInputError


if TYPE_CHECKING:
    from .artifact import Erasure
    from .demo.command import DemoReport


app = typer.Typer(
    name="diffusers-erasure",
    help="diffusers-erasure: make, use and inspect erasures, which remove concepts from text-to-image models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Results go to standard output, everything else (progress, logs, errors) to standard error.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

MOST_SHOWN = 20  # rows of a table about targets

Base = Annotated[str, typer.Option("--base", help="Base model: a folder, a repository id, or 'demo'.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda or cpu; the best one by default.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the base model's files, such as fp16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model.")]
Token = Annotated[str | None, typer.Option(help="Hub token; the stored one by default.", envvar="HF_TOKEN")]
Offload = Annotated[str, typer.Option(help="none, model or sequential: offload to the CPU between uses.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


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
def erase(
    targets: Annotated[list[str], typer.Argument(help="The concepts to remove, or a .txt or .csv file of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the erasure.")],
    anchor: Annotated[list[str] | None, typer.Option(help="What they are mapped to: one, or one each.")] = None,
    retain: Annotated[
        list[str] | None,
        typer.Option(
            help="What must not change: a prompt, a .txt or .csv file, or list:NAME (see `lists`); repeatable."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="One of `diffusers-erasure methods`.")] = "uce",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting, as name=value.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Save the tensors in float16.")] = False,
    redact: Annotated[bool, typer.Option("--redact", help="Leave the concepts' names out of the files.")] = False,
    base: Base = "demo",
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

    from .fitting import erase as make
    from .loading import load_base

    settings = _settings(setting)  # wrong settings are told before a model is loaded
    pipe = load_base(
        base,
        device=device,
        dtype=dtype,
        variant=variant,
        revision=revision,
        token=token,
        offload=offload,  # type: ignore[arg-type]  # `load_base` checks it
    )
    with err.status(f"making an erasure of {len(targets)} concepts by {method}"):
        erasure = make(pipe, targets, anchors=anchor, retain=retain, method=method, **settings)
    files = erasure.save_pretrained(output, dtype=torch.float16 if half else None, redact_concepts=redact)
    print_made(erasure, output, files, redact=redact, as_json=as_json)


def print_made(erasure: "Erasure", output: Path, files: Sequence[Path], *, redact: bool, as_json: bool) -> None:
    """Tell what was made: its files, and how far targets and retained prompts moved."""
    if as_json:
        report = {
            "output": str(output),
            "files": {path.name: path.stat().st_size for path in files},
            "diagnostics": {} if redact else erasure.config.diagnostics,
            "stock": None if erasure.config.stock is None else dataclasses.asdict(erasure.config.stock),
        }
        print(json.dumps(report, indent=2))
        return
    for path in files:
        out.print(Text(f"{path}  {_size(path.stat().st_size)}"))
    if not redact:
        _print_diagnostics(erasure.config.diagnostics)


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
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what an erasure removes, how it was made, for which base model, and its layers."""
    from .artifact import Erasure

    erasure = Erasure.from_pretrained(source, subfolder=subfolder, revision=revision, token=token)
    config = erasure.config
    if as_json:
        print(config.to_json(), end="")
        return
    table = Table(show_header=False)
    concepts = ", ".join(f"{c.target} → {c.anchor or '(empty prompt)'}" for c in config.concepts)
    rows = {
        "removes": f"{len(config.concepts)} concepts, not named" if config.redacted else concepts or "not stated",
        "method": config.method.name,
        "settings": json.dumps(config.method.settings, ensure_ascii=False),
        "base model": f"{config.base_model.repo or 'local'} ({config.base_model.family})",
        "commit": erasure.revision,
        "strength 1 is": None if config.published_strength == 1 else f"{config.published_strength:g} of the original",
        "loads without this package": f"yes, {config.stock.file}, error {config.stock.max_error:.1e}"
        if config.stock
        else "no",
    }
    for layer in config.layers:
        rows[f"layer {layer.kind}"] = f"{layer.component}, {len(layer.sites)} sites, in {layer.file}"
    for name, record in config.files.items():
        rows[name] = f"{_size(record.size)}, sha256 {record.sha256[:12]}…"
    for label, value in rows.items():
        if value is not None:
            table.add_row(label, Text(str(value)))
    out.print(table)
    _print_diagnostics(config.diagnostics)


cli_fit.register(app)
cli_hub.register(app)


def _print_diagnostics(diagnostics: dict[str, Any], input_name: str = "text rows") -> None:
    moved = diagnostics.get("completeness")
    if isinstance(moved, dict) and moved:
        shown = sorted(moved.items(), key=lambda item: item[1])[:MOST_SHOWN]  # the least moved are those to look at
        table = Table("target", f"moved to its anchor ({input_name})")
        for name, value in shown:
            table.add_row(Text(name), f"{value:.0%}")
        if len(moved) > len(shown):
            table.add_row(Text(f"{len(moved) - len(shown)} others"), f"{shown[-1][1]:.0%} or more")
        out.print(table)
    kept = diagnostics.get("retained_change")
    if isinstance(kept, dict):
        out.print(Text(f"retained {input_name} changed by {kept['median']:.1%} (median), {kept['max']:.1%} (largest)"))
    start, empty = diagnostics.get("start_token_change"), diagnostics.get("empty_prompt_change")
    if isinstance(start, float) and isinstance(empty, float):
        out.print(
            Text(f"the start token's row changed by {start:.1%}, the empty prompt's others by up to {empty:.1%}")
        )
    space = diagnostics.get("null_space")
    if isinstance(space, dict):
        least, largest, width = (space.get(key) for key in ("least", "largest", "width"))
        out.print(Text(f"free of what is retained: {least} to {largest} of {width} dimensions, by layer"))
    if isinstance(diagnostics.get("pooled"), dict):
        _print_diagnostics(diagnostics["pooled"], "pooled vectors")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _plain(value: Any) -> Any:
    return None if value is dataclasses.MISSING else list(value) if isinstance(value, tuple) else value


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
