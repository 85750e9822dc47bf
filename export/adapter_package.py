"""One folder for each adapter: PEFT's files and card as they were trained, and beside them what the runtimes read.

    adapter_config.json, adapter_model.safetensors, adapter_card.json     the adapter: base hash, task, metrics, licence
    adapter.onnx_adapter                                                  ONNX Runtime (`onnx_adapters.py`)
    adapter_inputs.safetensors                                            Core AI (`coreai_adapters.py`)
    package.json                                                          what was written for which base
    README.md                                                             the lines that run it

`package.json`, schema 1: `name, task, base_sha256, sha256, rank, kind, bytes, licence, metrics`, and in `runtimes` for
each format `file, bytes, sha256`, and `parity` where it was executed.

Core ML has no such file: there an adapter is a function of the package, which is exported with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwindle.adapter_card import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.export.carried_adapters import CarriedAdapter
from dwindle.low_rank import Factors, factors
from dwindle.storage import hash_file, write_json, write_text

__all__ = ["ADAPTERS", "PACKAGE_FILE", "adapter_factors", "describe", "described", "keep_earlier",
           "write_adapter_files"]  # fmt: skip

ADAPTERS = "adapters"
"""Folder of an artifact that holds a folder for each adapter."""
PACKAGE_FILE = "package.json"
_SCHEMA = 1


def adapter_factors(adapter: CarriedAdapter, bundle: ModelBundle | None) -> dict[str, Factors]:
    """Return the factors of every change; a DoRA adapter needs its base. Raises RecipeError without it."""
    found = {}
    for name, change in adapter.changes.items():
        if change.magnitude is not None and bundle is None:
            raise RecipeError(f"{adapter.folder}: a DoRA adapter sets the lengths of its base's rows. Give the base "
                              "with -m, so that they can be computed.")  # fmt: skip
        base: Any = bundle.model.get_submodule(name) if bundle is not None and change.magnitude is not None else None
        found[name] = factors(change, None if base is None else base.weight)
    return found


def write_adapter_files(adapter: CarriedAdapter, folder: Path) -> None:
    """Copy what was trained into the package's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
        shutil.copyfile(adapter.folder / name, folder / name)


def describe(adapter: CarriedAdapter, folder: Path, runtimes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write package.json and README.md over the files of `runtimes` ({format: {"file": ..., ...}}); return the former.

    What earlier packaging wrote for other formats stays.
    """
    card = adapter.card
    earlier = described(folder).get("runtimes", {})
    rows = {kind: {**row, "bytes": (folder / row["file"]).stat().st_size, "sha256": hash_file(folder / row["file"])}
            for kind, row in runtimes.items() if row.get("file")}  # fmt: skip
    found = {
        "schema": _SCHEMA, "name": adapter.name, "task": card.task, "base_name": card.base_name,
        "base_sha256": card.base_sha256, "sha256": hash_file(folder / WEIGHTS_FILE), "rank": adapter.rank,
        "kind": adapter.kind, "bytes": (folder / WEIGHTS_FILE).stat().st_size, "licence": card.licence,
        "metrics": dict(card.metrics), "runtimes": {**earlier, **rows},
    }  # fmt: skip
    write_json(folder / PACKAGE_FILE, found)
    write_text(folder / "README.md", _readme(found))
    return found


def described(folder: Path) -> dict[str, Any]:
    """Return package.json of a folder; empty where there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads((folder / PACKAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.get("schema") == _SCHEMA else {}


def keep_earlier(adapter: CarriedAdapter, earlier: Path, folder: Path) -> None:
    """Take over into `folder` what an earlier package of the very same adapter holds for the runtimes."""
    found = described(earlier)
    if found.get("sha256") != hash_file(adapter.folder / WEIGHTS_FILE):
        return
    for row in found["runtimes"].values():
        shutil.copyfile(earlier / row["file"], folder / row["file"])
    shutil.copyfile(earlier / PACKAGE_FILE, folder / PACKAGE_FILE)


def _readme(found: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - Markdown, and code in it, not HTML
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("adapter.md.j2").render(package=found)
