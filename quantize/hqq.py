"""Half-quadratic quantization (HQQ): scales and zero points for weights with outliers, from the weights alone.

Rounding to nearest with a squared-error search lets a few large weights dictate the grid of their group. HQQ (Badri
and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023) minimises instead

    sum |e|^p,    e = w - s (q - z),    p < 1

which forgives large errors and insists on small ones for the many. Half-quadratic splitting makes that tractable: an
auxiliary x takes the part of the error that is given up,

    min over x, s, z    sum |x|^p + (beta / 2) (e - x)^2

solved by turns with beta growing: x in closed form by the generalised shrinkage

    x = sign(e) max(|e| - |e|^(p-1) / beta, 0)

and the grid by least squares on what is left, w - x. The published form keeps s and fits a real-valued z as a mean.
Here what is stored is what is fitted: scales in fp16 and zero points as whole codes, so both turns are taken,

    s = sum (q - z)(w - x) / sum (q - z)^2        z = round(mean(q - (w - x) / s))        q rounded to nearest anew

and errors are counted in steps of each group's own grid: beta then means the same for weights of any magnitude (with
absolute weights of 0.02 and the published beta = 10 the shrinkage is 0 for nearly all of them).

Turns are taken from several clippings and zero points, and each group keeps the best stored grid it has met, plain
rounding and the squared-error search among them. Searched this well, sum |e|^p alone ruins small groups: its minimum
gives up whole outliers, which the inputs do not (a trained model, 4 bits in blocks of 32: KL 0.150 where the
squared-error search has 0.042; at 3 bits 1.20 and 0.285). The published turns stop long before that minimum. So a grid
must not have more squared error than `round_to_nearest` found, and among those the least sum |e|^p is taken.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dwindle.quantize.integers import IntegerGrid, round_to_nearest, storable
from dwindle.weights import AffineWeight

__all__ = ["hqq", "norm_errors"]

NORM = 0.7
"""p: at 1 the median error counts, below it the most common one."""
BETA = 1.5
"""First weight of the quadratic part: with p = 0.7, errors below three quarters of a step are not given up at all."""
BETA_GROWTH = 1.2
_SLACK = 1 + 1e-6
"""For sums taken in another order."""
ITERATIONS = 6
"""Turns from each start; then the codes hardly change."""
START_RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Multiples of the scale that clips nothing. Turns alone stop at the nearest of many minima."""
_CHUNK_WEIGHTS = 1 << 20


def hqq(weight: Tensor, bits: int, group_size: int, symmetric: bool = True, *, balanced: bool = False,
        norm: float = NORM) -> AffineWeight:  # fmt: skip
    """Return the integer form of a float weight [O, I]; `group_size` inputs share a scale and divide I."""
    outputs, inputs = weight.shape
    grid = IntegerGrid(bits, symmetric, balanced)
    dense = weight.detach().to(torch.float32)
    searched = round_to_nearest(dense, bits, group_size, symmetric, balanced=balanced)
    rows, near = max(1, _CHUNK_WEIGHTS // inputs), searched.dequantize().to(dense.device)
    parts = []
    for first in range(0, outputs, rows):
        chunk = slice(first, first + rows)
        groups = dense[chunk].reshape(-1, group_size)
        plain = near[chunk].reshape(groups.shape)
        squared = (plain - groups).square().sum(1, keepdim=True)
        search = _Search(groups, grid, norm, squared * _SLACK)
        scale, zero = search.scale, search.zero
        shifts = (0,) if symmetric else (0, -1, 1)
        found = searched.zero_points
        search.run(searched.scales[chunk].to(torch.float32).reshape(-1, 1),
                   zero if found is None else found[chunk].to(zero).reshape(-1, 1))  # fmt: skip
        for ratio, shift in itertools.product(START_RATIOS, shifts):
            search.run(storable(scale * ratio), (zero + shift).clamp(0, grid.top) if shift else zero)
        parts.append((search.codes, search.scale, search.zero))
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = outputs, inputs // group_size
    return grid.weight(codes.view(outputs, inputs), scales.view(shape), zeros.view(shape))


def norm_errors(weight: Tensor, quantized: AffineWeight, norm: float = NORM) -> Tensor:
    """Return [O, I / g]: sum |e|^p of every group."""
    errors = weight.detach().to("cpu", torch.float32) - quantized.dequantize().to("cpu")
    return errors.view(len(errors), -1, quantized.group_size).abs().pow(norm).sum(2)


class _Search:
    """Groups [N, g], and the best stored grid that each has met."""

    def __init__(self, groups: Tensor, grid: IntegerGrid, norm: float, allowed: Tensor) -> None:
        self._groups, self._grid, self._norm, self._allowed = groups, grid, norm, allowed
        self.scale, self.zero = grid.ranges(groups)
        self.codes = torch.zeros_like(groups)
        self._error = torch.full_like(self.scale, torch.inf)

    def run(self, scale: Tensor, zero: Tensor) -> None:
        """Take turns from this grid."""
        beta = BETA
        for _ in range(ITERATIONS):
            integers = self._try(scale, zero) - zero
            errors = self._groups / scale - integers
            size = errors.abs()
            given_up = errors.sign() * (size - size.clamp(min=1e-6).pow(self._norm - 1) / beta).clamp(min=0)
            kept = self._groups - given_up * scale
            if not self._grid.symmetric:
                zero = (integers + zero - kept / scale).mean(1, keepdim=True).round().clamp(0, self._grid.top)
                integers = self._try(scale, zero) - zero
            power = integers.square().sum(1, keepdim=True)
            fitted = (integers * kept).sum(1, keepdim=True) / power.clamp(min=0.25)
            scale = storable(torch.where(fitted > 0, fitted, scale))
            beta *= BETA_GROWTH
        self._try(scale, zero)

    def _try(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes; groups in which this grid is the best so far keep it."""
        codes = self._grid.codes(self._groups, scale, zero)
        size = ((codes - zero) * scale - self._groups).abs_()
        squared = size.square().sum(1, keepdim=True)
        error = size.pow_(self._norm).sum(1, keepdim=True)
        better = (error < self._error) & (squared <= self._allowed)
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.codes = torch.where(better, codes, self.codes)
        return codes
