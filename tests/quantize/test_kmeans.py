from __future__ import annotations

from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dwindle.quantize import kmeans
from dwindle.quantize.bins import sorted_bins
from dwindle.quantize.kmeans import assign_nearest, fit_centres, squared_errors

Values = Any


def error_of(values: Values, clusters: int, **options: Any) -> Any:
    centres = fit_centres(values, clusters, **options)
    return squared_errors(values, centres, assign_nearest(values, centres), options.get("weights"))


def run_cost(values: Values, weights: Values) -> float:
    total = weights.sum()
    return float((weights * (values - (weights * values).sum() / total) ** 2).sum()) if total > 0 else 0.0


def brute_force(values: Values, clusters: int, weights: Values) -> float:
    """Every way to cut the sorted values into runs."""
    order = np.argsort(values)
    v, w = values[order].astype(np.float64), weights[order].astype(np.float64)
    best = np.inf
    for cuts in combinations(range(1, len(v)), min(clusters, len(v)) - 1):
        ends = [0, *cuts, len(v)]
        best = min(best, sum(run_cost(v[a:b], w[a:b]) for a, b in pairwise(ends)))
    return best


def exhaustive_programme(values: Values, clusters: int, weights: Values | None = None) -> float:
    """The O(k n^2) dynamic programme over single values, in float64: the true optimum."""
    order = np.argsort(values)
    v = values[order].astype(np.float64) - values.mean()
    w = np.ones_like(v) if weights is None else weights[order].astype(np.float64)
    n = len(v)
    weight, first, second = (np.concatenate([[0.0], np.cumsum(x)]) for x in (w, w * v, w * v * v))

    def cost(i: Values, j: int) -> Values:
        mass = weight[j] - weight[i]
        moment = first[j] - first[i]
        spread = second[j] - second[i] - np.divide(moment**2, mass, out=np.zeros_like(mass), where=mass > 0)
        return np.maximum(spread, 0.0)

    starts = np.arange(n + 1)
    layer = np.array([cost(starts[:1], j)[0] for j in range(n + 1)])
    for _ in range(clusters - 1):
        layer = np.array([(layer[: j + 1] + cost(starts[: j + 1], j)).min() for j in range(n + 1)])
    return float(layer[n])


