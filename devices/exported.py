"""An exported folder as measurements and estimates see it: its format, lengths and run. Torch-free.

A folder with a `manifest.json` says all this itself; an ONNX decoder of another exporter (optimum, ONNX Runtime GenAI's
builder) is taken by its `model.onnx` and `config.json`, but only to be measured: nothing says what its layers cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.errors import UnsupportedModel
from dwindle.report import Artifact
from dwindle.storage import folder_bytes, hash_folder

__all__ = ["Exported", "open_exported", "read_artifact", "run_of"]

_MARKS = {"onnx": "model.onnx", "coreai": "model.aimodel", "coreml": "*.mlpackage"}
"""Format -> what its folder holds."""
_FACTS = ("layers", "kv_bytes_per_token", "context_length", "vocabulary", "tied", "attention_width", "runtime")


@dataclass(frozen=True)
class Exported:
    """A folder that holds one exported decoder."""

    folder: Path
    format: str
    context_length: int
    vocabulary: int
    run: Path | None
    """The run folder it lies in, if any."""

    @property
    def name(self) -> str:
        """Return its path below the run folder, as the report names it, or the folder's own name."""
        inside = self.run is not None and self.folder.is_relative_to(self.run)
        return self.folder.relative_to(self.run).as_posix() if inside and self.run else self.folder.name

    def identity(self) -> dict[str, Any]:
        """Return what a measurement says of what it measured."""
        return {"artifact": self.name, "sha256": hash_folder(self.folder), "format": self.format,
                "package_bytes": folder_bytes(self.folder)}  # fmt: skip


def open_exported(folder: Path | str) -> Exported:
    """Return the decoder in a folder. Raises UnsupportedModel for what is none, saying what was looked for."""
    place = Path(folder).resolve()
    settings: dict[str, Any] = {}
    for name in ("config.json", "manifest.json"):
        settings |= _object(place / name)
    if "task" in settings and "schema" in settings:
        raise UnsupportedModel(f"{folder}: this is an encoder ({settings['task']}); only decoders can be measured.")
    form = settings.get("format") or next((f for f, mark in _MARKS.items() if any(place.glob(mark))), None)
    if form not in _MARKS or not any(place.glob(_MARKS[form])) or not (place / "config.json").is_file():
        needed = ", ".join(_MARKS.values())
        raise UnsupportedModel(f"{folder}: no exported decoder. Needed: a folder written by `dwindle export`, with "
                               f"config.json and one of {needed}.")  # fmt: skip
    context = settings.get("context_length") or settings.get("max_position_embeddings")
    vocabulary = settings.get("vocabulary") or settings.get("vocab_size")
    for value, what, least in ((context, "context length", 2), (vocabulary, "vocabulary", 1)):
        if not isinstance(value, int) or value < least:
            raise UnsupportedModel(
                f"{folder}: neither manifest.json nor config.json gives a {what} of {least} or more "
                f"(found {value!r}). Export the model again."
            )
    return Exported(place, str(form), int(context or 0), int(vocabulary or 0), run_of(place))


def read_artifact(folder: Path | str) -> Artifact:
    """Return the artifact that an exported folder's manifest describes, for an estimate without the run's report."""
    opened = open_exported(folder)
    manifest = _object(opened.folder / "manifest.json")
    details = {key: manifest[key] for key in _FACTS if key in manifest}
    return Artifact(opened.format, str(folder), folder_bytes(opened.folder), hash_folder(opened.folder),
                    details=details)  # fmt: skip


def _object(path: Path) -> dict[str, Any]:
    """Return a JSON object, or nothing where there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UnsupportedModel(f"{path}: is not a JSON object ({error}). Export the model again.") from error


def run_of(folder: Path | str) -> Path | None:
    """Return the run folder that an artifact lies in: the nearest one above with a run's recipe, or None."""
    return next((p for p in list(Path(folder).resolve().parents)[:4] if (p / "recipe.yaml").is_file()), None)
