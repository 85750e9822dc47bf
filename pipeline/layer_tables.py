"""Bits, bytes and rounding error per layer, for the report: from a quantize step's record, else from an artifact.

A step tells its layers as a list of rows with a `name`; an artifact's details as a mapping of name to row. Both are
read here, with whatever of them is there: bits per weight count scales, zero points and palettes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dwindle.report import Report

__all__ = ["LayerRow", "LayerTable", "layer_tables"]

_FEW_LAYERS = 24


@dataclass(frozen=True)
class LayerRow:
    """One layer, or all layers of a kind: `share` is its bytes over those of the largest row, for a bar."""

    name: str
    format: str
    parameters: int
    bytes: int
    bits: float
    share: float
    error: float | None = None


@dataclass(frozen=True)
class LayerTable:
    """The layers of one variant in the model's order, and summed by kind, the largest kind first."""

    title: str
    layers: tuple[LayerRow, ...]
    kinds: tuple[LayerRow, ...]

    @property
    def is_short(self) -> bool:
        """Return whether all layers can be shown at once."""
        return len(self.layers) <= _FEW_LAYERS

    @property
    def has_errors(self) -> bool:
        """Return whether any layer tells its rounding error."""
        return any(layer.error is not None for layer in self.layers)


def layer_tables(report: Report) -> list[LayerTable]:
    """Return one table per quantized variant; where no step tells layers, one per artifact that does."""
    steps = [(f"{s.name} ({s.variant})" if s.variant else s.name, s.details.get("layers")) for s in report.steps]
    artifacts = [(f"{a.format} {a.variant or ''}".strip(), a.details.get("layers")) for a in report.artifacts]
    for sources in (steps, artifacts):
        tables = [table for title, rows in sources if (table := _table(title, rows))]
        if tables:
            return tables
    return []


def _table(title: str, source: Any) -> LayerTable | None:
    if isinstance(source, Mapping):
        named = [(str(name), row) for name, row in source.items()]
    elif isinstance(source, list | tuple):
        named = [(str(row.get("name")), row) for row in source if isinstance(row, Mapping)]
    else:
        return None
    layers = [row for name, raw in named if isinstance(raw, Mapping) and (row := _row(name, raw))]
    return LayerTable(title, _with_shares(layers), _by_kind(layers)) if layers else None


def _row(name: str, raw: Mapping[str, Any]) -> LayerRow | None:
    shape = raw.get("shape")
    parameters = raw.get("parameters") or (math.prod(shape) if isinstance(shape, list | tuple) else None)
    size = raw.get("bytes")
    if not isinstance(parameters, int) or not isinstance(size, int | float) or parameters < 1:
        return None
    error = raw.get("relative_mse")
    bits = raw.get("bits_per_weight", 8 * size / parameters)
    known_error = float(error) if isinstance(error, int | float) else None
    return LayerRow(name, _format(raw), parameters, int(size), float(bits), 0.0, known_error)


def _format(raw: Mapping[str, Any]) -> str:
    if "format" in raw:
        return str(raw["format"])
    kind, bits = raw.get("kind"), raw.get("bits")
    if kind is None or bits is None:
        return ""
    return f"{'palette' if 'palett' in str(kind) else 'int'}{bits}"


def _with_shares(rows: list[LayerRow]) -> tuple[LayerRow, ...]:
    largest = max(row.bytes for row in rows) or 1
    return tuple(LayerRow(r.name, r.format, r.parameters, r.bytes, r.bits, r.bytes / largest, r.error) for r in rows)


def _by_kind(layers: list[LayerRow]) -> tuple[LayerRow, ...]:
    """Return one row per kind (the last word of a layer's name) and format."""
    groups: dict[tuple[str, str], list[LayerRow]] = {}
    for layer in layers:
        words = [word for word in layer.name.split(".") if word != "weight"]
        groups.setdefault((words[-1] if words else layer.name, layer.format), []).append(layer)
    rows = []
    for (kind, form), members in groups.items():
        parameters, size = sum(m.parameters for m in members), sum(m.bytes for m in members)
        errors = [m.error * m.parameters for m in members if m.error is not None]
        error = sum(errors) / parameters if len(errors) == len(members) else None
        name = f"{kind} \N{MULTIPLICATION SIGN} {len(members)}" if len(members) > 1 else kind
        bits = sum(m.bits * m.parameters for m in members) / parameters
        rows.append(LayerRow(name, form, parameters, size, bits, 0.0, error))
    return _with_shares(sorted(rows, key=lambda row: -row.bytes))
