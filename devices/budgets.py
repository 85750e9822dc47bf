"""Budgets: `tokens_per_second >= 30`, `peak_memory <= 1.5GB`, `time_to_first_token_ms <= 300 @ 512`. Torch-free.

A budget names a metric (or its short name), a comparison and a number with a unit; a name that ends in its unit
(`peak_memory_bytes`, `time_to_first_token_ms`, `tokens_per_second`) needs none beside the number, any other does:
1.5 of memory means nothing. `@ 512` asks for a prompt of 512 tokens instead of the usual one. The comparison must point
the way the metric is good: nobody wants at most 30 tokens/s, so that is refused rather than obeyed. All mistakes of a
list of budgets are raised as one error, with near names.

Quality has budgets, too: `kl <= 0.05`, `bits_per_byte <= 1.1`, `top1_agreement >= 90%`, and `task.NAME.METRIC >= 0.8`
for a metric of an adapter's task, which the report holds. Their names say their unit.

A file of budgets (`--budgets FILE`) is YAML: a list of such lines, or a mapping of metric to limit.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.devices.cost_model import METRIC_UNITS
from dwindle.devices.quantity import DIMENSIONS
from dwindle.errors import RecipeError, did_you_mean

__all__ = ["QUALITY_UNITS", "TASK", "Budget", "parse_budgets", "read_budgets", "unit_of"]

QUALITY_UNITS: Mapping[str, str] = {
    "nats_per_token": "nats/token",
    "bits_per_byte": "bits/byte",
    "kl_nats_per_token": "nats/token",
    "top1_agreement": "share",
}
"""What the report measures of a model, with its unit; fields of `report.Measurement`."""
TASK = "task."
"""How the name of a task's metric begins: task.NAME.METRIC."""
_TASK_DOTS = 2

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
    "nats": "nats_per_token",
    "kl": "kl_nats_per_token",
    "agreement": "top1_agreement",
}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "bytes": {**DIMENSIONS["memory"], "B": 1, "KB": 1e3},
    "seconds": {**DIMENSIONS["time"], "seconds": 1.0},
    "tokens/s": {"tokens/s": 1.0, "tok/s": 1.0, "t/s": 1.0, "/s": 1.0},
    "nats/token": {"nats/token": 1.0, "nats": 1.0},
    "bits/byte": {"bits/byte": 1.0, "bits": 1.0},
    "share": {"share": 1.0, "%": 0.01},
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
_RATES = ("tokens_per_second", "tokens_per_second_sustained", "top1_agreement")
"""What is good when high."""
_LONGEST = 200
_TEXT = re.compile(
    r"\s*([A-Za-z_]\w*(?:\.[\w-]+)*)\s*(>=|<=|=<|=>|==|=|>|<)?\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][-+]?[0-9]+)?)\s*([^\s@]*)"
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
        harder = max if self.comparison.startswith(">") else min
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
    match = _TEXT.fullmatch(line) if len(line) <= _LONGEST else None
    if match is None:
        problems.append(
            f"{line!r:.300} is not METRIC >= NUMBER or METRIC <= NUMBER (tokens_per_second >= 30, memory <= 1.5GB)"
        )
        return None
    name, written, number = match[1], match[2], match[3]
    metric = _SHORT_NAMES.get(name, name)
    if not _is_metric(metric):
        known = [*METRIC_UNITS, *QUALITY_UNITS, *_SHORT_NAMES]
        problems.append(f"{line!r}: {name} is no metric{did_you_mean(name, known)}")
        return None
    if metric.startswith(TASK) and written not in _COMPARISONS:
        problems.append(f"{line!r}: write >= or <=, as only you know which way {name} is good")
        return None
    good = f"{written[0]}=" if written and metric.startswith(TASK) else ">=" if metric in _RATES else "<="
    comparison = written or good
    quality = metric.startswith(TASK) or metric in QUALITY_UNITS
    unit = match[4] or (unit_of(metric) if quality else _unit_in(name))
    units = _UNITS[unit_of(metric)]
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


def read_budgets(path: Path | str) -> list[str] | dict[str, Any]:
    """Return what a YAML file of budgets holds, for `parse_budgets`. Raises RecipeError if it is no such file."""
    from dwindle.strict_yaml import read_yaml

    try:
        found = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"budgets {path}: cannot be read ({error}).") from error
    if isinstance(found, Mapping) and set(found) == {"budgets"}:
        found = found["budgets"]
    if isinstance(found, Mapping) and found:
        return {str(key): value for key, value in found.items()}
    if isinstance(found, list) and found and all(isinstance(line, str) for line in found):
        return found
    raise RecipeError(f"budgets {path}: needed a list of lines (tokens_per_second >= 30) or a mapping (memory: 1.5GB).")


def unit_of(metric: str) -> str:
    """Return the unit of a metric's values."""
    return "share" if metric.startswith(TASK) else {**METRIC_UNITS, **QUALITY_UNITS}[metric]


def _is_metric(name: str) -> bool:
    of_a_task = name.startswith(TASK) and name.count(".") >= _TASK_DOTS
    return of_a_task or name in METRIC_UNITS or name in QUALITY_UNITS


def _unit_in(name: str) -> str:
    """Return the unit that a name ends in, or nothing."""
    return next((unit for ending, unit in _UNIT_IN_NAME.items() if name.endswith(ending)), "")


def _integer(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))
