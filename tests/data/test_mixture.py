"""Mixtures: exact shares, no repetition that was not allowed, the same order for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.data import DataOptions, build_token_sets, evaluation_set, training_set
from dwindle.data.mixture import chosen_windows, counts_of_shares
from dwindle.errors import DataError, RecipeError


@pytest.mark.parametrize("windows", [[100, 100], [37, 900], [5000, 3]])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.95, 0.05], [2, 7]])
@pytest.mark.parametrize("repeats", [1, 4])
def test_shares_are_those_asked_for_and_one_source_is_used_up(
    windows: list[int], weights: list[float], repeats: int
) -> None:
    counts = counts_of_shares(windows, weights, repeats)
    assert all(count <= repeats * available for count, available in zip(counts, windows, strict=True))
    assert any(count == repeats * available for count, available in zip(counts, windows, strict=True))
    wanted = weights[0] / sum(weights)
    assert abs(counts[0] - wanted * sum(counts)) <= 1  # whole windows


def test_windows_come_again_only_after_all_have_come() -> None:
    chosen = chosen_windows([4, 10], [10, 5], seed=1)
    first, second = chosen[chosen < 4], chosen[chosen >= 4]
    assert sorted(first.bincount(minlength=4).tolist()) == [2, 2, 3, 3]
    assert len(second.unique()) == 5
    assert torch.equal(chosen, chosen_windows([4, 10], [10, 5], seed=1))
    assert not torch.equal(chosen, chosen_windows([4, 10], [10, 5], seed=2))


def texts(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "new.jsonl").write_text("".join(f'{{"text": "alpha beta {n} gamma"}}\n' for n in range(300)))
    (tmp_path / "old.jsonl").write_text("".join(f'{{"text": "one two {n} three"}}\n' for n in range(2000)))
    return str(tmp_path / "new.jsonl"), str(tmp_path / "old.jsonl")


def test_a_training_set_has_its_places_in_their_shares(tmp_path: Path, tiny_tokenizer: Any) -> None:
    places = texts(tmp_path)
    options = DataOptions(train=places, weights=(0.9, 0.1), context=16, calibration_windows=4, evaluation_tokens=200)
    sets = build_token_sets(options, tiny_tokenizer, 64)
    words = [tiny_tokenizer.decode(window) for window in sets.train.ids]
    old = sum("one" in text or "two" in text for text in words)
    assert 0.07 < old / len(words) < 0.14  # windows of both kinds touch at no edge: each is of one place
    assert not sets.train.document_sha256 & sets.evaluation.document_sha256
    everything = build_token_sets(replace(options, weights=None), tiny_tokenizer, 64)
    assert len(everything.train.ids) > 3 * len(sets.train.ids)


def test_a_stage_leaves_out_what_others_measure_on(tmp_path: Path, tiny_tokenizer: Any) -> None:
    places = texts(tmp_path)
    sets = build_token_sets(DataOptions(train=places, context=16, calibration_windows=4), tiny_tokenizer, 64)
    stage = DataOptions(train=places, weights=(1, 1), context=32, most_repeats=3)
    found = training_set(stage, tiny_tokenizer, 64, apart_from=(sets.evaluation, sets.calibration))
    assert found.ids.shape[1] == 33
    assert not found.document_sha256 & (sets.evaluation.document_sha256 | sets.calibration.document_sha256)
    assert found.document_sha256 & sets.train.document_sha256


def test_weights_that_fit_no_places_and_places_used_up_are_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    places = texts(tmp_path)
    with pytest.raises(RecipeError, match=r"weights=\[1.0\] \(needed: a number above 0 for each of 2 places"):
        DataOptions(train=places, weights=(1.0,))
    with pytest.raises(RecipeError, match="most_repeats=0"):
        DataOptions(train=places, most_repeats=0)
    measured = evaluation_set(places[0], tiny_tokenizer)
    with pytest.raises(DataError, match=r"new\.jsonl: all of it serves"):
        training_set(DataOptions(train=places, weights=(1, 1), context=8), tiny_tokenizer, 64, apart_from=(measured,))
