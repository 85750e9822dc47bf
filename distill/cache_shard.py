"""One file of a logit cache: encoded windows one after the other, and behind them what finds and checks each of them.

    windows' bytes | hashes, 8 bytes each | ends of the windows' bytes, 8 each | CRC-32 of the windows, 4 each

A window is known by the hash of its token ids, so that order, epoch and data set do not matter: what was asked of the
teacher once is found again. Files are memory-mapped; reading a window touches its own pages only.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dwindle.errors import DataError

__all__ = ["INDEX_BYTES", "Shard", "shard_bytes", "shard_name", "window_hashes"]

INDEX_BYTES = 20
"""Bytes per window behind the windows."""
_OPEN_FILES = 128
"""Files mapped at a time."""

Hashes = NDArray[np.uint64]


def window_hashes(ids: Tensor) -> Hashes:
    """Return a 64-bit hash per row of ids [N, T]."""
    rows = ids.cpu().numpy().astype("<i4")
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def shard_name(hashes: Hashes) -> str:
    """Return the file name of the shard that holds these windows: the same whoever writes it, and when."""
    return f"{hashlib.sha256(hashes.astype('<u8').tobytes()).hexdigest()[:16]}.shard"


def shard_bytes(windows: list[bytes], hashes: Hashes) -> bytes:
    """Return a shard's bytes."""
    ends = np.cumsum([len(window) for window in windows], dtype="<u8")
    sums = np.array([zlib.crc32(window) for window in windows], "<u4")
    return b"".join([*windows, hashes.astype("<u8").tobytes(), ends.tobytes(), sums.tobytes()])


class Shard:
    """A shard on disk."""

    def __init__(self, path: Path, windows: int, positions: int, size: int) -> None:
        """Read the index; `positions` is T of each window, `size` what the file should have in bytes."""
        self.path, self.positions = path, positions
        found = path.stat().st_size
        if found != size:
            raise DataError(
                f"{path}: this part of a logit cache is damaged ({found:,} bytes found, {size:,} needed). "
                "Delete the file and run again with the teacher: only its windows are written again."
            )
        self._payload = size - windows * INDEX_BYTES
        self._file = (path, path.stat().st_ino, path.stat().st_mtime_ns)
        with path.open("rb") as handle:
            handle.seek(self._payload)
            self.hashes = np.fromfile(handle, "<u8", windows)
            self._ends = np.concatenate([[np.uint64(0)], np.fromfile(handle, "<u8", windows)]).astype(np.int64)
            self._sums = np.fromfile(handle, "<u4", windows)

    def window(self, row: int) -> NDArray[np.uint8]:
        """Return the bytes of one window; raise DataError if they are not what was written."""
        start, end = int(self._ends[row]), int(self._ends[row + 1])
        packed = _mapped(*self._file)[start:end] if 0 <= start <= end <= self._payload else np.empty(0, np.uint8)
        if zlib.crc32(packed.data) != int(self._sums[row]):
            raise DataError(
                f"{self.path}: window {row} of this part of a logit cache is damaged (its checksum differs). "
                "Delete the file and run again with the teacher: only its windows are written again."
            )
        return packed


@functools.lru_cache(maxsize=_OPEN_FILES)
def _mapped(path: Path, inode: int, written: int) -> NDArray[np.uint8]:
    """Return a file's bytes; inode and time tell a file from another that took its place."""
    mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    return mapped
