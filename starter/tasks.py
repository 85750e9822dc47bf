"""Tasks about a story, with answers that can be checked.

Eight kinds: `who`, `where` and `what` ask for a part of an event, `why` for the cause of a feeling, `next` for the
event told right after another, `mood` for how the story ends, `present` and `future` for a sentence of the story in
another tense. A question is asked only where the state has exactly one answer. The format is plain text:

    <story>

    Question: Who found the kite?
    Answer: Mia
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dwindle.errors import DataError
from dwindle.starter import lexicon
from dwindle.starter.story_world import SPLITS, Story, story
from dwindle.starter.telling import Event

__all__ = [
    "KINDS",
    "PAIR_SHARE",
    "PLAIN_SHARE",
    "SEEDS_PER_CORPUS",
    "Task",
    "check",
    "corpus",
    "document",
    "question_text",
    "tasks",
]

KINDS: tuple[str, ...] = ("who", "where", "what", "why", "next", "mood", "present", "future")
SEEDS_PER_CORPUS = 1_000_000
PLAIN_SHARE = 0.15  # documents that are a story and nothing else
PAIR_SHARE = 0.1  # documents that go on with a second story after a blank line


@dataclass(frozen=True)
class Task:
    """A question about a story; `prompt` is what a model reads, `answer` what it should write, one of `choices`."""

    kind: str
    question: str
    prompt: str
    answer: str
    choices: tuple[str, ...]
    story_seed: int


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _unique(events: tuple[Event, ...], *fields: str) -> list[Event]:
    """The events that no other event equals in the given fields."""
    keys = [tuple(str(getattr(event, name)) for name in fields) for event in events]
    count = Counter(keys)
    return [event for event, key in zip(events, keys, strict=True) if count[key] == 1]


def _event_questions(told: Story) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) for the parts of events."""
    for event in _unique(told.facts, "verb", "asked", "tail"):
        yield "who", f"Who {event.asked_clause()}?", event.actor.name
    for event in _unique(told.facts, "actor", "verb", "asked", "tail"):
        if event.place:
            asked = _words(event.verb, event.asked, event.tail)
            yield "where", f"Where did {event.actor} {asked}?", event.place
    for event in _unique(told.facts, "actor", "verb"):
        if event.has_object:
            yield "what", f"What did {_words(str(event.actor), event.verb, event.tail, event.place)}?", event.thing


def _sentence_questions(told: Story) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) for causes, order, mood and tense."""
    feelings = Counter((reason.person.name, reason.feeling) for reason in told.reasons)
    for reason in told.reasons:
        if feelings[reason.person.name, reason.feeling] == 1:
            yield "why", f"Why was {reason.person} {reason.feeling}?", f"because {reason.cause}"
    clauses = Counter(event.clause() for event in told.facts)
    for before, after in zip(told.facts, told.facts[1:], strict=False):
        if after.sentence == before.sentence + 1 and clauses[before.clause()] == 1:
            yield "next", f"What happened after {before.clause()}?", after.clause() + "."
    yield "mood", "What is the mood at the end?", told.mood
    for event in told.facts:
        yield "present", f"Say in the present: {event.clause()}.", event.clause("present") + "."
        yield "future", f"Say in the future: {event.clause()}.", event.clause("future") + "."


def _choices(told: Story, kind: str, question: str, answer: str, rng: random.Random) -> tuple[str, ...]:
    """The answer among others of its kind, most of them from the same story, in random order."""
    if kind == "mood":
        return lexicon.MOODS
    if kind in ("present", "future"):
        clause = question.partition(": ")[2]
        event = next(fact for fact in told.facts if fact.clause() + "." == clause)
        return tuple(event.clause(tense) + "." for tense in ("past", "present", "future"))
    others = {
        "who": [person.name for person in told.characters] + ["Nobody"],
        "where": [event.place for event in told.facts if event.place] + ["at home"],
        "what": [event.thing for event in told.facts if event.has_object] + ["nothing"],
        "why": [f"because {event.clause()}" for event in told.facts],
        "next": [event.clause() + "." for event in told.facts],
    }[kind]
    wrong = sorted(set(others) - {answer})
    rng.shuffle(wrong)
    options = [answer, *wrong[:3]]
    rng.shuffle(options)
    return tuple(options)


def question_text(question: str) -> str:
    """A question as it stands in a document, up to where the answer starts."""
    return f"Question: {question}\nAnswer:"


def tasks(told: Story) -> list[Task]:
    """Every task that this story answers, in an order drawn from its seed."""
    rng = random.Random(f"tasks of {told.seed}")  # noqa: S311 - reproducible, nothing secret
    found: dict[str, Task] = {}
    for kind, question, answer in (*_event_questions(told), *_sentence_questions(told)):
        prompt = f"{told.text}\n\n{question_text(question)}"
        choices = _choices(told, kind, question, answer, rng)
        found.setdefault(question, Task(kind, question, prompt, answer, choices, told.seed))
    drawn = list(found.values())
    rng.shuffle(drawn)
    return drawn


def check(task: Task, generated: str) -> bool:
    """Whether the first line of a generated text is the answer; case, outer spaces and the full stop do not count.

    >>> check(Task("who", "", "", "Mia", ("Mia", "Tom"), 0), " mia.\\nQuestion: Who ran?")
    True
    """
    first_line = generated.strip().partition("\n")[0]
    return _normal(first_line) == _normal(task.answer)


def _normal(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()


def _some_tasks(told: Story, rng: random.Random) -> list[Task]:
    """Two to six tasks, kinds drawn evenly so that the plentiful ones do not crowd out the rest."""
    wanted = 2 + int(rng.random() * 5)
    by_kind: dict[str, list[Task]] = {}
    for task in tasks(told):
        by_kind.setdefault(task.kind, []).append(task)
    chosen: list[Task] = []
    while len(chosen) < wanted and by_kind:
        kinds = sorted(by_kind)
        kind = kinds[int(rng.random() * len(kinds))]
        chosen.append(by_kind[kind].pop())
        if not by_kind[kind]:
            del by_kind[kind]
    return chosen


def document(first_seed: int) -> str:
    """One training document: a story, mostly followed by questions and answers, sometimes by a second story."""
    told = story(first_seed)
    rng = random.Random(f"document {first_seed}")  # noqa: S311 - reproducible, nothing secret
    text = told.text
    if rng.random() >= PLAIN_SHARE:
        lines = [f"{question_text(task.question)} {task.answer}" for task in _some_tasks(told, rng)]
        text = text + "\n\n" + "\n".join(lines)
    if rng.random() < PAIR_SHARE:
        text = text + "\n\n" + story(first_seed + 1).text
    return text


def corpus(seed: int, documents: int, split: str = "train", skip: int = 0) -> Iterator[str]:
    """Documents of a split after the first `skip`; each seed owns a million story seeds of it, two per document.

    Raises DataError when the seed or the number of documents does not fit the split.
    """
    seeds = SPLITS[split]
    largest = len(seeds) // SEEDS_PER_CORPUS
    if not 0 <= seed < largest or not 0 <= skip <= skip + documents <= SEEDS_PER_CORPUS // 2:
        raise DataError(
            f"corpus: found seed={seed}, documents={documents}, skip={skip}; split {split} needs 0 <= seed < "
            f"{largest:,} and at most {SEEDS_PER_CORPUS // 2:,} documents. Take several seeds for more."
        )
    start = seeds.start + seed * SEEDS_PER_CORPUS
    for index in range(skip, skip + documents):
        yield document(start + 2 * index)
