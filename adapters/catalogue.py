"""What a folder of adapters holds: read from their cards, no weights loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dwindle.adapter_card import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, AdapterCard
from dwindle.errors import DataError, UnsupportedModel

__all__ = ["catalogue", "catalogue_table", "described"]


def described(folder: Path) -> dict[str, Any]:
    """Return card, rank, kind, targets and bytes of one adapter folder; raise UnsupportedModel if it is none."""
    card = AdapterCard.read(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        size = (folder / WEIGHTS_FILE).stat().st_size
        kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
        return {"name": folder.name, "task": card.task, "rank": config["r"], "kind": kind, "bytes": size,
                "linears": len(config["target_modules"]),
                **{k: v for k, v in asdict(card).items() if k != "task"}}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"{folder}: the adapter cannot be read ({error}). Restore it.") from error


def catalogue(folder: Path, base_sha256: str | None = None) -> list[dict[str, Any]]:
    """Return a description of each adapter below a folder, by name; `fits` says whether its base is `base_sha256`.

    Raises DataError if there is no adapter, UnsupportedModel for a damaged one.
    """
    places = sorted(card.parent for card in folder.rglob(CARD_FILE)) if folder.is_dir() else []
    if not places:
        raise DataError(f"{folder}: no adapters in it. `dwindle recover` and `dwindle adapt` write them.")
    found = []
    for place in places:
        one = described(place) | {"name": place.relative_to(folder).as_posix() if place != folder else place.name}
        found.append(one if base_sha256 is None else {**one, "fits": one["base_sha256"] == base_sha256})
    return found


def catalogue_table(found: list[dict[str, Any]]) -> str:
    """Return the catalogue for a person."""
    width = max(len(one["name"]) for one in found)
    lines = [f"{'name':{width}}  {'task':12} {'kind':6} {'rank':>4} {'bytes':>12}  base"]
    for one in found:
        fits = "" if "fits" not in one else "  fits" if one["fits"] else "  another base"
        metrics = "".join(f"  {key} {value:.4g}" for key, value in one["metrics"].items())
        lines.append(f"{one['name']:{width}}  {one['task']:12} {one['kind']:6} {one['rank']:4} {one['bytes']:12,}  "
                     f"{one['base_name']} {one['base_sha256'][:8]}{fits}{metrics}")  # fmt: skip
    return "\n".join(lines)
