r"""Distillation losses: pure functions of logits [N, V], in nats, mean over N positions, always the full value.

With q = softmax(student / T), p = softmax(teacher / T), y the label and t the teacher's most probable token:

- `forward_kl`           KL(p || q) (Hinton et al. 2015, arXiv 1503.02531, section 2). Minitron (arXiv 2407.14679,
                         section 4.1) found it alone the best loss for retraining pruned models.
- `reverse_kl`           KL(q || p): the student may leave out what it cannot cover (MiniLLM, arXiv 2306.08543).
- `jsd`                  b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q: GKD's generalized Jensen-Shannon
                         divergence (arXiv 2306.13649). JSD(b) / b goes to KL(p || q) for b -> 0, and JSD(b) / (1 - b)
                         to KL(q || p) for b -> 1; b = 0 and b = 1 mean those two here.
- `skew_kl`              KL(p || a p + (1 - a) q) (DistiLLM, arXiv 2402.03898), never above -log a.
- `skew_reverse_kl`      KL(q || (1 - a) p + a q), DistiLLM's other direction.
- `top1_blend`           -(w log q[t] + (1 - w) log q[y]). Apple's pre-training distillation (arXiv 2407.21075, section
                         3.2.2): label and teacher top-1 blended, w = 0.9 on the teacher: one id per token to store.
- `label_cross_entropy`  -log q[y].
- `top_k`                KL over k + 1 outcomes: the teacher's k most probable tokens and "any other". A lower bound of
                         `forward_kl` (data processing inequality). Without the last outcome the tail is unconstrained
                         and the student grows over-confident (arXiv 2503.16870).
- `taid`                 KL(s || q), s = softmax((1 - t) student + t teacher) at temperature T, the student in s held
                         fixed (arXiv 2501.16937): a target that moves from student to teacher as t goes from 0 to 1.

Losses with a temperature are multiplied by T^2, which keeps the gradient's size independent of T. Every function takes
a `mask` [N]: positions where it is 0 do not count. Their gradients are made together with the values, slice by slice
(`row_losses` has the formulas); differentiable once, in the student only. These functions need both models' logits;
`fused_loss` computes the same numbers from hidden states without ever holding [N, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dwindle.distill.loss_mix import LossMix, Term, mean_log_probabilities
from dwindle.distill.row_losses import (
    RowLoss,
    RowTargets,
    forward_kl_rows,
    jsd_rows,
    reverse_kl_rows,
    skew_kl_rows,
    skew_reverse_kl_rows,
    taid_rows,
    top1_blend_rows,
    top_k_rows,
)
from dwindle.divergence import mean_over_slices

__all__ = [
    "forward_kl",
    "jsd",
    "label_cross_entropy",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "taid",
    "top1_blend",
    "top_k",
]


def _mean(
    rows: RowLoss, student: Tensor, teacher: Tensor | None, temperature: float, mask: Tensor | None,
    labels: Tensor | None = None, top1: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return T^2 * the mean of one row loss over the positions that count."""
    mix = LossMix((Term("", rows, 1.0, temperature),))
    kept = None if mask is None else mask.flatten() != 0

    def slice_loss(part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        def log_p(at: float) -> Tensor:
            assert teacher is not None
            return mean_log_probabilities([teacher[part].to(logits.dtype)], [1.0], at)

        def own_top1() -> Tensor:
            assert top1 is not None
            return top1[part]

        values, slope = mix.rows(logits, RowTargets(log_p, own_top1, None if labels is None else labels[part]))
        if kept is not None:
            values, slope = values * kept[part], slope.mul_(kept[part, None])
        return values.sum(dtype=torch.float64), slope

    return mean_over_slices(student, slice_loss, None if kept is None else int(kept.sum()))


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return T^2 * mean KL(p || q).

    >>> round(forward_kl(torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()).item(), 6)
    0.130812
    """
    return _mean(forward_kl_rows, student, teacher, temperature, mask)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return T^2 * mean KL(q || p).

    >>> round(reverse_kl(torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log()).item(), 6)
    0.143841
    >>> import math; round(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 6)
    0.143841
    """
    return _mean(reverse_kl_rows, student, teacher, temperature, mask)


def jsd(
    student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return T^2 * mean generalized JSD(beta) of p and q; 0 is forward KL, 1 is reverse KL.

    >>> certain = torch.tensor([[100.0, 0.0]])
    >>> round(jsd(certain, certain.flip(1)).item(), 6)  # nothing in common: log 2
    0.693147
    """
    limits = {0.0: forward_kl_rows, 1.0: reverse_kl_rows}
    return _mean(limits.get(float(beta)) or jsd_rows(beta), student, teacher, temperature, mask)


def skew_kl(
    student: Tensor, teacher: Tensor, alpha: float = 0.1, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return T^2 * mean KL(p || alpha p + (1 - alpha) q); `alpha` 0 is forward KL.

    >>> certain = torch.tensor([[100.0, 0.0]])
    >>> round(skew_kl(certain, certain.flip(1), alpha=0.1).item(), 6)  # log 10
    2.302585
    """
    return _mean(skew_kl_rows(alpha) if alpha else forward_kl_rows, student, teacher, temperature, mask)


def skew_reverse_kl(
    student: Tensor, teacher: Tensor, alpha: float = 0.1, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return T^2 * mean KL(q || (1 - alpha) p + alpha q); `alpha` 0 is reverse KL.

    >>> certain = torch.tensor([[100.0, 0.0]])
    >>> round(skew_reverse_kl(certain, certain.flip(1), alpha=0.1).item(), 6)
    2.302585
    """
    return _mean(skew_reverse_kl_rows(alpha) if alpha else reverse_kl_rows, student, teacher, temperature, mask)


def top1_blend(
    student: Tensor, teacher_top1: Tensor, labels: Tensor, teacher_share: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy to `teacher_share` of the teacher's top-1 [N] and the rest of the label [N].

    >>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    >>> round(top1_blend(logits, torch.tensor([0]), torch.tensor([1]), teacher_share=0.9).item(), 6)
    0.762462
    >>> import math; round(-(0.9 * math.log(0.5) + 0.1 * math.log(0.25)), 6)
    0.762462
    """
    return _mean(top1_blend_rows(teacher_share), student, None, 1.0, mask, labels, teacher_top1)


def label_cross_entropy(student: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of -log q[label]; logits [N, V], labels [N].

    >>> round(label_cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item(), 6)
    1.386294
    """
    return _mean(top1_blend_rows(0.0), student, None, 1.0, mask, labels)


def top_k(
    student: Tensor, teacher: Tensor, k: int = 64, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return T^2 * mean KL over the teacher's k most probable tokens and one outcome for all others.

    >>> p = torch.tensor([[0.75, 0.2, 0.05]]).log()
    >>> round(top_k(torch.zeros(1, 3), p, k=1).item(), 6)  # (3/4, 1/4) against (1/3, 2/3)
    0.36299
    >>> import math; round(0.75 * math.log(9 / 4) + 0.25 * math.log(3 / 8), 6)
    0.36299
    """
    return _mean(top_k_rows(k), student, teacher, temperature, mask)


def taid(student: Tensor, teacher: Tensor, t: float, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return T^2 * mean KL to the target between the student itself (t = 0) and the teacher (t = 1).

    >>> round(taid(torch.zeros(1, 2), torch.tensor([[0.75, 0.25]]).log(), t=1.0).item(), 6)
    0.130812
    """
    return _mean(taid_rows(t), student, teacher, temperature, mask)
