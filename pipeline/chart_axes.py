"""Axes of a chart: where they stand, round values along them, the grid and what it is called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dwindle.pipeline.drawing import Drawing, Line, Text

__all__ = ["TOP", "Frame", "draw_axes", "draw_grid", "nice_ticks", "padded", "round_ticks", "spaced"]

TOP = 20
_RIGHT, _BOTTOM = 24, 52


@dataclass(frozen=True)
class Frame:
    """Where the axes stand."""

    width: float
    height: float
    left: float = 64

    @property
    def right(self) -> float:
        """Return where the drawing ends on the right."""
        return self.width - _RIGHT

    @property
    def bottom(self) -> float:
        """Return where the lower axis stands."""
        return self.height - _BOTTOM


def draw_grid(
    drawing: Drawing, frame: Frame, rows: Sequence[tuple[float, str]], columns: Sequence[tuple[float, str]]
) -> None:
    """Draw lines at (place, value as text) with the values beside them."""
    for y, text in rows:
        drawing.add(Line([(frame.left, y), (frame.right, y)], "grid"), Text(frame.left - 8, y + 4, text, "tick", "end"))
    for x, text in columns:
        drawing.add(Line([(x, TOP), (x, frame.bottom)], "grid"), Text(x, frame.bottom + 18, text, "tick", "middle"))


def draw_axes(drawing: Drawing, frame: Frame, across: str, up: str) -> None:
    """Write what the axes mean."""
    drawing.add(
        Text((frame.left + frame.right) / 2, frame.height - 10, across, "axis", "middle"),
        Text(15, (TOP + frame.bottom) / 2, up, "axis", "middle", turned=True),
    )


def spaced(ticks: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Return the ticks without those that stand too near to the one before."""
    kept: list[tuple[float, str]] = []
    for place, text in ticks:
        if not kept or abs(place - kept[-1][0]) >= gap:
            kept.append((place, text))
    return kept


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about `wanted` round values within [low, high].

    >>> nice_ticks(1.13, 1.92)
    [1.2, 1.4, 1.6, 1.8]
    """
    raw = (high - low) / wanted
    scale = 10 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def round_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 x 10^n within the range; only 1 x 10^n when there would be many, even steps when few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**n for n in powers for m in (1, 2, 5) if low <= m * 10.0**n <= high]
    if len(fine) < 3:
        return nice_ticks(low, high)
    return fine if len(fine) <= 9 else [v for v in fine if math.isclose(math.log10(v) % 1, 0, abs_tol=1e-9)]


def padded(low: float, high: float) -> tuple[float, float]:
    """Return a range a little wider than low to high."""
    room = max(0.15 * (high - low), 0.01 * abs(high), 1e-6)
    return low - room, high + room
