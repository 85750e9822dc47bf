"""Six more plot schemas, and the table of all of them. See `plots.py`."""

from __future__ import annotations

from dwindle.starter import lexicon, plots
from dwindle.starter.plots import Plot, either
from dwindle.starter.telling import Person, Teller

__all__ = ["PLOTS", "contest", "goodbye", "learning", "odd_cooking", "secret_mishap", "treasure_hunt"]


def learning(t: Teller, hero: Person, friend: Person) -> None:
    """The hero practises a skill."""
    skill, here, tool = t.pick(*lexicon.SKILLS), t.place(), t.thing("gift")
    t.say(
        f"{hero} wanted to learn to {skill}.", f"{hero} could not {skill}.", f"{hero} wished to {skill} like {friend}."
    )
    t.act(hero, t.pick("practice", "try", "train"), place=here, tail=t.pick("every day", "all morning", "with care"))
    cause = t.pick(f"{hero.he} fell down", "it was too hard", "the others laughed", f"{hero.his} hands shook")
    t.feel(hero, t.pick("sad", "tired", "upset", "ashamed"), cause)
    t.act(friend, t.pick("teach", "help", "watch"), hero.name, place=t.pick(str(t.place()), ""))
    t.maybe(0.5, "They tried again and again.", "Day after day went by.", "Little by little it got better.")
    if t.chance(0.3):
        t.speak(friend, "Do not give up.", "You can do it.", "Try once more.", "Nobody learns in one day.")
    if t.chance(0.7):
        t.act(
            hero, t.pick("win", "earn", "get"), tool, tail="for it", first=True, opener=t.pick("At last", "In the end")
        )
        t.end(hero, "proud", "proud", "proud", "happy", "surprised")
    else:
        t.act(hero, t.pick("give up", "stop"), opener=t.pick("But", "In the end"))
        t.end(hero, "sad", "angry", "calm")


def secret_mishap(t: Teller, hero: Person, friend: Person) -> None:
    """The hero breaks what is the friend's, and tells or hides it."""
    thing, here, hiding = t.thing("gift"), t.place(), t.place()
    t.act(friend, t.pick("keep", "leave", "put"), thing, place=here, first=True)
    t.act(hero, t.pick("break", "drop", "knock over"), thing, opener=t.pick("By accident", "One day", "Sadly"))
    t.act(hero, t.pick("hide", "bury", "put"), thing, place=hiding)
    cause = t.pick(f"{hero.he} did not tell the truth", "it was all a mistake", f"{friend} trusted {hero.him}",
                   f"{friend} asked about it")  # fmt: skip
    t.feel(hero, t.pick("ashamed", "sorry", "guilty", "nervous"), cause)
    if t.chance(0.6):
        t.act(hero, "tell", "the truth", tail=f"to {friend}", opener=t.pick("Then", "At last", ""))
        t.act(friend, t.pick("forgive", "thank", "hug"), hero.name)
        t.end(hero, "happy", "calm", "calm", "proud", "surprised")
    else:
        t.act(friend, t.pick("find", "discover", "see"), thing, place=hiding, opener=t.pick("Later", "But"))
        t.end(either(t, hero, friend), "angry", "sad", "scared")


def contest(t: Teller, hero: Person, friend: Person) -> None:
    """A contest with a prize."""
    name, prize, here = t.pick(*lexicon.CONTESTS), t.thing("treasure"), t.place()
    t.say(f"There was a {name} {here}.", f"Everyone talked about the {name}.", f"A {name} was to be held {here}.")
    t.act(either(t, hero, friend), t.pick("enter", "join"), f"the {name}")
    t.act(hero, t.pick("practice", "train", "prepare"), place=t.place())
    cause = t.pick(
        "so many people came", f"{friend} was very good", "there was only one chance", "it was the first time"
    )
    t.feel(hero, t.pick("nervous", "excited", "worried"), cause)
    if t.chance(0.4):
        t.speak(friend, "Good luck.", "May the best one win.", "Are you ready?")
    if t.chance(0.5):
        t.act(hero, t.pick("win", "get", "earn"), prize, place=here, first=True, opener=t.pick("In the end", ""))
        t.end(hero, "proud", "proud", "surprised", "happy")
    else:
        t.act(friend, t.pick("win", "get", "earn"), prize, place=here, first=True, opener=t.pick("In the end", ""))
        t.maybe(0.4, f"{hero} came last.", f"{hero} was only second.", "It was very close.")
        t.end(hero, "sad", "angry", "calm", "happy")


