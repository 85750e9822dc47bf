"""From a small valid file to many broken ones: changes of structure where the format has one, else of bytes.

A mutation is a pure function of the seed file and a random generator, so a case is found again by its number. JSON and
YAML are read, changed as objects (another value, a key gone, twice or renamed, a deep nest), and written again; a
quarter of the cases is then damaged as bytes as well. A safetensors file is changed in its header and in its length.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

__all__ = ["HOSTILE_VALUES", "mutate"]

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.5, 1e-300, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "a", "a" * 20_000, "../../../etc/passwd", "/etc/passwd",
    "..", "C:\\x", "\0", "\ud800", "\x1b[2J", "\u202e", "<script>alert(1)</script>", "{{7*7}}", "$(id)", "`id`",
    "!!python/object/apply:os.system", "1e999", "0x10", "12GB", "1,000", "nan", "inf", ".inf", "(a+)+$", "[", "*",
    [], {}, [[]], [None], {"a": None}, {"": 1}, ["a", 1], [1, "a", None, {}], {"__class__": "x"}, [0] * 3000,
    {str(i): i for i in range(300)},
)  # fmt: skip


def _hostile(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(HOSTILE_VALUES))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if len(path) > 30:
        return found
    if isinstance(value, dict):
        for key, entry in value.items():
            found += _paths(entry, (*path, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value[:40]):
            found += _paths(entry, (*path, index))
    return found


def _nest(rng: random.Random) -> Any:
    nest: Any = _hostile(rng)
    for _ in range(rng.choice((3, 50, 300))):
        nest = [nest] if rng.random() < 0.5 else {"a": nest}
    return nest


def _other_value(old: Any, rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.25 and isinstance(old, int | float) and not isinstance(old, bool):
        number = rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, 0.3))
        return rng.choice((number, number, number, repr(number) if abs(number) < 10**30 else "9" * 40, [old]))
    if kind < 0.4 and isinstance(old, str):
        return rng.choice((old[:-1], old + "x", old.upper(), old * 50, [old], {old: old}, old.replace("a", "\0")))
    if kind < 0.45:
        return _nest(rng)
    return _hostile(rng)


def _changed(value: Any, rng: random.Random) -> Any:
    """Return the object with one change somewhere."""
    path = rng.choice(_paths(value))
    if not path:
        return _other_value(value, rng) if rng.random() < 0.1 else value
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    key, act = path[-1], rng.random()
    if act < 0.65:
        owner[key] = _other_value(owner[key], rng)
    elif act < 0.8:
        del owner[key]
    elif isinstance(owner, dict):
        entry = owner.pop(key) if act < 0.9 else owner[key]
        owner[rng.choice((f"{key}x", str(key)[:-1], "", "__init__", "schema", str(key).upper()))] = entry
    else:
        owner.insert(key, json.loads(json.dumps(owner[key])) if act < 0.9 else _hostile(rng))
    return value


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with a few flipped, gone, twice, cut off or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        act = rng.randrange(6)
        if act == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif act == 1:
            del changed[at : at + rng.choice((1, 1, 8, 200))]
        elif act == 2:
            changed[at:at] = changed[max(0, at - 64) : at]
        elif act == 3:
            del changed[at:]
        elif act == 4:
            changed[at:at] = rng.choice((b"\0", b"\xff\xfe", b"[" * 3000, b"{", b"}", b'"', b"\n", b"&a *a", b"!!set ",
                                         b"1" * 5000, b"\xed\xa0\x80", b": ", b"- "))  # fmt: skip
        else:
            changed[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, rng.randbytes(8), (2**62).to_bytes(8, "little")))
    return bytes(changed)


def _json(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _changed(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.05 and isinstance(value, dict) and value:  # a key twice
        text = text[:-1] + f", {json.dumps(next(iter(value)))}: 1}}"
    return text.encode()


def _jsonl(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def _yaml(data: bytes, rng: random.Random) -> bytes:
    value = yaml.safe_load(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _changed(value, rng)
    try:
        return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError, ValueError, UnicodeError):
        return json.dumps(value).encode()


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    act = rng.random()
    if act < 0.75:
        header = _json(header, rng)
    if act > 0.6:
        rest = _bytes(rest, rng)
    announced = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) + 1, 2**40, 2**63, 99_999_999))
    return announced.to_bytes(8, "little") + header + rest


_BY_FORMAT: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json, "jsonl": _jsonl, "yaml": _yaml, "safetensors": _safetensors, "bytes": _bytes,
}  # fmt: skip


def mutate(data: bytes, form: str, rng: random.Random) -> bytes:
    """Return a broken neighbour of a valid file of the format json, jsonl, yaml, safetensors or bytes."""
    changed = _BY_FORMAT[form](data, rng)
    return _bytes(changed, rng) if form != "bytes" and rng.random() < 0.25 else changed
