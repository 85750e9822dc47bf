"""A measurement of one artifact on one target: its repeats as they came, and the metrics they make. Torch-free.

Targets answer with events, the JSON lines of `board_runner.py`; `Gathering` takes them one by one, so that what came
before a dropped connection is kept. A measurement with fewer repeats than asked for is kept and marked (`complete` is
False, `stopped` says why) and never stands in for an estimate.

    tokens/s = generated tokens / seconds after the first one, per repeat; median of the repeats, range their extremes

`measurements/NAME.json` of a run folder holds one measurement each, schema 1, under the fields of `Measurement`. One
that names a device profile replaces the estimates of that profile for the artifact it was made of (same sha256) and
the prompt's length it was made with; see `validation`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dwindle.devices.bench_options import Protocol
from dwindle.devices.cost_model import METRIC_UNITS
from dwindle.errors import DataError, MissingExtra, TargetError, UnsupportedModel
from dwindle.report import Metric
from dwindle.storage import write_json

__all__ = ["FOLDER", "Event", "Gathering", "Measurement", "Repeat", "read_measurements", "write_measurement"]

FOLDER = "measurements"
"""Where measurements lie below a run folder."""
SCHEMA = 1
_STEADY = 0.05
"""By how much the last repeat may be slower than the first before that is worth a note."""

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Repeat:
    """One prompt and what was generated after it."""

    first_token_seconds: float
    token_seconds: tuple[float, ...]
    peak_memory_bytes: int | None = None
    temperature_c: float | None = None
    clock_share: float | None = None
    """Clock at the end as a share of the highest, where the system says."""
    energy_joules: float | None = None
    tokens: tuple[int, ...] = ()
    processor_seconds: float | None = None
    """Processor time of the tokens after the first, over all threads."""

    @property
    def tokens_per_second(self) -> float:
        """Return the rate after the first token."""
        return len(self.token_seconds) / sum(self.token_seconds)


@dataclass(frozen=True)
class Measurement:
    """What one target took for one artifact."""

    on: str
    """The target as it was named: host, ssh://..., adb:..."""
    profile: str | None
    """The device profile whose estimates this replaces."""
    artifact: str
    sha256: str
    format: str
    package_bytes: int
    runtime: str
    protocol: Protocol
    machine: Mapping[str, Any]
    repeats: tuple[Repeat, ...]
    load_seconds: float | None
    complete: bool
    stopped: str | None
    """Why it ended before its last repeat."""
    notes: tuple[str, ...]
    measured_at: str

    def metrics(self) -> dict[str, Metric]:
        """Return name -> metric; what no repeat told is not among them."""
        found = [_of("package_bytes", [float(self.package_bytes)])]
        if self.load_seconds is not None:
            found.append(_of("load_seconds", [self.load_seconds]))
        if self.repeats:
            found.append(_of("tokens_per_second", [r.tokens_per_second for r in self.repeats]))
            found.append(_of("time_to_first_token_seconds", [r.first_token_seconds for r in self.repeats]))
        peaks = [float(r.peak_memory_bytes) for r in self.repeats if r.peak_memory_bytes is not None]
        if peaks:
            found.append(_of("peak_memory_bytes", [max(peaks)]))
        per_token = [r.energy_joules / len(r.token_seconds) for r in self.repeats if r.energy_joules]
        if per_token:
            found.append(_of("joules_per_token", per_token, "joules"))
        return {metric.name: metric for metric in sorted(found, key=lambda m: _ORDER.get(m.name, len(_ORDER)))}

    def to_json(self) -> dict[str, Any]:
        """Return the object of a measurement's file; its metrics stand in it to be read, not to be read back."""
        return {"schema": SCHEMA, **asdict(self), "metrics": [asdict(metric) for metric in self.metrics().values()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """Return the measurement that `to_json` wrote."""
        values = {key: value for key, value in data.items() if key not in ("schema", "metrics")}
        values["protocol"] = Protocol(**values["protocol"])
        values["repeats"] = tuple(
            Repeat(**{**r, "token_seconds": tuple(r["token_seconds"]), "tokens": tuple(r["tokens"])})
            for r in values["repeats"]
        )
        values["notes"] = tuple(values["notes"])
        return cls(**values)


_ORDER = {name: place for place, name in enumerate(METRIC_UNITS)}


def _of(name: str, values: list[float], unit: str | None = None) -> Metric:
    spread = (min(values), max(values)) if len(values) > 1 else (None, None)
    return Metric(
        name, statistics.median(values), unit or METRIC_UNITS[name], "measured", low=spread[0], high=spread[1]
    )


@dataclass
class Gathering:
    """Takes a target's events and holds what they said so far."""

    place: str
    """What errors call the target."""
    protocol: Protocol
    machine: dict[str, Any] = field(default_factory=dict)
    repeats: list[Repeat] = field(default_factory=list)
    runtime: str = ""
    load_seconds: float | None = None
    ended: bool = False
    notes: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Take one event. Raises what an `error` event stands for, and TargetError for one that nobody knows."""
        kind = event.get("event")
        if kind == "start":
            self.machine = dict(event["machine"])
            self.runtime = self.runtime or str(event["runtime"])
        elif kind == "loaded":
            self.load_seconds = self.load_seconds or float(event["load_seconds"])
            self.runtime = str(event.get("version", self.runtime))
        elif kind == "repeat":
            self.repeats.append(_repeat(event))
        elif kind == "note":
            self.notes.append(str(event["note"]))
        elif kind == "end":
            self.ended = True
        elif kind == "error":
            self._raise(str(event.get("kind")), str(event.get("error")))
        elif kind != "warm_up":
            raise TargetError(f"{self.place}: the runner there said {kind!r}, which is no event of its protocol.")

    def _raise(self, kind: str, text: str) -> None:
        if kind == "missing" and self.place == "host":
            raise MissingExtra(f"Measuring with {text} on this machine", _EXTRAS.get(text.partition(".")[0], "onnx"))
        if kind == "missing":
            module = _DISTRIBUTIONS.get(text.partition(".")[0], text)
            raise TargetError(
                f"{self.place}: Python there has no {module}. Install it there (python3 -m venv ~/venv; "
                f"~/venv/bin/pip install {module} numpy) and name that Python: --python '~/venv/bin/python'."
            )
        if kind == "memory":
            raise TargetError(f"{self.place}: not enough memory: {text}.")
        raise UnsupportedModel(f"{self.place}: the runtime there cannot run it: {text}")

    def result(self, *, on: str, profile: str | None, artifact: Mapping[str, Any], stopped: str | None) -> Measurement:
        """Return the measurement of what came; `artifact` gives artifact, sha256, format and package_bytes."""
        complete = stopped is None and self.ended and len(self.repeats) >= self.protocol.repeats
        return Measurement(
            on=on, profile=profile, runtime=self.runtime, protocol=self.protocol, machine=self.machine,
            repeats=tuple(self.repeats), load_seconds=self.load_seconds, complete=complete,
            stopped=None if complete else stopped or "the runner ended early",
            notes=(*self.notes, *_thermal_notes(self.repeats, self.machine.get("temperature_c"))),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"), **artifact,
        )  # fmt: skip


_EXTRAS = {"coreai": "coreai", "numpy": "onnx", "onnxruntime": "onnx", "onnxruntime_genai": "onnx"}
_DISTRIBUTIONS = {"onnxruntime_genai": "onnxruntime-genai", "coreai": "coreai-core"}


def _repeat(event: Event) -> Repeat:
    return Repeat(
        float(event["first_token_seconds"]), tuple(float(s) for s in event["token_seconds"]),
        event.get("peak_memory_bytes"), event.get("temperature_c"), event.get("clock_share"),
        event.get("energy_joules"), tuple(int(t) for t in event.get("tokens", ())), event.get("processor_seconds"),
    )  # fmt: skip


def _thermal_notes(repeats: Sequence[Repeat], before: float | None) -> tuple[str, ...]:
    """Return what heat did: temperatures, a falling rate, a lowered clock; or that nothing is known of it.

    >>> slower = [Repeat(0.1, (0.1, 0.1), temperature_c=60.0), Repeat(0.1, (0.2, 0.2), temperature_c=71.0)]
    >>> _thermal_notes(slower, 48.0)
    ('temperature 48 to 71 °C', 'the last repeat was 50 % slower than the first: not a steady state')
    """
    notes = []
    known = [r.temperature_c for r in repeats if r.temperature_c is not None]
    if known:
        notes.append(f"temperature {known[0] if before is None else before:.0f} to {max(known):.0f} °C")
    elif repeats:
        notes.append("no thermometer: temperature not known")
    if len(repeats) > 1:
        change = repeats[-1].tokens_per_second / repeats[0].tokens_per_second - 1
        if change < -_STEADY:
            notes.append(f"the last repeat was {-100 * change:.0f} % slower than the first: not a steady state")
    clocks = [r.clock_share for r in repeats if r.clock_share is not None]
    if clocks and clocks[-1] < clocks[0] - _STEADY:
        notes.append(f"the clock fell from {100 * clocks[0]:.0f} to {100 * clocks[-1]:.0f} % of its highest")
    return tuple(notes)


def write_measurement(measurement: Measurement, run: Path) -> Path:
    """Write a measurement below a run folder and return its file; another one of the same kind is replaced."""
    words = (measurement.profile or measurement.on, measurement.artifact, measurement.runtime.partition(" ")[0],
             str(measurement.protocol.prompt_tokens), "" if measurement.complete else "partial")  # fmt: skip
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.") for word in words if word)
    place = run / FOLDER / f"{name}.json"
    write_json(place, measurement.to_json())
    return place


def read_measurements(run: Path) -> list[Measurement]:
    """Return the measurements kept in a run folder, oldest first. Raises DataError naming all that are damaged."""
    found, damaged = [], []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']!r}, needed {SCHEMA}")
            found.append(Measurement.from_json(data))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            damaged.append(f"{path} ({error})")
    if damaged:
        raise DataError(f"measurements that cannot be read: {', '.join(damaged)}. Measure again, or remove them.")
    return sorted(found, key=lambda m: m.measured_at)
