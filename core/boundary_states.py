"""The hidden states between blocks that a walk needs again: in memory while they fit, else in a file.

A model of L blocks has L x N x T x D of them, for 22 blocks of width 2048 and 65,536 tokens 11.8 GB. They are float32
in both places: some families have activations beyond fp16's 65,504, and bfloat16 would blur the recomputed gradients.
The file is read and written through ordinary calls, since pages of a mapped file count as resident memory; the place
of what was taken is used again, so a walk that takes the states of one block and puts those of the next needs one set.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dwindle.storage import require_space

__all__ = ["MEMORY_BYTES", "BoundaryStates"]

MEMORY_BYTES = 1 << 30
"""States beyond this many bytes go to a temporary file."""


class BoundaryStates:
    """Hidden states by block and batch; closed, and the file removed, at the end of a `with`."""

    def __init__(self, total_bytes: int, memory_bytes: int = MEMORY_BYTES) -> None:
        self._held: dict[tuple[int, int], Tensor] = {}
        self._places: dict[tuple[int, int], tuple[int, torch.Size]] = {}
        self._file = None
        if total_bytes > memory_bytes:
            require_space(Path(tempfile.gettempdir()), total_bytes)
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed on exit)
        self._end = 0
        self._free: dict[int, list[int]] = {}
        """Places in the file whose states were taken, by their number of values."""

    @property
    def on_disk(self) -> bool:
        """Return whether the states are kept in a file."""
        return self._file is not None

    def put(self, block: int, batch: int, states: Tensor) -> None:
        """Keep float32 states [B, T, D]."""
        if self._file is None:
            self._held[block, batch] = states
            return
        free = self._free.get(states.numel())
        place = free.pop() if free else self._end
        self._file.seek(place)
        states.detach().cpu().contiguous().numpy().tofile(self._file)
        self._places[block, batch] = place, states.shape
        self._end = max(self._end, place + states.numel() * 4)

    def take(self, block: int, batch: int, device: torch.device) -> Tensor:
        """Return what was put there, once."""
        if self._file is None:
            return self._held.pop((block, batch))
        start, shape = self._places.pop((block, batch))
        self._free.setdefault(shape.numel(), []).append(start)
        self._file.seek(start)
        found = np.fromfile(self._file, dtype=np.float32, count=shape.numel())
        return torch.from_numpy(found).view(shape).to(device)

    def __enter__(self) -> BoundaryStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()
