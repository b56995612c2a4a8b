"""What the commands share: where they print, their common options, and how they name erasures and load base models."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from . import completion
from .threads import limit_threads


if TYPE_CHECKING:
    from rich.progress import Progress

# Results go to standard output, everything else (progress, logs, errors) to standard error.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Base = Annotated[
    str,
    typer.Option(
        "--base",
        help="Base model: a folder, a repository id, 'demo', or in a checkout 'demo-sdxl', 'demo-sd3', 'demo-flux'.",
        autocompletion=completion.of(*completion.TINY),
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Device, such as cuda or cpu; the best one by default.",
        autocompletion=completion.of("cpu", "cuda", "mps"),
    ),
]
CpuDevice = Annotated[
    str | None,
    typer.Option("--device", help="Device; the CPU by default.", autocompletion=completion.of("cpu", "cuda", "mps")),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32, float16 or bfloat16.",
        autocompletion=completion.of("auto", "float32", "float16", "bfloat16"),
    ),
]
Variant = Annotated[str | None, typer.Option("--variant", help="Variant of the base model's files, such as fp16.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the base model.")]
Token = Annotated[str | None, typer.Option("--token", help="Hub token; the stored one by default.", envvar="HF_TOKEN")]
Offload = Annotated[
    str,
    typer.Option(
        "--offload",
        help="none, model or sequential: offload to the CPU between uses.",
        autocompletion=completion.of("none", "model", "sequential"),
    ),
]
StrictBase = Annotated[
    str,
    typer.Option(
        "--strict-base", help="warn, error or ignore.", autocompletion=completion.of("warn", "error", "ignore")
    ),
]
Half = Annotated[bool, typer.Option("--half", help="Save the tensors in float16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

# An erasure's own files, the configuration first; those of diffusers_erasure.schema, which is not imported for it.
FILES = ("erasure_config.json", "erasure.safetensors", "pytorch_lora_weights.safetensors")
ERASURE = "Folder, or repository with or without @REVISION"  # what every command takes that reads an erasure


@dataclass(frozen=True)
class Source:
    """An erasure as it is named on the command line: `SOURCE`, `SOURCE@REVISION`, `SOURCE=STRENGTH`.

    Attributes:
        name: the folder or repository.
        revision: branch, tag or commit of the repository.
        strength: where the command takes one.
    """

    name: str
    revision: str | None = None
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str, *, strengths: bool = False, revision: str | None = None) -> "Source":
        """Read one from an argument. A path that exists is taken as it is, `@` and `=` included."""
        if Path(text).expanduser().exists():
            return cls(text, revision)
        name, strength = text, 1.0
        if strengths:
            before, equals, value = text.rpartition("=")
            if equals:
                name = before
                try:
                    strength = float(value)
                except ValueError:
                    raise typer.BadParameter(f"an erasure is NAME, NAME@REVISION or NAME=STRENGTH, not {text!r}.")
        found = re.fullmatch(r"([\w.-]+/[\w.-]+)@(.+)", name, re.ASCII)
        if found and not Path(name).expanduser().exists():
            if revision is not None and revision != found[2]:
                raise typer.BadParameter(f"{text!r} names a revision, and `--revision {revision}` another one.")
            return cls(found[1], found[2], strength)
        return cls(name, revision, strength)

    def read(self, *, token: str | None = None, **arguments: Any) -> Any:
        """Read the erasure: an [`Erasure`]."""
        from diffusers_erasure import Erasure

        return Erasure.from_pretrained(self.name, revision=self.revision, token=token, **arguments)

    def load(self, pipe: Any, *, strict_base: str, token: str | None) -> Any:
        """Load it into a pipeline: an [`ErasureInfo`]."""
        from diffusers_erasure.pipeline import load_erasure

        return load_erasure(
            pipe,
            self.name,
            strength=self.strength,
            revision=self.revision,
            strict_base=strict_base,  # type: ignore[arg-type]  # `load_erasure` checks it
            token=token,
        )


def parse_all(texts: Sequence[str] | None) -> list[Source]:
    """Read what `--erasure` was given."""
    return [Source.parse(text, strengths=True) for text in texts or ()]


def load_model(
    base: str,
    *,
    device: str | None,
    dtype: str,
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    offload: str = "none",
    half: Literal["float16", "bfloat16"] = "float16",
) -> Any:
    """Load the base model, with as many threads as there are free cores; see [`load_base`]."""
    limit_threads()
    import torch

    from .base_models import load_base

    return load_base(
        base,
        device=device,
        dtype=dtype,
        variant=variant,
        revision=revision,
        token=token,
        offload=offload,  # type: ignore[arg-type]  # `load_base` checks it
        half=getattr(torch, half),
    )


def new_erasure_folder(folder: Path, overwrite: bool) -> None:
    """Refuse, before anything is computed, a folder that cannot be written, or where something would be replaced."""
    there = _own_files(folder)
    if there and not overwrite:
        what = "an erasure" if FILES[0] in there else f"a file {there[0]}"
        raise typer.BadParameter(
            f"{folder} holds {what} already; name another folder, or give `--overwrite`.", param_hint="--output"
        )


def folder_to_update(folder: Path) -> None:
    """Refuse a folder that cannot be written, or holds a LoRA of somebody's own; an erasure there is brought up to date."""
    there = _own_files(folder)
    if there and FILES[0] not in there:
        raise typer.BadParameter(
            f"{folder} holds a file {there[0]} that is no erasure's and would be replaced; name another folder.",
            param_hint="--output",
        )


def _own_files(folder: Path) -> list[str]:
    """Those of an erasure's files that lie in a folder to which one is to be saved."""
    whole = folder.expanduser().resolve()
    if whole.exists() and not whole.is_dir():
        raise typer.BadParameter(f"{folder} is a file; name a folder.", param_hint="--output")
    if whole == Path.cwd():
        raise typer.BadParameter("the current folder cannot be replaced; name a new one in it.", param_hint="--output")
    return [name for name in FILES if (whole / name).exists()]


def bar() -> "Progress":
    """A progress bar on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err)


def save_dtype(half: bool) -> Any:
    """The dtype in which tensors are saved: `torch.float16`, or as they are."""
    import torch

    return torch.float16 if half else None
