"""Records of the quality table as markdown: per model and kind one table, a row per method, a column per width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from marked_page import between

__all__ = ["BEGIN", "END", "markdown", "written_into"]

BEGIN, END = "<!-- quality table: begin -->", "<!-- quality table: end -->"
_KINDS = {"palettes": "Palettes", "integers": "Integers"}


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """Return all tables; a cell is bits per weight / nats per token / KL / agreement / CPU seconds.

    The lowest KL of a column is bold.
    """
    everything = list(records)
    models = list(dict.fromkeys(r["model"] for r in everything))
    tables = [
        _table(model, kind, [r for r in everything if r["model"] == model and r["kind"] == kind])
        for model in models
        for kind in _KINDS
    ]
    return "\n\n".join(table for table in tables if table)


def written_into(page: str, records: Iterable[Mapping[str, Any]]) -> str:
    """Return the page with the tables between its marks.

    >>> written_into(f"a\\n{BEGIN}\\nold\\n{END}\\nb", []).splitlines() == ["a", BEGIN, "", END, "b"]
    True
    """
    return between(page, BEGIN, END, markdown(records))


def _table(model: str, kind: str, records: list[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    widths = sorted({r["bits"] for r in records}, key=lambda bits: (not float(bits).is_integer(), -bits))
    rows = list(dict.fromkeys((r["peer"], r["method"]) for r in records))
    cells = {(r["peer"], r["method"], r["bits"]): r for r in records}
    best = {bits: _lowest([r for r in records if r["bits"] == bits and "kl" in r]) for bits in widths}
    heads = [f"{bits:g} bits" if float(bits).is_integer() else f"mixed {bits:g}" for bits in widths]
    lines = [f"**{model}, {_KINDS[kind].lower()}**", "", "| " + " | ".join(["tool, method", *heads]) + " |",
             "|---" * (len(heads) + 1) + "|"]  # fmt: skip
    notes = []
    for peer, method in rows:
        line = [f"{peer}, {method}"]
        for bits in widths:
            record = cells.get((peer, method, bits))
            line.append(_cell(record, record is not None and record.get("kl") == best[bits]))
            notes += _notes(record)
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, *([""] if notes else []), *dict.fromkeys(notes)])


def _lowest(records: list[Mapping[str, Any]]) -> float | None:
    if not records:
        return None
    return min(r["kl"] for r in records)


def _cell(record: Mapping[str, Any] | None, best: bool) -> str:
    if record is None:
        return "-"
    if "failed" in record:
        return "fails"
    kl = f"{record['kl']:.4f}"
    parts = [f"{record['bits_per_weight']:.3f}", f"{record['nats_per_token']:.4f}", f"**{kl}**" if best else kl,
             f"{record['agreement']:.3f}", f"{record['cpu_seconds']:.0f} s"]  # fmt: skip
    return " / ".join(parts)


def _notes(record: Mapping[str, Any] | None) -> list[str]:
    if record is None:
        return []
    who = f"{record['peer']}, {record['method']}"
    if "failed" in record:
        return [f"- {who}, {record['bits']:g} bits: {record['failed'][:160]}"]
    left = record["unquantized"]
    return [f"- {who} leaves {len(left)} linears float (16 bits counted): {', '.join(left[:3])} ..."] if left else []
