"""What the coexistence matrix is made of: the forms of an erasure, each with the plain function that it must equal, what
people do to a pipeline, and the few pairs that are refused with a typed error.

To add a neighbour, add a `Neighbour` to `NEIGHBOURS`; a form, a `Form` to `FORMS`.
"""

import copy
import importlib.util
import io
import pickle
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    GGUFQuantizationConfig,
    LCMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.tuners.oft import OFTLayer
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from benchmarks.builders import share_weights
from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureError,
    Layer,
    prompt_embeds_are_erased,
    with_schedule,
)
from diffusers_erasure.low_rank import DOWN, UP
from diffusers_erasure.schema import LORA_FILE
from tests import test_activation, test_skip
from tests.helpers import (
    CONV_SITES,
    PROMPT,
    TEXT_SITES,
    UNET_SITES,
    cast_to_float8,
    dense_edit,
    images,
    random_erasure,
    random_gates,
    rows_of,
    style_lora,
    tiny_sd_pipe,
)


Step = Callable[[Any], Any]
NAME = "no-zebra"
GPU = "cuda" if torch.cuda.is_available() else None


# ------------------------------------------------------------------------------------------------- tiny pipelines


@cache
def _tiny() -> Any:
    return tiny_sd_pipe()


def copy_of(pipe: Any) -> Any:
    """A deep copy that shares what does not change: the tokenizer, loaded erasures, and the decoder."""
    shared = [pipe.tokenizer, pipe.vae, *(form.erasure() for form in FORMS.values())]
    return copy.deepcopy(pipe, {id(each): each for each in shared})


class Stamp(pickle.Pickler):
    """Makes copies of one pipeline, as `copy_of` does, in a fifth of its time: most of a matrix is copies."""

    def __init__(self, pipe: Any) -> None:
        self.written = io.BytesIO()
        super().__init__(self.written, protocol=5)
        self.kept = [pipe.tokenizer, pipe.vae, *(form.erasure() for form in FORMS.values())]
        self.places = {id(each): place for place, each in enumerate(self.kept)}
        self.dump(pipe)

    def persistent_id(self, value: Any) -> int | None:
        """Tensors and what is shared stay outside."""
        if isinstance(value, torch.Tensor) and id(value) not in self.places:
            self.places[id(value)] = len(self.kept)
            self.kept.append(value)
        return self.places.get(id(value))

    def copy(self) -> Any:
        """A new copy."""
        return _Print(self).load()


class _Print(pickle.Unpickler):
    def __init__(self, stamp: Stamp) -> None:
        super().__init__(io.BytesIO(stamp.written.getvalue()))
        self.kept, self.copies = stamp.kept, dict[int, torch.Tensor]()

    def persistent_load(self, place: int) -> Any:
        value = self.kept[place]
        if not isinstance(value, torch.Tensor):
            return value
        if place not in self.copies:
            copied = value.detach().clone()
            whole = isinstance(value, nn.Parameter)
            self.copies[place] = nn.Parameter(copied, value.requires_grad) if whole else copied
        return self.copies[place]


@cache
def _tiny_stamp() -> Stamp:
    return Stamp(_tiny())


def base() -> Any:
    """A pipeline without an erasure."""
    return _tiny_stamp().copy()


@cache
def folder() -> Path:
    """A folder for the files of this process; it goes with the process."""
    place = tempfile.TemporaryDirectory(prefix="diffusers-erasure-matrix-")
    _HELD.append(place)
    return Path(place.name)


_HELD: list[Any] = []


# ------------------------------------------------------------------------------------------------ plain functions
#
# What a layer computes, without hooks: `forward` of a module is replaced by a function.


