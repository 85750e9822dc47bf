r"""Distillation losses: pure functions of logits [N, V], in nats, mean over N positions, always the full value.

With q = softmax(student), p = softmax(teacher), y the label and t the teacher's most probable token:

- `forward_kl`           T^2 * mean KL(p_T || q_T), p_T and q_T at temperature T (Hinton et al. 2015, arXiv
                         1503.02531, section 2: T^2 keeps the gradient's size independent of T). Minitron (arXiv
                         2407.14679, section 4.1) found it alone the best loss for retraining pruned models.
- `top1_blend`           mean of -(w log q[t] + (1 - w) log q[y]). Apple's pre-training distillation (arXiv 2407.21075,
                         section 3.2.2): the target is a convex combination of label and teacher top-1, w = 0.9 on the
                         teacher. A teacher then costs one id per token to store.
- `label_cross_entropy`  mean of -log q[y].

All three have the form const - sum_v target[v] log q[v], so the gradient of the mean is (q - target) * T / N. It is
made together with the value, slice by slice (`dwindle.divergence`, where `forward_kl` lives too: quantizing distils
as well). Differentiable once, in the student only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.divergence import forward_kl, mean_over_slices

__all__ = ["forward_kl", "label_cross_entropy", "top1_blend"]


def top1_blend(student: Tensor, teacher_top1: Tensor, labels: Tensor, teacher_share: float = 0.9) -> Tensor:
    """Return the mean cross-entropy to `teacher_share` of the teacher's top-1 [N] and the rest of the label [N].

    >>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    >>> round(top1_blend(logits, torch.tensor([0]), torch.tensor([1]), teacher_share=0.9).item(), 6)
    0.762462
    >>> import math; round(-(0.9 * math.log(0.5) + 0.1 * math.log(0.25)), 6)
    0.762462
    """

    def slice_loss(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(logits, -1)
        top1, label = teacher_top1[rows, None], labels[rows, None]
        value = -(teacher_share * log_q.gather(1, top1) + (1 - teacher_share) * log_q.gather(1, label))
        q = log_q.exp_()
        q.scatter_add_(1, top1, q.new_full(top1.shape, -teacher_share))
        q.scatter_add_(1, label, q.new_full(label.shape, teacher_share - 1))
        return value.sum(dtype=torch.float64), q

    return mean_over_slices(student, slice_loss)


def label_cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log q[label]; logits [N, V], labels [N].

    >>> round(label_cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item(), 6)
    1.386294
    """
    return top1_blend(student, labels, labels, teacher_share=1.0)
