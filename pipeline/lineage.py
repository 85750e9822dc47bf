"""What came of what, for the report: data and teacher, step by step, each variant to its artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dwindle.pipeline import figures
from dwindle.pipeline.line_ends import step_title
from dwindle.report import Report, StepRecord

__all__ = ["Node", "lineage"]


@dataclass(frozen=True)
class Node:
    """One thing in a chain: its name and a few lines on it."""

    title: str
    lines: tuple[str, ...] = ()
    kind: str = ""


def lineage(report: Report) -> list[list[Node]]:
    """Return chains of nodes: the trunk from the teacher, then one chain per variant; nothing for a report of nothing.

    A variant's chain begins with its name and ends with the artifacts that carry it.
    """
    if not report.steps and not report.artifacts:
        return []
    trunk = [*_data(report), *_teacher(report), *(_step(s) for s in report.steps if s.variant is None)]
    trunk += _artifacts(report, None)
    chains = [trunk] if trunk else []
    variants = dict.fromkeys([*(s.variant for s in report.steps), *(a.variant for a in report.artifacts)])
    for variant in variants:
        if variant is not None:
            steps = [_step(s) for s in report.steps if s.variant == variant]
            chains.append([Node(variant, kind="variant"), *steps, *_artifacts(report, variant)])
    return chains


def _data(report: Report) -> list[Node]:
    roles = report.inputs.get("data")
    if not isinstance(roles, Mapping):
        return []
    lines = []
    for role, card in roles.items():
        if isinstance(card, Mapping):
            tokens = card.get("tokens")
            told = f"{figures.count(tokens)} tokens" if isinstance(tokens, int) else "tokens not stated"
            lines.append(f"{role}: {told}{_sha(card)}")
    return [Node("Data", tuple(lines))] if lines else []


def _teacher(report: Report) -> list[Node]:
    card = report.inputs.get("teacher")
    if not isinstance(card, Mapping):
        return []
    name = str(card.get("model", "teacher")).rstrip("/").rpartition("/")[2]
    size = [figures.size(report.steps[0].before.bytes)] if report.steps else []
    return [Node("Teacher", (name, *size, _sha(card).removeprefix(", ")))]


def _step(step: StepRecord) -> Node:
    lines = [f"{figures.size(step.after.bytes)}, {figures.number(step.after.bits_per_weight, 3)} bits per weight"]
    if step.after.nats_per_token is not None:
        lines.append(f"{figures.number(step.after.nats_per_token)} nats/token")
    return Node(step_title(step, variant=False), tuple(lines))


def _artifacts(report: Report, variant: str | None) -> list[Node]:
    found = [a for a in report.artifacts if a.variant == variant]
    return [Node(a.path, (figures.size(a.bytes), f"sha256 {a.sha256[:12]}")) for a in found]


def _sha(card: Mapping[str, Any]) -> str:
    sha = card.get("sha256")
    return f", sha256 {sha[:12]}" if isinstance(sha, str) else ""
