"""The words of many texts as 64-bit hashes, and the n-grams of those words: what duplicates, contamination and
repetition are found by.

A word is a run of letters, digits and `_` of the lower-cased text; punctuation and white space only separate, and every
character of Chinese, Japanese or Korean is a word. The hash of a word of bytes b is mix(sum over j of b_j * P_j) and
that of an n-gram of word hashes w is mix(sum over k of w_k * Q_k), mod 2**64, with fixed random odd P and Q and

    mix(x) = y ^ (y >> 29),  y = (x ^ (x >> 32)) * M

so that everything is a handful of numpy passes over the bytes of a whole batch: no Python work per word. Two different
n-grams share a hash with a chance of about 2**-64.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "factors", "hashed_words", "mix"]

_U64 = NDArray[np.uint64]
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_LONGEST_WORD = 256
"""Bytes of a word beyond this many take the factors of the first ones again."""


@functools.cache
def _all_factors() -> tuple[_U64, _U64]:
    """Return P [256] and Q [64]: odd, from a fixed seed."""
    draw = np.random.Generator(np.random.PCG64(20_24)).integers(0, 2**64, _LONGEST_WORD + 64, np.uint64) | np.uint64(1)
    return draw[:_LONGEST_WORD], draw[_LONGEST_WORD:]


def factors() -> _U64:
    """Return Q [64], by which the words of an n-gram are multiplied."""
    return _all_factors()[1]


@functools.cache
def _is_word() -> NDArray[np.bool_]:
    """Return for each byte whether it belongs to a word; those of non-ASCII characters do."""
    table = np.zeros(256, np.bool_)
    table[[i for i in range(128) if chr(i).isalnum() or chr(i) == "_"]] = True
    table[128:] = True
    return table


@functools.cache
def _separators() -> dict[int, str]:
    """Return the non-ASCII punctuation and spaces that stand between words."""
    blocks = ((0xA0, 0xA9), (0xAB, 0xB1), (0xB6, 0xB8), (0xBB, 0xBB), (0xBF, 0xBF), (0x2000, 0x206F), (0x3000, 0x3003),
              (0x3008, 0x3020), (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFEFF, 0xFEFF), (0xFFFD, 0xFFFD))  # fmt: skip
    return {code: " " for first, last in blocks for code in range(first, last + 1)}


def mix(values: _U64) -> _U64:
    """Return well-spread 64-bit numbers, one for each number; the argument is overwritten."""
    values ^= values >> np.uint64(32)
    values *= _MULTIPLIER
    values ^= values >> np.uint64(29)
    return values


@dataclass(frozen=True)
class Words:
    """The word hashes of D texts laid end to end, W in all."""

    hashes: _U64
    """[W]"""
    starts: NDArray[np.int64]
    """[D + 1]: the words of text d are hashes[starts[d] : starts[d + 1]]."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Return the number of words of each text [D]."""
        return np.diff(self.starts)

    def of(self, index: int) -> _U64:
        """Return the word hashes of one text."""
        return self.hashes[self.starts[index] : self.starts[index + 1]]

    def ngrams(self, length: int) -> Words:
        """Return the hashes of all n-grams of each text; a text with fewer words has one, of what it has."""
        counts = np.where(self.counts >= length, self.counts - length + 1, np.minimum(self.counts, 1))
        starts = np.concatenate(([0], np.cumsum(counts)))
        # Position of every n-gram's first word: those of the texts, without the last words of each.
        first = np.arange(starts[-1]) + np.repeat(self.starts[:-1] - starts[:-1], counts)
        sums = np.zeros(len(first), np.uint64)
        powers = factors()
        padded = np.concatenate((self.hashes, np.zeros(length, np.uint64)))
        for k in range(length):
            sums += padded[first + k] * powers[k]
        for text in np.flatnonzero((self.counts < length) & (self.counts > 0)):
            short = self.of(text)
            sums[starts[text]] = (short * powers[: len(short)]).sum(dtype=np.uint64)
        return Words(mix(sums), starts)


def hashed_words(texts: Sequence[str]) -> Words:
    """Return the word hashes of texts."""
    prepared = [_prepared(text) for text in texts]
    data = np.frombuffer(b" ".join([*prepared, b""]), np.uint8)
    lengths = np.fromiter((len(text) + 1 for text in prepared), np.int64, len(prepared))
    inside = np.take(_is_word(), data)
    edges = np.diff(inside, prepend=False)
    begins = np.flatnonzero(edges & inside)
    if not len(begins):
        return Words(np.zeros(0, np.uint64), np.zeros(len(texts) + 1, np.int64))
    place = _places(len(data), begins)
    values = data * _all_factors()[0][place & (_LONGEST_WORD - 1)]
    values *= inside
    hashes = mix(np.add.reduceat(values, begins))
    ends = np.concatenate(([0], np.cumsum(lengths)))
    return Words(hashes, np.searchsorted(begins, ends).astype(np.int64))


def _places(size: int, begins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each byte how far it is behind the begin of the last word; 0 before the first word."""
    places = np.arange(size)
    places[begins[0] :] -= np.repeat(begins, np.diff(begins, append=size))
    places[: begins[0]] = 0
    return places


def _prepared(text: str) -> bytes:
    lowered = text.lower()
    if lowered.isascii():
        return lowered.encode()
    return _IDEOGRAPH.sub(r" \1 ", lowered.translate(_separators())).encode(errors="replace")
