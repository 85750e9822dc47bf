"""Replaces e-mail addresses, phone numbers and secret keys by tags: `<EMAIL>`, `<PHONE>`, `<KEY>`.

- E-mail: an address with a top-level domain. Addresses at example.com, .org, .net and .invalid, .test, .localhost
  (RFC 2606) belong to nobody and stay.
- Phone: international (`+49 30 1234567`, 8 to 15 digits, E.164), or North American with separators (`(555) 123-4567`,
  `555-123-4567`). Runs of digits without a plus sign or separators are numbers, not phones.
- Keys: the fixed prefixes of services' keys (AWS, GitHub, GitLab, Slack, Google, Stripe, OpenAI and Anthropic, Hugging
  Face, npm, PyPI, SendGrid, Twilio), JSON web tokens, private keys in PEM, passwords in URLs, and values assigned to a
  name like api_key or secret that look random (both letters and digits, at least 16 characters, 3 bits of entropy a
  character).

A regular expression runs only where a piece of text it cannot do without occurs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.errors import RecipeError

__all__ = ["PersonalData", "scrubbed"]

Kind = Literal["email", "phone", "key"]

_LOCAL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+%-]{0,63}\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.)+[A-Za-z]{2,24}(?![\w-])")
_NOBODY = re.compile(r"(?:[\w.-]+\.)?(?:example\.(?:com|org|net)|[\w-]+\.(?:invalid|test|localhost|example))", re.I)
_PHONES = (
    re.compile(
        r"\+(?<![\w+./:-]\+)[1-9]\d{0,2}(?:[ .\-\u00a0]?\(?\d{1,5}\)?){2,6}(?:[ ]?(?:x|ext\.?)[ ]?\d{1,5})?"
        r"(?![\w/]|[.-]\d)"
    ),
    re.compile(
        r"[(\d](?<![\w+./:-].)(?:(?<=1)[ .-])?(?:(?<=\()\d{3}\)[ ]?|\(\d{3}\)[ ]?|\d{2,3}[.-])"
        r"\d{3}[.-]\d{4}(?![\w/]|[.-]\d)"
    ),
)
_KEYS = {
    **{start: re.compile(r"[A-Z0-9]{16}") for start in ("AKIA", "ASIA", "ABIA", "ACCA")},
    **{start: re.compile(r"[A-Za-z0-9]{36,255}") for start in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "npm_")},
    "github_pat_": re.compile(r"[A-Za-z0-9_]{22,255}"),
    "glpat-": re.compile(r"[\w-]{20,255}"),
    "xox": re.compile(r"[abeoprs]-[A-Za-z0-9-]{10,255}"),
    "AIza": re.compile(r"[\w-]{35}"),
    **{
        f"{kind}_{mode}_": re.compile(r"[A-Za-z0-9]{16,255}")
        for kind in ("sk", "pk", "rk")
        for mode in ("live", "test")
    },
    "sk-": re.compile(r"(?=[a-z-]{0,255}[A-Z0-9])(?:ant-|proj-|svcacct-)?[\w-]{20,255}"),
    "hf_": re.compile(r"[A-Za-z0-9]{30,255}"),
    "pypi-": re.compile(r"[\w-]{50,500}"),
    "SG.": re.compile(r"[\w-]{22}\.[\w-]{43}"),
    "SK": re.compile(r"[0-9a-f]{32}"),
    "eyJ": re.compile(r"[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
}
"""How a key begins -> how it goes on."""
_PEM = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
    re.S,
)
_IN_URL = re.compile(r"://([^\s/:@'\"<>]{1,64}):([^\s/:@'\"<>]{3,128})@(?=[A-Za-z0-9])")
_VALUE = re.compile(r"""["']([\w+/=.~-]{16,256})["']""")
_NAME = re.compile(
    r"(?:(?:api|access|auth|secret|private|client|encryption)[_-]?(?:key|token|secret)|password|passwd|secret|token)"
    r"""["']?[ ]{0,4}(?:[:=]|=>)[ ]{0,4}\Z""",
    re.I,
)


@dataclass(frozen=True)
class PersonalData:
    """Stage: personal data and secrets replaced by tags."""

    kinds: tuple[Kind, ...] = ("email", "phone", "key")
    """What is replaced."""
    name: ClassVar[str] = "personal_data"

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in _SCRUBBERS]:
            raise RecipeError(f"personal_data: kinds={unknown!r} (needed: some of {', '.join(_SCRUBBERS)}).")

    def edit(self, document: Document, count: StageCount) -> Document | None:
        """Return the document with tags in place of what was found."""
        text, found = scrubbed(document.text, self.kinds)
        if not found:
            return document
        for kind, number in found.items():
            count.changes[f"{kind} replaced"] += number
        count.changes["documents changed"] += 1
        return replace(document, text=text, how={**document.how, "scrubbed": dict(sorted(found.items()))})


