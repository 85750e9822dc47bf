"""Bits, bytes, sensitivity and rounding error per layer, for the report: from a quantize step, else from an artifact.

A step tells its layers as a list of rows with a `name`; an artifact's details as a mapping of name to row. Both are
read here, with whatever of them is there: bits per weight count scales, zero points and palettes. Where the step's
record holds the bit plan, the table bears the plan editor's data and each layer's predicted cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from markupsafe import Markup

from dwindle.devices.cost_model import DEFAULT_PROMPT_TOKENS
from dwindle.pipeline.page import embedded_json
from dwindle.pipeline.plan_editor import plan_editor
from dwindle.report import Report, StepRecord

__all__ = ["LayerRow", "LayerTable", "layer_tables"]

_GRADES = {
    "kl": "Predicted KL: measured with this one layer replaced, on text apart from calibration.",
    "fisher": "Predicted KL: to second order, from gradients on the calibration text.",
    "error": "No predicted KL is stored: the plan was made without a text, by relative errors alone.",
    "none": "No sensitivities are stored: all layers were given the same bits. A plan to a size "
    "(target_bits_per_weight or target_bytes, with a calibration text) measures them.",
}
"""What a page says of a plan's costs, by the plan's grade."""


@dataclass(frozen=True)
class LayerRow:
    """One layer: `share` and `cost_share` are its bytes and cost over those of the largest row, for bars."""

    name: str
    format: str
    parameters: int
    bytes: int
    bits: float
    share: float = 0.0
    error: float | None = None
    cost: float | None = None
    cost_share: float = 0.0
    planned: int | None = None
    """Its index in the plan that decided its bits."""


@dataclass(frozen=True)
class LayerTable:
    """The layers of one variant in the model's order, and the plan editor's data where there is a plan."""

    title: str
    layers: tuple[LayerRow, ...]
    editor: Markup | None = None
    scheme: str = ""
    told: str = ""
    """Where the costs come from, or why there are none."""
    prompt: int = DEFAULT_PROMPT_TOKENS

    @property
    def has_errors(self) -> bool:
        """Return whether any layer tells its rounding error."""
        return any(layer.error is not None for layer in self.layers)

    @property
    def has_costs(self) -> bool:
        """Return whether the predicted KL of any layer is known."""
        return any(layer.cost is not None for layer in self.layers)


def layer_tables(report: Report) -> list[LayerTable]:
    """Return one table per quantized variant; where no step tells layers, one per artifact that does."""
    tables = [table for step in report.steps if (table := _of_step(step, report))]
    if tables:
        return tables
    named = [(f"{a.format} {a.variant or ''}".strip(), a.details.get("layers")) for a in report.artifacts]
    return [LayerTable(title, rows) for title, source in named if (rows := _rows(source))]


def _of_step(step: StepRecord, report: Report) -> LayerTable | None:
    rows = _rows(step.details.get("layers"))
    if not rows:
        return None
    title = f"{step.name} ({step.variant})" if step.variant else step.name
    data = plan_editor(step, report)
    if data is None or not {layer["name"] for layer in data["layers"]} <= {row.name for row in rows}:
        return LayerTable(title, rows)
    planned = {layer["name"]: (index, layer["kl"].get(layer["bits"])) for index, layer in enumerate(data["layers"])}
    told = [
        replace(row, planned=planned[row.name][0], cost=planned[row.name][1]) if row.name in planned else row
        for row in rows
    ]
    most = max((row.cost or 0.0 for row in told), default=0.0)
    shown = tuple(replace(row, cost_share=(row.cost or 0.0) / most if most else 0.0) for row in told)
    plan = data["plan"]
    return LayerTable(title, shown, embedded_json(data), str(plan["scheme"]), _GRADES.get(str(plan["grade"]), ""))


def _rows(source: Any) -> tuple[LayerRow, ...]:
    if isinstance(source, Mapping):
        named = [(str(name), row) for name, row in source.items()]
    elif isinstance(source, list | tuple):
        named = [(str(row.get("name")), row) for row in source if isinstance(row, Mapping)]
    else:
        return ()
    rows = [row for name, raw in named if isinstance(raw, Mapping) and (row := _row(name, raw))]
    largest = max((row.bytes for row in rows), default=0) or 1
    return tuple(replace(row, share=row.bytes / largest) for row in rows)


def _row(name: str, raw: Mapping[str, Any]) -> LayerRow | None:
    shape = raw.get("shape")
    known = isinstance(shape, list | tuple) and 0 < len(shape) < 9 and all(map(_is_number, shape))
    parameters = raw.get("parameters") or (math.prod(shape or ()) if known else None)
    size = raw.get("bytes")
    if not _is_number(parameters) or not isinstance(parameters, int) or not _is_number(size) or parameters < 1:
        return None
    error = raw.get("relative_mse")
    bits = raw.get("bits_per_weight", 8 * size / parameters)
    if not _is_number(bits):
        return None
    known_error = float(error) if _is_number(error) else None
    return LayerRow(name, _format(raw), parameters, int(size), float(bits), error=known_error)


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value of a foreign report is a number that can be counted with."""
    return isinstance(value, int | float) and abs(value) < 1e30


def _format(raw: Mapping[str, Any]) -> str:
    if "format" in raw:
        return str(raw["format"])
    kind, bits = raw.get("kind"), raw.get("bits")
    if kind is None or bits is None:
        return ""
    return f"{'palette' if 'palett' in str(kind) else 'int'}{bits}"
