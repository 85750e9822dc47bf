"""Where an exported model comes from and under which licence, as far as its source says.

Read are, in this order and all of them: `license` in config.json, `license` in the front matter of README.md (the model
card of Hugging Face), and files named LICENSE, LICENCE, COPYING or NOTICE beside the weights. Nothing is concluded: a
source that says nothing is reported so, because an app that ships weights without a known licence is its maker's risk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dwindle.bundle import ModelBundle
from dwindle.lineage import Lineage

__all__ = ["files_of", "licence_files", "licence_lines", "lines_of", "source_folder"]

_NAMES = ("license", "licence", "copying", "notice")
"""Beginnings of the names of licence files, in lower case."""
_CARD = "README.md"
_FENCE = "---"
_LONGEST = 120
"""Characters of a licence file's first line that are shown."""


def licence_lines(bundle: ModelBundle) -> list[str]:
    """Return what the bundle's source says of its origin and licence, one sentence a line."""
    return lines_of(source_folder(bundle), bundle.lineage, bundle.model.config.to_dict())


def licence_files(bundle: ModelBundle) -> list[Path]:
    """Return the licence files beside the source's weights, which belong into an app's bundle as well."""
    folder = source_folder(bundle)
    return [] if folder is None else files_of(folder)


def source_folder(bundle: ModelBundle) -> Path | None:
    """Return the folder the model was loaded from, if it is still there."""
    name = getattr(bundle.model, "name_or_path", "") or ""
    return Path(name) if name and Path(name).is_dir() else None


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder that are a licence by their name."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().startswith(_NAMES))


def lines_of(folder: Path | None, lineage: Lineage, config: Mapping[str, Any]) -> list[str]:
    """Return the lines of a source of which the folder (if there is one), lineage and config are known."""
    lines = [_origin(lineage)]
    if len(lineage.steps) > 1:
        lines.append(f"Changed since by dwindle: {', '.join(lineage.steps[1:])} (`source.lineage` in manifest.json).")
    named = [(config.get("license"), "config.json")]
    files: list[Path] = []
    if folder is not None:
        named.append((_card_licence(folder / _CARD), f"the model card, {_CARD}"))
        files = files_of(folder)
    lines += [f"Licence: {licence}, says {place} of the source." for licence, place in named if licence]
    lines += [f"Licence file of the source: {path.name}, which begins: {_first_line(path)}" for path in files]
    if not files and not any(licence for licence, _ in named):
        looked = "the folder it was loaded from is not there" if folder is None else "its folder says nothing"
        lines.append(f"Licence: not known; {looked}. Ask whoever made the model before you ship it.")
    return lines


def _origin(lineage: Lineage) -> str:
    origin = lineage.entries[0].options if lineage.entries else {}
    revision = f", revision {origin['revision']}" if "revision" in origin else ""
    return f"Source: {origin.get('model', 'not known')}{revision}; hashes of its files are in manifest.json."


def _card_licence(card: Path) -> str | None:
    """Return `license` (with its name and link, where given) of a model card's front matter."""
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    _, fence, rest = text.partition(_FENCE) if text.startswith(_FENCE) else ("", "", "")
    try:
        front = yaml.safe_load(rest.split(f"\n{_FENCE}")[0]) if fence else None
    except yaml.YAMLError:
        return None
    if not isinstance(front, dict):
        return None
    parts = [front.get(key) for key in ("license", "license_name", "license_link")]
    return ", ".join(" ".join(str(part).split()) for part in parts if part) or None


def _first_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in lines if line.strip()), "(nothing)")[:_LONGEST]
