"""Passages of a corpus that a model is given: at most so many tokens, cut where sentences end, drawn at random.

A passage's rank is a hash of (seed, document, number in it); those of least rank are taken, which is a uniform draw
without replacement in one pass. Memory: the passages drawn.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwindle.data.document import Document, document_sha256
from dwindle.tokenization import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Passage", "drawn_passages", "passages_of"]

_END = re.compile(r"\n\s*\n|(?<=[.!?])\s+|\n")


@dataclass(frozen=True)
class Passage:
    """A stretch of a document."""

    text: str
    source: str
    licence: str | None
    document: str
    """Id of the document, else the hash of its text."""
    number: int


def passages_of(document: Document, tokenizer: PreTrainedTokenizerBase, tokens: int, least: int) -> Iterator[Passage]:
    """Yield the stretches of whole sentences with `least` to `tokens` tokens; a longer sentence is left out."""
    name = document.id or document_sha256(document)[:16]
    number, held, count = 0, "", 0
    sentences = [s for s in _sentences(document.text) if s.strip()]
    sizes = [len(ids) for ids in encode_plain(tokenizer, sentences)] if sentences else []
    for sentence, size in [*zip(sentences, sizes, strict=True), ("", 0)]:
        if held and (not sentence or count + size > tokens):
            if count >= least:
                yield Passage(held.strip(), document.source, document.licence, name, number)
                number += 1
            held, count = "", 0
        if size <= tokens:  # a single sentence beyond the limit has no place to be cut at
            held, count = held + sentence, count + size


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for match in _END.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def drawn_passages(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, *, count: int, tokens: int, least: int, seed: int
) -> list[Passage]:
    """Return at most `count` passages of the documents, in the order of their rank."""
    heap: list[tuple[int, int, Passage]] = []
    position = 0
    for document in documents:
        for passage in passages_of(document, tokenizer, tokens, least):
            key = f"{seed}\0{passage.document}\0{passage.number}\0{passage.text}".encode(errors="surrogatepass")
            rank = -int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
            position -= 1
            if len(heap) < count:
                heapq.heappush(heap, (rank, position, passage))
            elif rank > heap[0][0]:
                heapq.heapreplace(heap, (rank, position, passage))
    return [passage for _, _, passage in sorted(heap, key=lambda entry: (-entry[0], -entry[1]))]