def odd_cooking(t: Teller, hero: Person, friend: Person) -> None:
    """Something goes into the dish that should not."""
    dish, here, extra = t.thing("dish"), t.place(), t.thing(t.pick("plant", "toy", "clothing"))
    t.act(hero, t.pick("bake", "cook", "make"), dish, place=here, tail=f"for {friend}", first=True)
    t.act(friend, t.pick("add", "drop", "mix in"), extra, first=True, opener=t.pick("By mistake", "For fun", "Then"))
    t.maybe(0.4, "It smelled very odd.", "The pot began to bubble.", "Smoke came out of the oven.")
    t.act(either(t, hero, friend), t.pick("taste", "try", "eat"), dish, opener=t.pick("Then", "Soon", ""))
    cause = t.pick("it tasted like soap", "it was as hard as stone", "it was far too salty", "it turned blue")
    t.feel(hero, t.pick("shocked", "puzzled", "upset"), cause)
    if t.chance(0.5):
        t.speak(either(t, hero, friend), "What is in this?", "We can try again.", "I like it.", "It is not so bad.")
    t.act(hero, t.pick("throw away", "sell", "finish", "give away"), dish, place=t.pick(str(t.place()), ""))
    t.end(either(t, hero, friend), "happy", "surprised", "angry", "calm")


def goodbye(t: Teller, hero: Person, friend: Person) -> None:
    """The friend goes away."""
    gift, here, away = t.thing(t.pick("gift", "treasure")), t.place(), t.place()
    t.act(hero, t.pick("meet", "visit"), friend.name, place=here)
    cause = t.pick(
        f"{friend} had to move away", f"{friend} was going on a ship", "summer was over", "the train was ready"
    )
    t.feel(hero, t.pick("sad", "unhappy", "lonely"), cause)
    if t.chance(0.5):
        t.speak(either(t, hero, friend), "I will write to you.", "Will you come back?", "Do not forget me.")
    t.act(friend, t.pick("give", "hand", "leave"), gift, tail=f"to {hero}", first=True)
    t.act(friend, t.pick("travel", "move", "go"), place=away.to, opener=t.pick("Then", ""))
    t.act(hero, t.pick("keep", "put", "hang"), gift, place=t.place())
    t.end(hero, "sad", "sad", "calm", "happy", "surprised")


def treasure_hunt(t: Teller, hero: Person, friend: Person) -> None:
    """A map, a hole, and what is in it."""
    chart, tool, prize, here = t.thing("gift"), t.thing("builder"), t.thing("treasure"), t.place()
    t.act(hero, t.pick("find", "open", "get"), chart, place=t.place(), first=True)
    t.say(f"Inside was a note that showed the way {here.to}.", f"A voice told them to go {here.to}.")
    t.act(friend, t.pick("carry", "bring", "take"), tool, place=here.to, first=True)
    t.act(either(t, hero, friend), t.pick("dig", "search", "look around"), place=here)
    if t.chance(0.5):
        cause = t.pick("an owl cried", "the hole was deep", "something moved", "the sun was going down")
        t.feel(either(t, hero, friend), t.pick("afraid", "nervous", "scared"), cause)
    if t.chance(0.7):
        t.act(either(t, hero, friend), t.pick("find", "pull out", "discover"), prize, first=True, opener="At last")
        t.end(hero, "surprised", "happy", "proud")
    else:
        t.say("But the hole was empty.", "Someone had been there before.", "Then the ground began to shake.")
        t.end(either(t, hero, friend), "sad", "scared", "angry")


PLOTS: tuple[Plot, ...] = (
    plots.lost_and_found, plots.sharing, plots.storm, plots.building, plots.birthday, plots.quarrel, plots.rescue,
    plots.night_noise, learning, secret_mishap, contest, odd_cooking, goodbye, treasure_hunt,
)  # fmt: skip
