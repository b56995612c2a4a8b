"""The entry point: the commands, put together, and what becomes of errors."""

import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from . import completion, convert, erase, fit, hub, methods
from .attack import attack
from .demo import demo
from .export import export
from .generate import generate
from .options import err


app = typer.Typer(
    name="diffusers-erasure",
    help="diffusers-erasure: make, use and inspect erasures, which remove concepts from text-to-image models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("diffusers-erasure"))
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Threads to compute with; one for each free core by default.", min=1),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """diffusers-erasure: make, use and inspect erasures."""
    from .logs import show_logs
    from .threads import limit_threads

    show_logs(debug)
    if threads is not None:
        limit_threads(threads)


COMMANDS: tuple[Callable[..., None], ...] = (
    demo,
    methods.methods,
    erase.erase,
    fit.combine,
    fit.lists,
    generate,
    attack,
    methods.info,
    export,
    hub.push,
    hub.pull,
    hub.card,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(fit.cache_app, name="cache")
app.add_typer(convert.convert_app, name="convert")


def main() -> None:
    """Entry point: errors of the library and of the Hub become one line and exit code 1 (`--debug` shows tracebacks)."""
    completion.step_over_marks()
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv[1:] or not _is_told(error):
            raise
        _fail(str(error))


def _is_told(error: Exception) -> bool:
    """Whether an error's message is meant for people. Its class's module was imported by whoever raised it."""
    if isinstance(error, OSError):
        return True
    kinds = (("diffusers_erasure.errors", "ErasureError"), ("huggingface_hub.errors", "HfHubHTTPError"))
    known = [getattr(sys.modules[module], name) for module, name in kinds if module in sys.modules]
    return isinstance(error, tuple(known))


def _fail(message: str) -> NoReturn:
    err.print(Text("error: ", style="bold red").append(message, style="not bold default"))
    sys.exit(1)


if __name__ == "__main__":
    main()
