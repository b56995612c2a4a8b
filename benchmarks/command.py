"""What the commands share: options, tables, the JSON of the numbers, and the pages of docs/ that a table is put into."""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.store import Store


ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------------ options


def arguments(
    description: str | None, smoke: str = "small shapes and few repeats, to see that it runs"
) -> argparse.ArgumentParser:
    """The options that all the benchmarks have. The description is the module's docstring, with the command in it."""
    command = re.search(r"python -m [\w.]+", description or "")
    parser = argparse.ArgumentParser(
        prog=command and command.group(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help=smoke)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there too")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; all cores by default, 1 with --smoke")
    parser.set_defaults(cpu_time=False)
    return parser


def timed_arguments(description: str | None) -> argparse.ArgumentParser:
    """Those and the options of what is timed in turn."""
    parser = arguments(description)
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of the interleaved timing")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure this process's own processor time, on one thread: for a machine that others use too",
    )
    return parser


def add_unet_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a UNet's step is timed, and with which latents."""
    parser.add_argument("--size", type=int, help="height and width of the latents; 64 by default, 8 with --smoke")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float16 on cuda, else float32")


def unet_settings(options: argparse.Namespace) -> tuple[bool, str, torch.dtype, int, int]:
    """Smoke, device, dtype, size and repeats by those options and their defaults."""
    dtype = options.dtype or ("float16" if options.device.startswith("cuda") else "float32")
    size, repeats = options.size or (8 if options.smoke else 64), options.repeats or (2 if options.smoke else 5)
    return options.smoke, options.device, getattr(torch, dtype), size, repeats


def add_store_arguments(parser: argparse.ArgumentParser, name: str, page: str | None = None) -> None:
    """Where finished work is kept; with a page of docs/ also in how many processes it is done, and the page."""
    store = ROOT / "build" / name
    parser.add_argument("--store", type=Path, default=store, metavar="DIR", help=f"of finished work (build/{name})")
    parser.add_argument("--fresh", action="store_true", help="do everything again, even if it is stored")
    if page:
        parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each")
        parser.add_argument("--write-docs", action="store_true", help=f"put the tables into {page}")
        parser.set_defaults(cpu_time=True)


def add_drawing_arguments(parser: argparse.ArgumentParser, name: str, page: str, images: int) -> None:
    """
    For what draws on any device, after erasures were made on the CPU: the device, how many images, what is stored, and the page.

    The numbers that another machine wrote with `--json` are taken up with `--numbers`.
    """
    add_store_arguments(parser, name, page)
    parser.add_argument("--device", default="cpu", help="where images are drawn: cpu or cuda")
    parser.add_argument("--images", type=int, default=images, metavar="N", help=f"behind each share ({images})")
    parser.add_argument("--batch", type=int, metavar="N", help="images at once; 25 on the CPU, 250 on cuda")
    parser.add_argument("--seed", type=int, default=0, help="of all first noises, and of what is trained here")
    parser.add_argument("--numbers", type=Path, metavar="PATH", help="measure nothing: take what --json wrote there")


def drawing_settings(
    parser: argparse.ArgumentParser, given: Sequence[str] | None, targets: Sequence[str], steps: int
) -> argparse.Namespace:
    """Those options, checked, with `targets`, sampler `steps` and how they were `given`; one target and two images with --smoke."""
    options = parser.parse_args(given)
    if options.smoke:
        if options.write_docs:
            parser.error("--write-docs is not for --smoke")
        targets, steps, options.images = targets[:1], 2, 2
    if options.jobs < 1 or options.images < 1 or options.images % len(targets):
        parser.error(f"--jobs must be at least 1, and --images a multiple of {len(targets)}, the number of targets")
    options.batch = options.batch or (25 if options.device == "cpu" else 250)
    options.given, options.targets, options.steps = given, tuple(targets), steps
    return options


def measured_or_read(options: argparse.Namespace, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured now, with the command and the machine, or what `--numbers` says of an earlier run."""
    if not options.numbers:
        where = machine(options.device, options.cpu_time)
        given = sys.argv[1:] if options.given is None else options.given
        # Without where things lie on the machine that measures, which is no matter for a page.
        places = {place for i, each in enumerate(given) if each in ("--json", "--store") for place in (i, i + 1)}
        command = made_by(name, [each for i, each in enumerate(given) if i not in places])
        return {"command": command, "made_on": where, **measure()}
    numbers: dict[str, Any] = json.loads(options.numbers.read_text(encoding="utf-8"))
    if numbers.get("benchmark") != name or numbers.get("smoke"):
        raise SystemExit(f"{options.numbers} holds no numbers of {name}, or those of --smoke")
    return {key: value for key, value in numbers.items() if key not in ("benchmark", "smoke", "machine")}


def made_on(numbers: Mapping[str, Any]) -> str:
    """`Made by ... on ...`, for a page."""
    where = numbers["made_on"]
    return (
        f"Made by `{numbers['command']}` ({where['device']}, torch {where['torch']}, diffusers {where['diffusers']})."
    )


def start(options: argparse.Namespace) -> None:
    """Set the threads and the clock, and keep libraries away from the network."""
    if options.cpu_time:
        timing.use_processor_time()
    threads = 1 if options.smoke or options.cpu_time else options.threads
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def store_of(options: argparse.Namespace) -> Store:
    """The store that the options name; with `--fresh` what is in it does not count."""
    return Store.fresh(options.store) if options.fresh else Store(options.store)


def in_process(*command: str) -> Any:
    """Run Python in a process of its own, and read the JSON of the last line that it prints."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------- output


def machine(device: str, cpu_time: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    import diffusers
    import peft

    gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({platform.machine()})",
        "gpu": gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "GPU events" if gpu else "processor time" if cpu_time else "wall time",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
    }


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *right]).rstrip())


def finish(options: argparse.Namespace, name: str, numbers: Mapping[str, Any], device: str = "cpu") -> None:
    """Print the machine, and write the JSON where it is asked for."""
    where = machine(device, options.cpu_time)
    print("\n" + ", ".join(f"{key} {value}" for key, value in where.items() if key != "gpu"))
    if not where["gpu"]:
        print("Measured on a CPU.")
    if options.smoke:
        print("--smoke: small and few. These numbers say nothing.")
    write_numbers(options, name, numbers, device)


def write_numbers(options: argparse.Namespace, name: str, numbers: Mapping[str, Any], device: str = "cpu") -> None:
    """Write the JSON where it is asked for; also between the parts of what may be cut off."""
    if options.json:
        where = machine(device, options.cpu_time)
        report = {"benchmark": name, "smoke": options.smoke, "machine": where, **numbers}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- pages


def made_by(name: str, arguments: Sequence[str] | None) -> str:
    """The command that is running, as it stands below a table."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *(sys.argv[1:] if arguments is None else arguments)])


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    first, *rows = (f"| {' | '.join(row)} |" for row in (header, *body))
    return [first, "|" + " --- |" * len(header), *rows]


def replace_between(text: str, name: str, body: str) -> str:
    """Put `body` between a benchmark's two markers of a page, and change nothing else."""
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page must hold {begin} and then {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}"


def write_page(page: str, name: str, body: str) -> None:
    """The same with a page of the repository."""
    path = ROOT / page
    path.write_text(replace_between(path.read_text(encoding="utf-8"), name, body), encoding="utf-8")
