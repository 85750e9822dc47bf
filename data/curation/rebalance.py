"""The stage that keeps one concept from crowding out the rest: a cap per cluster of embeddings, lower where dense.

    cap of cluster c = most * (median bytes of a cluster) * clip(spread_c / median spread, 1/4, 4)

spread is the mean distance of a cluster's documents from its centre. A thousand summaries of one play lie close
together and say little beyond the first few; a wide cluster of the same size says more and keeps more. That the number
kept follows the spread is from Abbas et al. 2024 (arXiv 2401.04578); here it is a cap, so a cluster of up to most / 4
times the median is never touched, and nothing is repeated. Within a capped cluster the documents that stay are drawn
at random: keeping the outermost would keep noise.

Memory: 12 bytes per document and the centres; vectors and documents lie on disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwindle.data.curation.concepts import assigned, centres, joined
from dwindle.data.curation.embeddings import embedder
from dwindle.data.curation.kept import kept_in_order
from dwindle.data.curation.spool import Spool
from dwindle.data.curation.stage import StageRun
from dwindle.data.document import Document
from dwindle.errors import RecipeError

__all__ = ["Rebalance"]

_MOST_CLUSTERS = 1024


@dataclass(frozen=True)
class Rebalance:
    """Caps the text of each concept."""

    most: float = 4.0
    """Bytes a cluster of median spread may keep, as a multiple of the median cluster's."""
    clusters: int | None = None
    """How many concepts; None is the root of half the number of documents, at most 1,024."""
    encoder: str = "words"
    """What embeds: words (no model), minilm, or a model's folder or id (see `embeddings`)."""
    torch_device: str = "cpu"
    """Where an encoder runs."""

    def __post_init__(self) -> None:
        wrong = []
        if not self.most > 0 or not math.isfinite(self.most):
            wrong.append(f"most={self.most!r} (needed: above 0)")
        if self.clusters is not None and not self.clusters >= 2:
            wrong.append(f"clusters={self.clusters!r} (needed: at least 2, or none)")
        if wrong:
            raise RecipeError(f"rebalance: {'; '.join(wrong)}.")

    @property
    def name(self) -> str:
        """Return what the card calls the stage."""
        return "rebalance"

    def run(self, documents: Iterator[Document], run: StageRun) -> Iterator[Document]:
        """Yield what stays below the caps."""
        embed = embedder(self.encoder, self.torch_device)
        spool, place = Spool(run.folder / "documents.jsonl"), run.folder / "vectors"
        try:
            sizes: list[int] = []

            def texts() -> Iterator[str]:
                for document in documents:
                    spool.add(document)
                    sizes.append(document.bytes)
                    yield document.text

            width = 0
            with place.open("wb") as handle:
                for vectors in embed(texts()):
                    width = vectors.shape[1]
                    handle.write(vectors.astype(np.float16).tobytes())
            if not sizes:
                return
            stored: Any = np.memmap(place, np.float16, "r", shape=(len(sizes), width))
            wanted = self.clusters or min(_MOST_CLUSTERS, max(2, round(math.sqrt(len(sizes) / 2))))
            centre = centres(stored, wanted, run.seed)
            cluster, distance = assigned(stored, centre)
            del stored
            cluster = joined(centre, cluster, distance)
            caps = self._caps(cluster, distance, np.array(sizes), run)
            stays = _drawn(spool, cluster, sizes, caps, run.seed)
            yield from kept_in_order(_told(spool, cluster, stays, run))
        finally:
            spool.close()
            place.unlink(missing_ok=True)

    def _caps(self, cluster: NDArray[np.int64], distance: NDArray[np.float32], sizes: NDArray[np.int64],
              run: StageRun) -> NDArray[np.float64]:  # fmt: skip
        """Return the bytes that each cluster may keep, and tell the card what there was."""
        spread = np.bincount(cluster, distance) / np.bincount(cluster)
        bytes_ = np.bincount(cluster, sizes)
        typical, median = float(np.median(spread)), float(np.median(bytes_))
        density = np.clip(spread / typical, 0.25, 4.0) if typical > 0 else np.ones(len(spread))
        caps: NDArray[np.float64] = self.most * median * density
        run.count.details |= {
            "clusters": len(bytes_), "median_cluster_bytes": int(median),
            "largest_cluster_bytes": int(bytes_.max()), "capped_clusters": int((bytes_ > caps).sum()),
        }  # fmt: skip
        return caps


def _drawn(spool: Spool, cluster: NDArray[np.int64], sizes: list[int], caps: NDArray[np.float64],
           seed: int) -> NDArray[np.bool_]:  # fmt: skip
    """Return which documents stay: in the order of a hash of their text, as long as the cluster's cap holds them."""
    ranks = np.empty(len(sizes), np.uint64)
    for index, document in enumerate(spool):
        key = f"{seed}\0{document.id}\0{document.text}".encode(errors="surrogatepass")
        ranks[index] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    stays = np.zeros(len(sizes), np.bool_)
    used = np.zeros(len(caps), np.float64)
    for index in np.lexsort((np.arange(len(sizes)), ranks)):
        own = cluster[index]
        stays[index] = used[own] == 0 or used[own] + sizes[index] <= caps[own]
        used[own] += sizes[index] * stays[index]
    return stays


def _told(spool: Spool, cluster: NDArray[np.int64], stays: NDArray[np.bool_],
          run: StageRun) -> Iterator[tuple[Document, bool]]:  # fmt: skip
    for index, document in enumerate(spool):
        if not stays[index]:
            run.count.drop(document, "concept above its cap", f"cluster {cluster[index]}")
        yield document, bool(stays[index])
