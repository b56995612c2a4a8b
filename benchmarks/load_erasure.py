"""`pipe.load_erasure(folder)` against stock `pipe.load_lora_weights(folder, weight_name=...)` of the very same file.

    python -m benchmarks.load_erasure [--ranks 4 16] [--repeats 15] [--processes 7]

In Stable Diffusion 1.5's shapes; unloading in between is not timed. The first load of a process, and the fingerprint of a
base model that a new erasure records, are timed in processes of their own, in turn: all is imported and the pipeline is
made before, and the garbage collector stands still. `load_erasure` also checks the file's hash and every value, and
compares the pipeline's weights and vocabulary with the fingerprint of the base model. What is computed of the vocabulary
is kept while the tokenizer lives, so that further loads take less; they and the parts of a load are timed one by one.

"Older artefact" is the same erasure without `serialised` in the tokenizer's fingerprint: then the vocabulary is sorted.
"""

import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from benchmarks.builders import UNetOnly, forget_vocabulary, make_pipeline, random_erasure
from benchmarks.command import finish, in_process, print_table, start, timed_arguments
from benchmarks.timing import interleave, ratios, seconds, spread, summary, use_processor_time
from diffusers_erasure import Erasure, load_erasure, unload_erasure
from diffusers_erasure.base_model import describe_base, text_readers
from diffusers_erasure.fingerprints import compare_component
from diffusers_erasure.schema import LORA_FILE


FIRST = "import sys; from benchmarks.load_erasure import first_of_a_process; first_of_a_process(*sys.argv[1:])"


def first_of_a_process(what: str, folder: str, smoke: str, clock: str, threads: str) -> None:
    """Print how long the first call of this process takes: `"erasure"`, `"stock"` or `"fingerprint"`."""
    torch.set_num_threads(int(threads))
    if clock == "processor":
        use_processor_time()
    logging.set_verbosity_error()
    pipe = make_pipeline(smoke == "smoke")
    calls = {
        "erasure": partial(pipe.load_erasure, folder, "it", strict_base="error"),
        "stock": partial(pipe.load_lora_weights, folder, weight_name=LORA_FILE, adapter_name="it"),
        "fingerprint": partial(describe_base, pipe),
    }
    gc.collect()
    gc.disable()  # a pass over all that was imported, in whichever call it falls, takes several times as long as a load
    print(json.dumps(seconds(calls[what])))


def older(erasure: Erasure) -> Erasure:
    """The erasure as it was recorded before tokenizers had a second hash."""
    base = erasure.config.base_model
    components = {name: dataclasses.replace(each, serialised=None) for name, each in base.components.items()}
    base = dataclasses.replace(base, components=components)
    return dataclasses.replace(erasure, config=dataclasses.replace(erasure.config, base_model=base))


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

    def compare_again(*names: str) -> float:
        compare(*names)  # another part may have forgotten the vocabulary just before
        return compare(*names)

    def compare_first(*names: str) -> float:
        forget_vocabulary(pipe)
        return compare(*names)

    functions: dict[str, Callable[[], float]] = {
        "read and validate": lambda: seconds(lambda: Erasure.from_pretrained(folder)),
        "hash of the content": lambda: seconds(lambda: erasure.content_hash),
        "attach": attach,
        "fingerprint, first time": lambda: compare_first(*stored),
        "fingerprint, again": lambda: compare_again(*stored),
    }
    return functions | {f"  {name}": lambda name=name: compare_first(name) for name in stored}


def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks of the LoRA; 4 16 by default")
    parser.add_argument("--processes", type=int, metavar="N", help="rounds of new processes; 7 by default")
    options = parser.parse_args()
    start(options)
    logging.set_verbosity_error()  # the stock loader reports that the file has nothing for the text encoder
    ranks = options.ranks or ([4] if options.smoke else [4, 16])
    repeats = options.repeats or (3 if options.smoke else 15)
    processes = options.processes or (1 if options.smoke else 7)
    pipe = make_pipeline(options.smoke)
    base = describe_base(pipe)
    sites = [f"unet.{name}" for name in text_readers(pipe)]
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        with tempfile.TemporaryDirectory() as folder:
            erasure = random_erasure(pipe, "lora", sites, rank, base=base, size=0.01, concepts="a concept")
            erasure.save_pretrained(folder)
            older(erasure).save_pretrained(Path(folder, "older"))
            plain = random_erasure(pipe, "lora", sites, rank, size=0.01, concepts="a concept")

            def fresh(what: str, folder: str = folder) -> float:
                how = "smoke" if options.smoke else "whole", "processor" if options.cpu_time else "wall"
                taken: float = in_process("-c", FIRST, what, folder, *how, str(torch.get_num_threads()))
                return taken

            def again(folder: str = folder) -> float:
                taken = seconds(lambda: pipe.load_erasure(folder, "it", strict_base="error"))
                pipe.unload_erasure("it")
                return taken

            def stock(folder: str = folder) -> float:
                taken = seconds(lambda: pipe.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name="it"))
                pipe.unload_lora_weights()
                return taken

            with torch.no_grad():
                times = interleave({"again": again, "stock": stock}, repeats)
                inner = interleave(parts(pipe, folder, plain), repeats)
            old = str(Path(folder, "older"))
            firsts = interleave(
                {what: partial(fresh, what) for what in ("erasure", "stock", "fingerprint")}
                | {"older": partial(fresh, "erasure", old)},
                processes,
                warmup=0,
            )
            rows.append(
                {
                    "rank": rank,
                    "bytes": (Path(folder) / LORA_FILE).stat().st_size,
                    "first_s": summary(firsts["erasure"]),
                    "first_older_s": summary(firsts["older"]),
                    "first_stock_s": summary(firsts["stock"]),
                    "fingerprint_s": summary(firsts["fingerprint"]),
                    "again_s": summary(times["again"]),
                    "stock_s": summary(times["stock"]),
                    "ratio_first": ratios(firsts["erasure"], firsts["stock"]),
                    "ratio_first_older": ratios(firsts["older"], firsts["stock"]),
                    "ratio_again": ratios(times["again"], times["stock"]),
                    "parts_s": {name: summary(values) for name, values in inner.items()},
                }
            )
    for title, mine, others, ratio in (
        ("The first load of a process", "first_s", "first_stock_s", "ratio_first"),
        ("The same of an older artefact", "first_older_s", "first_stock_s", "ratio_first_older"),
        ("A further load", "again_s", "stock_s", "ratio_again"),
    ):
        print_table(
            f"{title}, ms: median [quartiles]",
            ("rank", "file, MB", "load_erasure", "load_lora_weights", "ratio"),
            (
                (
                    row["rank"],
                    f"{row['bytes'] / 1e6:.2f}",
                    spread(row[mine], 1, 1e3),
                    spread(row[others], 1, 1e3),
                    spread(row[ratio], 2),
                )
                for row in rows
            ),
        )
    print_table(
        "The fingerprint of a base model, in a new process, ms: median [quartiles]",
        ("shapes", "describe_base"),
        (
            ("small" if options.smoke else "Stable Diffusion 1.5", spread(row["fingerprint_s"], 1, 1e3))
            for row in rows[:1]
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
