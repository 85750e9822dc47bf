"""Sampling: greedy at zero, the right tokens kept, drawn in their shares, the model's own log probability told."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dwindle.errors import RecipeError
from dwindle.sampling import SamplingOptions, drawn

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log() + 3.0


def shares(options: SamplingOptions, draws: int = 4000) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    found = Counter(drawn(LOGITS, options, generator)[0] for _ in range(draws))
    return {token: found[token] / draws for token in sorted(found)}


def test_temperature_zero_is_greedy_and_tells_the_models_own_probability() -> None:
    token, log_p = drawn(LOGITS, SamplingOptions(temperature=0.0), torch.Generator())
    assert token == 0
    assert log_p == pytest.approx(-0.9163, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (SamplingOptions(temperature=1.0), {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}),
        (SamplingOptions(temperature=1.0, top_k=2), {0: 4 / 7, 1: 3 / 7}),
        (SamplingOptions(temperature=1.0, top_p=0.75), {0: 4 / 9, 1: 3 / 9, 2: 2 / 9}),
        (SamplingOptions(temperature=1.0, top_p=0.8, top_k=3), {0: 4 / 9, 1: 3 / 9, 2: 2 / 9}),
        (SamplingOptions(temperature=1.0, top_p=0.01), {0: 1.0}),
        (SamplingOptions(temperature=0.5), {0: 16 / 30, 1: 9 / 30, 2: 4 / 30, 3: 1 / 30}),
    ],
)
def test_tokens_are_drawn_in_their_shares(options: SamplingOptions, wanted: dict[int, float]) -> None:
    found = shares(options)
    assert found.keys() == wanted.keys()
    for token, share in wanted.items():
        assert found[token] == pytest.approx(share, abs=0.03)


def test_a_drawn_tokens_probability_is_that_at_temperature_one() -> None:
    token, log_p = drawn(LOGITS, SamplingOptions(temperature=5.0, top_k=3), torch.Generator().manual_seed(1))
    assert log_p == pytest.approx(float(LOGITS.log_softmax(-1)[token]), abs=1e-6)


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        SamplingOptions(temperature=-1.0, top_k=0, top_p=1.5, max_tokens=0)
    for name in ("temperature=-1.0", "top_k=0", "top_p=1.5", "max_tokens=0"):
        assert name in str(caught.value)
