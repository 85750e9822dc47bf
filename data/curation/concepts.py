"""Clusters of unit vectors by spherical mini-batch k-means: deterministic, memory of the centres and one batch.

Centres begin as k-means++ draws (Arthur and Vassilvitskii 2007) out of a sample, then follow batches with a rate of
1 / (vectors seen) each (Sculley 2010), and are of length 1 again after each batch: the distance is 1 - cosine.

k-means cuts a crowd into as many pieces as it has centres for, which would hide it. Clusters whose centres lie closer
to each other than half of the mean distance of their own vectors overlap, and are joined again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["assigned", "centres", "joined"]

_OVERLAP = 0.5
_SAMPLE = 20_000
_BATCH = 2048

Vectors = NDArray[np.float32]


def centres(vectors: NDArray[np.generic], count: int, seed: int, passes: int = 8) -> Vectors:
    """Return [k, width] unit centres of `vectors` [n, width] (may be a memory map), k the smaller of count and n."""
    draw = np.random.Generator(np.random.PCG64(seed))
    total = len(vectors)
    sample = np.sort(draw.choice(total, min(total, _SAMPLE), replace=False))
    found = _first_centres(np.asarray(vectors[sample], np.float32), min(count, total), draw)
    seen = np.zeros(len(found), np.float64)
    for _ in range(passes):
        order = draw.permutation(total)
        for start in range(0, total, _BATCH):
            batch = np.asarray(vectors[np.sort(order[start : start + _BATCH])], np.float32)
            nearest = (batch @ found.T).argmax(1)
            sums = np.zeros_like(found)
            np.add.at(sums, nearest, batch)
            hits = np.bincount(nearest, minlength=len(found))
            moved = hits > 0
            seen[moved] += hits[moved]
            rate = (hits[moved] / seen[moved])[:, None]
            updated = (1 - rate) * found[moved] + rate * sums[moved] / hits[moved, None]
            found[moved] = updated / np.maximum(np.linalg.norm(updated, axis=1, keepdims=True), 1e-12)
    return found


def _first_centres(sample: Vectors, count: int, draw: np.random.Generator) -> Vectors:
    chosen = [int(draw.integers(len(sample)))]
    distance = 1 - sample @ sample[chosen[0]]
    while len(chosen) < count:
        weights = np.maximum(distance, 0).astype(np.float64)
        total = weights.sum()
        if total <= 1e-9:  # fewer different vectors than centres
            break
        chosen.append(int(draw.choice(len(sample), p=weights / total)))
        distance = np.minimum(distance, 1 - sample @ sample[chosen[-1]])
    return sample[chosen].copy()


def assigned(vectors: NDArray[np.generic], centre: Vectors) -> tuple[NDArray[np.int64], Vectors]:
    """Return for each vector [n] the number of its nearest centre, and its distance 1 - cosine from it."""
    cluster = np.empty(len(vectors), np.int64)
    distance = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _BATCH):
        cosines = np.asarray(vectors[start : start + _BATCH], np.float32) @ centre.T
        nearest = cosines.argmax(1)
        cluster[start : start + _BATCH] = nearest
        distance[start : start + _BATCH] = 1 - cosines[np.arange(len(cosines)), nearest]
    return cluster, distance


def joined(centre: Vectors, cluster: NDArray[np.int64], distance: Vectors) -> NDArray[np.int64]:
    """Return for each vector [n] the number of its cluster after overlapping ones are one."""
    held = np.bincount(cluster, minlength=len(centre))
    spread = np.bincount(cluster, distance, len(centre)) / np.maximum(held, 1)
    group = np.arange(len(centre))
    for one in range(len(centre)):
        for other in range(one):
            near = _OVERLAP * min(spread[one], spread[other])
            if group[one] != group[other] and 1 - float(centre[one] @ centre[other]) < near:
                group[group == group[one]] = group[other]
    renumbered: NDArray[np.int64] = np.unique(group[cluster], return_inverse=True)[1].astype(np.int64)
    return renumbered
