"""The cost model's constants, fitted to published measurements, and how far off they are. Torch-free.

`published.py` reads the measurements. Four constants per kind of engine are free:

    share       of the peak bandwidth that decode reaches
    overhead    seconds per token that do not depend on the model
    unpacking   decode's rate with packed weights / prefill's rate, for CPUs: the floor under decode where unpacking
                codes, not memory, takes the time
    compute     operations per second of one core in prefill (of the whole engine where `cores` is 1)

    decode      seconds per token = max(bytes / (share x peak), 2 N / (unpacking x compute)) + overhead
    prefill     seconds of T tokens = (2 N T + 2 T^2 A) / (compute x cores) + overhead

N is multiply-accumulates per token and A the attention width (layers x heads x width of a head): causal scores and
mixtures are 4 A (T/2) operations per token. share and overhead follow by weighted least squares on 1 / share and
overhead (the model is linear in them), re-weighted until the sum of absolute relative errors is least, so that one
strange row does not bend the rest; unpacking by trying a grid; compute is the median over rows.

Leave-one-out leaves out a whole device, not a row: no measurement of a device helps to predict another one of it. A
CPU's decode may use the prefill rate published beside it (the profile of a device has such a number too). A row whose
engine no other device has cannot be predicted; it is listed with error None and counted in no median.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dwindle.devices.published import Published, published

__all__ = ["Calibration", "Constants", "Prediction", "calibrate", "fit"]

OUTLIER = 0.4
"""Error from which on a row has to say why it is not predicted."""
_UNPACKING = tuple(step / 100 for step in range(20, 105, 5))
"""Values of `unpacking` that are tried."""
_ROUNDS = 12
_SMALLEST_RESIDUAL = 0.01
_CPU = "cpu"
_FEWEST_ROWS = 2


@dataclass(frozen=True)
class Constants:
    """What was fitted for one kind of engine."""

    share: float
    overhead_seconds: float
    unpacking: float | None
    rows: int

    def decode_seconds(self, row: Published) -> float:
        """Return the seconds per token that these constants predict."""
        stream = row.streamed_bytes / (self.share * row.bandwidth)
        floor = _floor_operations(row) / self.unpacking if self.unpacking else 0.0
        return max(stream, floor) + self.overhead_seconds


@dataclass(frozen=True)
class Prediction:
    """One row predicted from the other devices: tokens/s as published and as predicted."""

    kind: str
    """decode or prefill."""
    device: str
    model: str
    engine: str
    published: float
    predicted: float | None
    source: str
    date: str
    beyond_facts: bool
    outlier: str
    """Why the others do not predict it, where that is known."""

    @property
    def error(self) -> float | None:
        """Return predicted / published - 1."""
        return None if self.predicted is None else self.predicted / self.published - 1

    def summary(self) -> dict[str, Any]:
        """Return what tells an outlier, and why it is one."""
        return {"device": self.device, "model": self.model, "engine": self.engine, "error": self.error,
                "why": self.outlier}  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """The constants fitted to every row, and the leave-one-out predictions."""

    decode: Mapping[str, Constants]
    prefill_compute: Mapping[str, float]
    """FLOP/s per core, by prefill engine."""
    predictions: tuple[Prediction, ...]

    def errors(self, kind: str, engine: str | None = None, facts_only: bool = False) -> list[float]:
        """Return the absolute relative errors of one kind, smallest first."""
        rows = (p for p in self.predictions if p.kind == kind and engine in (None, p.engine))
        kept = (p.error for p in rows if not (facts_only and p.beyond_facts))
        return sorted(abs(error) for error in kept if error is not None)

    def median_error(self, kind: str, engine: str | None = None, facts_only: bool = False) -> float | None:
        """Return the median of the absolute relative errors, or None without any."""
        found = self.errors(kind, engine, facts_only)
        return statistics.median(found) if found else None

    def worst(self, kind: str) -> Prediction:
        """Return the prediction that is farthest off."""
        known = [p for p in self.predictions if p.kind == kind and p.error is not None]
        return max(known, key=lambda p: abs(p.error or 0.0))

    def outliers(self, kind: str) -> list[Prediction]:
        """Return the predictions that are off by more than `OUTLIER`, the farthest first."""
        far = [p for p in self.predictions if p.kind == kind and abs(p.error or 0.0) > OUTLIER]
        return sorted(far, key=lambda p: -abs(p.error or 0.0))

    def to_json(self) -> dict[str, Any]:
        """Return constants, medians and every prediction as JSON types."""
        kinds = {kind: self._summary(kind) for kind in ("decode", "prefill")}
        constants = {
            name: {"share": c.share, "overhead_ms": 1e3 * c.overhead_seconds, "unpacking": c.unpacking, "rows": c.rows}
            for name, c in self.decode.items()
        }
        rows = [{**vars(p), "error": p.error} for p in self.predictions]
        compute = {name: value / 1e12 for name, value in self.prefill_compute.items()}
        return {"leave_one_out": kinds, "constants": constants, "prefill_tflops_per_core": compute, "rows": rows}

    def _summary(self, kind: str) -> dict[str, Any]:
        worst = self.worst(kind)
        engines = sorted({p.engine for p in self.predictions if p.kind == kind})
        return {
            "median_error": self.median_error(kind),
            "median_error_without_additions": self.median_error(kind, facts_only=True),
            "by_engine": {name: self.median_error(kind, name) for name in engines},
            "rows": len(self.errors(kind)),
            "not_predicted": [f"{p.device}, {p.model}" for p in self.predictions if p.kind == kind and p.error is None],
            "worst": worst.summary(),
            "outliers": [p.summary() for p in self.outliers(kind)],
        }

    def text(self) -> str:
        """Return the lines that `dwindle devices check` prints."""
        lines = []
        for kind in ("decode", "prefill"):
            found, worst = self.errors(kind), self.worst(kind)
            engines = {p.engine: self.median_error(kind, p.engine) for p in self.predictions if p.kind == kind}
            each = ", ".join(f"{name} {_percent(error)}" for name, error in engines.items())
            lines.append(
                f"calibration, {kind}: leave-one-out median error {_percent(statistics.median(found))} over "
                f"{len(found)} published rows ({each}); worst {_percent(worst.error, sign=True)}"
            )
            lines += [f"  {_percent(p.error, sign=True):>7}  {p.device}, {p.model} ({p.engine}): {p.outlier}"
                      for p in self.outliers(kind)]  # fmt: skip
        return "\n".join(lines)


def _percent(value: float | None, sign: bool = False) -> str:
    return "unknown" if value is None else f"{100 * value:{'+' if sign else ''}.0f} %"


def _floor_operations(row: Published) -> float:
    """Return seconds per token at prefill's rate, 0 where nothing is unpacked or the rate is not known."""
    if not row.packed or row.compute is None or row.engine != _CPU:
        return 0.0
    return 2 * row.multiply_accumulates / row.compute


