"""What share of a text the corpus says already: word n-grams that stand in both.

    overlap = n-grams of the text that the corpus holds / n-grams of the text

A text shorter than one n-gram is one n-gram of its own length. Memory: 8 bytes per different n-gram.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dwindle.data.curation.words import hashed_words

__all__ = ["Novelty"]


class Novelty:
    """The n-grams of a corpus; texts that are accepted can be added."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self._held = np.empty(0, np.uint64)
        self._new: list[NDArray[np.uint64]] = []
        self._waiting = 0

    def add(self, text: str) -> None:
        """Take in the n-grams of a text."""
        found = self._ngrams(text)
        self._new.append(found)
        self._waiting += len(found)
        if self._waiting > max(1 << 16, len(self._held)) or len(self._new) > 256:
            self._merge()

    def add_all(self, texts: Iterable[str]) -> None:
        """Take in the n-grams of many texts."""
        for text in texts:
            self.add(text)

    def overlap(self, text: str) -> float:
        """Return the share of the text's n-grams that were taken in; 0 for a text without words."""
        found = self._ngrams(text)
        if not len(found):
            return 0.0
        held = np.isin(found, np.empty(0, np.uint64))
        for part in (self._held, *self._new):
            if len(part):
                place = np.minimum(np.searchsorted(part, found), len(part) - 1)
                held |= part[place] == found
        return float(held.mean())

    def _ngrams(self, text: str) -> NDArray[np.uint64]:
        return np.unique(hashed_words([text]).ngrams(self.ngram).hashes)

    def _merge(self) -> None:
        self._held = np.unique(np.concatenate([self._held, *self._new]))
        self._new, self._waiting = [], 0
