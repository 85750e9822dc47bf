"""The distillation objective: the student's losses against a teacher signal, for the one training loop.

The student is called for its hidden states; logits of both models exist a chunk at a time only (`fused_loss`). Under
FSDP2 a model's own weights, its head among them, are gathered while its forward pass runs, so the losses are computed
inside of it: the pass of the student, as it is called here, returns its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.distill.fused_loss import fused_loss
from dwindle.distill.head import head_of, inside
from dwindle.distill.layer_match import LayerOutputs, match_layers
from dwindle.distill.loss_mix import LossMix, Term
from dwindle.distill.loss_spec import LossSpec
from dwindle.distill.row_losses import (
    RowLoss,
    forward_kl_rows,
    jsd_rows,
    reverse_kl_rows,
    skew_kl_rows,
    skew_reverse_kl_rows,
    taid_rows,
    top1_blend_rows,
    top_k_rows,
)
from dwindle.distill.teacher_signal import TeacherSignal, TeacherTargets

__all__ = ["DistillObjective"]


def _jsd(spec: LossSpec) -> RowLoss:
    return {0.0: forward_kl_rows, 1.0: reverse_kl_rows}.get(float(spec.beta)) or jsd_rows(spec.beta)


_ROWS: dict[str, Callable[[LossSpec], RowLoss]] = {
    "forward_kl": lambda _: forward_kl_rows,
    "reverse_kl": lambda _: reverse_kl_rows,
    "jsd": _jsd,
    "skew_kl": lambda spec: skew_kl_rows(spec.alpha) if spec.alpha else forward_kl_rows,
    "skew_reverse_kl": lambda spec: skew_reverse_kl_rows(spec.alpha) if spec.alpha else reverse_kl_rows,
    "top_k": lambda spec: top_k_rows(spec.k),
}
"""Losses that a spec alone decides."""


def _term(spec: LossSpec, step: int, steps: int) -> Term:
    """Return what a spec means at a step."""
    weight = spec.weight_at(step, steps)
    if spec.name == "label_cross_entropy":
        return Term(spec.name, top1_blend_rows(0.0), weight, reads_teacher=False)
    if spec.name == "top1_blend":
        return Term(spec.name, top1_blend_rows(weight), reads_teacher=False, reads_top1=weight > 0)
    rows = taid_rows(spec.teacher_part_at(step, steps)) if spec.name == "taid" else _ROWS[spec.name](spec)
    return Term(spec.name, rows, weight, spec.temperature)


@dataclass(frozen=True)
class DistillObjective:
    """The sum of the losses of the mix."""

    losses: tuple[LossSpec, ...]
    """The mix."""
    teacher: TeacherSignal
    """Must give the layers of `layer_pairs`, and whole distributions for losses that read them."""
    layer_pairs: tuple[tuple[int, int], ...] = ()
    """Layers of student and teacher that `hidden_states` matches, counted from 1."""
    step: int = 0
    """Where the run stands: schedules of weights and moving targets depend on it."""
    steps: int = 1

    def at(self, step: int, steps: int) -> DistillObjective:
        """Return the objective of optimizer step `step` (0-based) of `steps`."""
        return replace(self, step=step, steps=steps)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the summed loss over the B * (T - 1) predictions of `batch` [B, T], and each (weighted) loss."""
        return self.masked_loss(model, batch, None)

    def masked_loss(self, model: nn.Module, batch: Tensor, mask: Tensor | None) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss over the predictions for which `mask` [B, T - 1] is not 0, and each (weighted) loss."""
        ids, labels = batch[:, :-1], batch[:, 1:].flatten()
        terms = tuple(_term(spec, self.step, self.steps) for spec in self.losses if spec.name != "hidden_states")
        matched = [spec for spec in self.losses if spec.name == "hidden_states"]
        reads = any(term.reads_teacher or term.reads_top1 for term in terms) or bool(matched)
        targets = self.teacher.targets(ids) if reads else TeacherTargets()
        parts: dict[str, float] = {}

        def forward(read: Tensor) -> Tensor:
            student: Any = model
            with LayerOutputs(student, [own for own, _ in self.layer_pairs] if matched else ()) as outputs:
                # The mask of ones: nothing is padded, so attention may take its causal fast path (see core.measure).
                found = student.get_decoder()(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False)
            total: Tensor | float = 0.0
            if terms:
                hidden, head = found.last_hidden_state.flatten(0, 1), head_of(student)
                total, means = fused_loss(hidden, head, LossMix(terms), targets=targets, labels=labels, mask=mask)
                parts.update(means)
            for spec in matched:
                pairs = self.layer_pairs
                distance = match_layers(student, outputs.flat(), targets.layers, pairs, spec.measure, mask)
                weighted = distance * spec.weight_at(self.step, self.steps)
                parts[spec.name] = weighted.item()
                total = total + weighted
            assert isinstance(total, Tensor)
            return total

        return inside(model, forward, ids), parts
