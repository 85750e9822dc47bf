from __future__ import annotations

import itertools

import pytest

from dwindle.errors import RecipeError
from dwindle.schedules import Cosine, WarmupStableDecay, schedule_of


def test_wsd_rises_stays_and_falls() -> None:
    scales = [WarmupStableDecay(0.1, 0.2, 0.1).scale(step, 100) for step in range(100)]
    assert scales[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scales[10:81] == [1.0] * 71
    assert all(a > b for a, b in itertools.pairwise(scales[80:]))
    assert scales[85] == pytest.approx(1 - 0.9 * (5 / 20) ** 0.5)
    assert 0.1 < scales[-1] < 0.15


def test_cosine_is_half_way_in_the_middle() -> None:
    cosine = Cosine(0.0, 0.2)
    assert cosine.scale(0, 100) == 1.0
    assert cosine.scale(50, 100) == pytest.approx(0.6)
    assert cosine.scale(100, 100) == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["wsd", "cosine"])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (0.5, 0.5), (0.02, 0.2), (1.0, 0.0)])
def test_short_runs_have_a_rate_at_every_step(name: str, steps: int, warmup: float, decay: float) -> None:
    schedule = schedule_of(name, warmup, decay, 0.0)
    assert all(0 < schedule.scale(step, steps) <= 1 for step in range(steps))


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(RecipeError, match=r"schedule='linear' is not known\. Use 'wsd' or 'cosine'"):
        schedule_of("linear", 0.1, 0.1, 0.0)
