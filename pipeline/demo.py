"""`dwindle demo`: the recipe in starter/demo.yaml on the embedded teacher and on freshly told stories."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.run_folder import RunFolder
from dwindle.report import Report
from dwindle.starter import TEACHER, corpus
from dwindle.starter.skills import skill_tasks
from dwindle.storage import write_text

__all__ = ["demo_recipe", "run_demo"]

TRAIN_DOCUMENTS = 4_000
EVALUATION_DOCUMENTS = 400
STORY_SEED = 7
TASK_STORIES = 320
TASK_SEED = 900_000_000
"""First seed of the stories that task records come from: far from those of the text."""
MARKS = {"train": "\n<|endoftext|>\n", "validation": "\n\n"}
"""What stands between two documents: training text is split there, evaluation text is measured exactly as it is."""


def demo_recipe(folder: Path) -> Recipe:
    """Tell the stories into `folder`/data (once) and return the recipe that uses them."""
    texts = {"train": TRAIN_DOCUMENTS, "validation": EVALUATION_DOCUMENTS}
    for split, documents in texts.items():
        place = folder / "data" / f"{split}.txt"
        if not place.exists():
            write_text(place, MARKS[split].join(corpus(STORY_SEED, documents, split)) + "\n")
    place = Path(str(importlib.resources.files("dwindle.starter") / "demo.yaml"))
    recipe: dict[str, Any] = yaml.safe_load(place.read_text(encoding="utf-8"))
    for task in next(step["adapt"] for step in recipe["steps"] if "adapt" in step)["tasks"]:
        task["data"] = [str(_task_records(folder / "data", task["name"]))]
    recipe["teacher"] = {**(recipe.get("teacher") or {}), "model": str(TEACHER)}
    recipe["data"] = {**(recipe.get("data") or {}), "train": [str(folder / "data" / "train.txt")],
                      "evaluation": str(folder / "data" / "validation.txt")}  # fmt: skip
    return Recipe.parse(recipe)


def _task_records(folder: Path, skill: str) -> Path:
    """Write one record of a skill for each story (once)."""
    place = folder / "tasks" / f"{skill}.jsonl"
    if not place.exists():
        found = skill_tasks(skill, range(TASK_SEED, TASK_SEED + TASK_STORIES))
        rows = [{"prompt": task.prompt, "answer": task.answer, "choices": task.choices} for task in found]
        write_text(place, "".join(json.dumps(row) + "\n" for row in rows))
    return place


def run_demo(folder: Path, *, notify: Callable[[str], None] | None = None) -> Report:
    """Run the demo into `folder` and return its report. Raises OutputError for a folder with other files."""
    from dwindle.pipeline.runner import run

    RunFolder(folder).require_own({"teacher": str(TEACHER)})
    return run(demo_recipe(folder.absolute()), folder, notify=notify)
