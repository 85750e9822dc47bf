"""Tasks: every answer follows from the story's text, found here by other means than the state behind it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from dwindle.starter import KINDS, Story, Task, check, story, tasks
from dwindle.starter.grammar import future, past, present

SAMPLE = [(told, tasks(told)) for told in map(story, range(200))]
ALL = [(told, task) for told, asked in SAMPLE for task in asked]


def of_kind(kind: str) -> list[tuple[Story, Task]]:
    return [(told, task) for told, task in ALL if task.kind == kind]


def sentences_with(told: Story, *parts: str) -> list[str]:
    return [s for s in told.sentences if all(part in s for part in parts)]


def test_every_kind_is_asked_often_enough() -> None:
    stories = Counter(kind for _, asked in SAMPLE for kind in {task.kind for task in asked})
    assert set(stories) == set(KINDS)
    assert min(stories.values()) > 0.75 * len(SAMPLE)


def test_tasks_are_deterministic_and_no_question_comes_twice() -> None:
    for told, asked in SAMPLE[:50]:
        assert tasks(told) == asked
        assert len({task.question for task in asked}) == len(asked)


def test_prompts_have_the_plain_format_and_answers_are_among_the_choices() -> None:
    for told, task in ALL:
        assert task.prompt == f"{told.text}\n\nQuestion: {task.question}\nAnswer:"
        assert task.choices.count(task.answer) == 1
        assert len(set(task.choices)) == len(task.choices) >= 2
        assert not any(choice != task.answer and check(task, choice) for choice in task.choices)


def test_where_and_what_answers_stand_in_a_sentence_of_the_story() -> None:
    for told, task in of_kind("where") + of_kind("what"):
        assert sentences_with(told, task.answer), task


def test_who_answers_are_told_by_the_text_alone() -> None:
    """The sentence with the asked words names the answer, or a pronoun for whom the sentences before name."""
    for told, task in of_kind("who"):
        verb = task.question.removeprefix("Who ").rstrip("?").split()[0]
        last_noun = task.question.rstrip("?").split()[-1]
        found = [i for i, s in enumerate(told.sentences) if f" {verb} " in f" {s[:-1]} " and last_noun in s]
        named = [told.sentences[j] for i in found for j in range(max(0, i - 3), i + 1)]
        assert any(task.answer in sentence for sentence in named), task


def test_why_answers_follow_the_feeling() -> None:
    for told, task in of_kind("why"):
        name, feeling = re.fullmatch(r"Why was (\w+) (\w+)\?", task.question).groups()  # type: ignore[union-attr]
        sentences = sentences_with(told, name, f"{feeling} {task.answer}.")
        assert len(sentences) == 1, task


def test_next_answers_come_right_after_the_asked_event() -> None:
    for told, task in of_kind("next"):
        before = task.question.removeprefix("What happened after ").rstrip("?").split(" ", 1)[1]
        after = task.answer[:-1].split(" ", 1)[1]
        assert re.search(re.escape(before) + r"\. [^.]*" + re.escape(after), told.text), task


def test_tense_answers_change_the_verb_and_nothing_else() -> None:
    for told, task in of_kind("present") + of_kind("future"):
        clause = task.question.split(": ", 1)[1]
        assert clause.split(" ", 2)[2:] == [] or clause.split()[-1] == task.answer.split()[-1]
        assert clause.split()[0] == task.answer.split()[0]
        assert (" will " in task.answer) == (task.kind == "future")
        assert clause.split(" ", 1)[1] in told.text


def test_check_takes_the_first_line_and_nothing_but_the_answer() -> None:
    task = Task("where", "Where?", "", "in the garden", ("in the garden", "at home"), 0)
    assert check(task, " in the garden")
    assert check(task, "In the garden.\nQuestion: Who?")
    assert not check(task, "in the garden and at home")
    assert not check(task, "")
    assert not check(task, "\n\nat home")


@pytest.mark.parametrize(
    ("verb", "forms"),
    [
        ("go", ("went", "goes", "will go")),
        ("carry", ("carried", "carries", "will carry")),
        ("play", ("played", "plays", "will play")),
        ("hug", ("hugged", "hugs", "will hug")),
        ("wash", ("washed", "washes", "will wash")),
        ("give back", ("gave back", "gives back", "will give back")),
        ("forgive", ("forgave", "forgives", "will forgive")),
        ("notice", ("noticed", "notices", "will notice")),
        ("visit", ("visited", "visits", "will visit")),
    ],
)
def test_conjugation(verb: str, forms: tuple[str, str, str]) -> None:
    assert (past(verb), present(verb), future(verb)) == forms
