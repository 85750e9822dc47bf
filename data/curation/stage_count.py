"""What a stage took, gave, dropped and changed: counts that add up over processes, and examples drawn at random.

An example's rank is a hash of (seed, stage, id of the document); the documents of least rank are kept. That is a
uniform draw without replacement, and it is the same for any order of the documents and any number of processes.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from typing import Any, Literal

from dwindle.data.document import Document

__all__ = ["Examples", "StageCount"]

_EXCERPT = 300


class Examples:
    """At most `size` documents drawn at random, with a word on each."""

    def __init__(self, key: str, size: int = 5) -> None:
        self.key = key
        self.size = size
        self._heap: list[tuple[int, str, str, str, str]] = []
        """(-rank, id, source, why, start of the text); the worst rank stands first."""

    def offer(self, document: Document, why: str = "") -> None:
        """Keep the document if it is among those of least rank."""
        digest = hashlib.blake2b(f"{self.key}\0{document.id}".encode(errors="replace"), digest_size=8).digest()
        rank = -int.from_bytes(digest, "big")
        if len(self._heap) < self.size or rank > self._heap[0][0]:
            self._push((rank, document.id, document.source, why, document.text[:_EXCERPT]))

    def add(self, other: Examples) -> None:
        """Take in the examples of another part of the same stage."""
        for entry in other._heap:
            self._push(entry)

    def to_json(self) -> list[dict[str, str]]:
        """Return the examples, least rank first."""
        return [
            {"id": name, "source": source, "why": why, "text": text}
            for _, name, source, why, text in sorted(self._heap, reverse=True)
        ]

    def _push(self, entry: tuple[int, str, str, str, str]) -> None:
        (heapq.heappush if len(self._heap) < self.size else heapq.heappushpop)(self._heap, entry)


class StageCount:
    """Documents and bytes in and out of one stage. The chain counts both ends; the stage says what it dropped."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self.documents_in = self.bytes_in = self.documents_out = self.bytes_out = 0
        self.reasons: Counter[str] = Counter()
        """Why documents were dropped, and how many for each reason."""
        self.changes: Counter[str] = Counter()
        """What was changed inside documents that went on, and how often."""
        self.details: dict[str, Any] = {}
        """Whatever else a reader of the card should know; a stage over the whole corpus fills it."""
        self.dropped = Examples(f"{seed}\0{name}\0dropped")

    def take(self, document: Document) -> None:
        """Count a document that comes in."""
        self.documents_in += 1
        self.bytes_in += document.bytes

    def give(self, document: Document) -> None:
        """Count a document that goes out."""
        self.documents_out += 1
        self.bytes_out += document.bytes

    def passes_by(self, document: Document, kind: Literal["code", "prose"]) -> bool:
        """Return whether the document is of that kind, which a stage lets through unread, and count it."""
        if (document.how.get("kind") == "code") != (kind == "code"):
            return False
        self.changes[f"documents of {'source code' if kind == 'code' else 'prose'}, passed by"] += 1
        return True

    def drop(self, document: Document, why: str, detail: str = "") -> None:
        """Count a document that goes no further; `why` is one of a few reasons, `detail` belongs to the example."""
        self.reasons[why] += 1
        self.dropped.offer(document, f"{why}: {detail}" if detail else why)

    def add(self, other: StageCount) -> None:
        """Take in the counts of another part of the same stage."""
        self.documents_in += other.documents_in
        self.bytes_in += other.bytes_in
        self.documents_out += other.documents_out
        self.bytes_out += other.bytes_out
        self.reasons.update(other.reasons)
        self.changes.update(other.changes)
        self.details.update(other.details)
        self.dropped.add(other.dropped)

    def to_json(self) -> dict[str, Any]:
        """Return what the data card says of the stage."""
        return {
            "stage": self.name,
            "documents_in": self.documents_in,
            "documents_out": self.documents_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "dropped": dict(sorted(self.reasons.items())),
            "changed": dict(sorted(self.changes.items())),
            "details": self.details,
            "dropped_examples": self.dropped.to_json(),
        }
