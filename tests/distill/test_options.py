from __future__ import annotations

from typing import Any

import pytest

from dwindle.distill import DistillOptions, LossSpec
from dwindle.distill.loss_spec import WeightSchedule
from dwindle.errors import RecipeError
from dwindle.train_options import TrainOptions


def test_losses_come_in_every_spelling() -> None:
    mapped: Any = [{"name": "top1_blend", "weight": 0.9}, "forward_kl", LossSpec("label_cross_entropy", 0.5)]
    assert DistillOptions(losses=mapped).losses == (
        LossSpec("top1_blend", 0.9),
        LossSpec("forward_kl", 1.0),
        LossSpec("label_cross_entropy", 0.5),
    )
    named: Any = "top1_blend=0.8"
    assert DistillOptions(losses=named).losses == (LossSpec("top1_blend", 0.8),)


def test_training_options_pass_through() -> None:
    options = DistillOptions(steps=7, batch_size=4, learning_rate=3e-4)
    assert options.training == TrainOptions(steps=7, batch_size=4, learning_rate=3e-4)
    assert type(options.training) is TrainOptions


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (["forward_kll"], r"Did you mean 'forward_kl'\?"),
        (["mse"], r"loss 'mse' is not one of forward_kl, .*, hidden_states\.$"),
        (["top1_blend=1.5"], "teacher's share, 0 to 1"),
        (["forward_kl=0"], "above 0"),
        (["forward_kl=much"], "no number"),
        ([{"name": "forward_kl", "temprature": 2}], "unknown keys temprature"),
        ([{"weight": 2}], "no name"),
        ([{"name": "forward_kl", "temperature": 0}], "temperature=0"),
        ([{"name": "top1_blend", "weight": 0.9, "temperature": 2}], "only forward_kl and .* and taid read it"),
        ([], "at least one"),
        (["forward_kl", "forward_kl"], "each once"),
        ([{"name": "forward_kl", "beta": 0.3}], r"beta=0.3 \(needed: 0.5, only jsd read it"),
        ([{"name": "jsd", "beta": 1.5}], "beta=1.5"),
        ([{"name": "skew_kl", "alpha": 1}], "alpha=1"),
        ([{"name": "top_k", "k": 0}], "k=0"),
        ([{"name": "top_k", "k": "many"}], "k='many'"),
        ([{"name": "taid", "t_start": -1}], "t_start=-1"),
        ([{"name": "hidden_states", "measure": "l1"}], "measure='l1'"),
        ([{"name": "hidden_states", "layers": [[0, 1]]}], "counted from 1"),
        ([{"name": "hidden_states", "layers": 3}], "pairs of a student's"),
        ([{"name": "jsd", "schedule": {"warmup": 0.7, "decay": 0.5}}], "warmup . decay=1.2"),
        ([{"name": "jsd", "schedule": {"warmup": 0.1, "stable": 0.2, "decay": 0.5}}], r"=0.8 \(needed: 1\)"),
        ([{"name": "jsd", "schedule": {"warmup": -1}}], "warmup=-1"),
        ([{"name": "jsd", "schedule": {"warmup": 0.1, "start": -1}}], "start=-1"),
        ([{"name": "jsd", "schedule": {"warmpu": 0.1}}], "unknown keys warmpu in schedule"),
        ([{"name": "top1_blend", "weight": 0.9, "schedule": {"warmup": 0.1, "start": 2}}], "at every step"),
    ],
)
def test_wrong_losses_are_refused(losses: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DistillOptions(losses=losses)


def test_the_loops_own_checks_hold() -> None:
    with pytest.raises(RecipeError, match="batch_size=0"):
        DistillOptions(batch_size=0)


def test_a_weight_follows_its_schedule() -> None:
    kl = LossSpec.of({"name": "forward_kl", "weight": 0.9, "schedule": {"warmup": 0.25, "stable": 0.5, "decay": 0.25}})
    label = LossSpec("label_cross_entropy", 0.1, schedule=WeightSchedule(0.25, decay=0.25, start=10, end=10))
    weights = [kl.weight_at(step, 8) for step in range(8)]
    assert weights == pytest.approx([0, 0.45, 0.9, 0.9, 0.9, 0.9, 0.9, 0.45])
    assert [label.weight_at(step, 8) for step in range(8)] == pytest.approx([1 - weight for weight in weights])
    assert LossSpec("jsd", 0.3).weight_at(5, 8) == 0.3


def test_the_moving_target_arrives_at_the_last_step() -> None:
    spec = LossSpec("taid", t_start=0.4)
    assert [spec.teacher_part_at(step, 4) for step in range(4)] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert spec.teacher_part_at(0, 1) == 1.0
