"""The plot schemas: what goes wrong, what somebody does about it, and the moods it can end in.

A plot is a function of the teller, the hero and the friend. Optional sentences and several endings per plot keep the
mood from following from the plot alone: a model has to read the ending.
"""

from __future__ import annotations

from collections.abc import Callable

from dwindle.starter import lexicon
from dwindle.starter.telling import Person, Teller

__all__ = [
    "Plot",
    "birthday",
    "building",
    "either",
    "lost_and_found",
    "night_noise",
    "quarrel",
    "rescue",
    "sharing",
    "storm",
]

Plot = Callable[[Teller, Person, Person], None]


def lost_and_found(t: Teller, hero: Person, friend: Person) -> None:
    """The hero loses something; the friend may find it."""
    thing, here, there = t.thing(t.pick("toy", "treasure", "clothing")), t.place(), t.place()
    t.act(hero, t.pick("take", "bring", "carry"), thing, place=here.to, first=True)
    t.maybe(0.4, f"It was {hero.his} favorite {thing.noun}.", f"The {thing.noun} came from {hero.his} grandmother.")
    t.act(hero, t.pick("lose", "drop", "forget"), thing, place=here)
    cause = t.pick(f"{thing} was gone", f"{thing} was lost", f"{hero.he} missed {thing}", f"nobody could see {thing}")
    t.feel(hero, t.pick("sad", "upset", "unhappy", "worried"), cause)
    t.act(friend, t.pick("look for", "search for"), thing, opener=t.pick("So", "Then", ""))
    if t.chance(0.3):
        t.speak(friend, "Do not cry.", "Where did you see it last?", "I will help you.")
    if t.chance(0.7):
        t.act(friend, t.pick("find", "see", "discover"), thing, place=there, opener=t.pick("At last", "Soon", ""))
        t.act(friend, "give back", thing, tail=f"to {hero}")
        t.end(hero, "happy", "happy", "surprised", "calm")
    else:
        t.say("But it was too late.", "It was nowhere to be seen.", "Only the wind was there.")
        t.end(hero, "sad", "sad", "angry", "calm")


def sharing(t: Teller, hero: Person, friend: Person) -> None:
    """Someone is hungry; someone has food."""
    food, here = t.thing(t.pick("food", "dish")), t.place()
    t.act(hero, t.pick("get", "buy", "choose", "pack"), food, place=t.place(), first=True)
    t.act(hero, "meet", friend.name, place=here, opener=t.pick("Later", "Then", ""))
    cause = t.pick("there was no breakfast", f"{friend.he} forgot {friend.his} lunch", "the soup was all gone",
                   f"a dog ate {friend.his} bread")  # fmt: skip
    t.feel(friend, t.pick("hungry", "weak", "tired"), cause)
    if t.chance(0.5):
        t.speak(friend, "That smells so good.", "May I have a bite?", "I am so hungry.")
    if t.chance(0.7):
        t.act(hero, t.pick("share", "split"), food, tail=f"with {friend}")
        t.maybe(0.5, "It tasted even better that way.", "They ate every crumb.", "Two can eat as well as one.")
        t.end(either(t, hero, friend), "happy", "calm", "proud", "surprised")
    else:
        t.act(hero, t.pick("hide", "finish", "drop"), food, opener="But")
        t.act(friend, t.pick("leave", "walk away", "turn away"), opener=t.pick("So", "Then"))
        t.end(either(t, hero, friend), "sad", "angry", "sad")


def either(t: Teller, hero: Person, friend: Person) -> Person:
    """Whose feelings end the story."""
    return hero if t.chance(0.7) else friend


def storm(t: Teller, hero: Person, friend: Person) -> None:
    """Weather surprises two walkers."""
    here, shelter, thing = t.place(), t.place(), t.thing("clothing")
    t.act(hero, t.pick("walk", "run", "go"), place=here.to, tail=f"with {friend}")
    t.act(hero, t.pick("wear", "carry", "bring"), thing, first=True)
    t.say("Dark clouds came up.", "Suddenly it began to rain.", "Then a great storm came.", "Snow began to fall.")
    cause = t.pick("the thunder was loud", "the sky was black", "the wind was wild", "the path was gone")
    t.feel(friend, t.pick("afraid", "scared", "frightened", "worried"), cause)
    t.act(hero, t.pick("lend", "give", "hand"), thing, tail=f"to {friend}")
    if t.chance(0.4):
        t.speak(hero, "Hold my hand.", "Do not be afraid.", "We must find a dry place.")
    t.act(either(t, hero, friend), t.pick("find", "see"), "a dry corner", place=shelter)
    t.maybe(0.4, "They waited a long time.", "The rain drummed on and on.", "They told each other stories.")
    t.end(either(t, hero, friend), "calm", "calm", "scared", "happy", "angry")


def building(t: Teller, hero: Person, friend: Person) -> None:
    """The hero builds something; it breaks; it may be mended."""
    work, tool, here = t.thing("work"), t.thing("builder"), t.place()
    t.act(hero, t.pick("borrow", "take", "get"), tool, tail=f"from {friend}", first=True)
    t.act(hero, t.pick("build", "make"), work, place=here, first=True)
    t.maybe(0.4, "It took all day.", "It was hard work.", "It needed a lot of wood.")
    breaker = t.pick("a goat jumped on it", "the wind blew too hard", "the wood was rotten", "a nail was loose",
                     "the ground was wet")  # fmt: skip
    t.say(f"But then {work} fell apart.", f"Crack! The {work.noun} broke.", f"Oh no, {work} broke in two.")
    t.feel(hero, t.pick("angry", "upset", "cross", "sad"), breaker)
    t.act(friend, t.pick("bring", "fetch", "find"), t.thing("builder"), place=t.place(), first=True)
    if t.chance(0.75):
        t.act(either(t, hero, friend), t.pick("fix", "mend", "repair"), work, opener=t.pick("Then", "Slowly", ""))
        t.end(hero, "proud", "proud", "happy", "surprised")
    else:
        t.act(hero, t.pick("kick", "leave", "burn"), work)
        t.end(hero, "angry", "sad", "calm")


