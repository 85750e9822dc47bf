"""A teacher corrected first, stages with their own mix and length, a student measured on its way: as recipe steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.errors import RecipeError
from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.runner import run

TRAIN = {"tokens": 2048, "batch_size": 4}


@pytest.fixture(scope="module")
def stages(workshop: Path) -> list[Any]:
    (workshop / "old.txt").write_text((workshop / "train.txt").read_text().replace("fox", "cat"))
    places = [str(workshop / "train.txt"), str(workshop / "old.txt")]
    return [
        {"correct_teacher": {**TRAIN, "learning_rate": 1e-3}},
        {"prune": {"ffn_keep": 0.5}},
        {"distill": {**TRAIN, "evaluate_every": 8, "log_every": 8}},
        {"distill": {**TRAIN, "learning_rate": 1e-4, "on_policy": {"share": 0.25},
                     "data": {"train": places, "weights": [0.95, 0.05], "context": 32}}},
    ]  # fmt: skip


def test_the_line_goes_on_from_the_corrected_teacher_stage_by_stage(
    recipe_of: Callable[..., Recipe], stages: list[Any], tmp_path: Path
) -> None:
    report = run(recipe_of(steps=stages), tmp_path / "out")
    corrected, pruned, first, second = report.steps
    assert [step.name for step in report.steps] == ["correct_teacher", "prune", "distill", "distill"]
    assert corrected.before.kl_nats_per_token == 0
    assert corrected.after.nats_per_token < corrected.before.nats_per_token
    assert pruned.before == corrected.after
    assert first.details["history"][-1]["evaluation_kl_nats_per_token"] > 0
    assert "forward_kl_written" in second.details["history"][-1]
    lineages = [json.loads((tmp_path / "out" / "steps" / name / "model" / "lineage.json").read_text())["entries"]
                for name in ("01-correct_teacher", "03-distill", "04-distill")]  # fmt: skip
    guide = report.steps[0]
    assert guide.name in [entry["step"] for entry in lineages[1]]
    teachers = {entry["inputs"].get("teacher") for entry in lineages[2] if entry["step"] == "distill"}
    assert len(teachers) == 1  # both stages follow the corrected teacher
    assert lineages[1][-1]["inputs"]["train"] != lineages[2][-1]["inputs"]["train"]
    said: list[str] = []
    run(recipe_of(steps=stages), tmp_path / "out", notify=said.append)
    assert not [line for line in said if line.endswith("running")]
    changed = [
        *stages[:3],
        {"distill": {**stages[3]["distill"], "data": {**stages[3]["distill"]["data"], "context": 16}}},
    ]
    said.clear()
    run(recipe_of(steps=changed), tmp_path / "out", notify=said.append)
    assert [line for line in said if line.endswith("running")] == ["distill: running"]


def test_mistakes_in_stages_are_named(recipe_of: Callable[..., Recipe], stages: list[Any]) -> None:
    bad = [{"quantize": {"scheme": "palettize"}}, stages[0], {"distill": {"data": {"train": ["a"], "weights": [1, 2]}}}]
    with pytest.raises(RecipeError, match=r"weights=\[1.0, 2.0\]") as caught:
        recipe_of(steps=bad)
    assert "correct_teacher after quantize makes no sense" in str(caught.value)
