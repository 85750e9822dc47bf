"""A subset of JSON Schema (2020-12), enough for the shape of an answer. Torch-free.

Read: type, enum, const; properties, required, additionalProperties, minProperties, maxProperties; items, minItems,
maxItems, uniqueItems; minLength, maxLength, pattern; minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf;
anyOf, allOf, oneOf, not. Passed over: title, description, default, examples, format and $-keywords but $ref. Any other
keyword is an error when the schema is read, so that no condition is dropped in silence.

Why not the jsonschema package: it comes with no dependency of ours, and a corpus must not depend on whether it happens
to be installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import regex

from dwindle.errors import RecipeError, did_you_mean

__all__ = ["check_schema", "schema_problem"]

_PATTERN_SECONDS = 1.0
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v.is_integer())),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
}
_PASSED_OVER = {"title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly",
                "$schema", "$id", "$comment"}  # fmt: skip
_INSIDE = ("items", "not")
_LISTS = ("anyOf", "allOf", "oneOf")

_SIZES: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    "minProperties": ("object", lambda v, n: len(v) >= n, "fewer than {} keys"),
    "maxProperties": ("object", lambda v, n: len(v) <= n, "more than {} keys"),
    "minItems": ("array", lambda v, n: len(v) >= n, "fewer than {} entries"),
    "maxItems": ("array", lambda v, n: len(v) <= n, "more than {} entries"),
    "uniqueItems": ("array", lambda v, n: not n or len({_exact(i) for i in v}) == len(v), "an entry stands twice"),
    "minLength": ("string", lambda v, n: len(v) >= n, "fewer than {} characters"),
    "maxLength": ("string", lambda v, n: len(v) <= n, "more than {} characters"),
    "pattern": ("string", lambda v, p: regex.search(p, v, timeout=_PATTERN_SECONDS) is not None, "no match of {}"),
    "minimum": ("number", lambda v, n: v >= n, "below {}"),
    "maximum": ("number", lambda v, n: v <= n, "above {}"),
    "exclusiveMinimum": ("number", lambda v, n: v > n, "not above {}"),
    "exclusiveMaximum": ("number", lambda v, n: v < n, "not below {}"),
    "multipleOf": (
        "number",
        lambda v, n: math.isfinite(v) and Fraction(str(v)) % Fraction(str(n)) == 0,
        "no multiple of {}",
    ),
}
"""Keyword -> (type it speaks of, test, what is wrong)."""
_KNOWN = {"type", "enum", "const", "properties", "required", "additionalProperties", *_INSIDE, *_LISTS, *_SIZES}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"),
                    (_is_size, "a whole number from 0 on")),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (_is_number, "a number")),
    "multipleOf": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "properties": (lambda v: isinstance(v, Mapping), "an object"),
    **dict.fromkeys(("enum", "anyOf", "allOf", "oneOf"), (lambda v: isinstance(v, list), "a list")),
    "required": (lambda v: isinstance(v, list) and all(isinstance(key, str) for key in v), "a list of keys"),
    "type": (lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(one, str) for one in v)),
             "a type, or a list of them"),
}  # fmt: skip
"""Keyword -> (test of what stands behind it, what is needed)."""


def _exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def check_schema(schema: Any, where: str = "schema") -> None:
    """Raise RecipeError for what is no schema or holds a keyword outside the subset."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise RecipeError(f"{where}: found {type(schema).__name__}, needed a JSON Schema (an object).")
    unknown = [key for key in schema if key not in _KNOWN | _PASSED_OVER]
    if unknown:
        raise RecipeError(f"{where}: {unknown[0]!r} is not supported{did_you_mean(str(unknown[0]), sorted(_KNOWN))}.")
    wrong = [f"{key}: {schema[key]!r:.60} (needed: {told})" for key, (fits, told) in _VALUES.items()
             if key in schema and not fits(schema[key])]  # fmt: skip
    if wrong:
        raise RecipeError(f"{where}: {'; '.join(wrong)}.")
    for kind in _kinds(schema):
        if kind not in _TYPES:
            raise RecipeError(f"{where}: type {kind!r} is unknown{did_you_mean(str(kind), _TYPES)}.")
    if "pattern" in schema:
        try:
            regex.compile(schema["pattern"])
        except (regex.error, TypeError) as error:
            raise RecipeError(f"{where}: pattern {schema['pattern']!r} is no regular expression ({error}).") from error
    inner = {f"{where}.{key}": schema[key] for key in _INSIDE if key in schema}
    inner |= {f"{where}.{k}[{i}]": one for k in _LISTS for i, one in enumerate(schema.get(k, ()))}
    inner |= {f"{where}.properties.{key}": one for key, one in schema.get("properties", {}).items()}
    if "additionalProperties" in schema:
        inner[f"{where}.additionalProperties"] = schema["additionalProperties"]
    for place, one in inner.items():
        check_schema(one, place)


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def schema_problem(value: Any, schema: Any, where: str = "$") -> str | None:
    """Return the first thing in which a value does not match a (checked) schema, with its place, or None.

    >>> schema_problem({"n": "1"}, {"type": "object", "properties": {"n": {"type": "integer"}}})
    '$.n: a string, needed integer'
    >>> schema_problem([1, 2], {"items": {"maximum": 2}}) is None
    True
    """
    if isinstance(schema, bool):
        return None if schema else f"{where}: nothing is allowed here"
    kinds = _kinds(schema)
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        found = next(name for name, test in _TYPES.items() if test(value))
        return f"{where}: a{'n' * (found[0] in 'aio')} {found}, needed {' or '.join(kinds)}"
    if "enum" in schema and _exact(value) not in map(_exact, schema["enum"]):
        return f"{where}: {value!r} is none of {schema['enum']}"
    if "const" in schema and _exact(value) != _exact(schema["const"]):
        return f"{where}: {value!r} is not {schema['const']!r}"
    for key, (kind, test, told) in _SIZES.items():
        if key in schema and _TYPES[kind](value):
            try:
                held = test(value, schema[key])
            except TimeoutError:
                return f"{where}: the pattern took longer than {_PATTERN_SECONDS:g} s"
            if not held:
                return f"{where}: {told.format(schema[key])}"
    return _inside(value, schema, where) or _combined(value, schema, where)


def _inside(value: Any, schema: Mapping[str, Any], where: str) -> str | None:
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(value, dict):
        missing = [key for key in schema.get("required", ()) if key not in value]
        if missing:
            return f"{where}: {', '.join(missing)} missing"
        own = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        if rest is False and (extra := [key for key in value if key not in own]):
            return f"{where}: {', '.join(extra)} not allowed"
        parts += [(one, own.get(key, rest), f"{where}.{key}") for key, one in value.items()]
    elif isinstance(value, list) and "items" in schema:
        parts += [(one, schema["items"], f"{where}[{index}]") for index, one in enumerate(value)]
    return next((problem for part in parts if (problem := schema_problem(*part)) is not None), None)


def _combined(value: Any, schema: Mapping[str, Any], where: str) -> str | None:
    for one in schema.get("allOf", ()):
        if (problem := schema_problem(value, one, where)) is not None:
            return problem
    for key, allowed in (("anyOf", None), ("oneOf", 1)):
        if key in schema:
            matches = sum(schema_problem(value, one, where) is None for one in schema[key])
            if not matches or (allowed is not None and matches != allowed):
                return f"{where}: {matches} of {key} match"
    if "not" in schema and schema_problem(value, schema["not"], where) is None:
        return f"{where}: matches what 'not' forbids"
    return None
