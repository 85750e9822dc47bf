"""Text written during training: by the student, which then learns where it goes itself, or by the teacher.

    on-policy         x ~ student, loss = divergence of teacher and student along x      (GKD, arXiv 2306.13649)
    sequence level    x ~ teacher, loss on what the teacher said                          (arXiv 1606.07947)

A student that only ever reads human text is judged on states it will not be in: after its own first mistake it is
somewhere no text of the data goes. GKD (Agarwal et al. 2024, algorithm 1) replaces a share of the batches by text that
the student wrote; no gradient flows through the sampling. Divergences apply to such text; labels do not, since its next
token is the student's own word. Text by the teacher (Kim and Rush 2016) has labels: they are what is learnt.

A written window begins with the first tokens of a window of the data and is as long as that. Only what was written
counts. How many windows of a batch are written follows from the step alone, so that all processes sample together and
a resumed run draws the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dwindle.continuation import continued
from dwindle.distill.objective import DistillObjective
from dwindle.distill.on_policy_options import OnPolicyOptions
from dwindle.evaluation_mode import evaluating

__all__ = ["OnPolicyObjective"]


@dataclass(frozen=True)
class OnPolicyObjective:
    """A distillation objective of which a share of the windows is written by a model."""

    inner: DistillObjective
    options: OnPolicyOptions
    teacher: nn.Module | None = field(default=None, repr=False)
    """Writes where the options say so."""
    step: int = 0

    def at(self, step: int, steps: int) -> OnPolicyObjective:
        """Return the objective of optimizer step `step` (0-based) of `steps`."""
        return replace(self, inner=self.inner.at(step, steps), step=step)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean loss over the predictions of read and written windows of `batch` [B, T], and its parts."""
        rows = self.options.rows(len(batch), self.step)
        if rows == 0:
            return self.inner.loss(model, batch)
        written, mask = self._written(model, batch[:rows])
        inner = replace(self.inner, losses=self.options.losses(self.inner.losses))
        total, parts = inner.masked_loss(model, written, mask)
        if rows == len(batch):
            return total, _named(parts, "written")
        read, read_parts = self.inner.loss(model, batch[rows:])
        predictions = (float(mask.sum()), float(batch[rows:, 1:].numel()))
        share = predictions[0] / sum(predictions)
        return share * total + (1 - share) * read, {**_named(parts, "written"), **read_parts}

    def _written(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return windows [R, T] begun as those of `batch`, and the mask [R, T - 1] of predictions that count."""
        length = batch.shape[1]
        prompt = min(length - 1, max(1, round(self.options.prompt_share * length)))
        writer = model if self.teacher is None or self.options.writer == "student" else self.teacher
        with evaluating(writer):
            text = continued(writer, batch[:, :prompt], length, temperature=self.options.temperature)
        mask = torch.zeros(len(batch), length - 1, device=batch.device)
        mask[:, prompt - 1 :] = 1
        return text.to(batch.device), mask


def _named(parts: Mapping[str, float], kind: str) -> dict[str, float]:
    return {f"{name}_{kind}": value for name, value in parts.items()}
