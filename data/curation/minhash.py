"""MinHash signatures: [D, H] numbers whose share of agreement estimates the Jaccard similarity of two texts' n-grams.

Value j of a text is the least of a_j * x mod 2**32 over the hashes x of its n-grams, with a_j odd and random: two
texts agree in it with the chance |A and B| / |A or B| (Broder 1997), so the estimate from H values has a standard
deviation of sqrt(s (1 - s) / H), 0.04 for H = 112. x is already a random number, which is why a multiplication is
enough; it is done for a whole batch of texts at once.

Memory: 4 H bytes for a text (448 for H = 112).
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from dwindle.data.curation.words import Words

__all__ = ["agreement", "signatures"]

_PAIRS = 1 << 14


@functools.cache
def _multipliers(hashes: int) -> NDArray[np.uint32]:
    drawn = np.random.Generator(np.random.PCG64(1997)).integers(0, 2**32, hashes, np.uint32)
    return drawn | np.uint32(1)


def signatures(words: Words, *, ngram: int, hashes: int) -> NDArray[np.uint32]:
    """Return the signatures [D, hashes] of texts; that of a text without words is all ones."""
    grams = words.ngrams(ngram)
    found = np.full((len(words.counts), hashes), 2**32 - 1, np.uint32)
    texts = np.flatnonzero(grams.counts)
    if not len(texts):
        return found
    values = (grams.hashes >> np.uint64(32)).astype(np.uint32)
    begins = grams.starts[texts]
    product = np.empty_like(values)
    least = np.empty((hashes, len(texts)), np.uint32)
    for row, multiplier in enumerate(_multipliers(hashes)):
        np.multiply(values, multiplier, out=product)
        np.minimum.reduceat(product, begins, out=least[row])
    found[texts] = least.T
    return found


def agreement(signed: NDArray[np.uint32], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return for each pair [P, 2] of texts the share of signature values that agree."""
    shares = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _PAIRS):
        part = pairs[start : start + _PAIRS]
        shares[start : start + _PAIRS] = (signed[part[:, 0]] == signed[part[:, 1]]).mean(1)
    return shares
