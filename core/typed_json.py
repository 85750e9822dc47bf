"""Do the values of a dataclass that was read from a file have the types its fields declare? Torch-free.

JSON gives a list where a number was meant without a word, and the error then comes from deep inside. A reader of a
foreign file builds its dataclass and calls `require_types`: every field of another type is named at once.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["require_types"]

_LARGEST = 1 << 62


def require_types(made: Any) -> None:
    """Raise ValueError, naming every field of a dataclass (and of those inside it) that has not its declared type.

    Whole numbers must fit into 63 bits, floats must be finite; a whole number may stand for a float.
    """
    wrong = _wrong(made, type(made).__name__)
    if wrong:
        shown = "; ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise ValueError(shown)


_known_hints: dict[Any, dict[str, Any]] = {}


def _hints(kind: Any) -> dict[str, Any]:
    if kind not in _known_hints:
        _known_hints[kind] = typing.get_type_hints(kind)
    return _known_hints[kind]


def _wrong(made: Any, where: str) -> list[str]:
    found = []
    for field in dataclasses.fields(made):
        value, hint = getattr(made, field.name), _hints(type(made))[field.name]
        if not _fits(value, hint):
            found.append(f"{where}.{field.name} is {value!r:.60}")
    return found


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if hint is type(None) or hint is None:
        return value is None
    if origin is typing.Literal:
        return isinstance(value, str | int | float | None) and value in arguments
    if dataclasses.is_dataclass(hint):
        return isinstance(value, typing.cast("type[Any]", hint)) and not _wrong(value, "")
    if origin in (tuple, list, Sequence):
        return _fits_all(value, origin, arguments)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items()
        )
    return _fits_scalar(value, hint)


def _fits_all(value: Any, origin: Any, arguments: tuple[Any, ...]) -> bool:
    if not isinstance(value, tuple | list):
        return False
    if origin is not tuple or (len(arguments) == 2 and arguments[1] is Ellipsis):
        return all(_fits(one, arguments[0]) for one in value)
    return len(value) == len(arguments) and all(map(_fits, value, arguments))


def _fits_scalar(value: Any, hint: Any) -> bool:
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and abs(value) < _LARGEST
    if hint is float:
        return (isinstance(value, int) and abs(value) < _LARGEST) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, hint) if isinstance(hint, type) else True
