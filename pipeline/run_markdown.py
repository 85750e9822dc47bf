"""A run as Markdown for a pull request: verdict, what became of the model, targets, artifacts, what was skipped."""

from __future__ import annotations

from dwindle.pipeline import figures
from dwindle.pipeline.html_report import METRIC_LABELS
from dwindle.pipeline.line_ends import step_title
from dwindle.pipeline.markdown import code, details, escape_markdown, table
from dwindle.report import Measurement, Report, TargetVerdict

__all__ = ["report_markdown"]


def report_markdown(report: Report, title: str = "dwindle run") -> str:
    """Return the summary; a reader sees the verdict and the models, and opens the rest."""
    parts = [f"### {escape_markdown(title)}: {_verdict(report)}"]
    if report.failures:
        parts.append("\n".join(f"- {escape_markdown(line)}" for line in report.failures))
    parts += [part for part in (_models(report), _targets(report)) if part]
    if report.artifacts:
        parts.append(details(f"Artifacts ({len(report.artifacts)})", _artifacts(report)))
    if report.skipped:
        lines = "\n".join(f"- {escape_markdown(s.what)}: {escape_markdown(s.why)}" for s in report.skipped)
        parts.append(details(f"What did not happen ({len(report.skipped)})", lines))
    return "\n\n".join(parts) + "\n"


def _verdict(report: Report) -> str:
    count = len(report.failures)
    return f"**{count} gate{'s' * (count > 1)} failed**" if count else "passed"


def _models(report: Report) -> str:
    if not report.steps:
        return ""
    heads = ("Model", "Size", "", "Bits per weight", "Nats/token", "KL from teacher", "Agreement")
    start = report.steps[0].before
    rows = [_model("teacher", start, start)]
    for step in report.steps:
        rows.append(_model(step_title(step), step.after, start))
    return table(heads, rows)


def _model(name: str, model: Measurement, start: Measurement) -> tuple[str, ...]:
    return (
        escape_markdown(name), figures.size(model.bytes), figures.ratio(start.bytes, model.bytes),
        figures.number(model.bits_per_weight, 3), figures.number(model.nats_per_token),
        figures.number(model.kl_nats_per_token), figures.share(model.top1_agreement),
    )  # fmt: skip


def _targets(report: Report) -> str:
    names = [n for n in METRIC_LABELS if any(m.name == n for t in report.targets for m in t.metrics)]
    if not names:
        return ""
    heads = ("Device", "Artifact", *(METRIC_LABELS[name] for name in names), "Budgets")
    return table(heads, [_target(target, names) for target in report.targets])


def _target(target: TargetVerdict, names: list[str]) -> tuple[str, ...]:
    found = {metric.name: metric for metric in target.metrics}
    cells = []
    for name in names:
        metric = found.get(name)
        if metric is None or metric.value is None:
            cells.append(figures.UNKNOWN)
        else:
            missed = " **missed**" if metric.passed is False else ""
            cells.append(f"{figures.metric_text(metric, metric.value)} ({metric.basis}){missed}")
    verdict = {True: "passed", False: "**failed**", None: "none"}[target.passed]
    return (escape_markdown(target.profile), code(target.artifact or "none runs here"), *cells, verdict)


def _artifacts(report: Report) -> str:
    rows = []
    for artifact in report.artifacts:
        parity = artifact.parity
        told = "not checked" if parity is None else "passed" if parity.passed else "**failed**"
        by = figures.UNKNOWN if parity is None else escape_markdown(parity.executed_by)
        rows.append((code(artifact.path), figures.size(artifact.bytes), told, by, code(artifact.sha256[:12])))
    return table(("Artifact", "Size", "Parity", "Executed by", "sha256"), rows)