def before(module: Any, function: Callable[..., Any]) -> None:
    """Let `function` change what a module's `forward` is called with: it is given the forward and the arguments."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: function(forward, *args, **kwargs)


class Now:
    """The timestep of the pass."""

    def __init__(self, unet: Any) -> None:
        self.timestep = torch.tensor(0.0)
        before(unet, self.note)

    def note(self, forward: Any, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        self.timestep = torch.as_tensor(timestep).float().reshape(-1)
        return forward(sample, timestep, *args, **kwargs)


def plain_map(pipe: Any, erasure: Erasure) -> Any:
    """x + D^T A x on the text rows."""
    (layer,) = erasure.config.layers
    tensors = erasure.layer_tensors(layer)
    edit = (tensors["D"].double().T @ tensors["A"].double()).float()

    def call(forward: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        rows = encoder_hidden_states
        return forward(sample, timestep, rows + rows @ edit.T.to(rows), **kwargs)

    before(pipe.unet, call)
    return pipe


def plain_gates(pipe: Any, erasure: Erasure) -> Any:
    """x + sum over open gates of (x A^T) D on the text rows, where a gate is open if a row is far along its probe."""
    (layer,) = erasure.config.layers
    tensors = erasure.layer_tensors(layer)

    def call(forward: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        rows = encoder_hidden_states
        reached = (rows.float() @ tensors["probes"].T.to(rows.device)).amax(1)
        maps = (tensors[name].split(tensors["counts"].int().tolist()) for name in "AD")
        edits = zip(reached.T, tensors["thresholds"].sum(1), *maps, strict=True)
        change = sum(
            (value > limit)[:, None, None] * (rows @ a.T.to(rows) @ d.to(rows)) for value, limit, a, d in edits
        )
        return forward(sample, timestep, rows + change, **kwargs)

    before(pipe.unet, call)
    return pipe


def plain_sums(pipe: Any, erasure: Erasure, table: Sequence[float] | None = None) -> Any:
    """W x + s(t) (B A) x at each site."""
    now = Now(pipe.unet)
    for layer in erasure.config.layers:
        tensors = erasure.layer_tensors(layer)
        for site in layer.sites:
            module: Any = pipe.unet.get_submodule(site)
            down, up = tensors[site + DOWN].double(), tensors[site + UP].double()
            delta = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]).float()
            shape = {name: getattr(module, name) for name in ("stride", "padding")} if delta.ndim == 4 else {}

            def call(forward: Any, x: Any, *args: Any, delta: Any = delta, shape: Any = shape) -> Any:
                y = forward(x, *args)
                product = (F.conv2d if shape else F.linear)(x, delta.to(x), **shape)
                return y + (1.0 if table is None else table[int(now.timestep) * len(table) // 1000]) * product.to(y)

            before(module, call)
    return pipe


def plain_patches(pipe: Any, plan: test_activation.Plan) -> Any:
    """x + m(t) (mu(t) - x) at each site, of the nearest stored timestep."""
    now = Now(pipe.unet)
    for site, mask in plan.masks.items():

        def call(forward: Any, x: Any, *args: Any, mask: Any = mask, site: str = site) -> Any:
            nearest = int((plan.timesteps - now.timestep.to("cpu")).abs().argmin())
            return forward(torch.where(mask[nearest].to(x.device), plan.means[site][nearest].to(x), x), *args)

        before(pipe.unet.get_submodule(site), call)
    return pipe


def plain_network(pipe: Any) -> Any:
    """What a stock `ControlNetModel` without a hint gives is added to the residuals that the UNet is called with."""
    stock = _stock_network()

    def call(forward: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        fits = stock.dtype == sample.dtype and stock.device == sample.device
        network = stock if fits else copy.deepcopy(stock).to(sample.device, sample.dtype)
        hint = torch.zeros(len(sample), 3, 64, 64, dtype=sample.dtype, device=sample.device)
        down, mid = network(sample, timestep, encoder_hidden_states, controlnet_cond=hint, return_dict=False)
        names = "down_block_additional_residuals", "mid_block_additional_residual"
        given = [kwargs.pop(name, None) for name in names]
        if given[1] is not None:
            down, mid = [a + b for a, b in zip(down, given[0], strict=True)], mid + given[1]
        return forward(sample, timestep, encoder_hidden_states, **kwargs, **dict(zip(names, (down, mid), strict=True)))

    before(pipe.unet, call)
    return pipe


# ---------------------------------------------------------------------------------------------------------- forms


@cache
def low_rank() -> Erasure:
    """On Linears and convolutions of the UNet, and on the text encoder."""
    return random_erasure(_tiny(), "lora", (*UNET_SITES, *CONV_SITES[:2], *TEXT_SITES[1:]), size=0.5)


@cache
def mapped() -> Erasure:
    return random_erasure(_tiny(), "text_map")


@cache
def gated() -> Erasure:
    """With a gate that every prompt opens, by its start token, and one that none does; both would change the picture."""
    rows = rows_of(_tiny())
    layer = Layer("gated_map", ("encoder_hidden_states",), random_gates(rows[0, 0], size=2.0), "unet")
    return Erasure.from_layers([layer], base=_tiny(), concepts=["zebra", "gnu"], method="random")


@cache
def patches() -> tuple[test_activation.Plan, Erasure]:
    plan = test_activation.make_plan((*test_activation.FF, *test_activation.ATTENTION[:2]))
    return plan, test_activation.as_erasure(plan, pipe=_tiny())


@cache
def network() -> Erasure:
    return test_skip.erasure_of("full")


@cache
def _stock_network() -> Any:
    return test_skip.stock_network(_tiny().unet, test_skip.tensors_of(network()))


TABLE = (0.2, 1.0, 0.6)


@cache
def scheduled() -> tuple[Erasure, Erasure]:
    """Without and with its schedule."""
    plain = random_erasure(_tiny(), "lora", (*UNET_SITES, *CONV_SITES[:2]), size=0.7)
    return plain, with_schedule(plain, list(TABLE))


@dataclass(frozen=True)
class Form:
    """One way in which an erasure acts.

    Attributes:
        erasure: makes it.
        plain: turns a pipeline without hooks into what must come out; before a neighbour joins it.
        backend: of `load_erasure`.
        twin: forms with the same name here have the same plain pipeline, which is drawn once.
    """

    erasure: Callable[[], Erasure]
    plain: Step
    backend: str = "hook"
    twin: str = ""

    def load(self, pipe: Any) -> None:
        """Load the erasure into a pipeline."""
        pipe.load_erasure(self.erasure(), NAME, backend=self.backend, strict_base="ignore")


@cache
def _edited(make: Callable[[], Erasure]) -> Stamp:
    return Stamp(dense_edit(_tiny(), make()))


def dense(make: Callable[[], Erasure], pipe: Any) -> Any:
    """A pipeline with the edited weights, instead of one that is as it was or has others."""
    unchanged = all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), _tiny().unet.parameters(), strict=True))
    return _edited(make).copy() if unchanged else dense_edit(pipe, make())


FORMS: dict[str, Form] = {
    "lora by hooks": Form(low_rank, partial(dense, low_rank), twin="low rank"),
    "merged": Form(low_rank, partial(dense, low_rank), "merge", twin="low rank"),
    "peft": Form(low_rank, partial(dense, low_rank), "peft", twin="low rank"),
    "text_map": Form(mapped, partial(dense, mapped)),
    "gated_map": Form(gated, lambda pipe: plain_gates(pipe, gated())),
    "activation": Form(lambda: patches()[1], lambda pipe: plain_patches(pipe, patches()[0])),
    "skip": Form(network, plain_network),
    "scheduled": Form(lambda: scheduled()[1], lambda pipe: plain_sums(pipe, scheduled()[0], TABLE)),
}


@cache
def _loaded(form: str) -> Stamp:
    pipe = base()
    FORMS[form].load(pipe)
    return Stamp(pipe)


def erased(form: str) -> Any:
    """A pipeline with an erasure."""
    return _loaded(form).copy()


# ----------------------------------------------------------------------------------------------- orders of sums


class ReversedSums(TorchFunctionMode):
    """Within the block every matrix product, convolution and attention is summed in the opposite order.

    In exact arithmetic nothing changes, whatever the pipeline is and whatever was done to it.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (F.linear, F.conv2d) and len(args) > 1:
            x, weight, *rest = args
            dim = -1 if function is F.linear else 1
            if function is F.linear or kwargs.get("groups", 1) == 1:
                return function(x.flip(dim), weight.flip(dim), *rest, **kwargs)
        if function in (torch.matmul, torch.bmm, torch.Tensor.__matmul__, torch.Tensor.matmul):
            return function(args[0].flip(-1), args[1].flip(-2), *args[2:], **kwargs)
        if function is torch.baddbmm:
            return function(args[0], args[1].flip(-1), args[2].flip(-2), *args[3:], **kwargs)
        if function is F.scaled_dot_product_attention and not kwargs.get("is_causal"):
            query, key, value, *rest = args
            mask = rest[0] if rest else kwargs.get("attn_mask")
            if mask is None:
                return function(query.flip(-1), key.flip(-2, -1), value.flip(-2), *rest, **kwargs)
        return function(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------- neighbours


@dataclass(frozen=True)
class Neighbour:
    """What people do to a pipeline.

    Attributes:
        do: does it; where it gives another pipeline, that one draws. By default nothing.
        arguments: with which the pipeline then draws, made from it.
        plain_do: the same for the plain pipeline, where that is another thing.
        first: whether an erasure can only be loaded after it.
        reads_text: whether it adds to what reads the text rows, so that a text map gives (W + U) T.
        changes: whether it changes the picture itself, by more than roundings.
        decoder: whether it does something to the decoder.
        plain: for some forms another plain pipeline, with the neighbour on it.
        plain_after: the same, where the erasure is loaded after it.
        draw: what is called instead of the pipeline.
        coarse: the two evaluations whose difference bounds the error, where weights are stored in half precision.
        needs: a package.
        on_gpu: whether it needs an accelerator.
        slow: whether it takes long.
    """

    do: Step = lambda pipe: pipe
    arguments: Callable[[Any], Mapping[str, Any]] = lambda pipe: {}
    plain_do: Step | None = None
    first: bool = False
    reads_text: bool = False
    changes: bool = True
    decoder: bool = False
    plain: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    plain_after: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    draw: Callable[..., np.ndarray] = images
    coarse: Callable[[], tuple[Any, Any]] | None = None
    needs: str | None = None
    on_gpu: bool = False
    slow: bool = False

    def why_not(self) -> str | None:
        """Why it cannot run here."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return "there is no CUDA device" if self.on_gpu and GPU is None else None

    def joins(self, pipe: Any, plain: bool = False) -> Any:
        """Do it to a pipeline; returns the one that draws."""
        if self.decoder:
            pipe.vae = copy.deepcopy(pipe.vae)
        do = self.plain_do if plain and self.plain_do is not None else self.do
        return do(pipe) or pipe

    def drawn(self, pipe: Any) -> np.ndarray:
        """What the pipeline draws beside it."""
        pipe.set_progress_bar_config(disable=True)
        return self.draw(pipe, **{"num_inference_steps": 2, **self.arguments(pipe)})

    def plainly(self, form: str, after: bool = False) -> Any:
        """The plain pipeline of a form, with the neighbour; `after` where the order of loading counts."""
        if after and form in self.plain_after:
            return self.plain_after[form]()
        if form in self.plain:
            return self.plain[form]()
        if self.reads_text and form == "text_map":
            return self.joins(plain_map(base(), mapped()), plain=True)
        if self.first:
            return FORMS[form].plain(self.joins(base(), plain=True))
        return self.joins(FORMS[form].plain(base()), plain=True)


# LoRAs and their kin


@cache
def _style() -> dict[str, torch.Tensor]:
    return style_lora(_tiny(), endings=("attn1.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "conv_in"))


def load_lora(pipe: Any) -> None:
    pipe.load_lora_weights(dict(_style()), adapter_name="style")


def load_dora(pipe: Any) -> None:
    """A file in peft's format, with the magnitudes."""
    state_dict = {name: value for name, value in _style().items() if "attn" in name and name.startswith("unet.")}
    for name in [name for name in state_dict if name.endswith(DOWN)]:
        site = name.removeprefix("unet.").removesuffix(DOWN)
        norm = _tiny().unet.get_submodule(site).weight.detach().norm(dim=1)
        scales = 1 + 0.5 * torch.rand(len(norm), generator=torch.Generator().manual_seed(len(state_dict)))
        state_dict[f"unet.{site}.lora_magnitude_vector"] = norm * scales
    pipe.load_lora_weights(state_dict, adapter_name="style")


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TUNERS = {
    "rsLoRA": lambda: LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=TARGETS),
    "LoHa": lambda: LoHaConfig(r=2, alpha=2, target_modules=TARGETS),
    "LoKr": lambda: LoKrConfig(r=2, alpha=2, target_modules=TARGETS),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
}


