"""The short table that ends a run: what became of the model, and whether it fits the targets."""

from __future__ import annotations

import io

from dwindle.pipeline.line_ends import step_title
from dwindle.report import Artifact, Measurement, Metric, Report, StepRecord, TargetVerdict

__all__ = ["artifact_line", "step_line", "summary"]


def _value(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _model_row(name: str, m: Measurement, seconds: float | None) -> tuple[str, ...]:
    return (
        name,
        f"{m.parameters:,}",
        f"{m.bytes:,}",
        f"{m.bits_per_weight:.2f}",
        _value(m.nats_per_token, ".4f"),
        _value(m.kl_nats_per_token, ".4f"),
        _value(m.top1_agreement, ".1%"),
        _value(seconds, ".0f"),
    )


def _metric(verdict: TargetVerdict, name: str) -> Metric | None:
    return next((m for m in verdict.metrics if m.name == name), None)


def _told(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return "-"
    value = metric.value
    if metric.unit == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if metric.unit == "seconds":
        return f"{value * 1000:,.0f} ms"
    return f"{value:,.0f}"


def step_line(record: StepRecord) -> str:
    """Return one line that says what became of it."""
    a = record.after
    return (
        f"{a.parameters:,} parameters, {a.bytes:,} bytes, {a.bits_per_weight:.2f} bits/weight, "
        f"{a.nats_per_token:.4f} nats/token, KL {a.kl_nats_per_token:.4f}, {record.seconds:.0f} s"
    )


def artifact_line(artifact: Artifact) -> str:
    """Return one line that says what became of it."""
    parity = artifact.parity
    if parity is None:
        return f"{artifact.bytes:,} bytes, parity not checked"
    return (
        f"{artifact.bytes:,} bytes, parity {'passed' if parity.passed else 'FAILED'} "
        f"(max |logit error| {parity.max_abs_logit_error:.1e} over {parity.tokens_checked} tokens)"
    )


def summary(report: Report, width: int = 118) -> str:
    """Return the tables as plain text: models step by step, artifacts with parity, targets with basis and verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False)
    models = Table(title="Model", title_justify="left")
    for name in ("step", "parameters", "bytes", "bits/weight", "nats/token", "KL to teacher", "agreement", "seconds"):
        models.add_column(name, justify="left" if name == "step" else "right")
    if report.steps:
        models.add_row(*_model_row("teacher", report.steps[0].before, None))
    for step in report.steps:
        models.add_row(*_model_row(step_title(step), step.after, step.seconds))
    console.print(models)

    if report.artifacts:
        table = Table(title="Artifacts", title_justify="left")
        for name in ("format", "variant", "bytes", "parity", "max |logit error|", "checked tokens", "executed by"):
            table.add_column(name, overflow="fold")
        for a in report.artifacts:
            p = a.parity
            table.add_row(
                a.format,
                a.variant or "",
                f"{a.bytes:,}",
                "-" if p is None else "passed" if p.passed else "FAILED",
                "-" if p is None else f"{p.max_abs_logit_error:.1e}",
                "-" if p is None else str(p.tokens_checked),
                "-" if p is None else p.executed_by,
            )
        console.print(table)

    if report.targets:
        table = Table(title="Targets", title_justify="left")
        for name in ("target", "artifact", "tokens/s", "first token", "peak memory", "basis", "verdict"):
            table.add_column(name)
        for t in report.targets:
            speed = _metric(t, "tokens_per_second")
            verdict = {True: "passed", False: "FAILED", None: "no budget"}[t.passed]
            table.add_row(
                t.profile,
                t.artifact or t.variant or "",
                _told(speed),
                _told(_metric(t, "time_to_first_token_seconds")),
                _told(_metric(t, "peak_memory_bytes")),
                speed.basis if speed else "-",
                verdict,
            )
        console.print(table)
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    notes = [f"Not done: {s.what}: {s.why}" for s in report.skipped]
    return "\n".join([text.rstrip(), *notes])
