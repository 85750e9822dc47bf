"""Where the labels of a chart's points go: beside them, over no other label, no point and no line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dwindle.pipeline.chart_axes import Frame

__all__ = ["label_places"]

_LABEL_HEIGHT = 17
_LETTER_WIDTH = 6.6
_Place = tuple[float, float]


def label_places(
    texts: Sequence[str], places: Sequence[_Place], lines: Sequence[tuple[_Place, _Place]], frame: Frame
) -> list[tuple[float, float, str]]:
    """Return a place for each label beside its point that covers no label, no point and no arrow."""
    taken = [(x - 9, y - 9, x + 9, y + 9) for x, y in places]
    for (x0, y0), (x1, y1) in lines:
        stops = max(2, int(math.hypot(x1 - x0, y1 - y0) / 6))
        for i in range(stops + 1):
            x, y = x0 + (x1 - x0) * i / stops, y0 + (y1 - y0) * i / stops
            taken.append((x - 1, y - 1, x + 1, y + 1))
    found: list[tuple[float, float, str]] = []
    for text, (x, y) in zip(texts, places, strict=True):
        width = _LETTER_WIDTH * len(text)
        best = (x + 13, y + 4.5, "start") if x + 13 + width <= frame.width - 4 else (x - 13, y + 4.5, "end")
        for shift, anchor in itertools.product(_shifts(), ("start", "end", "middle")):
            left = {"start": x + 13, "end": x - 13 - width, "middle": x - width / 2}[anchor]
            base = y + 4.5 + shift
            box = (left, base - 12, left + width, base + 4)
            inside = box[0] >= frame.left and box[2] <= frame.width - 4 and box[1] >= 2 and box[3] <= frame.bottom
            if inside and not any(_overlap(box, other) for other in taken):
                best = ({"start": x + 13, "end": x - 13, "middle": x}[anchor], base, anchor)
                taken.append(box)
                break
        found.append(best)
    return found


def _shifts() -> list[float]:
    return [0.0] + [sign * n * _LABEL_HEIGHT for n in range(1, 6) for sign in (-1, 1)]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
