"""Methods of pipeline classes that are wrapped: so a call of a pipeline is a request, and prompts are looked at."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_wraps: dict[str, Wrap] = {}


def wrap_pipelines(names: Iterable[str] = (), wrap: Wrap | None = None) -> None:
    """Wrap some methods in every class of pipelines, in those that are imported later when one is made of them.

    All pipelines register their components as they are made; one from a pickle does not, and calls this without arguments.
    """
    import diffusers

    roots = [getattr(diffusers, name) for name in ("DiffusionPipeline", "ModularPipeline") if hasattr(diffusers, name)]
    _wraps.update({name: wrap for name in names if wrap is not None})

    def wrap_class(pipeline: type) -> None:
        for name, each in _wraps.items():
            function = getattr(pipeline, name, None)
            if inspect.isfunction(function) and not hasattr(function, "_diffusers_erasure"):
                wrapped = each(function)
                wrapped._diffusers_erasure = True  # type: ignore[attr-defined]
                owner = next(each for each in pipeline.__mro__ if name in vars(each))
                setattr(owner if issubclass(owner, tuple(roots)) else pipeline, name, wrapped)

    ahead = list(roots)
    while ahead:
        pipeline = ahead.pop()
        wrap_class(pipeline)
        ahead += pipeline.__subclasses__()
    register = diffusers.DiffusionPipeline.register_modules
    if hasattr(register, "_diffusers_erasure"):
        return

    @functools.wraps(register)
    def register_modules(self: Any, **modules: Any) -> Any:
        wrap_class(type(self))
        return register(self, **modules)

    register_modules._diffusers_erasure = True  # type: ignore[attr-defined]
    diffusers.DiffusionPipeline.register_modules = register_modules
