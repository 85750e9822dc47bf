"""A weight as integers on a scale: round to nearest (RTN) with the clipping that minimises the squared error.

A group of inputs of one output row shares a scale s (and a zero point z if asymmetric):

    symmetric    code = clamp(round(w / s) + 2^(b-1), 0, 2^b - 1)          s = r * max|w| / (2^(b-1) - 1)
    balanced     code = clamp(round(w / s + 2^(b-1) - 1/2), 0, 2^b - 1)    s = r * max|w| / (2^(b-1) - 1/2)
    asymmetric   code = clamp(round(w / s) + z, 0, 2^b - 1)                s = r * (max(w, 0) - min(w, 0)) / (2^b - 1)

r = 1 represents the largest weight; a smaller r clips it and gives all others a finer grid. A few r are tried per
group, then the least-squares scale of the best codes, s = sum(q w) / sum(q^2), and the scale with the smallest
squared error is kept. Every candidate is rounded to fp16 first and its error measured with the rounded value, so the
choice is made for what is stored. r = 1 is among the candidates: the result is never worse than plain RTN. With an
`importance` (second moments of the inputs, Fisher information) all sums are weighted by it.

torchao and ONNX Runtime's quantizers stop at r = 1; with `clip_candidates=1` the codes equal torchao's
(tests/quantize/test_integers.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.weights import AffineWeight, centre_of

__all__ = ["IntegerGrid", "round_to_nearest", "storable"]

LEAST_SCALE = 2.0**-24
"""The smallest fp16 above zero; a group of zeros gets it, so that no division by zero can arise anywhere."""
_LARGEST_SCALE = 65504.0
_CHUNK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class IntegerGrid:
    """The integers that codes may be, and where zero lies among them."""

    bits: int
    symmetric: bool = True
    balanced: bool = False
    """Symmetric around half-way between two codes."""

    @property
    def top(self) -> int:
        """Return the largest code."""
        return (1 << self.bits) - 1

    def ranges(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for groups [..., g], the scale [..., 1] that clips nothing, and the zero point."""
        if self.symmetric:
            centre = centre_of({"bits": self.bits, "balanced": self.balanced})
            largest = groups.abs().amax(-1, keepdim=True)
            return largest / (self.top - centre), torch.full_like(largest, centre)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = storable((high - low) / self.top)
        return scale, (-low / scale).round().clamp(0, self.top)

    def codes(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes, as floats."""
        if self.balanced:
            return (values / scale).add_(zero).round_().clamp_(0, self.top)
        return (values / scale).round_().add_(zero).clamp_(0, self.top)

    def clipping_ratios(self, count: int) -> list[float]:
        """Return `count` clipping ratios from 1 down; coarse grids gain from clipping more."""
        least = min(0.9, 0.25 + 0.08 * self.bits)
        return [1.0 - (1.0 - least) * i / max(count - 1, 1) for i in range(count)]

    def weight(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> AffineWeight:
        """Return the weight of codes [O, I] and tables [O, I / g], all given as floats that are stored exactly."""
        zero_points = None if self.symmetric else zeros.to(torch.uint8)
        group_size = codes.shape[1] // scales.shape[1]
        return AffineWeight(codes.to(torch.uint8), scales.half(), zero_points, self.bits, group_size, self.balanced)


def storable(scale: Tensor) -> Tensor:
    """Return the nearest scale that fp16 holds, never 0 or infinite, as float32."""
    return scale.clamp(max=_LARGEST_SCALE).half().to(torch.float32).clamp(min=LEAST_SCALE)


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    clip_candidates: int = 10,
    *,
    balanced: bool = False,
    importance: Tensor | None = None,
) -> AffineWeight:
    """Return the integer form of a float weight [O, I]; `group_size` inputs share a scale and divide I.

    `clip_candidates` is the number of clipping ratios tried; 1 is plain RTN. `importance` [I] or [O, I] weighs the
    squared errors; None weighs all alike.
    """
    outputs, inputs = weight.shape
    grid = IntegerGrid(bits, symmetric, balanced)
    dense = weight.detach().to(torch.float32)
    weights = None if importance is None else importance.to(dense.device, torch.float32).expand(outputs, inputs)
    rows = max(1, _CHUNK_WEIGHTS // inputs)
    columns = []
    for start in range(0, outputs, rows):
        groups = dense[start : start + rows].reshape(-1, group_size)
        chosen = None if weights is None else weights[start : start + rows].reshape(-1, group_size)
        columns.append(_quantize(groups, chosen, grid, grid.clipping_ratios(clip_candidates)))
    codes, scales, zeros = (torch.cat(column) for column in zip(*columns, strict=True))
    shape = outputs, inputs // group_size
    return grid.weight(codes.view(outputs, inputs), scales.view(shape), zeros.view(shape))


def _quantize(
    groups: Tensor, importance: Tensor | None, grid: IntegerGrid, ratios: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes [N, g], fp16-exact scales [N, 1] and zero points [N, 1] of the best candidate per group."""
    base, zero = grid.ranges(groups)
    best = _Candidate(groups, importance, base * ratios[0], zero, grid)
    for ratio in ratios[1:]:
        best.keep_better(_Candidate(groups, importance, base * ratio, zero, grid))
    if len(ratios) > 1:
        integers = best.codes.to(torch.float32) - zero
        weighted = integers if importance is None else integers * importance
        power = (weighted * integers).sum(1, keepdim=True)
        fitted = (weighted * groups).sum(1, keepdim=True) / torch.where(power > 0, power, 1.0)
        best.keep_better(_Candidate(groups, importance, torch.where(fitted > 0, fitted, best.scale), zero, grid))
    return best.codes, best.scale, zero


class _Candidate:
    """Codes of all groups for one choice of scales, and the squared error each group pays."""

    def __init__(
        self, groups: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor, grid: IntegerGrid
    ) -> None:
        self.scale = storable(scale)
        codes = grid.codes(groups, self.scale, zero)
        self.codes = codes.to(torch.uint8)
        squares = codes.sub_(zero).mul_(self.scale).sub_(groups).square_()
        self.error = (squares if importance is None else squares.mul_(importance)).sum(1, keepdim=True)

    def keep_better(self, other: _Candidate) -> None:
        """Take over the groups in which `other` errs less."""
        better = other.error < self.error
        self.scale = torch.where(better, other.scale, self.scale)
        self.codes = torch.where(better, other.codes, self.codes)
        self.error = torch.where(better, other.error, self.error)
