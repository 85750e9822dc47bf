"""How to prune: which axes, by what score, and what is done to make up for it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dwindle.errors import RecipeError

__all__ = ["DepthMethod", "Method", "PruneOptions"]

Method = Literal["activation", "magnitude", "taylor", "fisher"]
DepthMethod = Literal["block_influence", "leave_one_out"]


@dataclass(frozen=True)
class PruneOptions:
    """What to keep, and how to choose it. A share of 1 leaves its axis alone."""

    ffn_keep: float = 1.0
    """Share of the FFN units to keep in every layer."""
    heads_keep: float = 1.0
    """Share of the KV groups (a KV head with its queries) to keep in every layer."""
    width_keep: float = 1.0
    """Share of the hidden width to keep."""
    layers_keep: float = 1.0
    """Share of the layers to keep."""
    parameters: int | None = None
    """Keep the most valuable FFN units, KV groups and layers that fit into so many parameters, beyond the shares."""
    bytes: int | None = None
    """The same in bytes of weights as stored."""
    method: Method = "activation"
    """Score of units, groups and channels; all but `magnitude` need calibration data. See `scores`."""
    depth_method: DepthMethod = "block_influence"
    """Score of layers; both need calibration data. See `depth_scores`."""
    rotate: bool | None = None
    """Turn the hidden width onto its principal axes before cutting it, instead of choosing among its channels; None:
    where the family allows it and there is calibration data. See `rotation`."""
    compensate: bool = True
    """Refit the layer that reads what was cut, where there is calibration data. See `compensation`."""
    damping: float = 1e-3
    """Share of the mean second moment added to the diagonal when refitting: how far not to trust a small sample."""
    multiple: int = 32
    """FFN and hidden width are rounded to a multiple of this: quantization groups and matrix units want it."""

    def __post_init__(self) -> None:
        wrong = []
        for name in ("ffn_keep", "heads_keep", "width_keep", "layers_keep"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                wrong.append(f"{name}={share!r} (needed: above 0, at most 1)")
        for name in ("parameters", "bytes"):
            budget = getattr(self, name)
            if budget is not None and not budget >= 1:
                wrong.append(f"{name}={budget!r} (needed: a whole number of at least 1)")
        for name, kind in (("method", Method), ("depth_method", DepthMethod)):
            if getattr(self, name) not in get_args(kind):
                wrong.append(f"{name}={getattr(self, name)!r} (needed: {' or '.join(get_args(kind))})")
        if not 0 < self.damping < 1:
            wrong.append(f"damping={self.damping!r} (needed: above 0, below 1)")
        if not self.multiple >= 1:
            wrong.append(f"multiple={self.multiple!r} (needed: a whole number of at least 1)")
        if wrong:
            raise RecipeError(f"prune: {'; '.join(wrong)}.")

    def rounded(self, share: float, size: int) -> int:
        """Return how many of `size` stay: the nearest multiple, at least one multiple, at most all.

        >>> PruneOptions().rounded(0.5, 172), PruneOptions().rounded(1.0, 172)
        (96, 172)
        """
        if share == 1:
            return size
        return min(size, max(1, round(share * size / self.multiple)) * self.multiple)

    @staticmethod
    def counted(share: float, size: int) -> int:
        """Return how many of `size` stay: the nearest whole number, at least one.

        >>> PruneOptions.counted(0.5, 6), PruneOptions.counted(0.01, 6)
        (3, 1)
        """
        return max(1, round(share * size))
