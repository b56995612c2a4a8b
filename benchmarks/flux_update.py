"""What one optimiser update of ESD and of GEM costs on FLUX.1's transformer in its real shapes: seconds and GPU memory.

    python -m benchmarks.flux_update [--methods esd gem] [--pixels 512] [--updates 4] [--device cuda]

The transformer (12 billion weights, random, bfloat16) is made where it is used; the text encoders have one layer and FLUX.1's
widths, so that 512 rows of 4,096 and pooled vectors of 768 come from them. The library's own trainers run by `erase` with their
presets for objects, one concept and one retained prompt: as many samples of retained prompts as of the concept join a batch. First
with the preset's batch and gradient checkpointing, then without it, with a batch of one and with the preset's. What does not fit is
told, and the next case runs.

The pool of noisy latents has fewer steps here than in the presets, at the same batch of a pass; what the preset's pool and a whole
run take is computed from that by proportion. Passes are told apart by hooks on the transformer, and updates by one after the
optimiser's step; the first update, and one small run before all, do not count. An update is without the latents that GEM draws
again every few updates, which stand alone. The peak of the pool is that of all before the first pass with gradients.
"""

import argparse
import gc
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.command import arguments, finish, print_table, start, write_numbers
from benchmarks.timing import spread, summary
from benchmarks.transformer_step import make_transformer
from diffusers_erasure import erase
from diffusers_erasure.demo import load_pipeline
from diffusers_erasure.methods import esd, gem
from diffusers_erasure.schema import Concept
from diffusers_erasure.training import TrainingRun, TrainSettings, resolved_for
from diffusers_erasure.training.pool import LATENT_CELLS
from diffusers_erasure.training.retaining import NEAR_TEMPLATES


METHODS: dict[str, tuple[Any, Any]] = {"esd": (esd.Config, esd.Settings), "gem": (gem.Config, gem.Settings)}
TARGET, ANCHOR, RETAINED = "cat", "animal", "dog"
RETAINED_TEXTS = 1 + NEAR_TEMPLATES  # one prompt in several templates; the pool has at least one trajectory of each
POOL_STEPS = 2  # of the sampler, in place of the preset's
FEW = 2  # trajectories, where the pool is measured elsewhere
TEXT_ROWS, SMALL_ROWS = 512, 16
FULL = "out of memory"


# ---------------------------------------------------------------------------------------------------- the pipeline


