"""The commands that draw: `demo` and `generate`."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from .options import (
    ERASURE,
    Base,
    Device,
    Dtype,
    Json,
    Offload,
    Overwrite,
    Revision,
    StrictBase,
    Token,
    Variant,
    bar,
    load_model,
    out,
    parse_all,
)
from .threads import limit_threads


if TYPE_CHECKING:
    from diffusers_erasure.demo.command import DemoReport


def demo(
    concept: Annotated[str, typer.Option(help="Object or style of the embedded model to erase.")] = "cat",
    anchor: Annotated[str | None, typer.Option(help="What it is mapped to; its hypernym by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="A new folder; by default one in the current directory.")] = None,
    as_json: Json = False,
) -> None:
    """The main job on the embedded model: erase, save, load into a fresh pipeline, compare, score."""
    limit_threads()
    from diffusers_erasure.demo.command import run_demo

    # What the fit warns of in numbers, the demo measures on pictures.
    logging.getLogger("diffusers_erasure.methods.publishing").setLevel(logging.ERROR)
    with bar() as shown:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = shown.add_task(f"drawing {label}", total=total)
            shown.update(tasks[label], completed=done)

        report = run_demo(concept, anchor, output, progress)
    if as_json:
        print(report.to_json())
        return
    _print_demo(report)


def _print_demo(report: "DemoReport") -> None:
    from rich.table import Table

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


def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")],
    erasure: Annotated[
        list[str] | None, typer.Option("--erasure", "-e", help=f"{ERASURE}, or either with =STRENGTH; repeatable.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Annotated[int, typer.Option(help="The i-th image starts from seed + i.")] = 0,
    images: Annotated[int, typer.Option(help="Images a prompt.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; the pipeline's (3 for demo) by default.")
    ] = None,
    strict_base: StrictBase = "warn",
    base: Base = "demo",
    device: Device = None,
    dtype: Dtype = "auto",
    variant: Variant = None,
    revision: Revision = None,
    token: Token = None,
    offload: Offload = "none",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw images, with erasures on. Each file tells its prompt, seed, erasures and strengths."""
    wanted = parse_all(erasure)
    jobs = [(prompt, seed + i) for i, prompt in enumerate(p for p in prompts for _ in range(images))]
    files = [output / f"{i:04d}.png" for i in range(len(jobs))]
    there = [path for path in files if path.exists()]
    if there and not overwrite:
        raise typer.BadParameter(
            f"{there[0]} exists already; name another folder, or give `--overwrite`.", param_hint="--output"
        )
    pipe = load_model(
        base, device=device, dtype=dtype, variant=variant, revision=revision, token=token, offload=offload
    )
    loaded = []
    for source in wanted:
        info = source.load(pipe, strict_base=strict_base, token=token)
        loaded.append(
            {
                "name": info.name,
                "source": source.name,
                "revision": info.revision,
                "strength": info.strength,
                "base_match": dict(info.base_match),
            }
        )
    import torch

    from diffusers_erasure.pictures import as_png
    from diffusers_erasure.storage import write_file

    output.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
    scale = 3.0 if guidance is None and base == "demo" else guidance
    extra.update({} if scale is None else {"guidance_scale": scale})
    drawn = []
    with bar() as shown:
        task = shown.add_task("drawing", total=len(jobs))
        for path, (prompt, own_seed) in zip(files, jobs, strict=True):
            generator = torch.Generator().manual_seed(own_seed)
            image = pipe(prompt, num_inference_steps=steps, generator=generator, **extra).images[0]
            told = {"prompt": prompt, "seed": own_seed, "steps": steps, **extra, "base": base, "erasures": loaded}
            write_file(path, as_png(image, _metadata(told)))
            drawn.append({"file": str(path), "prompt": prompt, "seed": own_seed})
            shown.advance(task)
    if as_json:
        print(json.dumps({"erasures": loaded, "images": drawn}, indent=2))
        return
    for item in drawn:
        out.print(Text(f"{item['file']}  {item['prompt']}  (seed {item['seed']})"))


def _metadata(told: dict[str, Any]) -> Any:
    """What a picture was drawn from, as PNG text chunks; values that are no text are JSON."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in told.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return info
