"""What is left of a stream after documents were dropped out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dwindle.data.document import Document

__all__ = ["kept_in_order"]


def kept_in_order(decided: Iterator[tuple[Document, bool]]) -> Iterator[Document]:
    """Yield the documents that are kept; what stood behind a dropped one continues nothing any more."""
    gap = False
    for document, keeps in decided:
        if keeps:
            yield replace(document, continues=False) if gap and document.continues else document
        gap = not keeps
