"""Documents out of one text file, streamed.

Documents are what stands between lines that read `<|endoftext|>`; without such lines, stretches of whole paragraphs
(cut at blank lines) of at least 4,000 characters that `continue` each other, or the file as one document. Whatever is
longer than 4 Mi characters without a cut is cut behind its last line end, white space or character before that, into
documents that continue each other. Continued documents joined give the file back exactly.

Memory: about three times the longest document, at most 16 Mi characters, whatever the file's size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dwindle.data.byte_stream import open_text
from dwindle.data.document import Document

__all__ = ["text_documents"]

_STRETCH = 4000
_LONGEST = 1 << 22
_CHUNK = 1 << 20
_MARKER = "<|endoftext|>"
_LINE_ENDS = re.compile(r"[ \t]*(?:\r?\n|\Z)")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\r?\n)+")
_TEXT_BEGINS = re.compile(r"[ \t]*[^ \t\r\n]")
_LONGEST_MARKER = 256
"""A line with a marker and more white space than this is no marker line."""


def text_documents(path: Path, *, whole: bool = False) -> Iterator[Document]:
    """Yield the documents of a text file; with `whole`, a file without marker lines is one document."""
    name = str(path)
    if _has_markers(path):
        yield from _between_markers(path, name)
    elif whole:
        yield from _pieces(_chunks(path), name)
    else:
        yield from _stretches(path, name)


def _chunks(path: Path) -> Iterator[str]:
    with open_text(path) as handle:
        while chunk := handle.read(_CHUNK):
            yield chunk


def _has_markers(path: Path) -> bool:
    """Return whether any line reads `<|endoftext|>`; the tail of a chunk is looked at again with the next."""
    tail = ""
    for chunk in _chunks(path):
        text = tail + chunk
        if next(_markers(text), None) is not None:
            return True
        begin = text.rfind("\n") + 1  # the last line may go on; one too long for a marker must not look like a new one
        tail = text[begin:] if len(text) - begin <= _LONGEST_MARKER else "x"
    return False


def _markers(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the lines that hold the marker alone."""
    at = text.find(_MARKER)
    while at >= 0:
        nearest = max(0, at - _LONGEST_MARKER)
        begin = max(text.rfind("\n", nearest, at) + 1, nearest)
        ends = _LINE_ENDS.match(text, at + len(_MARKER))
        if ends is not None and not text[begin:at].strip(" \t"):
            yield begin, ends.end()
        at = text.find(_MARKER, at + len(_MARKER))


def _between_markers(path: Path, name: str) -> Iterator[Document]:
    rest, begun = "", False
    for chunk in _with_end(path):
        last = chunk is None
        rest += chunk or ""
        start = 0
        for begin, end in _markers(rest):
            if not last and end == len(rest):
                break  # the line may go on
            if rest[start:begin].strip():
                yield Document(rest[start:begin], name, continues=begun)
            start, begun = end, False
        rest = rest[start:]
        while len(rest) > _LONGEST:
            cut = _cut(rest)
            yield Document(rest[:cut], name, continues=begun)
            rest, begun = rest[cut:], True
    if rest.strip():
        yield Document(rest, name, continues=begun)


def _with_end(path: Path) -> Iterator[str | None]:
    yield from _chunks(path)
    yield None


def _pieces(chunks: Iterator[str], name: str) -> Iterator[Document]:
    rest, begun = "", False
    for chunk in chunks:
        rest += chunk
        while len(rest) > _LONGEST:
            cut = _cut(rest)
            yield Document(rest[:cut], name, continues=begun)
            rest, begun = rest[cut:], True
    if rest.strip() or begun:
        yield Document(rest, name, continues=begun)


def _stretches(path: Path, name: str) -> Iterator[Document]:
    held: str | None = None  # a finished stretch waits: a short end of the file belongs to it
    rest, seen, begun = "", 0, False
    for chunk in _chunks(path):
        rest += chunk
        start = 0
        for match in _BLANK_LINES.finditer(rest, seen):
            if match.end() - start >= _STRETCH and _TEXT_BEGINS.match(rest, match.end()):
                if held is not None:
                    yield Document(held, name, continues=begun)
                    begun = True
                held, start = rest[start : match.end()], match.end()
        rest = rest[start:]
        while len(rest) > _LONGEST:
            if held is not None:
                yield Document(held, name, continues=begun)
                begun = True
            cut = _cut(rest)
            held, rest = rest[:cut], rest[cut:]
        seen = len(rest.rstrip(" \t\r\n"))  # blank lines at the end may go on
    if held is not None and len(rest) < _STRETCH:
        held, rest = held + rest, ""
    for text in (held, rest):
        if text:
            yield Document(text, name, continues=begun)
            begun = True


def _cut(text: str) -> int:
    """Return where to cut a text that has grown too long."""
    for mark in ("\n", " "):
        if (found := text.rfind(mark, _LONGEST // 2, _LONGEST)) >= 0:
            return found + 1
    return _LONGEST
