"""Rebuilds the tiny models of other families, from the pictures and the VAE of the embedded model.

    python -m tools.demo_worlds sdxl sd3 flux --output DIR

writes `DIR/NAME`, a pipeline in float16, and `DIR/rebuild.json` (settings and what was measured). By default each is
trained for 220 seconds, which is meant for a GPU; `--smoke` takes a few steps, to see that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from diffusers_erasure import demo
from diffusers_erasure.demo.dataset import Dataset
from diffusers_erasure.errors import ErasureInputError
from tools.demo_model.captions import Captions
from tools.demo_model.rebuild import replaced_folder
from tools.demo_model.train_model import draw_captions, tokenize
from tools.demo_model.train_tokenizer import TokenizerSettings, train_tokenizer
from tools.demo_model.train_vae import encode, new_vae, to_pixels
from tools.graph_loop import LoopSettings, train

from .families import FAMILIES, Batch, Family
from .tokenizing import T5_POSITIONS, train_t5_tokenizer


logger = logging.getLogger(__name__)

SMOKE_OBJECTS = 4


@dataclasses.dataclass(frozen=True)
class WorldSettings:
    """
    How a tiny model is trained.

    Args:
        loop ([`~tools.graph_loop.LoopSettings`]): For how long.
        batch_size (`int`): Pictures a step.
        captions (`int`): Captions that are drawn for each picture, before the training.
        seed (`int`): Seeds weights and draws.
    """

    loop: LoopSettings = dataclasses.field(default_factory=LoopSettings)
    batch_size: int = 128
    captions: int = 200
    seed: int = 0


SMOKE_SETTINGS = WorldSettings(loop=LoopSettings(steps=3), batch_size=4, captions=3)


def rebuild(
    names: Sequence[str],
    dataset: Dataset,
    output: str | Path,
    settings: WorldSettings = WorldSettings(),
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """
    Train tiny models and write them as pipelines.

    Args:
        names (sequence of `str`): Which of [`~tools.demo_worlds.families.FAMILIES`].
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]): The pictures and their words.
        output (`str` or `Path`): The folder to write: new, empty, or of an earlier rebuild, whose other models stay.
        settings ([`WorldSettings`], *optional*): Of the recipe by default.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to compute.

    Returns:
        `dict`: For each model in the folder its settings, what was measured and the versions of the libraries.

    Raises:
        `ErasureInputError`: There is no such family, or the folder holds other files.
    """
    if unknown := sorted(set(names) - set(FAMILIES)):
        raise ErasureInputError(f"There are no families {unknown}, only {list(FAMILIES)}.")
    with replaced_folder(Path(output)) as work:
        record_file = work / "rebuild.json"
        record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else {}
        for name in names:
            vae = embedded_vae().to(device)
            family, measured = train_family(name, dataset, vae, settings)
            shutil.rmtree(work / name, ignore_errors=True)
            family.pipeline(vae).to(torch.float16).save_pretrained(work / name)
            record[name] = {
                "settings": dataclasses.asdict(settings),
                "measured": measured,
                "versions": {library: version(library) for library in ("torch", "diffusers", "transformers")},
            }
            logger.info("%s: %s", name, measured)
        record_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def embedded_vae() -> AutoencoderKL:
    """The embedded model's autoencoder, which remembers no folder that it was loaded from."""
    loaded = demo.load_pipeline().vae
    vae = new_vae(loaded.config.sample_size)
    vae.load_state_dict(loaded.state_dict())
    vae.register_to_config(scaling_factor=loaded.config.scaling_factor)
    return vae.eval().requires_grad_(False)


def train_family(
    name: str, dataset: Dataset, vae: AutoencoderKL, settings: WorldSettings
) -> tuple[Family, dict[str, float]]:
    """
    Train text encoders and denoiser of one family, from scratch, on the latents of the pictures and their mirror images.

    Args:
        name (`str`): One of [`~tools.demo_worlds.families.FAMILIES`].
        dataset ([`~diffusers_erasure.demo.dataset.Dataset`]): The pictures and their words.
        vae ([`~diffusers.AutoencoderKL`]): The embedded model's; what is trained lies on its device.
        settings ([`WorldSettings`]): Steps, sizes and the seed.

    Returns:
        `tuple`: The family with its averaged weights, and what the loop measured.
    """
    torch.manual_seed(settings.seed)
    device = vae.device
    captions = Captions(dataset)
    with_t5 = name != "sdxl"
    family = FAMILIES[name](
        train_tokenizer(captions, TokenizerSettings()), train_t5_tokenizer(captions) if with_t5 else None
    )
    family.to(device)
    family.denoiser.train()  # no part has dropout

    pixels = to_pixels(dataset)
    # Mirrored before and not after encoding: the autoencoder is not symmetric.
    latents = torch.stack([encode(pixels, vae), encode(pixels.flip(3), vae)], dim=1) * vae.config.scaling_factor
    latents = latents.to(device)
    clip, t5 = (None if each is None else each.to(device) for each in _tokens(family, captions, dataset, settings))

    def loss() -> torch.Tensor:
        size = (settings.batch_size,)
        picture = torch.randint(len(latents), size, device=device)
        mirrored = torch.randint(2, size, device=device)
        # The captions lie picture by picture; behind them all is the empty prompt.
        chosen = picture * settings.captions + torch.randint(settings.captions, size, device=device)
        chosen = torch.cat([chosen, torch.full((1,), len(latents) * settings.captions, device=device)])
        assert clip is not None
        return family.loss(
            Batch(
                latents=latents[picture, mirrored],
                clip=clip[chosen],
                t5=None if t5 is None else t5[chosen],
                draws=torch.rand(3, *size, device=device),
            )
        )

    measured = train(family.modules, loss, settings.loop)
    for module in family.modules:
        module.eval()
    return family, measured


def _tokens(
    family: Family, captions: Captions, dataset: Dataset, settings: WorldSettings
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """CLIP's and T5's tokens of all captions that are used, and of the empty prompt, [pictures * captions + 1, positions]."""
    texts = [*draw_captions(captions, dataset, settings.captions, settings.seed), ""]
    t5 = None
    if family.t5 is not None:
        t5 = family.t5(
            texts, padding="max_length", max_length=T5_POSITIONS, truncation=True, return_tensors="pt"
        ).input_ids
    return tokenize(texts, family.clip), t5


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    default = WorldSettings()
    parser = argparse.ArgumentParser(prog="python -m tools.demo_worlds", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="+", choices=FAMILIES, metavar="NAME", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=default.loop.seconds, help="for each; default: %(default)g")
    parser.add_argument("--steps", type=int, help="at most so many; as many as there is time for by default")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="default: %(default)d")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--no-graph", action="store_true", help="without a CUDA graph on a GPU")
    parser.add_argument("--smoke", action="store_true", help=f"a few steps on the first {SMOKE_OBJECTS} objects")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.batch_size < 1 or (options.steps is not None and options.steps < 1):
        raise ErasureInputError("--seconds, --steps and --batch-size must be positive.")

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dataset = demo.load_images()
    settings = WorldSettings(
        LoopSettings(options.seconds, options.steps, graph=not options.no_graph),
        batch_size=options.batch_size,
        seed=options.seed,
    )
    if options.smoke:
        dataset, settings = dataset.first(SMOKE_OBJECTS), dataclasses.replace(SMOKE_SETTINGS, seed=options.seed)
    rebuild(options.names, dataset, options.output, settings, options.device)
    logger.info("written to %s", options.output)
