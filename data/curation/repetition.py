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
from numpy.typing import NDArray

from dwindle.data.curation.stage_count import StageCount
from dwindle.data.curation.words import factors, hashed_words
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
        if not self.least_words >= 1:
            wrong.append(f"least_words={self.least_words!r} (needed: a whole number of at least 1)")
        if wrong:
            raise RecipeError(f"repetition: {'; '.join(wrong)}.")

    def edit(self, document: Document, count: StageCount) -> Document | None:
        """Return the document if it does not repeat itself too much."""
        if not self.code and count.passes_by(document, "code"):
            return document
        words = hashed_words([document.text]).hashes
        if len(words) >= self.least_words and (broken := self._broken(words)) is not None:
            count.drop(document, *broken)
            return None
        return document

    def _broken(self, words: NDArray[np.uint64]) -> tuple[str, str] | None:
        """Return (the first limit that is passed, the share found), or None."""
        sums = words * factors()[0]
        for length, most in enumerate((*self.commonest, *self.repeated), 2):
            # As in `words`: the sum of a longer n-gram is that of the shorter one and one word more.
            sums = sums[:-1] + words[length - 1 :] * factors()[length - 1]
            if length <= 4:
                if (share := _commonest(sums, length, len(words))) > most:
                    return f"the commonest {length}-gram", f"{share:.2f}"
                continue
            share = _covered(sums, length, len(words))
            if share > most:
                return f"repeated {length}-grams", f"{share:.2f}"
            if share <= min(self.repeated):  # what longer n-grams cover, shorter ones cover too
                return None
        return None


def _commonest(grams: NDArray[np.uint64], length: int, words: int) -> float:
    """Return how much of a text its commonest n-gram is.

    >>> _commonest(np.array([7, 7, 7, 1, 2, 3], np.uint64), 2, 7) == 3 * 2 / 7
    True
    """
    ordered = np.sort(grams)
    edges = np.flatnonzero(ordered[1:] != ordered[:-1])
    if len(edges) == len(grams) - 1:
        return 0.0
    most = int(np.diff(edges, prepend=-1, append=len(grams) - 1).max())
    return most * length / words


def _covered(grams: NDArray[np.uint64], length: int, words: int) -> float:
    """Return the share of words inside n-grams that occurred before.

    >>> _covered(np.array([1, 2, 3, 4, 5, 6, 1], np.uint64), 5, 11) == 5 / 11
    True
    """
    ordered = np.sort(grams)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0.0
    _, first = np.unique(grams, return_index=True)
    again = np.ones(len(grams), np.int64)
    again[first] = 0
    edges = np.zeros(words + 1, np.int64)
    edges[: len(grams)] += again
    edges[length : length + len(grams)] -= again
    return float((np.cumsum(edges)[:words] > 0).mean())
