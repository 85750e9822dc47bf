"""Two skills that no document of the teacher shows: what the demo's task adapters learn.

    past        Say in the past: Mia finds the kite.               Mia found the kite.
    negation    Say that it is not true: Mia found the kite.       Mia did not find the kite.

The kinds in `tasks` are in the teacher's own text, so it answers most of them before anything is adapted. These two
questions it has never read, though every verb stands in its text in three tenses. They need no story: short records.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from dwindle.starter.story_world import story
from dwindle.starter.tasks import Task, question_text
from dwindle.starter.telling import Event

__all__ = ["SKILLS", "skill_tasks"]

SKILLS: tuple[str, ...] = ("past", "negation")


def _denied(event: Event) -> str:
    """An event that did not happen, as a clause without a full stop."""
    return " ".join(
        part for part in (f"{event.actor} did not {event.verb}", event.thing, event.tail, event.place) if part
    )


def skill_tasks(skill: str, seeds: Iterable[int]) -> list[Task]:
    """One task of a skill for the story of each seed; the choices are the event in its tenses, denied where asked.

    >>> skill_tasks("past", [4])[0].question, skill_tasks("negation", [4])[0].answer
    ('Say in the past: June makes a warm pizza for Kate at the playground.', 'June did not try the pizza.')
    """
    found = []
    for seed in seeds:
        event = random.Random(f"{skill} of {seed}").choice(story(seed).facts)  # noqa: S311 - reproducible, not secret
        tenses = {tense: event.clause(tense) + "." for tense in ("past", "present", "future")}
        if skill == "past":
            question, answer = f"Say in the past: {tenses['present']}", tenses["past"]
        else:
            question, answer = f"Say that it is not true: {tenses['past']}", _denied(event) + "."
        choices = tuple(dict.fromkeys((*tenses.values(), answer)))
        found.append(Task(skill, question, question_text(question), answer, choices, seed))
    return found
