from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.distill import DistillObjective, DistillOptions, LiveTeacher, LossSpec, run
from dwindle.distill.teacher_signal import TeacherTargets
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256
from tests.conftest import TINY_FAMILIES

sys.path.insert(0, str(Path(__file__).parent))
from naive_losses import naive_rows

MIX = (LossSpec("jsd", 0.5, temperature=2.0, beta=0.3), LossSpec("top_k", 0.3, k=5), LossSpec("taid", 0.2, t_start=0.4),
       LossSpec("label_cross_entropy", 0.1))  # fmt: skip
GIVEN = {"jsd": {"beta": 0.3, "temperature": 2.0}, "top_k": {"k": 5}, "label_cross_entropy": {}}


def windows(bundle: Any, count: int = 12, tokens: int = 13) -> TokenSet:
    ids = torch.randint(0, 250, (count, tokens), generator=torch.Generator().manual_seed(3))
    return TokenSet(ids, "train", "random", str(count), 1, encoding_sha256(bundle.tokenizer))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_values_and_gradients_are_those_of_whole_logits(family: str, tiny_bundle: Any) -> None:
    teacher, student = tiny_bundle(family, seed=1), tiny_bundle(family, seed=2, intermediate_size=32)
    batch, mask = windows(student).ids[:3], torch.ones(3, 12)
    mask[0, :5] = 0
    objective = DistillObjective(MIX, LiveTeacher(teacher)).at(5, 11)
    loss, parts = objective.masked_loss(student.model, batch, mask)
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.model.named_parameters()}
    student.model.zero_grad()
    with torch.no_grad():
        p = teacher.model(batch[:, :-1]).logits.flatten(0, 1).double()
    q = student.model(batch[:, :-1]).logits.flatten(0, 1).double()
    expected = torch.zeros((), dtype=torch.float64)
    for spec in MIX:
        given = GIVEN.get(spec.name, {"t": 0.7})
        expected = (
            expected
            + spec.weight * naive_rows(spec.name, q, p, batch[:, 1:].flatten(), **given)[mask.flatten() != 0].mean()
        )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sum(parts.values()) == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in student.model.named_parameters():
        assert parameter.grad is not None
        assert float((found[name] - parameter.grad).norm()) <= 1e-4 * float(parameter.grad.norm()) + 1e-8, name


def test_labels_alone_need_no_teacher(tiny_bundle: Any) -> None:
    class Silent:
        def targets(self, ids: Tensor) -> TeacherTargets:
            raise AssertionError("asked")

    student = tiny_bundle()
    objective = DistillObjective((LossSpec("label_cross_entropy"), LossSpec("top1_blend", 0.0)), Silent())
    loss, parts = objective.loss(student.model, windows(student).ids[:2])
    assert parts["label_cross_entropy"] == pytest.approx(parts["top1_blend"])
    assert loss.item() == pytest.approx(2 * parts["top1_blend"])


def test_the_model_is_as_it_was_after_a_loss(tiny_bundle: Any) -> None:
    student, batch = tiny_bundle(), windows(tiny_bundle()).ids[:2]
    objective = DistillObjective((LossSpec("label_cross_entropy"),), LiveTeacher(student))
    own = student.model.forward
    objective.loss(student.model, batch)
    assert "forward" not in student.model.__dict__
    student.model.forward = own  # as libraries do that wrap a model
    try:
        objective.loss(student.model, batch)
        assert student.model.__dict__["forward"] is own
    finally:
        del student.model.forward


def test_schedules_and_moving_targets_resume_exactly(tiny_bundle: Any, tmp_path: Path) -> None:
    teacher, student = tiny_bundle(seed=1), tiny_bundle(seed=2)
    mix: Any = [
        {"name": "taid", "t_start": 0.2},
        {"name": "top1_blend", "weight": 0.9, "schedule": {"warmup": 0.5, "decay": 0.2}},
        {"name": "reverse_kl", "weight": 0.5, "schedule": {"decay": 1.0}},
    ]
    options = DistillOptions(losses=mix, steps=6, batch_size=4, checkpoint_every=2, log_every=1)
    whole, record = run(student, options, teacher=teacher, train=windows(student))

    def stop(line: Any) -> None:
        if line.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student, options, teacher=teacher, train=windows(student), folder=tmp_path / "run", on_step=stop)
    resumed, again = run(student, options, teacher=teacher, train=windows(student), folder=tmp_path / "run")
    assert resumed.content_sha256 == whole.content_sha256
    assert again.details["last_loss"] == record.details["last_loss"]
    taid = [line["taid"] for line in record.details["history"]]
    assert taid[0] < taid[-1]  # the target moved away from the student


def test_bfloat16_autocast_trains(tiny_bundle: Any) -> None:
    teacher, student = tiny_bundle(seed=1), tiny_bundle(seed=2)
    losses: Any = ["forward_kl", "top1_blend=0.9"]
    options = DistillOptions(losses=losses, steps=12, batch_size=6, learning_rate=5e-3, precision="bf16")
    _, record = run(student, options, teacher=teacher, train=windows(student))
    assert record.details["last_loss"] < record.details["first_loss"]