def inject(kind: str) -> Step:
    """Put a tuner of peft's into the UNet, with random weights that depend on their names alone."""

    def do(pipe: Any) -> None:
        config = TUNERS[kind]()
        if kind == "rsLoRA":
            pipe.unet.add_adapter(config, "style")
        else:
            inject_adapter_in_model(config, pipe.unet, "style")
        for name, parameter in pipe.unet.named_parameters():
            if ".style" in name and not name.endswith("base_layer.weight"):
                clean = name.replace("base_layer.", "")
                generator = torch.Generator().manual_seed(zlib.crc32(clean.encode()))
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
        pipe.unet.requires_grad_(False)

    return do


def load_stock(pipe: Any) -> None:
    """The erasure as a stock LoRA."""
    pipe.load_lora_weights(dict(low_rank().tensors[LORA_FILE]), adapter_name=NAME)


def stock_before_dora() -> Any:
    """A pipeline with the erasure as a stock LoRA, and the DoRA after it, both on."""
    pipe = base()
    load_stock(pipe)
    load_dora(pipe)
    pipe.unet.set_adapters([NAME, "style"])
    return pipe


def stock_around_oft() -> Any:
    """A pipeline with the erasure as a stock LoRA around an OFT: W R + B A, where below it is (W + B A) R."""
    pipe = base()
    inject("OFT")(pipe)
    load_stock(pipe)
    for layer in pipe.unet.modules():
        if isinstance(layer, OFTLayer):
            layer.set_adapter("style")
    return pipe