def distributions(n: int) -> dict[str, Values]:
    r = np.random.default_rng(7)
    return {
        "normal": r.standard_normal(n) * 0.02,
        "laplace": r.laplace(size=n),
        "student": r.standard_t(2, n),
        "two lumps": np.concatenate([r.standard_normal(n // 2) * 0.1 - 5, r.standard_normal(n - n // 2) * 0.1 + 5]),
        "mostly zero": np.where(r.random(n) < 0.5, 0.0, r.standard_normal(n)),
        "outliers": np.concatenate([r.standard_normal(n - 2), [1000.0, -400.0]]),
        "far from zero": r.standard_normal(n) + 50,
        "rare giants": r.standard_normal(n) * np.where(r.random(n) < 0.003, 8, 1),
    }


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float32, st.integers(1, 9), elements=st.floats(-8, 8, width=16)),
    clusters=st.integers(2, 4),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
def test_no_way_to_cut_small_groups_is_better(values: Values, clusters: int, seed: int, weighted: bool) -> None:
    weights = np.random.default_rng(seed).random(values.shape).astype(np.float32) + 0.1
    if not weighted:
        weights = np.ones_like(weights)
    found = error_of(values[None], clusters, weights=weights[None] if weighted else None)[0]
    assert found <= brute_force(values, clusters, weights) * 1.00001 + 1e-6


@pytest.mark.parametrize("clusters", [2, 3, 8, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_group_of_at_most_256_values_is_solved_exactly(clusters: int, weighted: bool) -> None:
    values = np.stack([v.astype(np.float32) for v in distributions(200).values()])
    weights = np.random.default_rng(1).exponential(size=values.shape).astype(np.float32) if weighted else None
    found = error_of(values, clusters, weights=weights)
    for row, (group, error) in enumerate(zip(values, found, strict=True)):
        optimum = exhaustive_programme(group, clusters, None if weights is None else weights[row])
        assert error <= optimum * 1.0001 + 1e-9


@pytest.mark.parametrize("name", list(distributions(8)))
def test_sorted_groups_stay_within_a_thousandth_of_the_optimum(name: str) -> None:
    values = distributions(800)[name].astype(np.float32)
    for clusters in (4, 16):
        assert error_of(values[None], clusters)[0] <= exhaustive_programme(values, clusters) * 1.001


@pytest.mark.parametrize("name", ["student", "two lumps", "rare giants"])
def test_histogram_groups_stay_within_a_thousandth_of_the_optimum(name: str) -> None:
    values = distributions(4200)[name].astype(np.float32)
    assert error_of(values[None], 16)[0] <= exhaustive_programme(values, 16) * 1.001


def test_histogram_groups_with_weights() -> None:
    values = distributions(4200)["laplace"].astype(np.float32)
    weights = np.random.default_rng(2).exponential(size=values.shape).astype(np.float32)
    assert error_of(values[None], 8, weights=weights[None])[0] <= exhaustive_programme(values, 8, weights) * 1.001


def test_lonely_outliers_do_not_hide_a_better_split() -> None:
    """A cluster more in the tail, one less in the core: the programme must see every outlier as a place to cut."""
    r = np.random.default_rng(0)
    values = r.standard_normal((16, 20_000)) * np.where(r.random((16, 20_000)) < 0.001, 8, 1)
    few, many = (error_of(values.astype(np.float32), 16, bins=bins) for bins in (256, 2048))
    assert (few <= many * 1.001).all()


def test_lloyd_from_quantiles_is_worse() -> None:
    values = distributions(6000)["laplace"].astype(np.float32)
    centres = np.quantile(values, (np.arange(16) + 0.5) / 16)
    for _ in range(100):
        labels = assign_nearest(values[None], centres[None])[0]
        centres = np.array([values[labels == c].mean() if (labels == c).any() else centres[c] for c in range(16)])
    lloyd = squared_errors(values[None], centres[None], assign_nearest(values[None], centres[None]))[0]
    assert error_of(values[None], 16)[0] < 0.99 * lloyd


@pytest.mark.parametrize("clusters", [64, 256])
def test_large_palettes_improve_with_their_size(clusters: int) -> None:
    values = np.random.default_rng(3).standard_normal((2, 20_000)).astype(np.float32)
    panter_dite = 3**0.5 * np.pi / 2 / clusters**2 * 20_000  # the limit for a Gaussian, large k
    assert (error_of(values, clusters) < panter_dite).all()


@pytest.mark.parametrize("n", [5, 300, 5000])
def test_fewer_distinct_values_than_clusters_cost_nothing(n: int) -> None:
    values = np.array([[-1.5, 0.25, 0.25, 4.0, 4.0] * (n // 5)], dtype=np.float32)
    centres = fit_centres(values, 16)
    assert np.all(np.diff(centres) >= 0)
    assert error_of(values, 16)[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [4, 5000])
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_constant_group_repeats_its_value(n: int, value: float) -> None:
    assert fit_centres(np.full((2, n), value, dtype=np.float32), 4) == pytest.approx(np.full((2, 4), value))


def test_weights_of_zero_are_ignored_and_all_zero_means_unweighted() -> None:
    values = np.array([[0.0, 1.0, 9.0, 10.0], [0.0, 1.0, 9.0, 10.0]], dtype=np.float32)
    weights = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    assert fit_centres(values, 2, weights=weights).tolist() == [[0.0, 10.0], [0.5, 9.5]]


def test_groups_do_not_influence_each_other() -> None:
    values = np.random.default_rng(4).standard_normal((9, 700)).astype(np.float32)
    together = fit_centres(values, 8)
    assert np.array_equal(together, np.concatenate([fit_centres(row[None], 8) for row in values]))


@pytest.mark.parametrize("clusters", [2, 16, 32, 64, 256])
def test_every_value_takes_the_nearest_centre(clusters: int) -> None:
    r = np.random.default_rng(5)
    values = r.standard_normal((3, 500)).astype(np.float32)
    centres = np.sort(r.standard_normal((3, clusters)), axis=1)
    nearest = np.abs(values[:, :, None] - centres[:, None]).argmin(axis=2)
    assert np.array_equal(assign_nearest(values, centres), nearest)


def test_equal_centres_are_harmless() -> None:
    centres = np.array([[0.0, 0.0, 1.0, 1.0]])
    found = assign_nearest(np.array([[0.1, 0.9]], dtype=np.float32), centres)
    assert np.take_along_axis(centres, found.astype(int), 1).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("stride", [1, 3])
def test_a_round_finds_the_best_of_all_cuts_within_its_windows(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_REACH", 2)
    values = np.sort(np.random.default_rng(6).exponential(size=40)).astype(np.float32)
    fine = sorted_bins(values[None], None, np.zeros((1, 1)))
    begun = np.array([[0, 9, 18, 31, 40]])
    moved = kmeans._windowed_cuts(fine, begun, np.full((1, 3), stride))[0]

    def cost(cuts: tuple[int, ...]) -> float:
        return sum(run_cost(values[a:b].astype(np.float64), np.ones(b - a)) for a, b in pairwise((0, *cuts, 40)))

    windows = [[cut + stride * step for step in range(-2, 3)] for cut in begun[0, 1:-1].tolist()]
    ways = [cuts for cuts in product(*windows) if list(cuts) == sorted(cuts) and cuts[0] >= 0 and cuts[-1] <= 40]
    assert moved[0] == 0
    assert moved[-1] == 40
    assert tuple(moved[1:-1]) == min(ways, key=cost)


def test_strides_reach_the_allowed_cuts_on_either_side_and_hardly_further() -> None:
    allowed, places = np.array([[0, 10, 47, 50, 100, 101]]), np.array([[0, 1, 2, 4, 5]])
    gaps = [37, 37, 50]  # from 10, 47 and 100 to the farther neighbour
    for stride, gap in zip(kmeans._strides(allowed, places)[0].tolist(), gaps, strict=True):
        assert (stride - 1) * kmeans._REACH < gap <= stride * kmeans._REACH
    assert kmeans._strides(np.array([[0, 1, 2]]), np.array([[0, 1, 2]])).tolist() == [[1]]


@pytest.mark.parametrize("begun", [[0, 150, 200, 250, 600], [0, 100, 300, 598, 600]])
def test_cuts_that_begin_elsewhere_arrive_where_no_round_moves_them(begun: list[int]) -> None:
    values = np.sort(np.random.default_rng(8).laplace(size=600)).astype(np.float32)
    fine = sorted_bins(values[None], None, np.zeros((1, 1)))
    found = kmeans._fine_cuts(fine, np.array([begun]), np.full((1, 3), 40))
    again = kmeans._windowed_cuts(fine, found.copy(), np.ones((1, 3), dtype=np.int64))
    assert np.array_equal(found, again)
    cuts = found[0].tolist()
    cost = sum(run_cost(values[a:b].astype(np.float64), np.ones(b - a)) for a, b in pairwise(cuts))
    assert cost <= exhaustive_programme(values, 4) * 1.001
