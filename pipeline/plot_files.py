"""Every chart of a run as files, the page's drawings: SVG (light and dark in one) and, with matplotlib, PNG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from dwindle.pipeline.charts import (
    bits_of_layers,
    memory_over_context,
    quality_against_size,
    time_split,
    training_curve,
)
from dwindle.pipeline.device_views import device_views
from dwindle.pipeline.drawing import Drawing
from dwindle.pipeline.html_report import quality_points
from dwindle.pipeline.step_facts import history_of
from dwindle.report import Report, StepRecord

__all__ = ["drawings", "write_plots"]


def drawings(report: Report) -> dict[str, Drawing]:
    """Return name -> drawing of every chart that has something to show."""
    views = device_views(report)
    found = {
        "quality-against-size": quality_against_size(quality_points(report)),
        "time-split": time_split(views.splits),
        "memory-over-context": memory_over_context(views.curves, views.limits),
    }
    for number, step in enumerate(report.steps, 1):
        if points := history_of(step):
            found[f"loss-{number:02d}"] = training_curve(points)
        if bits := _planned_bits(step):
            variant = f"-{step.variant}" if step.variant else ""
            found[f"bits-{number:02d}{variant}"] = bits_of_layers(bits)
    return {name: drawing for name, drawing in found.items() if drawing.shapes}


def _planned_bits(step: StepRecord) -> list[tuple[str, int]]:
    """Return (name, bits) of the layers that a quantize step planned."""
    plan = step.details.get("plan")
    rows = plan.get("layers") if isinstance(plan, Mapping) else None
    told = [(r.get("name"), r.get("bits")) for r in rows if isinstance(r, Mapping)] if isinstance(rows, list) else []
    return [(str(name), bits) for name, bits in told if isinstance(bits, int)]


def write_plots(report: Report, folder: Path) -> tuple[list[Path], str | None]:
    """Write the charts into `folder`; return the files, and why there is no PNG if there is none."""
    written = []
    has_png = find_spec("matplotlib") is not None
    for name, drawing in drawings(report).items():
        name = re.sub(r"[^\w.-]+", "-", name)  # a variant is called what somebody liked
        written.append(folder / f"{name}.svg")
        drawing.write_svg(written[-1])
        if has_png:
            written.append(folder / f"{name}.png")
            drawing.write_png(written[-1])
    return written, None if has_png else "PNG needs matplotlib: pip install 'dwindle[plots]'"
