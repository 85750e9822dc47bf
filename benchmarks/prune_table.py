"""Records of the pruning benchmark as markdown: one table a share, a row per way to cut, a column per model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from marked_page import between

__all__ = ["BEGIN", "END", "markdown", "written_into"]

BEGIN, END = "<!-- pruning table: begin -->", "<!-- pruning table: end -->"
_TITLES = {
    "half": ("FFN at 50 %", "nats/token as cut / after 300 steps of distillation"),
    "third": ("FFN at 34 %", "nats/token as cut, after the masks where there are any / after 600 steps in all"),
}  # fmt: skip
Record = Mapping[str, Any]


def markdown(records: Iterable[Record]) -> str:
    """Return both tables; the lowest nats/token of a model and stage are bold."""
    everything = list(records)
    tables = [_table(name, [r for r in everything if r["table"] == name]) for name in _TITLES]
    return "\n\n".join(table for table in tables if table)


def written_into(page: str, records: Iterable[Record]) -> str:
    """Return the page with the tables between its marks.

    >>> written_into(f"a\\n{BEGIN}\\nold\\n{END}\\nb", []).splitlines() == ["a", BEGIN, "", END, "b"]
    True
    """
    return between(page, BEGIN, END, markdown(records))


def _table(name: str, records: list[Record]) -> str:
    if not records:
        return ""
    title, meaning = _TITLES[name]
    models = list(dict.fromkeys(r["model"] for r in records))
    cells = {(r["row"], r["model"], r["stage"]): r for r in records}
    best = {
        (model, stage): min((r["nats_per_token"] for r in records
                             if (r["model"], r["stage"]) == (model, stage) and "nats_per_token" in r), default=None)
        for model in models for stage in ("cut", "trained")
    }  # fmt: skip
    lines = [f"**{title}**: {meaning}", "", f"| how | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for row in dict.fromkeys(r["row"] for r in records):
        texts = [
            " / ".join(_cell(cells.get((row, model, stage)), best[model, stage]) for stage in ("cut", "trained"))
            for model in models
        ]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cell(record: Record | None, best: float | None) -> str:
    if record is None:
        return "-"
    if "failed" in record:
        return "fails"
    told = f"{record['nats_per_token']:.4f}"
    return f"**{told}**" if record["nats_per_token"] == best else told
