r"""One way to write the same text: Unicode NFC, `\n` line ends, no control or invisible characters.

Removed are the C0 and C1 controls but tab and line end, and zero-width space, word joiner, soft hyphen and byte order
mark; joiners that scripts need (U+200C, U+200D) stay. Text that was decoded with the wrong table (`Ã©` for `é`) is not
mended, since a guess may be wrong, but counted, or dropped where the recipe says so.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document

__all__ = ["Normalization"]

_REMOVED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff]+")
_MOJIBAKE = re.compile(
    "\u00c3[\u0080-\u00bf]|\u00c2[\u00a0-\u00bf]|\u00e2\u20ac[\u2122\u0153\u009d\u02dc\u201c]|\ufffd"
)
_NEXT_LINE = "\x85"


@dataclass(frozen=True)
class Normalization:
    """Stage: normal form, line ends, control characters."""

    mojibake: Literal["note", "drop"] = "note"
    """What happens to text decoded with the wrong table: counted, or dropped."""
    name: ClassVar[str] = "normalization"

    def edit(self, document: Document, count: StageCount) -> Document | None:
        """Return the document in normal form; None for one of white space alone."""
        text = document.text
        if "\r" in text or _NEXT_LINE in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n").replace(_NEXT_LINE, "\n")
            count.changes["documents with other line ends"] += 1
        if not text.replace("\n", "").replace("\t", "").isprintable() and _REMOVED.search(text):
            text, number = _REMOVED.subn("", text)
            count.changes["runs of control or invisible characters removed"] += number
        if not text.isascii():
            if not unicodedata.is_normalized("NFC", text):
                text = unicodedata.normalize("NFC", text)
                count.changes["documents brought to NFC"] += 1
            if (found := _MOJIBAKE.search(text)) is not None:
                if self.mojibake == "drop":
                    count.drop(document, "text decoded with the wrong table", repr(found.group()))
                    return None
                count.changes["documents with text decoded with the wrong table (kept)"] += 1
        if not text.strip():
            count.drop(document, "white space alone")
            return None
        return document if text == document.text else replace(document, text=text)
