"""Pieces of Markdown: text that cannot end what it stands in, code, tables, folded blocks."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from dwindle.pipeline import figures

__all__ = ["code", "details", "escape_markdown", "table"]

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$!])")


def escape_markdown(text: object) -> str:
    r"""Return text that Markdown shows as it is, on one line.

    >>> escape_markdown("a_b | c")
    'a\\_b \\| c'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """Return inline code; a backtick or a bar inside cannot end it or its cell.

    >>> code("a`b | c")
    "`a'b / c`"
    """
    return f"`{' '.join(str(text).split()).replace('`', chr(39)).replace('|', '/')}`"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; columns that hold numbers alone stand to the right."""
    columns = zip(*rows, strict=True)
    marks = ["---:" if all(c[:1].isdigit() or c == figures.UNKNOWN for c in column) else "---" for column in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, marks, *rows])


def details(summary: str, body: str) -> str:
    """Return a block that a reader opens."""
    return f"<details><summary>{html.escape(summary)}</summary>\n\n{body}\n\n</details>"
