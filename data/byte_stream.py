"""Files as streams of bytes, plain or compressed (.gz, .zst), and lines of bounded length.

Nothing is read whole. A record (a line of .jsonl or .csv, an entry of .json) may have up to 64 MiB; one that is longer
is an error that names the line, not a process that is killed. zstd is Arrow's, which the package depends on anyway.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dwindle.errors import DataError

__all__ = ["LONGEST_RECORD_BYTES", "lines", "open_bytes", "open_text", "suffix"]

LONGEST_RECORD_BYTES = 1 << 26
_COMPRESSED = (".gz", ".zst")
_BUFFER_BYTES = 1 << 20


def suffix(path: Path) -> str:
    """Return the suffix that tells the format: that before .gz or .zst, in lower case.

    >>> suffix(Path("a/News.JSONL.zst"))
    '.jsonl'
    """
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED else (suffixes or [""])[-1]


def open_bytes(path: Path) -> IO[bytes]:
    """Return the file's bytes, decompressed as they are read. Raises OSError, then or while reading."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), _BUFFER_BYTES)
    return path.open("rb", buffering=_BUFFER_BYTES)


def open_text(path: Path) -> io.TextIOWrapper:
    """Return the file's text as UTF-8, line ends as they are."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8", newline="")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line). Raises DataError for a line of more than `LONGEST_RECORD_BYTES`."""
    with open_bytes(path) as handle:
        number = 0
        while line := handle.readline(LONGEST_RECORD_BYTES):
            number += 1
            if len(line) == LONGEST_RECORD_BYTES and not line.endswith(b"\n"):
                raise DataError(
                    f"{path}:{number}: a line of more than {LONGEST_RECORD_BYTES:,} bytes. One record a line is "
                    "needed: is this the format that the name says? Plain text (.txt) may have lines of any length."
                )
            yield number, line
