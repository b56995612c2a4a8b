"""UCE as the library computes it, against the published way: one float32 GEMM and one `torch.linalg.solve` a layer.

    python -m benchmarks.uce [--targets 1 10 100] [--retain 1000]

For the 32 projections of Stable Diffusion 1.5's UNet and random text rows with |x|^2 = 750; encoding is left out on
both sides. Ours is `solve` and `publish` of `diffusers_erasure.methods.uce`, float64 throughout, up to the float32
factors of the LoRA. The baseline is the published formula W' = (lamb W + sum v e^T + sum W r r^T) M^-1 in its best
form: the sums are W N with one matrix N for all layers. N and M are made once, within the time that is counted.

Errors are of the edit, |dW - exact dW| / |exact dW|, the largest over the layers, against a dense float64 solution.
"""

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.builders import UNetOnly, make_unet
from benchmarks.command import finish, print_table, start, timed_arguments
from benchmarks.timing import interleave_calls, ratios, spread, summary
from diffusers_erasure.base_model import text_readers
from diffusers_erasure.families.doors import ROWS
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.methods.rows import KeptRows, TargetRows
from diffusers_erasure.methods.uce import Config, Settings, publish, solve
from diffusers_erasure.settings import resolve


LAMB, SQUARED_NORM = 0.5, 750.0


def random_rows(targets: int, retain: int, width: int) -> tuple[TargetRows, KeptRows]:
    """Rows of the length that CLIP's have in Stable Diffusion 1.x."""
    generator = torch.Generator().manual_seed(targets)

    def rows(count: int) -> torch.Tensor:
        # float32 values, as encoders give them: both sides start from the same numbers
        return (torch.randn(count, width, generator=generator) * (SQUARED_NORM / width) ** 0.5).double()

    e, g = rows(targets), rows(targets)
    return TargetRows(e, g, (e, g), SQUARED_NORM, targets, targets), KeptRows(rows(retain), e[:0], prompts=retain)


def dense(
    weights: dict[str, torch.Tensor], rows: tuple[TargetRows, KeptRows], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The new weights by the published formula."""
    e, g, r = (part.to(dtype) for part in (rows[0].targets, rows[0].anchors, rows[1].retain))
    kept = LAMB * torch.eye(e.shape[1], dtype=dtype) + r.T @ r
    numerator, denominator = kept + g.T @ e, kept + e.T @ e
    return {
        name: torch.linalg.solve(denominator, weight.to(dtype) @ numerator, left=False)
        for name, weight in weights.items()
    }


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = timed_arguments(__doc__)
    parser.add_argument("--targets", type=int, nargs="+", help="numbers of targets; 1 10 100 by default")
    parser.add_argument("--retain", type=int, help="rows to retain; 1000 by default")
    options = parser.parse_args()
    start(options)
    counts = options.targets or ([1, 4] if options.smoke else [1, 10, 100])
    retain = options.retain or (50 if options.smoke else 1000)
    repeats = options.repeats or (3 if options.smoke else 7)
    pipe = UNetOnly(make_unet(options.smoke))
    weights = {name: linear.weight for name, linear in text_readers(pipe).items()}
    # As a LoRA: what the dense weights are compared with.
    settings = resolve(Config(rows="last", templates="none", absolute=True, lamb=LAMB, layer="lora"), Settings)
    table: list[dict[str, Any]] = []
    for count in counts:
        rows = random_rows(count, retain, pipe.unet.config.cross_attention_dim)

        def solved(rows: tuple[TargetRows, KeptRows] = rows) -> tuple[torch.Tensor, torch.Tensor]:
            return solve(*rows, erase_scale=1.0, retain_scale=1.0, lamb=LAMB)

        def ours(rows: tuple[TargetRows, KeptRows] = rows) -> Mapping[str, torch.Tensor]:
            return publish(pipe, {ROWS: solved(rows)}, settings).layers[0].tensors

        def baseline(rows: tuple[TargetRows, KeptRows] = rows) -> dict[str, torch.Tensor]:
            return dense(weights, rows, torch.float32)

        times = interleave_calls({"ours": ours, "baseline": baseline, "solve": solved}, repeats)
        lora, dense32 = ours(), baseline()
        a, d = solved()
        errors = {"ours": 0.0, "ours_before_cast": 0.0, "baseline": 0.0}
        for name, weight in weights.items():
            new = dense({name: weight}, rows, torch.float64)[name]
            exact = new - weight.double()
            edits = {
                "ours": lora[name + UP].double() @ lora[name + DOWN].double(),
                "ours_before_cast": weight.double() @ d.T @ a,
                "baseline": dense32[name].double() - weight.double(),
            }
            for key, edit in edits.items():
                errors[key] = max(errors[key], float((edit - exact).norm() / exact.norm()))
        table.append(
            {
                "targets": count,
                "retain": retain,
                "rank": lora[next(key for key in lora if key.endswith(DOWN))].shape[0],
                "ours_s": summary(times["ours"]),
                "solve_s": summary(times["solve"]),
                "baseline_s": summary(times["baseline"]),
                "speedup": ratios(times["baseline"], times["ours"]),
                "error": errors,
            }
        )
    print_table(
        f"UCE with {retain} rows to retain, milliseconds: median [quartiles]",
        ("targets", "rank", "ours", "(of it solve)", "GEMM + linalg.solve", "times faster"),
        (
            (
                row["targets"],
                row["rank"],
                spread(row["ours_s"], 1, 1e3),
                spread(row["solve_s"], 1, 1e3),
                spread(row["baseline_s"], 1, 1e3),
                spread(row["speedup"], 1),
            )
            for row in table
        ),
    )
    print_table(
        "Error of the edit against a dense float64 solution",
        ("targets", "ours, float32 factors", "ours, before the cast", "GEMM + linalg.solve"),
        (
            (row["targets"], *(f"{row['error'][key]:.1e}" for key in ("ours", "ours_before_cast", "baseline")))
            for row in table
        ),
    )
    finish(options, "uce", {"rows": table})


if __name__ == "__main__":
    main()
