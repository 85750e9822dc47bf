"""What a step's details say, whatever step it was: flat rows of names and values, and the curve of a training.

A page cannot know every step there will be. Details are shown as they are told: nested mappings by dotted names, long
lists by their length and ends; a list of records that each have a `step` and a loss is a curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwindle.pipeline import figures
from dwindle.pipeline.charts import training_curve
from dwindle.pipeline.line_ends import step_title
from dwindle.pipeline.page import TwoWidths, two_widths
from dwindle.report import StepRecord

__all__ = ["StepFacts", "flat_facts", "history_of", "step_facts"]

_ELSEWHERE = ("layers", "plan")
"""Details that the page shows in another place."""
_MOST_ROWS = 80
_LONG = 12


@dataclass(frozen=True)
class StepFacts:
    """One step: its title, a line, its facts, its training curve."""

    title: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    curve: TwoWidths | None


def step_facts(step: StepRecord) -> StepFacts:
    """Return what a step's details say."""
    rest = {
        key: value
        for key, value in step.details.items()
        if not _history(value) and not (key in _ELSEWHERE and _is_table(value))
    }
    facts = list(flat_facts(rest))
    if len(facts) > _MOST_ROWS:
        facts = [*facts[:_MOST_ROWS], ("and more", f"{len(facts) - _MOST_ROWS} further values in report.json")]
    first = history_of(step)
    told = [str(step.details[key]) for key in ("method", "scheme", "objective") if step.details.get(key)]
    curve = two_widths(lambda width: training_curve(first, width)) if first else None
    return StepFacts(step_title(step), ", ".join(told), tuple(facts), curve)


def history_of(step: StepRecord) -> Sequence[tuple[float, float]]:
    """Return (step, loss) of a step's training, or nothing."""
    return next((points for value in step.details.values() if (points := _history(value))), ())


def flat_facts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, value) rows of nested values; what is empty is left out.

    >>> list(flat_facts({"metrics": {"exact_match": 0.5}, "removed": None, "widths": [768, 256]}))
    [('metrics \N{MIDDLE DOT} exact match', '0.5'), ('widths', '768, 256')]
    """
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from flat_facts(value, f"{name} \N{MIDDLE DOT} ")
        elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value[:_LONG], 1):
                inner = one if isinstance(one, Mapping) else {"value": one}
                yield from flat_facts(inner, f"{name} {number} \N{MIDDLE DOT} ")
            if len(value) > _LONG:
                yield name, f"{len(value):,} in all"
        elif value is not None and value != "" and value != [] and value != ():
            yield name, _told(value)


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) > 9999 else str(value)
    if isinstance(value, float):
        return figures.number(value)
    if isinstance(value, list | tuple):
        shown = [_told(one) for one in value]
        return ", ".join(shown) if len(shown) <= _LONG else f"{len(shown):,} values, {shown[0]} to {shown[-1]}"
    return str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value)
    )


def _history(value: Any) -> Sequence[tuple[float, float]]:
    """Return (step, loss) of a training's record, or nothing if it is none."""
    if not isinstance(value, list | tuple) or len(value) < 3:
        return ()
    points = [(row.get("step"), row.get("loss")) for row in value if isinstance(row, Mapping)]
    known = [(float(s), float(y)) for s, y in points if isinstance(s, int | float) and isinstance(y, int | float)]
    return known if len(known) == len(value) else ()
