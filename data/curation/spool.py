"""A stream of documents put aside on disk, to be gone through again or looked into by number. Scratch, never an output.

Disk: the text and about 100 bytes for each document. Memory: 8 bytes for each document.
"""

from __future__ import annotations

import array
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dwindle.data.document import Document

__all__ = ["Spool", "read_spooled"]


def read_spooled(path: Path, offsets: Iterable[int]) -> list[Document]:
    """Return the documents that begin at these bytes of a spool's file."""
    with path.open("rb") as handle:
        found = []
        for offset in offsets:
            handle.seek(offset)
            found.append(_decoded(handle.readline()))
        return found


class Spool:
    """Documents on disk, written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = array.array("Q")
        """Where each document begins."""
        self._handle: BinaryIO | None = path.open("wb", buffering=1 << 20)
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.offsets)

    def add(self, document: Document) -> None:
        """Put a document aside, behind those before it."""
        assert self._handle is not None, "written before it is read"
        fields = (document.text, document.source, document.continues, document.licence, document.id, dict(document.how))
        line = json.dumps(fields, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        self.offsets.append(self._end)
        self._end += self._handle.write(line)

    def end(self) -> None:
        """End the writing; what was written can be read."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def close(self) -> None:
        """Remove the file."""
        self.end()
        self.path.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents, in the order they were written in."""
        self.end()
        with self.path.open("rb", buffering=1 << 20) as handle:
            for line in handle:
                yield _decoded(line)


def _decoded(line: bytes) -> Document:
    return Document(*json.loads(line))
