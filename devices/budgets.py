"""Budgets: `tokens_per_second >= 30`, `memory <= 1.5GB`. Torch-free.

A budget names a metric (or its short name), a comparison and a number with an optional unit. The comparison must point
the way the metric is good: nobody wants at most 30 tokens/s, so that is refused rather than obeyed. All mistakes of a
list of budgets are raised as one error, with near names.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dwindle.devices.cost_model import METRIC_UNITS
from dwindle.devices.quantity import DIMENSIONS
from dwindle.errors import RecipeError, did_you_mean

__all__ = ["Budget", "parse_budgets"]

_SHORT_NAMES = {
    "memory": "peak_memory_bytes",
    "memory_bytes": "peak_memory_bytes",
    "peak_memory": "peak_memory_bytes",
    "package": "package_bytes",
    "size": "package_bytes",
    "time_to_first_token": "time_to_first_token_seconds",
    "ttft": "time_to_first_token_seconds",
}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "bytes": {**DIMENSIONS["memory"], "B": 1, "KB": 1e3},
    "seconds": {**DIMENSIONS["time"], "seconds": 1.0},
    "tokens/s": {"tokens/s": 1.0, "tok/s": 1.0, "t/s": 1.0, "/s": 1.0},
}
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_RATES = ("tokens_per_second", "tokens_per_second_sustained")
_TEXT = re.compile(
    r"\s*([A-Za-z_]\w*)\s*(>=|<=|=<|=>|==|=|>|<)?\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*(\S*)\s*"
)


@dataclass(frozen=True)
class Budget:
    """One limit on one metric, in the metric's unit. `text` is what stands in the report."""

    metric: str
    comparison: str
    limit: float
    text: str

    def holds(self, value: float) -> bool:
        """Return whether a value meets the budget."""
        return _COMPARISONS[self.comparison](value, self.limit)

    def tighter(self, other: Budget) -> Budget:
        """Return the harder one of two budgets on one metric."""
        harder = min if self.metric not in _RATES else max
        return self if harder(self.limit, other.limit) == self.limit else other


def parse_budgets(budgets: Iterable[str] | Mapping[str, Any]) -> tuple[Budget, ...]:
    """Return budgets from lines, or from a mapping of metric to limit. Raises one RecipeError with every mistake.

    >>> both = parse_budgets(["tokens_per_second >= 30", "memory <= 1.5GB"])
    >>> [f"{b.metric} {b.comparison} {b.limit:g}" for b in both]
    ['tokens_per_second >= 30', 'peak_memory_bytes <= 1.5e+09']
    >>> [f"{b.metric} {b.comparison} {b.limit:g}" for b in parse_budgets({"ttft": "250ms"})]
    ['time_to_first_token_seconds <= 0.25']
    """
    lines = [f"{k} {v}" for k, v in budgets.items()] if isinstance(budgets, Mapping) else list(budgets)
    problems: list[str] = []
    found: dict[str, Budget] = {}
    for line in lines:
        budget = _parse(str(line), problems)
        if budget is not None:
            found[budget.metric] = budget.tighter(found[budget.metric]) if budget.metric in found else budget
    if problems:
        raise RecipeError(f"budgets: {len(problems)} mistake(s):\n" + "\n".join(f"  {p}" for p in problems))
    return tuple(found.values())


def _parse(line: str, problems: list[str]) -> Budget | None:
    match = _TEXT.fullmatch(line)
    if match is None:
        problems.append(
            f"{line!r} is not METRIC >= NUMBER or METRIC <= NUMBER (tokens_per_second >= 30, memory <= 1.5GB)"
        )
        return None
    name, written, number, unit = match[1], match[2], match[3], match[4]
    metric = _SHORT_NAMES.get(name, name)
    if metric not in METRIC_UNITS:
        problems.append(f"{line!r}: {name} is no metric{did_you_mean(name, [*METRIC_UNITS, *_SHORT_NAMES])}")
        return None
    good = ">=" if metric in _RATES else "<="
    comparison = written or good
    if comparison not in (good, good[0]):
        problems.append(
            f"{line!r}: {name} is good when {'high' if good == '>=' else 'low'}; write {name} {good} {number}{unit}"
        )
        return None
    units = _UNITS[METRIC_UNITS[metric]]
    if unit and unit not in units:
        problems.append(f"{line!r}: {unit} is no unit of {name} (use {', '.join(units)})")
        return None
    limit = float(number.replace(",", "").replace("_", "")) * (units[unit] if unit else 1.0)
    shown = unit or METRIC_UNITS[metric]
    return Budget(metric, comparison, limit, f"{comparison} {number} {shown}")
