"""Two runs side by side, and which results became worse by more than is allowed.

Judged are the last model of each variant (bytes, bits per weight, nats/token, agreement), the bytes of each artifact
and each metric of a target; steps on the way, KL and times are shown but not judged, since a pruned model may be worse
before distillation and a time depends on what else the machine did. A regression is a relative change in the bad
direction. A judged number that disappeared counts as one; numbers of different basis are not compared, which is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dwindle.errors import RecipeError
from dwindle.pipeline import figures
from dwindle.report import Measurement, Report, StepRecord

__all__ = ["Comparison", "Row", "compare_reports", "parse_percent"]

_HIGHER_IS_BETTER = ("tokens_per_second", "tokens_per_second_sustained", "top1_agreement")
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
class Row:
    """One number in both runs. `worse` is the relative change in the bad direction, None where it cannot be told."""

    what: str
    name: str
    before: float | None
    after: float | None
    judged: bool
    worse: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All rows, and one line per regression beyond the limit."""

    rows: tuple[Row, ...]
    failures: tuple[str, ...]
    max_regression: float | None

    @property
    def exit_code(self) -> int:
        """Return 1 if something became worse by more than allowed."""
        return 1 if self.failures else 0

    def to_json(self) -> dict[str, Any]:
        """Return the comparison for `--json`."""
        return {
            "rows": [asdict(r) for r in self.rows],
            "failures": list(self.failures),
            "max_regression": self.max_regression,
            "exit_code": self.exit_code,
        }

    def text(self) -> str:
        """Return the rows as aligned text, one block per thing compared."""
        lines: list[str] = []
        what = None
        for row in self.rows:
            if row.what != what:
                lines += ["", row.what] if lines else [row.what]
                what = row.what
            change = (
                ""
                if row.worse is None or row.worse == 0
                else f"{abs(row.worse):.1%} {'worse' if row.worse > 0 else 'better'}"
            )
            pair = f"{_shown(row.name, row.before):>12} -> {_shown(row.name, row.after):<12}"
            lines.append(f"  {row.name:28} {pair} {change} {row.note}".rstrip())
        return "\n".join(lines) if lines else "The two runs have nothing in common."