# Image prompts, control, guidance


@cache
def _ip_adapter() -> Path:
    """A file with random weights: four image tokens, and keys and values for each cross-attention."""
    generator, unet = torch.Generator().manual_seed(5), _tiny().unet
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * 32, 16, generator=generator) / 4,
        "image_proj.proj.bias": torch.randn(4 * 32, generator=generator) / 4,
        "image_proj.norm.weight": torch.ones(32),
        "image_proj.norm.bias": torch.zeros(32),
    }
    for index, name in enumerate(unet.attn_processors):  # a key of the file counts them all
        if name.endswith("attn2.processor"):
            shape = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
            for part in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{index}.{part}.weight"] = torch.randn(shape, generator=generator) / 4
    save_file(tensors, folder() / "ip.safetensors")
    return folder()


def load_ip_adapter(pipe: Any) -> None:
    pipe.load_ip_adapter(str(_ip_adapter()), subfolder="", weight_name="ip.safetensors", image_encoder_folder=None)


def picture(seed: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


@cache
def _control() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        net = ControlNetModel.from_unet(_tiny().unet, conditioning_embedding_out_channels=(8, 16)).eval()
        for part in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            nn.init.normal_(part.weight, std=0.2)
        net.controlnet_cond_embedding.conv_in.weight.data.mul_(3)
    return net


def add_controlnet(pipe: Any) -> Any:
    return StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=copy.deepcopy(_control()))


