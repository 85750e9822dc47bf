"""Rows to records: what the model reads and should write, with every bad row found before anything is trained.

A row is bad if it lacks a column, if a text is empty, if its label is outside the label set, if the two sides of a pair
are equal, or if the right answer is not among its choices. All are told at once, by kind, with the first of each.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dwindle.adapters.task_options import TaskOptions, columns_of
from dwindle.adapters.task_rows import Row, read_rows
from dwindle.checkers import make_checker
from dwindle.errors import DataError, did_you_mean, offenders
from dwindle.report import Skipped
from dwindle.storage import hash_json

__all__ = ["BadRecords", "Record", "TaskRecords", "read_task"]

_SHOWN = 5


@dataclass(frozen=True)
class Record:
    """One example. `completion` is the better answer of a pair."""

    prompt: str
    completion: str
    place: str
    rejected: str | None = None
    choices: tuple[str, ...] = ()
    is_trace: bool = False
    question: str = ""
    """The short prompt of a trace's row; empty: its own prompt is it. Records of one question stand on one side."""

    @property
    def asked(self) -> str:
        """Return what decides the side that a record stands on."""
        return self.question or self.prompt


@dataclass
class BadRecords:
    """Problems by kind: how many, and where the first ones are."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Note one bad record."""
        self.found.setdefault(kind, []).append(place)

    def told(self) -> list[str]:
        """Return one line per kind.

        >>> bad = BadRecords(); bad.add("empty completion", "a.csv:3"); bad.told()
        ['1 with empty completion: a.csv:3']
        """
        return [f"{len(places):,} with {kind}: {offenders(places, _SHOWN)}" for kind, places in self.found.items()]

    def settle(self, options: TaskOptions, records: int) -> tuple[Skipped, ...]:
        """Raise DataError if any record is bad and the task refuses them; else return a line for each kind."""
        if not self.found:
            return ()
        if options.bad_records == "refuse" or not records:
            raise DataError(
                f"task {options.name!r}: bad records:\n  " + "\n  ".join(self.told()) +
                "\nMend or remove them, declare the schema that fits, or set bad_records=drop to leave them out."
            )  # fmt: skip
        return tuple(Skipped(f"records of task {options.name}", told) for told in self.told())


@dataclass(frozen=True)
class TaskRecords:
    """A task's records in their two roles, which share no prompt."""

    options: TaskOptions
    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    labels: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def sha256(self) -> str:
        """Return a hash over the records of both roles."""
        return hash_json([[asdict(record) for record in part] for part in (self.train, self.held_out)])

    def choices(self, record: Record) -> tuple[str, ...]:
        """Return the answers that a record may have."""
        return record.choices or self.labels


_ByRow = list[tuple[Row, list[Record]]]
"""Every good row with its records, the short one first."""


def read_task(options: TaskOptions, seed: int = 0) -> TaskRecords:
    """Return a task's records. Raises DataError with every bad one, by kind."""
    bad = BadRecords()
    given = [row for place in options.data for row in read_rows(place, options.columns)]
    kept = [row for place in options.held_out for row in read_rows(place, options.columns)]
    _require_columns(options, [*given, *kept])
    labels = options.labels or _all_labels(options, given)
    by_row, of_kept = _records(options, given, labels, bad), _records(options, kept, labels, bad)
    train, held_out = _flat(by_row), _flat(of_kept)
    skipped = bad.settle(options, len(train))
    if options.checker is not None:
        train, unpassed = _passing(options.checker, by_row)
        skipped += unpassed
    shared = 0
    if options.held_out:
        measured = {record.asked for record in held_out}
        apart = [record for record in train if record.asked not in measured]
        if shared := len(train) - len(apart):
            skipped += (Skipped(f"{shared:,} training records of task {options.name}", "their prompts are held out"),)
        train = apart
    else:
        train, held_out = _divided(train, options.held_out_share, seed)
    if not train or not held_out:
        raise DataError(
            f"task {options.name!r}: {len(train):,} records to train on, {len(held_out):,} held out; both are needed"
            f"{f' ({shared:,} have prompts that are held out)' if shared else ''}. Add records, or name others under "
            "held_out."
        )
    if options.max_records is not None:
        train = sorted(train, key=lambda r: _draw(seed, f"{r.prompt}\0{r.completion}"))[: options.max_records]
    return TaskRecords(options, tuple(train), tuple(held_out), labels, skipped)


def _require_columns(options: TaskOptions, rows: Sequence[Row]) -> None:
    """Raise DataError, naming the nearest columns, if a declared column is in no row."""
    present = dict.fromkeys(str(name) for row in rows for name in row.values)
    fields = ("prompt", "traces", "trace_prompt", "chosen", "rejected", "label", "choices")
    named = {name: getattr(options, name) for name in fields}
    if options.form == "completion":
        named["completion"] = options.target
    broken = [f"{row.place}: {row.problem}" for row in rows if row.problem]
    if len(broken) == len(rows):
        raise DataError(f"task {options.name!r}: none of {len(rows):,} rows can be read: {offenders(broken, _SHOWN)}.")
    missing = [
        f"{field_}: no column {column!r}{did_you_mean(column, present)}"
        for field_, text in named.items()
        if text is not None
        for column in columns_of(text)
        if column not in present
    ]
    if missing:
        told = f" {len(broken):,} rows cannot be read: {offenders(broken, _SHOWN)}." if broken else ""
        raise DataError(
            f"task {options.name!r}: the schema does not match the data: {'; '.join(missing)}. The columns are "
            f"{offenders(present) or 'none'}.{told} Declare the schema that fits: --prompt, --completion, ... "
            "name a column each, or hold a template."
        )


