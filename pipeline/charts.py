"""The charts of a run, as drawings: quality against size, a token's time in parts, memory over context.

Each function takes a width in pixels and returns a `Drawing` of that width, so that a page can hold a wide one and a
narrow one of the same numbers, with letters that stay readable.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dwindle.pipeline.chart_axes import TOP, Frame, draw_axes, draw_grid, nice_ticks, padded, round_ticks, spaced
from dwindle.pipeline.drawing import SERIES, Area, Box, Dot, Drawing, Line, Text
from dwindle.pipeline.figures import count, number, seconds, size
from dwindle.pipeline.label_places import label_places

__all__ = ["Curve", "Limit", "Point", "Split", "bits_of_layers", "front_of", "memory_over_context",
           "quality_against_size", "time_split", "training_curve"]  # fmt: skip

_Place = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One model: its stored bytes, its nats/token, and the index of the point it was made from."""

    label: str
    bytes: int
    nats_per_token: float
    series: int = 0
    made_from: int | None = None


def quality_against_size(points: Sequence[Point], width: float = 760) -> Drawing:
    """Return the chart: bytes (log) to the right, nats/token upwards, an arrow from each model to what it became.

    Models that no other beats in both are ringed and joined: the Pareto front.
    """
    frame = Frame(width, min(400.0, max(320.0, width * 0.52)))
    drawing = Drawing(frame.width, frame.height, "Quality against size: nats per token over stored bytes")
    if not points:
        return drawing
    sizes, losses = [p.bytes for p in points], [p.nats_per_token for p in points]
    low, high = math.log10(min(sizes)), math.log10(max(sizes))
    margin = max(0.12 * (high - low), 0.08)
    low, high = low - margin, high + margin
    bottom, top = padded(min(losses), max(losses))

    def across(value: float) -> float:
        return frame.left + (math.log10(value) - low) / (high - low) * (frame.right - frame.left)

    def up(value: float) -> float:
        return frame.bottom - (value - bottom) / (top - bottom) * (frame.bottom - TOP)

    draw_grid(drawing, frame, [(up(v), number(v)) for v in nice_ticks(bottom, top)],
          spaced([(across(v), size(v)) for v in round_ticks(10**low, 10**high)], 52))  # fmt: skip
    draw_axes(drawing, frame, "stored bytes, smaller to the left (log)", "nats/token, lower is better")
    places = [(across(p.bytes), up(p.nats_per_token)) for p in points]
    front = front_of(points)
    steps: list[_Place] = []
    if len(front) > 1:
        for index in front:
            if steps:
                steps.append((steps[-1][0], places[index][1]))
            steps.append(places[index])
        drawing.add(Line(steps, "front", title="Pareto front: no model of this run is both smaller and better"))
    lines = [(places[p.made_from], q) for p, q in zip(points, places, strict=True) if p.made_from is not None]
    drawing.add(*(arrow for start, end in lines if (arrow := _arrow(start, end))))
    walls = [*lines, *itertools.pairwise(steps)]
    labels = label_places([point.label for point in points], places, walls, frame)
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        told = f"{point.label}: {size(point.bytes)}, {number(point.nats_per_token)} nats/token"
        if index in front:
            drawing.add(Dot(x, y, 9, "ring", told))
        drawing.add(Dot(x, y, 5.5, f"s{point.series % SERIES}", told))
    for point, (x, y, anchor) in zip(points, labels, strict=True):
        drawing.add(Text(x, y, point.label, "label", anchor))
    return drawing


def front_of(points: Sequence[Point]) -> list[int]:
    """Return the indices of the models that no other beats in bytes and nats/token, the largest first.

    >>> front_of([Point("a", 100, 1.0), Point("b", 50, 1.2), Point("c", 60, 1.3)])
    [0, 1]
    """
    best, front = math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i].bytes, points[i].nats_per_token)):
        if points[index].nats_per_token < best:
            best = points[index].nats_per_token
            front.append(index)
    return front[::-1]


