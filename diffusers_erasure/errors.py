"""The library's exceptions.

Every error that the library raises on purpose is an [`ErasureError`]. Each message says what is wrong, what was
expected, and what to do. Subclasses also inherit the built-in that fits, so `except ValueError` keeps working.
"""


class ErasureError(Exception):
    """Base of all errors of this library."""


class ErasureInputError(ErasureError, ValueError):
    """An argument is wrong: an empty target, a negative strength, an unknown option, a prompt that is too long."""


class ErasureConfigError(ErasureError, ValueError):
    """`erasure_config.json` is not a valid configuration: unknown keys, wrong types, values out of range."""


class ErasureFileError(ErasureError, ValueError):
    """A tensor file does not hold what the configuration says: size, hash, names, shapes, dtypes, finite values."""


class ErasureNotFoundError(ErasureError, LookupError):
    """There is no erasure by that name, in that folder, or in that repository."""


class ErasureCompatibilityError(ErasureError, ValueError):
    """The erasure does not fit the pipeline: another architecture, another text encoder, a missing component."""


class ErasureInactiveError(ErasureError, RuntimeError):
    """A loaded erasure would not act in this forward pass, so the pass is refused."""


class ErasureTrainingError(ErasureError, RuntimeError):
    """Training cannot go on: the loss is not finite, a checkpoint cannot be written, or weights would be trained while an
    erasure is on, the way in which a concept is known to come back."""


class ErasureHubError(ErasureError, OSError):
    """The Hub refused a request, could not be reached, or holds something that must not be overwritten."""
