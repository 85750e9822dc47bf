"""How long is left, from how long the work so far took: for the lines of a long step's log."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["TimeLeft"]


class TimeLeft:
    """Counts work done (any unit: blocks, weights) against its total.

    >>> ticks = iter([100.0, 130.0])
    >>> str(TimeLeft(4, clock=lambda: next(ticks)).after(1))
    'about 90 s left'
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._total, self._start = total, clock()

    def after(self, done: float) -> str:
        """Return `about 90 s left`, assuming that what is left goes as fast as what is done."""
        left = (self._clock() - self._start) * (self._total - done) / done
        return f"about {left:.0f} s left" if left < 120 else f"about {left / 60:.0f} min left"
