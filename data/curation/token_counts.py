"""Tokens of a corpus under a student's tokenizer: how many, how long the documents are, how well the tokenizer fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.data.document import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenCounts"]

_BATCH_CHARACTERS = 1 << 20


class TokenCounts:
    """Counts tokens of the documents of one split. Memory: 8 bytes for each document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[Document] = []
        self._characters = 0
        self._counts: list[int] = []
        self._by_source: dict[str, list[int]] = {}

    def add(self, document: Document) -> None:
        """Take in a document."""
        self._waiting.append(document)
        self._characters += len(document.text)
        if self._characters >= _BATCH_CHARACTERS:
            self._count()

    def _count(self) -> None:
        from dwindle.tokenization import encode_plain

        texts = [document.text for document in self._waiting]
        for document, ids in zip(self._waiting, encode_plain(self._tokenizer, texts), strict=True):
            self._counts.append(len(ids))
            source = self._by_source.setdefault(document.source, [0, 0])
            source[0] += len(ids)
            source[1] += document.bytes
        self._waiting, self._characters = [], 0

    def to_json(self) -> dict[str, Any]:
        """Return totals, bytes per token by source, and the lengths at some quantiles."""
        if self._waiting:
            self._count()
        tokens = np.array(self._counts or [0])
        total_bytes = sum(size for _, size in self._by_source.values())
        return {
            "tokens": int(tokens.sum()),
            "bytes_per_token": round(total_bytes / max(1, int(tokens.sum())), 3),
            "tokens_per_document": {f"{q}%": int(np.percentile(tokens, q, method="nearest"))
                                    for q in (0, 10, 50, 90, 99, 100)},
            "by_source": {name: {"tokens": count, "bytes_per_token": round(size / max(1, count), 3)}
                          for name, (count, size) in sorted(self._by_source.items())},
        }  # fmt: skip
