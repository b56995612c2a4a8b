"""What a loaded erasure adds to one step of FLUX.1's transformer, counted exactly on the meta device.

    python -m benchmarks.transformer_step [--ranks 1 16] [--counts 1] [--pixels 1024]

Kernels (dispatched operations but for views) in the first step of a run and in a later one, and FLOPs, in FLUX.1's own shapes
with 512 text rows. A `map` is a text map of the rows with one of the pooled vector; a `door` LoRA is the same edit on the two
Linears that read them; a `keys` LoRA is on the queries and keys of the 19 double blocks, text's and image's, as GEM trains it.
"stock" is that file in diffusers' own hands. Nothing is computed, so nothing is timed.
"""

import warnings
from functools import partial
from typing import Any

import torch

from benchmarks.builders import share_weights
from benchmarks.command import arguments, finish, print_table, start
from benchmarks.unet_step import STEPS, counted
from diffusers_erasure import Erasure, load_erasure
from diffusers_erasure.families import FAMILIES
from diffusers_erasure.layers.layer import Layer
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import LORA_FILE, BaseModel


FLUX = FAMILIES["flux"]
TEXT_ROWS = 512
KEYS = (".attn.to_q", ".attn.to_k", ".attn.add_q_proj", ".attn.add_k_proj")
VARIANTS = ("map", "door", "door, stock", "keys", "keys, stock")
BYTES = 2  # of a number in float16
SMALL = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}


def make_transformer(smoke: bool) -> Any:
    """FLUX.1 dev's transformer without values; two blocks of each kind with `smoke`."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        small: dict[str, Any] = SMALL if smoke else {}
        return FluxTransformer2DModel(guidance_embeds=True, **small).eval().requires_grad_(False)


def inputs(transformer: Any, pixels: int) -> dict[str, Any]:
    """What the pipeline gives for one picture: latents in squares of two by two, text rows, and where both stand."""
    side = pixels // 8 // FLUX.packing
    config = transformer.config
    return {
        "hidden_states": torch.empty(1, side * side, config.in_channels, device="meta"),
        "encoder_hidden_states": torch.empty(1, TEXT_ROWS, config.joint_attention_dim, device="meta"),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "guidance": torch.empty(1, device="meta"),
        "img_ids": torch.empty(side * side, 3, device="meta"),
        "txt_ids": torch.empty(TEXT_ROWS, 3, device="meta"),
    }


class TransformerOnly:
    """The least that the erasure functions take for a pipeline."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


def sites_of(transformer: Any, variant: str) -> list[str]:
    """The Linears of a LoRA."""
    assert FLUX.door is not None and FLUX.pooled is not None
    if variant.startswith("door"):
        return [FLUX.door, FLUX.pooled.reader]
    return [name for name, _ in transformer.named_modules() if name.endswith(KEYS) and name.startswith("transformer_")]


def erasure_of(transformer: Any, variant: str, rank: int, seed: int) -> Erasure:
    """An erasure with random tensors."""
    assert FLUX.pooled is not None
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if variant == "map":
        config = transformer.config
        widths = {FLUX.input: config.joint_attention_dim, FLUX.pooled.input: config.pooled_projection_dim}
        layers = [
            Layer("text_map", (name,), {"A": drawn(rank, width), "D": drawn(rank, width)}, "transformer")
            for name, width in widths.items()
        ]
    else:
        tensors: dict[str, torch.Tensor] = {}
        sites = sites_of(transformer, variant)
        for site in sites:
            linear = transformer.get_submodule(site)
            tensors[site + DOWN] = drawn(rank, linear.in_features)
            tensors[site + UP] = drawn(linear.out_features, rank)
        layers = [Layer("lora", tuple(sites), tensors, "transformer")]
    return Erasure.from_layers(layers, base=BaseModel(FLUX.name), concepts=f"concept {seed}")


def with_variant(bare: Any, variant: str, rank: int, number: int) -> Any:
    """A transformer with `number` erasures of a variant."""
    transformer = share_weights(bare)
    for index in range(number):
        erasure = erasure_of(transformer, variant, rank, index)
        if variant.endswith("stock"):
            with warnings.catch_warnings(action="ignore"):  # a second adapter, and one without values, are meant
                transformer.load_lora_adapter(
                    dict(erasure.tensors[LORA_FILE]), prefix="transformer", adapter_name=f"adapter{index}"
                )
        else:
            load_erasure(TransformerOnly(transformer), erasure, f"erasure{index}")
    if variant.endswith("stock"):
        transformer.set_adapters([f"adapter{index}" for index in range(number)])
    return transformer.to("meta")


def added_bytes(erasure: Erasure) -> int:
    """Of its tensors in float16."""
    return sum(BYTES * value.numel() for file in erasure.tensors.values() for value in file.values())


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = arguments(__doc__, smoke="a transformer of four small blocks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 16], help="of an erasure; 1 16 by default")
    parser.add_argument("--counts", type=int, nargs="+", default=[1], help="erasures loaded; 1 by default")
    parser.add_argument("--pixels", type=int, default=1024, help="height and width of the picture (1024)")
    options = parser.parse_args()
    start(options)
    bare = make_transformer(options.smoke)
    batch = inputs(bare, 64 if options.smoke else options.pixels)
    first, later, flops = counted(bare, partial(bare, **batch))
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        for rank in options.ranks:
            for number in options.counts:
                transformer = with_variant(bare, variant, rank, number)
                found = counted(transformer, partial(transformer, **batch))
                rows.append(
                    {
                        "variant": variant,
                        "rank": rank,
                        "erasures": number,
                        "added_kernels_first": found[0] - first,
                        "added_kernels": found[1] - later,
                        "added_flops": found[2] - flops,
                        "bytes": added_bytes(erasure_of(bare, variant, rank, 0)),
                    }
                )
    print(f"\nBare step: {later} kernels, {flops / 1e12:.4g} TFLOPs; runs of {STEPS} steps")
    print_table(
        "Added to a step",
        (
            "variant, rank, loaded",
            "kernels, first step",
            "later",
            "MFLOPs, first",
            "of the step",
            "KB of one, float16",
        ),
        (
            (
                f"{row['variant']} r{row['rank']} x{row['erasures']}",
                f"+{row['added_kernels_first']}",
                f"+{row['added_kernels']}",
                f"+{row['added_flops'] / 1e6:.1f}",
                f"{row['added_flops'] / flops:.5%}",
                f"{row['bytes'] / 1e3:.1f}",
            )
            for row in rows
        ),
    )
    bare_numbers = {"kernels_first": first, "kernels": later, "flops": flops}
    finish(options, "transformer_step", {"bare": bare_numbers, "rows": rows})


if __name__ == "__main__":
    main()
