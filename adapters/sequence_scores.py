"""Log-probabilities of the ends of sequences, at the price of their tokens rather than of the longest row.

    log p(y | x) = sum over t of log p(y_t | x, y_1 ... y_{t-1})

Rows are sorted by length and run in a few parts, each padded to its own longest only. Padding stands on the right,
where causal attention lets no token see it, so no mask is needed; logits are made from the first answer's start on,
because prompts are most of a row and their logits, a vocabulary wide, most of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["answer_log_probs", "sequence_log_probs"]

_PARTS = 4
_LEAST_ROWS = 8
"""Rows a part has at least: each part costs a pass over the layers, packed weights unpacked again."""


def answer_log_probs(
    model: nn.Module, ids: Tensor, starts: Tensor, lengths: Tensor, parts: int = _PARTS
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (rows [b], log-probabilities [b, K], which of them count [b, K]) part by part.

    ids [B, T]; the tokens from `starts` to below `lengths` count. The number of parts depends on B alone, so that under
    `torchrun` every process calls the model equally often.
    """
    call: Any = model
    order = torch.argsort(lengths, descending=True, stable=True)
    for rows in order.chunk(max(1, min(parts, len(order) // _LEAST_ROWS))):
        first, last = int(starts[rows].min()), int(lengths[rows].max())
        window = ids[rows, :last]
        read, wanted = window[:, :-1], window[:, first:]
        logits = call(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False,
                      logits_to_keep=last - first).logits  # fmt: skip
        log_probs = -nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none")
        position = torch.arange(first, last, device=ids.device)
        counted = (position >= starts[rows, None]) & (position < lengths[rows, None])
        yield rows, log_probs.view(wanted.shape), counted


def sequence_log_probs(model: nn.Module, ids: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Return log p(answer | prompt) [B] in nats: sums over the counted tokens."""
    found = torch.zeros(len(ids), device=ids.device)
    for rows, log_probs, counted in answer_log_probs(model, ids, starts, lengths):
        found = found.index_put((rows,), (log_probs * counted).sum(1))
    return found
