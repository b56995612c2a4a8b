"""What a service draws: requests a second by the number of threads, and four requests with different erasures in one batch.

    python -m benchmarks.serving [--requests 8] [--steps 10] [--erasures lora]
    python -m benchmarks.serving --model sd15 --device cuda

All requests draw with one set of models, each with a scheduler of its own. Of four erasures (random: `lora` on the keys and values of
the cross-attentions, or `text_map`) that are loaded each request has one on and the others off. "0 threads" is a plain loop; 1
and 4 are workers of a `ThreadPoolExecutor`. All are run in turn, and a ratio is the median of the ratios round by round. The
embedded model draws pictures; Stable Diffusion 1.5's shapes, with random weights, draw latents.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from benchmarks.builders import make_pipeline, make_unet, random_erasure, twin
from benchmarks.command import finish, print_table, start, timed_arguments
from benchmarks.timing import interleave_calls, ratios, spread, summary
from diffusers_erasure import as_erasable, demo
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.demo.drawing import GUIDANCE_SCALE


THREADS = (0, 1, 4)
TOGETHER = 4  # requests in one batch, and as many erasures
RANK = 4
PROMPTS = ("a cat", "a dog in ink style", "a rose in pencil style", "a pizza")


def models(model: str, device: str, dtype: torch.dtype) -> Any:
    """The embedded model, or random weights in Stable Diffusion 1.5's shapes."""
    if model == "embedded":
        return demo.load_pipeline(dtype, device)
    pipe = make_pipeline(unet=make_unet(device=device, dtype=dtype))
    pipe.text_encoder.to(device, dtype)
    return pipe


def erased(pipe: Any, kind: str) -> Any:
    """The same with four erasures."""
    sites = [f"unet.{name}" for name in text_readers(pipe)]
    for index in range(TOGETHER):
        made = random_erasure(pipe, kind, sites, RANK, index, size=0.1, concepts=f"concept {index}")
        pipe.load_erasure(made, f"erasure{index}")
    return pipe


class Service:
    """Requests for one set of models.

    Args:
        pipe ([`DiffusionPipeline`]): with four erasures, or with none.
        steps (`int`): of each request.
        twins (`int`): pipelines of the same components, one for each request that is drawn at once.
    """

    def __init__(self, pipe: Any, steps: int, twins: int) -> None:
        self.steps, self.pipes = steps, [twin(pipe) for _ in range(twins)]
        self.names = [info.name for info in as_erasable(pipe).list_erasures()]

    def draw(self, pipe: Any, prompts: Sequence[str], strengths: Mapping[str, Any]) -> Any:
        """The pictures of one call."""
        options: dict[str, Any] = {"output_type": "latent" if pipe.vae is None else "np"}
        if pipe.vae is None:  # a pipeline takes the size from it
            options |= {"height": 8 * pipe.unet.config.sample_size, "width": 8 * pipe.unet.config.sample_size}
        with pipe.erasure_strengths(strengths):
            return pipe(list(prompts), num_inference_steps=self.steps, guidance_scale=GUIDANCE_SCALE, **options).images

    def request(self, index: int) -> None:
        """One request with one erasure on."""
        own = index % TOGETHER
        strengths = {name: float(place == own) for place, name in enumerate(self.names)}
        self.draw(self.pipes[index % len(self.pipes)], PROMPTS[own : own + 1], strengths)

    def batch(self) -> None:
        """Four requests at once, each with another erasure on."""
        rows = {name: [float(place == row) for row in range(TOGETHER)] for place, name in enumerate(self.names)}
        self.draw(self.pipes[0], PROMPTS, rows)

    def singly(self) -> None:
        """The same four one after the other."""
        for index in range(TOGETHER):
            self.request(index)

    def serve(self, requests: int, pool: ThreadPoolExecutor | None) -> None:
        """Requests in a loop, or by the workers of a pool."""
        if pool is None:
            for index in range(requests):
                self.request(index)
            return
        for job in [pool.submit(self.request, index) for index in range(requests)]:
            job.result()


def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    parser.add_argument("--model", choices=("embedded", "sd15"), default="embedded", help="whose shapes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float16 on cuda, else float32")
    parser.add_argument("--erasures", choices=("lora", "text_map"), default="lora", help="what is loaded")
    parser.add_argument("--requests", type=int, metavar="N", help="of a round; 8 by default, 4 with --smoke")
    parser.add_argument("--steps", type=int, metavar="N", help="of a request; 10 by default, 2 with --smoke")
    options = parser.parse_args()
    start(options)
    dtype = getattr(torch, options.dtype or ("float16" if options.device.startswith("cuda") else "float32"))
    requests, steps = options.requests or (4 if options.smoke else 8), options.steps or (2 if options.smoke else 10)
    repeats = options.repeats or (2 if options.smoke else 5)
    plain = models(options.model, options.device, dtype)
    services = {
        "un-erased": Service(plain, steps, requests),
        "erased": Service(erased(models(options.model, options.device, dtype), options.erasures), steps, requests),
    }
    pools = {count: ThreadPoolExecutor(count) if count else None for count in THREADS}
    calls: dict[str, Callable[[], None]] = {}
    for name, service in services.items():
        for count, pool in pools.items():
            calls[f"{name}, {count} threads"] = partial(service.serve, requests, pool)
        calls[f"{name}, one batch"] = service.batch
        calls[f"{name}, singly"] = service.singly
    times = interleave_calls(calls, repeats, options.device)
    for pool in pools.values():
        if pool is not None:
            pool.shutdown()

    rows: list[dict[str, Any]] = []
    batches: list[dict[str, Any]] = []
    for name in services:
        for count in THREADS:
            own = times[f"{name}, {count} threads"]
            row: dict[str, Any] = {"variant": name, "threads": count, "seconds": summary(own)}
            row["per_second"] = summary([requests / value for value in own])
            row["over_loop"] = ratios(times[f"{name}, 0 threads"], own)
            row["over_unerased"] = ratios(times[f"un-erased, {count} threads"], own)
            rows.append(row)
        together, singly = times[f"{name}, one batch"], times[f"{name}, singly"]
        batch: dict[str, Any] = {"variant": name, "seconds": summary(together), "singly_s": summary(singly)}
        batch["over_singly"] = ratios(singly, together)
        batch["over_unerased"] = ratios(times["un-erased, one batch"], together)
        batches.append(batch)
    print_table(
        f"{options.model}, {options.device}, {dtype}, {requests} requests of {steps} steps, {options.erasures}",
        ("", "requests a second", "times those of the loop", "times the un-erased ones"),
        (
            (
                f"{row['variant']}, {row['threads'] or 'no'} threads",
                *(spread(row[key], 2) for key in ("per_second", "over_loop", "over_unerased")),
            )
            for row in rows
        ),
    )
    print_table(
        f"{TOGETHER} requests with an erasure each",
        ("", "one batch, s", "one by one, s", "times as fast in one batch", "times the un-erased ones"),
        (
            (
                batch["variant"],
                *(spread(batch[key], 2) for key in ("seconds", "singly_s", "over_singly", "over_unerased")),
            )
            for batch in batches
        ),
    )
    settings = {"model": options.model, "dtype": str(dtype), "requests": requests, "steps": steps, "repeats": repeats}
    numbers = {"settings": {**settings, "erasures": options.erasures}, "rows": rows, "batches": batches}
    finish(options, "serving", numbers, options.device)


if __name__ == "__main__":
    main()
