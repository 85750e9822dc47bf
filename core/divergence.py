"""Forward KL between the predictions of two models: one pure function of logits, in nats, always the full value.

    forward_kl(student, teacher, T) = T^2 * mean over N of KL(p_T || q_T)      p = softmax(teacher / T), q likewise

T^2 keeps the gradient's size independent of T (Hinton et al. 2015, arXiv 1503.02531, section 2). The value is the
divergence itself, with the teacher's entropy, and not the cross-entropy that differs from it by a constant: it is 0
if and only if the two models predict alike, and is the KL that `measure.Meter` reports.

Its gradient by the student's logits is T (q - p) / N. It is made together with the value, slice by slice in float32
(float64 for float64 logits): one softmax over the student, one buffer of the logits' own type, and no [N, V]
log-probabilities kept for the backward pass, where composing torch's `log_softmax` and `kl_div` keeps and rewrites
about five. Differentiable once, in the student only. Other losses of the form const - sum_v target[v] log q[v] are
built on the same `mean_over_slices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["forward_kl", "mean_over_slices"]

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


def mean_over_slices(
    logits: Tensor, slice_loss: Callable[[slice, Tensor], tuple[Tensor, Tensor]], positions: int | None = None
) -> Tensor:
    """Return the mean over N of summed losses over slices of logits [N, V], with its gradient attached.

    `slice_loss(rows, logits[rows])` returns the slice's summed loss and its gradient by those logits, in a buffer that
    may be overwritten. `positions` is how many of the N count, if not all; with none the mean is 0.
    """
    count = max(1, logits.shape[0] if positions is None else positions)
    with torch.no_grad():
        needed = logits.requires_grad
        gradient = torch.empty_like(logits) if needed else logits
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in _slices(logits):
            value, slope = slice_loss(rows, _wide(logits[rows]))
            total += value
            if needed:
                gradient[rows] = slope.div_(count)
        mean = (total / count).to(_wide(logits[:0]).dtype)
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

    return mean_over_slices(student, slice_loss)
