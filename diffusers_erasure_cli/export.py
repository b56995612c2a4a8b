"""The command `export`: whole erased models, and LoRA files for other user interfaces."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .completion import of
from .options import (
    ERASURE,
    Base,
    CpuDevice,
    Dtype,
    Json,
    Revision,
    Source,
    StrictBase,
    Token,
    Variant,
    load_model,
    parse_all,
)


def export(
    output: Annotated[Path, typer.Argument(help="A new folder for the model; a new .safetensors file for kohya.")],
    erasure: Annotated[
        list[str], typer.Option("--erasure", "-e", help=f"{ERASURE}, or either with =STRENGTH; repeatable.")
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="model: the whole erased model. kohya: one erasure as a LoRA file.",
            autocompletion=of("model", "kohya"),
        ),
    ] = "model",
    half: Annotated[bool, typer.Option("--half", help="kohya: save the tensors in float16.")] = False,
    strict_base: StrictBase = "warn",
    base: Base = "demo",
    device: CpuDevice = "cpu",
    dtype: Dtype = "auto",
    variant: Variant = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Save a whole erased model (base and erasures in one), or an erasure as a kohya-style LoRA file."""
    wanted = parse_all(erasure)
    if form not in ("model", "kohya"):
        raise typer.BadParameter(f"it must be model or kohya, not {form!r}.", param_hint="--format")
    if form == "kohya":
        if len(wanted) != 1:
            raise typer.BadParameter("a kohya file holds one erasure; name one.", param_hint="--erasure")
        files = [_kohya(wanted[0], output, half, token)]
    else:
        if half:
            raise typer.BadParameter("`--half` goes with `--format kohya`; for a model use `--dtype float16`.")
        pipe = load_model(base, device=device, dtype=dtype, variant=variant, revision=revision, token=token)
        from diffusers_erasure.formats.erased_model import export_erased

        for source in wanted:
            source.load(pipe, strict_base=strict_base, token=token)
        files = export_erased(pipe, output)
    if as_json:
        sizes = {str(path): path.stat().st_size for path in files}
        print(json.dumps({"output": str(output), "files": sizes}, indent=2))
    else:
        print(f"{output}  {sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {len(files)} files")


def _kohya(source: Source, output: Path, half: bool, token: str | None) -> Path:
    import torch

    from diffusers_erasure.formats.kohya import save_kohya

    erasure = source.read(token=token).rescaled(source.strength)
    return save_kohya(erasure, output, dtype=torch.float16 if half else torch.float32)
