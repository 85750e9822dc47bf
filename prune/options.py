"""How to prune. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dwindle.errors import RecipeError

__all__ = ["Method", "PruneOptions"]

Method = Literal["activation", "magnitude"]


@dataclass(frozen=True)
class PruneOptions:
    """What to keep, and how to choose it."""

    ffn_keep: float = 0.5
    """Share of the FFN units to keep in every layer."""
    method: Method = "activation"
    """`activation` (needs calibration data) or `magnitude`; see `scores`."""
    multiple: int = 32
    """The FFN width is rounded to a multiple of this: quantization groups and matrix units want it."""

    def __post_init__(self) -> None:
        wrong = []
        if not 0 < self.ffn_keep <= 1:
            wrong.append(f"ffn_keep={self.ffn_keep!r} (needed: above 0, at most 1)")
        if self.method not in get_args(Method):
            wrong.append(f"method={self.method!r} (needed: {' or '.join(get_args(Method))})")
        if not self.multiple >= 1:
            wrong.append(f"multiple={self.multiple!r} (needed: a whole number of at least 1)")
        if wrong:
            raise RecipeError(f"prune: {'; '.join(wrong)}.")

    def width(self, ffn_width: int) -> int:
        """Return how many of `ffn_width` units stay: the nearest multiple, at least one multiple, at most all.

        >>> PruneOptions(ffn_keep=0.5).width(172)
        96
        >>> PruneOptions(ffn_keep=1.0).width(172)
        172
        """
        if self.ffn_keep == 1:
            return ffn_width
        return min(ffn_width, max(1, round(self.ffn_keep * ffn_width / self.multiple)) * self.multiple)
