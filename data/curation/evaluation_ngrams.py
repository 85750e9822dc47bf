"""The n-grams of evaluation sets, and which of them a training text holds.

An n-gram of an evaluation item has between `shortest` and `longest` words (see `words`: case and punctuation do not
count). A training text is looked up at its n-grams of `shortest` words first: in a table of 2**22 bits, then in the
sorted hashes. Only where those are met are longer ones looked up, since every n-gram begins with a shorter one of the
same item.

Memory: 16 bytes for each distinct n-gram, at most 16 * (longest - shortest + 1) bytes for each word of evaluation text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwindle.data.curation.words import Words, factors, hashed_words, mix

__all__ = ["EvaluationNgrams"]

_TABLE_BITS = 22


@dataclass(frozen=True)
class EvaluationNgrams:
    """Sorted hashes of the n-grams of evaluation items, by length; n-grams are numbered across the lengths."""

    shortest: int
    hashes: tuple[NDArray[np.uint64], ...]
    """For each length from `shortest` on, sorted."""
    items: tuple[NDArray[np.int32], ...]
    """For each length, the first item that holds each n-gram."""
    table: NDArray[np.bool_]
    """[2**22]: whether any n-gram of `shortest` words begins with these bits."""
    too_short: int
    """Evaluation items with fewer than `shortest` words: nothing can be found of them."""

    @classmethod
    def of(cls, items: Iterable[str], shortest: int, longest: int) -> EvaluationNgrams:
        """Return the n-grams of items."""
        words = hashed_words(list(items))
        found, owners = [], []
        for length in range(shortest, longest + 1):
            grams = words.ngrams(length)
            long_enough = words.counts >= length
            owner = np.repeat(np.arange(len(words.counts), dtype=np.int32), grams.counts)
            inside = long_enough[owner]
            hashes, first = np.unique(grams.hashes[inside], return_index=True)
            found.append(hashes)
            owners.append(owner[inside][first])
        table = np.zeros(1 << _TABLE_BITS, np.bool_)
        table[found[0] >> np.uint64(64 - _TABLE_BITS)] = True
        return cls(shortest, tuple(found), tuple(owners), table, int((words.counts < shortest).sum()))

    def __len__(self) -> int:
        """Return the number of distinct n-grams, of all lengths."""
        return sum(map(len, self.hashes))

    def length_and_item(self, number: int) -> tuple[int, int]:
        """Return how many words an n-gram has and the number of the first item that holds it."""
        for length, items in enumerate(self.items, self.shortest):
            if number < len(items):
                return length, int(items[number])
            number -= len(items)
        raise IndexError(number)

    def met(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return for each text the distinct numbers of the n-grams it holds, in order."""
        words = hashed_words(texts)
        ends = np.repeat(words.starts[1:], words.counts)
        place = np.arange(len(words.hashes))
        place = place[place + self.shortest <= ends]
        sums = np.zeros(len(place), np.uint64)
        for k in range(self.shortest):
            sums += words.hashes[place + k] * factors()[k]
        found: list[NDArray[np.int64]] = []
        numbers: list[NDArray[np.int64]] = []
        before = 0
        for length, hashes in enumerate(self.hashes, self.shortest):
            if length > self.shortest:
                inside = place + length <= ends[place]
                place, sums = place[inside], sums[inside]
                sums = sums + words.hashes[place + length - 1] * factors()[length - 1]
            mixed = mix(sums.copy())
            if length == self.shortest:
                likely = self.table[mixed >> np.uint64(64 - _TABLE_BITS)]
                place, sums, mixed = place[likely], sums[likely], mixed[likely]
            at = np.searchsorted(hashes, mixed)
            hit = at < len(hashes)
            hit[hit] = hashes[at[hit]] == mixed[hit]
            place, sums = place[hit], sums[hit]
            found.append(place)
            numbers.append(at[hit] + before)
            before += len(hashes)
            if not len(place):
                break
        return _by_text(words, np.concatenate(found), np.concatenate(numbers))


def _by_text(words: Words, places: NDArray[np.int64], numbers: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    text = np.searchsorted(words.starts, places, side="right") - 1
    result = [np.zeros(0, np.int32)] * len(words.counts)
    for number in np.unique(text):
        result[number] = np.unique(numbers[text == number]).astype(np.int32)
    return result
