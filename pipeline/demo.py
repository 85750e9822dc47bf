"""`dwindle demo`: the recipe in starter/demo.yaml on the embedded teacher and on freshly told stories."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path

from dwindle.pipeline.recipe import Recipe
from dwindle.report import Report
from dwindle.starter import TEACHER, corpus
from dwindle.storage import write_text

__all__ = ["demo_recipe", "run_demo"]

TRAIN_DOCUMENTS = 4_000
EVALUATION_DOCUMENTS = 400
STORY_SEED = 7
MARKS = {"train": "\n<|endoftext|>\n", "validation": "\n\n"}
"""What stands between two documents: training text is split there, evaluation text is measured exactly as it is."""


def demo_recipe(folder: Path) -> Recipe:
    """Tell the stories into `folder`/data (once) and return the recipe that uses them."""
    texts = {"train": TRAIN_DOCUMENTS, "validation": EVALUATION_DOCUMENTS}
    for split, documents in texts.items():
        place = folder / "data" / f"{split}.txt"
        if not place.exists():
            write_text(place, MARKS[split].join(corpus(STORY_SEED, documents, split)) + "\n")
    recipe = importlib.resources.files("dwindle.starter") / "demo.yaml"
    return Recipe.load(Path(str(recipe)), [
        f"teacher.model={TEACHER}", f"data.train=[{folder / 'data' / 'train.txt'}]",
        f"data.evaluation={folder / 'data' / 'validation.txt'}",
    ])  # fmt: skip


def run_demo(folder: Path, *, notify: Callable[[str], None] | None = None) -> Report:
    """Run the demo into `folder` and return its report."""
    from dwindle.pipeline.runner import run

    return run(demo_recipe(folder.absolute()), folder, notify=notify)
