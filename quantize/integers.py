"""A weight as integers on a scale: round to nearest (RTN) with the clipping that minimises the squared error.

A group of inputs of one output row shares a scale s (and a zero point z if asymmetric):

    symmetric    code = clamp(round(w / s) + 2^(b-1), 0, 2^b - 1)       s = r * max|w| / (2^(b-1) - 1)
    asymmetric   code = clamp(round(w / s) + z, 0, 2^b - 1)             s = r * (max(w, 0) - min(w, 0)) / (2^b - 1)

r = 1 represents the largest weight; a smaller r clips it and gives all others a finer grid. A few r are tried per
group, then the least-squares scale of the best codes, s = sum(q w) / sum(q^2), and the scale with the smallest
squared error is kept. Every candidate is rounded to fp16 first and its error measured with the rounded value, so the
choice is made for what is stored. r = 1 is among the candidates: the result is never worse than plain RTN.

torchao and ONNX Runtime's quantizers stop at r = 1; with `clip_candidates=1` the codes equal torchao's
(tests/quantize/test_integers.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.weights import AffineWeight

__all__ = ["round_to_nearest"]

_CHUNK_WEIGHTS = 1 << 20
_LEAST_SCALE = 2.0**-24
"""The smallest fp16 above zero; a group of zeros gets it, so that no division by zero can arise anywhere."""


def round_to_nearest(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = True, clip_candidates: int = 10
) -> AffineWeight:
    """Return the integer form of a float weight [O, I]; `group_size` inputs share a scale and divide I.

    `clip_candidates` is the number of clipping ratios tried; 1 is plain RTN.
    """
    outputs, inputs = weight.shape
    dense = weight.detach().to("cpu", torch.float32)
    rows = max(1, _CHUNK_WEIGHTS // inputs)
    parts = [
        _quantize(chunk.reshape(-1, group_size), bits, symmetric, _ratios(bits, clip_candidates))
        for chunk in torch.split(dense, rows)
    ]
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = outputs, inputs // group_size
    zero_points = None if symmetric else zeros.to(torch.uint8).view(shape)
    return AffineWeight(codes.view(outputs, inputs), scales.half().view(shape), zero_points, bits, group_size)


def _ratios(bits: int, count: int) -> list[float]:
    """Return `count` clipping ratios from 1 down; coarse grids gain from clipping more."""
    least = min(0.9, 0.25 + 0.08 * bits)
    return [1.0 - (1.0 - least) * i / max(count - 1, 1) for i in range(count)]


def _quantize(groups: Tensor, bits: int, symmetric: bool, ratios: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes [N, g], fp16-exact scales [N, 1] and zero points [N, 1] of the best candidate per group."""
    base, zero = _base_scale(groups, bits, symmetric)
    best = _Candidate(groups, base * ratios[0], zero, bits)
    for ratio in ratios[1:]:
        best.keep_better(_Candidate(groups, base * ratio, zero, bits))
    if len(ratios) > 1:
        integers = best.codes.to(torch.float32) - zero
        power = integers.square().sum(1, keepdim=True)
        fitted = (integers * groups).sum(1, keepdim=True) / power.clamp(min=1)
        best.keep_better(_Candidate(groups, torch.where(fitted > 0, fitted, best.scale), zero, bits))
    return best.codes, best.scale, zero


def _base_scale(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale that clips nothing and the zero point, each [N, 1]."""
    if symmetric:
        largest = groups.abs().amax(1, keepdim=True)
        return largest / (2 ** (bits - 1) - 1), torch.full_like(largest, 2.0 ** (bits - 1))
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = _storable((high - low) / (2**bits - 1))
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _storable(scale: Tensor) -> Tensor:
    return scale.half().to(torch.float32).clamp(min=_LEAST_SCALE)


class _Candidate:
    """Codes of all groups for one choice of scales, and the squared error each group pays."""

    def __init__(self, groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> None:
        self.scale = _storable(scale)
        codes = (groups / self.scale).round_().add_(zero).clamp_(0, 2**bits - 1)
        self.codes = codes.to(torch.uint8)
        self.error = codes.sub_(zero).mul_(self.scale).sub_(groups).square_().sum(1, keepdim=True)

    def keep_better(self, other: _Candidate) -> None:
        """Take over the groups in which `other` errs less."""
        better = other.error < self.error
        self.scale = torch.where(better, other.scale, self.scale)
        self.codes = torch.where(better, other.codes, self.codes)
        self.error = torch.where(better, other.error, self.error)
