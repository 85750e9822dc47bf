from __future__ import annotations

import math

import pytest

from dwindle.data.curation.keep_range import KeepRange, quantile
from dwindle.errors import RecipeError


def test_a_range_is_read_and_applied() -> None:
    assert KeepRange.of(" 1.5 .. 4 ") == KeepRange(1.5, 4.0)
    assert KeepRange.of("-1..").scores([]) == (-1.0, math.inf)
    assert KeepRange.of("..1e-3") == KeepRange(None, 0.001)
    low, high = KeepRange.of("10%..90%").scores(list(map(float, range(11))))
    assert (low, high) == pytest.approx((1.0, 9.0))
    assert math.isnan(quantile([], 0.5))


@pytest.mark.parametrize(("text", "said"), [
    ("..", "neither end"), ("4..1", "is empty"), ("1..50%", "mixes"), ("a..b", "needed: LOW..HIGH"),
    ("5", "needed: LOW..HIGH"), ("5%..120%", "between 0% and 100%"), ("1.2.3..4", "needed: LOW..HIGH"),
])  # fmt: skip
def test_what_is_no_range_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        KeepRange.of(text)