@cache
def _adapter() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        return T2IAdapter(in_channels=3, channels=[32], num_res_blocks=1, downscale_factor=4).eval()


def add_t2i_adapter(pipe: Any) -> Any:
    return StableDiffusionAdapterPipeline.from_pipe(pipe, adapter=copy.deepcopy(_adapter()))


def perturbed_attention(pipe: Any) -> Any:
    return AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers=["mid", "up_blocks.0"])


def self_attention_guidance(pipe: Any) -> Any:
    return StableDiffusionSAGPipeline.from_pipe(pipe)


# What makes pipelines fast


def deep_cache(pipe: Any) -> None:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()


def merge_tokens(pipe: Any) -> None:
    import tomesd

    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=2, use_rand=False)


def compile_blocks(pipe: Any) -> None:
    torch.compiler.reset()  # torch counts the graphs of a class, whichever pipelines they are of
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")


def compile_unet(pipe: Any) -> None:
    torch.compiler.reset()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")


# Where weights are and how they are stored


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device=GPU or "cpu")


def sequential_offload(pipe: Any) -> None:
    """On a CPU what diffusers does to each model, for accelerate refuses a whole pipeline there."""
    if GPU is not None:
        pipe.enable_sequential_cpu_offload(device=GPU)
        return
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(model, "cpu")


