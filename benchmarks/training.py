"""ESD's trainer against the plain way, and what a run costs.

    python -m benchmarks.training [--only compare memory run] [--steps 300] [--concepts cat pizza]

`compare`  The library's ESD (a pool of the base's trajectories, the teacher's predictions kept along them, one forward pass a
           step) against a plain on-policy implementation of the paper, written here: every noisy latent is denoised anew by
           the student, the two teacher passes are made one by one. The same LoRA, loss, retained prompts, seeds, steps and
           batch, on the embedded model. UNet forwards are counted in samples, a backward pass as two more; both erasures are
           judged on the same images. `--plain-steps 20` stops the plain way, whose updates all cost the same, after 20 of
           them; then its erasure is not judged.
`memory`   Peak resident memory of an ESD-x run in Stable Diffusion 1.5's shapes: random weights, bfloat16 base, 64 x 64
           latents, in a process of its own.
`run`      `diffusers-erasure erase cat --method esd` on the embedded model, wall time, with all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig

from benchmarks.builders import made_up_names, make_pipeline, make_unet
from benchmarks.command import arguments, finish, in_process, print_table, start
from benchmarks.drawing import draw
from benchmarks.timing import peak_bytes
from diffusers_erasure import Erasure, demo, erase
from diffusers_erasure.demo.drawing import fast_pipeline
from diffusers_erasure.demo.words import HYPERNYMS, OBJECTS
from diffusers_erasure.denoising.prompts import nearest
from diffusers_erasure.methods import esd
from diffusers_erasure.schema import Concept
from diffusers_erasure.training import TrainingRun, resolved_for
from diffusers_erasure.training.sites import find_sites


IMAGES = 100  # of each cell, for each concept


# --------------------------------------------------------------------------------------------------------- compare


@dataclass
class Count:
    """Samples that went through a UNet, and how many of these with gradients."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counted(unet: Any) -> Iterator[Count]:
    """Count what goes through a UNet."""
    count = Count()

    def note(_: Any, inputs: tuple[Any, ...], __: Any) -> None:
        count.forward += len(inputs[0])
        count.backward += len(inputs[0]) if torch.is_grad_enabled() else 0

    handle = unet.register_forward_hook(note)
    try:
        yield count
    finally:
        handle.remove()


