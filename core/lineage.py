"""Where a model comes from: one entry per step, with its options and the hashes of what went in. Torch-free.

Stored as `lineage.json` beside the weights. The first entry is the origin: the name it was loaded under and the sha256
of every file read. Paths of the machine stay out of it; a folder is known by its last name and its hashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import dwindle
from dwindle.errors import UnsupportedModel
from dwindle.storage import read_json, write_json
from dwindle.typed_json import require_types

__all__ = ["LINEAGE_FILE", "Lineage", "LineageEntry"]

LINEAGE_FILE = "lineage.json"
_SCHEMA = 1


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}


@dataclass(frozen=True)
class LineageEntry:
    """One step of a model's history."""

    step: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    """sha256 of everything that went in, by name."""
    dwindle: str = dwindle.__version__
    versions: Mapping[str, str] = field(default_factory=_versions)


@dataclass(frozen=True)
class Lineage:
    """All steps from the origin on, oldest first."""

    entries: tuple[LineageEntry, ...]

    @classmethod
    def origin(cls, name: str, inputs: Mapping[str, str], **options: Any) -> Lineage:
        """Return the lineage of a checkpoint that no step of dwindle has touched."""
        return cls((LineageEntry("origin", {"model": name, **options}, dict(inputs)),))

    def adding(self, step: str, options: Mapping[str, Any], inputs: Mapping[str, str]) -> Lineage:
        """Return this lineage with one more entry. Options must be JSON values."""
        json.dumps(dict(options), allow_nan=False)
        return Lineage((*self.entries, LineageEntry(step, dict(options), dict(inputs))))

    @property
    def steps(self) -> tuple[str, ...]:
        """Return the names of the steps, oldest first."""
        return tuple(entry.step for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        """Return the object written to lineage.json."""
        return {"schema": _SCHEMA, "entries": [asdict(entry) for entry in self.entries]}

    def write(self, folder: Path) -> None:
        """Write lineage.json into a folder."""
        write_json(folder / LINEAGE_FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> Lineage:
        """Return the lineage stored in a folder, or raise UnsupportedModel if it is damaged."""
        path = folder / LINEAGE_FILE
        try:
            data = read_json(path)
            if data["schema"] != _SCHEMA:
                raise ValueError(f"schema {data['schema']!r} where {_SCHEMA} is needed")
            lineage = cls(tuple(LineageEntry(**entry) for entry in data["entries"]))
            require_types(lineage)
            return lineage
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UnsupportedModel(
                f"{path} cannot be read ({error}). Restore it, or delete it to load the model as a new origin."
            ) from error