@dataclass(frozen=True)
class Split:
    """A token's seconds on one device: reading weights, what unpacking them adds, the cache, the overhead."""

    label: str
    weights: float
    unpacking: float
    cache: float
    overhead: float

    @property
    def parts(self) -> tuple[tuple[str, float, str], ...]:
        """Return (what, seconds, kind) in the order drawn."""
        return (
            ("weights read", self.weights, "s1"),
            ("unpacking", self.unpacking, "s3"),
            ("KV cache", self.cache, "s4"),
            ("overhead", self.overhead, "s0"),
        )

    @property
    def total(self) -> float:
        """Return seconds per token."""
        return self.weights + self.unpacking + self.cache + self.overhead

    @property
    def rate(self) -> str:
        """Return the time and the rate in words."""
        rate = f"{number(1 / self.total, 3)} tokens/s" if self.total else ""
        return f"{seconds(self.total)}  \N{MIDDLE DOT}  {rate}"


def time_split(splits: Sequence[Split], width: float = 760) -> Drawing:
    """Return bars of a decoded token's time, one per device, the longest across the sheet."""
    pushed = any(6.8 * (len(split.label) + len(split.rate)) + 16 > width for split in splits)
    below = 15 if pushed else 0  # where both do not fit into one line, the rate stands in one of its own
    row, left, top = 50 + below, 4.0, 30
    drawing = Drawing(width, top + row * len(splits) + 4, "Where a decoded token's time goes")
    if not splits:
        return drawing
    x = left
    for name, _, kind in splits[0].parts:
        drawing.add(Box(x, 6, 11, 11, kind), Text(x + 16, 16, name, "note"))
        x += 30 + 6.3 * len(name)
    longest = max(split.total for split in splits)
    for index, split in enumerate(splits):
        y, x = top + index * row, left
        drawing.add(Text(left, y + 14, split.label, "label"))
        if pushed:
            drawing.add(Text(left, y + 29, split.rate, "note"))
        else:
            drawing.add(Text(width - 6, y + 14, split.rate, "note", "end"))
        for name, value, kind in split.parts:
            wide = value / longest * (width - left - 6)
            if wide > 0:
                share = value / split.total
                told = f"{name}: {seconds(value)} ({share:.0%})"
                drawing.add(Box(x, y + 21 + below, max(wide - 1, 0.5), 15, kind, told))
            x += wide
    return drawing


