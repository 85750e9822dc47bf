"""How many windows each source gives to a mixture, and which.

    total = min over sources i of most_repeats * windows_i / share_i          windows of source i = share_i * total

A share is one of the tokens trained on, whatever the sources' sizes: `0.95, 0.05` is continued training with 5 % of the
old text replayed, however much old text there is. Nothing is repeated unless it is allowed, so the source that is
smallest for its share decides how long the mixture is. Up to four passes over a text teach almost as much as new text
(Muennighoff et al. 2023, arXiv 2305.16264).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["chosen_windows", "counts_of_shares"]


def counts_of_shares(windows: Sequence[int], weights: Sequence[float], most_repeats: int = 1) -> list[int]:
    """Return how many windows each source gives, at least one.

    `windows` says how many there are of each, `weights` are proportional to the shares of the mixture.

    >>> counts_of_shares([1000, 10_000], [0.95, 0.05])
    [1000, 53]
    >>> counts_of_shares([100, 10_000], [1, 3], most_repeats=4)
    [400, 1200]
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    length = min(most_repeats * count / share for count, share in zip(windows, shares, strict=True))
    return [max(1, math.floor(share * length + 0.5)) for share in shares]


def chosen_windows(windows: Sequence[int], counts: Sequence[int], seed: int) -> Tensor:
    """Return int64 [sum of counts]: window numbers of the sources laid end to end, in a random order.

    A source that gives more than it has is gone through again, in another order; no window comes a second time before
    every one has come once.
    """
    order = torch.Generator().manual_seed(seed)
    chosen, start = [], 0
    for available, count in zip(windows, counts, strict=True):
        passes = [torch.randperm(available, generator=order) for _ in range(-(-count // available))]
        chosen.append(start + torch.cat(passes)[:count])
        start += available
    together = torch.cat(chosen)
    return together[torch.randperm(len(together), generator=order)]
