"""The command `generate`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from .completion import TINY
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


def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")],
    erasure: Annotated[
        list[str] | None, typer.Option("--erasure", "-e", help=f"{ERASURE}, or either with =STRENGTH; repeatable.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Annotated[int, typer.Option(help="The i-th image starts from seed + i.")] = 0,
    images: Annotated[int, typer.Option(help="Images a prompt.", min=1)] = 1,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps; by default 20, of demo-sdxl 8, of demo-sd3 and demo-flux 10.", min=1),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; the pipeline's (3 for demo, demo-sdxl, demo-sd3) by default.")
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
    from diffusers_erasure.demo import call_arguments

    extra: dict[str, Any] = call_arguments(TINY[base]) if base in TINY else {"num_inference_steps": 20}
    given = {"negative_prompt": negative_prompt, "num_inference_steps": steps, "guidance_scale": guidance}
    extra.update({name: value for name, value in given.items() if value is not None})
    steps = extra.pop("num_inference_steps")
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
