"""The key a step's result is stored under: its options, everything it reads, and the code it runs, in one hash."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dwindle import devices
from dwindle.devices.device_profile import HOST
from dwindle.devices.kept import this_machine
from dwindle.errors import OutputError
from dwindle.storage import hash_file, hash_json

__all__ = ["code_sha256", "plain", "profile_sha256"]


@functools.cache
def code_sha256(*rooms: str) -> str:
    """Return a hash over the Python sources of the root package and the named rooms: the code version of a step."""
    root = sorted(_folder("dwindle").glob("*.py"))  # in an installed package the rooms are folders in it
    inside = [path for room in rooms for path in sorted(_folder(f"dwindle.{room}").rglob("*.py"))]
    return hash_json([hash_file(path) for path in root + inside])


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise OutputError(f"{package} is not installed whole; run: pip install --force-reinstall dwindle")
    return Path(spec.origin).parent


def profile_sha256(name: str) -> str:
    """Return a hash over a profile's numbers; for the host, which is measured and not read, over what it is."""
    return hash_json(plain(this_machine() if name == HOST else devices.load_profile(name)))


def plain(value: Any) -> Any:
    """Return `value` as JSON types.

    >>> plain({"a": (1, frozenset("b"))})
    {'a': [1, ['b']]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
