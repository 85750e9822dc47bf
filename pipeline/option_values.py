"""From YAML values to frozen option dataclasses, with every mistake named at once.

The dataclasses of the steps are the schema: their field names are the recipe's keys, their types say what a value
may be, their defaults stand nowhere else. Numbers may carry a suffix (`20M` tokens, `1.5GB`); anything unknown is an
error that names the nearest key. Nothing in a recipe can name code: only the fields of known types are filled.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dwindle.errors import DwindleError, did_you_mean

__all__ = ["fill", "parse_count"]

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_LARGEST, _LONGEST = 1e300, 64


def parse_count(value: object) -> float:
    """Return a number from `20M`, `1.5GB`, `3e-4` or a plain number; raise ValueError otherwise.

    >>> parse_count("20M"), parse_count("1.5GB"), parse_count(7)
    (20000000.0, 1500000000.0, 7.0)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    if isinstance(value, int | float):
        if abs(value) > _LARGEST:
            raise ValueError(f"{'a number of that size' if isinstance(value, int) else value} makes no sense")
        return float(value)
    if len(value) > _LONGEST:
        raise ValueError(f"a text of {len(value):,} characters is no number (examples: 64, 20M, 3e-4, 1.5GB)")
    match = re.fullmatch(r"\s*([-+]?[0-9][0-9_,]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].lower() not in _SUFFIX:
        raise ValueError(f"{value!r} is no number (examples: 64, 20M, 3e-4, 1.5GB)")
    number = float(match[1].replace("_", "").replace(",", "")) * _SUFFIX[match[2].lower()]
    if abs(number) > _LARGEST:
        raise ValueError(f"{value} makes no sense as a number")
    return number


def fill(kind: type[Any], values: Mapping[str, Any], where: str, problems: list[str]) -> Any | None:
    """Return `kind(**values)` with the values converted to its field types, or None.

    Every mistake is appended to `problems` as one line that starts with `where`; None comes back if there was any.
    """
    if not isinstance(values, Mapping):
        problems.append(f"{where}: found {values!r}, needed keys and values.")
        return None
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    before = len(problems)
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(f"{where}.{key} is unknown{did_you_mean(str(key), fields)}.")
            continue
        try:
            converted[str(key)] = _convert(hints[str(key)], value, f"{where}.{key}", problems)
        except ValueError as error:
            problems.append(f"{where}.{key}: {error}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            problems.append(f"{where}.{name} is missing.")
    if len(problems) > before:
        return None
    try:
        return kind(**converted)
    except (DwindleError, ValueError, TypeError) as error:
        problems.append(f"{where}: {str(error).removeprefix(f'{where}: ')}")
        return None


def _convert(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where, problems)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, Sequence) or kind is tuple:
        return _convert_tuple(arguments, value, where, problems)
    if origin in (dict, Mapping) or kind in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} is no mapping")
        return dict(value)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, str) and hasattr(kind, "of"):
            return _short_form(kind, value)
        return fill(typing.cast("type[Any]", kind), value, where, problems)
    return _convert_scalar(kind, value)


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    if value is None and type(None) in arguments:
        return None
    failures = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _convert(argument, value, where, problems)
        except ValueError as error:
            failures.append(str(error))
    raise ValueError(failures[0] if failures else f"{value!r} does not fit")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> tuple[Any, ...]:
    items = [value] if value is not None and not isinstance(value, list | tuple) else list(value or ())
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(items))
    if arguments and len(arguments) != len(items):
        raise ValueError(f"{value!r} has {len(items)} entries, needed {len(arguments)}")
    kinds = arguments or (Any,) * len(items)
    return tuple(
        _convert(k, item, f"{where}[{i}]", problems) for i, (k, item) in enumerate(zip(kinds, items, strict=True))
    )


def _short_form(kind: Any, text: str) -> Any:
    """Return `kind.of(text)`: types such as a loss have a short form, `top1_blend=0.9`."""
    try:
        return kind.of(text)
    except DwindleError as error:
        raise ValueError(str(error)) from error


def _convert_scalar(kind: Any, value: Any) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return value
    if kind is int:
        number = parse_count(value)
        if number != number or number != int(number):
            raise ValueError(f"{value!r} is no whole number")
        return int(number)
    if kind is float:
        return parse_count(value)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no text")
        return value
    try:
        return kind(value)
    except TypeError as error:
        raise ValueError(f"{value!r}: {error}") from error
