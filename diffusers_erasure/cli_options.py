"""What the commands share: where they print, and the options about the base model."""

from typing import Annotated

import typer
from rich.console import Console


# Results go to standard output, everything else (progress, logs, errors) to standard error.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Base = Annotated[str, typer.Option("--base", help="Base model: a folder, a repository id, or 'demo'.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda or cpu; the best one by default.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the base model's files, such as fp16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model.")]
Token = Annotated[str | None, typer.Option(help="Hub token; the stored one by default.", envvar="HF_TOKEN")]
Offload = Annotated[str, typer.Option(help="none, model or sequential: offload to the CPU between uses.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
