r"""Down to a budget: the counts along FFN, KV groups and depth that lose the least score for what they save.

From the counts the options name, one step at a time: `multiple` FFN units, one KV group, or one layer less, each
everywhere; with experts also one of them, or `multiple` units of each. A step's loss is the score it removes as a
share of all score of its axis, averaged over the layers; the step with the least loss per parameter saved is taken
until the model fits. Scores of different axes are comparable only as such shares, which is crude; `fit` re-ranks
shapes by training them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dwindle.errors import DoesNotFit
from dwindle.families import family_of
from dwindle.prune.shape import Shape

if TYPE_CHECKING:
    from dwindle.prune.options import PruneOptions
    from dwindle.prune.scores import AxisScores

__all__ = ["Counts", "best_first", "fitted"]


@dataclass(frozen=True)
class Counts:
    """How many stay along each axis."""

    ffn: int
    groups: int
    width: int
    layers: int
    shared: int = 0
    """Units of a shared expert."""
    experts: int = 0
    expert_width: int = 0

    @classmethod
    def of(cls, shape: Shape) -> Counts:
        """Return the counts of a shape."""
        return cls(shape.ffn_width, shape.kv_heads, shape.width, shape.layers, shape.shared_width, shape.experts,
                   shape.expert_width)  # fmt: skip

    def units(self, shape: Shape, layer: int) -> int:
        """Return how many FFN units stay in a layer of the full shape."""
        return self.shared if shape.has_experts(layer) else self.ffn

    def shape(self, full: Shape, rotated: bool = False, order: Sequence[int] | None = None) -> Shape:
        """Return the shape of a model of which so many stay; a turned width has a head of its own.

        `order` are the layers, the last to go first; it matters where only some have experts.
        """
        stay = sorted((range(full.layers) if order is None else order)[: self.layers])
        return replace(
            full.keeping(stay), ffn_width=self.ffn, kv_heads=self.groups, heads=self.groups * full.queries_per_group,
            width=self.width, tied=full.tied and not rotated, shared_width=self.shared, experts=self.experts,
            expert_width=self.expert_width,
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
    curves = _curves(full, scores)
    order = None if scores.layers is None else best_first(scores.layers)
    counts = start
    while counts.shape(full, rotated, order).parameters > limit:
        size = counts.shape(full, rotated, order).parameters
        steps = []
        for axis, smaller in _steps(counts, options.multiple, full):
            saved = size - smaller.shape(full, rotated, order).parameters
            loss = curves[axis][getattr(counts, axis)] - curves[axis][getattr(smaller, axis)]
            if saved > 0:  # nothing, where no layer that stays has the axis
                steps.append((max(float(loss), 0.0) / saved, axis, smaller))
        if not steps:
            raise DoesNotFit(
                f"prune: {limit:,} parameters cannot be reached; the smallest is {size:,} ({size * weight_bytes:,} "
                f"bytes: {_units(counts.shape(full, rotated, order))}, {counts.groups} KV groups, {counts.layers} "
                f"layers, width {counts.width:,}). Raise the budget, or cut the width too (width_keep)."
            )
        counts = min(steps, key=lambda step: step[:2])[2]
    return counts


def best_first(scores: torch.Tensor) -> list[int]:
    """Return the indices of scores, the best first, ties to the lower index."""
    found: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return found


def _units(shape: Shape) -> str:
    """Return what the layers hold beside attention, by their kinds."""
    mixed = shape.experts > 0 and len(shape.dense_layers) < shape.layers
    parts = [f"{shape.ffn_width:,} FFN units"] if shape.dense_layers or not mixed else []
    parts += [f"{shape.shared_width:,} units of the shared expert"] if mixed and shape.shared_width else []
    parts += [f"{shape.experts} experts of {shape.expert_width:,} units"] if mixed else []
    return ", ".join(parts)


def _steps(counts: Counts, multiple: int, full: Shape) -> Iterator[tuple[str, Counts]]:
    for axis in ("ffn", "shared", "expert_width"):
        size = getattr(counts, axis)
        if size > multiple:
            yield axis, replace(counts, **{axis: (size - 1) // multiple * multiple})
    if counts.experts > full.top_k:
        yield "experts", replace(counts, experts=counts.experts - 1)
    if counts.groups > 1 and not family_of(full.model_type).heads_fill_width:  # there they go with the width only
        yield "groups", replace(counts, groups=counts.groups - 1)
    if counts.layers > 1:
        yield "layers", replace(counts, layers=counts.layers - 1)


def _curves(full: Shape, scores: AxisScores) -> dict[str, torch.Tensor]:
    """Return per axis the share of score that the best 0, 1, ... hold; units that only some layers have count less."""
    curves = {"groups": _kept_curve(scores.groups), "layers": _depth_curve(scores)}
    mixed = [layer for layer in range(full.layers) if full.has_experts(layer)]
    dense = [layer for layer in range(full.layers) if layer not in mixed]
    if full.ffn_width:
        curves["ffn"] = _kept_curve([scores.ffn[layer] for layer in dense]) * (len(dense) / full.layers)
    if full.shared_width:
        curves["shared"] = _kept_curve([scores.ffn[layer] for layer in mixed]) * (len(mixed) / full.layers)
    if mixed:
        share = len(mixed) / full.layers
        curves["experts"] = _kept_curve([scores.experts[layer] for layer in mixed]) * share
        rows = [row for layer in mixed for row in scores.expert_units[layer]]
        curves["expert_width"] = _kept_curve(rows) * share
    return curves


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
