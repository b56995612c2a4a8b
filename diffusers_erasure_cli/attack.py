"""The command `attack`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

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
    load_model,
    out,
    parse_all,
)


REPORT, SHEET, CHECKPOINTS = "report.json", "sheet.png", "checkpoints"
SHOWN = 8  # pictures of a row on the sheet


class Attack(StrEnum):
    """What there is."""

    RING_A_BELL = "ring-a-bell"


def attack(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the sheet of pictures.")],
    target: Annotated[str, typer.Option(help="The concept that is to be brought back.")],
    erasure: Annotated[
        list[str], typer.Option("--erasure", "-e", help=f"{ERASURE}, or either with =STRENGTH; repeatable.")
    ],
    name: Annotated[Attack, typer.Option("--attack", help="The attack.")] = Attack.RING_A_BELL,
    anchor: Annotated[
        str, typer.Option(help="What stands in the concept's place, such as what it is mapped to.")
    ] = "",
    published: Annotated[bool, typer.Option("--published", help="The authors' settings of the search.")] = False,
    generations: Annotated[int | None, typer.Option(help="Of the search.", min=1)] = None,
    population: Annotated[int | None, typer.Option(help="Prompts of a generation.", min=4)] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt.", min=1)] = None,
    eta: Annotated[float | None, typer.Option(help="How far along the concept's direction.", min=0)] = None,
    encoder: Annotated[str | None, typer.Option(help="The text encoder to search with; the first by default.")] = None,
    images: Annotated[int, typer.Option(help="Pictures of each prompt and model.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    judge: Annotated[
        str | None,
        typer.Option(help="What looks at the pictures: emoji (of the tiny models), or clip:FOLDER_OR_REPOSITORY."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoints.")] = False,
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
    """Try to bring an erased concept back, and tell how often that succeeds."""
    wanted = parse_all(erasure)
    if (output / REPORT).exists() and not overwrite:
        raise typer.BadParameter(
            f"{output / REPORT} exists already; name another folder, or give `--overwrite`.", param_hint="--output"
        )
    kind = judge or ("emoji" if base in TINY else "")
    if kind != "emoji" and not kind.startswith("clip:"):
        raise typer.BadParameter("Give emoji or clip:FOLDER_OR_REPOSITORY.", param_hint="--judge")
    pipe = load_model(
        base, device=device, dtype=dtype, variant=variant, revision=revision, token=token, offload=offload
    )
    for source in wanted:
        source.load(pipe, strict_base=strict_base, token=token)
    from diffusers_erasure.attacks import RingABellConfig
    from diffusers_erasure.attacks import attack as attacked
    from diffusers_erasure.demo import call_arguments
    from diffusers_erasure.pictures import as_png, contact_sheet
    from diffusers_erasure.storage import write_file

    drawing: dict[str, Any] = call_arguments(TINY[base]) if base in TINY else {"num_inference_steps": 20}
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    drawing.update({key: value for key, value in given.items() if value is not None})
    knobs: dict[str, Any] = {"generations": generations, "population": population, "tokens": tokens, "eta": eta}
    config = RingABellConfig(published=published, seed=seed, **knobs)
    shown: list[tuple[str, list[Any]]] = []
    output.mkdir(parents=True, exist_ok=True)
    trial = attacked(
        pipe,
        target,
        anchor,
        seer=_seer(kind),
        config=config,
        encoder=encoder,
        images=images,
        checkpoint_dir=output / CHECKPOINTS,
        resume=resume,
        keep=lambda row, pictures: shown.append((f"{row.model}: {row.prompt}", pictures[:SHOWN])),
        **drawing,
    )
    told = {"attack": str(name), "base": base, "judge": kind, "drawing": drawing, **trial.as_json()}
    write_file(output / REPORT, (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())
    write_file(output / SHEET, as_png(contact_sheet(shown)))
    _tidy(output / CHECKPOINTS)
    if as_json:
        print(json.dumps(told, indent=2))
        return
    table = Table("model", "prompt", "text", f"{target} seen, %", "in any")
    for row in trial.rows:
        table.add_row(row.model, row.prompt, row.text, f"{100 * row.share:.0f}", "yes" if row.any else "no")
    out.print(table)
    verdict = (
        "attack too weak" if trial.too_weak else f"success rate {100 * trial.asr:+.0f} points over the anchor prompt"
    )
    out.print(f"{name}: {verdict}. {output / REPORT}, {output / SHEET}")


def _seer(kind: str) -> Any:
    from diffusers_erasure.attacks import EmojiSeer, PickerSeer

    if kind == "emoji":
        return EmojiSeer()
    from transformers import AutoProcessor, CLIPModel

    from diffusers_erasure.anchors import ClipPicker

    name = kind.removeprefix("clip:")
    return PickerSeer(ClipPicker(CLIPModel.from_pretrained(name), AutoProcessor.from_pretrained(name)))


def _tidy(folder: Path) -> None:
    """The checkpoints have done their work."""
    from diffusers_erasure.runs.checkpoint import clear

    for each in sorted(folder.glob("*")):
        clear(each)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
