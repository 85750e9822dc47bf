"""A comparison as a page of its own, in the style of report.html."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from dwindle.pipeline.charts import Point, quality_against_size
from dwindle.pipeline.compare import Comparison, Run
from dwindle.pipeline.comparison_text import change_text
from dwindle.pipeline.html_report import Verdict, quality_points
from dwindle.pipeline.page import render_page, two_widths

__all__ = ["comparison_page"]


def comparison_page(found: Comparison, runs: Sequence[Run]) -> str:
    """Return the page; `runs` are those that were compared."""
    points = _ends(runs)
    groups = [(what, list(rows)) for what, rows in itertools.groupby(found.rows, key=lambda row: row.what)]
    return render_page(
        "comparison.html.j2",
        ("page.js",),
        title=" against ".join(found.names),
        found=found,
        groups=groups,
        changed=sum(row.changed for row in found.rows),
        verdict=_verdict(found),
        change_text=change_text,
        chart=two_widths(lambda width: quality_against_size(points, width), 1060) if len(points) > 1 else None,
    )


def _verdict(found: Comparison) -> Verdict:
    if found.max_regression is None:
        return Verdict("open", "Nothing was judged")
    count = len(found.failures)
    limit = f"more than {found.max_regression:.1%}"
    if count:
        return Verdict("failed", f"{count} regression{'s' * (count > 1)} of {limit}")
    return Verdict("passed", f"No regression of {limit}")


def _ends(runs: Sequence[Run]) -> list[Point]:
    """Return the last model of each variant of each run, a series to a run; nothing where they count other tokens."""
    points = []
    for number, run in enumerate(runs):
        line = quality_points(run.report)
        made_from = {point.made_from for point in line}
        ends = [point for index, point in enumerate(line) if index not in made_from]
        points += [replace(p, label=f"{run.name}: {p.label}", series=number + 1, made_from=None) for p in ends]
    return points
