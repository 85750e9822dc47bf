from __future__ import annotations

from fractions import Fraction

import pytest

from dwindle.arithmetic import claimed_steps, number, value


def test_sums_are_exact() -> None:
    assert value("0.1 + 0.2") == Fraction(3, 10)
    assert value("$1,000 × 3 ÷ 4") == 750
    assert value("50% * 20 - -2**3") == 18
    assert value("3 x (4 + 1)") == 15


@pytest.mark.parametrize("bad", ["__import__('os')", "a + 1", "2 ** 99999", "9 ** 9 ** 9 ** 9", "1 / 0", "1e999", "(" * 150,
                                 "1 +", "1" * 300, "[1]", "1 if 1 else 2", "True + 1", "2 ** 0.5"])  # fmt: skip
def test_nothing_else_is_computed(bad: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        value(bad)


def test_a_number_is_only_a_number() -> None:
    assert number("-1,042.50") == Fraction(-2085, 2)
    with pytest.raises(ValueError, match="no number"):
        number("4 2")


def test_steps_are_found_and_dates_and_code_are_not() -> None:
    assert claimed_steps("(2+3)*4=20; 10-2-3=5") == [("(2+3)*4", "20"), ("10-2-3", "5")]
    assert claimed_steps("x = 3; f(2+3) = 5; a1+2=3; 3 = 3; 5 + 5") == []


def test_a_long_chain_without_an_end_is_soon_given_up() -> None:
    assert claimed_steps("1 + " * 20_000) == []
