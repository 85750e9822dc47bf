"""Whole runs of the entries that train while they prune: rounds, and learned masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.runner import run


def test_rounds_run_as_steps_of_their_own(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    entry: dict[str, Any] = {"rounds": 2, "prune": {"ffn_keep": 0.5}, "distill": {"steps": 2, "batch_size": 2}}
    recipe = recipe_of(steps=[{"prune_and_distill": entry}])
    report = run(recipe, tmp_path / "out")
    assert [step.name for step in report.steps] == ["prune", "distill", "prune", "distill"]
    assert [step.details["ffn_width"] for step in report.steps if step.name == "prune"] == [[128, 96], [96, 64]]
    assert sorted(place.name for place in (tmp_path / "out" / "steps").iterdir()) == [
        "00-samples",
        "00-teacher", "01-prune", "02-distill", "03-prune", "04-distill",
    ]  # fmt: skip
    told: list[str] = []
    more = recipe_of("prune_and_distill.distill.steps=2", steps=[{"prune_and_distill": entry}])
    run(more, tmp_path / "out", notify=told.append)
    assert sum("unchanged, taken over" in line for line in told) == 4


def test_learned_masks_run_in_a_recipe(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    masks = {"steps": 4, "batch_size": 2, "weight_rate": 1e-3}
    recipe = recipe_of(steps=[{"prune": {"ffn_keep": 0.5, "method": "soft_top_k", "masks": masks}}])
    report = run(recipe, tmp_path / "out")
    (record,) = report.steps
    assert record.details["ffn_width"] == [128, 64]
    assert record.details["steps"] == 4
    assert [skipped.what for skipped in record.skipped] == ["compensation"]
