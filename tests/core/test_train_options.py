from __future__ import annotations

import pytest
import torch

from dwindle.data_order import mixed_seed, windows_of_step
from dwindle.errors import RecipeError
from dwindle.train import TrainOptions


def test_every_wrong_option_is_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        TrainOptions(
            tokens=0, steps=1, batch_size=0, learning_rate=0.0, betas=(0.9, 1.0), clip_norm=0.0, weight_decay=-1.0,
            precision="fp16", schedule="linear", final_share=2.0, trackers=("comet", "wandb"),
        )  # type: ignore[arg-type]  # fmt: skip
    for part in (
        "tokens=0", "tokens=0 and steps=1", "batch_size=0", "learning_rate=0.0", "betas=(0.9, 1.0)", "clip_norm=0.0",
        "weight_decay=-1.0", "precision='fp16'", "schedule='linear'", "final_share=2.0",
        "trackers=comet (needed: tensorboard, wandb, trackio)",
    ):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"batch_size": 6, "gradient_accumulation": 4},
            r"batch_size=6 \(needed: a multiple of .*=4",
        ),
        ({"warmup_share": 0.6, "decay_share": 0.6}, r"warmup_share \+ decay_share=1.2"),
        ({"steps": 2.5}, r"steps=2.5 \(needed: a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"divergence_margin": 0.0}, r"divergence_margin=0.0 \(needed: more than 0"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
    ],
)
def test_options_that_do_not_go_together(values: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainOptions(**values)  # type: ignore[arg-type]


def test_steps_from_tokens_or_one_pass() -> None:
    assert TrainOptions(steps=7).total_steps(100, 64) == 7
    assert TrainOptions(tokens=64 * 32 * 3 + 1).total_steps(100, 64) == 4
    assert TrainOptions(batch_size=32).total_steps(100, 64) == 4


def test_each_window_comes_once_per_epoch_in_another_order() -> None:
    order = torch.cat([windows_of_step(10, 4, seed=5, step=step) for step in range(5)]).tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order[:4] != windows_of_step(10, 4, seed=6, step=0).tolist()


def test_a_batch_larger_than_the_set_reads_several_epochs() -> None:
    assert sorted(windows_of_step(3, 7, seed=0, step=0).tolist()) in (
        [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 2],
    )  # fmt: skip


def test_the_order_is_fixed() -> None:
    """A golden value: another order would make published training runs irreproducible."""
    assert windows_of_step(10, 4, seed=0, step=1).tolist() == [4, 8, 3, 0]
    assert mixed_seed(0, 1) == 8613600020916457518
