"""All that relies on private names or habits of torch, accelerate, diffusers, peft and huggingface_hub; no other module may."""

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile`d one, or a `PeftModel`; itself where it is neither."""
    inner = child(module, "_orig_mod")  # without importing torch._dynamo, which takes a second
    module = inner if isinstance(inner, nn.Module) else module
    if type(module).__module__.startswith("peft.peft_model"):
        return module.get_base_model()  # type: ignore[operator]
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, or any of its submodules, was compiled, by `torch.compile(module)` or `module.compile()`."""
    return any("_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) for part in family(module))


def family(module: nn.Module, found: dict[nn.Module, nn.Module] | None = None) -> dict[nn.Module, nn.Module]:
    """A module, with itself, and all modules within it, each with the one around it; takes far less than `modules()`."""
    found = {module: module} if found is None else found
    for each in module._modules.values():
        if each is not None and each not in found:
            found[each] = module
            family(each, found)
    return found


def child(module: nn.Module, name: str) -> nn.Module | None:
    """A module's own submodule of a name; `getattr` would also find other attributes, and what a wrapper forwards to."""
    return module._modules.get(name)


def remove_child(module: nn.Module, name: str) -> None:
    """Take a module's own submodule away; see [`add_child`]."""
    module._modules = type(module._modules)(item for item in module._modules.items() if item[0] != name)


def add_child(module: nn.Module, name: str, child: nn.Module) -> None:
    """Give a module a submodule. Who goes through its submodules meanwhile, in another thread, has them as they were."""
    module._modules = type(module._modules)([*module._modules.items(), (name, child)])


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A module's own parameter of a name, as it is stored; `getattr` may compute one, as peft's wrappers do."""
    return module._parameters.get(name)


def name_or_path(model: Any) -> str:
    """The repository or folder which a pipeline or a model says it was loaded from; empty where it says none."""
    config = getattr(model, "config", None)
    # Not of the model where its configuration has the name: diffusers warns of that.
    name = getattr(config if hasattr(config, "_name_or_path") else model, "_name_or_path", None)
    return str(name) if isinstance(name, str) or hasattr(name, "__fspath__") else ""


def lora_components(pipe: Any) -> tuple[str, ...]:
    """The components that a pipeline loads LoRAs on; none where it loads no LoRAs."""
    return tuple(getattr(pipe, "_lora_loadable_modules", ()))


def untraced(function: Any) -> Any:
    """Let a function run as Python where torch.compile meets it as a frame of its own, as it does hooks of a compiled module.

    Errors leave it as they are then. Inside a larger graph it is traced like any other; `torch.compiler.disable` would break
    that graph.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # before torch 2.7
        return torch.compiler.disable(function)
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def forward_hooks(module: nn.Module) -> list[tuple[int, Any]]:
    """The hooks before and after a module's forward pass, each with its number."""
    return [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """A module's own tables of hooks of all kinds, and of what is noted about these, by their numbers."""
    endings = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
    return [each for name, each in vars(module).items() if name.endswith(endings) and isinstance(each, dict)]


def drop_forward_hooks(module: nn.Module, numbers: Iterable[int]) -> None:
    """Take hooks off by their numbers: those of a copied module have no handle of their own."""
    for number in numbers:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            hooks.pop(number, None)
        kwargs, always = module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called
        for flags in (kwargs, module._forward_hooks_with_kwargs, always):
            flags.pop(number, None)


PROMPT_ENCODERS = "encode_prompt", "_encode_prompt"  # the former name is the only one in some pipelines


def encodes_prompts(pipeline: type) -> bool:
    """Whether a pipeline class has a function that encodes prompts, which is given the user's `prompt_embeds` too."""
    return any(hasattr(pipeline, name) for name in PROMPT_ENCODERS)


def is_running(thread: int, module: nn.Module) -> bool:
    """Whether a thread is within a call of a module."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def graph_task() -> int:
    """The number of the way back on which the calling thread is; -1 outside of one."""
    return torch._C._current_graph_task_id()


def node_number() -> int:
    """The number of the node that the calling thread computes on the way back: it was given where the node was made."""
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else node._sequence_nr()


def next_node_number() -> int:
    """The number that the next node gets which the calling thread makes."""
    return torch._C._autograd._get_sequence_nr()


def after_backward(call: Callable[[], None]) -> None:
    """Have a function called when the way back is over on which the calling thread is; not where it breaks off."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def on_way_back(tensor: torch.Tensor, call: Callable[[Any], None]) -> None:
    """Have a function called when gradients of a tensor come; one that is saved goes without it, and without a warning."""
    tensor.register_hook(torch.utils.hooks.unserializable_hook(call))


def not_in_cuda_graphs() -> tuple[Any, ...]:
    """The tag of an operator that no CUDA graph may hold; empty where torch has none, see [`is_capturing`]."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)  # before torch 2.8
    return () if tag is None else (tag,)


def is_capturing() -> bool:
    """Whether a CUDA graph is captured now, so that nothing may be waited for."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def reset_compiled() -> None:
    """Forget compiled graphs: torch does not look at hooks again once a graph exists, unless [`watch_hooks`] was called."""
    torch.compiler.reset()


def watch_hooks() -> None:
    """Let torch look at hooks before it runs a compiled graph, in this process from now on; it costs next to nothing.

    By itself it does not, and one graph serves all modules of a class: that of a UNet without hooks would also run in one
    that has them, and that of a transformer block in the others.
    """
    config, name = import_module("torch._dynamo.config"), "skip_nnmodule_hook_guards"
    if getattr(config, name, False):
        setattr(config, name, False)
        config._config[name].default = False  # in other threads, which do not see what this one has set
        torch.compiler.reset()


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer that peft has wrapped, however often; the module itself where it is not wrapped."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def has_fused_projections(attention: nn.Module) -> bool:
    """Whether an attention calls its fused projection, and so neither `to_q` nor `to_k` nor `to_v`.

    `UNet2DConditionModel.unfuse_qkv_projections` leaves the flag set, and only puts the former processors back.
    """
    if not getattr(attention, "fused_projections", False):
        return False
    flag_is_reset = hasattr(attention, "unfuse_projections")
    return flag_is_reset or getattr(attention, "processor", None).__class__.__name__.startswith("Fused")


def is_group_offloaded(module: nn.Module) -> bool:
    """Whether diffusers' group offloading moves a module's weights, of which it holds copies of its own."""
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return bool(_is_group_offload_enabled(module))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate or diffusers keeps a module's weights elsewhere between its calls."""
    on_disk_or_cpu = any(parameter.device.type == "meta" for parameter in module.parameters())
    return on_disk_or_cpu or hasattr(module, "_hf_hook") or is_group_offloaded(module)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: under accelerate's offloading not where its weights lie."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


def offloaded_tensor(owner: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter that accelerate (sequential offload leaves a meta tensor), or a file, keeps away from its module."""
    if "kept_elsewhere" in vars(owner):
        return vars(owner)["kept_elsewhere"](name)
    hook: Any = getattr(owner, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        weights = getattr(part, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return None


def dequantized_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a Linear that bitsandbytes, torchao, HQQ or GGUF has packed, unpacked; `None` for other packings."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Any = own_parameter(module, "weight")
    if type(weight).__name__ == "GGUFParameter":
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        weight = dequantize_gguf_tensor(weight)
    else:
        weight = dequantize_module_weight(module)
    packed = type(weight) not in (torch.Tensor, nn.Parameter) or not weight.dtype.is_floating_point
    return None if packed else weight


def refused_adapter_versions() -> str | None:
    """The versions of transformers and peft, in words, where the former refuses adapters beside the latter."""
    import peft
    import transformers
    from packaging.version import Version
    from transformers.integrations import peft as integration

    least = getattr(integration, "MIN_PEFT_VERSION", None)
    if least is None or Version(peft.__version__) >= Version(least):
        return None
    return f"transformers {transformers.__version__} wants peft {least} or newer, and peft {peft.__version__} is installed"


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is what peft puts around a layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer in type(module).__mro__  # `isinstance` asks each of its subclasses


def is_lora(module: nn.Module) -> bool:
    """Whether a module is what peft puts around a layer for a LoRA."""
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def drops_base_output(tuner: Any) -> bool:
    """Whether one of peft's layers calls the layer that it wraps and then subtracts what it gave, as GLoRA does."""
    if not type(tuner).__module__.startswith("peft.tuners.glora.") or tuner.disable_adapters or tuner.merged:
        return False
    return any(name in tuner.glora_A for name in tuner.active_adapters)


def has_adapters(module: nn.Module) -> bool:
    """Whether peft has put adapters into a module, active or not."""
    return any(is_tuner(part) for part in family(module))


def exactly(names: Iterable[str]) -> str:
    """The `target_modules` of a peft configuration for these modules and no others: peft matches a text as a whole."""
    return "|".join(re.escape(name) for name in names)


def layers_with_adapter(module: nn.Module, name: str) -> dict[str, Any]:
    """peft's layers in a module that have the LoRA adapter `name`, by their paths.

    These do not tell of other tuners (LoHa, OFT) that wrap the layer, below which it is a `base_layer`.
    """
    from peft.tuners.lora import LoraLayer

    return {
        ".".join(step for step in path.split(".") if step != "base_layer"): part
        for path, part in unwrap_compiled(module).named_modules()
        if isinstance(part, LoraLayer) and name in part.lora_A
    }


def is_merged(layer: Any, name: str) -> bool:
    """Whether an adapter is merged into its layer's weight, and acts there."""
    return name in layer.merged_adapters


def adapter_acts(layer: Any, name: str) -> bool:
    """Whether an adapter takes part in its layer's forward pass, or is merged into its weight."""
    if layer.disable_adapters:  # a forward pass would unmerge as well
        return False
    if layer.merged:
        return is_merged(layer, name)
    return name in layer.active_adapters and layer.scaling[name] != 0


def adapter_scale(layer: Any, name: str) -> float:
    """By what an adapter's product of factors is multiplied."""
    return float(layer.scaling[name])


def switch_adapter_on(layer: Any, name: str, strength: float, wanted: list[str], *, rescale: bool = False) -> None:
    """Make an adapter act beside the active ones; where all are disabled, of those only the `wanted` come back.

    `requires_grad` of other adapters stays as it is, which `set_adapter` would change.
    """
    active = list(layer.active_adapters)
    if layer.disable_adapters:
        active = [each for each in active if each in wanted]
    # In front, where it is when it was loaded first: a DoRA scales what those before it have given.
    layer._active_adapter = active if name in active else [name, *active]
    layer._disable_adapters = False
    for half in (layer.lora_A[name], layer.lora_B[name]):
        half.requires_grad_(False)
    if rescale or layer.scaling[name] == 0:
        layer.set_scale(name, strength)


def adapter_tensors(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of an adapter, where accelerate keeps them; on the meta device where they cannot be read."""

    def stored(owner: nn.Module) -> torch.Tensor:
        weight = owner._parameters["weight"]
        assert weight is not None
        found = offloaded_tensor(owner, "weight") if weight.device.type == "meta" else None
        return weight if found is None else found

    return stored(layer.lora_A[name]), stored(layer.lora_B[name])


def version_of(tensor: torch.Tensor) -> int | None:
    """How often operations have written into a tensor, as torch counts; writes through `.data` are not counted."""
    return None if tensor.is_inference() else tensor._version


def is_plain_lora(layer: Any, name: str) -> bool:
    """Whether an adapter adds the product of two factors and nothing else: no DoRA, no bias, no dropout."""
    variant = name in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(name, False)
    return not variant and layer.lora_B[name].bias is None and isinstance(layer.lora_dropout[name], nn.Identity)


def write_adapter(layer: Any, name: str, factors: tuple[torch.Tensor, torch.Tensor], strength: float) -> None:
    """Make an adapter the plain product of these factors, in place where its tensors are large enough."""
    owners = layer.lora_A[name], layer.lora_B[name]
    rank = max(owners[0].weight.shape[0], factors[0].shape[0])
    for owner, factor, dim in zip(owners, factors, (0, 1), strict=True):
        live = owner.weight
        shape = [rank if place == dim else size for place, size in enumerate(factor.shape)]
        with torch.inference_mode(live.is_inference()), torch.no_grad():
            if list(live.shape) != shape:
                owner.weight = live = nn.Parameter(live.new_empty(shape), requires_grad=False)
            live.data.zero_()
            live.data.narrow(dim, 0, factor.shape[dim]).copy_(factor)
        owner.requires_grad_(False)
    getattr(layer, "lora_variant", {}).pop(name, None)
    getattr(layer, "use_dora", {}).pop(name, None)
    owners[1].register_parameter("bias", None)
    layer.lora_dropout[name] = nn.Identity()
    layer.r[name] = layer.lora_alpha[name] = rank
    layer.use_rslora[name] = False
    layer.set_scale(name, strength)


def call_after_hotswaps(call: Callable[[nn.Module], None]) -> None:
    """Have a function called with each model into which peft, for itself or for diffusers, has hotswapped an adapter.

    The tensors are written through `.data` there, which nothing else notes.
    """
    from peft.utils import hotswap

    swap = hotswap.hotswap_adapter_from_state_dict
    if hasattr(swap, "_diffusers_erasure"):
        return

    @functools.wraps(swap)
    def swap_and_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return swap(model, *args, **kwargs)
        finally:
            call(model)

    swap_and_call._diffusers_erasure = True  # type: ignore[attr-defined]
    hotswap.hotswap_adapter_from_state_dict = swap_and_call


def adapter_states(module: nn.Module) -> dict[Any, tuple[list[str], bool]]:
    """For each of peft's layers in a module the active adapters, and whether all are disabled."""
    layers: list[Any] = [part for part in family(module) if is_tuner(part)]
    return {layer: (list(layer.active_adapters), layer.disable_adapters) for layer in layers}


def restore_adapter_states(states: dict[Any, tuple[list[str], bool]]) -> None:
    """Undo what loading another adapter does to those that are there."""
    for layer, (active, disabled) in states.items():
        layer._active_adapter, layer._disable_adapters = active, disabled


def delete_adapter(module: nn.Module, name: str) -> None:
    """Delete an adapter; with the last one peft's wrappers go too."""
    from diffusers.loaders.lora_base import _remove_text_encoder_monkey_patch
    from diffusers.utils.peft_utils import delete_adapter_layers

    module = unwrap_compiled(module)
    if name in getattr(module, "peft_config", {}):
        if hasattr(module, "delete_adapters"):
            module.delete_adapters([name])  # type: ignore[operator]
        else:
            delete_adapter_layers(module, name)
    if has_adapters(module) and not getattr(module, "peft_config", None):
        if hasattr(module, "unload_lora"):
            module.unload_lora()  # type: ignore[operator]
        else:
            _remove_text_encoder_monkey_patch(module)


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the peft adapters that act in a module now (empty where none is loaded or all are disabled)."""
    return list(dict.fromkeys(name for active, off in adapter_states(module).values() if not off for name in active))


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Return `(name, owner, local name, parameter)` of a model's own parameters, named as if nothing was attached.

    peft's wrappers are looked through, and what peft, an IP-Adapter or this library has added is left out.
    `text_model.` is dropped from the front, because transformers 5 no longer has that level in CLIP's text encoder.
    """
    found: list[tuple[str, nn.Module, str, nn.Parameter]] = []

    def walk(part: nn.Module, prefix: str) -> None:
        part = base_layer(part) if is_tuner(part) else part
        for name, parameter in part._parameters.items():
            if parameter is not None:
                found.append((f"{prefix}{name}".removeprefix("text_model."), part, name, parameter))
        for name, child in part._modules.items():
            added = name in ("processor", "erasure_modules", *(() if prefix else ("encoder_hid_proj", "image_proj")))
            # `fuse_qkv_projections` adds copies, which stay after unfusing.
            added = added or (name in ("to_qkv", "to_kv", "to_added_qkv") and hasattr(part, "fused_projections"))
            if child is not None and not added:
                walk(child, f"{prefix}{name}.")

    walk(unwrap_compiled(module), "")
    return iter(found)


def with_values(module: nn.Module, values: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a module of no children with other parameters, without hooks and accelerate's `forward`."""
    found = copy.copy(module)
    vars(found).pop("forward", None)
    found._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    found._forward_hooks, found._forward_pre_hooks = type(module._forward_hooks)(), type(module._forward_hooks)()
    return found


@contextmanager
def accelerate_state_restored() -> Iterator[None]:
    """Within the block accelerate may be set up; afterwards it is set up no more, if it was not before.

    Its one state refuses an `Accelerator` with other options. That of several processes stays: they connect but once.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    fresh = not PartialState._shared_state
    try:
        yield
    finally:
        if fresh and PartialState._shared_state and PartialState().num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def hub_transport_error() -> type[Exception]:
    """The class of "no answer from the Hub": refused, cut or timed out. huggingface_hub does not wrap it in its own."""
    from huggingface_hub import utils

    client = getattr(utils, "httpx", None)  # whichever huggingface_hub was built with
    return (client or import_module("httpx")).TransportError  # before 1.33 it has no name for it
