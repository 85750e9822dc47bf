"""Drops documents that repeat themselves: shares of words in repeated n-grams (Gopher, Rae et al. 2021, table A1).

- For n = 2, 3, 4: occurrences of the commonest n-gram times n, over the number of words (counted only if it occurs
  more than once).
- For n = 5 to 10: share of the words that are covered by an n-gram which occurred before.

The paper counts characters; words (see `words`) say the same and need no second look at the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dwindle.data.curation.stage_count import StageCount
from dwindle.data.curation.words import Words, hashed_words
from dwindle.data.document import Document
from dwindle.errors import RecipeError

__all__ = ["Repetition"]


@dataclass(frozen=True)
class Repetition:
    """Stage: documents that do not repeat themselves too much."""

    commonest: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Largest share of the commonest 2-, 3- and 4-gram."""
    repeated: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Largest share of words in repeated 5- to 10-grams."""
    least_words: int = 20
    """Shorter documents pass: any word that comes twice would count."""
    code: bool = False
    """Judge source code too, which repeats itself by nature."""
    name: ClassVar[str] = "repetition"

    def __post_init__(self) -> None:
        wrong = [f"{name}={list(values)!r} (needed: {number} shares between 0 and 1)"
                 for name, values, number in (("commonest", self.commonest, 3), ("repeated", self.repeated, 6))
                 if len(values) != number or not all(0 <= v <= 1 for v in values)]  # fmt: skip
        if wrong:
            raise RecipeError(f"repetition: {'; '.join(wrong)}.")

    def edit(self, document: Document, count: StageCount) -> Document | None:
        """Return the document if it does not repeat itself too much."""
        if document.how.get("kind") == "code" and not self.code:
            count.changes["documents of source code, passed by"] += 1
            return document
        words = hashed_words([document.text])
        total = len(words.hashes)
        if total >= self.least_words:
            for length, most in enumerate(self.commonest, 2):
                if (share := _commonest(words, length)) > most:
                    count.drop(document, f"the commonest {length}-gram", f"{share:.2f}")
                    return None
            if _covered(words, 5) <= min(self.repeated):  # what longer n-grams cover, shorter ones cover too
                return document
            for length, most in enumerate(self.repeated, 5):
                if (share := _covered(words, length)) > most:
                    count.drop(document, f"repeated {length}-grams", f"{share:.2f}")
                    return None
        return document


def _commonest(words: Words, length: int) -> float:
    """Return how much of a text its commonest n-gram is.

    >>> _commonest(hashed_words(["go go go go on and on"]), 2) == 3 * 2 / 7
    True
    """
    ordered = np.sort(words.ngrams(length).hashes)
    edges = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    most = int(np.diff(edges).max(initial=0))
    return most * length / len(words.hashes) if most > 1 else 0.0


def _covered(words: Words, length: int) -> float:
    """Return the share of words inside n-grams that occurred before.

    >>> _covered(hashed_words(["a b c d e x a b c d e"]), 5) == 5 / 11
    True
    """
    grams = words.ngrams(length).hashes
    ordered = np.sort(grams)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0.0
    _, first = np.unique(grams, return_index=True)
    again = np.ones(len(grams), np.int64)
    again[first] = 0
    edges = np.zeros(len(words.hashes) + length, np.int64)
    edges[: len(grams)] += again
    edges[length : length + len(grams)] -= again
    return float((np.cumsum(edges)[: len(words.hashes)] > 0).mean())