@torch.no_grad()
def with_random_weights(model: Any, device: str) -> Any:
    """Give a model of the meta device random weights in bfloat16, made where they are used."""
    model = model.bfloat16().to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # so that what goes out is as large as what comes in
            bound = (3.0 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def make_pipeline(device: str, smoke: bool) -> Any:
    """FLUX.1's pipeline without a VAE, with text encoders of one layer and the tiny model's tokenizers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    transformer, tiny = with_random_weights(make_transformer(smoke), device), load_pipeline("flux")
    rows, pooled = transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim
    wide = {"hidden_size": pooled, "projection_dim": pooled, "intermediate_size": 1024, "num_attention_heads": 12}
    clip = CLIPTextConfig(**{**tiny.text_encoder.config.to_dict(), **wide, "num_hidden_layers": 1})
    t5 = T5Config(
        **{"vocab_size": len(tiny.tokenizer_2), "d_model": rows, "d_kv": 64, "d_ff": 1024},
        **{"num_layers": 1, "num_heads": 8, "feed_forward_proj": "gated-gelu"},
    )
    torch.manual_seed(0)
    encoders = [each.to(device, torch.bfloat16).eval() for each in (CLIPTextModel(clip), T5EncoderModel(t5))]
    tiny.tokenizer_2.model_max_length = TEXT_ROWS
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=None,
        text_encoder=encoders[0],
        tokenizer=tiny.tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tiny.tokenizer_2,
        transformer=transformer,
    )


# --------------------------------------------------------------------------------------------------- what is watched


@dataclass(frozen=True)
class Mark:
    """The begin or end of a pass, the end of an optimiser step, or the start of a run and where it has failed.

    Attributes:
        what: `"begin"`, `"end"`, `"step"`, `"start"` or `"stop"`.
        samples: of the pass.
        trained: whether it is one with gradients.
        when: seconds, or a GPU event.
        peak: the most bytes of the GPU that were taken since the mark before.
    """

    what: str
    samples: int
    trained: bool
    when: Any
    peak: int


class Watch:
    """Notes when the passes of a transformer begin and end, and when optimisers have stepped; nothing waits for that.

    Training works with a twin of the transformer, which has its hooks.
    """

    def __init__(self, device: str) -> None:
        self.gpu = device.startswith("cuda")
        self.marks: list[Mark] = []
        self.reserved = 0

    def note(self, what: str, samples: int = 0, trained: bool = False) -> None:
        """Make a mark."""
        when: Any = time.perf_counter()
        peak = 0
        if self.gpu:
            when = torch.cuda.Event(enable_timing=True)
            when.record()
            peak = torch.cuda.max_memory_allocated()
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        self.marks.append(Mark(what, samples, trained, when, peak))

    @contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[None]:
        """Make marks while a block runs."""

        def begins(_: Any, __: Any, given: dict[str, Any]) -> None:
            self.note("begin", len(given["hidden_states"]), torch.is_grad_enabled())

        def ends(_: Any, __: Any, given: dict[str, Any], ___: Any) -> None:
            self.note("end", len(given["hidden_states"]), torch.is_grad_enabled())

        handles = [
            transformer.register_forward_pre_hook(begins, with_kwargs=True),
            transformer.register_forward_hook(ends, with_kwargs=True),
            register_optimizer_step_post_hook(lambda *_: self.note("step")),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def updates(self) -> list[list[Mark]]:
        """The marks of each update, from the end of the one before to its own; those of the first hold the pool's too."""
        found: list[list[Mark]] = [[]]
        for mark in self.marks:
            found[-1].append(mark)
            if mark.what == "step":
                found.append([])
        return found[:-1]


def between(first: Mark, last: Mark) -> float:
    """Seconds; the GPU has to be done."""
    return float(last.when - first.when) if isinstance(first.when, float) else first.when.elapsed_time(last.when) / 1e3


def passes(marks: Sequence[Mark], trained: bool) -> list[tuple[Mark, Mark]]:
    """Begin and end of each pass, of those with gradients or of the others."""
    pairs = [(a, b) for a, b in pairwise(marks) if (a.what, b.what) == ("begin", "end")]
    return [(a, b) for a, b in pairs if a.trained == trained]


# --------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """One run: the method, samples of the concept in a batch (0: the preset's), and whether activations are computed again."""

    method: str
    batch: int
    checkpointing: bool

    def name(self, batch: int) -> str:
        return f"{self.method}, {batch} + {batch}, {'with' if self.checkpointing else 'without'} checkpointing"


def run(pipe: Any, method: str, given: dict[str, Any], watch: Watch) -> int:
    """One `erase`; returns how many values are trained."""
    with watch.watching(pipe.transformer):
        erasure = erase(
            pipe,
            TARGET,
            anchors=ANCHOR,
            retain=[RETAINED],
            retain_default="none",
            method=method,
            compare=False,
            training=TrainingRun(progress=False),
            **given,
        )
    if watch.gpu:
        torch.cuda.synchronize()
    return sum(value.numel() for layer in erasure.config.layers for value in erasure.layer_tensors(layer).values())


def measured(pipe: Any, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a case, or why there are none under `"error"`."""
    config, settings_of = METHODS[case.method]
    size = {"resolution": options.pixels, "max_sequence_length": SMALL_ROWS if options.smoke else TEXT_ROWS}
    preset = resolved_for(pipe, [Concept(TARGET, ANCHOR)], config(**size), settings_of)
    batch = case.batch or preset.batch_size
    # As many trajectories as are denoised together, so that the pool's passes are as large as the preset's.
    together = max(1, LATENT_CELLS // (options.pixels // pipe.vae_scale_factor) ** 2)
    few = options.smoke or not case.checkpointing
    count = min(preset.trajectories, together, *([FEW] if few else []))
    given = {
        **size,
        **{"batch_size": batch, "gradient_checkpointing": case.checkpointing, "steps": 1 + options.updates},
        **{"trajectories": count, "num_inference_steps": POOL_STEPS},
    }
    row: dict[str, Any] = {"method": case.method, "gradient_checkpointing": case.checkpointing, "batch_size": batch}
    row |= {"name": case.name(batch), "preset_batch_size": preset.batch_size, "retained": batch}
    row |= {"train_set": preset.train_set, "rank": preset.rank, "trajectories": count, "pool_steps": POOL_STEPS}
    before = torch.cuda.memory_allocated() if options.device.startswith("cuda") else 0
    watch = Watch(options.device)
    watch.note("start")
    try:
        row["trained_values"] = run(pipe, case.method, given, watch)
        row |= of_updates(watch.updates(), preset, count)
    except Exception as error:  # the other cases are worth their time all the same
        watch.note("stop")
        if isinstance(error, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            print(str(error).partition(" If reserved")[0], flush=True)
            row["error"] = FULL
        else:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
        row["updates_done"] = sum(mark.what == "step" for mark in watch.marks)
    if watch.gpu:
        row["memory"] = {"before": before, "reserved": watch.reserved, **peaks(watch.marks)}
    return row


def of_updates(updates: Sequence[Sequence[Mark]], preset: TrainSettings, count: int) -> dict[str, Any]:
    """What the marks of a run tell, and what follows for the preset's pool and a whole run."""
    later = [[last[-1], *marks] for last, marks in pairwise(updates)]
    unseen = [passes(marks, trained=False) for marks in later]
    own = min(map(len, unseen))  # passes of the teacher in each update; what comes before them draws latents again
    refreshes = [between(found[0][0], found[-own - 1][1]) for found in unseen if len(found) > own]
    spent = [
        between(marks[0], marks[-1]) - (between(found[0][0], found[-own - 1][1]) if len(found) > own else 0.0)
        for marks, found in zip(later, unseen, strict=True)
    ]
    students = [passes(marks, trained=True)[0] for marks in later]
    teachers = [found[len(found) - own :] for found in unseen]
    row: dict[str, Any] = {
        "samples": students[0][0].samples,
        "teacher_samples": sum(begin.samples for begin, _ in teachers[0]),
        "update_s": summary(spent),
        "teacher_s": summary([sum(between(*each) for each in found) for found in teachers]),
        "student_s": summary([between(*each) for each in students]),
        "backward_s": summary([between(end, marks[-1]) for (_, end), marks in zip(students, later, strict=True)]),
        "refresh_s": summary(refreshes) if refreshes else None,
    }
    drawn = passes(updates[0], trained=False)
    drawn = drawn[: len(drawn) - own]
    # The last noisy latent is not denoised where nothing of the base is kept along.
    steps, of_preset = POOL_STEPS, preset.num_inference_steps
    if preset.policy != "base":
        steps, of_preset = steps - 1, of_preset - 1
    concept, retained = ([between(*each) for each in part] for part in (drawn[:steps], drawn[steps:]))
    more = max(preset.trajectories, RETAINED_TEXTS) / max(count, RETAINED_TEXTS)
    pool = sum(concept) * of_preset / steps * preset.trajectories / count
    pool += sum(retained) * preset.num_inference_steps / POOL_STEPS * more
    again = 0.0
    if refreshes and preset.policy != "base":
        again = row["refresh_s"]["median"] * of_preset / steps * preset.refresh / min(preset.refresh, count)
    row["pool"] = {
        "concept_pass_s": concept,
        "concept_samples": drawn[0][0].samples,
        "retained_pass_s": retained,
        "retained_samples": [begin.samples for begin, _ in drawn[steps:]],
        "sample_s": sum(concept + retained) / sum(begin.samples for begin, _ in drawn),
    }
    row["preset"] = {
        **{"steps": preset.steps, "trajectories": preset.trajectories, "pool_steps": preset.num_inference_steps},
        **{"refresh_every": preset.refresh_every if again else None, "pool_s": pool, "refresh_s": again},
        "run_s": pool + preset.steps * row["update_s"]["median"] + (preset.steps - 1) // preset.refresh_every * again,
    }
    return row


def peaks(marks: Sequence[Mark]) -> dict[str, int]:
    """The most bytes taken while latents were drawn, and from the first pass with gradients on."""
    first = next((i for i, mark in enumerate(marks) if mark.what == "begin" and mark.trained), len(marks) - 1)
    drawn, trained = marks[1 : first + 1], marks[first + 1 :]  # the first mark's is of what was before
    return {
        "pool": max((mark.peak for mark in drawn), default=0),
        "update": max((mark.peak for mark in trained), default=0),
    }


# ------------------------------------------------------------------------------------------------------------ tables


def gigabytes(row: dict[str, Any], what: str) -> str:
    """Of a row's memory."""
    return f"{row['memory'][what] / 1e9:.1f}" if row.get("memory") else "-"


def print_update(row: dict[str, Any]) -> None:
    """One line, as soon as a case is done: what follows may be cut off."""
    said = row.get("error") or f"{row['update_s']['median']:.3f} s an update"
    print(f"{row['name']}: {said}; peak {gigabytes(row, 'update')} GB, {row['wall_s']:.0f} s in all", flush=True)


def print_tables(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """All cases; those of the presets' batches with their pools."""
    print_table(
        f"An update at {options.pixels} pixels, samples of the concept + of retained prompts; medians of {options.updates}, seconds and GB",
        ("", "update", "teacher", "student", "backward, step", "peak, pool", "peak, update", "reserved"),
        [
            [
                row["name"],
                *(
                    [row["error"][:40], "", "", ""]
                    if "error" in row
                    else [
                        spread(row["update_s"]),
                        *(f"{row[each]['median']:.3f}" for each in ("teacher_s", "student_s", "backward_s")),
                    ]
                ),
                *(gigabytes(row, each) for each in ("pool", "update", "reserved")),
            ]
            for row in rows
        ],
    )
    print_table(
        "The preset's pool and a whole run with it, seconds, computed by proportion",
        ("", "a sample's pass", "pool", "drawn again", "every", "updates", "the run"),
        [
            [
                row["name"],
                f"{row['pool']['sample_s']:.4f}",
                f"{preset['pool_s']:.1f}",
                f"{preset['refresh_s']:.2f}" if preset["refresh_every"] else "",
                f"{preset['refresh_every'] or ''}",
                f"{preset['steps']}",
                f"{preset['run_s']:.0f}",
            ]
            for row in rows
            if "error" not in row and row["gradient_checkpointing"] and (preset := row["preset"])
        ],
    )


def parse() -> argparse.Namespace:
    """The options."""
    parser = arguments(__doc__, smoke="a transformer of four small blocks, 64 pixels, 16 text rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--pixels", type=int, help="height and width of the picture; 512 by default, 64 with --smoke")
    parser.add_argument("--updates", type=int, default=4, metavar="N", help="that are measured, after a first one (4)")
    parser.add_argument("--device", help="cpu or cuda; cuda by default, cpu with --smoke")
    parser.add_argument(
        "--limit", type=float, default=60, metavar="S", help="no case begins after so many seconds (60)"
    )
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.smoke else "cuda")
    options.pixels = options.pixels or (64 if options.smoke else 512)
    if options.updates < 1 or options.pixels < 16 or options.pixels % 16:
        parser.error("--updates must be at least 1, and --pixels a multiple of 16")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --smoke shows that it runs")
    return options


def main() -> None:
    """The command line."""
    began, options = time.perf_counter(), parse()
    start(options)
    os.environ["DIFFUSERS_ERASURE_CACHE"] = "off"
    cases = [
        Case(method, batch, checkpointing)
        for batch, checkpointing in ((0, True), (1, False), (0, False))
        for method in options.methods
    ]
    pipe = make_pipeline(options.device, options.smoke)
    weights = sum(each.numel() * each.element_size() for each in pipe.transformer.parameters())
    small = {"batch_size": 1, "steps": 1, "trajectories": 1, "num_inference_steps": 1, "gradient_checkpointing": True}
    # Kernels are loaded as they are needed first.
    run(pipe, options.methods[0], {**small, "resolution": options.pixels}, Watch(options.device))
    ready = time.perf_counter() - began
    print(f"{weights / 1e9:.1f} GB of weights; ready after {ready:.0f} s", flush=True)
    numbers: dict[str, Any] = {"pixels": options.pixels, "weights": weights, "ready_s": ready, "rows": [], "left": []}
    for case in cases:
        begin = time.perf_counter()
        if begin - began > options.limit:
            numbers["left"].append(case.name(case.batch))
            continue
        row = measured(pipe, case, options)
        row["wall_s"] = time.perf_counter() - begin
        numbers["rows"].append(row)
        print_update(row)
        write_numbers(options, "flux_update", numbers, options.device)
        gc.collect()  # what has failed holds its tensors in circles
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print_tables(numbers["rows"], options)
    if numbers["left"]:
        print(f"\nLeft out after {options.limit:g} s: {'; '.join(numbers['left'])}")
    finish(options, "flux_update", numbers, options.device)
    if any(row.get("error", FULL) != FULL for row in numbers["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
