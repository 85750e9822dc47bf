"""A generated table inside a written page: whatever stands between two marks is replaced."""

from __future__ import annotations

__all__ = ["between"]


def between(page: str, begin: str, end: str, body: str) -> str:
    r"""Return the page with `body` between its marks.

    >>> between("a\nBEGIN\nold\nEND\nb", "BEGIN", "END", "new").splitlines()
    ['a', 'BEGIN', 'new', 'END', 'b']
    """
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"the page has no line {begin} with a line {end} after it; add both where the table belongs.")
    return f"{before}{begin}\n{body}\n{end}{after}"
