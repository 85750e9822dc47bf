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
made together with the value, slice by slice in float32 (float64 for float64 logits): one softmax over the student,
one buffer of the logits' own type, and no [N, V] log-probabilities kept for the backward pass, where composing
torch's `log_softmax` and `kl_div` keeps and rewrites about five. Differentiable once, in the student only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["forward_kl", "label_cross_entropy", "top1_blend"]

_SLICE_ELEMENTS = {"cpu": 1 << 19}
"""Logits per slice: on a CPU what its caches hold."""
_SLICE_ELEMENTS_DEVICE = 1 << 25


class _WithGradient(torch.autograd.Function):
    """The identity on a value whose gradient by the logits is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """Return the value and keep the gradient."""
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        """Return the kept gradient times the outer one."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _slices(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _SLICE_ELEMENTS.get(logits.device.type, _SLICE_ELEMENTS_DEVICE) // logits.shape[1])
    yield from (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def _mean_over_slices(logits: Tensor, slice_loss: Callable[[slice, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean of summed losses over slices, with its gradient attached.

    `slice_loss(rows, logits[rows])` returns the slice's summed loss and its gradient by those logits.
    """
    with torch.no_grad():
        needed = logits.requires_grad
        gradient = torch.empty_like(logits) if needed else logits
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in _slices(logits):
            value, slope = slice_loss(rows, _wide(logits[rows]))
            total += value
            if needed:
                gradient[rows] = slope.div_(logits.shape[0])
        mean = (total / logits.shape[0]).to(_wide(logits[:0]).dtype)
    attached: Tensor = _WithGradient.apply(logits, mean, gradient) if needed else mean  # type: ignore[no-untyped-call]
    return attached


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 * mean KL(softmax(teacher / T) || softmax(student / T)); both logits [N, V].

    >>> round(forward_kl(torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.75, 0.25]]))).item(), 6)
    0.130812
    >>> import math; round(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5), 6)
    0.130812
    """

    def slice_loss(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(logits / temperature, -1)
        log_p = torch.log_softmax(_wide(teacher[rows]) / temperature, -1)
        p = log_p.exp()
        value = log_p.sub_(log_q).mul_(p).sum(dtype=torch.float64) * temperature**2
        return value, log_q.exp_().sub_(p).mul_(temperature)

    return _mean_over_slices(student, slice_loss)


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

    return _mean_over_slices(student, slice_loss)


def label_cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log q[label]; logits [N, V], labels [N].

    >>> round(label_cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item(), 6)
    1.386294
    """
    return top1_blend(student, labels, labels, teacher_share=1.0)
