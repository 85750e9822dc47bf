"""What a teacher says about a batch: its most probable token, and its logits where a loss wants them.

The objective sees this small type only, and cannot tell a live teacher from one read from disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dwindle.measure import logit_slices

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["LiveTeacher", "TeacherSignal", "TeacherTargets"]

_SLICE_ELEMENTS = 1 << 23
"""Logits made at a time: 32 MiB in float32."""


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's word on N positions."""

    top1: Tensor
    """[N] most probable token."""
    logits: Tensor | None
    """[N, V], None if no loss asked for them."""


class TeacherSignal(Protocol):
    """Where targets come from."""

    def targets(self, ids: Tensor) -> TeacherTargets:
        """Return the targets at the B * T positions of `ids` [B, T], on the device of `ids`."""
        ...


class LiveTeacher:
    """Runs the teacher on every batch, without gradients. With `wants_logits` False it never holds [N, V] logits."""

    def __init__(self, teacher: ModelBundle, *, wants_logits: bool) -> None:
        self._slices = logit_slices(teacher)
        self._slice_tokens = max(1, _SLICE_ELEMENTS // teacher.anatomy.vocab)
        self._wants_logits = wants_logits
        teacher.model.eval()

    @torch.no_grad()
    def targets(self, ids: Tensor) -> TeacherTargets:
        """Return the teacher's targets for `ids` [B, T]."""
        top1, logits = [], []
        for part in self._slices(ids, self._slice_tokens):
            top1.append(part.argmax(-1).to(ids.device))
            if self._wants_logits:
                logits.append(part.to(ids.device))
        return TeacherTargets(torch.cat(top1), torch.cat(logits) if logits else None)
