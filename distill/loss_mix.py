"""A weighted sum of losses on slices of logits: one softmax per temperature, however many losses read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.distill.row_losses import Positions, RowLoss, RowTargets

__all__ = ["LossMix", "Term", "mean_log_probabilities"]


@dataclass(frozen=True)
class Term:
    """One loss of a mix: weight * T^2 * rows(softmax(student / T), softmax(teacher / T))."""

    name: str
    rows: RowLoss
    weight: float = 1.0
    temperature: float = 1.0
    reads_teacher: bool = True
    """Reads the teacher's distribution, and not at most its top-1."""
    reads_top1: bool = False


@dataclass(frozen=True)
class LossMix:
    """The terms that are added."""

    terms: tuple[Term, ...]

    @property
    def reads_teacher(self) -> bool:
        """Return True if a term reads the teacher's distribution."""
        return any(term.reads_teacher for term in self.terms)

    @property
    def reads_top1(self) -> bool:
        """Return True if a term reads the teacher's top-1."""
        return any(term.reads_top1 for term in self.terms)

    def rows(self, student: Tensor, targets: RowTargets) -> tuple[Tensor, Tensor]:
        """Return each term's weighted values [terms, n] and the gradient of their sum by the logits [n, V].

        `student` are the logits [n, V], float32 or float64.
        """
        values = student.new_zeros(len(self.terms), student.shape[0])
        slope = torch.zeros_like(student)
        for temperature in dict.fromkeys(term.temperature for term in self.terms):
            log_q = torch.log_softmax(student if temperature == 1 else student / temperature, -1)
            at = Positions(log_q, log_q.exp(), temperature, targets)
            shared: Tensor | float = 0.0
            for i, term in enumerate(self.terms):
                if term.temperature == temperature:
                    value, c = term.rows(at, slope, term.weight * temperature)
                    values[i] = value * (term.weight * temperature**2)
                    shared = shared + c
            if isinstance(shared, Tensor):
                slope.addcmul_(at.q, shared)
            else:
                slope.add_(at.q, alpha=shared)
        return values, slope


def mean_log_probabilities(logits: Sequence[Tensor], shares: Sequence[float], temperature: float) -> Tensor:
    """Return log of the mean of softmax(logits / T) over teachers [n, V], weighted by `shares` (which add up to 1).

    >>> one, two = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> mean_log_probabilities([one, two], [0.75, 0.25], 1.0).exp()
    tensor([[0.6000, 0.4000]])
    """
    scaled = (part if temperature == 1 else part / temperature for part in logits)
    logs = [torch.log_softmax(part, -1) for part in scaled]
    if len(logs) == 1:
        return logs[0]
    total = logs[0].add_(math.log(shares[0]))
    for log, share in zip(logs[1:], shares[1:], strict=True):
        total = torch.logaddexp(total, log.add_(math.log(share)))
    return total
