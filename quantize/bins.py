"""Weighted values counted into bins, and the squared error between any two cuts, from prefix sums.

With N, S, Q the sums of w, w x, w x^2 over the values between two cuts, their squared error around the weighted mean
is Q - S^2 / N. Bins keep the sums of the original values, so the error of a run is exact up to what its values
differ inside one bin. `kmeans` says how the bins are laid out and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Bins", "Cuts", "Floats", "Singles", "Sums", "allowed_cuts", "chunks", "histogram", "run_error",
           "sorted_bins"]  # fmt: skip

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Cuts = npt.NDArray[np.int64]

_Index = int | slice | EllipsisType | None | tuple[int | slice | EllipsisType | None, ...]
_CHUNK_VALUES = 1 << 18
"""Values counted at a time, so that scratch arrays stay in the cache."""


@dataclass(frozen=True)
class Bins:
    """Fine bins of G groups as prefix sums [G, F + 1] of w, w x and w x^2 (x at its bin's mean), and F widths."""

    weight: Floats
    first: Floats
    second: Floats
    width: Floats
    """[G, F]: the extent of a bin on the axis of x."""

    @property
    def count(self) -> int:
        """Return F."""
        return int(self.width.shape[1])

    def groups(self, chosen: slice | Cuts) -> Bins:
        """Return the bins of some groups."""
        return Bins(self.weight[chosen], self.first[chosen], self.second[chosen], self.width[chosen])

    def at(self, cuts: Cuts) -> Sums:
        """Return the prefix sums at cuts [G, ...], shaped like the cuts."""
        return Sums(self.weight, self.first, self.second).take(cuts)


@dataclass(frozen=True)
class Sums:
    """Prefix sums at some cuts; the arrays share one shape."""

    weight: Floats
    first: Floats
    second: Floats

    def __getitem__(self, index: _Index) -> Sums:
        """Index all three arrays alike."""
        return Sums(self.weight[index], self.first[index], self.second[index])

    def take(self, places: Cuts) -> Sums:
        """Return the sums [G, ...] at places [G, ...] of the second axis."""
        flat = places.reshape(len(places), -1)
        weight, first, second = (
            np.take_along_axis(sums, flat, 1).reshape(places.shape) for sums in (self.weight, self.first, self.second)
        )
        return Sums(weight, first, second)


def chunks(groups: int, size: int) -> Iterator[slice]:
    """Return slices that cover range(groups), `size` (at least 1) at a time."""
    size = max(1, size)
    return (slice(start, min(start + size, groups)) for start in range(0, groups, size))


def _prefix(per_bin: Floats) -> Floats:
    return np.concatenate([np.zeros((len(per_bin), 1)), np.cumsum(per_bin, axis=1)], axis=1)


def _prefix_sums(weight: Floats, first: Floats, width: Floats) -> Bins:
    second = np.divide(first * first, weight, out=np.zeros_like(first), where=weight > 0)
    return Bins(_prefix(weight), _prefix(first), _prefix(second), width)


def sorted_bins(values: Singles, weights: Singles | None, middle: Floats) -> Bins:
    """Return one bin per value; a bin reaches half-way to its neighbours."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1) - middle
    weight = np.ones_like(ordered) if weights is None else np.take_along_axis(weights, order, 1).astype(np.float64)
    between = (ordered[:, 1:] + ordered[:, :-1]) / 2
    edges = np.concatenate([ordered[:, :1], between, ordered[:, -1:]], axis=1)
    return _prefix_sums(weight, weight * ordered, np.diff(edges, axis=1))


def histogram(values: Singles, weights: Singles | None, middle: Floats, bins: int) -> Bins:
    """Return `bins` bins per group, uniform in y = d / (s + |d|)."""
    groups, count = values.shape
    weight, first, width = (np.empty((groups, bins)) for _ in range(3))
    for part in chunks(groups, _CHUNK_VALUES // count):
        distance = values[part] - middle[part].astype(np.float32)
        companded = np.abs(distance)
        scale = np.maximum(2.5 * companded.mean(axis=1, keepdims=True), np.float32(1e-30))
        companded += scale
        np.divide(distance, companded, out=companded)
        low, high = companded.min(axis=1, keepdims=True), companded.max(axis=1, keepdims=True)
        span = np.maximum(high - low, np.float32(1e-30))
        edges = low + span * np.linspace(0, 1, bins + 1)
        width[part] = np.diff(scale * edges / (1 - np.abs(edges)), axis=1)
        companded -= low
        companded *= bins / span
        index = companded.astype(np.int32)
        np.minimum(index, bins - 1, out=index)
        index += (np.arange(len(index), dtype=np.int32) * bins)[:, None]
        w = None if weights is None else weights[part]
        weight[part] = _sums_by_bin(index, w, bins)
        first[part] = _sums_by_bin(index, distance if w is None else distance * w, bins)
    return _prefix_sums(weight, first, width)


def _sums_by_bin(index: npt.NDArray[np.int32], summands: Singles | None, bins: int) -> Floats:
    """Return [G, bins]: how often a bin occurs in index [G, n] (group after group), or the sums of what it occurs with.

    torch's bincount is NumPy's at a fifth of the time, and lets other threads run meanwhile.
    """
    added = None if summands is None else torch.from_numpy(summands.reshape(-1).astype(np.float64))
    sums = torch.bincount(torch.from_numpy(index.reshape(-1)), added, minlength=len(index) * bins)
    return sums.numpy().reshape(len(index), bins)


def allowed_cuts(fine: Bins, bins: int, run: int) -> Cuts:
    """Return cuts [G, B + 1] of the fine bins at equal steps of the integral of density^(1/3).

    The density is taken over `run` bins at a time: the cube root of a count of a few is mostly noise. A run reaches
    half-way to the next run that holds something, so that a lonely outlier counts with the emptiness around it.
    """
    groups = len(fine.width)
    if fine.count <= bins:
        return np.broadcast_to(np.arange(fine.count + 1), (groups, fine.count + 1))
    per_bin = np.diff(fine.weight, axis=1)
    weight = np.add.reduceat(per_bin, np.arange(0, fine.count, run), axis=1)
    density = np.cbrt(weight * _reach(weight > 0, _prefix(fine.width)[:, ::run]) ** 2)
    share = np.divide(density, weight, out=np.zeros_like(weight), where=weight > 0)
    density = np.repeat(share, run, axis=1) * per_bin
    for _ in range(3):  # one bin takes one cut; what a wide, lonely bin would take more goes to the others
        np.minimum(density, density.sum(axis=1, keepdims=True) / bins, out=density)
    integral = np.cumsum(density, axis=1)
    total = integral[:, -1:]
    integral /= np.where(total > 0, total, 1.0)
    shift = 2.0 * np.arange(groups)[:, None]
    steps = np.arange(1, bins) / bins
    found = np.searchsorted((integral + shift).reshape(-1), (steps + shift).reshape(-1)).reshape(groups, bins - 1)
    cuts = np.zeros((groups, bins + 1), dtype=np.int64)
    cuts[:, 1:-1] = np.minimum(found - np.arange(groups)[:, None] * fine.count + 1, fine.count)
    cuts[:, -1] = fine.count
    return cuts


def _reach(filled: npt.NDArray[np.bool_], edges: Floats) -> Floats:
    """Return [G, R]: for runs that are filled, the extent from half-way to the filled run before to half-way after."""
    last = filled.shape[1] - 1
    places = np.arange(last + 1)
    before = np.maximum.accumulate(np.where(filled, places, -1), axis=1)
    after = np.minimum.accumulate(np.where(filled, places, last + 1)[:, ::-1], axis=1)[:, ::-1]
    left = np.concatenate([np.zeros((len(filled), 1), dtype=np.int64), before[:, :-1] + 1], axis=1)
    right = np.concatenate([after[:, 1:], np.full((len(filled), 1), last + 1)], axis=1)
    low = (np.take_along_axis(edges, left, 1) + edges[:, :-1]) / 2
    high = (np.take_along_axis(edges, right, 1) + edges[:, 1:]) / 2
    return np.asarray(np.where(filled, high - low, 0.0))


def run_error(left: Sums, right: Sums) -> Floats:
    """Return the squared error between two cuts (broadcast); 0 where nothing lies between."""
    weight = right.weight - left.weight
    error = right.first - left.first
    error *= error
    with np.errstate(divide="ignore", invalid="ignore"):
        error /= weight
        np.subtract(right.second - left.second, error, out=error)
    return np.fmax(error, 0.0, out=error)
