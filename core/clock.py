"""How long a step took and how much memory the process held meanwhile.

`resource.getrusage` reports the highest resident set of the whole process life, which says nothing about one step
of many. A sampling thread reads the resident set every 20 ms instead; a peak shorter than that can be missed.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

__all__ = ["StepClock"]

_INTERVAL_SECONDS = 0.02


class StepClock:
    """Context manager: `seconds` and `peak_rss_bytes` of the block, readable inside it as well."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._start = time.perf_counter()
        self._end: float | None = None
        self.peak_rss_bytes = self._process.memory_info().rss

    @property
    def seconds(self) -> float:
        """Return the wall time of the block, in seconds."""
        return (self._end if self._end is not None else time.perf_counter()) - self._start

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL_SECONDS):
            self.peak_rss_bytes = max(self.peak_rss_bytes, self._process.memory_info().rss)

    def __enter__(self) -> StepClock:
        self._start = time.perf_counter()
        self._thread = threading.Thread(target=self._sample, name="dwindle-clock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end = time.perf_counter()
        self._done.set()
        self._thread.join()
        self.peak_rss_bytes = max(self.peak_rss_bytes, self._process.memory_info().rss)
