"""The methods that there are: the library's own, those of installed packages, and those that were registered.

What a package offers is read from its metadata; its code is imported when one of its methods is used or told about.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ..errors import ErasureInputError
from ..logging import get_logger
from .built_in import BUILT_IN
from .declaration import Citation, MethodDeclaration


__all__ = [
    "BUILT_IN",
    "GROUP",
    "Citation",
    "MethodDeclaration",
    "declaration",
    "declarations",
    "find",
    "method_names",
    "register_method",
]

logger = get_logger(__name__)

GROUP = "diffusers_erasure.methods"  # of entry points
_OWN = {each.name: each for each in BUILT_IN}
_registered: dict[str, MethodDeclaration] = {}
_loaded: dict[str, MethodDeclaration] = {}


def register_method(declared: MethodDeclaration) -> None:
    """Make a method known by its name, to [`erase`] and all else, until the process ends.

    A package that is installed needs no call: it names its declaration as an entry point of the group
    `diffusers_erasure.methods`.

    Args:
        declared ([`MethodDeclaration`]): what the method says about itself.

    Raises:
        ErasureInputError: there is a method of this name already.

    Examples:

    ```py
    >>> register_method(MethodDeclaration(name="mine", module=__name__, ...))
    >>> erasure = erase(pipe, "cat", method="mine")
    ```
    """
    name = declared.name
    if _registered.get(name) == declared:  # a cell of a notebook that runs again
        return
    if name in _offered():
        raise ErasureInputError(
            f"The package {_package(_offered()[name])!r} offers a method {name!r} already; choose another name. (A method that "
            "its package names as an entry point is not registered as well.)"
        )
    if name in _OWN or name in _registered:
        raise ErasureInputError(f"There is a method {name!r} already; choose another name.")
    _registered[name] = declared


def method_names() -> dict[str, str]:
    """Names of the methods, with a line about each; imports none of them."""
    known = {name: each.summary for name, each in (*_OWN.items(), *_registered.items())}
    return known | {name: _summary(point) for name, point in _offered().items()}


def declaration(name: str) -> MethodDeclaration:
    """What a method says about itself.

    Raises:
        ErasureInputError: there is no such method, or the package that offers it is broken.
    """
    known = {**_OWN, **_registered, **_loaded}
    if name in known:
        return known[name]
    if name not in _offered():
        raise ErasureInputError(f"There is no method {name!r}; methods are {sorted(method_names())}.")
    _loaded[name] = _load(_offered()[name])
    return _loaded[name]


def find(name: str) -> MethodDeclaration | None:
    """What a method says about itself; `None` where it is not known here, with a warning where its package is broken."""
    if name not in method_names():
        return None
    try:
        return declaration(name)
    except ErasureInputError as error:
        logger.warning("%s", error)
        return None


def declarations() -> dict[str, MethodDeclaration]:
    """What all methods say about themselves, by name; those of broken packages are warned of and left out."""
    found = {name: find(name) for name in method_names()}
    return {name: each for name, each in found.items() if each is not None}


@cache
def _offered() -> dict[str, EntryPoint]:
    """What installed packages offer, from their metadata: none of them is imported."""
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda each: (each.name, _package(each))):
        owner = "this library" if point.name in _OWN else _package(found[point.name]) if point.name in found else None
        if owner is None:
            found[point.name] = point
        else:
            logger.warning(
                "The package %r offers a method %r, which is the name of one of %s; it is left out.",
                *(_package(point), point.name, owner),
            )
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _summary(point: EntryPoint) -> str:
    """What a package says about itself, in a line."""
    told = point.dist.metadata if point.dist else None
    summary = told["Summary"] if told is not None and "Summary" in told else "a method"
    return f"{summary} (package {_package(point)})"


def _load(point: EntryPoint) -> MethodDeclaration:
    try:
        declared = point.load()
        if not isinstance(declared, MethodDeclaration) or declared.name != point.name:
            raise TypeError(f"{point.value} is not a MethodDeclaration with this name")
    except (Exception, SystemExit) as error:  # whatever a package does when it is imported
        raise ErasureInputError(
            f"The method {point.name!r} of the package {_package(point)!r} cannot be used ({type(error).__name__}: {error}). "
            "Update the package, or uninstall it."
        ) from error
    return declared
