r"""A teacher's word as a few weighted tokens per position, and the forward KL that is made of it.

With the weights w of K tokens at each of n positions (their expectation is the teacher's distribution p at
temperature T, `token_sampling`) and H the entropy of p:

    value    = T^2 * mean of (-H - sum_k w[k] log q[id[k]])        q = softmax(student / T)
    gradient = T / n * (q sum_k w[k] - w)

Both are linear in w, so their expectations over the draws are the forward KL and its gradient, exactly; the weights of
a cache add up to 1 at each position. One value may lie on either side of the KL, and below 0 near it.

`sampled_kl_rows` works on the log-probabilities of some positions and is what a chunked loss calls; `sampled_kl` takes
logits [N, V] as the functions of `losses` do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.divergence import mean_over_slices

__all__ = ["SparseTargets", "sampled_kl", "sampled_kl_rows"]


@dataclass(frozen=True)
class SparseTargets:
    """Weighted tokens of N positions, at most K each."""

    ids: Tensor
    """[N, K] int64; the first column is the most probable token; unused places hold 0."""
    weights: Tensor
    """[N, K] float32; unused places hold 0."""
    entropy: Tensor
    """[N] of the teacher's distribution, in nats."""
    temperature: float
    """Temperature T of that distribution."""

    @property
    def top1(self) -> Tensor:
        """Return the teacher's most probable tokens [N]."""
        return self.ids[:, 0]

    def at(self, rows: slice | Tensor) -> SparseTargets:
        """Return the targets of some positions."""
        return SparseTargets(self.ids[rows], self.weights[rows], self.entropy[rows], self.temperature)

    def to(self, device: torch.device) -> SparseTargets:
        """Return the targets on a device."""
        return SparseTargets(self.ids.to(device), self.weights.to(device), self.entropy.to(device), self.temperature)

    def dense(self, vocab: int) -> Tensor:
        """Return the weights as [N, V] float32, zero where no token is held."""
        return torch.zeros(len(self.ids), vocab, device=self.ids.device).scatter_add_(1, self.ids, self.weights)


def sampled_kl_rows(targets: SparseTargets, log_q: Tensor, slope: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the values [n] and c [n, 1]; `weight` times the gradient, all but c * q, is added to `slope` [n, V].

    `targets` are those of the n positions, `log_q` the student's log-probabilities at the targets' temperature, the
    gradient that by its scaled logits. The values are without the weight and without T^2, as in `row_losses`.
    """
    w = targets.weights.to(log_q.dtype)
    slope.scatter_add_(1, targets.ids, (w * -weight).to(slope.dtype))
    values = -targets.entropy.to(log_q.dtype) - (w * log_q.gather(1, targets.ids)).sum(-1)
    return values, w.sum(-1, keepdim=True) * weight


def sampled_kl(student: Tensor, targets: SparseTargets) -> Tensor:
    """Return T^2 * the mean of sampled KL(teacher || student); student logits [N, V].

    >>> uniform = SparseTargets(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]), torch.tensor([0.562335]), 1.0)
    >>> round(sampled_kl(torch.zeros(1, 2), uniform).item(), 6)
    0.130812
    """
    temperature = targets.temperature

    def slice_loss(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(logits / temperature, -1)
        part = torch.zeros_like(log_q)
        values, c = sampled_kl_rows(targets.at(rows), log_q, part, temperature)
        return values.sum(dtype=torch.float64) * temperature**2, part.addcmul_(log_q.exp_(), c)

    return mean_over_slices(student, slice_loss)
