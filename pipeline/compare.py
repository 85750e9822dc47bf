"""Two or more runs side by side, and which results became worse than the first run's by more than is allowed.

Judged are the last model of each variant (bytes, bits per weight, nats/token, agreement), the bytes of each artifact,
each metric of a target and what adapters do for their tasks; `metrics` names others in their place. Steps on the way,
KL and times are shown but not judged, since a pruned model may be worse before distillation and a time depends on what
else the machine did. A regression is a relative change in the bad direction, from the first run to each of the others.
A judged number that disappeared counts as one; numbers of different basis are not compared, which is said.

What was asked for is compared too: every key of the recipes, the inputs and the versions that is not the same in all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from dwindle.errors import RecipeError, did_you_mean
from dwindle.pipeline import figures
from dwindle.pipeline.line_ends import serves_a_task, step_title
from dwindle.report import Artifact, Measurement, Metric, Report, StepRecord

__all__ = ["Comparison", "Difference", "Row", "Run", "compare_runs", "parse_percent"]

T = TypeVar("T")
_HIGHER_IS_BETTER = ("tokens_per_second", "tokens_per_second_sustained", "top1_agreement", "exact_match", "rouge_l",
                     "label_accuracy", "win_rate")  # fmt: skip
_OF_A_MODEL = (
    "parameters",
    "bytes",
    "bits_per_weight",
    "nats_per_token",
    "bits_per_byte",
    "kl_nats_per_token",
    "top1_agreement",
)
_PER_TOKEN = ("nats_per_token", "kl_nats_per_token", "top1_agreement")
_JUDGED_OF_A_MODEL = ("bytes", "bits_per_weight", "nats_per_token", "top1_agreement")


@dataclass(frozen=True)
class Run:
    """One run: what it is called here, what it reports, and what was asked for (the recipe as a mapping)."""

    name: str
    report: Report
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A key of the recipe, the inputs or the environment that is not the same in all runs; None where it is absent."""

    key: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class Row:
    """One number in all runs. `worse` is the relative change from the first run in the bad direction, per run; None
    where it cannot be told. `notes` say why not."""

    what: str
    name: str
    values: tuple[float | None, ...]
    judged: bool
    worse: tuple[float | None, ...]
    notes: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Return whether the runs differ in it."""
        return len(set(self.values)) > 1


@dataclass(frozen=True)
class Comparison:
    """All rows, what differs in what was asked for, and one line per regression beyond the limit."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    failures: tuple[str, ...]
    max_regression: float | None

    @property
    def exit_code(self) -> int:
        """Return 1 if something became worse by more than allowed."""
        return 1 if self.failures else 0

    def to_json(self) -> dict[str, Any]:
        """Return the comparison for `--json`."""
        return {
            "runs": list(self.names),
            "rows": [asdict(r) for r in self.rows],
            "differences": [asdict(d) for d in self.differences],
            "failures": list(self.failures),
            "max_regression": self.max_regression,
            "exit_code": self.exit_code,
        }


