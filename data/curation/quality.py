"""Keeps prose that reads like prose, by counting: the rules of Gopher, C4 and FineWeb.

- Gopher (Rae et al. 2021, arXiv 2112.11446, table A1): number and mean length of words, symbols, bullets, ellipses,
  words with a letter, common words;
- C4 (Raffel et al. 2020, section 2.2): filler text and notices of scripts;
- FineWeb (Penedo et al. 2024, section 3.6): lines that end like sentences, short lines, repeated lines.

Words are separated by white space. Thresholds are the papers'; None switches a rule off. Source code passes:
`code_quality` is for it. Repeated n-grams are in `repetition`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document

__all__ = ["Quality"]

_COMMON = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25e6")
_ENDS = (".", "!", "?", '"', "'", "\u201d", "\u2019", ":", ";", ")", "\u3002", "\uff01", "\uff1f")
_FILLER = ("lorem ipsum", "javascript is disabled", "javascript is required", "please enable javascript",
           "please enable cookies")  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """Stage: heuristic rules for prose."""

    least_words: int | None = 50
    """Words a document needs."""
    most_words: int | None = 100_000
    """Words a document may have."""
    least_word_length: float | None = 3
    """Least mean length of a word, in characters."""
    most_word_length: float | None = 10
    """Largest mean length of a word."""
    most_symbols: float | None = 0.1
    """Symbols (#, ellipsis) for each word."""
    most_bullets: float | None = 0.9
    """Share of lines that begin with a bullet."""
    most_ellipses: float | None = 0.3
    """Share of lines that end with an ellipsis."""
    least_alphabetic: float | None = 0.8
    """Share of words with a letter in them."""
    least_common_words: int | None = 2
    """How many of the, be, to, of, and, that, have, with must occur (English)."""
    least_sentence_ends: float | None = 0.12
    """Share of lines that end with punctuation."""
    most_short_lines: float | None = 0.67
    """Share of lines of at most 30 characters."""
    most_repeated_lines: float | None = 0.1
    """Share of the characters that stand in repeated lines."""
    filler: bool = True
    """Drop documents with lorem ipsum or a notice that scripts are needed."""
    name: ClassVar[str] = "quality"

    def edit(self, document: Document, count: StageCount) -> Document | None:
        """Return the document if it keeps every rule."""
        if count.passes_by(document, "code"):
            return document
        if (broken := self.broken_rule(document.text)) is None:
            return document
        count.drop(document, *broken)
        return None

    def broken_rule(self, text: str) -> tuple[str, str] | None:
        """Return (the first rule a text breaks, the number found), or None.

        >>> Quality().broken_rule("too short")
        ('too few words', '2')
        """
        words = text.split()
        number = max(1, len(words))
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        many = max(1, len(lines))
        if _under(len(words), self.least_words):
            return "too few words", str(len(words))
        if _over(len(words), self.most_words):
            return "too many words", str(len(words))
        length = sum(map(len, words)) / number
        if _under(length, self.least_word_length) or _over(length, self.most_word_length):
            return "mean length of words", f"{length:.2f}"
        symbols = text.count("#") + text.count("...") + text.count("\u2026")
        if _over(share := symbols / number, self.most_symbols):
            return "too many symbols", f"{share:.2f}"
        bare = sum(1 for word in words if not word.isalpha() and word.upper() == word.lower())
        if _under(share := 1 - bare / number, self.least_alphabetic):
            return "too few words with letters", f"{share:.2f}"
        if self.least_common_words is not None:
            common = len(_COMMON.intersection(map(str.lower, set(words))))
            if common < self.least_common_words:
                return "too few common words", str(common)
        if _over(share := sum(line.startswith(_BULLETS) for line in lines) / many, self.most_bullets):
            return "too many bullets", f"{share:.2f}"
        if _over(share := sum(line.endswith(("...", "\u2026")) for line in lines) / many, self.most_ellipses):
            return "too many lines end with an ellipsis", f"{share:.2f}"
        if _under(share := sum(line.endswith(_ENDS) for line in lines) / many, self.least_sentence_ends):
            return "too few lines end like sentences", f"{share:.2f}"
        if _over(share := sum(len(line) <= 30 for line in lines) / many, self.most_short_lines):
            return "too many short lines", f"{share:.2f}"
        distinct = set(lines)
        if len(distinct) < len(lines):
            total = max(1, sum(map(len, lines)))
            if _over(share := 1 - sum(map(len, distinct)) / total, self.most_repeated_lines):
                return "too many repeated lines", f"{share:.2f}"
        lowered = text.lower() if self.filler else ""
        for filler in _FILLER:
            if filler in lowered:
                return "filler text", filler
        return None


def _under(value: float, least: float | None) -> bool:
    return least is not None and value < least


def _over(value: float, most: float | None) -> bool:
    return most is not None and value > most