def parse_percent(text: str) -> float:
    """Return a share from `2%` or `0.02`. Raises RecipeError for anything else.

    >>> parse_percent("2%"), parse_percent("0.02")
    (0.02, 0.02)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(%?)\s*", text)
    if match is None:
        raise RecipeError(f"max regression {text!r}: needed a share of 0 or more, as 2% or 0.02.")
    return float(match[1]) / (100 if match[2] else 1)


def compare_reports(before: Report, after: Report, max_regression: float | None = None) -> Comparison:
    """Return both runs side by side; with `max_regression`, also what is worse by a larger share."""
    rows = (*_steps(before, after), *_artifacts(before, after), *_targets(before, after))
    failures = () if max_regression is None else tuple(f for row in rows if (f := _failure(row, max_regression)))
    return Comparison(rows, failures, max_regression)


def _failure(row: Row, limit: float) -> str | None:
    if not row.judged:
        return None
    if row.before is not None and row.after is None:
        return f"{row.what}: {row.name} was {_shown(row.name, row.before)} and is not known any more"
    if row.worse is not None and row.worse > limit:
        return (
            f"{row.what}: {row.name} {_shown(row.name, row.before)} -> {_shown(row.name, row.after)}, "
            f"{row.worse:.1%} worse (allowed {limit:.1%})"
        )
    return None


def _row(what: str, name: str, before: float | None, after: float | None, judged: bool, note: str = "") -> Row:
    worse = None
    if before is not None and after is not None and not note:
        gap = before - after if name in _HIGHER_IS_BETTER else after - before
        worse = 0.0 if gap == 0 else gap / abs(before) if before else None
    return Row(what, name, before, after, judged, worse, note)


def _keyed(report: Report) -> dict[tuple[str, str | None, int], StepRecord]:
    """Return the steps by name, variant and how often the pair stood before."""
    found: dict[tuple[str, str | None, int], StepRecord] = {}
    for step in report.steps:
        turn = sum(key[:2] == (step.name, step.variant) for key in found)
        found[step.name, step.variant, turn] = step
    return found


def _final(steps: dict[tuple[str, str | None, int], StepRecord]) -> set[tuple[str, str | None, int]]:
    """Return the keys of the last step of each variant (of the line, if there are none)."""
    last = {key[1]: key for key in steps}
    return {key for variant, key in last.items() if variant is not None} or set(last.values())


def _steps(before: Report, after: Report) -> Iterator[Row]:
    old, new = _keyed(before), _keyed(after)
    final, retold = _final(old), _vocabularies(before) != _vocabularies(after)
    if before.steps and after.steps:
        yield from _models("teacher", before.steps[0].before, after.steps[0].before, judged=False)
    for key in [*old, *(k for k in new if k not in old)]:
        name, variant, turn = key
        what = name + (f" ({variant})" if variant else "") + (f" #{turn + 1}" if turn else "")
        first, second = old.get(key), new.get(key)
        yield from _models(what, _after(first), _after(second), judged=key in final, retold=retold)
        yield _row(what, "seconds", first.seconds if first else None, second.seconds if second else None, False)


def _after(step: StepRecord | None) -> Measurement | None:
    return None if step is None else step.after


def _vocabularies(report: Report) -> list[tuple[object, object]]:
    """Return what the cuts of the vocabulary left: where that differs, the runs count other tokens."""
    told = [(step.details.get("vocabulary"), step.details.get("vocabulary_coverage")) for step in report.steps]
    return [(sizes, share) for sizes, share in told if sizes and sizes[0] != sizes[1]]


def _models(
    what: str, before: Measurement | None, after: Measurement | None, judged: bool, retold: bool = False
) -> Iterator[Row]:
    """Yield the rows of a model; with `retold` tokens bits/byte stand in for what is counted per token."""
    names = (*_JUDGED_OF_A_MODEL, "bits_per_byte") if retold else _JUDGED_OF_A_MODEL
    for name in _OF_A_MODEL:
        note = "not comparable: other tokens, see bits_per_byte" if retold and name in _PER_TOKEN else ""
        first = None if before is None else getattr(before, name)
        second = None if after is None else getattr(after, name)
        if first is not None or second is not None:
            yield _row(what, name, first, second, judged and name in names and not note, note)


def _artifacts(before: Report, after: Report) -> Iterator[Row]:
    old = {(a.format, a.path): a for a in before.artifacts}
    new = {(a.format, a.path): a for a in after.artifacts}
    for key in [*old, *(k for k in new if k not in old)]:
        first, second = old.get(key), new.get(key)
        what = f"artifact {key[1]}"
        yield _row(what, "bytes", first.bytes if first else None, second.bytes if second else None, True)
        errors = [None if a is None or a.parity is None else a.parity.max_abs_logit_error for a in (first, second)]
        if errors != [None, None]:
            yield _row(what, "max_abs_logit_error", errors[0], errors[1], False)


def _targets(before: Report, after: Report) -> Iterator[Row]:
    old = {(t.profile, t.artifact, m.name): m for t in before.targets for m in t.metrics}
    new = {(t.profile, t.artifact, m.name): m for t in after.targets for m in t.metrics}
    for key in [*old, *(k for k in new if k not in old)]:
        first, second = old.get(key), new.get(key)
        note = ""
        if first and second and first.basis != second.basis:
            note = f"not comparable: {first.basis}, then {second.basis}"
        what = f"{key[0]}, {key[1] or 'no artifact'}"
        values = [None if m is None else m.value for m in (first, second)]
        yield _row(what, key[2], values[0], values[1], not note, note)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return figures.UNKNOWN
    if name.endswith("bytes"):
        return figures.size(value)
    if name.endswith("seconds"):
        return figures.seconds(value)
    if name == "top1_agreement":
        return figures.share(value)
    return figures.count(int(value)) if name == "parameters" else figures.number(value)