def group_offload(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=torch.device(GPU or "cpu"), offload_type="leaf_level")


def float8_weights(pipe: Any) -> Any:
    """The pipeline with the weights that layerwise casting leaves, in float32."""
    cast = copy_of(pipe)
    cast_to_float8(cast)
    for name, value in pipe.unet.state_dict().items():
        value.copy_(cast.unet.state_dict()[name].float())
    return pipe


def _plainly_after(step: Step, form: str) -> Any:
    return FORMS[form].plain(step(base()))


def merged_and_cast() -> Any:
    pipe = FORMS["merged"].plain(base())
    cast_to_float8(pipe)
    return pipe


# Text


def invert_text(pipe: Any) -> None:
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(4)) * 5
    pipe.load_textual_inversion({"<thing>": vectors})


def images_with_clip_skip(pipe: Any, **arguments: Any) -> np.ndarray:
    """diffusers looks for a level which the text encoder lost in transformers 5; meanwhile it has it."""
    own = vars(pipe.text_encoder)
    own.update({} if hasattr(pipe.text_encoder, "text_model") else {"text_model": pipe.text_encoder})
    try:
        return images(pipe, **arguments, clip_skip=1)
    finally:
        own.pop("text_model", None)


def _encoded(pipe: Any, text: str) -> torch.Tensor:
    """[1, 77, C]: encoded by hand, as weighting libraries do."""
    ids = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def long_prompt(pipe: Any) -> dict[str, torch.Tensor]:
    parts = [_encoded(pipe, text) for text in (PROMPT, "on a wooden table, in the morning")]
    return {"prompt_embeds": torch.cat(parts, 1), "negative_prompt_embeds": torch.cat([_encoded(pipe, "")] * 2, 1)}


def weighted_prompt(pipe: Any) -> dict[str, torch.Tensor]:
    rows = _encoded(pipe, PROMPT)
    weights = torch.ones(rows.shape[1], 1).index_fill(0, torch.tensor([5, 6]), 1.4)
    return {"prompt_embeds": rows * weights, "negative_prompt_embeds": _encoded(pipe, "")}


def images_of_own_rows(pipe: Any, **arguments: Any) -> np.ndarray:
    with prompt_embeds_are_erased(pipe):
        return images(pipe, **arguments)


# Pipelines, files and copies


def with_scheduler(kind: Any, **options: Any) -> Step:
    def do(pipe: Any) -> None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)

    return do


def stop_guiding(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    """After the first step: no guidance, as `callback_on_step_end` allows, and stronger latents."""
    if step > 0:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1], "latents": given["latents"] * 1.1}


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
PLACES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_layout(unet: Any) -> dict[str, torch.Tensor]:
    """The tiny UNet's weights by the names of the original code."""
    result = {}
    for name, value in unet.state_dict().items():
        ours, theirs = next(pair for pair in PLACES.items() if name.startswith(pair[0] + "."))
        rest = name.removeprefix(ours + ".")
        if ".resnets." in name:
            part, _, kind = rest.partition(".")
            rest = f"{RESNET[part]}.{kind}"
        result[f"model.diffusion_model.{theirs}.{rest}"] = value.contiguous()
    return result


