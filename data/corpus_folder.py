"""The folder of a corpus as `dwindle data build` writes it, and what stands for what in it.

    CORPUS/corpus.json                    manifest: splits, their files with hash, the sources' weights
    CORPUS/card.json  README.md  plots/   the data card
    CORPUS/train/SOURCE.jsonl.zst         one file for each source; the same under calibration/ and evaluation/

Wherever `-d` takes text, such a folder stands for its split of the role: training reads train/, and where a recipe
names no calibration or evaluation text, those of the corpus are taken. Text that a model wrote (`synthesize`) is no
source of the recipe and has no weight there: it keeps its share of the bytes beside the sources' text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dwindle.data.options import DataOptions
from dwindle.errors import DataError
from dwindle.typed_json import require_types

__all__ = ["MANIFEST", "SPLITS", "licence_of", "of_corpus", "read_manifest", "role_folder", "split_folder"]

MANIFEST = "corpus.json"
SPLITS = ("train", "calibration", "evaluation")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a corpus's manifest, or None for a folder that is no corpus."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: a damaged manifest ({error}). Build the corpus again.") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != 1 or "splits" not in manifest:
        return None
    try:
        _check(manifest)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{path}: a damaged manifest ({error}). Build the corpus again.") from error
    return manifest


@dataclass(frozen=True)
class _File:
    """A file of a split, as far as it is read again."""

    path: str
    source: str
    bytes: int
    licences_bytes: Mapping[str, int]


@dataclass(frozen=True)
class _Split:
    documents: int
    files: tuple[_File, ...]


@dataclass(frozen=True)
class _Manifest:
    splits: Mapping[str, _Split]
    weights: Mapping[str, float] | None


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise for a manifest without what is read, with other types there, or with files elsewhere."""
    splits = {}
    for name in SPLITS:
        told = manifest["splits"][name]
        files = [_File(**{key: one.get(key) for key in _FILE_KEYS}) for one in told["files"]]
        for file in files:
            if not isinstance(file.path, str) or Path(file.path).parent != Path(name) or "\\" in file.path:
                raise ValueError(f"{name} has the file {file.path!r:.80}, which is none of {name}/")
        splits[name] = _Split(told.get("documents"), tuple(files))
    require_types(_Manifest(splits, manifest.get("weights")))


_FILE_KEYS = tuple(field.name for field in fields(_File))


def split_folder(folder: Path, split: str) -> Path:
    """Return the folder of a corpus's split; a folder that is no corpus is returned as it is."""
    return folder / split if read_manifest(folder) is not None else folder


def licence_of(file: Path) -> str | None:
    """Return the licences of a file of a corpus's split, as its manifest has them; None for any other file."""
    folder = file.parent.parent
    if file.parent.name not in SPLITS or (manifest := read_manifest(folder)) is None:
        return None
    for one in manifest["splits"].get(file.parent.name, {}).get("files", []):
        if folder / one["path"] == file:
            return ", ".join(one["licences_bytes"]) or None
    return None


def role_folder(place: str | Path, role: str) -> str | Path:
    """Return what a place stands for in a role: the split of a corpus, or the place itself."""
    folder = Path(place).expanduser()
    return place if "::" in str(place) or read_manifest(folder) is None else folder / role


def _weights(files: list[dict[str, Any]], given: dict[str, float]) -> tuple[float, ...]:
    """Return a weight for each file; what a model wrote has the weight of its bytes beside those of the sources.

    >>> files = [{"source": "a", "bytes": 300}, {"source": "b", "bytes": 100}, {"source": "synthetic:m", "bytes": 200}]
    >>> _weights(files, {"a": 1, "b": 3})
    (1.0, 3.0, 2.0)
    """
    named = [one for one in files if one["source"] in given]
    per_byte = sum(given[one["source"]] for one in named) / max(1, sum(one["bytes"] for one in named)) or 1.0
    return tuple(float(given.get(one["source"], per_byte * one["bytes"])) for one in files)


def of_corpus(options: DataOptions) -> DataOptions:
    """Return options in which a corpus is replaced by what it holds.

    Training text is its training split, by source with the weights of its recipe if it has any; calibration and
    evaluation text, where none is named, are its other splits.
    """
    corpora = [Path(place).expanduser() for place in options.train]
    manifests = [None if "::" in str(place) else read_manifest(place) for place in corpora]
    changes: dict[str, Any] = {
        role: str(role_folder(given, role))
        for role in ("calibration", "evaluation")
        if (given := getattr(options, role)) is not None
    }
    if len(corpora) == 1 and manifests[0] is not None:
        folder, manifest = corpora[0], manifests[0]
        for role in ("calibration", "evaluation"):
            if getattr(options, role) is None and manifest["splits"][role]["documents"]:
                changes[role] = str(folder / role)
        if manifest.get("weights") and options.weights is None:
            files = manifest["splits"]["train"]["files"]
            changes["train"] = tuple(str(folder / one["path"]) for one in files)
            changes["weights"] = _weights(files, manifest["weights"])
    if "train" not in changes:
        changes["train"] = tuple(
            place if manifest is None else str(Path(place).expanduser() / "train")
            for place, manifest in zip(options.train, manifests, strict=True)
        )
    return replace(options, **changes)