def scrubbed(text: str, kinds: tuple[Kind, ...] = ("email", "phone", "key")) -> tuple[str, dict[str, int]]:
    """Return (the text with tags, how many of each kind were replaced).

    >>> scrubbed("Write to ada@lovelace.org or call +44 20 7946 0958.")
    ('Write to <EMAIL> or call <PHONE>.', {'email': 1, 'phone': 1})
    """
    found: Counter[str] = Counter()
    for kind in _SCRUBBERS:
        if kind in kinds:
            text = _SCRUBBERS[kind](text, found)
    return text, dict(found)


def _without_keys(text: str, found: Counter[str]) -> str:
    def tag(_: re.Match[str]) -> str:
        found["key"] += 1
        return "<KEY>"

    def in_url(match: re.Match[str]) -> str:
        found["key"] += 1
        return f"://{match[1]}:<KEY>@"

    def assigned(match: re.Match[str]) -> str:
        before = match.string[max(0, match.start() - 40) : match.start()]
        if not _random(match[1]) or _NAME.search(before) is None:
            return match.group()
        found["key"] += 1
        return f"{match.group()[0]}<KEY>{match.group()[-1]}"

    if "-----BEGIN" in text:
        text = _PEM.sub(tag, text)
    for start, rest in _KEYS.items():
        if start in text:
            spans = []
            for at in _places(text, start):
                match = rest.match(text, at + len(start))
                if match and not _alphanumeric(text, at - 1) and not _alphanumeric(text, match.end()):
                    spans.append((at, match.end()))
            text = _replaced(text, spans, "<KEY>", found, "key")
    if "://" in text and "@" in text:
        text = _IN_URL.sub(in_url, text)
    return _VALUE.sub(assigned, text)


def _places(text: str, wanted: str) -> Iterator[int]:
    at = text.find(wanted)
    while at >= 0:
        yield at
        at = text.find(wanted, at + len(wanted))


def _alphanumeric(text: str, at: int) -> bool:
    """Return whether a character belongs to an ASCII name; false outside the text."""
    return 0 <= at < len(text) and (text[at] == "_" or (text[at].isascii() and text[at].isalnum()))


def _replaced(text: str, spans: list[tuple[int, int]], tag: str, found: Counter[str], kind: str) -> str:
    """Return the text with a tag in place of the spans; one that begins inside another is left to it."""
    parts, end = [], 0
    for begin, behind in spans:
        if begin >= end:
            parts += [text[end:begin], tag]
            end = behind
            found[kind] += 1
    return "".join([*parts, text[end:]])


def _random(value: str) -> bool:
    """Return whether a value looks drawn at random rather than written.

    >>> _random("c8Jf03kQz91LmXw7"), _random("my_token_name_here"), _random("aaaaaaaaaaaaaaa1")
    (True, False, False)
    """
    if not (any(c.isdigit() for c in value) and any(c.isalpha() for c in value)):
        return False
    shares = [number / len(value) for number in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= 3


def _without_emails(text: str, found: Counter[str]) -> str:
    spans = []
    for at in _places(text, "@"):
        domain = _DOMAIN.match(text, at + 1)
        if domain is None or _NOBODY.fullmatch(domain.group()):
            continue
        begin = max(0, at - 65)
        if (local := _LOCAL.search(text[begin:at])) is not None:
            spans.append((begin + local.start(), domain.end()))
    return _replaced(text, spans, "<EMAIL>", found, "email")


def _without_phones(text: str, found: Counter[str]) -> str:
    def tag(match: re.Match[str]) -> str:
        if not 8 <= sum(c.isdigit() for c in match.group()) <= 20:
            return match.group()
        found["phone"] += 1
        return "<PHONE>"

    for pattern in _PHONES:
        text = pattern.sub(tag, text)
    return text


_SCRUBBERS: dict[str, Callable[[str, Counter[str]], str]] = {
    "key": _without_keys,
    "email": _without_emails,
    "phone": _without_phones,
}
"""Keys first: a password in a URL looks like an address."""
