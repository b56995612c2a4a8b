"""Rebuilds the embedded model and its judge from pictures and their words.

    python -m tools.demo_model --images X.npz --labels X.json --output DIR

writes `DIR/model` (a Stable Diffusion pipeline), `DIR/judge.safetensors` and `DIR/rebuild.json` (settings and what was
measured). `--stage` runs one stage on top of what is there; `--smoke` runs all of them in seconds, to see that they do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from diffusers_erasure.demo.dataset import Dataset, load_dataset
from diffusers_erasure.errors import ErasureInputError
from tools.graph_loop import LoopSettings

from .captions import Captions
from .train_judge import JudgeSettings, train_judge
from .train_model import ModelSettings, new_scheduler, train_model
from .train_tokenizer import TokenizerSettings, train_tokenizer
from .train_vae import VaeSettings, train_vae


logger = logging.getLogger(__name__)

STAGES = ("vae", "tokenizer", "model", "judge")
SMOKE_OBJECTS = 8


@dataclasses.dataclass(frozen=True)
class RebuildSettings:
    """
    The settings of all stages.

    Args:
        vae ([`~tools.demo_model.train_vae.VaeSettings`]): The autoencoder's.
        tokenizer ([`~tools.demo_model.train_tokenizer.TokenizerSettings`]): The tokenizer's.
        model ([`~tools.demo_model.train_model.ModelSettings`]): Text encoder's and UNet's.
        judge ([`~tools.demo_model.train_judge.JudgeSettings`]): The judge's.
    """

    vae: VaeSettings = dataclasses.field(default_factory=VaeSettings)
    tokenizer: TokenizerSettings = dataclasses.field(default_factory=TokenizerSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    judge: JudgeSettings = dataclasses.field(default_factory=JudgeSettings)


SMOKE_SETTINGS = RebuildSettings(
    vae=VaeSettings(steps=4, batch_size=4),
    model=ModelSettings(LoopSettings(steps=3), batch_size=4, captions=3),
    judge=JudgeSettings(steps=10, batch_size=16, copies=1, test_draws=1),
)


def rebuild(
    dataset: Dataset,
    output: str | Path,
    settings: RebuildSettings = RebuildSettings(),
    stages: Sequence[str] = STAGES,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """
    Run stages of the rebuild.

    Args:
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]):
            The pictures and their words.
        output (`str` or `Path`):
            The folder to write. It is new, empty, or of an earlier rebuild, of which the other stages' parts are used.
        settings ([`RebuildSettings`], *optional*):
            The settings of each stage, those of the recipe by default.
        stages (sequence of `str`, *optional*):
            Which of [`STAGES`] to run; they run in that order.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Where to compute.

    Returns:
        `dict`: For each stage run so far its settings, what was measured and the versions of the libraries.
    """
    if unknown := sorted(set(stages) - set(STAGES)):
        raise ErasureInputError(f"There are no stages {unknown}, only {list(STAGES)}.")
    accelerator = accelerator or Accelerator()
    if accelerator.num_processes > 1:
        raise ErasureInputError("The rebuild is small: run it in one process, not under `accelerate launch`.")
    with replaced_folder(Path(output)) as work:
        record_file = work / "rebuild.json"
        record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else {}
        for stage in STAGES:
            if stage in stages:
                logger.info("stage %s", stage)
                measured = _run_stage(stage, dataset, work, settings, accelerator)
                record[stage] = {
                    "settings": dataclasses.asdict(getattr(settings, stage)),
                    "measured": measured,
                    "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
                }
                logger.info("stage %s: %s", stage, measured)
        record_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _run_stage(
    stage: str, dataset: Dataset, work: Path, settings: RebuildSettings, accelerator: Accelerator
) -> dict[str, float]:
    model = work / "model"
    if stage == "vae":
        vae, measured = train_vae(dataset, settings.vae, accelerator)
        vae.half().save_pretrained(_emptied(model / "vae"))
        return measured
    if stage == "tokenizer":
        tokenizer = train_tokenizer(Captions(dataset), settings.tokenizer)
        tokenizer.save_pretrained(_emptied(model / "tokenizer"))
        return {"vocabulary": len(tokenizer)}
    # The stages from here on use the weights as stored, in float16, so that they fit what will be loaded.
    vae = AutoencoderKL.from_pretrained(_required(model / "vae", "vae"), local_files_only=True).float()
    if stage == "judge":
        judge, measured = train_judge(dataset, vae, settings.judge, accelerator)
        judge.save(work / "judge.safetensors")
        return measured
    tokenizer = CLIPTokenizer.from_pretrained(_required(model / "tokenizer", "tokenizer"), local_files_only=True)
    text_encoder, unet, measured = train_model(
        dataset, Captions(dataset), vae, tokenizer, settings.model, accelerator.device
    )
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(_emptied(model))
    return measured


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """A working copy of a folder, which takes its place at the end; after an error the folder is as it was."""
    if output.exists() and not output.is_dir():
        raise ErasureInputError(f"{output} is a file; a folder is needed.")
    if output.is_dir() and any(output.iterdir()) and not (output / "rebuild.json").is_file():
        raise ErasureInputError(f"{output} holds other files; give a new folder, or one that a rebuild has written.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        work = Path(scratch) / "new"
        if output.is_dir():
            shutil.copytree(output, work)
        else:
            work.mkdir()
        yield work
        if output.is_dir():
            os.replace(output, Path(scratch) / "old")
        os.replace(work, output)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _required(folder: Path, stage: str) -> Path:
    if not folder.is_dir():
        raise ErasureInputError(f"This stage needs the {stage}: run `--stage {stage}` first, or `--stage all`.")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    default = RebuildSettings()
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--images", type=Path, required=True, help=".npz, key 'images': uint8 [objects, styles, s, s, 3]"
    )
    parser.add_argument("--labels", type=Path, required=True, help=".json with 'styles' and 'objects'")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--smoke", action="store_true", help=f"a few steps on the first {SMOKE_OBJECTS} objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-vae", type=int, help=f"default: {default.vae.steps}")
    parser.add_argument("--steps-model", type=int, help="at most so many; as many as there is time for by default")
    parser.add_argument("--seconds-model", type=int, help=f"meant for a GPU; default: {default.model.loop.seconds:g}")
    parser.add_argument("--no-graph", action="store_true", help="train the model without a CUDA graph on a GPU")
    parser.add_argument("--steps-judge", type=int, help=f"default: {default.judge.steps}")
    options = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dataset = load_dataset(options.images, options.labels)
    settings = SMOKE_SETTINGS if options.smoke else default
    if options.smoke:
        dataset = dataset.first(SMOKE_OBJECTS)
    settings = dataclasses.replace(
        settings,
        vae=_changed(settings.vae, seed=options.seed, steps=options.steps_vae),
        model=_changed(
            dataclasses.replace(
                settings.model,
                loop=_changed(
                    settings.model.loop,
                    steps=options.steps_model,
                    seconds=options.seconds_model,
                    graph=False if options.no_graph else None,
                ),
            ),
            seed=options.seed,
        ),
        judge=_changed(settings.judge, seed=options.seed, steps=options.steps_judge),
    )
    rebuild(dataset, options.output, settings, STAGES if options.stage == "all" else (options.stage,))
    logger.info("written to %s", options.output)


def _changed(settings: Any, **changes: int | None) -> Any:
    given = {key: value for key, value in changes.items() if value is not None}
    for key, value in given.items():
        if value < 0 or (value == 0 and key in ("steps", "seconds")):
            raise ErasureInputError(f"{key} must be positive, not {value}.")
    return dataclasses.replace(settings, **given)
