"""A weight as indices into palettes: one palette of 2^bits values per group of output rows.

The palette is the optimum of `kmeans` on the group's weights, rounded to fp16 (what is stored); then every weight
takes the nearest value of the *rounded* palette, so no later step rounds again. With 16 rows of width 3,072 a palette
of 16 fp16 values costs 0.005 bits a weight; scales of int4 blocks of 32 cost 0.5. Apple's on-device models use this
format with a palette per 16 rows; Core ML executes it on the Neural Engine.

*Importance* h [O, I] weighs the squared error of every weight, sum h (w - c[z])^2. To second order the model's loss
rises by sum F (w - c[z])^2 / 2 with F the diagonal Fisher information E[(dL/dw)^2] (SqueezeLLM, Kim et al. 2023,
equation 3): h = F. The assignments do not change with h, the palettes do.

*Row scales* let rows of unlike size share a palette: w[o, i] ~ s[o] c[z[o, i]]. Given the codes, the best scale of a
row is a ratio of two sums; given the scales, palette and codes are the k-means of w / s with weights h s^2:

    s[o] = sum_i h w c[z] / sum_i h c[z]^2        starting at s[o] = rms of row o / rms of its group

Alternating the two never raises the error. Scales and palette are fp16 and the last assignment is made against both
as they are stored.

Not `coremltools.optimize.torch`: its k-means is Lloyd's from one seed, 10 times slower at 4 bits, and it leaves a
layer whose rows the group does not divide in float without an error.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dwindle.quantize.bins import Singles, chunks
from dwindle.quantize.kmeans import assign_nearest, fit_centres
from dwindle.quantize.options import QuantizeOptions
from dwindle.weights import PalettizedWeight

__all__ = ["palettize"]

_SCALE_ROUNDS = 3
"""Times that row scales and palettes are fitted in turn; the first brings nearly everything."""
_SMALLEST_SCALE = 1e-3
"""A row scale is at least this (times 1, the scale of a row as large as its group): fp16 keeps its 11 bits there."""

_PARTS_PER_THREAD = 2
_WORTH_THREADS = 1 << 20
"""Values under which starting threads costs more than it brings."""

Halves = npt.NDArray[np.float16]
Codes = npt.NDArray[np.uint8]


def palettize(
    weight: Tensor,
    bits: int,
    group_size: int,
    bins: int = QuantizeOptions.histogram_bins,
    *,
    importance: Tensor | None = None,
    row_scales: bool = False,
) -> PalettizedWeight:
    """Return the palettized form of a float weight [O, I]; `group_size` output rows share a palette and divide O.

    `importance` >= 0 is [O, I], or [I] for all rows alike; a group of nothing but zeros counts as unweighted.
    """
    dense = _singles(weight)
    importances = None if importance is None else _singles(importance.expand(weight.shape))
    if row_scales:
        scales, palettes, indices = _scaled(dense, bits, group_size, bins, importances)
    else:
        scales, groups = None, dense.reshape(len(dense) // group_size, -1)
        weights = None if importances is None else importances.reshape(groups.shape)
        palettes, indices = _fitted(groups, bits, weights, bins)
    return PalettizedWeight(
        torch.from_numpy(indices.reshape(dense.shape)),
        torch.from_numpy(palettes),
        bits,
        group_size,
        None if scales is None else torch.from_numpy(scales),
    )


def _singles(tensor: Tensor) -> Singles:
    """Return the tensor as a contiguous float32 array."""
    array: Singles = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def _fitted(groups: Singles, bits: int, weights: Singles | None, bins: int) -> tuple[Halves, Codes]:
    """Return fp16 palettes [P, 2^bits] and indices for groups of weights [P, n], a part of the groups per thread.

    NumPy and torch release the interpreter's lock in long loops. Groups do not influence each other, so the result does
    not depend on the number of threads.
    """
    palettes = np.empty((len(groups), 2**bits), dtype=np.float16)
    indices = np.empty(groups.shape, dtype=np.uint8)

    def fit(part: slice) -> None:
        part_weights = None if weights is None else weights[part]
        palettes[part] = fit_centres(groups[part], 2**bits, part_weights, bins)
        indices[part] = assign_nearest(groups[part], palettes[part])

    threads = min(torch.get_num_threads(), len(groups))
    parts = list(chunks(len(groups), -(-len(groups) // (threads * _PARTS_PER_THREAD))))
    if threads == 1 or groups.size < _WORTH_THREADS:
        fit(slice(None))
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fit, parts))
    return palettes, indices


def _scaled(
    dense: Singles, bits: int, group_size: int, bins: int, importances: Singles | None
) -> tuple[Halves, Halves, Codes]:
    """Return fp16 row scales [O], fp16 palettes and the indices of the rows in their groups."""
    outputs, inputs = dense.shape
    shape = outputs // group_size, group_size * inputs
    mean_square = np.square(dense, dtype=np.float64).mean(axis=1).reshape(-1, group_size)
    group_square = mean_square.mean(axis=1, keepdims=True)
    share = np.divide(mean_square, group_square, out=np.ones_like(mean_square), where=mean_square > 0)
    scales = _storable(np.sqrt(share).reshape(-1))
    for round_ in range(_SCALE_ROUNDS):
        stored = scales.astype(np.float32)[:, None]
        normal = (dense / stored).reshape(shape)
        weights = np.square(stored) if importances is None else importances * np.square(stored)
        weights = np.ascontiguousarray(np.broadcast_to(weights, dense.shape)).reshape(shape)
        palettes, indices = _fitted(normal, bits, weights, bins)
        if round_ + 1 < _SCALE_ROUNDS:
            values = np.take_along_axis(palettes.astype(np.float32), indices.astype(np.int64), 1).reshape(dense.shape)
            scales = _best_scales(dense, values, importances, scales)
    return scales, palettes, indices


def _best_scales(dense: Singles, values: Singles, importances: Singles | None, scales: Halves) -> Halves:
    """Return per row the scale with which its unscaled values come nearest; one that they do not determine stays."""
    weighted = values if importances is None else values * importances
    above = np.einsum("oi,oi->o", dense, weighted, dtype=np.float64)
    below = np.einsum("oi,oi->o", values, weighted, dtype=np.float64)
    found = np.divide(above, below, out=scales.astype(np.float64), where=(below > 0) & (above > 0))
    return _storable(found)


def _storable(scales: npt.NDArray[np.float64]) -> Halves:
    return np.maximum(scales, _SMALLEST_SCALE).astype(np.float16)
