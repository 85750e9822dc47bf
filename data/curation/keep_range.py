"""A range of a score that is kept: absolute, or between two quantiles of the corpus.

Both ends cut. What a teacher finds certain teaches little (boilerplate, repetition), and what it cannot predict at all
is noise more often than it is hard: the middle is worth the tokens (Marion et al. 2023, arXiv 2309.04564, who keep the
middle of the perplexities; Ankner et al. 2024, arXiv 2405.20541).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dwindle.errors import RecipeError

__all__ = ["KeepRange", "quantile"]

_FORM = re.compile(r"\s*(-?[\d.]+(?:e-?\d+)?)?\s*(%)?\s*\.\.\s*(-?[\d.]+(?:e-?\d+)?)?\s*(%)?\s*")


@dataclass(frozen=True)
class KeepRange:
    """From `low` to `high`, both included; None is open."""

    low: float | None = None
    """Least score kept."""
    high: float | None = None
    """Largest score kept."""
    quantiles: bool = False
    """The ends are shares of the documents, 0 to 1, and not scores."""

    def __post_init__(self) -> None:
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        if self.low is None and self.high is None:
            raise RecipeError("keep-range: it has neither end (needed: LOW..HIGH, LOW.. or ..HIGH).")
        if not low < high:
            raise RecipeError(f"keep-range: {low:g}..{high:g} is empty (needed: LOW below HIGH).")
        if self.quantiles and not all(0 <= end <= 1 for end in (self.low, self.high) if end is not None):
            raise RecipeError(f"keep-range: {100 * low:g}%..{100 * high:g}% (needed: between 0% and 100%).")

    @classmethod
    def of(cls, text: str) -> KeepRange:
        """Return the range that a text means.

        >>> KeepRange.of("5%..95%")
        KeepRange(low=0.05, high=0.95, quantiles=True)
        >>> KeepRange.of("..4.5").high
        4.5
        """
        found = _FORM.fullmatch(text)
        try:
            ends = [None if end is None else float(end) for end in (found[1], found[3])] if found else []
        except ValueError:
            found = None
        if found is None:
            raise RecipeError(f"keep-range: {text!r} (needed: LOW..HIGH as in 1.5..4 or 5%..95%, either end open).")
        marks = {mark for end, mark in zip(ends, (found[2], found[4]), strict=True) if end is not None}
        if len(marks) > 1:
            raise RecipeError(f"keep-range: {text!r} mixes a score and a share (needed: both with % or none).")
        by_share = marks == {"%"}
        low, high = (end / 100 if by_share and end is not None else end for end in ends)
        return cls(low, high, by_share)

    def scores(self, found: Sequence[float]) -> tuple[float, float]:
        """Return the least and the largest score kept, given all scores of the corpus.

        >>> KeepRange.of("25%..").scores([1.0, 2.0, 3.0, 4.0])
        (1.75, inf)
        """
        if not self.quantiles:
            return (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        ordered = sorted(found)
        return (
            -math.inf if self.low is None else quantile(ordered, self.low),
            math.inf if self.high is None else quantile(ordered, self.high),
        )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of ascending numbers lie, between neighbours by the rule of three."""
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
