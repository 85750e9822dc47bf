"""Skills of the demo's task adapters: right by grammar, and never asked for in what the teacher reads."""

from __future__ import annotations

import pytest

from dwindle.starter import corpus
from dwindle.starter.grammar import past, present
from dwindle.starter.skills import SKILLS, skill_tasks

SEEDS = range(900_000_000, 900_000_200)


@pytest.mark.parametrize("skill", SKILLS)
def test_every_story_gives_one_task_with_its_answer_among_the_choices(skill: str) -> None:
    found = skill_tasks(skill, SEEDS)
    assert found == skill_tasks(skill, SEEDS)
    assert [task.story_seed for task in found] == list(SEEDS)
    for task in found:
        assert task.prompt == f"Question: {task.question}\nAnswer:"
        assert task.choices.count(task.answer) == 1
        assert len(set(task.choices)) == len(task.choices) >= 3
        assert task.answer not in task.question


def test_the_past_bends_the_verb_and_nothing_else() -> None:
    for task in skill_tasks("past", SEEDS):
        asked = task.question.removeprefix("Say in the past: ").rstrip(".").split()
        told = task.answer.rstrip(".").split()
        assert [i for i, (a, b) in enumerate(zip(asked, told, strict=True)) if a != b] in ([1], [])


def test_a_denied_event_has_the_bare_verb() -> None:
    for task in skill_tasks("negation", SEEDS):
        name, did, denied, verb, *rest = task.answer.rstrip(".").split()
        asked = task.question.removeprefix("Say that it is not true: ").rstrip(".").split()
        assert (did, denied) == ("did", "not")
        assert [name, past(verb), *rest] == asked
        assert present(verb) != verb


def test_the_teacher_is_never_asked_for_them() -> None:
    for document in corpus(3, 300):
        assert "in the past:" not in document
        assert "not true" not in document
