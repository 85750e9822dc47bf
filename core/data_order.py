"""Which windows a step reads: every window once per epoch, each epoch in another order.

Window p of a run is `permutation(seed, epoch)[p mod N]` with epoch = p div N, and step s with a batch of B reads the
windows p = s*B to s*B + B - 1. That is a pure function, so there is no loader whose state would have to be saved: a
resumed run, or one on another number of processes, reads the same windows. A batch may reach into the next epoch;
no window is dropped. torch's `RandomSampler` is not used, as it can only be replayed from the start.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

__all__ = ["mixed_seed", "windows_of_step"]


def mixed_seed(*numbers: int) -> int:
    """Return a 63-bit seed made of `numbers`: near numbers give seeds that have nothing in common."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))


def windows_of_step(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return the indices [batch_size] of the windows that `step` reads out of `count`.

    >>> sorted(torch.cat([windows_of_step(6, 2, seed=0, step=s) for s in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    found: list[Tensor] = []
    position, end = step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, count)
        taken = _permutation(count, seed, epoch)[offset : offset + end - position]
        found.append(taken)
        position += len(taken)
    return torch.cat(found)
