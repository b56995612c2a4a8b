"""A strict reader of JSON into dataclasses, for files that somebody else wrote.

It takes nothing on trust: size, nesting, duplicate and unknown keys, types and numbers are all checked. Ranges are for
the dataclasses themselves to check.
"""

import dataclasses
import json
import math
import re
import types
import typing
from typing import Any

from ..errors import ErasureConfigError


MAX_DEPTH = 12


def require(condition: bool, message: str) -> None:
    """Raise `ErasureConfigError` with `message` where a condition does not hold."""
    if not condition:
        raise ErasureConfigError(message)


def load_json(data: bytes, name: str, limit: int) -> Any:
    """Read JSON in UTF-8: no key twice in an object, no odd numbers or text, nested at most `MAX_DEPTH` deep.

    Args:
        data (`bytes`): the file's content.
        name (`str`): the file's name, for messages.
        limit (`int`): its largest size in bytes.

    Raises:
        ErasureConfigError: it is larger, or no such JSON.
    """
    require(len(data) <= limit, f"{name} has {len(data)} bytes, more than {limit}.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        require(len(result) == len(pairs), f"{name} has a key twice in one object.")
        return result

    def constant(number: str) -> Any:
        raise ErasureConfigError(f"{name} has the number {number}; numbers must be finite.")

    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except ErasureConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ErasureConfigError(f"{name} is not valid JSON: {str(error)[:200]}") from error
    _check(raw, name, 0)
    return raw


def _check(value: Any, name: str, depth: int) -> None:
    require(depth <= MAX_DEPTH, f"{name} is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(item, name, depth + 1)
    elif isinstance(value, str):
        # Half of a surrogate pair, written as an escape: such a string can be neither saved nor printed.
        require(not re.search("[\ud800-\udfff]", value), f"{name} has text that is not valid Unicode.")
    elif isinstance(value, float):
        require(math.isfinite(value), f"{name} has a number that is not finite.")
    elif isinstance(value, int):
        require(abs(value) < 2**63, f"{name} has a whole number that is too large.")


def read_as(kind: Any, raw: Any, name: str) -> Any:
    """Read what `load_json` gave as a dataclass, strictly: no unknown keys, no conversions but int to float.

    Args:
        kind: the dataclass; its fields are dataclasses, tuples and dicts of one type, plain types, or one of these or `None`.
        raw: the JSON.
        name (`str`): the file's name, for messages.

    Raises:
        ErasureConfigError: it is none; the message names the key.
    """
    require(isinstance(raw, dict), f"{name} must be a JSON object.")
    return _dataclass(kind, raw, "", name)


def _read(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), f"`{path}` must be an object.")
        return _dataclass(kind, value, path, f"`{path}`")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _read(next(argument for argument in arguments if argument is not type(None)), value, path)
    if origin is tuple:
        require(isinstance(value, list), f"`{path}` must be a list.")
        return tuple(_read(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        require(isinstance(value, dict), f"`{path}` must be an object.")
        return {key: _read(arguments[1], item, f"{path}.{key}"[:200]) for key, item in value.items()}
    if kind is float and type(value) in (int, float):
        return float(value)
    require(type(value) is kind, f"`{path}` must be of type {getattr(kind, '__name__', kind)}.")
    return value


def _dataclass(kind: Any, value: dict[str, Any], path: str, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = [key for key in value if key not in hints]
    require(not unknown, f"{where} has an unknown key {str(unknown[:1])[1:-1][:80]}; known are {sorted(hints)}.")
    for item in dataclasses.fields(kind):
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        require(optional or item.name in value, f"{where} lacks the key {item.name!r}.")
    return kind(**{key: _read(hints[key], item, f"{path}.{key}".lstrip(".")) for key, item in value.items()})