@dataclass(frozen=True)
class Curve:
    """Bytes of one model at context lengths: (tokens, low, value, high)."""

    label: str
    points: Sequence[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Limit:
    """What one app may use on a device."""

    label: str
    bytes: float


def memory_over_context(curves: Sequence[Curve], limits: Sequence[Limit], width: float = 760) -> Drawing:
    """Return peak memory over context length, both log, with the range of each and a line at each device's limit."""
    frame = Frame(width, min(420.0, max(330.0, width * 0.54)), 74)
    drawing = Drawing(frame.width, frame.height, "Peak memory over context length, against what an app may use")
    lengths = [p[0] for curve in curves for p in curve.points]
    if not lengths:
        return drawing
    values = [v for curve in curves for p in curve.points for v in p[1:]] + [limit.bytes for limit in limits]
    low, high = math.log10(min(values)) - 0.12, math.log10(max(values)) + 0.3
    start, end = math.log10(min(lengths)), math.log10(max(lengths))
    end = end if end > start else start + 1

    def across(tokens: float) -> float:
        return frame.left + (math.log10(tokens) - start) / (end - start) * (frame.right - frame.left)

    def up(value: float) -> float:
        return frame.bottom - (math.log10(value) - low) / (high - low) * (frame.bottom - TOP)

    tokens = sorted(set(lengths))
    draw_grid(drawing, frame, spaced([(up(v), size(v)) for v in round_ticks(10**low, 10**high)][::-1], 18),
          spaced([(across(t), count(t)) for t in tokens], 44))  # fmt: skip
    draw_axes(drawing, frame, "tokens of context (log)", "peak memory (log)")
    free = frame.bottom
    for limit in sorted(limits, key=lambda one: one.bytes):
        y = up(limit.bytes)
        drawing.add(Line([(frame.left, y), (frame.right, y)], "limit", title=f"{limit.label}: {size(limit.bytes)}"))
    for limit in sorted(limits, key=lambda one: one.bytes):  # after all lines, so that none crosses a label
        y = up(limit.bytes)
        free = min(y - 5, free - 14)
        text = f"{limit.label}  {size(limit.bytes)}"
        wide = 6.2 * len(text) + 6
        drawing.add(
            Box(frame.right - wide, free - 10, wide, 13, "back"), Text(frame.right - 2, free, text, "miss", "end")
        )
    for index, curve in enumerate(curves):
        series = f"s{(index + 1) % SERIES}"
        upper = [(across(t), up(h)) for t, _, _, h in curve.points]
        lower = [(across(t), up(lo)) for t, lo, _, _ in curve.points]
        drawing.add(Area([*upper, *reversed(lower)], f"band {series}"))
    for index, curve in enumerate(curves):
        series = f"s{(index + 1) % SERIES}"
        line = [(across(t), up(v)) for t, _, v, _ in curve.points]
        drawing.add(Line(line, f"curve {series}", title=curve.label))
        for (x, y), (t, lo, value, hi) in zip(line, curve.points, strict=True):
            told = f"{curve.label} at {t:,} tokens: {size(value)}, {size(lo)} to {size(hi)}"
            drawing.add(Dot(x, y, 3, series, told))
    needed = sum(32 + 6.3 * len(curve.label) for curve in curves)
    x = frame.left + 4 if frame.left + 4 + needed <= width else 4.0
    for index, curve in enumerate(curves):
        drawing.add(Box(x, 4, 11, 11, f"s{(index + 1) % SERIES}"), Text(x + 16, 14, curve.label, "note"))
        x += 32 + 6.3 * len(curve.label)
    return drawing


def training_curve(points: Sequence[tuple[float, float]], width: float = 760) -> Drawing:
    """Return a training's loss over its steps."""
    frame = Frame(width, 220)
    drawing = Drawing(frame.width, frame.height, "Loss over steps of training")
    if len(points) < 2:
        return drawing
    bottom, top = padded(min(y for _, y in points), max(y for _, y in points))
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def place(step: float, loss: float) -> _Place:
        x = frame.left + (step - first) / (last - first) * (frame.right - frame.left)
        return x, frame.bottom - (loss - bottom) / (top - bottom) * (frame.bottom - TOP)

    draw_grid(drawing, frame, [(place(first, v)[1], number(v)) for v in nice_ticks(bottom, top, 4)],
          spaced([(place(v, bottom)[0], count(int(v))) for v in nice_ticks(first, last, 6)], 48))  # fmt: skip
    draw_axes(drawing, frame, "steps", "loss")
    drawing.add(Line([place(*point) for point in points], "curve s1", title="loss"))
    return drawing


def bits_of_layers(layers: Sequence[tuple[str, int]], width: float = 760) -> Drawing:
    """Return a map of (name, bits of a code): blocks from left to right, their parts below each other."""
    places = []
    for name, bits in layers:
        found = re.search(r"\.(\d+)\.", name)
        part = name.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")
        places.append((int(found[1]) if found else 0, part, name, bits))
    blocks, parts = sorted({place[0] for place in places}), list(dict.fromkeys(place[1] for place in places))
    left, top, row = 58.0, 8.0, 24.0
    drawing = Drawing(width, top + row * len(parts) + 34, "Bits of every layer")
    if not places:
        return drawing
    wide = min(90.0, (width - left - 8) / len(blocks))
    for line, part in enumerate(parts):
        drawing.add(Text(left - 8, top + row * line + 15, part, "note", "end"))
    for block, part, name, bits in places:
        x, y = left + wide * blocks.index(block), top + row * parts.index(part)
        drawing.add(Box(x, y, wide - 2, row - 2, f"bits w{min(bits, 16)}", f"{name}: {bits} bits", 3))
        if wide >= 16:
            drawing.add(Text(x + wide / 2 - 1, y + 15, str(bits), "cell", "middle"))
    drawing.add(*(Text(x, top + row * len(parts) + 14, text, "tick", "middle") for x, text in spaced(
        [(left + wide * (i + 0.5) - 1, str(block)) for i, block in enumerate(blocks)], 28)))  # fmt: skip
    drawing.add(Text(left, top + row * len(parts) + 30, "block", "axis"))
    return drawing


def _arrow(start: _Place, end: _Place) -> Line | None:
    """Return a line that stops short of both points."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    if length < 28:
        return None
    ux, uy = dx / length, dy / length
    return Line([(start[0] + 9 * ux, start[1] + 9 * uy), (end[0] - 11 * ux, end[1] - 11 * uy)], "path", arrow=True)
