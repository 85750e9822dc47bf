r"""Down to a budget: the counts along FFN, KV groups and depth that lose the least score for what they save.

From the counts the options name, one step at a time: `multiple` FFN units, one KV group, or one layer less, each
everywhere. A step's loss is the score it removes as a share of all score of its axis, averaged over the layers; the
step with the least loss per parameter saved is taken until the model fits. Scores of different axes are comparable
only as such shares, which is crude; `fit` re-ranks shapes by training them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dwindle.errors import DoesNotFit
from dwindle.prune.shape import Shape

if TYPE_CHECKING:
    from dwindle.prune.options import PruneOptions
    from dwindle.prune.scores import AxisScores

__all__ = ["Counts", "fitted"]


@dataclass(frozen=True)
class Counts:
    """How many stay along each axis."""

    ffn: int
    groups: int
    width: int
    layers: int

    @classmethod
    def of(cls, shape: Shape) -> Counts:
        """Return the counts of a shape."""
        return cls(shape.ffn_width, shape.kv_heads, shape.width, shape.layers)

    def shape(self, full: Shape, rotated: bool = False) -> Shape:
        """Return the shape of a model of which so many stay; a turned width has a head of its own."""
        return replace(
            full, ffn_width=self.ffn, kv_heads=self.groups, heads=self.groups * full.queries_per_group,
            width=self.width, layers=self.layers, tied=full.tied and not rotated,
        )  # fmt: skip


def fitted(
    full: Shape, start: Counts, scores: AxisScores, options: PruneOptions, weight_bytes: int, rotated: bool = False
) -> Counts:
    """Return the first counts on the cheapest way down that fit the options' parameters and bytes.

    Raises DoesNotFit, with the smallest reachable model, if even one group, layer and multiple of units is too large.
    """
    limits = [] if options.parameters is None else [options.parameters]
    limits += [] if options.bytes is None else [options.bytes // weight_bytes]
    limit = min(limits)
    curves = {"ffn": _kept_curve(scores.ffn), "groups": _kept_curve(scores.groups), "layers": _depth_curve(scores)}
    counts = start
    while counts.shape(full, rotated).parameters > limit:
        size = counts.shape(full, rotated).parameters
        steps = []
        for axis, smaller in _steps(counts, options.multiple):
            saved = size - smaller.shape(full, rotated).parameters
            loss = curves[axis][getattr(counts, axis)] - curves[axis][getattr(smaller, axis)]
            steps.append((max(float(loss), 0.0) / saved, axis, smaller))
        if not steps:
            raise DoesNotFit(
                f"prune: {limit:,} parameters cannot be reached; the smallest is {size:,} ({size * weight_bytes:,} "
                f"bytes: {counts.ffn:,} FFN units, {counts.groups} KV groups, {counts.layers} layers, width "
                f"{counts.width:,}). Raise the budget, or cut the width too (width_keep)."
            )
        counts = min(steps, key=lambda step: step[:2])[2]
    return counts


def _steps(counts: Counts, multiple: int) -> Iterator[tuple[str, Counts]]:
    if counts.ffn > multiple:
        yield "ffn", replace(counts, ffn=(counts.ffn - 1) // multiple * multiple)
    if counts.groups > 1:
        yield "groups", replace(counts, groups=counts.groups - 1)
    if counts.layers > 1:
        yield "layers", replace(counts, layers=counts.layers - 1)


def _kept_curve(scores: list[torch.Tensor]) -> torch.Tensor:
    """Return [n + 1]: the mean over layers of the share of score that the best 0, 1, ..., n hold."""
    curves = []
    for layer in scores:
        total = layer.sum()
        shares = layer.sort(descending=True).values.cumsum(0) / (total if total > 0 else 1)
        curves.append(torch.cat([torch.zeros(1).double(), shares]))
    return torch.stack(curves).mean(0)


def _depth_curve(scores: AxisScores) -> torch.Tensor:
    layers = torch.zeros(1) if scores.layers is None else scores.layers.clamp(min=0)
    return _kept_curve([layers.double()])
