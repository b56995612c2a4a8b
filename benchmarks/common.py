"""What the benchmarks share: models in Stable Diffusion 1.5's shapes, interleaved timing, tables.

The models have random weights: times, operations and bytes do not depend on their values.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import nn


# Stable Diffusion 1.5's own unet/config.json and text_encoder/config.json.
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
# Stable Diffusion XL's own unet/config.json, as far as it differs.
SDXL_UNET: dict[str, Any] = {
    **UNET,
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The same layout, 32 sites included, small enough for a test.
SMALL_UNET = {**UNET, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 64, "attention_head_dim": 4}
SMALL_TEXT_ENCODER = {
    **TEXT_ENCODER,
    **{"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"projection_dim": 64, "num_attention_heads": 4},
}
SMALL_SDXL_UNET = {
    **SDXL_UNET,
    **{
        "block_out_channels": (32, 64, 128),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 8),
    },
    **{"cross_attention_dim": 64, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 96},
}


# ------------------------------------------------------------------------------------------------------ processes

Item = TypeVar("Item")
Done = TypeVar("Done")


def finished(
    items: Sequence[Item], work: Callable[[Item, Any], Done], store: Any, jobs: int
) -> Iterator[tuple[Item, Done]]:
    """Do `work(item, store)` for all items in `jobs` processes, and give each one when it is done."""
    if jobs == 1:
        for item in items:
            yield item, work(item, store)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(work, item, store): item for item in items}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is stored by then stays
            raise


# ------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def make_unet(smoke: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A UNet with random weights; on `device="meta"` without any."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):  # skips torch's own initialisation, which takes longer than all that follows
        unet = UNet2DConditionModel(**(SMALL_UNET if smoke else UNET)).eval().requires_grad_(False)
    if device == "meta":
        return unet
    # In its dtype at once: a copy in float32 would decide about the peak memory.
    unet = unet.to(dtype).to_empty(device="cpu")
    # One block of random numbers over and over, of a prime length so that no two rows of a weight are equal.
    block = torch.rand(1_000_003, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                parameter.fill_(1.0 if name == "weight" else 0.0)
            else:
                scale = (3.0 / max(1, parameter[0].numel())) ** 0.5
                for part in parameter.view(-1).split(len(block)):
                    torch.mul(block[: len(part)], scale, out=part)
    return unet if device == "cpu" else unet.to(device)


def share_weights(model: Any) -> Any:
    """A copy of a model with modules of its own, so that it can be hooked, and the same weights in the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def make_pipeline(smoke: bool = False, unet: Any = None) -> Any:
    """A text-to-image pipeline without a VAE, which neither an erasure nor a LoRA touches."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    config = CLIPTextConfig(**(SMALL_TEXT_ENCODER if smoke else TEXT_ENCODER))
    # A real tokenizer of the right size over a made-up vocabulary.
    special = {"<|startoftext|>": config.vocab_size - 2, "<|endoftext|>": config.vocab_size - 1}
    vocabulary = {f"w{index}</w>": index for index in range(config.vocab_size - 2)} | special
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel(config).eval().requires_grad_(False),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        unet=make_unet(smoke) if unet is None else unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def make_sdxl_text_readers(smoke: bool = False, dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
    """SDXL's UNet of which only the Linears that read text have (random) weights; all others are on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SMALL_SDXL_UNET if smoke else SDXL_UNET)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "add_embedding.linear_1")):
            weight = (torch.rand(module.weight.shape, generator=generator) * 2 - 1) * (3 / module.in_features) ** 0.5
            module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return unet


CONSONANTS, VOWELS = "bcdfghjklmnprstvwxyz", "aeiou"
PROMPT_WORDS = "a an art by drawing image in of painting person photo picture portrait style the".split()


def name_tokenizer(smoke: bool = False) -> Any:
    """A tokenizer of the right size that has prompts' words and made-up ones of two syllables as one piece.

    Words of three syllables are two pieces, and others are cut into syllables and letters.
    """
    from transformers import CLIPTokenizer

    size = (SMALL_TEXT_ENCODER if smoke else TEXT_ENCODER)["vocab_size"]
    syllables = [(c, v) for c in (CONSONANTS[:4] if smoke else CONSONANTS) for v in VOWELS]
    merges = [(c, v + end) for end in ("", "</w>") for c, v in syllables]
    merges += [("".join(first), "".join(second) + "</w>") for first in syllables for second in syllables]
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]

    def tokenizer() -> Any:
        pieces = [*letters, *dict.fromkeys("".join(merge) for merge in merges)]
        pieces += [f"<unused{i}>" for i in range(size - 2 - len(pieces))]
        pieces += ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)

    cut = tokenizer()
    known = set(merges)
    for word in PROMPT_WORDS:  # what is left of a word is joined from its front
        first, *others = cut.tokenize(word)
        for other in others:
            merge = first, other
            merges += [] if merge in known else [merge]
            known.add(merge)
            first += other
    return tokenizer()


