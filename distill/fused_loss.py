"""Losses from hidden states and head weights: the logits of N positions are never there all at once.

A head of V rows turns N positions into N * V logits, and a loss composed of torch's functions keeps several buffers of
that size for student and teacher: 4,096 positions of a vocabulary of 152k are 2.5 GB each. Here the positions are cut
into chunks. For each chunk, student and teacher logits are made, all losses of the mix and their gradient G by the
student's logits follow in the same buffer (`loss_mix`), and

    d loss / d hidden [N, D] = G W          d loss / d W [V, D] += G^T hidden          d loss / d bias [V] += sum of G

The gradients are made in the forward pass and are all that is kept; the backward pass scales them in place. That is
the scheme of Liger's fused linear losses (Hsu et al. 2024, arXiv 2410.10989); differences: gradients are
written down rather than differentiated through (one buffer instead of five), the loss runs on slices of a few rows
that stay in a CPU's cache while the matrix products see the whole chunk, and buffers are made once per call.

Why not chunks of the vocabulary: with them, no gradient is known before the last chunk has given the softmax its
normalizer, so all logits have to be computed twice (six matrix products instead of four). One row of logits of any
vocabulary fits in memory.

Memory above the inputs: the gradients (N D + V D numbers in the weight's type, at least float32), one chunk of logits
for the student and one for each teacher, about eight slices, and under autocast the heads once more in its type.
Arithmetic: products in autocast's type or the head's own, softmax and sums in float32 (float64 if the head is), the
head's gradient added up in float32. On a CPU matrix products are nine tenths of the time: little is left to compile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dwindle.distill.head import Head, HeadStates, ModelTail
from dwindle.distill.loss_mix import LossMix, mean_log_probabilities
from dwindle.distill.row_losses import RowTargets
from dwindle.distill.teacher_signal import TeacherTargets

__all__ = ["fused_loss"]

CHUNK_BYTES = {"cpu": 64 << 20}
"""Logits of one chunk, for the student and for each teacher: matrix products of fewer rows are slower."""
CHUNK_BYTES_DEVICE = 256 << 20
SLICE_ELEMENTS = {"cpu": 1 << 16}
"""Logits per slice of the loss, for each thread: on a CPU so few that a core's cache holds all buffers of a slice."""
SLICE_ELEMENTS_DEVICE = 1 << 25
_GRADIENT_BLOCK_ROWS = 8192
"""Rows of the head whose gradient is made at a time where it is added up in a wider type than it is multiplied in."""


def _product_type(tensor: Tensor) -> torch.dtype:
    """Return the type matrix products run in: autocast's where it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Product:
    """Logits of a head, chunk by chunk, in one buffer."""

    def __init__(self, hidden: Tensor, head: Head, rows: int) -> None:
        self.type = _product_type(head.weight)
        self.hidden, self.weight = hidden.detach().to(self.type), head.weight.detach().to(self.type)
        self._bias = None if head.bias is None else head.bias.detach().to(self.type)
        self._buffer = torch.empty(rows, len(self.weight), dtype=self.type, device=self.weight.device)

    def logits(self, rows: slice) -> Tensor:
        """Return [n, V], without the cap; overwritten by the next call."""
        hidden = self.hidden[rows].to(self.weight.device)
        out = torch.mm(hidden, self.weight.t(), out=self._buffer[: len(hidden)])
        return out if self._bias is None else out.add_(self._bias)


class _TailProduct:
    """Logits as a model of another family makes them, a chunk at a time."""

    def __init__(self, hidden: Tensor, tail: ModelTail) -> None:
        self._hidden, self._tail = hidden.detach(), tail

    def logits(self, rows: slice) -> Tensor:
        """Return [n, V]."""
        return self._tail.logits(self._hidden[rows])


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap).mul_(cap)


def _source(source: HeadStates | Tensor, rows: int) -> _Product | _TailProduct | Tensor:
    """Return what gives a teacher's logits, at most `rows` positions at a time."""
    if isinstance(source, Tensor):
        return source
    head, hidden = source.head, source.hidden
    return _TailProduct(hidden, head) if isinstance(head, ModelTail) else _Product(hidden, head, rows)