def plain_esd(
    pipe: Any, target: str, anchor: str, retain: Sequence[str], settings: esd.Settings, updates: int
) -> None:
    """The first updates of ESD as its paper's algorithm reads, on-policy, sample by sample; leaves its LoRA in the pipeline."""
    unet, steps = pipe.unet, settings.num_inference_steps
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    unet.requires_grad_(False)
    sites = list(find_sites(pipe, settings.train_set))
    torch.manual_seed(settings.seed)
    unet.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=sites, init_lora_weights="gaussian")
    )
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=settings.steps)
    near, draw, rows = nearest(pipe, retain, [target], settings.retain_nearest), Random(settings.seed), {}

    def predict(x: torch.Tensor, t: Any, prompt: str) -> torch.Tensor:
        if prompt not in rows:
            rows[prompt] = pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach()
        return unet(x, t, encoder_hidden_states=rows[prompt]).sample

    @torch.no_grad()
    def denoised(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        k, x = draw.randrange(steps), torch.randn(1, unet.config.in_channels, *(unet.config.sample_size,) * 2)
        for t in scheduler.timesteps[:k]:
            conditional, empty = predict(x, t, prompt), predict(x, t, "")
            guided = empty + settings.guidance_scale * (conditional - empty)
            x = scheduler.step(guided, t, x).prev_sample
        return x, scheduler.timesteps[k]

    @torch.no_grad()
    def base(x: torch.Tensor, t: torch.Tensor, prompt: str) -> torch.Tensor:
        unet.disable_adapters()
        try:
            return predict(x, t, prompt)
        finally:
            unet.enable_adapters()

    for _ in range(updates):
        optimizer.zero_grad()
        for sample in range(settings.batch_size):
            template = draw.choice(settings.template_list)
            concept, neutral = template.format(target), template.format(anchor)
            x, t = denoised(concept)
            away = base(x, t, neutral) - settings.eta * (base(x, t, concept) - base(x, t, neutral))
            loss = (predict(x, t, concept) - away).square().mean()
            (loss / settings.batch_size).backward()
            kept = template.format(draw.choice(near if sample % 2 == 0 else list(retain)))
            unet.disable_adapters()
            x, t = denoised(kept)
            unet.enable_adapters()
            loss = (predict(x, t, kept) - base(x, t, kept)).square().mean()
            (settings.retain_weight * loss / settings.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()


def judged(pipe: Any, target: str, images: int) -> tuple[float, float]:
    """Shares of images in which the judge sees what the prompt names: the target, and other objects."""
    others = [name for name in OBJECTS if name != target]
    shots = [(target, style) for style in (demo.STYLES * images)[:images]]
    shots += [(others[i % len(others)], demo.STYLES[i % len(demo.STYLES)]) for i in range(images)]
    prompts = [f"an emoji of a {name} in the style of {style}" for name, style in shots]
    seen = demo.load_judge().predict(draw(pipe, prompts, range(len(shots)))).objects
    right = [name == shown for (name, _), shown in zip(shots, seen, strict=True)]
    return sum(right[:images]) / images, sum(right[images:]) / images


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table `compare`."""
    settings: dict[str, Any] = {"preset": "object", "steps": options.steps}
    if options.smoke:
        settings |= {"batch_size": 2, "trajectories": 2, "num_inference_steps": 4}
    images = 5 if options.smoke else IMAGES
    found = []
    for target in options.concepts:
        anchor = HYPERNYMS[target]
        retain = ["dog", "pizza"] if options.smoke else [name for name in OBJECTS if name != target]
        config = esd.Config(**settings)
        resolved = resolved_for(fast_pipeline(), [Concept(target, anchor)], config, esd.Settings)  # as `erase` does
        row: dict[str, Any] = {"concept": target, "steps": options.steps}
        for name in ("plain", "library"):
            # Not `fast_pipeline`: its channels-last weights are slow in batches as small as the plain way's.
            pipe = demo.load_pipeline()
            with counted(pipe.unet) as count:
                begin = time.process_time()
                updates = options.plain_steps if name == "plain" else options.steps
                if name == "plain":
                    plain_esd(pipe, target, anchor, retain, resolved, updates)
                else:
                    run = TrainingRun(progress=False)
                    made = erase(
                        pipe,
                        target,
                        anchors=anchor,
                        retain=retain,
                        method="esd",
                        training=run,
                        compare=False,
                        **settings,
                    )
                    pipe.load_erasure(made)
                taken = time.process_time() - begin
            pipe.scheduler = fast_pipeline().scheduler
            erased, kept = judged(pipe, target, images) if updates == options.steps else (None, None)
            row[name] = {
                "updates": updates,
                "forwards": count.forward / updates,
                "passes": (count.forward + 2 * count.backward) / updates,
                "seconds": taken / updates,
                "acc_e": erased,
                "acc_r": kept,
            }
        row["ratio"] = {key: row["library"][key] / row["plain"][key] for key in ("forwards", "passes", "seconds")}
        found.append(row)
    print_table(
        f"ESD on the embedded model, {options.steps} updates of {esd.Config(**settings).batch_size} samples and as many retained ones, for each "
        "update; processor time, encoding and pool included (aims: forwards <= 0.20, seconds <= 0.33)",
        ["", "updates", "forwards", "with backward", "seconds", "acc_e", "acc_r"],
        [
            line
            for row in found
            for line in (
                *(
                    [f"{row['concept']}, {name}", str(row[name]["updates"]), f"{row[name]['forwards']:.1f}",
                     f"{row[name]['passes']:.1f}", f"{row[name]['seconds']:.3f}",
                     *("" if row[name][key] is None else f"{row[name][key]:.0%}" for key in ("acc_e", "acc_r"))]
                    for name in ("plain", "library")
                ),
                ["  ratio", "", *(f"{row['ratio'][key]:.2f}" for key in ("forwards", "passes", "seconds")), "", ""],
            )
        ],
    )  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------------- memory

CASES = {
    "batch 1": {"batch_size": 1},
    "batch 4, gradient checkpointing": {"batch_size": 4, "gradient_checkpointing": True},
}


def memory_of(case: str, smoke: bool) -> dict[str, float]:
    """Train in this process, and tell the most memory it has held."""
    pipe = make_pipeline(smoke, make_unet(smoke, dtype=torch.bfloat16))
    pipe.text_encoder.to(torch.bfloat16)
    loaded = peak_bytes()
    # One step after one of a sampler of one: the memory of these is that of all.
    settings: dict[str, Any] = {
        **{"train_set": "x", "templates": "none", "steps": 1, "trajectories": 1, "num_inference_steps": 1},
        **CASES[case],
    }
    begin = time.perf_counter()
    target, kept = made_up_names(2, smoke)
    erase(
        pipe,
        target,
        method="esd",
        retain=[kept],
        training=TrainingRun(release=True, progress=False),
        compare=False,
        **settings,
    )
    return {"loaded_gb": loaded / 1e9, "peak_gb": peak_bytes() / 1e9, "seconds": time.perf_counter() - begin}


def measure_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table `memory`."""
    found = []
    for case in CASES:
        numbers = in_process("-m", "benchmarks.training", "--case", case, *["--smoke"] * options.smoke)
        found.append({"case": case, **numbers})
    print_table(
        "Peak resident memory of an ESD-x run, Stable Diffusion 1.5's shapes, bfloat16 base, 64 x 64 latents, 1 concept and 1 "
        "retained prompt, GB (aim <= 6)",
        ["", "pipeline loaded", "peak"],
        [[row["case"], f"{row['loaded_gb']:.2f}", f"{row['peak_gb']:.2f}"] for row in found],
    )
    return found


# ------------------------------------------------------------------------------------------------------------- run


def measure_run(options: argparse.Namespace) -> dict[str, Any]:
    """The table `run`."""
    few = ["--set=steps=2", "--set=trajectories=2", "--set=num_inference_steps=3"] if options.smoke else []
    with tempfile.TemporaryDirectory() as folder:
        retain = [f"--retain={name}" for name in OBJECTS if name != "cat"]
        command = ["erase", "cat", f"--output={folder}/out", "--method=esd", f"--anchor={HYPERNYMS['cat']}"]
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "diffusers_erasure.cli", *command, *retain, *few],
            check=True,
            capture_output=True,
            env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        )
        taken = time.perf_counter() - begin
        size = Erasure.from_pretrained(f"{folder}/out").config.files["pytorch_lora_weights.safetensors"].size
    found = {"seconds": taken, "bytes": size}
    print_table(
        "`diffusers-erasure erase cat --method esd` on the embedded model, 63 objects retained, wall time (aim <= 300 s)",
        ["", "seconds", "LoRA, kB"],
        [["the whole command", f"{taken:.0f}", f"{size / 1e3:.0f}"]],
    )
    return found


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=["compare", "memory", "run"], metavar="TABLE")
    parser.add_argument("--steps", type=int, default=300, help="updates of the table `compare`")
    parser.add_argument("--plain-steps", type=int, help="updates of the plain way; as many by default")
    parser.add_argument("--concepts", nargs="+", default=["cat", "pizza"], choices=OBJECTS, metavar="OBJECT")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    start(options)
    if options.case:
        print(json.dumps(memory_of(options.case, options.smoke)))
        return
    if options.smoke:
        options.steps, options.concepts = 2, options.concepts[:1]
    options.plain_steps = min(options.plain_steps or options.steps, options.steps)
    tables = {"compare": compare, "memory": measure_memory, "run": measure_run}
    numbers = {name: table(options) for name, table in tables.items() if name in (options.only or tables)}
    finish(options, "training", numbers)


if __name__ == "__main__":
    main()
