"""Everything that relies on private names or habits of torch, accelerate, diffusers and peft.

No other module of the library imports or reads a private name of another library.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile`d one (itself where it is not compiled)."""
    inner = getattr(module, "_orig_mod", None)  # without importing torch._dynamo, which takes a second
    return inner if isinstance(inner, nn.Module) else module


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, or any of its submodules, was compiled, by `torch.compile(module)` or `module.compile()`."""
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def reset_compiled() -> None:
    """Forget compiled graphs: torch does not look at hooks again once a graph exists (`skip_nnmodule_hook_guards`)."""
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
    return flag_is_reset or type(getattr(attention, "processor", None)).__name__.startswith("Fused")


def offloaded_tensor(owner: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter that accelerate keeps away from its module (sequential offload leaves a meta tensor there)."""
    hook: Any = getattr(owner, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        weights = getattr(part, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return None


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the peft adapters that act in a module now (empty where none is loaded or all are disabled)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: dict[str, None] = {}
    for part in module.modules():
        if isinstance(part, BaseTunerLayer) and not part.disable_adapters:
            names.update(dict.fromkeys(part.active_adapters))
    return list(names)


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield `(name, owner, local name, parameter)` of a model's own parameters, named as if nothing was attached.

    peft's wrappers are looked through, and what peft, an IP-Adapter or this library has added is left out.
    `text_model.` is dropped from the front, because transformers 5 no longer has that level in CLIP's text encoder.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def walk(part: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
        part = base_layer(part) if isinstance(part, BaseTunerLayer) else part
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield f"{prefix}{name}".removeprefix("text_model."), part, name, parameter
        for name, child in part._modules.items():
            added = name in ("processor", "erasure_modules") or (not prefix and name == "encoder_hid_proj")
            # `fuse_qkv_projections` adds copies, which stay after unfusing.
            added = added or (name in ("to_qkv", "to_kv", "to_added_qkv") and hasattr(part, "fused_projections"))
            if child is not None and not added:
                yield from walk(child, f"{prefix}{name}.")

    yield from walk(unwrap_compiled(module), "")
