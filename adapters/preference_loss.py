"""Direct preference optimisation (DPO, Rafailov et al. 2023, arXiv 2305.18290).

    loss = - log sigmoid( beta * [ log p(chosen)/r(chosen) - log p(rejected)/r(rejected) ] )

p is the model in training, r the reference; log-probabilities are sums over an answer's tokens. The reference is what
the task's training starts from: the base with the adapter it was initialised from, or, without one, the base with the
adapter disabled: a fresh adapter is without effect (`reference="base"` takes the bare base in either case). Its
log-probabilities are computed once, before the first step, so neither a second model nor a second pass is
needed. The values are those of TRL's `DPOTrainer` with its `sigmoid` loss.

`nll_weight` adds the mean loss of the chosen answers' tokens: it holds up their probability, which DPO alone may lower.
Windows of general text (replay) count as in `completion_loss`: their share of the rows is their share of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwindle.adapters.sequence_scores import sequence_log_probs

__all__ = ["PreferenceLoss", "preference_sides", "reference_log_probs"]


def preference_sides(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [2B, T], starts [2B] and lengths [2B] of preference rows: all chosen, then all rejected.

    A window of general text, which starts at 0, is predicted from its second token on.
    """
    width = (batch.shape[1] - 4) // 2
    ids = torch.cat([batch[:, 4 : 4 + width], batch[:, 4 + width :]])
    return ids, batch[:, 1].clamp(min=1).repeat(2), torch.cat([batch[:, 2], batch[:, 3]])


@torch.no_grad()
def reference_log_probs(model: nn.Module, rows: Tensor, batch_size: int) -> Tensor:
    """Return log r of both sides [N, 2] of all rows; the model is in evaluation mode."""
    device = next(model.parameters()).device
    found = [sequence_log_probs(model, *preference_sides(part.to(device))).view(2, -1).T.cpu()
             for part in torch.split(rows, batch_size)]  # fmt: skip
    return torch.cat(found)


@dataclass(frozen=True)
class _Scales:
    """What the sums over one part of a batch are multiplied with, so that the mean over its parts is the batch's."""

    pair: float
    chosen_token: float
    replayed_token: float
    general: float
    """Share of general text among the rows."""

    @classmethod
    def of(cls, batch: Tensor, pieces: int) -> _Scales:
        pair = batch[:, 1] > 0
        tokens = batch[:, 2] - batch[:, 1].clamp(min=1)
        pairs, chosen, replayed = (int(n.sum().clamp(min=1)) for n in (pair, tokens * pair, tokens * ~pair))
        return cls(pieces / pairs, pieces / chosen, pieces / replayed, 1 - float(pair.float().mean()))


class PreferenceLoss:
    """The objective on rows of the preference layout (`task_tokens`)."""

    def __init__(self, reference: Tensor, beta: float, nll_weight: float = 0.0, scales: _Scales | None = None) -> None:
        self._reference, self._beta, self._nll_weight, self._scales = reference, beta, nll_weight, scales

    def over(self, batch: Tensor, pieces: int) -> PreferenceLoss:
        """Return the objective of one of `pieces` equal parts of `batch`, whose pairs are counted over all of it."""
        return PreferenceLoss(self._reference, self._beta, self._nll_weight, _Scales.of(batch, pieces))

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean loss over the pairs; parts: the mean reward margin, and the share of pairs ranked rightly.

        With windows of general text among them it is (1 - g) times that, and g times their loss per token, g their
        share of the rows. They run in the same passes, so that every process of a launch calls the model alike.
        """
        scales = self._scales or _Scales.of(batch, 1)
        ids, starts, lengths = preference_sides(batch)
        chosen, rejected = sequence_log_probs(model, ids, starts, lengths).view(2, -1)
        pair = batch[:, 1] > 0
        reference = self._reference.to(batch.device)[batch[:, 0]]
        margin = self._beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1])) * pair
        loss = -(nn.functional.logsigmoid(margin) * pair).sum() * scales.pair
        if self._nll_weight:
            loss = loss - self._nll_weight * (chosen * pair).sum() * scales.chosen_token
        replayed = -(chosen * ~pair).sum() * scales.replayed_token
        told = {"margin": margin.sum(), "ranked": (margin > 0).sum()}
        parts = {name: float(v.detach()) * scales.pair for name, v in told.items()}
        return loss * (1 - scales.general) + replayed * scales.general, parts
