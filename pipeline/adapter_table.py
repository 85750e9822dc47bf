"""The adapters of a run for its report: what each weighs, and what it changed, number by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dwindle.pipeline import figures
from dwindle.pipeline.line_ends import serves_a_task, step_title
from dwindle.report import Report, StepRecord

__all__ = ["AdapterRow", "Change", "adapter_rows"]

_HIGHER_IS_BETTER = ("exact_match", "rouge_l", "label_accuracy", "win_rate", "top1_agreement")
_LABELS = {"kl_nats_per_token": "KL from teacher", "nats_per_token": "nats/token", "top1_agreement": "top-1 agreement",
           "general_kl": "KL on general text"}  # fmt: skip
_SHARES = ("exact_match", "label_accuracy", "win_rate", "top1_agreement")


@dataclass(frozen=True)
class Change:
    """One number without and with the adapter, as text; `better` None where it did not move or nobody can tell."""

    name: str
    before: str
    after: str
    better: bool | None


@dataclass(frozen=True)
class AdapterRow:
    """One adapter: what it is for, its size, what it changed."""

    title: str
    facts: tuple[str, ...]
    changes: tuple[Change, ...]
    note: str = ""


def adapter_rows(report: Report) -> list[AdapterRow]:
    """Return a row for each adapter that a step trained."""
    return [_row(step) for step in report.steps if step.name in ("recover", "adapt")]


def _row(step: StepRecord) -> AdapterRow:
    told = step.details
    facts = [f"rank {told['rank']}"] if "rank" in told else []
    facts += [figures.size(told["adapter_bytes"])] if isinstance(told.get("adapter_bytes"), int) else []
    facts += [f"{figures.count(told['tokens'])} tokens"] if isinstance(told.get("tokens"), int) else []
    facts += [f"{told['records']:,} records"] if isinstance(told.get("records"), int) else []
    facts += [f"from {told['started_from']}"] if told.get("started_from") else []
    gap = told.get("gap")
    closed = gap.get("kl_closed") if isinstance(gap, Mapping) else None
    note = f"{closed:.0%} of what quantization opened is closed" if isinstance(closed, int | float) else ""
    return AdapterRow(step_title(step), tuple(facts), tuple(_changes(step)), note)


def _changes(step: StepRecord) -> Iterator[Change]:
    before, after = (_numbers(step.details.get(f"metrics_{when}")) for when in ("before", "after"))
    for name in dict.fromkeys([*before, *after]):
        yield _change(name, before.get(name), after.get(name))
    for name in ("kl_nats_per_token", "nats_per_token", "top1_agreement"):
        change = _change(name, getattr(step.before, name), getattr(step.after, name))
        yield replace(change, better=None) if serves_a_task(step) else change  # general text is not what it is for


def _numbers(value: Any) -> dict[str, float]:
    found = value if isinstance(value, Mapping) else {}
    return {str(k): float(v) for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _change(name: str, before: float | None, after: float | None) -> Change:
    better = None
    if before is not None and after is not None and before != after:
        better = (after > before) == (name in _HIGHER_IS_BETTER)
    shown = figures.share if name in _SHARES else figures.number
    return Change(_LABELS.get(name, name.replace("_", " ")), shown(before), shown(after), better)
