"""Where an integer grid should stop: the clip c that minimises the squared error, by a Newton recursion.

A grid of step s = c / qmax represents |x| <= c with the error of rounding, s^2 / 12, and clips what lies beyond:

    J(c) = c^2 / (12 qmax^2) * P(|x| <= c)  +  E[(|x| - c)^2 ; |x| > c]

J'(c) = 0, with the two probabilities held at their last values, is solved in closed form, which is Newton's step on a
piecewise quadratic function (OCTAV; Sakr et al., ICML 2022, arXiv 2206.06501, equation 6):

    c <- E[|x| ; |x| > c]  /  (P(|x| <= c) / (12 qmax^2) + P(|x| > c))

For 2^b levels between -c and c, 1 / (12 qmax^2) is their 4^-b / 3. It converges in a few steps from any c below max|x|;
the start here is the mean of |x|. With weights (the Hessian's diagonal, say) all three expectations are weighted, and
c is the clip of least *weighted* error.

The rounding term assumes errors that are uniform in a cell, which at 2 bits they are not: the clip costs 1 to 6 % more
than the best of a fine grid on 20,000 weights. `refined_clip` goes on with the exact error, codes for the scale, then
the least-squares scale for the codes, s = sum(w q x) / sum(w q^2), each of which can only lower it, and ends within
0.2 %. In groups of 32 the expectations are those of a handful of weights: 5 to 20 %, and 0.3 to 12 % after refining.
There the few ratios that `integers` tries do better, so `qat` keeps the better of both group by group.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["newton_clip", "refined_clip"]

_ROUNDS = 20
_TOLERANCE = 1e-4
_REFINEMENTS = 8


def newton_clip(values: Tensor, qmax: float, weights: Tensor | None = None) -> Tensor:
    """Return the clip [N] of least squared error for each row of values [N, n]; rows of zeros get 0.

    `qmax` is the clip in steps of the grid: 2^(b-1) - 1 for symmetric integers, 2^(b-1) for the balanced set.

    >>> newton_clip(torch.full((1, 8), 3.0), 7.0).tolist()
    [3.0]
    """
    size = values.detach().abs().to(torch.float32)
    shares = torch.ones_like(size) if weights is None else weights.to(size)
    total = shares.sum(1)
    clip = (shares * size).sum(1) / total.clamp(min=torch.finfo(torch.float32).tiny)
    largest = size.amax(1)
    for _ in range(_ROUNDS):
        beyond = shares * (size > clip[:, None])
        outside = beyond.sum(1)
        needed = (total - outside) / (12 * qmax**2) + outside
        moved = torch.where(outside > 0, (beyond * size).sum(1) / needed, clip)
        moved = torch.minimum(moved, largest)
        done = bool(((moved - clip).abs() <= _TOLERANCE * clip).all())
        clip = moved
        if done:
            break
    return clip


def refined_clip(
    values: Tensor, clip: Tensor, low: float, high: float, qmax: float, weights: Tensor | None = None
) -> Tensor:
    """Return a clip [N] whose exact squared error is at most that of `clip` [N].

    The grid's levels are low, low + 1, ..., high times clip / qmax: -8 to 7 for 4-bit integers, -1.5 to 1.5 for the
    balanced set of 2 bits.
    """
    dense = values.detach().to(torch.float32)
    shares = torch.ones_like(dense) if weights is None else weights.to(dense)
    scale = (clip / qmax).clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(_REFINEMENTS):
        level = ((dense / scale[:, None] - low).round().clamp(0, high - low) + low).detach()
        power = (shares * level.square()).sum(1)
        fitted = (shares * level * dense).sum(1) / power.clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.where((power > 0) & (fitted > 0), fitted, scale)
    return scale * qmax
