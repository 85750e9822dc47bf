"""Supervised fine-tuning on answers only (SFT): the prompt is read, not learned.

    L(rows) = - 1/N sum over the N answer tokens of the rows of log p(token | what stands before it)
    loss    = (a L(records) + g L(windows of general text)) / (a + g)        a, g rows of each in the batch

A window of general text has some hundred tokens to predict and an answer a few; so the two are averaged apart, and the
share of replay is a share of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dwindle.adapters.sequence_scores import answer_log_probs

__all__ = ["CompletionLoss"]


class CompletionLoss:
    """The objective on rows of the completion layout (`task_tokens`)."""

    def __init__(self, scales: tuple[float, float] | None = None, general: float = 0.0) -> None:
        self._scales, self._general = scales, general

    def over(self, batch: Tensor, pieces: int) -> CompletionLoss:
        """Return the objective of one of `pieces` equal parts of `batch`, whose tokens are counted over all of it."""
        general = batch[:, 1] == 0
        tokens = batch[:, 0] - batch[:, 1].clamp(min=1)
        counts = [int(tokens[rows].sum().clamp(min=1)) for rows in (~general, general)]
        return CompletionLoss((pieces / counts[0], pieces / counts[1]), float(general.float().mean()))

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of `batch` [B, 2 + T] in nats per token; parts: that of the answers alone."""
        if self._scales is None:
            return self.over(batch, 1).loss(model, batch)
        sums, _ = self.sums(model, batch)
        answers, general = sums[0] * self._scales[0], sums[1] * self._scales[1]
        return answers * (1 - self._general) + general * self._general, {"answers": float(answers.detach())}

    def sums(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of the loss over the tokens of answers and of general text [2], and their numbers [2]."""
        lengths, starts, ids = batch[:, 0], batch[:, 1].clamp(min=1), batch[:, 2:]
        sums, counts = torch.zeros(2, device=batch.device), torch.zeros(2, dtype=torch.int64, device=batch.device)
        for rows, log_probs, counted in answer_log_probs(model, ids, starts, lengths):
            side = (batch[rows, 1] == 0).long()
            sums = sums.index_add(0, side, -(log_probs * counted).sum(1))
            counts.index_add_(0, side, counted.sum(1))
        return sums, counts
