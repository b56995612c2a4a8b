"""`pipe.load_erasure(folder)` against stock `pipe.load_lora_weights(folder, weight_name=...)` of the very same file.

    python -m benchmarks.load_erasure [--ranks 4 16] [--repeats 15]

In Stable Diffusion 1.5's shapes; unloading in between is not timed. `load_erasure` also checks the file's hash and
every value, and compares the pipeline's weights and vocabulary with the fingerprint of the base model; the parts are
timed one by one. The hash of a tokenizer's vocabulary is kept while the tokenizer lives, so the first erasure of a
pipeline takes longer than a further one; both are timed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from benchmarks.builders import UNetOnly, forget_vocabulary, make_pipeline, random_erasure
from benchmarks.command import finish, print_table, start, timed_arguments
from benchmarks.timing import interleave, ratios, seconds, spread, summary
from diffusers_erasure import Erasure, load_erasure, unload_erasure
from diffusers_erasure.base_model import describe_base, text_readers
from diffusers_erasure.fingerprints import compare_component
from diffusers_erasure.schema import LORA_FILE


def parts(pipe: Any, folder: str, plain: Erasure) -> dict[str, Callable[[], float]]:
    """What `load_erasure` does, one after the other; `plain` is the erasure without fingerprints of the base."""
    erasure = Erasure.from_pretrained(folder)
    stored = erasure.config.base_model.components

    def attach() -> float:
        unet = UNetOnly(pipe.unet)
        taken = seconds(lambda: load_erasure(unet, plain, "part"))
        unload_erasure(unet, "part")
        return taken

    def compare(*names: str) -> float:
        return seconds(lambda: [compare_component(name, stored[name], getattr(pipe, name)) for name in names])

    def compare_first(*names: str) -> float:
        forget_vocabulary(pipe)
        return compare(*names)

    functions: dict[str, Callable[[], float]] = {
        "read and validate": lambda: seconds(lambda: Erasure.from_pretrained(folder)),
        "hash of the content": lambda: seconds(lambda: erasure.content_hash),
        "attach": attach,
        "fingerprint, first time": lambda: compare_first(*stored),
        "fingerprint, again": lambda: compare(*stored),
    }
    return functions | {f"  {name}": lambda name=name: compare_first(name) for name in stored}


def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks of the LoRA; 4 16 by default")
    options = parser.parse_args()
    start(options)
    logging.set_verbosity_error()  # the stock loader reports that the file has nothing for the text encoder
    ranks = options.ranks or ([4] if options.smoke else [4, 16])
    repeats = options.repeats or (3 if options.smoke else 15)
    pipe = make_pipeline(options.smoke)
    base = describe_base(pipe)
    sites = [f"unet.{name}" for name in text_readers(pipe)]
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder:
            random_erasure(pipe, "lora", sites, rank, base=base, size=0.01, concepts="a concept").save_pretrained(
                folder
            )
            plain = random_erasure(pipe, "lora", sites, rank, size=0.01, concepts="a concept")

            def first(folder: str = folder) -> float:
                forget_vocabulary(pipe)
                return again(folder)

            def again(folder: str = folder) -> float:
                taken = seconds(lambda: pipe.load_erasure(folder, "it", strict_base="error"))
                pipe.unload_erasure("it")
                return taken

            def stock(folder: str = folder) -> float:
                taken = seconds(lambda: pipe.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name="it"))
                pipe.unload_lora_weights()
                return taken

            with torch.no_grad():
                times = interleave({"first": first, "again": again, "stock": stock}, repeats)
                inner = interleave(parts(pipe, folder, plain), repeats)
            rows.append(
                {
                    "rank": rank,
                    "bytes": (Path(folder) / LORA_FILE).stat().st_size,
                    "first_s": summary(times["first"]),
                    "again_s": summary(times["again"]),
                    "stock_s": summary(times["stock"]),
                    "ratio_first": ratios(times["first"], times["stock"]),
                    "ratio_again": ratios(times["again"], times["stock"]),
                    "parts_s": {name: summary(values) for name, values in inner.items()},
                }
            )
    print_table(
        "Milliseconds to load: median [quartiles]",
        ("rank", "file, MB", "first erasure", "further one", "load_lora_weights", "ratio, first", "ratio, further"),
        (
            (
                row["rank"],
                f"{row['bytes'] / 1e6:.2f}",
                spread(row["first_s"], 1, 1e3),
                spread(row["again_s"], 1, 1e3),
                spread(row["stock_s"], 1, 1e3),
                spread(row["ratio_first"], 2),
                spread(row["ratio_again"], 2),
            )
            for row in rows
        ),
    )
    print_table(
        "Parts of load_erasure, ms: median [quartiles]",
        ("part", *(f"rank {row['rank']}" for row in rows)),
        ((name, *(spread(row["parts_s"][name], 1, 1e3) for row in rows)) for name in rows[0]["parts_s"]),
    )
    finish(options, "load_erasure", {"rows": rows})


if __name__ == "__main__":
    main()