def _all_labels(options: TaskOptions, rows: Sequence[Row]) -> tuple[str, ...]:
    if options.label is None:
        return ()
    return tuple(sorted({text for row in rows if (text := _text(options.label, row.values).strip())}))


def _records(options: TaskOptions, rows: Sequence[Row], labels: tuple[str, ...], bad: BadRecords) -> _ByRow:
    found: _ByRow = []
    for row in rows:
        made, problem = _record(options, row, labels)
        if problem is not None:
            kind, _, detail = problem.partition("\0")
            bad.add(kind, f"{row.place} ({detail})" if detail else row.place)
        else:
            found.append((row, made))
    return found


def _flat(by_row: _ByRow) -> list[Record]:
    return [record for _, made in by_row for record in made]


def _record(options: TaskOptions, row: Row, labels: tuple[str, ...]) -> tuple[list[Record], str | None]:
    """Return the records of a row (two where it has a trace), or what is wrong with it: its kind, \\0, its details."""
    if row.problem is not None:
        return [], row.problem
    if (odd := _not_text(options, row.values)) is not None:
        return [], odd
    prompt, target = _text(options.prompt, row.values), _text(options.target, row.values)
    if not prompt.strip():
        return [], "empty prompt"
    if not target.strip():
        return [], f"empty {'chosen' if options.form == 'preference' else options.form}"
    if options.form == "label":
        target = target.strip()
        return ([Record(prompt, target, row.place)], None) if target in labels else (
            [], f"a label outside the label set\0{target}{_near(target, labels)}")  # fmt: skip
    if options.form == "preference":
        rejected = _text(str(options.rejected), row.values)
        if not rejected.strip():
            return [], "empty rejected"
        if rejected.strip() == target.strip():
            return [], "equal sides"
        return [Record(prompt, target, row.place, rejected=rejected)], None
    choices = _choices(options, row.values)
    if options.choices is not None and target.strip() not in choices:
        return [], "a completion that is none of its choices"
    made = [Record(prompt, target, row.place, choices=choices)]
    if options.traces is not None and (trace := _text(options.traces, row.values)).strip():
        asked = prompt if options.trace_prompt is None else _text(options.trace_prompt, row.values)
        made.append(Record(asked, trace, row.place, is_trace=True, question=prompt))
    return made, None


def _passing(spec: str, by_row: _ByRow) -> tuple[list[Record], tuple[Skipped, ...]]:
    """Return the records whose answer a checker passes; a trace is held to its row's short answer."""
    checker = make_checker(spec)
    kept, failed = [], list[str]()
    for row, made in by_row:
        known = {**row.values, "reference": made[0].completion}
        for record in made:
            verdict = checker(record.prompt, record.completion, known)
            if verdict.passed:
                kept.append(record)
            else:
                failed.append(f"{record.place} ({verdict.why})")
    told = f"the checker {spec} did not pass them: {offenders(failed, _SHOWN)}"
    return kept, (Skipped(f"{len(failed):,} answers as training records", told),) if failed else ()


def _choices(options: TaskOptions, values: Mapping[str, Any]) -> tuple[str, ...]:
    given = values.get(options.choices) if options.choices is not None else None
    texts = (str(choice).strip() for choice in given) if isinstance(given, list | tuple) else ()
    return tuple(text for text in texts if _is_unicode(text))


def _near(label: str, labels: Sequence[str]) -> str:
    near = difflib.get_close_matches(label, labels, n=1)
    return f", nearest: {near[0]}" if near else ""


def _not_text(options: TaskOptions, values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a row in whose columns something else than texts and numbers stands."""
    texts = (options.prompt, options.target, options.rejected, options.traces, options.trace_prompt)
    for column in dict.fromkeys(name for text in texts if text is not None for name in columns_of(text)):
        if isinstance(values.get(column), list | tuple | Mapping):
            return f"a {type(values[column]).__name__} in column {column!r}, where text is needed"
        if isinstance(values.get(column), str) and not _is_unicode(values[column]):
            return f"text in column {column!r} that is no Unicode: half of a surrogate pair"
    return None


def _is_unicode(text: str) -> bool:
    """Return False for half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _text(template: str, values: Mapping[str, Any]) -> str:
    """Return a column's text or a filled template; what is missing or None is empty."""
    if "{" not in template:
        return _plain(values.get(template))
    parts = string.Formatter().parse(template)  # format_map would take a column named 0 for a position
    return "".join(text + ("" if name is None else _plain(values.get(name))) for text, name, _, _ in parts)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _divided(records: list[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return training and held-out records; all records of one question stand on one side."""
    prompts = sorted({record.asked for record in records}, key=lambda prompt: _draw(seed, prompt))
    out = set(prompts[: math.ceil(share * len(prompts))] if len(prompts) > 1 else [])
    return [r for r in records if r.asked not in out], [r for r in records if r.asked in out]


def _draw(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()
