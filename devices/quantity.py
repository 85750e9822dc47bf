"""A number that says where it comes from: value, unit, source, date, trust. Torch-free.

Every number in a device profile is one of these. A unit belongs to a dimension (memory, bandwidth, compute, share,
time); arithmetic happens in base units (bytes, bytes/s, FLOP/s, 1, seconds), so a profile may write 3.5 GB or
3,500 MB, and GB = 10^9 bytes while GiB = 2^30.

`trust` says how the number is known, and gives the spread an estimate inherits when the profile states no `low`
and `high` of its own:

    measured    run for this project on the device itself                   +- 10 %
    primary     the maker's or the authors' own text                        +- 10 %
    secondary   others' summaries of it                                     +- 20 %
    derived     arithmetic on published numbers                             +- 25 %
    unverified  repeated in many places, found in no primary one            +- 35 %

The spreads are our judgement (the derived one is the scatter of bandwidth shares over devices of one kind), not a
confidence interval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dwindle.errors import did_you_mean

__all__ = ["DIMENSIONS", "TRUST_SPREAD", "Dimension", "Quantity", "Side", "Trust", "read_quantity"]

Trust = Literal["measured", "primary", "secondary", "derived", "unverified"]
Dimension = Literal["memory", "bandwidth", "compute", "share", "time"]
Side = Literal["low", "value", "high"]

TRUST_SPREAD: Mapping[str, float] = {
    "measured": 0.10,
    "primary": 0.10,
    "secondary": 0.20,
    "derived": 0.25,
    "unverified": 0.35,
}

DIMENSIONS: Mapping[Dimension, Mapping[str, float]] = {
    "memory": {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bandwidth": {"MB/s": 1e6, "GB/s": 1e9},
    "compute": {"GFLOP/s": 1e9, "TFLOP/s": 1e12},
    "share": {"share": 1.0},
    "time": {"s": 1.0, "ms": 1e-3},
}
"""The units of each dimension and what one of them is in base units."""

_KEYS = ("value", "unit", "source", "date", "trust", "low", "high")
_REQUIRED = ("value", "unit", "source", "date", "trust")
_DATE = re.compile(r"\d{4}-\d{2}(-\d{2})?")


@dataclass(frozen=True)
class Quantity:
    """One sourced number. `value`, `low` and `high` are in `unit`; `at()` gives base units.

    >>> bandwidth = Quantity(51.2, "GB/s", "bandwidth", "example", "2026-11", "secondary")
    >>> f"{bandwidth.at('value'):.4g} {bandwidth.at('low'):.4g} {bandwidth.at('high'):.4g}"
    '5.12e+10 4.096e+10 6.144e+10'
    """

    value: float
    unit: str
    dimension: Dimension
    source: str
    date: str
    trust: Trust
    low: float | None = None
    high: float | None = None

    def at(self, side: Side = "value") -> float:
        """Return the number in base units, or an end of its range (a share never passes 1)."""
        factor = DIMENSIONS[self.dimension][self.unit]
        spread = TRUST_SPREAD[self.trust]
        low = self.value * (1 - spread) if self.low is None else self.low
        high = self.value * (1 + spread) if self.high is None else self.high
        number = {"low": low, "value": self.value, "high": high}[side] * factor
        return min(number, 1.0) if self.dimension == "share" else number

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit} ({self.trust}: {self.source}, {self.date})"


def read_quantity(data: Any, where: str, dimension: Dimension, problems: list[str]) -> Quantity | None:
    """Return the quantity that `data` (from YAML) describes; on any fault add every problem found and return None."""
    if not isinstance(data, Mapping):
        problems.append(f"{where}: found {data!r}, needed an object with {', '.join(_REQUIRED)}")
        return None
    before = len(problems)
    for key in data:
        if key not in _KEYS:
            problems.append(f"{where}.{key}: unknown key{did_you_mean(str(key), _KEYS)}")
    problems += [f"{where}.{key}: missing" for key in _REQUIRED if key not in data]
    for key in ("value", "low", "high"):
        if key in data and not _is_number(data[key]):
            problems.append(f"{where}.{key}: {data[key]!r} is not a finite number of 0 or more")
    _check_words(data, where, dimension, problems)
    if len(problems) > before:
        return None
    value, low, high = (None if data.get(k) is None else float(data[k]) for k in ("value", "low", "high"))
    if value is None or (low is not None and low > value) or (high is not None and high < value):
        problems.append(f"{where}: needed low <= value <= high, found {low} .. {value} .. {high}")
        return None
    if value == 0 and dimension != "time":
        problems.append(f"{where}.value: must be more than 0")
        return None
    if dimension == "share" and value > 1:
        problems.append(f"{where}.value: a share is at most 1, found {value:g}")
        return None
    return Quantity(value, data["unit"], dimension, data["source"], str(data["date"]), data["trust"], low, high)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300


def _check_words(data: Mapping[str, Any], where: str, dimension: Dimension, problems: list[str]) -> None:
    units = DIMENSIONS[dimension]
    if "unit" in data and (not isinstance(data["unit"], str) or data["unit"] not in units):
        problems.append(f"{where}.unit: {data['unit']!r} is no unit of {dimension} (use {', '.join(units)})")
    if "trust" in data and (not isinstance(data["trust"], str) or data["trust"] not in TRUST_SPREAD):
        problems.append(f"{where}.trust: {data['trust']!r} is none of {', '.join(TRUST_SPREAD)}")
    if "source" in data and not (isinstance(data["source"], str) and data["source"].strip()):
        problems.append(f"{where}.source: say where the number comes from")
    if "date" in data and not _DATE.fullmatch(str(data["date"])):
        problems.append(f"{where}.date: {data['date']!r} is not YYYY-MM or YYYY-MM-DD")
