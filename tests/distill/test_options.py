from __future__ import annotations

from typing import Any

import pytest

from dwindle.distill import DistillOptions, LossSpec
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
        (["mse"], r"loss 'mse' is not one of forward_kl, top1_blend, label_cross_entropy\.$"),
        (["top1_blend=1.5"], "teacher's share, 0 to 1"),
        (["forward_kl=0"], "above 0"),
        (["forward_kl=much"], "no number"),
        ([{"name": "forward_kl", "temprature": 2}], "unknown keys temprature"),
        ([{"weight": 2}], "no name"),
        ([{"name": "forward_kl", "temperature": 0}], "temperature=0"),
        ([{"name": "top1_blend", "weight": 0.9, "temperature": 2}], "only forward_kl has a temperature"),
        ([], "at least one"),
        (["forward_kl", "forward_kl"], "each once"),
    ],
)
def test_wrong_losses_are_refused(losses: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DistillOptions(losses=losses)


def test_the_loops_own_checks_hold() -> None:
    with pytest.raises(RecipeError, match="batch_size=0"):
        DistillOptions(batch_size=0)
