"""Which steps end a run's line, and what a step is called where several bear one name.

The end of a line is the last step of each variant that makes the model of the run: a task's adapter serves its task,
and what it does to general text is a side effect. A recovery adapter belongs to the model and counts.
"""

from __future__ import annotations

from dwindle.report import Report, StepRecord

__all__ = ["line_ends", "serves_a_task", "step_title"]


def serves_a_task(step: StepRecord) -> bool:
    """Return whether a step trained an adapter for one task."""
    return step.name == "adapt"


def step_title(step: StepRecord, *, variant: bool = True) -> str:
    """Return the step's name, with its task and its variant."""
    task = step.details.get("task")
    name = f"{step.name} {task}" if serves_a_task(step) and isinstance(task, str) else step.name
    return f"{name} ({step.variant})" if variant and step.variant else name


def line_ends(report: Report) -> list[StepRecord]:
    """Return the last step of the line, once per variant."""
    last = {step.variant: step for step in report.steps if not serves_a_task(step)}
    return [step for variant, step in last.items() if variant is not None] or list(last.values())
