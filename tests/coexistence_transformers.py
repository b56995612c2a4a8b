"""The coexistence matrix of FLUX.1's and Stable Diffusion 3's transformers: forms of an erasure, and what people do to a pipeline.

As `tests/coexistence.py`, which is for UNets; the tables stand side by side in docs/composing.md.
"""

import copy
import importlib.util
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from accelerate import cpu_offload
from diffusers import (
    FirstBlockCacheConfig,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    PyramidAttentionBroadcastConfig,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

from benchmarks.builders import random_factors
from diffusers_erasure import Erasure, ErasureCompatibilityError, ErasureError, ErasureInactiveError, Layer
from diffusers_erasure.low_rank import DOWN, UP
from tests.helpers import PROMPT, dense_edit, random_erasure, random_gates
from tests.tiny_transformers import PIPES, SIDE, drawn, sites_of


NAME = "no-zebra"
# diffusers offloads anew to an accelerator, where there is one, when it has loaded a LoRA.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def tiny(kind: str) -> Any:
    """Of which all are copies."""
    return PIPES[kind]()


def base(kind: str) -> Any:
    """A pipeline without an erasure."""
    kept = tiny(kind)
    shared = [value for name, value in kept.components.items() if name.startswith(("tokenizer", "vae"))]
    return copy.deepcopy(kept, {id(each): each for each in (*shared, *_erasures(kind))})


# ---------------------------------------------------------------------------------------------------------- forms


@cache
def low_rank(kind: str) -> Erasure:
    return random_erasure(tiny(kind), "lora", sites_of(kind), size=0.7)


@cache
def patches(kind: str) -> Any:
    from tests.test_transformers import Patches

    return Patches(kind)


@cache
def patching(kind: str) -> Erasure:
    return patches(kind).erasure(tiny(kind))


@cache
def maps(kind: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`A` and `D` [2, C] of the text rows and of the pooled vector."""
    config, generator = tiny(kind).transformer.config, torch.Generator().manual_seed(12)
    widths = {"encoder_hidden_states": config.joint_attention_dim, "pooled_projections": config.pooled_projection_dim}
    return {
        name: (torch.randn(2, width, generator=generator) / width**0.5, torch.randn(2, width, generator=generator))
        for name, width in widths.items()
    }


@cache
def mapping(kind: str) -> Erasure:
    layers = [Layer("text_map", (name,), {"A": a, "D": d}, "transformer") for name, (a, d) in maps(kind).items()]
    return Erasure.from_layers(layers, base=tiny(kind), concepts="zebra", method="random")


def plain_maps(kind: str, pipe: Any) -> Any:
    """The pipeline whose transformer is given mapped text: with a LoRA on the door, (W + U) T."""
    pipe.transformer.register_forward_pre_hook(partial(_mapped, maps(kind)), with_kwargs=True)
    return pipe


def _mapped(
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], module: Any, args: Any, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, {**given, **{name: given[name] + given[name] @ a.T @ d for name, (a, d) in tensors.items()}}


@cache
def gating(kind: str) -> Erasure:
    """With a gate that the prompt opens, and one that none does."""
    pipe = tiny(kind)
    with torch.no_grad():  # by a copy: transformers puts hooks on encoders that are asked for all layers
        rows = copy.deepcopy(pipe).encode_prompt(PROMPT, *[None] * (1 if kind == "flux" else 2), device="cpu")[0]
    tensors = random_gates(rows[0, 0], pipe.transformer.config.pooled_projection_dim)
    layer = Layer("gated_map", ("encoder_hidden_states",), tensors, "transformer")
    return Erasure.from_layers([layer], base=pipe, concepts=["zebra", "gnu"], method="random")


def plain_gates(kind: str, pipe: Any) -> Any:
    """The pipeline whose transformer is given what the open gates leave of the text."""
    erasure = gating(kind)
    tensors = erasure.layer_tensors(erasure.config.layers[0])
    pipe.transformer.register_forward_pre_hook(partial(_gated, tensors), with_kwargs=True)
    return pipe


def _gated(
    tensors: Mapping[str, torch.Tensor], module: Any, args: Any, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    rows, found = given["encoder_hidden_states"], dict(given)
    is_open = (rows.float() @ tensors["probes"].T).amax(1) > tensors["thresholds"].sum(1)
    for prefix, name in (("", "encoder_hidden_states"), ("pooled_", "pooled_projections")):
        x, counts = given[name], tensors[prefix + "counts"].int().tolist()
        parts = zip(is_open.T, *(tensors[prefix + each].split(counts) for each in "AD"), strict=True)
        shape = (-1, *[1] * (x.ndim - 1))
        found[name] = x + sum(gate.reshape(shape) * (x @ a.T.to(x) @ d.to(x)) for gate, a, d in parts)
    return args, found


def _erasures(kind: str) -> tuple[Erasure, ...]:
    return low_rank(kind), patching(kind), mapping(kind), gating(kind)


@dataclass(frozen=True)
class Form:
    """One way in which an erasure acts.

    Attributes:
        erasure: makes it, for a kind of transformer.
        plain: turns a pipeline without hooks into what must come out.
        backend: of `load_erasure`.
    """

    erasure: Callable[[str], Erasure]
    plain: Callable[[str, Any], Any]
    backend: str = "hook"

    def load(self, kind: str, pipe: Any) -> None:
        """Load the erasure into a pipeline."""
        pipe.load_erasure(self.erasure(kind), NAME, backend=self.backend, strict_base="ignore")


def dense(kind: str, pipe: Any) -> Any:
    return dense_edit(pipe, low_rank(kind))


FORMS: dict[str, Form] = {
    "lora by hooks": Form(low_rank, dense),
    "merged": Form(low_rank, dense, "merge"),
    "peft": Form(low_rank, dense, "peft"),
    "text_map": Form(mapping, plain_maps),
    "gated_map": Form(gating, plain_gates),
    "activation": Form(patching, lambda kind, pipe: patches(kind).plainly(pipe)),
}


# ----------------------------------------------------------------------------------------------------- neighbours


@dataclass(frozen=True)
class Neighbour:
    """What people do to a pipeline.

    Attributes:
        do: does it; where it gives another pipeline, that one draws.
        arguments: with which the pipeline then draws.
        plain_do: the same for the plain pipeline, where that is another thing.
        of_kind: arguments that depend on the kind of transformer.
        changes: whether it changes the picture itself.
        plain: for some forms another plain pipeline with the neighbour on it, made from the kind.
        kinds: of transformers, for which diffusers has it.
        first: whether an erasure can only be loaded after it.
        needs: a package.
        slow: whether it takes long.
    """

    do: Callable[[str, Any], Any] = lambda kind, pipe: None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    of_kind: Callable[[str], Mapping[str, Any]] = lambda kind: {}
    plain_do: Callable[[str, Any], Any] | None = None
    changes: bool = True
    plain: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    kinds: tuple[str, ...] = tuple(PIPES)
    first: bool = False
    needs: str | None = None
    slow: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here."""
        absent = self.needs is not None and importlib.util.find_spec(self.needs) is None
        return f"{self.needs} is not installed" if absent else None

    def joins(self, kind: str, pipe: Any, plain: bool = False) -> Any:
        """Do it to a pipeline; returns the one that draws."""
        do = self.plain_do if plain and self.plain_do is not None else self.do
        return do(kind, pipe) or pipe

    def drawn(self, kind: str, pipe: Any) -> Any:
        """What the pipeline draws beside it."""
        pipe.set_progress_bar_config(disable=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # SD3's ControlNet pipeline draws the hint's latents from the global generator
            return drawn(pipe, **{"num_inference_steps": 3, **self.arguments, **self.of_kind(kind)})

    def plainly(self, kind: str, form: str) -> Any:
        """The plain pipeline of a form, with the neighbour."""
        if form in self.plain:
            return self.plain[form](kind)
        if self.first:
            return FORMS[form].plain(kind, self.joins(kind, base(kind), plain=True))
        return self.joins(kind, FORMS[form].plain(kind, base(kind)), plain=True)


STYLE = ("attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.2", "context_embedder")


@cache
def style(kind: str, seed: int = 7) -> dict[str, torch.Tensor]:
    """A user's LoRA as a state dict."""
    generator, state_dict = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, module in tiny(kind).transformer.named_modules():
        if name.endswith(STYLE):
            down, up = random_factors(module, 2, generator, 0.5)
            state_dict[f"transformer.{name}{DOWN}"], state_dict[f"transformer.{name}{UP}"] = down, up
    return state_dict


def load_lora(kind: str, pipe: Any, name: str = "style", seed: int = 7) -> None:
    pipe.load_lora_weights(dict(style(kind, seed)), adapter_name=name)


def fuse_lora(kind: str, pipe: Any) -> None:
    load_lora(kind, pipe)
    pipe.fuse_lora(adapter_names=["style"])
    pipe.unload_lora_weights()


def fuse_into_weights(kind: str, pipe: Any) -> None:
    """What fusing leaves, without peft: the erasure's own adapter would be fused with it."""
    with torch.no_grad():
        for key in (key.removesuffix(DOWN) for key in style(kind) if key.endswith(DOWN)):
            module = pipe.transformer.get_submodule(key.removeprefix("transformer."))
            module.weight += style(kind)[key + UP] @ style(kind)[key + DOWN]


def load_and_unload(kind: str, pipe: Any) -> None:
    load_lora(kind, pipe)
    pipe.unload_lora_weights()


def choose_one_of_two(kind: str, pipe: Any) -> None:
    load_lora(kind, pipe)
    load_lora(kind, pipe, "other", 8)
    pipe.set_adapters(["style"], [0.5])


def half_of_one(kind: str, pipe: Any) -> None:
    load_lora(kind, pipe)
    pipe.set_adapters(["style"], [0.5])


@cache
def ip_adapter(kind: str) -> dict[str, Any]:
    """Random weights of an IP-Adapter, as its state dict."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "flux":
            projection = {
                "proj.weight": torch.randn(4 * 40, 16) / 4,
                "proj.bias": torch.zeros(4 * 40),
                "norm.weight": torch.ones(40),
                "norm.bias": torch.zeros(40),
            }
            keys = {
                f"{i}.to_{part}_ip.{name}": torch.randn(32, 40) / 4 if name == "weight" else torch.zeros(32)
                for i in range(2)
                for part in "kv"
                for name in ("weight", "bias")
            }
            return {"image_proj": projection, "ip_adapter": keys}
        image = IPAdapterTimeImageProjection(
            embed_dim=16, output_dim=32, hidden_dim=64, heads=1, num_queries=4, timestep_in_dim=32
        )
        keys = {}
        for i in range(len(tiny(kind).transformer.attn_processors)):
            one = SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=32, ip_hidden_states_dim=32, head_dim=16, timesteps_emb_dim=64
            )
            keys.update({f"{i}.{name}": value for name, value in one.state_dict().items()})
        return {"image_proj": image.state_dict(), "ip_adapter": keys}


def load_ip_adapter(kind: str, pipe: Any) -> None:
    state_dict = {name: dict(part) for name, part in ip_adapter(kind).items()}
    given = {"weight_name": "random", "image_encoder_pretrained_model_name_or_path": None} if kind == "flux" else {}
    if kind == "flux":
        pipe.load_ip_adapter(state_dict, **given)
    else:
        pipe.transformer._load_ip_adapter_weights(state_dict)
        pipe.set_ip_adapter_scale(1.0)


def with_image(kind: str) -> dict[str, Any]:
    embeds = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(6))
    if kind == "flux":
        return {"ip_adapter_image_embeds": [embeds], "negative_ip_adapter_image_embeds": [torch.zeros_like(embeds)]}
    return {"ip_adapter_image_embeds": torch.cat([torch.zeros_like(embeds), embeds]).expand(2, 3, 16)}


@cache
def control(kind: str) -> Any:
    """A ControlNet with random weights, also where they begin as zeros."""
    model: Any = {"flux": FluxControlNetModel, "sd3": SD3ControlNetModel}[kind]
    transformer = tiny(kind).transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        given: dict[str, int] = {"num_layers": 1}
        if kind == "flux":
            given |= {"num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        else:
            given |= {"num_extra_conditioning_channels": 0}
        net = model.from_transformer(transformer, **given).eval()
        for name, parameter in net.named_parameters():
            if name.startswith(("controlnet_blocks", "controlnet_single_blocks")) and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
            elif "controlnet_x_embedder" in name or name.startswith("pos_embed_input"):
                torch.nn.init.normal_(parameter, std=0.2)
    return net


def add_controlnet(kind: str, pipe: Any) -> Any:
    made: Any = {"flux": FluxControlNetPipeline, "sd3": StableDiffusion3ControlNetPipeline}[kind]
    return made.from_pipe(pipe, controlnet=copy.deepcopy(control(kind)))


def picture(seed: int = 3) -> torch.Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def img2img(kind: str, pipe: Any) -> Any:
    return {"flux": FluxImg2ImgPipeline, "sd3": StableDiffusion3Img2ImgPipeline}[kind].from_pipe(pipe)


def cache_first_block(kind: str, pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))


def broadcast_attention(kind: str, pipe: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    pipe.transformer.enable_cache(config)


def sequential_offload(kind: str, pipe: Any) -> None:
    """On a CPU what diffusers does to each model, for accelerate refuses a whole pipeline there."""
    if DEVICE != "cpu":
        pipe.enable_sequential_cpu_offload(device=DEVICE)
        return
    for name, model in pipe.components.items():
        if name.startswith(("transformer", "text_encoder", "vae")):
            cpu_offload(model, "cpu")


def group_offload(kind: str, pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def own_decoder(do: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """With a decoder of its own, which it changes."""

    def step(kind: str, pipe: Any) -> Any:
        pipe.vae = copy.deepcopy(pipe.vae)
        return do(kind, pipe)

    return step


def compile_transformer(kind: str, pipe: Any) -> None:
    torch.compiler.reset()
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")


def compile_blocks(kind: str, pipe: Any) -> None:
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def cast_to_float8(kind: str, pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def float8_weights(kind: str) -> Any:
    """The pipeline with the weights that layerwise casting leaves, in float32."""
    pipe, cast = base(kind), base(kind)
    cast_to_float8(kind, cast)
    for name, value in pipe.transformer.state_dict().items():
        value.copy_(cast.transformer.state_dict()[name].float())
    return pipe


def edited_and_cast(kind: str) -> Any:
    pipe = FORMS["merged"].plain(kind, base(kind))
    cast_to_float8(kind, pipe)
    return pipe


BLOCK = 32  # numbers of a row that GGUF packs together


def packable(pipe: Any) -> list[tuple[Any, str, Any]]:
    """The Linears of the blocks that quantisers pack: what holds each, its name there, and itself."""
    transformer = pipe.transformer
    found = [
        (transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for name, module in transformer.named_modules()
        if type(module) is torch.nn.Linear and "transformer_blocks" in name and module.in_features % BLOCK == 0
    ]
    assert len(found) > 8
    return found


def pack_gguf(kind: str, pipe: Any) -> None:
    """As diffusers does where it loads such a file."""
    import gguf

    packing = gguf.GGMLQuantizationType.Q8_0
    for parent, name, linear in packable(pipe):
        packed = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        data = gguf.quants.quantize(linear.weight.detach().numpy(), packing)
        packed.weight, packed.bias = GGUFParameter(torch.from_numpy(data), quant_type=packing), linear.bias
        setattr(parent, name, packed)
    pipe.transformer.requires_grad_(False)


def pack_torchao(kind: str, pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    chosen = {linear for _, _, linear in packable(pipe)}
    quantize_(pipe.transformer, Int8WeightOnlyConfig(), filter_fn=lambda module, name: module in chosen)


def pack_bitsandbytes(kind: str, pipe: Any) -> None:
    """In four bits."""
    import bitsandbytes as bnb

    for parent, name, linear in packable(pipe):
        given = {"bias": linear.bias is not None, "compute_dtype": torch.float32, "quant_type": "nf4"}
        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **given)
        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        packed.bias = linear.bias
        setattr(parent, name, packed)
    pipe.transformer.requires_grad_(False)


def unpack(pack: Callable[[str, Any], None], weight: Callable[[Any], torch.Tensor]) -> Callable[[str, Any], None]:
    """The plain pipeline with the weights that a quantiser left, unpacked."""

    def plainly(kind: str, pipe: Any) -> None:
        names = [name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        packed = base(kind)
        own = {id(linear) for _, _, linear in packable(packed)}
        names = [name for name in names if id(packed.transformer.get_submodule(name)) in own]
        pack(kind, packed)
        for name in names:
            unpacked = weight(packed.transformer.get_submodule(name)).float()
            pipe.transformer.get_submodule(name).weight.data.copy_(unpacked)

    return plainly


def _four_bits(module: Any) -> torch.Tensor:
    import bitsandbytes as bnb

    unpacked: torch.Tensor = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return unpacked


def quantised(pack: Callable[[str, Any], None], weight: Callable[[Any], torch.Tensor], needs: str) -> Neighbour:
    return Neighbour(pack, plain_do=unpack(pack, weight), first=True, needs=needs)


NEIGHBOURS: dict[str, Neighbour] = {
    "LoRA": Neighbour(load_lora),
    "LoRA, fused": Neighbour(fuse_lora, plain_do=fuse_into_weights),
    "LoRA, unloaded": Neighbour(load_and_unload, plain_do=lambda kind, pipe: None, changes=False),
    "`set_adapters`": Neighbour(choose_one_of_two, plain_do=half_of_one),
    "IP-Adapter": Neighbour(load_ip_adapter, of_kind=with_image),
    "ControlNet": Neighbour(add_controlnet, {"control_image": picture()}),
    "first-block cache": Neighbour(cache_first_block, kinds=("flux",)),
    "pyramid attention broadcast": Neighbour(broadcast_attention, kinds=("flux",)),
    "layer skip": Neighbour(arguments={"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}, kinds=("sd3",)),
    "model offload": Neighbour(
        own_decoder(lambda kind, pipe: pipe.enable_model_cpu_offload(device=DEVICE)), changes=False
    ),
    "sequential offload": Neighbour(own_decoder(sequential_offload), changes=False),
    "group offload": Neighbour(group_offload, changes=False),
    "layerwise casting": Neighbour(
        cast_to_float8,
        plain={
            form: edited_and_cast
            if form == "merged"
            else lambda kind, f=form: FORMS[f].plain(kind, float8_weights(kind))
            for form in FORMS
        },
    ),
    "GGUF": quantised(pack_gguf, lambda module: dequantize_gguf_tensor(module.weight), "gguf"),
    "torchao, 8 bits": quantised(pack_torchao, lambda module: module.weight.dequantize(), "torchao"),
    "bitsandbytes, 4 bits": quantised(pack_bitsandbytes, _four_bits, "bitsandbytes"),
    "compiled transformer": Neighbour(compile_transformer, plain_do=lambda kind, pipe: None, changes=False, slow=True),
    "compiled blocks": Neighbour(
        compile_blocks, plain_do=lambda kind, pipe: None, changes=False, kinds=("flux",), slow=True
    ),
    "img2img": Neighbour(img2img, {"image": picture(), "strength": 0.8, "num_inference_steps": 4}),
    "deepcopy": Neighbour(lambda kind, pipe: copy.deepcopy(pipe), plain_do=lambda kind, pipe: None, changes=False),
    "pickle": Neighbour(
        lambda kind, pipe: pickle.loads(pickle.dumps(pipe)), plain_do=lambda kind, pipe: None, changes=False
    ),
}


# ----------------------------------------------------------------------------------------------- what is refused


@dataclass(frozen=True)
class Refused:
    """A pair that raises a typed error: its class, what its message says, and why, in a sentence for the table."""

    error: type[ErasureError]
    match: str
    reason: str


OFFLOADED = "packed and offloaded weights cannot be written; an erasure acts on them by hooks"
FLOAT8 = "stock adapters take float8 from the weights and cannot compute in it; load the erasure first"
COMPILED = "an adapter is a change of modules; load the erasure before compiling"
GONE = "`unload_lora_weights` takes the erasure's own adapter away too, which the next pass says; hooks stay on"

QUANTISED = [name for name, neighbour in NEIGHBOURS.items() if neighbour.first]
_GONE = Refused(ErasureInactiveError, "is gone from", GONE)
_MERGED = Refused(ErasureCompatibilityError, "cannot be fused", OFFLOADED)
# The erasure is loaded first, or after the neighbour.
BEFORE: dict[tuple[str, str], Refused] = {
    **{(name, "peft"): _GONE for name in ("LoRA, fused", "LoRA, unloaded")},
    **{(name, "merged"): _MERGED for name in QUANTISED},
}
AFTER: dict[tuple[str, str], Refused] = {
    **{(name, "merged"): _MERGED for name in ("sequential offload", "group offload", "layerwise casting", *QUANTISED)},
    ("layerwise casting", "peft"): Refused(ErasureCompatibilityError, "float8", FLOAT8),
    **{
        (name, "peft"): Refused(ErasureCompatibilityError, "compiled model", COMPILED)
        for name in ("compiled blocks", "compiled transformer")
    },
}
# Offloaded, cast or fused weights are not those that were fused, which unloading says.
NOT_RESTORABLE = {(name, "merged") for name in ("LoRA, fused", "sequential offload", "layerwise casting")}
# diffusers loads a LoRA below these only where there is an accelerator.
ONLY_ON_GPU = {("model offload", "peft"), ("sequential offload", "peft")}
