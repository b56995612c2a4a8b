"""A text map for FLUX.1 in its real shapes, fitted from the text encoders alone: seconds, memory and bytes.

    python -m benchmarks.flux_fit [--rows 512] [--templates 1] [--device cuda]

T5-XXL (24 layers, 4,096 wide) and CLIP-L have random weights, in bfloat16, so that nothing is downloaded. The transformer is not
loaded: UCE's map of one concept needs nothing of it, and it is recognised by single values of its file, 24 GB of zeros that
take no room. T5's passes decide, so that the time of a fit is nearly that of one prompt times their number: a target and an
anchor in each template, what is retained, and the empty prompt. Words' pieces do not matter: the tokenizers are the tiny model's.
"""

import json
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.command import arguments, finish, print_table, start
from benchmarks.timing import peak_bytes
from benchmarks.transformer_step import BYTES, make_transformer
from diffusers_erasure import erase
from diffusers_erasure.demo import load_pipeline


# google/t5-v1_1-xxl's own configuration, as far as it differs from the class's defaults; and CLIP-L's.
T5_XXL: dict[str, Any] = {
    **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu"},
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_attention_heads": 12}
SMALL_T5 = {**T5_XXL, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
TEMPLATES = ("{}", "a picture of a {}", "a photo of a {}", "an image of a {}")


@torch.no_grad()
def with_random_weights(make: Any) -> Any:
    """A model in bfloat16 with random weights, without a copy in float32."""
    with torch.device("meta"):
        model = make().eval().requires_grad_(False)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    block = (torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(torch.bfloat16)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            scale = 0.02 if isinstance(module, nn.Embedding) else (3.0 / max(1, parameter[0].numel())) ** 0.5
            for part in parameter.view(-1).split(len(block)):
                torch.mul(block[: len(part)], scale, out=part)
            if parameter.ndim == 1:
                parameter.fill_(1.0)
    return model


def write_transformer(folder: Path, smoke: bool) -> None:
    """The transformer's configuration, and a file of zeros that takes no room on a disk that knows holes."""
    transformer = make_transformer(smoke)
    transformer.save_config(folder)
    entries, end = {}, 0
    for name, parameter in transformer.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        entries[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)


def make_pipeline(folder: Path, smoke: bool) -> Any:
    """FLUX.1's pipeline without its transformer, which lies in a folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tiny = load_pipeline("flux")
    clip = CLIPTextConfig(**(tiny.text_encoder.config.to_dict() if smoke else {**CLIP_L, "eos_token_id": 2}))
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=None,
        text_encoder=CLIPTextModel(clip).to(torch.bfloat16).eval(),
        tokenizer=tiny.tokenizer,
        text_encoder_2=with_random_weights(lambda: T5EncoderModel(T5Config(**(SMALL_T5 if smoke else T5_XXL)))),
        tokenizer_2=tiny.tokenizer_2,
        transformer=None,
    )
    pipe.tokenizer_2.model_max_length = 512
    pipe.register_to_config(_name_or_path=str(folder))
    return pipe


def main() -> None:
    """The command line."""
    parser = arguments(__doc__, smoke="small encoders and a transformer of four small blocks")
    parser.add_argument("--rows", type=int, default=512, help="that T5 makes of a prompt, as in calls (512)")
    parser.add_argument(
        "--templates", type=int, default=1, choices=range(1, 5), help="in which the concept is encoded (1)"
    )
    parser.add_argument("--device", default="cpu", help="where the text encoders are: cpu or cuda")
    options = parser.parse_args()
    start(options)
    rows = 16 if options.smoke else options.rows
    templates = TEMPLATES[: options.templates]
    os.environ["DIFFUSERS_ERASURE_CACHE"] = "off"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "transformer"
        place.mkdir()
        write_transformer(place, options.smoke)
        pipe = make_pipeline(Path(folder), options.smoke).to(options.device)
        loaded, began = peak_bytes(), time.perf_counter()
        erasure = erase(
            pipe,
            "cat",
            anchors="animal",
            templates=templates,
            retain=(),
            layer="text_map",
            max_sequence_length=rows,
            compare=False,
        )
        seconds = time.perf_counter() - began
    prompts = 2 * len(templates) + 1
    maps = [erasure.layer_tensors(layer) for layer in erasure.config.layers]
    size = sum(BYTES * value.numel() for tensors in maps for value in tensors.values())
    print_table(
        f"One concept by UCE, {rows} rows of T5, {prompts} prompts",
        ("fit, s", "a prompt, s", "loaded, GB", "peak, GB", "map in float16, KB"),
        [
            [
                f"{seconds:.1f}",
                f"{seconds / prompts:.1f}",
                f"{loaded / 1e9:.1f}",
                f"{peak_bytes() / 1e9:.1f}",
                f"{size / 1e3:.1f}",
            ]
        ],
    )
    numbers = {
        "rows": rows,
        "prompts": prompts,
        "seconds": seconds,
        "loaded": loaded,
        "peak": peak_bytes(),
        "bytes": size,
    }
    finish(options, "flux_fit", numbers, options.device)


if __name__ == "__main__":
    main()
