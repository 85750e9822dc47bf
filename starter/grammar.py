"""English forms that the story world needs: three tenses of a verb, and articles.

Regular verbs follow spelling rules; irregular ones are listed. A verb may carry a particle ("pick up"): only its first
word bends. Every verb that a plot or a side act uses is conjugated by these functions alone, so a rewritten sentence
is right by construction.
"""

from __future__ import annotations

__all__ = [
    "DOUBLING",
    "IRREGULAR_PAST",
    "IRREGULAR_PRESENT",
    "VOWELS",
    "capitalized",
    "future",
    "past",
    "present",
    "with_article",
]

_IRREGULAR = (
    "be:was beat:beat begin:began bite:bit blow:blew break:broke bring:brought build:built buy:bought "
    "catch:caught choose:chose come:came cut:cut dig:dug do:did draw:drew drink:drank drive:drove eat:ate "
    "fall:fell feed:fed feel:felt fight:fought find:found fly:flew forget:forgot forgive:forgave get:got "
    "give:gave go:went grow:grew have:had hang:hung hear:heard hide:hid hit:hit hold:held keep:kept know:knew "
    "lay:laid lead:led leave:left lend:lent let:let lose:lost make:made meet:met put:put read:read ride:rode "
    "ring:rang rise:rose run:ran say:said see:saw sell:sold send:sent sew:sewed shake:shook show:showed "
    "shut:shut sing:sang sit:sat sleep:slept speak:spoke stand:stood steal:stole sweep:swept swim:swam "
    "take:took teach:taught tear:tore tell:told think:thought throw:threw understand:understood wake:woke "
    "wear:wore win:won write:wrote split:split"
)
IRREGULAR_PAST: dict[str, str] = dict(pair.split(":") for pair in _IRREGULAR.split())
IRREGULAR_PRESENT: dict[str, str] = {"be": "is", "have": "has", "do": "does", "go": "goes"}
# Verbs of more than one syllable or ending in w, x, y keep a single consonant; these short ones double it.
DOUBLING: tuple[str, ...] = ("drop", "hug", "grab", "wrap", "trip", "stop", "chat", "pat", "plan", "slip", "tap", "rub")
VOWELS = "aeiou"


def past(verb: str) -> str:
    """The past tense of a verb, particle kept.

    >>> past("pick up"), past("carry"), past("find"), past("drop"), past("chase")
    ('picked up', 'carried', 'found', 'dropped', 'chased')
    """
    head, space, particle = verb.partition(" ")
    if head in IRREGULAR_PAST:
        form = IRREGULAR_PAST[head]
    elif head.endswith("e"):
        form = head + "d"
    elif head.endswith("y") and head[-2] not in VOWELS:
        form = head[:-1] + "ied"
    elif head in DOUBLING:
        form = head + head[-1] + "ed"
    else:
        form = head + "ed"
    return form + space + particle


def present(verb: str) -> str:
    """The third person singular of the present tense.

    >>> present("wash"), present("carry"), present("buy"), present("give back")
    ('washes', 'carries', 'buys', 'gives back')
    """
    head, space, particle = verb.partition(" ")
    if head in IRREGULAR_PRESENT:
        form = IRREGULAR_PRESENT[head]
    elif head.endswith(("s", "sh", "ch", "x", "z", "o")):
        form = head + "es"
    elif head.endswith("y") and head[-2] not in VOWELS:
        form = head[:-1] + "ies"
    else:
        form = head + "s"
    return form + space + particle


def future(verb: str) -> str:
    """The future tense.

    >>> future("take away")
    'will take away'
    """
    return f"will {verb}"


def with_article(noun_phrase: str) -> str:
    """The phrase with "a" or "an".

    >>> with_article("old key"), with_article("red kite")
    ('an old key', 'a red kite')
    """
    return ("an " if noun_phrase[0] in VOWELS else "a ") + noun_phrase


def capitalized(text: str) -> str:
    """The text with its first letter in upper case, the rest untouched.

    >>> capitalized("the fox met Mia.")
    'The fox met Mia.'
    """
    return text[:1].upper() + text[1:]
