"""A run's report with the measurements that came after it: what `dwindle report` shows.

report.json is the record of the run and stays as it is. A measurement that `dwindle bench --profile NAME` left in
RUN/measurements since then judges the artifact anew on that target, by the options of the run's `validate` step; what
measured it, the verdict and the basis are the new ones. Targets without one, and this machine, which the run measured
itself, stay as recorded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dwindle.report import Report
from dwindle.strict_yaml import read_yaml

__all__ = ["measured_report", "recipe_values"]


def measured_report(report: Report, folder: Path) -> Report:
    """Return the report with measured targets in place of estimated ones; the same object if there are none.

    Raises DataError for a damaged measurement, RecipeError for a recipe whose validate step cannot be meant.
    """
    from dwindle.devices import ValidateOptions, rejudge
    from dwindle.pipeline.commands.shared import made_options

    if not any(folder.glob("measurements/*.json")):
        return report
    options = made_options(ValidateOptions, recipe_values(folder), "validate")
    targets = rejudge(report, options, folder)
    return report if targets == tuple(report.targets) else replace(report, targets=targets)


def recipe_values(folder: Path) -> dict[str, Any]:
    """Return what the run's recipe gives to its validate step; nothing where there is no recipe or no such step."""
    try:
        recipe = read_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
        steps = [step["validate"] for step in recipe["steps"] if isinstance(step, dict) and "validate" in step]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return dict(steps[-1]) if steps and isinstance(steps[-1], dict) else {}
