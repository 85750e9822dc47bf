from __future__ import annotations

from typing import Any

import pytest

from dwindle.devices.quantity import TRUST_SPREAD, Quantity, read_quantity

GOOD = {"value": 2, "unit": "GB", "source": "a test", "date": "2026-11", "trust": "derived"}


def read(data: Any, dimension: Any = "memory") -> tuple[Quantity | None, list[str]]:
    problems: list[str] = []
    return read_quantity(data, "it", dimension, problems), problems


@pytest.mark.parametrize(("unit", "base"), [("bytes", 2), ("MB", 2e6), ("GB", 2e9), ("GiB", 2 * 2**30)])
def test_units_become_bytes(unit: str, base: float) -> None:
    quantity, problems = read(GOOD | {"unit": unit})
    assert quantity is not None
    assert not problems
    assert quantity.at() == base


def test_range_comes_from_trust_unless_stated() -> None:
    quantity, _ = read(GOOD)
    assert quantity is not None
    assert quantity.at("low") == pytest.approx(2e9 * (1 - TRUST_SPREAD["derived"]))
    stated, _ = read(GOOD | {"low": 1.9, "high": 3})
    assert stated is not None
    assert (stated.at("low"), stated.at("high")) == (1.9e9, 3e9)
    assert "derived: a test, 2026-11" in str(stated)


def test_a_share_never_passes_one() -> None:
    share, _ = read(GOOD | {"value": 0.9, "unit": "share"}, "share")
    assert share is not None
    assert share.at("high") == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": "GB/s"}, "'GB/s' is no unit of memory"),
        ({"value": "8"}, "not a finite number"),
        ({"value": float("nan")}, "not a finite number"),
        ({"value": -1}, "not a finite number"),
        ({"value": True}, "not a finite number"),
        ({"value": 0}, "more than 0"),
        ({"low": 3}, "low <= value <= high"),
        ({"high": 1}, "low <= value <= high"),
        ({"trust": "rumour"}, "'rumour' is none of"),
        ({"source": " "}, "where the number comes from"),
        ({"date": "last year"}, "not YYYY-MM"),
        ({"sauce": "x"}, "did you mean 'source'"),
    ],
)
def test_faults_are_named(change: dict[str, Any], said: str) -> None:
    quantity, problems = read(GOOD | change)
    assert quantity is None
    assert said in problems[0]


def test_no_bare_numbers_and_no_share_above_one() -> None:
    assert "needed an object" in read(8)[1][0]
    assert "a share is at most 1" in read(GOOD | {"unit": "share"}, "share")[1][0]


def test_all_faults_at_once() -> None:
    _, problems = read({"value": "x", "unit": "parsec", "trust": "no"})
    assert len(problems) == 5
