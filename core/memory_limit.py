"""`--max-memory`: what a command and the processes it starts hold of memory stays under a limit, or the command ends.

Counted is memory that the system cannot take back: resident pages without those of mapped files. A limit of the
operating system on the address space would also count weights that are mapped and hardly read, so a step that goes
through a checkpoint block by block would be refused although it fits; and code in C++ that is refused an allocation
aborts without a message. So a thread looks every 20 ms. Over the limit it raises `MemoryLimitReached` in the main
thread, as Ctrl-C raises its own: a training answers by cutting its batch into more pieces, all else ends with the
arithmetic and exit code 2. Code that does not return to Python within five seconds is ended with the process. Outputs
are renamed when whole, so nothing is lost. What is allocated within 20 ms may lie above the limit for so long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from dwindle.errors import DoesNotFit
from dwindle.resources import held_bytes, limit_memory

__all__ = ["MemoryLimitReached", "memory_held_to"]

_LOOK_SECONDS, _CHILDREN_SECONDS, _AGAIN_SECONDS, _PATIENCE_SECONDS = 0.02, 0.5, 1.0, 5.0


class MemoryLimitReached(DoesNotFit, MemoryError):
    """More memory is held than `--max-memory` allows."""


class _Watch(threading.Thread):
    """Looks at what is held, and speaks up."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(name="memory limit", daemon=True)
        self.most_bytes = most_bytes
        self.over = threading.Event()
        self.done = threading.Event()
        self._children: list[int] = []
        self.told = ""

    def run(self) -> None:
        """Look until `done`."""
        looked, raised = 0.0, 0.0
        while not self.done.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if now - looked > _CHILDREN_SECONDS:
                looked, self._children = now, _started_by_this()
            own, theirs = held_bytes(os.getpid()), sum(map(held_bytes, self._children))
            if own + theirs <= self.most_bytes:
                continue
            self.told = self._arithmetic(own, theirs)
            if self.over.is_set():  # the main thread was told and has not listened yet
                if now - raised > _PATIENCE_SECONDS:
                    self._end()
            elif now - raised > _AGAIN_SECONDS:
                raised = now
                self.over.set()
                if hasattr(signal, "SIGUSR1"):
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _arithmetic(self, own: int, theirs: int) -> str:
        started = f" + {theirs / 1e9:.2f} GB by {len(self._children)} processes it started" if self._children else ""
        return (
            f"memory: {(own + theirs) / 1e9:.2f} GB are held ({own / 1e9:.2f} GB by this process{started}), and "
            f"--max-memory allows {self.most_bytes / 1e9:.2f} GB. Raise it, or take a smaller batch, context or model. "
            "What was finished is kept; the same command goes on from there."
        )

    def _end(self) -> None:
        """End this process and what it started; the main thread did not come back to Python."""
        for child in self._children:
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGTERM)
        sys.stderr.write(f"Error: {self.told}\n")
        sys.stderr.flush()
        os._exit(2)


def _started_by_this() -> list[int]:
    import psutil

    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process().children(recursive=True)]
    return []


@contextlib.contextmanager
def memory_held_to(most_bytes: int) -> Iterator[None]:
    """Hold this process and those it starts to `most_bytes`, in what is refused beforehand and in what is held.

    To be entered in the main thread. Inside, MemoryLimitReached may be raised anywhere, as KeyboardInterrupt may.
    """
    watch = _Watch(most_bytes)

    def reached(number: int, frame: FrameType | None) -> None:
        if watch.over.is_set() and not watch.done.is_set():
            watch.over.clear()
            raise MemoryLimitReached(watch.told)

    before = signal.signal(signal.SIGUSR1, reached) if hasattr(signal, "SIGUSR1") else None
    limit_memory(most_bytes)
    watch.start()
    try:
        yield
    finally:
        watch.done.set()
        watch.join()
        limit_memory(None)
        if hasattr(signal, "SIGUSR1"):
            signal.signal(signal.SIGUSR1, before)