class _TargetChunks:
    """What one chunk of positions at a time is held against; teachers' logits are made only if they are read."""

    def __init__(
        self, targets: TeacherTargets, labels: Tensor | None, mix: LossMix, rows: int, device: torch.device,
        wide: torch.dtype,
    ) -> None:  # fmt: skip
        self._targets, self._labels, self._device, self._wide = targets, labels, device, wide
        known_top1 = not mix.reads_top1 or targets.top1 is not None
        known = known_top1 and (targets.sparse is not None or not mix.reads_teacher)
        sources = () if known else targets.sources
        self._products = [_source(source, rows) for source in sources]
        heads = [source.head if isinstance(source, HeadStates) else None for source in sources]
        self._caps = [head.cap if isinstance(head, Head) else None for head in heads]

    def move_to(self, rows: slice) -> None:
        """Make the chunk's logits."""
        self._rows = rows
        self._chunk = [p[rows] if isinstance(p, Tensor) else p.logits(rows) for p in self._products]

    def slice(self, part: slice) -> RowTargets:
        """Return the targets of a slice of the chunk."""
        rows = slice(self._rows.start + part.start, self._rows.start + part.stop)
        known, sparse, shares = self._targets.top1, self._targets.sparse, self._targets.shares

        def logits() -> list[Tensor]:
            return [_capped(chunk[part].to(self._device, self._wide), cap)
                    for chunk, cap in zip(self._chunk, self._caps, strict=True)]  # fmt: skip

        def log_p(temperature: float) -> Tensor:
            return mean_log_probabilities(logits(), shares, temperature)

        def top1() -> Tensor:
            if known is not None:
                return known[rows].to(self._device)
            return (logits()[0] if len(self._chunk) == 1 else log_p(1.0)).argmax(-1)

        labels = None if self._labels is None else self._labels[rows].to(self._device)
        return RowTargets(log_p, top1, labels, None if sparse is None else sparse.at(rows).to(self._device))


def _cut(total: int, most: int) -> Iterator[slice]:
    """Yield slices of at most `most`, all of about the same length.

    >>> [(s.start, s.stop) for s in _cut(10, 4)]
    [(0, 4), (4, 7), (7, 10)]
    """
    pieces = math.ceil(total / most)
    start = 0
    for piece in range(pieces):
        stop = start + (total - start + pieces - piece - 1) // (pieces - piece)
        yield slice(start, stop)
        start = stop


class _Gradients:
    """Gradients of one call by hidden states, head weight and head bias, as far as they are needed."""

    def __init__(self, hidden: Tensor, head: Head, needed: Sequence[bool]) -> None:
        wide = _wide(head.weight.dtype)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.empty_like(head.weight, dtype=wide) if needed[1] else None
        self.bias = None if head.bias is None or not needed[2] else torch.zeros_like(head.bias, dtype=wide)

    def add(self, rows: slice, slope: Tensor, product: _Product) -> None:
        """Add what the chunk `rows` with the gradient `slope` [n, V] by its logits contributes."""
        if self.hidden is not None:
            self.hidden[rows] = slope @ product.weight
        if self.bias is not None:
            self.bias += slope.sum(0, dtype=self.bias.dtype)
        if self.weight is None:
            return
        hidden, kept = product.hidden[rows], 0 if rows.start == 0 else 1
        if self.weight.dtype == slope.dtype:
            torch.addmm(self.weight, slope.t(), hidden, beta=kept, out=self.weight)
            return
        for block in _cut(len(self.weight), _GRADIENT_BLOCK_ROWS):
            part = slope[:, block].t() @ hidden
            self.weight[block] = self.weight[block].add_(part) if kept else part.to(self.weight.dtype)

    def take(self, outer: Tensor, types: Sequence[torch.dtype]) -> list[Tensor | None]:
        """Return the gradients times `outer`, in these types; they are given away."""
        found = [self.hidden, self.weight, self.bias]
        self.hidden = self.weight = self.bias = None
        one = bool(outer == 1)
        return [
            None if g is None else (g if one else g.mul_(outer.to(g.device, g.dtype))).to(t)
            for g, t in zip(found, types, strict=True)
        ]


