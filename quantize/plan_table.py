"""A bit plan as text: a row per block, a column per part, and what it all adds up to. Torch-free."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dwindle.quantize.bit_plan import BitPlan, PlannedLayer

__all__ = ["plan_table"]

_BLOCK = re.compile(r"\.(\d+)\.")


def plan_table(plan: BitPlan) -> str:
    """Return the table with its totals; a cell is `bits`, or `bits/group_size` where the plan mixes group sizes."""
    blocks: dict[str, dict[str, PlannedLayer]] = {}
    for layer in plan.layers:
        name = layer.format.name
        found = _BLOCK.search(name)
        part = name.rpartition(".")[2].removesuffix("_proj")
        blocks.setdefault(found[1] if found else name, {})[part] = layer
    parts = list(dict.fromkeys(part for row in blocks.values() for part in row))
    groups: dict[str, set[int]] = {}
    for row in blocks.values():
        for part, layer in row.items():
            groups.setdefault(part, set()).add(layer.format.group_size)
    total = sum(layer.predicted_kl or 0.0 for layer in plan.layers)
    shares = ["KL share"] if total > 0 else []
    rows = [["block", *parts, "bits/weight", *shares]]
    for block, row in blocks.items():
        cells = [_cell(row[part], len(groups[part]) > 1) if part in row else "" for part in parts]
        cost = sum(layer.predicted_kl or 0.0 for layer in row.values())
        rows.append([block, *cells, f"{_bits_per_weight(list(row.values())):.3f}",
                     *([f"{cost / total:.1%}"] if shares else [])])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, *_totals(plan)])


def _cell(layer: PlannedLayer, with_group: bool) -> str:
    return f"{layer.format.bits}/{layer.format.group_size}" if with_group else str(layer.format.bits)


def _bits_per_weight(layers: list[PlannedLayer]) -> float:
    return sum(layer.stored_bits for layer in layers) / sum(layer.weights for layer in layers)


def _totals(plan: BitPlan) -> list[str]:
    asked = ""
    if plan.target_bits_per_weight is not None:
        asked = f" (target {plan.target_bits_per_weight:g})"
    lines = [f"linears: {plan.linear_bits_per_weight:.3f} bits per weight{asked}, scales and palettes included"]
    if plan.rest[1]:
        asked = f" (target {plan.target_bytes:,})" if plan.target_bytes is not None else ""
        lines.append(f"model: {plan.model_bits_per_weight:.3f} bits per weight, {plan.model_bytes:,} bytes{asked}")
    known = [("predicted", plan.predicted_kl), ("measured on held-apart text", plan.measured_kl)]
    said = [f"{what} {value:.4g}" for what, value in known if value is not None]
    if said:
        lines.append(f"KL in nats/token: {', '.join(said)}")
    return [*lines, *plan.notes]