def calibrate(rows: Sequence[Published] | None = None) -> Calibration:
    """Return constants and leave-one-out predictions of the published rows (or of others, for tests)."""
    rows = published() if rows is None else rows
    decode = {name: _constants([r for r in rows if r.engine == name and r.decode]) for name in _engines(rows)}
    compute = {
        name: value
        for name in dict.fromkeys(r.prefill_engine for r in rows if r.prefill)
        if (value := _compute(rows, name, "")) is not None
    }
    predictions = (*(_decode(r, rows) for r in rows if r.decode), *(_prefill(r, rows) for r in rows if r.prefill))
    return Calibration({k: v for k, v in decode.items() if v is not None}, compute, predictions)


@cache
def fit() -> Calibration:
    """Return the calibration on the published rows, computed once."""
    return calibrate()


def _engines(rows: Sequence[Published]) -> list[str]:
    return list(dict.fromkeys(r.engine for r in rows))


def _decode(row: Published, rows: Sequence[Published]) -> Prediction:
    others = [r for r in rows if r.engine == row.engine and r.device != row.device and r.decode]
    found = _constants(others)
    predicted = None if found is None else 1 / found.decode_seconds(row)
    return Prediction("decode", row.device, row.model, row.engine, row.decode or 0.0, predicted, row.source, row.date,
                      row.beyond_facts, row.outlier)  # fmt: skip


def _prefill(row: Published, rows: Sequence[Published]) -> Prediction:
    compute = _compute(rows, row.prefill_engine, row.device)
    predicted = None if compute is None else row.prompt / (row.prefill_operations / (compute * row.cores))
    return Prediction("prefill", row.device, row.model, row.prefill_engine, row.prefill or 0.0, predicted, row.source,
                      row.date, row.beyond_facts, row.outlier)  # fmt: skip


def _compute(rows: Sequence[Published], engine: str, without: str) -> float | None:
    """Return the median FLOP/s per core of an engine, one device left out."""
    kept = [r for r in rows if r.prefill_engine == engine and r.device != without and r.prefill]
    rates = [r.prefill_operations / r.prompt * (r.prefill or 0.0) / r.cores for r in kept]
    return statistics.median(rates) if rates else None


def _constants(rows: Sequence[Published]) -> Constants | None:
    """Return share, overhead and unpacking with the least sum of absolute relative errors; None below two rows."""
    if len(rows) < _FEWEST_ROWS:
        return None
    grid: Sequence[float | None] = _UNPACKING if any(_floor_operations(r) for r in rows) else (None,)
    tried = [_with_unpacking(rows, value) for value in grid]
    return min(tried, key=lambda c: sum(abs(c.decode_seconds(r) * (r.decode or 0.0) - 1) for r in rows))


def _with_unpacking(rows: Sequence[Published], unpacking: float | None) -> Constants:
    """Return share and overhead for one value of unpacking: rows under its floor do not tell the share."""
    found = _line(rows, unpacking)
    if unpacking is None:
        return found
    free = [r for r in rows if _floor_operations(r) / unpacking < r.streamed_bytes / (found.share * r.bandwidth)]
    return _line(free, unpacking, len(rows)) if len(free) >= _FEWEST_ROWS else found


def _line(rows: Sequence[Published], unpacking: float | None, count: int | None = None) -> Constants:
    """Return the line seconds = slope x (bytes / peak) + overhead of least absolute relative error, overhead >= 0.

    Iteratively re-weighted least squares: each round divides a row's weight by its last residual.
    """
    points = [(r.streamed_bytes / r.bandwidth, 1 / (r.decode or 1.0)) for r in rows]
    weights = [1 / y**2 for _, y in points]
    slope, overhead = 1.0, 0.0
    for _ in range(_ROUNDS):
        slope, overhead = _least_squares(points, weights)
        residuals = [max(abs(slope * x + overhead - y) / y, _SMALLEST_RESIDUAL) for x, y in points]
        weights = [1 / (y**2 * residual) for (_, y), residual in zip(points, residuals, strict=True)]
    return Constants(1 / slope, overhead, unpacking, count or len(rows))


def _least_squares(points: Sequence[tuple[float, float]], weights: Sequence[float]) -> tuple[float, float]:
    """Return slope >= 1 (a share is at most 1) and intercept >= 0 of a weighted line."""
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    joint = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True))
    slope = max(1.0, joint / spread if spread > 0 else y_mean / x_mean)
    if y_mean - slope * x_mean < 0:
        squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
        slope = max(1.0, sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares)
    return slope, max(0.0, y_mean - slope * x_mean)
