"""Loading a base model by name, for the command line: a folder, a repository, or a tiny model (`demo`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers_erasure.errors import ErasureInputError, ErasureNotFoundError

from .completion import TINY


if TYPE_CHECKING:
    import torch

Offload = Literal["none", "model", "sequential"]
DTYPES = ("auto", "float32", "float16", "bfloat16")


def load_base(
    base: str = "demo",
    *,
    device: str | None = None,
    dtype: str = "auto",
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    offload: Offload = "none",
    half: "torch.dtype | None" = None,
) -> Any:
    """Load a base model.

    Args:
        base (`str`, *optional*, defaults to `"demo"`): a folder, a repository id, or one of `TINY`.
        device (`str`, *optional*): by default an accelerator where there is one.
        dtype (`str`, *optional*, defaults to `"auto"`): `"float32"`, `"float16"`, `"bfloat16"`; `"auto"` is float16 on
            an accelerator and float32 on the CPU, and float32 for the tiny models.
        variant (`str`, *optional*): as in `from_pretrained`, for example `"fp16"`.
        revision (`str`, *optional*): branch, tag or commit.
        token (`str`, *optional*): token for private and gated repositories.
        offload (`"none"`, `"model"` or `"sequential"`, *optional*): offload to the CPU between uses.
        half (`torch.dtype`, *optional*): what `"auto"` is on an accelerator instead of float16.

    Raises:
        ErasureInputError: a device, dtype or combination that does not exist.
        ErasureNotFoundError: there is no such model, or it lies in a checkout alone.
    """
    import torch

    if dtype not in DTYPES:
        raise ErasureInputError(f"`--dtype` must be one of {DTYPES}, not {dtype!r}.")
    if offload not in ("none", "model", "sequential"):
        raise ErasureInputError(f'`--offload` must be "none", "model" or "sequential", not {offload!r}.')
    device = device or _best_device()
    kind = _usable(device)
    by_default = (half or torch.float16) if kind != "cpu" and base not in TINY else torch.float32
    torch_dtype = by_default if dtype == "auto" else getattr(torch, dtype)
    if base in TINY:
        from diffusers_erasure.demo import load_pipeline

        pipe: Any = load_pipeline(TINY[base], torch_dtype)
    else:
        pipe = _from_pretrained(base, torch_dtype, variant, revision, token)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _usable(device: str) -> str:
    """The type of a device, once a tensor could be put there.

    Raises:
        ErasureInputError: there is no such device, or this torch does not reach it.
    """
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # "meta" has no values to bring back
    except (
        AssertionError,
        ImportError,
        NotImplementedError,
        RuntimeError,
    ) as error:  # what torch raises depends on its build
        raise ErasureInputError(
            f"Nothing can be computed on the device {device!r} ({str(error).splitlines()[0]}). Name another `--device`; "
            f"the best one here is {_best_device()!r}."
        ) from error
    return torch.device(device).type


def _best_device() -> str:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def _from_pretrained(base: str, dtype: Any, variant: str | None, revision: str | None, token: str | None) -> Any:
    from diffusers import AutoPipelineForText2Image

    if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        raise ErasureNotFoundError(f"There is no folder {base!r} with a pipeline.")
    path = str(Path(base).expanduser()) if Path(base).expanduser().is_dir() else base
    try:
        return AutoPipelineForText2Image.from_pretrained(
            path, dtype=dtype, variant=variant, revision=revision, token=token
        )
    except (OSError, ValueError) as error:
        raise ErasureNotFoundError(
            f"The base model {base!r} could not be loaded: {str(error).splitlines()[0]} "
            f"(Without a download there is `--base demo`, and in a checkout {', '.join(list(TINY)[1:])}.)"
        ) from error
