"""Texts in clusters of near-duplicates: who belongs together, directly or through others.

Two texts are near-duplicates if their signatures agree in `similarity` of the values, or if they are edited copies:
`edited` of the longer one's words stand in both in the same order (see `word_order`). The second is what finds a text
with every tenth word changed: of its word 5-grams only 42 % are left, less than two texts share that have half of
their paragraphs in common, so no threshold on n-grams can tell the two apart; the words in order can (0.90 and 0.65).
Only pairs from the bands are looked at, and only those whose words are counted alike have their words compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwindle.data.curation.bands import adjacent_pairs, banded_pairs, joined_pairs
from dwindle.data.curation.minhash import agreement
from dwindle.data.curation.word_order import common_share
from dwindle.data.curation.words import hashed_words
from dwindle.errors import RecipeError

__all__ = ["Clusters", "NearDuplicateOptions", "edited_share", "near_duplicate_clusters"]

_PAIRS_AT_A_TIME = 64

CompareTexts = Callable[[Iterable[list[tuple[int, int]]]], Iterator[list[float]]]
"""Takes lists of pairs of texts, gives for each list the shares of words that stand in both in the same order."""


@dataclass(frozen=True)
class NearDuplicateOptions:
    """What counts as a near-duplicate. The defaults are FineWeb's, and edited copies beside them."""

    ngram: int = 5
    """Words in the n-grams that are compared."""
    bands: int = 14
    """Bands of the signature; a signature has bands * rows values."""
    rows: int = 8
    """Values in a band."""
    similarity: float = 0.75
    """Share of the signature that near-duplicates agree in."""
    edited: float | None = 0.8
    """Share of the words, in order, that edited copies have in common; None looks for none."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={getattr(self, name)!r} (needed: a whole number of at least {least})"
            for name, least in (("ngram", 1), ("bands", 1), ("rows", 1))
            if not getattr(self, name) >= least
        ]
        wrong += [f"{name}={value!r} (needed: above 0, at most 1)"
                  for name, value in (("similarity", self.similarity), ("edited", self.edited))
                  if value is not None and not 0 < value <= 1]  # fmt: skip
        if self.bands * self.rows < 2:
            wrong.append("bands * rows: a signature has at least 2 values")
        if wrong:
            raise RecipeError(f"near_duplicates: {'; '.join(wrong)}.")

    @property
    def hashes(self) -> int:
        """Return the number of values in a signature."""
        return self.bands * self.rows

    @property
    def least_agreement(self) -> float:
        """Return the agreement below which no edited copy is looked for: three deviations under the expected one.

        >>> round(NearDuplicateOptions().least_agreement, 2)
        0.08
        """
        if self.edited is None:
            return self.similarity
        intact = self.edited**self.ngram
        expected = intact / (2 - intact)
        return expected - 3 * math.sqrt(expected * (1 - expected) / self.hashes)


@dataclass
class Clusters:
    """Which texts belong together."""

    first: NDArray[np.int64]
    """[D]: the smallest number of a text in the cluster of each."""
    pairs_compared: int
    """Pairs whose words were compared."""
    pairs_alike: int
    """Pairs found to be near-duplicates; pairs already connected through others are not counted."""


def near_duplicate_clusters(
    signed: NDArray[np.uint32], counts: NDArray[np.int64], options: NearDuplicateOptions, compare: CompareTexts
) -> Clusters:
    """Return the clusters of texts with signatures [D, H] and word counts [D]; `compare` looks at their words."""
    parents = list(range(len(signed)))
    joined = 0

    def root(text: int) -> int:
        while parents[text] != text:
            parents[text] = parents[parents[text]]
            text = parents[text]
        return text

    def join(pair: Sequence[int]) -> None:
        nonlocal joined
        one, other = sorted((root(pair[0]), root(pair[1])))
        parents[other] = one
        joined += one != other

    pairs = banded_pairs(signed, options.bands, options.rows)
    if options.edited is not None:
        pairs = joined_pairs(pairs, adjacent_pairs(signed))
    pairs = pairs[(counts[pairs] > 0).all(1)]
    shares = agreement(signed, pairs)
    for pair in pairs[shares >= options.similarity].tolist():
        join(pair)
    compared = 0
    if options.edited is not None:
        sizes = counts[pairs]
        open_ = (shares < options.similarity) & (shares >= options.least_agreement)
        open_ &= sizes.min(1) >= options.edited * sizes.max(1)
        likely_first = pairs[open_][np.argsort(-shares[open_], kind="stable")].tolist()
        waiting: list[list[tuple[int, int]]] = []

        def parts() -> Iterator[list[tuple[int, int]]]:
            nonlocal compared
            part = []
            for one, other in likely_first:
                if root(one) != root(other):
                    part.append((one, other))
                if len(part) == _PAIRS_AT_A_TIME:
                    waiting.append(part)
                    compared += len(part)
                    yield part
                    part = []
            if part:
                waiting.append(part)
                compared += len(part)
                yield part

        for found in compare(parts()):
            for pair, share in zip(waiting.pop(0), found, strict=True):
                if share >= options.edited:
                    join(pair)
    return Clusters(np.array([root(text) for text in range(len(parents))], np.int64), compared, joined)


def edited_share(one: str, other: str) -> float:
    """Return the share of the longer text's words that stand in both texts in the same order."""
    words = hashed_words([one, other])
    return common_share(words.of(0).tolist(), words.of(1).tolist())
