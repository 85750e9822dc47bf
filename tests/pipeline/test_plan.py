"""What a dry run finds out before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dwindle.errors import DataError, RecipeError, UnsupportedModel
from dwindle.pipeline.plan import plan
from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.runner import run


@pytest.mark.parametrize("teacher", ["no/such/folder", "."])
def test_a_teacher_that_is_none_is_told(recipe_of: Callable[..., Recipe], tmp_path: Path, teacher: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"no config\.json|config\.json .*missing|has no config"):
        plan(recipe_of(f"teacher.model={tmp_path if teacher == '.' else teacher}"))


def test_data_that_is_not_there_is_told_and_a_data_set_may_come_later(recipe_of: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match=r"no\.txt.*no\.jsonl"):
        plan(recipe_of("data.train=[no.txt, no.jsonl]"))
    assert "train     someone/stories" in plan(recipe_of("data.train=[someone/stories]"))["lines"]


def test_targets_that_nobody_knows_are_told_before_any_work(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_of("validate.targets=[iphone-15-prop, host, toaster]")
    for act in (plan, lambda recipe: run(recipe, tmp_path / "out")):
        with pytest.raises(RecipeError, match=r"did you mean 'iphone-15-pro'(.|\n)*'toaster'"):
            act(recipe)
    assert not list((tmp_path / "out").glob("steps/*"))
