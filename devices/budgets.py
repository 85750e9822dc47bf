"""Budgets: `tokens_per_second >= 30`, `peak_memory <= 1.5GB`, `time_to_first_token_ms <= 300 @ 512`. Torch-free.

A budget names a metric (or its short name), a comparison and a number with a unit; a name that ends in its unit
(`peak_memory_bytes`, `time_to_first_token_ms`, `tokens_per_second`) needs none beside the number, any other does:
1.5 of memory means nothing. `@ 512` asks for a prompt of 512 tokens instead of the usual one. The comparison must point
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
    "time_to_first_token_ms": "time_to_first_token_seconds",
    "ttft": "time_to_first_token_seconds",
    "ttft_ms": "time_to_first_token_seconds",
    "load": "load_seconds",
    "load_time": "load_seconds",
    "load_ms": "load_seconds",
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
_UNIT_IN_NAME: Mapping[str, str] = {"_ms": "ms", "_seconds": "seconds", "_bytes": "bytes", "_per_second": "tokens/s",
                                    "_sustained": "tokens/s"}  # fmt: skip
"""How a name ends that says its unit."""
_AT_A_PROMPT = (
    "tokens_per_second",
    "tokens_per_second_sustained",
    "time_to_first_token_seconds",
    "peak_memory_bytes",
)
"""Metrics that depend on the prompt's length."""
_RATES = ("tokens_per_second", "tokens_per_second_sustained")
_TEXT = re.compile(
    r"\s*([A-Za-z_]\w*)\s*(>=|<=|=<|=>|==|=|>|<)?\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*([^\s@]*)"
    r"\s*(?:@\s*([0-9][0-9_,]*)\s*(?:tokens?)?\s*)?"
)


@dataclass(frozen=True)
class Budget:
    """One limit on one metric, in the metric's unit. `text` is what stands in the report."""

    metric: str
    comparison: str
    limit: float
    text: str
    at_tokens: int | None = None
    """Length of the prompt it holds for; None is the usual one."""

    @property
    def key(self) -> str:
        """Return the name of what is judged: the metric, and the prompt's length where one is asked for."""
        return self.metric if self.at_tokens is None else f"{self.metric} @ {self.at_tokens}"

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
    >>> (budget,) = parse_budgets(["time_to_first_token_ms <= 300 @ 512"])
    >>> budget.limit, budget.at_tokens, budget.text
    (0.3, 512, '<= 300 ms @ 512')
    """
    lines = [f"{k} {v}" for k, v in budgets.items()] if isinstance(budgets, Mapping) else list(budgets)
    problems: list[str] = []
    found: dict[str, Budget] = {}
    for line in lines:
        budget = _parse(str(line), problems)
        if budget is not None:
            found[budget.key] = budget.tighter(found[budget.key]) if budget.key in found else budget
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
    name, written, number, unit = match[1], match[2], match[3], match[4] or _unit_of(match[1])
    metric = _SHORT_NAMES.get(name, name)
    if metric not in METRIC_UNITS:
        problems.append(f"{line!r}: {name} is no metric{did_you_mean(name, [*METRIC_UNITS, *_SHORT_NAMES])}")
        return None
    good = ">=" if metric in _RATES else "<="
    comparison = written or good
    units = _UNITS[METRIC_UNITS[metric]]
    before = len(problems)
    if comparison not in (good, good[0]):
        problems.append(
            f"{line!r}: {name} is good when {'high' if good == '>=' else 'low'}; write {name} {good} {number}{unit}"
        )
    elif not unit:
        problems.append(f"{line!r}: {number} of what? Give a unit ({', '.join(units)})")
    elif unit not in units:
        problems.append(f"{line!r}: {unit} is no unit of {name} (use {', '.join(units)})")
    at_tokens = _integer(match[5]) if match[5] else None
    if at_tokens is not None and (metric not in _AT_A_PROMPT or at_tokens < 1):
        problems.append(
            f"{line!r}: @ {at_tokens} is the length of a prompt, at least 1, for {', '.join(_AT_A_PROMPT)} alone"
        )
    if len(problems) > before:
        return None
    limit = float(number.replace(",", "").replace("_", "")) * units[unit]
    at = "" if at_tokens is None else f" @ {at_tokens}"
    return Budget(metric, comparison, limit, f"{comparison} {number} {unit}{at}", at_tokens)


def _unit_of(name: str) -> str:
    """Return the unit that a name ends in, or nothing."""
    return next((unit for ending, unit in _UNIT_IN_NAME.items() if name.endswith(ending)), "")


def _integer(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))
