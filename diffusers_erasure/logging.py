"""The library's logger: standard `logging`, its level from `DIFFUSERS_ERASURE_VERBOSITY`."""

import logging
import os


_ROOT = "diffusers_erasure"
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def get_logger(name: str = _ROOT) -> logging.Logger:
    """Return the logger of a module of this library.

    Args:
        name (`str`, *optional*, defaults to `"diffusers_erasure"`): the module's `__name__`.
    """
    return logging.getLogger(name)


def set_verbosity(level: int | str) -> None:
    """Set the level of all the library's loggers.

    Args:
        level (`int` or `str`): a level of the standard `logging` module, or its name in lower case.
    """
    logging.getLogger(_ROOT).setLevel(_LEVELS[level.lower()] if isinstance(level, str) else level)


if "DIFFUSERS_ERASURE_VERBOSITY" in os.environ:
    logging.getLogger(_ROOT).setLevel(_LEVELS.get(os.environ["DIFFUSERS_ERASURE_VERBOSITY"].lower(), logging.WARNING))
