"""Which documents are held out: whole clusters of near-duplicates, drawn at random, and nothing like them in training.

Clusters are ordered by a hash of (seed, id of the first document) and given to evaluation, then calibration, until
each has its share of the bytes; the rest is training. MinHash finds near-duplicates with a probability only, so what
came out is checked exactly: the n-grams of every held-out document are laid out in a sorted table, every other document
is held against all of them, and pairs with enough n-grams in common are compared as the clusters' pairs are. A training
document (or one of calibration, beside evaluation) that resembles a held-out one is dropped, and counted.

Memory: the held-out documents and about 36 bytes for each of their words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dwindle.data.curation.clusters import NearDuplicateOptions
from dwindle.data.curation.corpus_options import SplitOptions
from dwindle.data.curation.stage import StageRun, batches
from dwindle.data.curation.word_order import common_share
from dwindle.data.curation.words import Words, hashed_words
from dwindle.data.document import Document

__all__ = ["HeldOut", "divided", "without_resemblance"]


def divided(ids: list[str], sizes: NDArray[np.int64], first: NDArray[np.int64], options: SplitOptions,
            seed: int) -> NDArray[np.int8]:  # fmt: skip
    """Return the split of each document [D]: 0 train, 1 calibration, 2 evaluation."""
    totals = np.bincount(first, weights=sizes, minlength=len(first))
    clusters = sorted(np.unique(first).tolist(), key=lambda number: _rank(ids[number], seed))
    split = np.zeros(len(first), np.int8)
    wanted = {2: options.evaluation * sizes.sum(), 1: options.calibration * sizes.sum()}
    for cluster in clusters:
        goal = next((number for number, left in wanted.items() if left > 0), None)
        if goal is None:
            break
        split[cluster] = goal
        wanted[goal] -= totals[cluster]
    return split[first]


def _rank(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0split\0{name}".encode(errors="replace"), digest_size=16).digest()


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents as sorted n-grams with their owners."""

    options: NearDuplicateOptions
    words: Words
    hashes: NDArray[np.uint64]
    owners: NDArray[np.int32]
    sizes: NDArray[np.int64]
    """Distinct n-grams of each document."""

    @classmethod
    def of(cls, texts: list[str], options: NearDuplicateOptions) -> HeldOut:
        """Return the table of some texts."""
        words = hashed_words(texts)
        grams = words.ngrams(options.ngram)
        distinct = [np.unique(grams.of(i)) for i in range(len(texts))]
        sizes = np.array([len(one) for one in distinct], np.int64)
        owners = np.repeat(np.arange(len(texts), dtype=np.int32), sizes)
        hashes = np.concatenate(distinct) if distinct else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        return cls(options, words, hashes[order], owners[order], sizes)

    def resembled(self, batch: list[Document]) -> list[int | None]:
        """Return for each document the number of a held-out one that it is a near-duplicate of, or None."""
        words = hashed_words([document.text for document in batch])
        grams = words.ngrams(self.options.ngram)
        return [self._resembled(words.of(i), np.unique(grams.of(i))) for i in range(len(batch))]

    def _resembled(self, words: NDArray[np.uint64], grams: NDArray[np.uint64]) -> int | None:
        low = np.searchsorted(self.hashes, grams, side="left")
        high = np.searchsorted(self.hashes, grams, side="right")
        if not (high > low).any():
            return None
        owners = np.concatenate([self.owners[a:b] for a, b in zip(low, high, strict=True) if b > a])
        met, shared = np.unique(owners, return_counts=True)
        similar = shared / (self.sizes[met] + len(grams) - shared)
        for index in np.argsort(-similar, kind="stable"):
            number = int(met[index])
            if similar[index] >= self.options.similarity:
                return number
            if self.options.edited is None or similar[index] < self.options.least_agreement:
                return None
            other = self.words.of(number)
            alike = min(len(words), len(other)) >= self.options.edited * max(len(words), len(other))
            if alike and common_share(words.tolist(), other.tolist()) >= self.options.edited:
                return number
        return None


def without_resemblance(documents: Iterator[Document], held_out: HeldOut, names: list[str],
                        run: StageRun) -> Iterator[Document]:  # fmt: skip
    """Yield the documents that resemble no held-out one; the others are dropped and counted."""
    for batch, found in run.ordered(partial(_looked_at, held_out), batches(documents)):
        for document, number in zip(batch, found, strict=True):
            if number is None:
                yield document
            else:
                run.count.drop(document, "a near-duplicate of a held-out document", names[number])


def _looked_at(held_out: HeldOut, batch: list[Document]) -> tuple[list[Document], list[int | None]]:
    return batch, held_out.resembled(batch)
