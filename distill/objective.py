"""The distillation objective: the student's losses against a teacher signal, for the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dwindle.distill.losses import forward_kl, label_cross_entropy, top1_blend
from dwindle.distill.options import LossName, LossSpec
from dwindle.distill.teacher_signal import TeacherSignal, TeacherTargets

__all__ = ["DistillObjective"]


def _forward_kl(spec: LossSpec, student: Tensor, targets: TeacherTargets, _: Tensor) -> Tensor:
    assert targets.logits is not None
    return spec.weight * forward_kl(student, targets.logits, spec.temperature)


def _top1_blend(spec: LossSpec, student: Tensor, targets: TeacherTargets, labels: Tensor) -> Tensor:
    return top1_blend(student, targets.top1, labels, spec.weight)


def _label_cross_entropy(spec: LossSpec, student: Tensor, _: TeacherTargets, labels: Tensor) -> Tensor:
    return spec.weight * label_cross_entropy(student, labels)


_LOSSES: dict[LossName, Callable[[LossSpec, Tensor, TeacherTargets, Tensor], Tensor]] = {
    "forward_kl": _forward_kl,
    "top1_blend": _top1_blend,
    "label_cross_entropy": _label_cross_entropy,
}


@dataclass(frozen=True)
class DistillObjective:
    """The sum of the losses of the mix."""

    losses: tuple[LossSpec, ...]
    """The mix."""
    teacher: TeacherSignal
    """Must give logits if `wants_logits(losses)`."""

    @staticmethod
    def wants_logits(losses: tuple[LossSpec, ...]) -> bool:
        """Return True if a loss of the mix reads the teacher's logits."""
        return any(loss.name == "forward_kl" for loss in losses)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the summed loss over the B * (T - 1) predictions of `batch` [B, T], and each (weighted) loss."""
        ids, labels = batch[:, :-1], batch[:, 1:].flatten()
        targets = self.teacher.targets(ids)
        # The mask of ones: nothing is padded, so attention may take its causal fast path (see core.measure).
        student = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.flatten(0, 1)
        parts = [_LOSSES[spec.name](spec, student, targets, labels) for spec in self.losses]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total, {spec.name: part.item() for spec, part in zip(self.losses, parts, strict=True)}
