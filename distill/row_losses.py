r"""Distillation losses of single positions, with their gradients: what `losses` and `fused_loss` are both made of.

With z the student's logits at temperature T (z_student / T), q = softmax(z), p the teacher's distribution at T:

| loss | value of one position | d value / d z |
|---|---|---|
| `forward_kl` | sum p log(p/q) | q - p |
| `reverse_kl` | sum q log(q/p) | q (log(q/p) - value) |
| `jsd` | b KL(p, m) + (1-b) KL(q, m), m = b p + (1-b) q | (1-b) q (log(q/m) - KL(q, m)) |
| `skew_kl` | KL(p, m), m = a p + (1-a) q | q sum(p r) - p r, r = 1 - a p/m |
| `skew_reverse_kl` | KL(q, m), m = (1-a) p + a q | q (log(q/m) - a q/m - its mean under q) |
| `top1_blend` | -w log q[t] - (1-w) log q[y] | q - w at t - (1-w) at y |
| `top_k` | KL over k tokens and "any other" | in the k: q - p; others: q (1 - p_rest/q_rest) |
| `taid` | KL(s, q), s = softmax((1-t) z + t log p), s fixed | q - s |

The second row follows from dq_i/dz_j = q_i (d_ij - q_j): a loss with slope g by q has q (g - sum q g) by z, and a
constant in g drops out. Each gradient is (something) + c q with one c per position, so a kernel adds the something to
`slope` and returns c: however many losses a mix has, q is added once.

A probability that underflows is a zero with a finite logarithm (m is held above the smallest normal number), so nothing
here makes a NaN of finite logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dwindle.distill.sparse_targets import SparseTargets, sampled_kl_rows

__all__ = [
    "Positions",
    "RowLoss",
    "RowTargets",
    "forward_kl_rows",
    "jsd_rows",
    "reverse_kl_rows",
    "skew_kl_rows",
    "skew_reverse_kl_rows",
    "taid_rows",
    "top1_blend_rows",
    "top_k_rows",
]


@dataclass(frozen=True)
class RowTargets:
    """What n positions are held against; the teacher's distribution is made when a loss first reads it."""

    log_p: Callable[[float], Tensor]
    """Temperature -> the teacher's log-probabilities [n, V]."""
    top1: Callable[[], Tensor]
    """The teacher's most probable tokens [n]."""
    labels: Tensor | None = None
    """[n] next tokens."""
    sparse: SparseTargets | None = None
    """Weighted tokens that stand for the teacher's distribution in `forward_kl`."""


@dataclass(frozen=True)
class Positions:
    """Student and teacher at n positions and one temperature, in float32 or float64."""

    log_q: Tensor
    """[n, V] student."""
    q: Tensor
    """[n, V] its exponential."""
    temperature: float
    targets: RowTargets

    @cached_property
    def log_p(self) -> Tensor:
        """Return the teacher's log-probabilities [n, V]."""
        return self.targets.log_p(self.temperature)

    @cached_property
    def p(self) -> Tensor:
        """Return the teacher's probabilities [n, V]."""
        return self.log_p.exp()


RowLoss = Callable[[Positions, Tensor, float], tuple[Tensor, Tensor | float]]
"""(positions, slope [n, V], weight) -> (values [n], c): adds `weight` * gradient to `slope`, all but c * q; c is [n, 1]
or a number. The values are without the weight."""


def _log(probabilities: Tensor) -> Tensor:
    """Return the logarithm, in place, with zeros held finite."""
    return probabilities.clamp_min_(torch.finfo(probabilities.dtype).tiny).log_()


def forward_kl_rows(at: Positions, slope: Tensor, weight: float) -> tuple[Tensor, Tensor | float]:
    """KL(p || q), or its unbiased estimate from a sample of p."""
    if at.targets.sparse is not None:
        return sampled_kl_rows(at.targets.sparse, at.log_q, slope, weight)
    slope.sub_(at.p, alpha=weight)
    return (at.log_p - at.log_q).mul_(at.p).sum(-1), weight


def reverse_kl_rows(at: Positions, slope: Tensor, weight: float) -> tuple[Tensor, Tensor | float]:
    """KL(q || p)."""
    part = (at.log_q - at.log_p).mul_(at.q)
    value = part.sum(-1)
    slope.add_(part, alpha=weight)
    return value, value[:, None] * -weight