class _FusedLoss(torch.autograd.Function):
    """The sum of a mix over positions, with its gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, mix: LossMix,
        targets: TeacherTargets, labels: Tensor | None, chunk_bytes: int,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the mean loss and the mean of each term [terms]."""
        head = Head(weight, bias, cap)
        needed = [differentiable and need for need in ctx.needs_input_grad[:3]]
        ctx.gradients = _Gradients(hidden, head, needed)
        ctx.types = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        parts = _means(ctx.gradients, hidden, head, mix, targets, labels, chunk_bytes)
        total = parts.sum()
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients made in the forward pass, scaled in place: they can be had once."""
        if ctx.gradients is None:
            raise RuntimeError("the fused loss can be differentiated once: its gradients were given away")
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.take(outer, ctx.types), None, None, None, None, None, None)


def _slice_rows(device: torch.device, vocab: int) -> int:
    if device.type not in SLICE_ELEMENTS:
        return max(1, SLICE_ELEMENTS_DEVICE // vocab)
    return max(1, SLICE_ELEMENTS[device.type] // vocab) * torch.get_num_threads()


def _means(
    gradients: _Gradients, hidden: Tensor, head: Head, mix: LossMix, targets: TeacherTargets, labels: Tensor | None,
    chunk_bytes: int,
) -> Tensor:  # fmt: skip
    """Return the mean of each term over the positions, and fill `gradients`."""
    positions, vocab, device = len(hidden), len(head.weight), hidden.device
    product_type = _product_type(head.weight)
    wide = _wide(product_type)
    rows_at_once = min(positions, max(1, chunk_bytes // (vocab * product_type.itemsize)))
    product = _Product(hidden, head, rows_at_once)
    chunks = _TargetChunks(targets, labels, mix, rows_at_once, device, wide)
    total = torch.zeros(len(mix.terms), dtype=torch.float64, device=device)
    for rows in _cut(positions, rows_at_once):
        logits = product.logits(rows)
        chunks.move_to(rows)
        for part in _cut(len(logits), _slice_rows(device, vocab)):
            student = _capped(logits[part].to(wide), head.cap)
            values, slope = mix.rows(student, chunks.slice(part))
            total += values.sum(1, dtype=torch.float64)
            if head.cap is not None:
                slope.mul_(student.div_(head.cap).square_().neg_().add_(1))
            logits[part] = slope.div_(positions)
        gradients.add(rows, logits, product)
    return (total / positions).to(wide)


def fused_loss(
    hidden: Tensor, head: Head, mix: LossMix, *, targets: TeacherTargets | None = None, labels: Tensor | None = None,
    mask: Tensor | None = None, chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Return the mix's mean over N positions and each term's (weighted) mean by name.

    hidden [N, D] and the head's weight and bias get gradients. `targets` are the teacher's word on the N positions,
    `labels` [N] the next tokens. `mask` [N] is not 0 where a position counts; the others are left out of every product,
    and with none left the loss is 0. `chunk_bytes` bounds one chunk of logits (default: `CHUNK_BYTES` of the device).
    Differentiable once.

    >>> from dwindle.distill.loss_mix import Term
    >>> from dwindle.distill.row_losses import top1_blend_rows
    >>> mix = LossMix((Term("label", top1_blend_rows(0.0), reads_teacher=False),))
    >>> loss, parts = fused_loss(torch.ones(2, 1), Head(torch.zeros(4, 1)), mix, labels=torch.tensor([1, 3]))
    >>> round(loss.item(), 6)
    1.386294
    """
    targets = targets or TeacherTargets()
    if mask is not None:
        index = mask.flatten().nonzero().squeeze(1)
        hidden, targets = hidden[index], targets.at(index)
        labels = None if labels is None else labels[index]
    if not len(hidden):
        return (hidden.sum() + head.weight.sum()) * 0, {term.name: 0.0 for term in mix.terms}
    bound = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES_DEVICE) if chunk_bytes is None else chunk_bytes
    arguments = (hidden, head.weight, head.bias, head.cap, mix, targets, labels, bound, torch.is_grad_enabled())
    total, parts = _FusedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, dict(zip((term.name for term in mix.terms), parts.tolist(), strict=True))