def parse_percent(text: str) -> float:
    """Return a share from `2%` or `0.02`. Raises RecipeError for anything else.

    >>> parse_percent("2%"), parse_percent("0.02")
    (0.02, 0.02)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(%?)\s*", text)
    if match is None:
        raise RecipeError(f"max regression {text!r}: needed a share of 0 or more, as 2% or 0.02.")
    return float(match[1]) / (100 if match[2] else 1)


def compare_runs(runs: Sequence[Run], max_regression: float | None = None, metrics: Sequence[str] = ()) -> Comparison:
    """Return the runs side by side; with `max_regression`, also what is worse than in the first by a larger share.

    `metrics` are the names that are judged, in place of the usual ones. Raises RecipeError for fewer than two runs and
    for names that no row has.
    """
    if len(runs) < 2:
        raise RecipeError("compare: two runs or more are needed.")
    reports = [run.report for run in runs]
    rows = (*_steps(reports, metrics), *_artifacts(reports, metrics), *_targets(reports, metrics))
    _require_known(metrics, {row.name for row in rows})
    failures: list[str] = []
    if max_regression is not None:
        several = len(runs) > 2
        for row in rows:
            for number in range(1, len(runs)):
                failures += _failure(row, number, runs[number].name if several else "", max_regression)
    return Comparison(tuple(run.name for run in runs), rows, tuple(_differences(runs)), tuple(failures), max_regression)


def _require_known(metrics: Sequence[str], known: set[str]) -> None:
    unknown = [f"{name!r}{did_you_mean(name, known)}" for name in metrics if name not in known]
    if unknown:
        raise RecipeError(f"compare: no run has a metric {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")


def _failure(row: Row, number: int, run: str, limit: float) -> list[str]:
    if not row.judged:
        return []
    where = f"{run}: {row.what}" if run else row.what
    before, after, worse = row.values[0], row.values[number], row.worse[number]
    if before is not None and after is None:
        return [f"{where}: {row.name} was {figures.named(row.name, before)} and is not known any more"]
    if worse is not None and worse > limit:
        told = f"{figures.named(row.name, before)} -> {figures.named(row.name, after)}"
        return [f"{where}: {row.name} {told}, {worse:.1%} worse (allowed {limit:.1%})"]
    return []


def _row(what: str, name: str, values: Sequence[float | None], judged: bool, notes: Sequence[str] = ()) -> Row:
    told = tuple(notes) or ("",) * len(values)
    worse = [None if note else _worse(name, values[0], value) for value, note in zip(values, told, strict=True)]
    return Row(what, name, tuple(values), judged, (None, *worse[1:]), told)


def _worse(name: str, before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    gap = before - after if name.rpartition(".")[2] in _HIGHER_IS_BETTER else after - before  # task.NAME.METRIC
    if gap == 0:
        return 0.0
    return gap / abs(before) if before else None


def _united(tables: Sequence[Mapping[Any, T]]) -> Iterator[tuple[Any, tuple[T | None, ...]]]:
    """Yield every key of any table, in order, with what each table has there."""
    for key in dict.fromkeys(key for table in tables for key in table):
        yield key, tuple(table.get(key) for table in tables)


def _read(things: Sequence[T | None], value: Callable[[T], float | None]) -> list[float | None]:
    return [None if thing is None else value(thing) for thing in things]


_Key = tuple[str, str | None, int]


def _keyed(report: Report) -> dict[_Key, StepRecord]:
    """Return the steps by name, variant and how often the pair stood before."""
    found: dict[_Key, StepRecord] = {}
    for step in report.steps:
        name = step_title(step, variant=False)
        turn = sum(key[:2] == (name, step.variant) for key in found)
        found[name, step.variant, turn] = step
    return found


def _final(steps: Mapping[_Key, StepRecord]) -> set[_Key]:
    """Return the keys of the last step of each variant (of the line, if there are none), adapters of tasks apart."""
    last = {key[1]: key for key, step in steps.items() if not serves_a_task(step)}
    return {key for variant, key in last.items() if variant is not None} or set(last.values())


def _steps(reports: Sequence[Report], metrics: Sequence[str]) -> Iterator[Row]:
    tables = [_keyed(report) for report in reports]
    final = set().union(*(_final(table) for table in tables))
    first = _vocabulary(reports[0])
    retold = [_vocabulary(report) != first for report in reports]
    if all(report.steps for report in reports):
        yield from _models("teacher", [report.steps[0].before for report in reports], (), [False] * len(reports))
    for key, steps in _united(tables):
        name, variant, turn = key
        what = name + (f" ({variant})" if variant else "") + (f" #{turn + 1}" if turn else "")
        models = [None if step is None else step.after for step in steps]
        usual = (*_JUDGED_OF_A_MODEL, *(["bits_per_byte"] if any(retold) else []))
        yield from _models(what, models, (metrics or usual) if key in final else (), retold)
        yield from _tasks(what, steps, metrics)
        yield _row(what, "seconds", _read(steps, lambda step: step.seconds), "seconds" in metrics and key in final)


def _tasks(what: str, steps: Sequence[StepRecord | None], metrics: Sequence[str]) -> Iterator[Row]:
    """Yield what task adapters were measured to do; the KL on general text is shown, not judged."""
    tables = [step.details.get("metrics_after", {}) if step is not None else {} for step in steps]
    for name, values in _united([table if isinstance(table, Mapping) else {} for table in tables]):
        judged = name in metrics if metrics else name in _HIGHER_IS_BETTER
        yield _row(what, name, [v if isinstance(v, int | float) else None for v in values], judged)


def _vocabulary(report: Report) -> list[tuple[object, object]]:
    """Return what the cuts of the vocabulary left: where that differs, the runs count other tokens."""
    told = [(step.details.get("vocabulary"), step.details.get("vocabulary_coverage")) for step in report.steps]
    return [(sizes, share) for sizes, share in told if sizes and sizes[0] != sizes[1]]


def _models(
    what: str, models: Sequence[Measurement | None], judged: Sequence[str], retold: Sequence[bool]
) -> Iterator[Row]:
    """Yield the rows of a model; where tokens are `retold`, bits/byte stand in for what is counted per token."""
    for name in _OF_A_MODEL:
        values = [None if model is None else getattr(model, name) for model in models]
        if any(value is not None for value in values):
            other = "not comparable: other tokens, see bits_per_byte"
            notes = [other if told and name in _PER_TOKEN else "" for told in retold]
            yield _row(what, name, values, name in judged and not all(notes[1:]), notes)


def _artifacts(reports: Sequence[Report], metrics: Sequence[str]) -> Iterator[Row]:
    def error(artifact: Artifact) -> float | None:
        return None if artifact.parity is None else artifact.parity.max_abs_logit_error

    for key, found in _united([{(a.format, a.path): a for a in report.artifacts} for report in reports]):
        what = f"artifact {key[1]}"
        yield _row(what, "bytes", _read(found, lambda a: a.bytes), not metrics or "bytes" in metrics)
        errors = _read(found, error)
        if any(value is not None for value in errors):
            yield _row(what, "max_abs_logit_error", errors, "max_abs_logit_error" in metrics)


def _targets(reports: Sequence[Report], metrics: Sequence[str]) -> Iterator[Row]:
    def table(report: Report) -> dict[tuple[str, str | None, str], Metric]:
        return {(t.profile, t.artifact, m.name): m for t in report.targets for m in t.metrics}

    for key, found in _united([table(report) for report in reports]):
        first = found[0]
        notes = [
            f"not comparable: {first.basis}, then {m.basis}" if first and m and m.basis != first.basis else ""
            for m in found
        ]
        what = f"{key[0]}, {key[1] or 'no artifact'}"
        judged = (not metrics or key[2] in metrics) and not all(notes[1:])
        yield _row(what, key[2], _read(found, lambda m: m.value), judged, notes)


def _differences(runs: Sequence[Run]) -> Iterator[Difference]:
    """Yield what differs in the recipes, then in inputs and environment."""
    tables = []
    for run in runs:
        asked = {f"recipe.{key}": value for key, value in flat(run.recipe)}
        inputs = {f"inputs.{key}": value for key, value in flat(run.report.inputs)}
        around = {f"environment.{key}": value for key, value in flat(run.report.environment)}
        tables.append(asked | inputs | around)
    for key, values in _united(tables):
        if len(set(values)) > 1:
            yield Difference(key, values)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of a nested value; steps of a recipe are called by number and name.

    >>> list(flat({"steps": [{"prune": {"ffn_keep": 0.5}}], "seed": 0}))
    [('steps.1.prune.ffn_keep', '0.5'), ('seed', '0')]
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value, 1):
            yield from flat(inner, f"{prefix}.{number}" if prefix else str(number))
    else:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
