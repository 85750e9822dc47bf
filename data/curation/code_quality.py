"""Keeps source code that people wrote: the rules of Codex, The Stack and StarCoder.

Long lines and few letters or digits mean tables and minified or encoded data (Chen et al. 2021, arXiv 2107.03374,
section 3.1; Li et al. 2023, arXiv 2305.06161, section 3); a notice in the first lines tells what a tool generated; a
file of hex digits or escapes is data. Prose passes by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document

__all__ = ["CodeQuality"]

_GENERATED = re.compile(
    r"auto[- ]?generated|automatically generated|generated (?:by|from|with|file)|do not edit|@generated", re.I
)
_BASE64 = re.compile(r"[A-Za-z0-9+/]{80,}={0,2}")
_ESCAPES = {"\\x": 4, "\\u": 6, "0x": 5}
"""How an escape or hex number begins, and about how many characters it has."""
_OTHERS = bytes(i for i in range(128) if not (chr(i).isalnum() or chr(i) == "_"))


@dataclass(frozen=True)
class CodeQuality:
    """Stage: heuristic rules for source code."""

    least_lines: int | None = 3
    """Lines a file needs that are not blank."""
    most_mean_line: float | None = 100
    """Largest mean length of a line, in characters."""
    most_line: int | None = 1000
    """Length of the longest line."""
    least_alphanumeric: float | None = 0.25
    """Share of characters that are letters or digits."""
    most_encoded: float | None = 0.25
    """Share of characters in runs of escapes, hex numbers or base64."""
    most_repeated_lines: float | None = 0.5
    """Share of the characters that stand in repeated lines."""
    generated: bool = True
    """Drop files whose first lines say that a tool wrote them."""
    name: ClassVar[str] = "code_quality"

    def edit(self, document: Document, count: StageCount) -> Document | None:
        """Return the document if it keeps every rule."""
        if count.passes_by(document, "prose"):
            return document
        if (broken := self.broken_rule(document.text)) is None:
            return document
        count.drop(document, *broken)
        return None

    def broken_rule(self, text: str) -> tuple[str, str] | None:
        """Return (the first rule a file breaks, what was found), or None."""
        lines = [line for line in text.split("\n") if line.strip()]
        lengths = [len(line) for line in lines] or [0]
        if self.least_lines is not None and len(lines) < self.least_lines:
            return "too few lines", str(len(lines))
        if self.most_line is not None and max(lengths) > self.most_line:
            return "a line is too long", str(max(lengths))
        if self.most_mean_line is not None and (mean := sum(lengths) / len(lengths)) > self.most_mean_line:
            return "lines are too long in the mean", f"{mean:.0f}"
        if self.least_alphanumeric is not None:
            data = text.encode(errors="replace")
            share = len(data.translate(None, _OTHERS)) / max(1, len(data))
            if share < self.least_alphanumeric:
                return "too few letters and digits", f"{share:.2f}"
        if self.generated and (found := _GENERATED.search("\n".join(lines[:8])[:2000])) is not None:
            return "generated", found.group()
        if self.most_encoded is not None:
            encoded = sum(text.count(begin) * size for begin, size in _ESCAPES.items())
            long = (line for line in lines if len(line) >= 80)
            encoded += sum(len(match.group()) for line in long for match in _BASE64.finditer(line))
            share = encoded / max(1, len(text))
            if share > self.most_encoded:
                return "encoded data", f"{share:.2f}"
        if self.most_repeated_lines is not None:
            stripped = [line.strip() for line in lines]
            share = 1 - sum(map(len, set(stripped))) / max(1, sum(map(len, stripped)))
            if share > self.most_repeated_lines:
                return "too many repeated lines", f"{share:.2f}"
        return None
