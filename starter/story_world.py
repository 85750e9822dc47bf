"""Stories without end: a seed is a story, with the facts that make questions about it exact.

Why generated and not downloaded: `dwindle demo` has to work offline, and the quality of a small model has to be
checkable. Text whose state is known gives both: a few million tokens to learn from, and answers that are right or
wrong. The idea of text of a low reading age for models of a few million parameters is TinyStories (Eldan and Li,
arXiv 2305.07759); the explicit state behind the text is bAbI's (Weston et al., arXiv 1502.05698).

Seeds belong to splits, so the teacher can never have seen what it is measured on:

    train       0 ... 999,999,999
    validation  1,000,000,000 ... 1,099,999,999
    test        1,100,000,000 ... 1,199,999,999
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from dwindle.starter import lexicon
from dwindle.starter.grammar import with_article
from dwindle.starter.more_plots import PLOTS
from dwindle.starter.telling import Event, Person, Reason, Teller

__all__ = ["SPLITS", "Story", "story"]

SPLITS: dict[str, range] = {
    "train": range(0, 1_000_000_000),
    "validation": range(1_000_000_000, 1_100_000_000),
    "test": range(1_100_000_000, 1_200_000_000),
}


@dataclass(frozen=True)
class Story:
    """A story and its state: `text` is `sentences` joined, the rest is what they state."""

    seed: int
    text: str
    plot: str
    sentences: tuple[str, ...]
    characters: tuple[Person, ...]
    facts: tuple[Event, ...]
    reasons: tuple[Reason, ...]
    mood: str


def _open(t: Teller, hero: Person, friend: Person) -> None:
    """Who, and what kind of day."""
    trait, hobby, home = t.pick(*lexicon.TRAITS), t.pick(*lexicon.HOBBIES), t.pick(*lexicon.HOMES)
    kind, a_kind = hero.kind, with_article(hero.kind)
    t.say(
        f"Once there was a {trait} {kind} named {hero}.",
        f"{hero} was a {trait} {kind} who liked {hobby}.",
        f"There once was {a_kind} called {hero}, who lived by the {home}.",
        f"In a small town lived a {trait} {kind}. {hero.his.capitalize()} name was {hero}.",
        f"{hero} loved {hobby}." if kind in ("girl", "boy") else f"{hero} the {kind} loved {hobby}.",
        about=hero,
    )
    friendly = t.pick(*lexicon.TRAITS)
    link = f"{hero.his.capitalize()} best friend was {friend}"
    t.maybe(0.85, f"{link}, a {friendly} {friend.kind}.", f"{link}.", f"{friend} lived next door.",
            f"Everyone knew {hero} and {friend}.")  # fmt: skip
    time, weather = t.pick(*lexicon.TIMES), t.pick(*lexicon.WEATHERS)
    t.say(
        f"{time} it was {weather}.",
        f"{time} the two friends had nothing to do.",
        f"{time} something happened.",
        f"It was a {weather} day.",
        f"{time}, when it was {weather}, {hero} got up early.",
    )


def story(seed: int) -> Story:
    """The story of this seed: the same text in every process and on every machine.

    >>> story(7) == story(7), story(7).text == story(8).text
    (True, False)
    """
    teller = Teller(random.Random(seed))  # noqa: S311 - reproducible, nothing secret
    hero = teller.person(animal=teller.chance(0.3))
    friend = teller.person(animal=hero.kind not in ("girl", "boy"))
    plot = PLOTS[int(teller.rng.random() * len(PLOTS))]
    _open(teller, hero, friend)
    for probability in (0.2, 0.6, 0.3):
        teller.detail(0.25)
        if teller.chance(probability):
            teller.aside()
    plot(teller, hero, friend)
    return Story(
        seed=seed,
        text=" ".join(teller.sentences),
        plot=plot.__name__,
        sentences=tuple(teller.sentences),
        characters=tuple(teller.cast),
        facts=tuple(teller.events),
        reasons=tuple(teller.reasons),
        mood=teller.mood,
    )
