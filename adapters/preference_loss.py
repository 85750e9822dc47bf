"""Direct preference optimisation (DPO, Rafailov et al. 2023, arXiv 2305.18290).

    loss = - log sigmoid( beta * [ log p(chosen)/r(chosen) - log p(rejected)/r(rejected) ] )

p is the model in training, r the reference; log-probabilities are sums over an answer's tokens. The reference is what
the task's training starts from: the base with the adapter it was initialised from, or, without one, the base with the
adapter disabled: a fresh adapter is without effect (`reference="base"` takes the bare base in either case). Its
log-probabilities are computed once, before the first step, so neither a second model nor a second pass is
needed. The values are those of TRL's `DPOTrainer` with its `sigmoid` loss.

`nll_weight` adds the mean loss of the chosen answers' tokens: it holds up their probability, which DPO alone may lower.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dwindle.adapters.sequence_scores import sequence_log_probs

__all__ = ["PreferenceLoss", "preference_sides", "reference_log_probs"]


def preference_sides(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [2B, T], starts [2B] and lengths [2B] of preference rows: all chosen, then all rejected."""
    width = (batch.shape[1] - 4) // 2
    ids = torch.cat([batch[:, 4 : 4 + width], batch[:, 4 + width :]])
    return ids, batch[:, 1].repeat(2), torch.cat([batch[:, 2], batch[:, 3]])


@torch.no_grad()
def reference_log_probs(model: nn.Module, rows: Tensor, batch_size: int) -> Tensor:
    """Return log r of both sides [N, 2] of all rows; the model is in evaluation mode."""
    device = next(model.parameters()).device
    found = [sequence_log_probs(model, *preference_sides(part.to(device))).view(2, -1).T.cpu()
             for part in torch.split(rows, batch_size)]  # fmt: skip
    return torch.cat(found)


class PreferenceLoss:
    """The objective on rows of the preference layout (`task_tokens`)."""

    def __init__(self, reference: Tensor, beta: float, nll_weight: float = 0.0) -> None:
        self._reference, self._beta, self._nll_weight = reference, beta, nll_weight

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean loss over the pairs; parts: the mean reward margin, and the share of pairs ranked rightly."""
        ids, starts, lengths = preference_sides(batch)
        chosen, rejected = sequence_log_probs(model, ids, starts, lengths).view(2, -1)
        reference = self._reference.to(batch.device)[batch[:, 0]]
        margin = self._beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
        loss = -nn.functional.logsigmoid(margin).mean()
        if self._nll_weight:
            loss = loss - self._nll_weight * chosen.sum() / (batch[:, 2] - batch[:, 1]).sum()
        return loss, {"margin": float(margin.detach().mean()), "ranked": float((margin.detach() > 0).float().mean())}
