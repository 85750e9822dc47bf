"""A comparison as text for a terminal and as Markdown for a pull request."""

from __future__ import annotations

import itertools

from dwindle.pipeline import figures
from dwindle.pipeline.compare import Comparison, Row
from dwindle.pipeline.markdown import code, details, escape_markdown, table

__all__ = ["change_text", "comparison_markdown", "comparison_text"]


_WIDEST_KEY = 48


def change_text(worse: float | None) -> str:
    """Return how far a number moved, and which way that is.

    >>> change_text(0.125), change_text(-0.5), change_text(0.0)
    ('12.5% worse', '50.0% better', '')
    """
    return "" if not worse else f"{abs(worse):.1%} {'worse' if worse > 0 else 'better'}"


def comparison_text(found: Comparison, *, everything: bool = False) -> str:
    """Return aligned text: what was asked for, then what changed, or everything, one block per thing compared."""
    if not found.rows and not found.differences:
        return "The runs have nothing in common."
    lines: list[str] = []
    if found.differences:
        lines += ["asked for"]
        wide = min(_WIDEST_KEY, max(28, *(len(d.key) for d in found.differences)))
        lines += [f"  {d.key:{wide}} {' -> '.join(v or figures.UNKNOWN for v in d.values)}" for d in found.differences]
    shown = [row for row in found.rows if everything or row.changed]
    for what, rows in itertools.groupby(shown, key=lambda row: row.what):
        lines += ["", what, *(_line(row) for row in rows)]
    same = sum(not row.changed for row in found.rows)
    if same and not everything:
        lines += ["", f"{same} of {len(found.rows)} numbers are the same (--all shows them)."]
    return "\n".join(lines).strip("\n")


def _line(row: Row) -> str:
    values = " -> ".join(
        f"{figures.named(row.name, value):>{12 if i == 0 else 0}}" for i, value in enumerate(row.values)
    )
    told = [change_text(worse) or note for worse, note in zip(row.worse[1:], row.notes[1:], strict=True)]
    return f"  {row.name:28} {values:27} {' | '.join(t for t in told if t)}".rstrip()


def comparison_markdown(found: Comparison) -> str:
    """Return Markdown: the verdict, what moved, and folded what was asked for."""
    names = [code(name) for name in found.names]
    parts = [f"### {' against '.join([names[-1], names[0]]) if len(names) == 2 else ', '.join(names)}"]
    if found.max_regression is not None:
        limit = f"{found.max_regression:.1%}"
        count = len(found.failures)
        parts.append(
            f"**{count} regression{'s' * (count > 1)} of more than {limit}**\n\n"
            + "\n".join(f"- {escape_markdown(line)}" for line in found.failures)
            if count
            else f"No regression of more than {limit}."
        )
    changed = [row for row in found.rows if row.changed]
    if changed:
        heads = ["", "Metric", *names, "Change"]
        parts.append(table(heads, [_cells(row) for row in changed]))
    same = len(found.rows) - len(changed)
    parts.append(f"{same} of {len(found.rows)} numbers are the same.")
    if found.differences:
        rows = [
            [code(d.key), *(figures.UNKNOWN if v is None else escape_markdown(v) for v in d.values)]
            for d in found.differences
        ]
        parts.append(details("What differs in recipe, inputs and versions", table(["Key", *names], rows)))
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> list[str]:
    told = [change_text(worse) or note for worse, note in zip(row.worse[1:], row.notes[1:], strict=True)]
    values = [figures.named(row.name, value) for value in row.values]
    mark = "" if row.judged else " (not judged)"
    return [
        escape_markdown(row.what),
        f"{escape_markdown(row.name).replace(chr(92) + '_', '_')}{mark}",
        *values,
        "; ".join(escape_markdown(t) for t in told if t),
    ]
