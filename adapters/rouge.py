"""ROUGE-L: how much of a text is in another, in order (Lin 2004, "ROUGE: A Package for Automatic Evaluation").

    P = LCS / words of the candidate     R = LCS / words of the reference     F = 2 P R / (P + R)

LCS is the longest common subsequence of words. Words are runs of letters and digits in lower case, not stemmed, as in
the package `rouge-score` (`rougeL` without a stemmer; equal values, see the tests). That package is not used because it
brings nltk and absl along for these thirty lines. Letters here are those of every script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["rouge_l"]


def rouge_l(candidate: str, reference: str) -> float:
    """Return F from 0 to 1.

    >>> rouge_l("the cat sat", "The cat sat.")
    1.0
    >>> round(rouge_l("the cat was found under the bed", "the cat was under the bed"), 4)
    0.9231
    >>> rouge_l("", "the cat")
    0.0
    """
    ours, theirs = _words(candidate), _words(reference)
    common = _longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, row by row of the dynamic programme."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for column, other in enumerate(b, 1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
