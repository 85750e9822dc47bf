"""Write what a run tells: report.json, report.html, README.md (the model card) and recipe.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwindle.errors import DataError
from dwindle.pipeline.compare import Run
from dwindle.pipeline.html_report import render_html
from dwindle.pipeline.model_card import render_model_card
from dwindle.pipeline.recipe import Recipe
from dwindle.report import Report
from dwindle.storage import read_json, write_text
from dwindle.strict_yaml import read_yaml
from dwindle.typed_json import require_types

__all__ = ["read_report", "read_runs", "rewrite_html", "write_reports"]


def write_reports(report: Report, recipe: Recipe, folder: Path) -> None:
    """Write the four files of the run folder, each atomically; report.json last, as it says that the rest is there."""
    recipe_text = recipe.to_yaml()
    write_text(folder / "recipe.yaml", recipe_text)
    write_text(folder / "README.md", render_model_card(report, title=recipe.name))
    write_text(folder / "report.html", render_html(report, title=recipe.name, recipe_text=recipe_text))
    write_text(folder / "report.json", report.dumps())


def read_report(folder: Path) -> Report:
    """Return the report of a run folder; raise DataError if there is none or it is damaged."""
    path = folder / "report.json"
    try:
        data = dict(read_json(path))
        if data.get("schema") != 1:
            raise DataError(f"{path}: found schema {data.get('schema')!r}, needed 1.")
        report = Report.from_json(data)
        require_types(report)
        return report
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no report.json: it is no finished run. Run it: dwindle run RECIPE -o {folder}"
        ) from error
    except NotADirectoryError as error:
        raise DataError(f"{folder} is a file. Give the run's folder: {Path(folder).parent}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as a report ({error}). Run again: finished steps are taken over."
        ) from error


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return run folders as a comparison wants them; each is called by the part of its path that tells it from others.

    A recipe that is missing or damaged is empty: a run is compared by its report.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [Run(name, read_report(folder), _recipe(folder)) for name, folder in zip(names, folders, strict=True)]


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        found = read_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rewrite_html(report: Report, folder: Path) -> None:
    """Write report.html of a finished run again, from its report.json and recipe.yaml."""
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else ""
    write_text(
        folder / "report.html", render_html(report, title=str(report.inputs.get("recipe", "run")), recipe_text=text)
    )
