"""Pairs of texts worth a closer look: those whose signatures agree in all values of a band.

With b bands of r values two texts of similarity s meet with the chance 1 - (1 - s**r)**b. Two layouts are used:

- FineWeb's 14 bands of 8 (Penedo et al. 2024, arXiv 2406.17557): 77 % at s = 0.75, 99 % at 0.85;
- all H adjacent pairs of values (H bands of 2, the last value with the first), for edited copies: changing one word in
  ten leaves s = 0.9**5 / (2 - 0.9**5) = 0.42 of word 5-grams, which meet with 1 - (1 - 0.42**2)**112 > 0.999999, while
  14 bands of 8 would find 1 %. Unrelated texts (s about 0.001) meet with 0.0001.

Texts that meet in a band are sorted; each is paired with the few before it, so a phrase that a million texts share
costs a few million pairs and not 10**12. True copies meet in many bands.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["adjacent_pairs", "banded_pairs", "joined_pairs"]

_NEIGHBOURS = 6
"""How many of the texts before it in a band each one is paired with."""


def banded_pairs(signed: NDArray[np.uint32], bands: int, rows: int) -> NDArray[np.int64]:
    """Return the pairs [P, 2], smaller number first, that meet in one of `bands` bands of `rows` values."""
    return _distinct(_meet(signed[:, band * rows : (band + 1) * rows]) for band in range(bands))


def adjacent_pairs(signed: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the pairs [P, 2], smaller number first, that agree in two values that stand side by side."""
    columns = signed.shape[1]
    return _distinct(_meet(signed[:, [column, (column + 1) % columns]]) for column in range(columns))


def joined_pairs(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pairs [P, 2] of both, each once."""
    return _distinct((pairs[:, 0] << 32) | pairs[:, 1] for pairs in (one, other))


def _meet(values: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the pairs of texts with equal rows of `values`, encoded as smaller * 2**32 + larger."""
    keys = np.zeros(len(values), np.uint64)
    for column in range(values.shape[1]):
        keys = (keys ^ values[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(31)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    found = []
    for distance in range(1, _NEIGHBOURS + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            break
        found.append((order[same] << 32) | order[same + distance])
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _distinct(parts: Iterator[NDArray[np.int64]]) -> NDArray[np.int64]:
    found = np.zeros(0, np.int64)
    for part in parts:
        found = np.union1d(found, part)
    return np.stack((found >> 32, found & 0xFFFFFFFF), axis=1)