@cache
def _files() -> Path:
    """The tiny pipeline as people share it: one file in the original layout, and the UNet quantised in GGUF."""
    import gguf

    _tiny().save_pretrained(folder() / "pipe")
    tensors = original_layout(_tiny().unet)
    save_file(tensors, folder() / "model.safetensors")
    writer = gguf.GGUFWriter(str(folder() / "unet.gguf"), "sd1")
    for name, value in tensors.items():
        packed = value.ndim == 2 and "transformer_blocks" in name
        kind = gguf.GGMLQuantizationType.Q8_0 if packed else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(value.numpy(), kind) if packed else value.numpy()
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder()


def single_file(pipe: Any) -> Any:
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return StableDiffusionPipeline.from_single_file(
        str(_files() / "model.safetensors"), config=str(_files() / "pipe"), **parts
    )


@cache
def _quantised() -> Any:
    return UNet2DConditionModel.from_single_file(
        str(_files() / "unet.gguf"),
        config=str(_files() / "pipe"),
        subfolder="unet",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )


def quantise(pipe: Any) -> None:
    pipe.unet = share_weights(_quantised())  # packed weights cannot be copied


def unpack(pipe: Any) -> None:
    """The plain pipeline with the weights that GGUF left, unpacked."""
    weights = {
        name + ".weight": dequantize_gguf_tensor(module.weight)
        for name, module in _quantised().named_modules()
        if isinstance(module, GGUFLinear) and hasattr(module.weight, "quant_type")
    }
    pipe.unet.load_state_dict(weights, strict=False)


def half_and_single() -> tuple[Any, Any]:
    """One pipeline, whose weights float16 can hold, computed in float16 and in float32."""
    half, single = (copy.deepcopy(base()).to(torch.float16) for _ in range(2))
    return half, single.to(torch.float32)


