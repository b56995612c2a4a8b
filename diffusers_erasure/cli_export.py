"""The command `export`: whole erased models, and LoRA files for other user interfaces."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import ErasureInputError


def export(
    output: Annotated[Path, typer.Argument(help="A new folder for the model; a new .safetensors file for kohya.")],
    erasure: Annotated[
        list[str], typer.Option("--erasure", "-e", help="Folder or repository, or NAME=STRENGTH; repeatable.")
    ],
    form: Annotated[
        str, typer.Option("--format", help="model: the whole erased model. kohya: one erasure as a LoRA file.")
    ] = "model",
    half: Annotated[bool, typer.Option("--half", help="kohya: save the tensors in float16.")] = False,
    strict_base: Annotated[str, typer.Option(help="warn, error or ignore.")] = "warn",
    base: Annotated[str, typer.Option("--base", help="Base model: a folder, a repository id, or 'demo'.")] = "demo",
    device: Annotated[str | None, typer.Option(help="Device; the CPU by default.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    variant: Annotated[str | None, typer.Option(help="Variant of the base model's files, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token; the stored one by default.", envvar="HF_TOKEN")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Save a whole erased model (base and erasures in one), or an erasure as a kohya-style LoRA file."""
    from .cli import _with_strength

    wanted = [_with_strength(text) for text in erasure]
    if form == "kohya":
        files = [_kohya(wanted, output, half, token)]
    elif form == "model":
        if half:
            raise ErasureInputError("`--half` goes with `--format kohya`; for a model use `--dtype float16`.")
        from .exporting import export_erased
        from .loading import load_base
        from .pipeline import load_erasure

        pipe = load_base(base, device=device, dtype=dtype, variant=variant, revision=revision, token=token)
        for source, strength in wanted:
            load_erasure(pipe, source, strength=strength, strict_base=strict_base, token=token)  # type: ignore[arg-type]
        files = export_erased(pipe, output)
    else:
        raise ErasureInputError(f"`--format` must be model or kohya, not {form!r}.")
    if as_json:
        sizes = {str(path): path.stat().st_size for path in files}
        print(json.dumps({"output": str(output), "files": sizes}, indent=2))
    else:
        print(f"{output}  {sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {len(files)} files")


def _kohya(wanted: list[tuple[str, float]], output: Path, half: bool, token: str | None) -> Path:
    import torch

    from .artifact import Erasure
    from .kohya import save_kohya

    if len(wanted) != 1:
        raise ErasureInputError("A kohya file holds one erasure; name one with `--erasure`.")
    source, strength = wanted[0]
    erasure = Erasure.from_pretrained(source, token=token).rescaled(strength)
    return save_kohya(erasure, output, dtype=torch.float16 if half else torch.float32)
