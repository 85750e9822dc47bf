"""report.html: one self-contained page for a person. No request, light and dark, for a phone and fit to print.

The page answers in this order: did it pass; how small, how good, how fast; which models of the run are worth having;
where the bits are, and what other bits would make of it (`plan_editor`); what each device would do and how that is
known; what the models write; what each step did; what was exported and who checked it; what came of what; what did not
happen; on what it ran. Without scripts everything but the plan editor is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwindle.devices.published import Published, published_on
from dwindle.pipeline import figures
from dwindle.pipeline.adapter_table import adapter_rows
from dwindle.pipeline.charts import Point, memory_over_context, quality_against_size, time_split
from dwindle.pipeline.device_views import device_views
from dwindle.pipeline.layer_tables import layer_tables
from dwindle.pipeline.line_ends import line_ends, serves_a_task, step_title
from dwindle.pipeline.lineage import lineage
from dwindle.pipeline.page import render_page, two_widths
from dwindle.pipeline.step_facts import flat_facts, step_facts
from dwindle.report import Artifact, Measurement, Metric, Report, StepRecord, TargetVerdict

__all__ = ["METRIC_LABELS", "Verdict", "quality_points", "render_html"]

METRIC_LABELS: Mapping[str, str] = {
    "tokens_per_second": "Decode",
    "tokens_per_second_sustained": "Sustained",
    "time_to_first_token_seconds": "Time to first token",
    "load_seconds": "Load",
    "peak_memory_bytes": "Peak memory",
    "package_bytes": "Package",
    "nats_per_token": "Nats/token",
    "bits_per_byte": "Bits/byte",
    "kl_nats_per_token": "KL from teacher",
    "top1_agreement": "Top-1 agreement",
}
"""How a page calls a metric."""


def render_html(report: Report, title: str = "dwindle run", recipe_text: str = "") -> str:
    """Return the page of a report as one HTML document."""
    views = device_views(report)
    tables = layer_tables(report)
    points = quality_points(report)
    values: dict[str, Any] = {
        "title": title,
        "report": report,
        "recipe_text": recipe_text,
        "subtitle": _subtitle(report),
        "verdict": _verdict(report),
        "cards": _cards(report),
        "chart": two_widths(lambda width: quality_against_size(points, width), 1060),
        "layer_tables": tables,
        "adapters": adapter_rows(report),
        "targets": _targets(report),
        "metric_names": _metric_names(report),
        "metric_labels": METRIC_LABELS,
        "metric_range": figures.metric_range,
        "split": two_widths(lambda width: time_split(views.splits, width), 560),
        "memory": two_widths(lambda width: memory_over_context(views.curves, views.limits, width), 560),
        "not_estimated": views.left_out if views.splits else (),
        "samples": [(sample.prompt, tuple(sample.texts.items())) for sample in report.samples],
        "states": _states(report),
        "step_details": [told for step in report.steps if (told := step_facts(step)).facts or told.curve],
        "lineage": lineage(report),
        "facts": _facts(report),
    }
    values["sections"] = _sections(values)
    return render_page("report.html.j2", ("page.js", "plan_editor.js"), **values)


def _sections(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, anchor) of the sections that are there, in the page's order."""
    there = {
        "Quality": ("quality", values["chart"]),
        "Layers": ("layers", values["layer_tables"]),
        "Adapters": ("adapters", values["adapters"]),
        "Devices": ("devices", values["targets"]),
        "Samples": ("samples", values["samples"]),
        "Steps": ("steps", values["states"]),
        "Artifacts": ("artifacts", values["report"].artifacts),
        "Lineage": ("lineage", values["lineage"]),
        "Not done": ("skipped", True),
        "Recipe": ("made", True),
    }
    return [(name, anchor) for name, (anchor, shown) in there.items() if shown]


def _subtitle(report: Report) -> str:
    teacher = report.inputs.get("teacher")
    name = str(teacher.get("model", "")).rstrip("/").rpartition("/")[2] if isinstance(teacher, Mapping) else ""
    words = [f"from {name}"] if name else []
    words += [" \N{RIGHTWARDS ARROW} ".join(dict.fromkeys(step.name for step in report.steps))] if report.steps else []
    profiles = len({target.profile for target in report.targets})
    words += [f"{profiles} target{'s' * (profiles > 1)}"] if profiles else []
    return " \N{MIDDLE DOT} ".join(words)


@dataclass(frozen=True)
class Verdict:
    """What stands beside the title: a kind (passed, failed, open) and a text."""

    kind: str
    text: str


def _verdict(report: Report) -> Verdict:
    if report.failures:
        count = len(report.failures)
        return Verdict("failed", f"{count} gate{'s' * (count > 1)} failed")
    checked = any(a.parity for a in report.artifacts) or any(t.passed is not None for t in report.targets)
    return Verdict("passed", "All gates passed") if checked else Verdict("open", "No gate was checked")


@dataclass(frozen=True)
class _Card:
    """One of the large numbers at the top."""

    label: str
    value: str
    note: str


