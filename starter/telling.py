"""The state behind a story, and the builder that keeps text and state in step.

A plot never writes text alone: `Teller.act` writes the sentence *and* records the `Event`, `Teller.feel` the sentence
and the `Reason`. What the tasks ask is read from those records, so an answer is exact and never parsed from prose.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from dwindle.starter import lexicon
from dwindle.starter.grammar import capitalized, future, past, present, with_article

__all__ = ["Event", "Person", "Place", "Reason", "Teller", "Thing"]


@dataclass(frozen=True)
class Person:
    """A character: a name, the pronouns that go with it, and what kind of creature it is."""

    name: str
    female: bool
    kind: str  # "girl", "boy" or a species

    @property
    def he(self) -> str:
        """Return "she" or "he"."""
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        """Return "her" or "him"."""
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        """Return "her" or "his"."""
        return "her" if self.female else "his"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Place:
    """Where something happens: "in the garden"; one goes "to the garden"."""

    preposition: str
    noun: str

    @property
    def to(self) -> str:
        """Return where one goes."""
        return f"to the {self.noun}"

    def __str__(self) -> str:
        return f"{self.preposition} {self.noun}"


@dataclass(frozen=True)
class Thing:
    """An object with its look: a(red kite), the(kite)."""

    noun: str
    look: str

    @property
    def a(self) -> str:
        """Return the thing as it is told of first, look and all."""
        return with_article(f"{self.look} {self.noun}")

    @property
    def the(self) -> str:
        """Return the thing as it is told of later."""
        return f"the {self.noun}"

    def __str__(self) -> str:
        return self.the


@dataclass(frozen=True)
class Event:
    """Someone did something: enough to say it in any tense and to ask for each of its parts.

    `thing` is the object as the story says it ("a red kite"), `asked` the same in a question ("the kite"), `tail`
    whatever stands between object and place ("to Tom"), `sentence` the index of the sentence that tells it.
    """

    actor: Person
    verb: str
    thing: str = ""
    asked: str = ""
    tail: str = ""
    place: str = ""
    sentence: int = -1
    has_object: bool = False  # the thing is a prop of the story, so "What did ... ?" has an answer

    def clause(self, tense: str = "past", subject: str | None = None) -> str:
        """The event as a clause without a full stop, in the past, present or future."""
        form = {"past": past, "present": present, "future": future}[tense](self.verb)
        return " ".join(part for part in (subject or self.actor.name, form, self.thing, self.tail, self.place) if part)

    def asked_clause(self) -> str:
        """What follows "who" in a question about the actor: past tense, the object definite, no place."""
        return " ".join(part for part in (past(self.verb), self.asked, self.tail) if part)


@dataclass(frozen=True)
class Reason:
    """Someone felt something because of something: the exact answer to a why-question."""

    person: Person
    feeling: str
    cause: str


@dataclass
class Teller:
    """Builds one story: draws its cast and props, writes sentences, records what they state."""

    rng: random.Random
    sentences: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    cast: list[Person] = field(default_factory=list)
    mood: str = ""
    taken: set[str] = field(default_factory=set)  # nouns and names already in this story
    subject: Person | None = None  # whom the last sentence was about, for pronouns

    def chance(self, probability: float) -> bool:
        """Draw whether something of this probability happens."""
        return self.rng.random() < probability

    def pick(self, *options: str) -> str:
        """Draw one of the options."""
        return options[int(self.rng.random() * len(options))]

    def fresh(self, options: tuple[str, ...]) -> str:
        """A word of the list that this story has not used for anything else."""
        while True:
            word = self.pick(*options)
            if word not in self.taken:
                self.taken.add(word)
                return word

    def person(self, animal: bool = False) -> Person:
        """Draw a character and add it to the cast."""
        female = self.chance(0.5)
        name = self.fresh(lexicon.GIRLS if female else lexicon.BOYS)
        kind = self.fresh(lexicon.SPECIES) if animal else ("girl" if female else "boy")
        person = Person(name, female, kind)
        self.cast.append(person)
        return person

    def place(self) -> Place:
        """Draw a place that this story has not used."""
        while True:
            preposition, noun = lexicon.PLACES[int(self.rng.random() * len(lexicon.PLACES))]
            if noun not in self.taken:
                self.taken.add(noun)
                return Place(preposition, noun)

    def thing(self, kind: str) -> Thing:
        """Draw a thing of a kind, with a look."""
        looks = {"pet": lexicon.PET_LOOKS, "food": lexicon.FOOD_LOOKS, "dish": lexicon.FOOD_LOOKS}.get(
            kind, lexicon.LOOKS
        )
        return Thing(self.fresh(lexicon.THINGS[kind]), self.fresh(looks))

    def say(self, *variants: str, about: Person | None = None) -> None:
        """Adds one of the variants as a sentence that states no event."""
        self.sentences.append(capitalized(self.pick(*variants)))
        self.subject = about

    def maybe(self, probability: float, *variants: str, about: Person | None = None) -> None:
        """Say one of the variants with some probability."""
        if self.chance(probability):
            self.say(*variants, about=about)

    def speak(self, person: Person, *lines: str) -> None:
        """Dialogue: the line before or after who said it."""
        line = self.pick(*lines)
        verb = "asked" if line.endswith("?") else self.pick("said", "said", "called", "answered", "whispered")
        inside = line[:-1] + "," if line.endswith(".") else line
        self.say(f'"{inside}" {verb} {person}.', f'{person} {verb}, "{line}"', about=person)

    def act(
        self, actor: Person, verb: str, thing: Thing | str = "", tail: str = "", place: Place | str = "",
        opener: str = "", first: bool = False,
    ) -> None:  # fmt: skip
        """Adds an event; `first` says the thing appears for the first time and takes its look and "a"."""
        shown, asked = str(thing), str(thing)
        if isinstance(thing, Thing):
            shown, asked = (thing.a if first else thing.the), thing.the
        event = Event(actor, verb, shown, asked, tail, str(place), len(self.sentences), isinstance(thing, Thing))
        pronoun = self.subject == actor and self.chance(0.5)
        clause = event.clause(subject=actor.he if pronoun else None)
        self.events.append(event)
        self.say(f"{opener} {clause}." if opener else f"{clause}.", about=actor)

    def feel(self, person: Person, feeling: str, cause: str) -> None:
        """Add a feeling with its cause."""
        self.reasons.append(Reason(person, feeling, cause))
        self.detail(0.15)
        verb = self.pick("was", "was", "felt")
        self.say(f"{person} {verb} {feeling} because {cause}.", about=person)

    def detail(self, probability: float) -> None:
        """A sentence about the world, now and then."""
        self.maybe(probability, *lexicon.DETAILS)

    def aside(self) -> None:
        """A bystander does something somewhere: true, asked about, and beside the plot."""
        others = self.cast[2:]
        bystander = others[0] if others and self.chance(0.5) else self.person()
        verb, kind = lexicon.SIDE_ACTS[int(self.rng.random() * len(lexicon.SIDE_ACTS))]
        opener = self.pick("", "Meanwhile,", "At the same time,", "That day,")
        self.act(bystander, verb, self.thing(kind), place=self.place(), opener=opener, first=True)

    def end(self, person: Person, *moods: str) -> None:
        """Closes the story in one of the moods; repeat a mood to weigh it."""
        self.mood = self.pick(*moods)
        firsts, seconds = lexicon.ENDINGS[self.mood]
        first = self.pick(*firsts).format(his=person.his, he=person.he)
        second = self.pick(*seconds).format(his=person.his, he=person.he)
        opener = self.pick("", "In the end,", "At last,", "That evening,", "After that,")
        joined = self.pick(f"{person} {first} and {second}.", f"{person} {first}. {capitalized(person.he)} {second}.")
        self.say(f"{opener} {joined}".strip(), about=person)
        self.maybe(0.3, *lexicon.CLOSINGS)
