"""Options from YAML values: conversions, and every mistake named."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from dwindle.errors import RecipeError
from dwindle.pipeline.option_values import fill, parse_count


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Sample:
    tokens: int
    parts: tuple[Part, ...] = ()
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    maybe: int | None = None
    table: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise RecipeError(f"tokens={self.tokens} is negative")


def made(values: Mapping[str, object]) -> tuple[Sample | None, list[str]]:
    problems: list[str] = []
    return fill(Sample, values, "sample", problems), problems


def test_values_are_converted_to_field_types() -> None:
    sample, problems = made(
        {"tokens": "20M", "parts": [{"name": "x", "weight": "3e-1"}], "names": "one", "maybe": None}
    )
    assert problems == []
    assert sample == Sample(tokens=20_000_000, parts=(Part("x", 0.3),), names=("one",))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"tokens": 1, "tokns": 2}, "did you mean 'tokens'?"),
        ({}, "sample.tokens is missing"),
        ({"tokens": "many"}, "'many' is no number"),
        ({"tokens": 1.5}, "no whole number"),
        ({"tokens": True}, "no number"),
        ({"tokens": 1, "kind": "c"}, "'c' is not one of a, b"),
        ({"tokens": 1, "flag": "yes"}, "not true or false"),
        ({"tokens": 1, "names": [1]}, "1 is no text"),
        ({"tokens": 1, "names": datetime.date(2026, 1, 2)}, "is no text"),
        ({"tokens": 1, "table": [1]}, "no mapping"),
        ({"tokens": 1, "parts": [{"weight": 1}]}, "sample.parts[0].name is missing"),
        ({"tokens": -1}, "tokens=-1 is negative"),
        ({"tokens": 1, "maybe": "x"}, "'x' is no number"),
    ],
)
def test_mistakes_are_named(values: Mapping[str, object], told: str) -> None:
    sample, problems = made(values)
    assert sample is None
    assert told in "\n".join(problems)


def test_all_mistakes_come_at_once() -> None:
    _, problems = made({"tokens": "x", "kind": "c", "other": 1})
    assert len(problems) == 3


@pytest.mark.parametrize("bad", ["", "M", "1.2.3", "12 apples", None, [1]])
def test_counts_refuse_nonsense(bad: object) -> None:
    with pytest.raises(ValueError, match="no number"):
        parse_count(bad)


@pytest.mark.parametrize(
    ("text", "number"), [("64", 64), ("1_000", 1000), ("3e-4", 3e-4), ("1.5GB", 1.5e9), ("3B", 3e9)]
)
def test_counts(text: str, number: float) -> None:
    assert parse_count(text) == number
