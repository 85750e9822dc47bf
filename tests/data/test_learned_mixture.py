"""Shares that follow the excess loss: the formula, the order of windows, and a state that goes on as if never stopped."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwindle.data import DataOptions, training_set
from dwindle.data.learned_mixture import LearnedOrder
from dwindle.errors import DataError, RecipeError
from dwindle.token_set import Mixture
from dwindle.train import NextToken, TrainOptions, train

MIXTURE = Mixture(("a", "b", "c"), (10, 30, 5), (2.0, 1.0, 1.0), 4, (torch.zeros(1, 2),) * 3)
MODEL = nn.Module()


def order(losses: list[float] | None = None, seed: int = 0) -> LearnedOrder:
    return LearnedOrder(MIXTURE, seed, lambda model: losses or [2.0, 1.5, 0.5], [1.5, 1.5, 1.0])


def test_a_batch_has_each_places_share_and_no_window_twice_before_all() -> None:
    one = order()
    batches = [one.windows(8, step).tolist() for step in range(5)]
    seen = [window for batch in batches for window in batch]
    assert Counter("a" if w < 10 else "b" if w < 40 else "c" for w in seen) == {"a": 20, "b": 10, "c": 10}
    counts = Counter(seen)
    assert all(counts[w] == 2 for w in [*range(10), *range(40, 45)])
    assert all(counts[w] <= 1 for w in range(10, 40))
    assert one.drawn == [20, 10, 10]


def test_uneven_shares_are_met_over_many_steps() -> None:
    one = order()
    one.weights = [0.13, 0.57, 0.30]
    for step in range(400):
        assert len(one.windows(3, step)) == 3
    assert [n / 1200 for n in one.drawn] == pytest.approx(one.weights, abs=0.004)


def test_weights_grow_with_what_is_left_to_learn() -> None:
    one = order()
    assert [step for step in range(1, 13) if one.due(step)] == [4, 8, 12]
    one.update(MODEL, 4)
    grown = [0.5 * math.exp(0.5), 0.25, 0.25]  # b has caught up, c is ahead of its reference
    assert one.weights == pytest.approx([g / sum(grown) for g in grown])
    one.update(MODEL, 8)
    assert one.weights[0] / one.weights[1] == pytest.approx(2 * math.e)
    assert [entry["step"] for entry in one.history] == [4, 8]
    assert one.to_json()["passes"] == [0, 0, 0]


def test_a_restored_order_goes_on_bit_for_bit() -> None:
    whole, first = order(), order()
    for step in range(9):
        whole.windows(8, step)
        first.windows(8, step)
        if whole.due(step + 1):
            whole.update(MODEL, step + 1)
            first.update(MODEL, step + 1)
    resumed = order()
    resumed.restore(json.loads(json.dumps(first.state())))
    for step in range(9, 20):
        assert resumed.windows(8, step).tolist() == whole.windows(8, step).tolist()
    assert resumed.state() == whole.state()
    assert order(seed=1).windows(8, 0).tolist() != order(seed=0).windows(8, 0).tolist()


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    for name, word in (("a", "cat "), ("b", "dog ")):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{word}{i} " * 6 for i in range(40)))
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_places_stand_end_to_end_with_windows_held_out(places: list[str], tiny_tokenizer: Any) -> None:
    options = DataOptions(tuple(places), weights=(3, 1), learn_weights_every=5, held_out_windows=2, context=16)
    made = training_set(options, tiny_tokenizer, 64)
    mixture = made.mixture
    assert mixture is not None
    assert mixture.names == tuple(places)
    assert sum(mixture.windows) == len(made.ids)
    assert all(held.shape == (2, 17) for held in mixture.held_out)
    texts = {tuple(row.tolist()) for row in made.ids}
    assert not any(tuple(row.tolist()) in texts for held in mixture.held_out for row in held)
    other = training_set(
        DataOptions(tuple(places), weights=(1, 1), learn_weights_every=5, held_out_windows=2, context=16),
        tiny_tokenizer,
        64,
    )
    assert torch.equal(other.ids, made.ids)
    assert other.sha256 != made.sha256


def test_what_cannot_be_learned_is_refused(places: list[str], tiny_tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="learn_weights_every without weights"):
        DataOptions(tuple(places), learn_weights_every=5)
    with pytest.raises(RecipeError, match="held_out_windows=0"):
        DataOptions(tuple(places), weights=(1, 1), learn_weights_every=5, held_out_windows=0)
    many = DataOptions(tuple(places), weights=(1, 1), learn_weights_every=5, held_out_windows=9999, context=16)
    with pytest.raises(DataError, match=r"more than 9999 windows of 17 tokens from each place: .*a\.txt has"):
        training_set(many, tiny_tokenizer, 64)
    made = training_set(
        DataOptions(tuple(places), weights=(1, 1), learn_weights_every=5, context=16), tiny_tokenizer, 64
    )
    with pytest.raises(RecipeError, match="only distillation does that"):
        train(nn.Linear(2, 2), NextToken(), made, TrainOptions(steps=1, batch_size=2))
