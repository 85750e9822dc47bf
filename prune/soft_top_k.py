r"""Soft-Top-K: k of n units by their scores, softly, so that gradients reach the scores.

The hard choice of the k highest scores s maximises s.l over masks 0 <= l <= 1 that sum to k. Entropy makes it smooth
(Lei et al. 2023, CoDA, arXiv 2304.04947; Apple learned the FFN masks of its on-device model with it, arXiv
2407.21075):

    mask = argmax  s.l + t H(l)    over  0 <= l <= 1,  sum l = k        H(l) = -sum l ln l

t is the temperature. t -> 0 gives the hard choice (units that tie for the last places share them), t -> infinity gives
k / n everywhere. The conditions of the maximum give its form: one number a for all units, with

    l_i = min(1, exp((s_i + a) / t)),    a such that sum l = k

CoDA finds a by alternating two updates about 20 times. For the shares that pruning keeps this is too few: k = 300 of
n = 1000 unit-variance scores at t = 0.02 gave masks that sum to 218, and 200 updates still to 298. No iteration is
needed. The saturated units (l = 1) are the m highest, so with scores sorted downwards and m known,

    a_m = t (ln(k - m) - ln sum_{i > m} exp(s_i / t))

and m is the smallest with s_{m+1} + a_m <= 0: one sort and one cumulative sum from the end, O(n log n). Once this holds
it holds for every larger m, so m is the number of times that it fails.

The gradient is exact as well. On the other units U the mask is (k - m) softmax(s / t), and a small change of the scores
changes neither m nor the ones; with g = dL/dl,

    dL/ds_i = l_i / t (g_i - sum_U l g / sum_U l)    for i in U,    0 for saturated units

Solved in float64 whatever the scores are: at a low temperature s / t is large, and float32 would lose the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["soft_top_k"]


def soft_top_k(scores: Tensor, k: float, temperature: float) -> Tensor:
    """Return masks [..., n] in [0, 1] that sum to `k` over the last axis, highest where the scores are.

    `k` need not be whole. Differentiable once, in the scores. Raises ValueError for a `k` outside [0, n], a temperature
    not above 0, or scores that are not floats.

    Two units share one place as exp(0) to exp(ln 3), 1 to 3; of two places each gets one:

    >>> scores = torch.tensor([0.0, 1.0986123])
    >>> [[round(x, 4) for x in soft_top_k(scores, k, temperature=1.0).tolist()] for k in (1, 2)]
    [[0.25, 0.75], [1.0, 1.0]]
    """
    n = scores.shape[-1] if scores.ndim else 0
    if not scores.is_floating_point() or not 0 <= k <= n or not temperature > 0:
        raise ValueError(
            f"soft_top_k: scores {scores.dtype} {tuple(scores.shape)}, k={k}, temperature={temperature}; needed are "
            f"floats [..., n], k from 0 to n={n} and a temperature above 0."
        )
    if n == 0:
        return scores.clone()
    masks: Tensor = _SoftTopK.apply(scores, float(k), float(temperature))  # type: ignore[no-untyped-call]
    return masks


def _solve(scores: Tensor, k: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Return float64 masks, and which units are saturated. Equal scores get equal masks."""
    wide = scores.double()
    ordered = wide.sort(dim=-1, descending=True).values
    scaled = (ordered - ordered[..., :1]) / temperature
    tails = scaled.flip(-1).logcumsumexp(-1).flip(-1)
    free = (k - torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device)).clamp(min=0)
    fails = (scaled + free.log() > tails) & (free > 1)  # one place or less always suffices, whatever was rounded
    count = fails.sum(-1, keepdim=True)
    threshold = ordered.gather(-1, count)
    saturated = wide > threshold
    shares = torch.softmax(((wide - threshold) / temperature).masked_fill(saturated, -torch.inf), -1)
    masks = shares * (k - saturated.sum(-1, keepdim=True, dtype=torch.float64))
    return masks.clamp(max=1).masked_fill(saturated, 1), saturated


class _SoftTopK(torch.autograd.Function):
    """The exact solution with its exact gradient."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: float, temperature: float) -> Tensor:
        """Return the masks in the scores' type."""
        masks, saturated = _solve(scores, k, temperature)
        ctx.save_for_backward(masks.masked_fill(saturated, 0))
        ctx.temperature = temperature
        return masks.to(scores.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the scores."""
        (masks,) = ctx.saved_tensors
        weighed = masks * outer.double()
        total = masks.sum(-1, keepdim=True)
        mean = weighed.sum(-1, keepdim=True) / total.clamp(min=torch.finfo(torch.float64).tiny)
        return ((weighed - masks * mean) / ctx.temperature).to(outer.dtype), None, None
