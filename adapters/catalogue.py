"""What a folder of adapters holds: read from their cards, no weights loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dwindle.adapter_card import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, AdapterCard
from dwindle.errors import DataError, UnsupportedModel
from dwindle.storage import read_json

__all__ = ["catalogue", "catalogue_table", "comparison", "comparison_table", "described"]


def described(folder: Path) -> dict[str, Any]:
    """Return card, rank, kind, targets and bytes of one adapter folder; raise UnsupportedModel if it is none."""
    card = AdapterCard.read(folder)
    try:
        config = read_json(folder / CONFIG_FILE)
        size = (folder / WEIGHTS_FILE).stat().st_size
        kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
        return {"name": folder.name, "task": card.task, "rank": config["r"], "kind": kind, "bytes": size,
                "linears": len(config["target_modules"]),
                **{k: v for k, v in asdict(card).items() if k != "task"}}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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


def comparison(folders: Sequence[Path], base_sha256: str | None = None) -> list[dict[str, Any]]:
    """Return the adapters of all folders, each with `same_base`: which of the others are for its very base.

    Raises as `catalogue` does, and DataError for fewer than two adapters.
    """
    ends = [folder.name for folder in folders]
    named = [str(folder) if ends.count(folder.name) > 1 else folder.name for folder in folders]
    found = [{**one, "name": one["name"] if len(folders) == 1 else f"{name}/{one['name']}"
              if one["name"] != folder.name else name}
             for name, folder in zip(named, folders, strict=True)
             for one in catalogue(folder, base_sha256)]  # fmt: skip
    if len(found) < 2:
        raise DataError(f"adapters compare: {len(found)} adapter found, at least two are needed. Name more folders.")
    return [
        {**one, "same_base": [other["name"] for other in found
                              if other is not one and other["base_sha256"] == one["base_sha256"]]}
        for one in found
    ]  # fmt: skip


def comparison_table(found: list[dict[str, Any]]) -> str:
    """Return the comparison for a person: one column for each adapter."""
    names = [one["name"] for one in found]
    rows: list[tuple[str, list[str]]] = [
        ("task", [one["task"] for one in found]),
        ("base", [f"{one['base_name']} {one['base_sha256'][:8]}" for one in found]),
        ("same base", [", ".join(one["same_base"]) or "-" for one in found]),
        ("started from", [(one["started_from"] or "nothing")[:8] for one in found]),
        ("kind, rank", [f"{one['kind']} {one['rank']}" for one in found]),
        ("linears", [f"{one['linears']}" for one in found]),
        ("bytes", [f"{one['bytes']:,}" for one in found]),
        ("licence", [one["licence"] or "-" for one in found]),
    ]
    if "fits" in found[0]:
        rows.insert(2, ("fits", ["yes" if one["fits"] else "another base" for one in found]))
    for metric in dict.fromkeys(name for one in found for name in one["metrics"]):
        rows.append((metric, [f"{one['metrics'][metric]:.4g}" if metric in one["metrics"] else "-" for one in found]))
    widths = [max(len(name), *(len(values[i]) for _, values in rows)) for i, name in enumerate(names)]
    first = max(len(label) for label, _ in rows)
    told = [("", names), *rows]
    lines = [[f"{label:{first}}", *(f"{v:{w}}" for v, w in zip(values, widths, strict=True))] for label, values in told]
    return "\n".join("  ".join(line).rstrip() for line in lines)
