"""What is left to learn of each place of a mixture: the losses by which `data.learned_mixture` changes its weights.

The student is called as in training, so that a sharded one is measured in all processes together, and their mean is
taken, so that all of them read the same windows. The teacher is run once, when training begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dwindle.data.learned_mixture import LearnedOrder
from dwindle.distill.head import HeadStates, head_of, inside
from dwindle.distill.teacher_model import Teacher
from dwindle.distill.teacher_signal import LiveTeacher
from dwindle.sharding import Processes
from dwindle.token_set import Mixture, TokenSet
from dwindle.vocabulary_map import VocabularyMap

__all__ = ["learned_order"]

_ROWS = 512
"""Positions whose logits exist at a time."""


def learned_order(
    tokens: TokenSet, seed: int, teacher: Teacher | None, mapped: VocabularyMap | None
) -> LearnedOrder | None:
    """Return the order of a set whose shares are learned, None for any other."""
    if tokens.mixture is None:
        return None
    assert teacher is not None, "the step refuses learned weights without a teacher"
    places = _Places(tokens.mixture)
    return LearnedOrder(tokens.mixture, seed, places.of_student, places.of_teacher(LiveTeacher(teacher, mapped=mapped)))


class _Places:
    """Nats/token on the held-out windows of each place."""

    def __init__(self, mixture: Mixture) -> None:
        self._held = mixture.held_out

    @torch.no_grad()
    def of_teacher(self, signal: LiveTeacher) -> list[float]:
        found = []
        for windows in self._held:
            states = [signal.targets(window[None, :-1].long()).states[0] for window in windows]
            totals = [_nats(one, window[1:].long()) for one, window in zip(states, windows, strict=True)]
            found.append(sum(totals) / windows[:, 1:].numel())
        return found

    @torch.no_grad()
    def of_student(self, model: nn.Module) -> list[float]:
        student: Any = model
        device = next(model.parameters()).device

        def total(window: Tensor) -> float:
            def forward(read: Tensor) -> float:
                found = student.get_decoder()(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False)
                return _nats(HeadStates(found.last_hidden_state.flatten(0, 1), head_of(student)), window[1:].long())

            return inside(model, forward, window[None, :-1].long().to(device))

        means = [sum(total(window) for window in windows) / windows[:, 1:].numel() for windows in self._held]
        return list(Processes.current(device).mean(means))


def _nats(states: HeadStates, labels: Tensor) -> float:
    """Return the sum of -log q(label) over the positions of one window."""
    total = 0.0
    for start in range(0, len(labels), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(labels)))
        log_q = states.at(rows).logits().float().log_softmax(-1)
        total -= float(log_q.gather(1, labels[rows, None].to(log_q.device)).double().sum())
    return total
