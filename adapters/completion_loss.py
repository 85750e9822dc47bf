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

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of `batch` [B, 2 + T] in nats per token; parts: that of the answers alone."""
        sums, counts = self.sums(model, batch)
        means = sums / counts.clamp(min=1)
        general = (batch[:, 1] == 0).float().mean()
        named = {"answers": float(means[0].detach())}
        return means[0] * (1 - general) + means[1] * general, named

    def sums(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of the loss over the tokens of answers and of general text [2], and their numbers [2]."""
        lengths, starts, ids = batch[:, 0], batch[:, 1].clamp(min=1), batch[:, 2:]
        sums, counts = torch.zeros(2, device=batch.device), torch.zeros(2, dtype=torch.int64, device=batch.device)
        for rows, log_probs, counted in answer_log_probs(model, ids, starts, lengths):
            side = (batch[rows, 1] == 0).long()
            sums = sums.index_add(0, side, -(log_probs * counted).sum(1))
            counts.index_add_(0, side, counted.sum(1))
        return sums, counts