NEIGHBOURS: dict[str, Neighbour] = {
    "LoRA": Neighbour(load_lora, reads_text=True),
    **{kind: Neighbour(inject(kind), reads_text=True) for kind in ("rsLoRA", "LoHa", "LoKr")},
    "OFT": Neighbour(inject("OFT"), reads_text=True, plain_after={"peft": stock_around_oft}),
    "DoRA": Neighbour(load_dora, reads_text=True, plain=dict.fromkeys(("lora by hooks", "peft"), stock_before_dora)),
    "IP-Adapter": Neighbour(
        load_ip_adapter,
        lambda pipe: {"ip_adapter_image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(6))]},
    ),
    "ControlNet": Neighbour(add_controlnet, lambda pipe: {"image": picture()}),
    "T2I-Adapter": Neighbour(add_t2i_adapter, lambda pipe: {"image": picture()}),
    "PAG": Neighbour(perturbed_attention, lambda pipe: {"pag_scale": 2.0}),
    "FreeU": Neighbour(lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
    "SAG": Neighbour(self_attention_guidance, lambda pipe: {"sag_scale": 0.8}),
    "DeepCache": Neighbour(deep_cache, lambda pipe: {"num_inference_steps": 4}, needs="DeepCache"),
    "ToMe": Neighbour(merge_tokens, needs="tomesd"),
    "model offload": Neighbour(model_offload, changes=False, decoder=True),
    "sequential offload": Neighbour(sequential_offload, changes=False, decoder=True),
    "group offload": Neighbour(group_offload, changes=False, decoder=True),
    "layerwise casting": Neighbour(
        cast_to_float8,
        plain={
            form: merged_and_cast if form == "merged" else partial(_plainly_after, float8_weights, form)
            for form in FORMS
        },
    ),
    "channels_last": Neighbour(lambda pipe: pipe.unet.to(memory_format=torch.channels_last) and None, changes=False),
    "attention slicing": Neighbour(lambda pipe: pipe.enable_attention_slicing(1), changes=False),
    "VAE slicing and tiling": Neighbour(
        lambda pipe: (pipe.vae.enable_slicing(), pipe.vae.enable_tiling())[2:], changes=False, decoder=True
    ),
    "compiled blocks": Neighbour(compile_blocks, plain_do=lambda pipe: pipe, changes=False),
    "compiled UNet": Neighbour(compile_unet, plain_do=lambda pipe: pipe, changes=False, slow=True),
    "textual inversion": Neighbour(invert_text, lambda pipe: {"prompt": "a photo of a <thing>"}),
    "clip skip": Neighbour(draw=images_with_clip_skip),
    "long embeddings": Neighbour(arguments=long_prompt, draw=images_of_own_rows),
    "weighted embeddings": Neighbour(arguments=weighted_prompt, draw=images_of_own_rows),
    "img2img": Neighbour(
        lambda pipe: StableDiffusionImg2ImgPipeline.from_pipe(pipe),
        lambda pipe: {"image": picture(), "strength": 0.8, "num_inference_steps": 3},
    ),
    "inpainting": Neighbour(
        lambda pipe: StableDiffusionInpaintPipeline.from_pipe(pipe),
        lambda pipe: {"image": picture(), "mask_image": picture(9)[:, :1].round(), "height": 16, "width": 16},
    ),
    "LCM": Neighbour(with_scheduler(LCMScheduler), lambda pipe: {"guidance_scale": 1.0, "num_inference_steps": 2}),
    "Turbo": Neighbour(
        with_scheduler(EulerAncestralDiscreteScheduler, timestep_spacing="trailing"),
        lambda pipe: {"guidance_scale": 0.0, "num_inference_steps": 1},
    ),
    "from_single_file": Neighbour(single_file, first=True, changes=False),
    "callbacks": Neighbour(
        arguments=lambda pipe: {
            "callback_on_step_end": stop_guiding,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds", "latents"],
        }
    ),
    "bfloat16": Neighbour(lambda pipe: pipe.to(torch.bfloat16), changes=False, decoder=True),
    "float16 and back": Neighbour(
        lambda pipe: pipe.to(torch.float16).to(torch.float32), changes=False, decoder=True, coarse=half_and_single
    ),
    "CUDA and back": Neighbour(lambda pipe: pipe.to("cuda").to("cpu"), on_gpu=True, changes=False, decoder=True),
    "deepcopy": Neighbour(copy_of, plain_do=lambda pipe: pipe, changes=False),
    "pickle": Neighbour(lambda pipe: pickle.loads(pickle.dumps(pipe)), plain_do=lambda pipe: pipe, changes=False),
    "GGUF": Neighbour(quantise, plain_do=unpack, first=True, needs="gguf"),
}


# ----------------------------------------------------------------------------------------------- what is refused


@dataclass(frozen=True)
class Refused:
    """A pair that raises a typed error.

    Attributes:
        error: its class.
        match: what its message says.
        reason: why, in a sentence for the table.
    """

    error: type[ErasureError]
    match: str
    reason: str


PACKED = "packed and offloaded weights cannot be written; an erasure acts on them by hooks"
PACKED_ADAPTER = "stock adapters take float8 from the weights and cannot compute in it; load the erasure first"
NO_LORAS = "diffusers loads no LoRAs into this pipeline; load the erasure before `from_pipe`"
COMPILED = "an adapter is a change of modules; load the erasure before compiling"

_MERGED = Refused(ErasureCompatibilityError, "cannot be fused", PACKED)
BEFORE: dict[tuple[str, str], Refused] = {("GGUF", "merged"): _MERGED}  # the erasure is loaded first, where it can be
AFTER: dict[tuple[str, str], Refused] = {
    **{(name, "merged"): _MERGED for name in ("sequential offload", "group offload", "layerwise casting")},
    ("layerwise casting", "peft"): Refused(ErasureCompatibilityError, "float8", PACKED_ADAPTER),
    **{
        (name, "peft"): Refused(ErasureCompatibilityError, "loads no LoRAs", NO_LORAS)
        for name in ("T2I-Adapter", "SAG")
    },
    **{
        (name, "peft"): Refused(ErasureCompatibilityError, "compiled model", COMPILED)
        for name in ("compiled blocks", "compiled UNet")
    },
}
# Offloaded, cast or moved weights are not those that were fused, which unloading says.
NOT_RESTORABLE = {
    (name, "merged")
    for name in ("sequential offload", "group offload", "layerwise casting", "bfloat16", "float16 and back")
}
# diffusers loads a LoRA below these only where there is an accelerator.
ONLY_ON_GPU = {("model offload", "peft"), ("sequential offload", "peft")}