def birthday(t: Teller, hero: Person, friend: Person) -> None:
    """A gift, a secret, a party."""
    gift, shop, hiding = t.thing("gift"), t.place(), t.place()
    t.say(f"It was the birthday of {friend}.", f"{friend} was going to have a birthday.")
    t.act(hero, t.pick("buy", "make", "choose", "find"), gift, place=shop, first=True)
    t.act(hero, t.pick("hide", "wrap", "put"), gift, place=hiding)
    if t.chance(0.5):
        cause = t.pick("nobody said a word", "the house was empty", "there was no cake", "nobody came to the door")
        t.feel(friend, t.pick("lonely", "sad", "unhappy"), cause)
    if t.chance(0.7):
        t.act(hero, t.pick("give", "show", "bring"), gift, tail=f"to {friend}", opener=t.pick("Then", "At noon", ""))
        t.speak(friend, "Thank you so much.", "Is this for me?", "I have never had one.", "How did you know?")
        t.end(friend, "surprised", "surprised", "happy", "happy", "calm")
    else:
        t.act(hero, t.pick("break", "lose", "drop"), gift, opener=t.pick("But", "Sadly"))
        t.end(either(t, hero, friend), "sad", "angry", "calm")


def quarrel(t: Teller, hero: Person, friend: Person) -> None:
    """Two want the same thing."""
    thing, here = t.thing(t.pick("toy", "treasure")), t.place()
    t.act(hero, t.pick("find", "see", "discover"), thing, place=here, first=True)
    t.act(friend, t.pick("grab", "take", "snatch", "want"), thing)
    t.speak(either(t, hero, friend), "It is mine.", "I saw it first.", "Give it to me.", "Why should you have it?")
    cause = t.pick(f"{friend} would not share", f"{friend} pulled too hard", f"{friend} did not ask",
                   f"{friend} was not fair")  # fmt: skip
    t.feel(hero, t.pick("angry", "cross", "hurt", "upset"), cause)
    if t.chance(0.6):
        t.act(friend, t.pick("give back", "hand over", "return"), thing, tail=f"to {hero}")
        t.act(friend, t.pick("say sorry", "apologize"), tail=f"to {hero}")
        t.maybe(0.5, "After that they took turns.", "They played until dark.", "A friend is worth more than a toy.")
        t.end(either(t, hero, friend), "happy", "happy", "calm", "proud")
    else:
        t.act(either(t, hero, friend), t.pick("break", "spoil", "throw away"), thing, opener=t.pick("Then", "But"))
        t.end(either(t, hero, friend), "angry", "angry", "sad")


def rescue(t: Teller, hero: Person, friend: Person) -> None:
    """A small animal is stuck."""
    pet, tool, here = t.thing("pet"), t.thing("rescue"), t.place()
    t.act(hero, t.pick("hear", "see", "notice"), pet, place=here, first=True)
    cause = t.pick("its foot was stuck", "it could not get down", "the water was deep", "it was far from its mother")
    t.say(f"It was crying because {cause}.", f"The {pet.noun} could not move.", "It was cold and alone.")
    t.act(friend, t.pick("fetch", "bring", "get"), tool, tail=t.pick("from the house", "from the shed", ""), first=True)
    if t.chance(0.4):
        t.speak(hero, "Be careful.", "Do not move, little one.", "Can you reach it?")
    worry = t.pick("the branch was thin", "the ice was cracking", "the rope was old", "the wall was high")
    t.feel(either(t, hero, friend), t.pick("nervous", "afraid", "worried"), worry)
    if t.chance(0.75):
        t.act(hero, t.pick("save", "free", "rescue", "pull out"), pet, opener=t.pick("Then", "At last", ""))
        t.act(either(t, hero, friend), t.pick("feed", "hug", "keep", "hold", "name"), pet)
        t.end(hero, "proud", "proud", "happy", "calm")
    else:
        t.say(f"But {pet} ran off into the dark.", f"Then {pet} got away and was not seen again.")
        t.end(hero, "sad", "surprised", "scared")


def night_noise(t: Teller, hero: Person, friend: Person) -> None:
    """Something goes bump in the night."""
    noise, here, light = t.pick(*lexicon.NOISES), t.place(), t.thing("light")
    t.act(hero, "hear", f"a {noise}", place=here)
    cause = t.pick("it was very dark", "the floor creaked", "the noise came closer", "two eyes shone in the dark")
    t.feel(hero, t.pick("afraid", "scared", "frightened"), cause)
    t.act(hero, t.pick("wake up", "call", "wake"), friend.name)
    t.act(friend, t.pick("take", "grab", "hold"), light, first=True)
    if t.chance(0.5):
        t.speak(friend, "Who is there?", "Stay behind me.", "What was that?", "It is only the wind.")
    if t.chance(0.6):
        pet = t.thing("pet")
        t.act(either(t, hero, friend), t.pick("find", "see", "catch"), pet, place=here, first=True)
        t.maybe(0.5, "So that was all it was.", f"It was only {pet.a}.")
        t.end(hero, "surprised", "happy", "calm", "surprised")
    else:
        t.act(either(t, hero, friend), t.pick("shut", "lock", "close"), "the door")
        t.say("There was nothing to be seen.", "Then it came again, louder.", "The light went out.")
        t.end(either(t, hero, friend), "scared", "scared", "calm")
