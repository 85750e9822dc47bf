"""Charts as inline SVG, drawn here: no script, no request, colours from the page's style sheet.

Each function returns safe markup: every text that came from outside is escaped. Sizes are in user units of the
`viewBox`; the page scales the drawing to its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from dwindle.pipeline.figures import number, size

_Place = tuple[float, float]

__all__ = ["Point", "nice_ticks", "quality_against_size"]

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 20, 52
_LABEL_HEIGHT = 17
_LETTER_WIDTH = 6.6


@dataclass(frozen=True)
class Point:
    """One model: its stored bytes, its nats/token, and the index of the point it was made from."""

    label: str
    bytes: int
    nats_per_token: float
    series: int = 0
    made_from: int | None = None


def quality_against_size(points: Sequence[Point]) -> Markup:
    """Return the chart: bytes (log) to the right, nats/token upwards, an arrow from each model to what it became."""
    if not points:
        return Markup("")
    sizes = [p.bytes for p in points]
    losses = [p.nats_per_token for p in points]
    low, high = math.log10(min(sizes)), math.log10(max(sizes))
    margin = max(0.12 * (high - low), 0.08)
    low, high = low - margin, high + margin
    bottom, top = _padded(min(losses), max(losses))

    def across(value: float) -> float:
        return _LEFT + (math.log10(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="quality-size-title">'
        '<title id="quality-size-title">Quality against size: nats per token over stored bytes</title>'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" class="arrowhead"/></marker></defs>'
    ]
    for value in nice_ticks(bottom, top):
        y = up(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value in _size_ticks(10**low, 10**high):
        x = across(value)
        parts.append(
            f'<line class="grid" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" x1="{x:.1f}" x2="{x:.1f}"/>'
            f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{size(value)}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        "stored bytes, smaller to the left (log scale)</text>"
        f'<text class="axis" x="16" y="{(_TOP + _HEIGHT - _BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(_TOP + _HEIGHT - _BOTTOM) / 2})">nats/token, lower is better</text>'
    )
    places = [(across(p.bytes), up(p.nats_per_token)) for p in points]
    for point, place in zip(points, places, strict=True):
        if point.made_from is not None:
            parts.append(_arrow(places[point.made_from], place))
    lines = [(places[p.made_from], q) for p, q in zip(points, places, strict=True) if p.made_from is not None]
    labels = _label_places(points, places, lines)
    for point, (x, y), (label_x, label_y, anchor) in zip(points, places, labels, strict=True):
        told = f"{point.label}: {size(point.bytes)}, {number(point.nats_per_token)} nats/token"
        parts.append(
            f'<circle class="point s{point.series % 4}" cx="{x:.1f}" cy="{y:.1f}" r="5.5">'
            f"<title>{escape(told)}</title></circle>"
            f'<text class="label" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">'
            f"{escape(point.label)}</text>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))  # noqa: S704  (texts from outside are escaped above)


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


def _size_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 x 10^n within the range; only 1 x 10^n when there would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**n for n in powers for m in (1, 2, 5) if low <= m * 10.0**n <= high]
    return fine if len(fine) <= 9 else [v for v in fine if math.isclose(math.log10(v) % 1, 0, abs_tol=1e-9)]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = max(0.15 * (high - low), 0.01 * abs(high), 1e-6)
    return low - room, high + room


def _arrow(start: _Place, end: _Place) -> str:
    """Return a line that stops short of both points."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    if length < 24:
        return ""
    ux, uy = dx / length, dy / length
    return (
        f'<line class="path" x1="{start[0] + 8 * ux:.1f}" y1="{start[1] + 8 * uy:.1f}" '
        f'x2="{end[0] - 9 * ux:.1f}" y2="{end[1] - 9 * uy:.1f}" marker-end="url(#arrow)"/>'
    )


def _label_places(
    points: Sequence[Point], places: Sequence[_Place], lines: Sequence[tuple[_Place, _Place]]
) -> list[tuple[float, float, str]]:
    """Return a place for each label beside its point that covers no label, no point and no arrow."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    for (x0, y0), (x1, y1) in lines:
        stops = max(2, int(math.hypot(x1 - x0, y1 - y0) / 6))
        for i in range(stops + 1):
            x, y = x0 + (x1 - x0) * i / stops, y0 + (y1 - y0) * i / stops
            taken.append((x - 1, y - 1, x + 1, y + 1))
    found: list[tuple[float, float, str]] = []
    for point, (x, y) in zip(points, places, strict=True):
        width = _LETTER_WIDTH * len(point.label)
        candidates = [(side, shift) for shift in _shifts() for side in ("start", "end", "middle")]
        best = (x + 11, y + 4.5, "start")
        for anchor, shift in candidates:
            left = {"start": x + 11, "end": x - 11 - width, "middle": x - width / 2}[anchor]
            base = y + 4.5 + shift
            box = (left, base - 12, left + width, base + 4)
            inside = box[0] >= _LEFT and box[2] <= _WIDTH - 4 and box[1] >= 2 and box[3] <= _HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                best = ({"start": x + 11, "end": x - 11, "middle": x}[anchor], base, anchor)
                taken.append(box)
                break
        found.append(best)
    return found


def _shifts() -> list[float]:
    return [0.0] + [sign * n * _LABEL_HEIGHT for n in range(1, 6) for sign in (-1, 1)]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