def _cards(report: Report) -> list[_Card]:
    cards = []
    ends = line_ends(report)
    if ends:
        start = report.steps[0].before
        for end in ends:
            name = f" ({end.variant})" if end.variant else ""
            note = f"from {figures.size(start.bytes)}, {end.after.bits_per_weight:.2f} bits per weight"
            cards.append(
                _Card(
                    f"Size{name}",
                    figures.ratio(start.bytes, end.after.bytes) or figures.size(end.after.bytes),
                    f"{figures.size(end.after.bytes)} {note}",
                )
            )
        for end in ends:
            if end.after.top1_agreement is not None or end.after.nats_per_token is not None:
                cards.append(_quality_card(report, end))
    best = _best_speed(report.targets, {end.variant for end in ends})
    if best is not None:
        target, metric = best
        where = f"{metric.basis} on {target.profile}{f', {target.variant}' if target.variant else ''}"
        cards.append(_Card("Speed", figures.metric_text(metric, metric.value), where))
    return cards


def _quality_card(report: Report, end: StepRecord) -> _Card:
    name = f" ({end.variant})" if end.variant else ""
    nats = _teacher_nats(report, end.after)
    delta = figures.change(report.steps[0].before.nats_per_token, nats)
    told = f"{figures.number(nats)} nats/token" + (f" ({delta})" if delta else "")
    if end.after.top1_agreement is None:
        return _Card(f"Quality{name}", figures.number(nats), told)
    return _Card(f"Agreement{name}", figures.share(end.after.top1_agreement), f"with the teacher; {told}")


def _teacher_nats(report: Report, model: Measurement) -> float | None:
    """Return nats/token, where a step cut the vocabulary per token of the teacher's: from bits/byte."""
    start = report.steps[0].before
    sizes = [step.details.get("vocabulary") or (0, 0) for step in report.steps]
    if all(before == after for before, after in sizes):
        return model.nats_per_token
    if model.bits_per_byte is None or start.bits_per_byte is None or start.nats_per_token is None:
        return None
    return model.bits_per_byte / start.bits_per_byte * start.nats_per_token


def _best_speed(
    targets: Sequence[TargetVerdict], variants: Collection[str | None]
) -> tuple[TargetVerdict, Metric] | None:
    """Return the fastest measured rate of what the run ended with, or the fastest estimate where nothing was measured.

    Models exported beside that, in float for comparison, count only where there is no other.
    """
    rates = [(t, m) for t in targets for m in t.metrics if m.name == "tokens_per_second" and m.value is not None]
    rates = [rate for rate in rates if rate[0].variant in variants] or rates
    measured = [rate for rate in rates if rate[1].basis == "measured"]
    return max(measured or rates, key=lambda rate: rate[1].value or 0.0, default=None)


@dataclass(frozen=True)
class _State:
    """One row of the before/after table: a model after a step, and the model it came from."""

    label: str
    variant: str | None
    now: Measurement
    before: Measurement | None
    step: StepRecord | None


def _states(report: Report) -> list[_State]:
    if not report.steps:
        return []
    start = _State("teacher", None, report.steps[0].before, None, None)
    return [start, *(_State(step_title(s, variant=False), s.variant, s.after, s.before, s) for s in report.steps)]


def quality_points(report: Report) -> list[Point]:
    """Return the models whose quality is known; each is linked to the one whose numbers it started from.

    Adapters of tasks are left out: they are no other model of the run.
    """
    points: list[Point] = []
    made: list[Measurement] = []
    variants: list[str | None] = []
    for state in _states(report):
        nats = _teacher_nats(report, state.now)
        if nats is None or state.now.bytes < 1 or (state.step is not None and serves_a_task(state.step)):
            continue
        if state.variant not in variants:
            variants.append(state.variant)
        origin = next((i for i in range(len(made) - 1, -1, -1) if made[i] == state.before), None)
        label = state.label + (f" ({state.variant})" if state.variant else "")
        points.append(Point(label, state.now.bytes, nats, variants.index(state.variant), origin))
        made.append(state.now)
    return points


@dataclass(frozen=True)
class _Target:
    """All verdicts of one device."""

    profile: str
    verdicts: tuple[TargetVerdict, ...]

    @property
    def published(self) -> tuple[Published, ...]:
        """Return what others published of the device."""
        return published_on(self.profile)

    def artifact(self, verdict: TargetVerdict) -> str:
        """Return what a verdict is about."""
        path = verdict.artifact or "no artifact runs here"
        return f"{path} ({verdict.variant})" if verdict.variant else path

    def metric(self, verdict: TargetVerdict, name: str) -> Metric | None:
        """Return a metric by name."""
        return next((m for m in verdict.metrics if m.name == name), None)


def _targets(report: Report) -> list[_Target]:
    profiles = dict.fromkeys(t.profile for t in report.targets)
    return [_Target(p, tuple(t for t in report.targets if t.profile == p)) for p in profiles]


def _metric_names(report: Report) -> list[str]:
    """Return the metrics that any target has, the usual ones first."""
    present = {m.name for t in report.targets for m in t.metrics}
    return [n for n in METRIC_LABELS if n in present] + sorted(present - set(METRIC_LABELS))


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return inputs and environment as flat (name, value) rows."""
    return [*flat_facts(report.inputs), *flat_facts(report.environment), *_versions(report.artifacts)]


def _versions(artifacts: Sequence[Artifact]) -> Iterator[tuple[str, str]]:
    for artifact in artifacts:
        if artifact.versions:
            yield f"exported {artifact.format} with", ", ".join(f"{k} {v}" for k, v in artifact.versions.items())