def jsd_rows(beta: float) -> RowLoss:
    """Return the generalized Jensen-Shannon divergence; `beta` strictly between 0 and 1."""

    def rows(at: Positions, slope: Tensor, weight: float) -> tuple[Tensor, Tensor | float]:
        log_m = _log(torch.lerp(at.q, at.p, beta))
        to_p = (at.log_p - log_m).mul_(at.p).sum(-1)
        part = torch.sub(at.log_q, log_m, out=log_m).mul_(at.q)
        to_q = part.sum(-1)
        slope.add_(part, alpha=weight * (1 - beta))
        return beta * to_p + (1 - beta) * to_q, to_q[:, None] * (-weight * (1 - beta))

    return rows


def skew_kl_rows(alpha: float) -> RowLoss:
    """Return KL(p || alpha p + (1 - alpha) q); `alpha` strictly between 0 and 1."""

    def rows(at: Positions, slope: Tensor, weight: float) -> tuple[Tensor, Tensor | float]:
        m = torch.lerp(at.q, at.p, alpha).clamp_min_(torch.finfo(at.q.dtype).tiny)
        part = (at.p / m).mul_(-alpha).add_(1).mul_(at.p)
        value = (at.log_p - m.log_()).mul_(at.p).sum(-1)
        slope.sub_(part, alpha=weight)
        return value, part.sum(-1, keepdim=True) * weight

    return rows


def skew_reverse_kl_rows(alpha: float) -> RowLoss:
    """Return KL(q || (1 - alpha) p + alpha q); `alpha` strictly between 0 and 1."""

    def rows(at: Positions, slope: Tensor, weight: float) -> tuple[Tensor, Tensor | float]:
        m = torch.lerp(at.p, at.q, alpha).clamp_min_(torch.finfo(at.q.dtype).tiny)
        share = (at.q / m).mul_(at.q).mul_(alpha)
        part = (at.log_q - m.log_()).mul_(at.q)
        value = part.sum(-1)
        part.sub_(share)
        slope.add_(part, alpha=weight)
        return value, part.sum(-1, keepdim=True) * -weight

    return rows


def top1_blend_rows(share: float) -> RowLoss:
    """Return the cross-entropy to `share` of the teacher's top-1 and the rest of the label; 0 is the label alone."""

    def rows(at: Positions, slope: Tensor, weight: float) -> tuple[Tensor, Tensor | float]:
        value = torch.zeros_like(at.log_q[:, 0])
        for part, is_label in ((share, False), (1 - share, True)):
            if part:
                tokens = at.targets.labels if is_label else at.targets.top1()
                assert tokens is not None, "this loss needs labels"
                value -= part * at.log_q.gather(1, tokens[:, None]).squeeze(1)
                slope.scatter_add_(1, tokens[:, None], slope.new_full((len(tokens), 1), -part * weight))
        return value, weight

    return rows


def top_k_rows(k: int) -> RowLoss:
    """Return the KL over the teacher's `k` most probable tokens and one outcome for all others."""

    def rows(at: Positions, slope: Tensor, weight: float) -> tuple[Tensor, Tensor | float]:
        log_p, ids = at.log_p.topk(min(k, at.q.shape[1]), dim=-1)
        p, tiny = log_p.exp(), torch.finfo(at.q.dtype).tiny
        rest_p = at.p.scatter(1, ids, 0.0).sum(-1, keepdim=True)
        others = at.q.scatter(1, ids, 0.0)
        rest_q = others.sum(-1, keepdim=True).clamp_min_(tiny)
        slope.scatter_add_(1, ids, p * -weight)
        slope.addcmul_(others, rest_p / rest_q, value=-weight)
        tail = torch.xlogy(rest_p, rest_p.clamp_min(tiny) / rest_q).squeeze(1)
        return (p * (log_p - at.log_q.gather(1, ids))).sum(-1) + tail, weight

    return rows


def taid_rows(t: float) -> RowLoss:
    """Return KL(s || q) to the target s between student (t = 0) and teacher (t = 1), which gets no gradient."""

    def rows(at: Positions, slope: Tensor, weight: float) -> tuple[Tensor, Tensor | float]:
        log_s = torch.log_softmax(torch.lerp(at.log_q, at.log_p, t), -1)
        s = log_s.exp()
        slope.sub_(s, alpha=weight)
        return log_s.sub_(at.log_q).mul_(s).sum(-1), weight

    return rows