def made_up_names(count: int, smoke: bool = False, seed: int = 0) -> list[str]:
    """Different names of three pieces of [`name_tokenizer`]: one word of two syllables and one of three."""
    consonants = CONSONANTS[:4] if smoke else CONSONANTS
    draw = Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [draw.choice(consonants) + draw.choice(VOWELS) for _ in range(5)]
        names["".join(syllables[:2]) + " " + "".join(syllables[2:])] = None
    return list(names)


class UNetOnly:
    """The least that the erasure functions take for a pipeline: something with a `unet`."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet


def make_erasure(unet: Any, kind: str, rank: int, seed: int = 0, base_model: Any = None) -> Any:
    """A random erasure of one layer: `"lora"` on the readers of the text rows, or `"text_map"`."""
    from diffusers_erasure import Erasure, __version__
    from diffusers_erasure.base_model import text_readers
    from diffusers_erasure.layers.lora import DOWN, UP
    from diffusers_erasure.schema import (
        LORA_FILE,
        TENSOR_FILE,
        BaseModel,
        ErasureConfig,
        LayerSpec,
        Library,
        Method,
        Stock,
    )

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 1e-3

    stock = None
    if kind == "lora":
        sites = text_readers(UNetOnly(unet))
        tensors: dict[str, torch.Tensor] = {}
        for site, linear in sites.items():
            tensors[f"unet.{site}{DOWN}"] = random(rank, linear.in_features)
            tensors[f"unet.{site}{UP}"] = random(linear.out_features, rank)
        layer = LayerSpec("lora", "unet", tuple(sites), LORA_FILE, "unet.")
        stock = Stock(LORA_FILE, 0.0)
    else:
        width = unet.config.cross_attention_dim
        tensors = {"text_map.A": random(rank, width), "text_map.D": random(rank, width)}
        layer = LayerSpec("text_map", "unet", ("encoder_hidden_states",), TENSOR_FILE, "text_map.")
    config = ErasureConfig(
        schema="1.0",
        library=Library("diffusers_erasure", __version__),
        method=Method("benchmark"),
        base_model=base_model or BaseModel("stable-diffusion"),
        concepts=(),
        layers=(layer,),
        stock=stock,
    )
    return Erasure(config, {layer.file: tensors})


# ------------------------------------------------------------------------------------------------------- timing


_clock: Callable[[], float] = time.perf_counter


def clock() -> float:
    """Seconds by the clock that the options chose."""
    return _clock()


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    """How long one call takes; on a GPU by its own events."""
    if not device.startswith("cuda"):
        begin = _clock()
        function()
        return _clock() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def interleave(functions: Mapping[str, Callable[[], float]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run functions that return their own seconds in turn, A B C, C B A, …, so that drift falls on all of them."""
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(repeats):
        for name in names if index % 2 == 0 else reversed(names):
            times[name].append(functions[name]())
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and largest of measured values."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "q1": quarters[0],
        "q3": quarters[2],
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def ratios(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios round by round: neighbours in time share the machine's state."""
    return summary([value / base for value, base in zip(values, baseline, strict=True)])


# ------------------------------------------------------------------------------------------------------- output


def spread(item: Mapping[str, float], digits: int = 3, scale: float = 1.0) -> str:
    """`median [q1 to q3]`."""
    middle, low, high = (f"{item[key] * scale:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{middle} [{low} to {high}]"


def machine(device: str, cpu_time: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    import diffusers
    import peft

    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU ({platform.machine()})",
        "gpu": device.startswith("cuda"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "GPU events" if device.startswith("cuda") else "processor time" if cpu_time else "wall time",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
    }


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all the benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes and few repeats, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there too")
    parser.add_argument("--repeats", type=int, help="rounds of the interleaved timing")
    parser.add_argument("--threads", type=int, help="threads of torch; all cores by default, 1 with --smoke")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure this process's own processor time, on one thread: for a machine that others use too",
    )
    return parser


def start(options: argparse.Namespace) -> None:
    """Set the threads and the clock, and keep libraries away from the network."""
    global _clock
    if options.cpu_time:
        _clock = time.process_time
    threads = 1 if options.smoke or options.cpu_time else options.threads
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def finish(options: argparse.Namespace, name: str, numbers: Mapping[str, Any], device: str = "cpu") -> None:
    """Print the machine, and write the JSON where it is asked for."""
    where = machine(device, options.cpu_time)
    print("\n" + ", ".join(f"{key} {value}" for key, value in where.items() if key != "gpu"))
    if not where["gpu"]:
        print("Measured on a CPU.")
    if options.smoke:
        print("--smoke: small shapes and few repeats. These times say nothing about Stable Diffusion.")
    if options.json:
        report = {"benchmark": name, "smoke": options.smoke, "machine": where, **numbers}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
