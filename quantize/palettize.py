"""A weight as indices into palettes: one palette of 2^bits values per group of output rows.

The palette is the optimum of `kmeans` on the group's weights, rounded to fp16 (what is stored); then every weight
takes the nearest value of the *rounded* palette, so no later step rounds again. With 16 rows of width 3,072 a palette
of 16 fp16 values costs 0.005 bits a weight; scales of int4 blocks of 32 cost 0.5. Apple's on-device models use this
format with a palette per 16 rows; Core ML executes it on the Neural Engine.

Not `coremltools.optimize.torch`: its k-means is Lloyd's from one seed, 10 times slower at 4 bits, and it leaves a
layer whose rows the group does not divide in float without an error.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dwindle.quantize.kmeans import assign_nearest, fit_centres
from dwindle.quantize.options import QuantizeOptions
from dwindle.weights import PalettizedWeight

__all__ = ["palettize"]


def palettize(
    weight: Tensor, bits: int, group_size: int, bins: int = QuantizeOptions.histogram_bins
) -> PalettizedWeight:
    """Return the palettized form of a float weight [O, I]; `group_size` output rows share a palette and divide O."""
    outputs, inputs = weight.shape
    dense = weight.detach().to("cpu", torch.float32).contiguous().numpy()
    groups = dense.reshape(outputs // group_size, group_size * inputs)
    palettes = fit_centres(groups, 2**bits, bins=bins).astype(np.float16)
    indices = assign_nearest(groups, palettes)
    return PalettizedWeight(
        torch.from_numpy(indices.reshape(outputs, inputs)), torch.from_numpy(palettes), bits, group_size
    )
