"""Sample images during a run: what the student draws now, beside the base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import compat
from ..base_model import component
from ..denoising.sampler import SAMPLE, Sampler, trajectories
from ..logging import get_logger
from ..pictures import as_png, contact_sheet
from ..storage import write_file
from .config import TrainSettings
from .network import Network


logger = get_logger(__name__)


def write_samples(
    pipe: Any,
    network: Network,
    sampler: Sampler,
    prompts: Sequence[str],
    shape: Sequence[int],
    config: TrainSettings,
    file: Path,
) -> None:
    """Draw each prompt with the base and the student from the same noise, and write a contact sheet."""
    if component(pipe, "vae") is None:
        logger.warning("The pipeline has no VAE, so that no sample images can be drawn.")
        return
    noise = torch.stack([sampler.noise(config.seed, ("sample", prompt), shape) for prompt in prompts])
    rows = []
    for label, predict in (("base", network.teacher_rows), ("now", network.student_rows)):
        found = trajectories(
            predict, sampler, noise, {SAMPLE: list(prompts)}, config.guidance_scale or 1.0, keep=(SAMPLE,)
        )
        # The last latent lies one step before the end; its noise-free estimate is the end.
        last = len(sampler) - 1
        latents = sampler.step(found.predictions[SAMPLE][:, last].float(), last, found.latents[:, last])
        rows.append((label, _decoded(pipe, latents)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, as_png(contact_sheet(rows, columns=list(prompts))))


@torch.no_grad()
def _decoded(pipe: Any, latents: torch.Tensor) -> list[Any]:
    vae = component(pipe, "vae")
    latents = latents.to(compat.execution_device(vae))
    scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    images = [vae.decode(each[None].to(vae.dtype)).sample.float().cpu() for each in scaled]
    return list(pipe.image_processor.postprocess(torch.cat(images), output_type="pil"))
