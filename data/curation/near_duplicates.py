"""Drops near-duplicates, within a source and across sources: the first document of each cluster in the recipe's order
stays (see `clusters` for what a cluster is).

Memory: 4 bytes for each of the H values of a signature, 24 for offset and word count, about 72 in finding the clusters
(sort keys of one band at a time, the clusters' links): 600 bytes a document for H = 112, 0.6 GB for a million, beside
a constant part, and 16 bytes for each pair that the bands propose (few, unless most documents share their phrases;
never more than 6 for each document and band). Disk: the documents once (see `spool`), and the signatures.
"""

from __future__ import annotations

import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dwindle.data.curation.clusters import Clusters, NearDuplicateOptions, edited_share, near_duplicate_clusters
from dwindle.data.curation.minhash import signatures
from dwindle.data.curation.spool import Spool, read_spooled
from dwindle.data.curation.stage import StageRun, batches
from dwindle.data.curation.words import hashed_words
from dwindle.data.document import Document

__all__ = ["NearDuplicates", "clustered"]


@dataclass(frozen=True)
class NearDuplicates:
    """Stage: one document for each cluster of near-duplicates."""

    options: NearDuplicateOptions = field(default_factory=NearDuplicateOptions)
    name: ClassVar[str] = "near_duplicates"

    def run(self, documents: Iterator[Document], run: StageRun) -> Iterator[Document]:
        """Yield the first document of every cluster."""
        with Spool(run.folder / "documents.jsonl") as spool:
            yield from self._first(spool, clustered(documents, self.options, run, spool), run)

    def _first(self, spool: Spool, clusters: Clusters, run: StageRun) -> Iterator[Document]:
        sizes = Counter(Counter(clusters.first.tolist()).values())
        run.count.details = {
            "clusters": sum(number for size, number in sizes.items() if size > 1),
            "largest_cluster": max(sizes, default=0),
            "pairs_compared_word_by_word": clusters.pairs_compared,
        }
        across = 0
        kept: dict[int, tuple[str, str]] = {}  # of the clusters with more than one document
        shared = set(np.flatnonzero(np.bincount(clusters.first) > 1).tolist())
        for number, (document, first) in enumerate(zip(spool, clusters.first.tolist(), strict=True)):
            if number == first:
                if number in shared:
                    kept[number] = document.id, document.source
                yield document
                continue
            across += kept[first][1] != document.source
            run.count.drop(document, "a near-duplicate of an earlier document", kept[first][0])
        run.count.details["dropped_for_a_document_of_another_source"] = across


def clustered(documents: Iterator[Document], options: NearDuplicateOptions, run: StageRun, spool: Spool) -> Clusters:
    """Return the clusters of documents, which are put aside in the order they come in."""
    counts = array.array("q")
    place = spool.path.with_suffix(".signatures")
    with place.open("wb") as handle:
        for batch, values, words in run.ordered(partial(_signed, options=options), batches(documents)):
            for document in batch:
                spool.add(document)
            handle.write(values.tobytes())
            counts.extend(words.tolist())
    spool.end()
    signed = np.fromfile(place, np.uint32).reshape(len(counts), options.hashes)
    place.unlink()
    if not len(signed):
        return Clusters(np.zeros(0, np.int64), 0, 0)

    def compare(parts: Any) -> Iterator[list[float]]:
        offsets = ([(spool.offsets[a], spool.offsets[b]) for a, b in part] for part in parts)
        return run.ordered(partial(_compared, spool.path), offsets)

    return near_duplicate_clusters(signed, np.array(counts), options, compare)


def _signed(
    batch: list[Document], *, options: NearDuplicateOptions
) -> tuple[list[Document], NDArray[np.uint32], NDArray[np.int64]]:
    words = hashed_words([document.text for document in batch])
    return batch, signatures(words, ngram=options.ngram, hashes=options.hashes), words.counts


def _compared(path: Path, pairs: list[tuple[int, int]]) -> list[float]:
    shares = []
    for pair in pairs:
        one, other = read_spooled(path, pair)
        shares.append(edited_share(one.text, other.text))
    return shares
