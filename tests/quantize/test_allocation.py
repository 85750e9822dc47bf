from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.errors import RecipeError
from dwindle.quantize.allocation import Choice, Target, allocate, reachable_bits

CHOICES = st.lists(
    st.tuples(st.integers(1, 40), st.floats(-2, 2, allow_nan=False).map(lambda cost: round(cost, 2))),
    min_size=1, max_size=5,
)  # fmt: skip


def bits_and_cost(chosen: dict[str, Choice]) -> tuple[int, float]:
    return sum(c.stored_bits for c in chosen.values()), sum(c.cost for c in chosen.values())


@settings(max_examples=200, deadline=None)
@given(layers=st.lists(CHOICES, min_size=1, max_size=5), share=st.floats(0, 1))
def test_no_allocation_is_better_than_brute_force_finds(layers: list[list[tuple[int, float]]], share: float) -> None:
    options = {str(i): [Choice(bits, cost, n, 1) for n, (bits, cost) in enumerate(layer)]
               for i, layer in enumerate(layers)}  # fmt: skip
    least, most = reachable_bits(options)
    budget = least + int(share * (most - least))
    costs = [
        sum(c.cost for c in taken)
        for taken in itertools.product(*options.values())
        if sum(c.stored_bits for c in taken) <= budget
    ]
    bits, cost = bits_and_cost(allocate(options, budget))
    assert bits <= budget
    assert cost == pytest.approx(min(costs), abs=1e-9)


def transformer(blocks: int, choices: int, seed: int = 0) -> dict[str, list[Choice]]:
    random = np.random.default_rng(seed)
    shapes = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
    options = {}
    for number, (rows, inputs) in enumerate(shapes * blocks):
        scale = float(np.exp(random.normal()))
        options[str(number)] = [
            Choice(
                rows * inputs * b + rows // 16 * 2**b * 16, scale * 4.0**-b * float(np.exp(random.normal() / 3)), b, 16
            )
            for b in (2, 3, 4, 6, 8, 1, 5, 7)[:choices]
        ]
    return options


@pytest.mark.parametrize(("blocks", "choices"), [(22, 5), (100, 8)])
def test_large_models_take_little_time_and_use_their_budget(blocks: int, choices: int) -> None:
    options = transformer(blocks, choices)
    least, most = reachable_bits(options)
    budget = (least + most) // 3
    start = time.perf_counter()
    bits, _ = bits_and_cost(allocate(options, budget))
    assert time.perf_counter() - start < 10
    assert 0.999 * budget < bits <= budget


def test_the_cost_falls_with_the_budget_and_beats_uniform_bits() -> None:
    options = transformer(3, 5)
    costs = []
    for width in (2, 3, 4, 6, 8):
        uniform = {name: next(c for c in found if c.bits == width) for name, found in options.items()}
        budget, cost = bits_and_cost(uniform)
        costs.append(bits_and_cost(allocate(options, budget))[1])
        assert costs[-1] <= cost
    assert costs == sorted(costs, reverse=True)


def test_ends_of_what_is_reachable() -> None:
    options = transformer(2, 5)
    least, most = reachable_bits(options)
    assert {c.bits for c in allocate(options, least).values()} == {2}
    assert bits_and_cost(allocate(options, 10 * most))[0] <= most


def test_equal_costs_take_fewer_bits() -> None:
    assert allocate({"a": [Choice(4, 1.0, 4, 1), Choice(2, 1.0, 2, 1)]}, 8)["a"].bits == 2


def test_budgets_of_targets() -> None:
    assert Target(weights=10, bits_per_weight=3.3).budget_bits == 33
    assert Target(weights=10, model_bytes=100, other_bits=300).budget_bits == 500


def test_a_target_below_the_least_names_the_range_and_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"target_bits_per_weight=1\.5: .* least is 2\.034 and the most 8\.5\. Set "
                                          r"target_bits_per_weight=2\.034 or more"):  # fmt: skip
        Target(weights=1_000_000, bits_per_weight=1.5).require_reachable(2_033_900, 8_500_000)
    with pytest.raises(RecipeError, match=r"target_bytes=100: .* least is 1,251 and the most 2,250, of which 1,000 are "
                                          r"not in these linears\. Set target_bytes=1251 or more"):  # fmt: skip
        Target(weights=1000, model_bytes=100, other_bits=8000).require_reachable(2001, 10_000)


def test_the_nearest_target_is_reachable() -> None:
    for least in range(2000, 2100, 7):
        written = Target(weights=997, bits_per_weight=1.0)._written(least)
        Target(weights=997, bits_per_weight=float(written)).require_reachable(least, 8000)
